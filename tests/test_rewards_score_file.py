"""``score_file``: rows in, the same rows with scores out, and errors that name row and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rewardmap.rewards.score_file import ADDED, score_file
from rewardmap.transit.graph import Line, Network
from rewardmap.transit.topology import network_as_json
from rewardmap.types import DataError

METRO = {
    "Red Line": ["Alpha Station", "Bravo Station（换乘站）"],
    "Blue Line": ["Bravo Station", "Charlie Station"],
}
PLAN = "Route Name: Red Line\nDeparture Stop: Alpha\nArrival Stop: Bravo"


def row(**fields: object) -> dict[str, Any]:
    return {
        "type": "planning", "answer": -1, "station_1": "Alpha Station", "station_2": "Bravo Station",
        "difficulty_city": "hard", "question_transfer_count": 0, "json": "./stations/made/up.json",
        "response": PLAN, "city": "up", **fields,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "stations" / "made").mkdir(parents=True)
    (tmp_path / "stations" / "made" / "up.json").write_text(json.dumps(METRO), "utf-8")
    return tmp_path


def write(folder: Path, rows: list[Any]) -> Path:
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), "utf-8")
    return path


def test_rows_keep_their_order_and_fields(folder: Path) -> None:
    yes = row(
        type="TorF1",
        answer=1,
        response=r"\boxed{yes}",
        question_transfer_count=None,
        station_2=None,
        group="b",
    )
    rows = [
        row(group="a", extra={"k": "站"}),
        row(group="a", response="\ud800 nothing\u2028"),
        yes,
        {**yes, "group": "b"},
        row(group=3, response="no"),
    ]
    out = folder / "out.jsonl"
    summary = score_file(write(folder, rows), out)
    got = [json.loads(line) for line in out.read_text("utf-8").split("\n")[:-1]]
    assert [{key: one[key] for key in one if key not in ADDED} for one in got] == rows
    assert [one["score"] for one in got] == [15.75, 0.0, 15.0, 15.0, 0.0]
    assert [one["failure"] for one in got] == ["none", "bad_format", "none", "none", "bad_format"]
    assert got[0]["correct"] is True and got[0]["weight"] == 1.5 and got[0]["detail"] == 1.0
    assert (summary.rows, summary.groups, summary.zero_variance_groups) == (5, 2, 1)
    assert summary.kinds["planning"].format_failures == 2
    table = summary.table()
    assert "planning" in table and "rows/s" in table and "groups with equal scores: 1 of 2" in table
    assert not list(folder.glob("*.partial"))


@pytest.mark.parametrize(("mode", "score"), [("reference", 15.75), ("paper", 21.0), ("graph", 22.5)])
def test_modes(folder: Path, mode: Any, score: float) -> None:
    score_file(write(folder, [row()]), folder / "out.jsonl", mode=mode)
    assert json.loads((folder / "out.jsonl").read_text("utf-8"))["score"] == score


def test_graph_knows_branches_as_training_does(folder: Path) -> None:
    """The released list of a line with a branch; and a geometry file, which generated data sets have."""
    branched = {"Red": ["A", "B (Branch-starting Station)", "C", "Bayfront Station", "D"]}
    (folder / "stations" / "made" / "up.json").write_text(json.dumps(branched))
    plan = "Route Name: Red\nDeparture Stop: C\nArrival Stop: D"
    path = write(folder, [row(station_1="C", station_2="D", response=plan)])
    score_file(path, folder / "out.jsonl", mode="graph")
    assert json.loads((folder / "out.jsonl").read_text())["failure"] == "wrong_branch"
    ring = Network("made/up", "easy", (Line("Red", "#000000", ("A", "B", "C", "Bayfront", "D"), loop=True),), {})
    (folder / "geometry" / "made").mkdir(parents=True)
    (folder / "geometry" / "made" / "up.json").write_text(json.dumps(network_as_json(ring)))
    score_file(path, folder / "out.jsonl", mode="graph")
    assert json.loads((folder / "out.jsonl").read_text())["failure"] == "none"
    (folder / "geometry" / "made" / "up.json").write_text("{")
    with pytest.raises(DataError, match=r"row 1, field 'json': .*up\.json"):
        score_file(path, mode="graph")


def test_the_stations_file_is_found(folder: Path, tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    path = write(elsewhere, [row()])
    with pytest.raises(DataError, match="row 1, field 'json': no file"):
        score_file(path)
    assert score_file(path, stations_root=folder).rows == 1
    monkeypatch.chdir(folder)
    assert score_file(path).rows == 1
    absolute = write(elsewhere, [row(json=str(folder / "stations/made/up.json"))])
    assert score_file(absolute).rows == 1


BAD: list[tuple[Any, str]] = [
    (row(type="Counting9"), "'type'"),
    (row(answer="2"), "'answer'"),
    (row(answer=1.0), "'answer'"),
    (row(answer=True), "'answer'"),
    (row(difficulty_city="medium"), "'difficulty_city'"),
    (row(question_transfer_count=-1), "'question_transfer_count'"),
    (row(question_transfer_count=None), "'question_transfer_count'"),
    (row(station_1="Atlantis"), "'station_1'"),
    (row(station_2=None), "'station_2'"),
    (row(response=None), "'response'"),
    (row(json="./stations/made/off.json"), "'json'"),
    (row(json="x" * 5000), "'json'"),
    (row(json="\0"), "'json'"),
    ([1], "list"),
]


@pytest.mark.parametrize(("bad", "named"), BAD)
def test_bad_rows_name_row_and_field(folder: Path, bad: Any, named: str) -> None:
    path = write(folder, [row(), bad])
    with pytest.raises(DataError, match="row 2") as error:
        score_file(path, folder / "out.jsonl")
    assert named in str(error.value) and str(path) in str(error.value)
    assert [one.name for one in folder.glob("out*")] == []


@pytest.mark.parametrize("name", [key for key in row() if key != "city"])
def test_missing_fields_are_named(folder: Path, name: str) -> None:
    path = write(folder, [{key: value for key, value in row().items() if key != name}])
    with pytest.raises(DataError, match=f"row 1, field '{name}'"):
        score_file(path)


@pytest.mark.parametrize("line", [b"{", b'{"type": "\xff"}', b"\xff\xfe", b"nonsense", b"[" * 100_000])
def test_broken_lines(folder: Path, line: bytes) -> None:
    path = folder / "in.jsonl"
    path.write_bytes(b"\n" + line + b"\n")
    with pytest.raises(DataError, match="row 2"):
        score_file(path)


def test_broken_stations_files(folder: Path) -> None:
    path = write(folder, [row()])
    for content in ("[", "[1]", '{"A": "B"}', '{"A": [1]}'):
        (folder / "stations" / "made" / "up.json").write_text(content)
        with pytest.raises(DataError, match="row 1, field 'json'"):
            score_file(path)


def test_no_file(folder: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.jsonl"):
        score_file(folder / "absent.jsonl")
    assert score_file(write(folder, [])).rows == 0
