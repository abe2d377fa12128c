"""``score_file``: rows in, the same rows with scores out, and errors that name row and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal
from unicodedata import normalize

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
    (row(station_2="bravvo"), "'bravvo' is no station of ./stations/made/up.json; the nearest name there is 'Bravo"),
    (row(station_2="alpha"), "'station_2': 'alpha' is the station of 'station_1' ('Alpha Station'); name another"),
    (row(type="TorF1", answer=2), "'answer': 2 is not an integer from 0 to 1"),
    (row(type="TorF2", answer="maybe"), "'answer': 'maybe' is not an integer from 0 to 1"),
    (row(type="Counting1", answer=4), "'answer': 4 is not an integer from 0 to 3"),
    (row(type="Counting2", answer="abc"), "'answer': 'abc' is not an integer from 0 to 9999"),
    (row(type="Counting3", answer=-1), "'answer': -1 is not an integer from 0 to 9999"),
    (row(question_transfer_count=10**30), "'question_transfer_count'"),
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


@pytest.mark.parametrize(
    "line", [b"{", b'{"type": "\xff"}', b"\xff\xfe", b"nonsense", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_broken_lines(folder: Path, line: bytes) -> None:
    path = folder / "in.jsonl"
    path.write_bytes(b"\n" + line + b"\n")
    with pytest.raises(DataError, match="row 2"):
        score_file(path)


def test_broken_stations_files(folder: Path) -> None:
    path = write(folder, [row()])
    twice = json.dumps(METRO)[:-1] + ', "Red Line": ["Alpha", "Delta"]}'
    for content in ("[", "[1]", '{"A": "B"}', '{"A": [1]}', twice):
        (folder / "stations" / "made" / "up.json").write_text(content)
        with pytest.raises(DataError, match="row 1, field 'json'"):
            score_file(path)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_agree_in_whatever_form_each_is_stored(folder: Path, form: Literal["NFC", "NFD"]) -> None:
    stations = {"Red Line": [normalize(form, "Zürich"), "Bravo"]}
    (folder / "stations" / "made" / "up.json").write_text(json.dumps(stations))
    rows = [
        row(station_1=normalize(one, "Zürich"), response=normalize(other, PLAN.replace("Alpha", "Zürich")))
        for one in ("NFC", "NFD")
        for other in ("NFC", "NFD")
    ]
    assert score_file(write(folder, rows), folder / "out.jsonl").kinds["planning"].correct == 4
    assert [json.loads(line)["response"] for line in (folder / "out.jsonl").open()] == [one["response"] for one in rows]


def test_no_file(folder: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.jsonl"):
        score_file(folder / "absent.jsonl")
    with pytest.raises(DataError, match=r"in\.jsonl: no rows, so that nothing was scored"):
        score_file(write(folder, []), folder / "out.jsonl")
    assert {one.name for one in folder.iterdir()} == {"stations", "in.jsonl"}


def test_only_a_file_is_written_over(folder: Path) -> None:
    path = write(folder, [row()])
    (folder / "out").mkdir()
    before = sorted(folder.rglob("*"))
    with pytest.raises(DataError, match="out: not a file"):
        score_file(path, folder / "out")
    assert sorted(folder.rglob("*")) == before
    score_file(path, folder / "new" / "out.jsonl")
    assert [one.name for one in (folder / "new").iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize("field", ["extra", "group", "fine_grained_answer"])
@pytest.mark.parametrize("as_text", [False, True])
def test_deep_rows_are_scored_or_named(folder: Path, field: str, as_text: bool) -> None:
    """Reading and writing JSON give up at different depths, near 1,000 or, from Python 3.12 on, far beyond."""
    ends = set()
    for depth in (900, *range(970, 1002), 200_000):
        deep = "[" * depth + "]" * depth
        value = json.dumps(deep) if as_text else deep
        (folder / "in.jsonl").write_text(json.dumps(row())[:-1] + f', "{field}": {value}}}\n')
        try:
            ends.add(score_file(folder / "in.jsonl", folder / "out.jsonl").rows)
        except DataError as error:
            assert "row 1" in str(error)
            ends.add(0)
    assert ends == ({1} if as_text and field != "fine_grained_answer" else {0, 1})


def test_names_that_any_mode_knows_are_no_error(folder: Path) -> None:
    """The published normaliser never finds the released ``东管头南站 `` again: it keeps the 站 before the space."""
    (folder / "stations" / "made" / "up.json").write_text(json.dumps({"Line 16": ["东管头南站 ", "国家图书馆站"]}))
    plan = "Route Name: Line 16\nDeparture Stop: 东管头南站\nArrival Stop: 国家图书馆站"
    for mode, right in (("reference", False), ("graph", True)):
        for name in ("东管头南站", "东管头南站 （换乘站）"):
            path = write(folder, [row(station_1=name, station_2="国家图书馆", response=plan)])
            score_file(path, folder / "out.jsonl", mode=mode)  # type: ignore[arg-type]
            assert json.loads((folder / "out.jsonl").read_text("utf-8"))["correct"] is right
