"""Loading data sets in all released forms, and refusing bad ones with file, row and field named."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from unicodedata import normalize

import datasets
import pytest
from PIL import Image
from typer.testing import CliRunner

from rewardmap.cli import app
from rewardmap.config_file import load_config, with_absolute_paths
from rewardmap.files import open_picture
from rewardmap.rewards import Rubric
from rewardmap.train.examine import data_folder
from rewardmap.transit import Line, Network, gold_response, load_dataset
from rewardmap.transit.draw import encode_png
from rewardmap.transit.questions import question_text
from rewardmap.transit.reasonmap import DATA_FOLDER, write_rows
from rewardmap.transit.topology import network_as_json
from rewardmap.transit.wording import planning_text
from rewardmap.types import DataError

REAL = Path(__file__).parents[2] / "shared" / "data"
NETWORK = {"Red Line": ["A Station", "B Station (Transfer Station)"], "Blue Line": ["B Station", "C Station"]}

LEG = {"route_name": "Red Line", "departure_stop": "A Station", "arrival_stop": "B Station"}


def png(size: tuple[int, int] = (60, 40)) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 80).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def row(**changes: Any) -> dict[str, Any]:
    content = {
        "country": "x",
        "city": "y",
        "station_1": "A Station",
        "station_2": "B Station",
        "figure": "./maps/x/y.png",
        "json": "./stations/x/y.json",
        "question": question_text("TorF1", "A Station", "B Station"),
        "answer": 1,
        "type": "TorF1",
        "difficulty_city": "easy",
        "city_line_count": 2,
        "city_transfer_count": 1,
        "question_transfer_count": 0,
    }
    return {key: value for key, value in {**content, **changes}.items() if value is not ...}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with one map and its network, but no rows."""
    for name, content in (("maps/x/y.png", png()), ("stations/x/y.json", json.dumps(NETWORK).encode())):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_rows_without_splits_load_whole_and_absent_columns_are_fine(root: Path) -> None:
    planning = row(type="planning", answer=-1, station_2="C Station", question_transfer_count=1)
    write_rows(root, [row(), planning], None)
    data = load_dataset(root)
    first, second = data.problems
    assert (first.kind, first.answer, first.network_id, first.fine_grained_answer) == (
        "TorF1",
        1,
        "x/y",
        None,
    )
    assert Path(str(first.image)).read_bytes() == (root / "maps/x/y.png").read_bytes()
    assert (second.answer, second.transfers_required) == (-1, 1)
    assert first.uid != second.uid
    assert data.networks["x/y"]["Red Line"] == NETWORK["Red Line"]
    with pytest.raises(ValueError, match="holds no route"):
        gold_response(second)


def test_a_route_without_what_its_question_asks_for_is_no_gold_response(root: Path) -> None:
    leg = {"route_name": "Red Line", "departure_stop": "A Station", "arrival_stop": "C Station"}
    asked = {"type": "planning", "answer": -1, "station_2": "C Station", "question_transfer_count": 0}
    question = planning_text("A Station", "C Station", "count")
    write_rows(root, [row(**asked, question=question, fine_grained_answer=json.dumps([[leg]]))], None)
    (problem,) = load_dataset(root).problems
    with pytest.raises(DataError, match=r"a leg of fine_grained_answer lacks the stops between \(num_via_stops"):
        gold_response(problem)
    assert gold_response(replace(problem, question=planning_text("A Station", "C Station"))).count("\n") == 2


def test_splits_are_kept_apart(root: Path) -> None:
    write_rows(root, [row()], "train")
    write_rows(root, [row(answer=0), row()], "test")
    assert [p.answer for p in load_dataset(root, "test").problems] == [0, 1]
    assert len(load_dataset(root).problems) == 1
    with pytest.raises(DataError, match="no split 'validation'; it has train, test"):
        load_dataset(root, "validation")
    with pytest.raises(ValueError, match="exists already"):
        write_rows(root, [row()], "test")


def test_parquet_with_pictures_and_networks_inside_as_reasonmap_ships_them(root: Path) -> None:
    released = row(
        figure=base64.b64encode(png()).decode(),
        json=NETWORK,
        question=...,
        answer=...,
        type=...,
        question_short="short?",
        question_long="long?",
        routes={"1": [{**LEG, "via_stops": [], "num_via_stops": 0}], "2": None},
        difficulty_question="easy",
    )
    other = {**released, "city": "z", "json": {"Green Line": ["D Station", "E Station"]}}
    (root / "data").mkdir()
    for name, rows in (("train", [released, released, other]), ("validation", [other])):
        table = datasets.Dataset.from_list(rows)
        table.to_parquet(str(root / f"data/{name}-00000-of-00001.parquet"))
    data = load_dataset(root)
    assert [p.question for p in data.problems] == ["short?"] * 3
    assert load_dataset(root, planning_question="long").problems[0].question == "long?"
    assert data.problems[0].image is data.problems[1].image and isinstance(data.problems[0].image, bytes)
    assert set(data.networks["x/z"]) == {"Green Line"}
    assert gold_response(data.problems[0]).startswith("Route Name: Red Line\nDeparture Stop: A Station\n")
    assert len(load_dataset(root, "validation").problems) == 1


def test_a_file_of_a_split_of_another_name_is_in_no_other_split(root: Path) -> None:
    for name, city in (("train", "y"), ("val", "z")):
        stations = {} if city == "y" else {"json": NETWORK, "city": city}
        datasets.Dataset.from_list([row(**stations)]).to_parquet(str(root / f"{name}-00000.parquet"))
    assert [set(load_dataset(root, split).networks) for split in ("train", "val")] == [{"x/y"}, {"x/z"}]
    with pytest.raises(DataError, match=r"no parquet file for split 'test' among train-.*, val-.*; begin the name"):
        load_dataset(root, "test")
    (root / "train-00000.parquet").rename(root / "questions.parquet")
    (root / "val-00000.parquet").unlink()
    assert set(load_dataset(root, "test").networks) == {"x/y"}


def test_rows_of_several_files_get_different_uids(root: Path) -> None:
    for shard in range(2):
        datasets.Dataset.from_list([row(), row()]).to_parquet(str(root / f"train-0000{shard}-of-00002.parquet"))
    assert [p.uid for p in load_dataset(root).problems] == [f"train-{number:06d}" for number in range(4)]


def test_a_repository_of_the_hub_whose_files_are_links(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = root / "cache/snapshots/0123"
    for name in ("maps/x/y.png", "stations/x/y.json"):
        blob = root / "cache/blobs" / name.replace("/", "_")
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / name, blob)
        (snapshot / name).parent.mkdir(parents=True)
        (snapshot / name).symlink_to(blob)
    datasets.Dataset.from_list([row()]).to_parquet(str(snapshot / "test.parquet"))
    asked: list[tuple[str, str]] = []

    def fetch(repo_id: str, repo_type: str) -> str:
        asked.append((repo_id, repo_type))
        if repo_id == "a/gone":
            raise OSError("not there")
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    name = "hf://datasets/FSCCS/ReasonMap-Plus"
    assert len(load_dataset(name, "test").problems) == len(load_dataset(snapshot, "test").problems) == 1
    assert asked == [("FSCCS/ReasonMap-Plus", "dataset")]  # what is in the cache is a folder like any other
    config = with_absolute_paths(load_config("tiny", [f"data.path={name}"]))
    assert config.data.path == name and data_folder(config, None) == snapshot
    (root / "answers.jsonl").write_text('{"uid": "test-000000", "response": "yes"}\n')
    command = ["eval", "--responses", str(root / "answers.jsonl"), "--data", name, "--out", str(root / "out")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0 and (root / "out/report.json").is_file(), done.output
    with pytest.raises(DataError, match=r"hf://datasets/a/gone: cannot be fetched \(not there\)"):
        load_dataset("hf://datasets/a/gone")


def test_image_feature_of_datasets(root: Path) -> None:
    features = datasets.Features(
        {name: datasets.Value("int64" if isinstance(value, int) else "string") for name, value in row().items()}
    )
    features["figure"] = datasets.Image(decode=False)
    rows = [row(figure={"bytes": png(), "path": None})]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(root / DATA_FOLDER))
    assert isinstance(load_dataset(root).problems[0].image, bytes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question": ...}, "row 1: field 'question' is missing"),
        ({"type": "Counting9"}, "row 1: field 'type' is 'Counting9'; it must be one of TorF1"),
        ({"answer": 2}, "row 1: field 'answer' is 2; it must be from 0 to 1"),
        ({"difficulty_city": "medium"}, "row 1: field 'difficulty_city' is 'medium'"),
        ({"type": "planning", "station_2": None}, "row 1: field 'station_2' is empty"),
        ({"type": "planning", "question_transfer_count": -1}, "row 1: field 'question_transfer_count' is -1"),
        ({"figure": "./maps/x/absent.png"}, "row 1: field 'figure': './maps/x/absent.png' does not exist"),
        (
            {"figure": "../outside.png"},
            "row 1: field 'figure': '../outside.png' lies outside the data folder",
        ),
        ({"figure": "\0"}, "row 1: field 'figure': '\\x00' is no path"),
        ({"json": "\0", "city": "n"}, "row 1: field 'json': '\\x00' is no path"),
        ({"figure": "/etc/hostname"}, "row 1: field 'figure': '/etc/hostname' lies outside"),
        ({"figure": "@" * 2000}, "row 1: field 'figure': neither a path nor base64"),
        ({"figure": "AAAA" * 600}, "row 1: field 'figure': the 1800 bytes of the picture is not a complete"),
        (
            {"json": "./stations/x/no.json", "city": "n"},
            "row 1: field 'json': stations file './stations/x/no",
        ),
        ({"json": '{"Red Line": ["A Station"]}', "city": "n"}, "line 'Red Line' has 1 stop"),
        ({"json": '{"Red Line": [1, 2]}', "city": "n"}, "line 'Red Line' must be a list of station names"),
        ({"json": "{}", "city": "n"}, "the network has no lines"),
        ({"json": '{"Red', "city": "n"}, "the network is not JSON"),
        ({"json": '{"L": ["A", "B"], "L": ["A", "C"]}', "city": "n"}, "line 'L' stands twice; give the line one"),
        ({"json": '{"L 1": ["A", "B"], "l  1 ": ["A", "C"]}', "city": "n"}, "lines 'L 1' and 'l  1 ' differ in"),
        ({"json": '{"L": ["A", "B"]}'}, "x/y has another network in an earlier row"),
        ({"fine_grained_answer": "{'A': 1}"}, "row 1: field 'fine_grained_answer' is not JSON"),
        ({"fine_grained_answer": "[" * 5000}, "row 1: field 'fine_grained_answer' is not JSON"),
        ({"fine_grained_answer": "9" * 5000}, "row 1: field 'fine_grained_answer' is not JSON"),
        ({"json": '{"L": ' + "[" * 5000, "city": "n"}, "row 1: field 'json': the network is not JSON"),
    ],
)
def test_a_bad_row_is_named_or_skipped_and_counted(root: Path, changes: dict[str, Any], message: str) -> None:
    if changes.get("question") is ...:
        table = [row(question=...), row(question=...)]
        message = message.replace("row 1", "row 0")
    else:
        extra = {"fine_grained_answer": None} if "fine_grained_answer" in changes else {}
        table = [row(**extra), row(**changes), row(**extra)]
    write_rows(root, table)
    with pytest.raises(DataError) as caught:
        load_dataset(root)
    assert message in str(caught.value) and str(root / DATA_FOLDER / "train") in str(caught.value)
    if len(table) == 3:
        data = load_dataset(root, on_bad_row="skip")
        assert len(data.problems) == 2 and len(data.skipped) == 1 and message in data.skipped[0]
    else:
        with pytest.raises(DataError, match="all 2 rows are bad"):
            load_dataset(root, on_bad_row="skip")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"L": ["A", "B"], "M": ["A", "C"], "L": ["B", "D"]}', "line 'L' stands twice; give the line one list"),
        ('{"L": ["Zürich", "B"]}'.encode("latin-1"), "is not UTF-8 .*; save it as UTF-8"),
    ],
)
def test_a_stations_file_that_would_be_misread_is_named(root: Path, content: bytes, message: str) -> None:
    (root / "stations/x/y.json").write_bytes(content)
    write_rows(root, [row()])
    with pytest.raises(DataError, match=rf"row 0: field 'json': stations file '\./stations/x/y\.json':? {message}"):
        load_dataset(root)


@pytest.mark.parametrize("inside", [False, True])
def test_a_byte_order_mark_before_a_network_is_no_part_of_it(root: Path, inside: bool) -> None:
    marked = "\ufeff" + json.dumps(NETWORK)
    (root / "stations/x/y.json").write_text(marked, encoding="utf-8")
    write_rows(root, [row(json=marked) if inside else row()])
    assert load_dataset(root).networks == {"x/y": NETWORK}


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("released", [False, True])
def test_names_are_those_that_answers_write_in_whatever_form_they_are_stored(
    root: Path, released: bool, form: Literal["NFC", "NFD"]
) -> None:
    """A file system or an editor may have taken them apart; tokenizers write whole letters."""
    other: Literal["NFC", "NFD"] = "NFD" if form == "NFC" else "NFC"
    start, goal, line = "Zürich", "Köln", "Línea"
    network = json.dumps({normalize(form, line): [normalize(form, start), normalize(form, goal)]})
    (root / "stations/x/y.json").write_text(network, encoding="utf-8")
    leg = {"route_name": line, "departure_stop": start, "arrival_stop": goal, "via_stops": []}
    leg = {name: normalize(other, value) if isinstance(value, str) else value for name, value in leg.items()}
    ends = {"station_1": normalize(other, start), "station_2": normalize(other, goal)}
    question = {"type": "planning", "answer": -1, "fine_grained_answer": json.dumps([[leg]])}
    if released:
        question = {"type": ..., "question": ..., "question_short": "short?", "routes": {"plan_1": [leg]}}
    write_rows(root, [row(**question, **ends)])
    data = load_dataset(root)
    answer = f"Route Name: {line}\nDeparture Stop: {start}\nArrival Stop: {goal}"
    assert gold_response(data.problems[0]) == answer
    assert Rubric().score(data.problems, [answer], data.networks).correct.all()


@pytest.mark.parametrize(
    "routes",
    [{"A": 1}, [5], [[]], [["A"]], [[{"route_name": "Red Line"}]], [LEG], [[LEG | {"route_name": 1}]]],
)
def test_routes_of_another_form_are_named(root: Path, routes: Any) -> None:
    planning = row(type="planning", answer=-1, uid="a", fine_grained_answer=json.dumps([[LEG]]))
    write_rows(root, [planning, planning | {"uid": "b", "fine_grained_answer": json.dumps(routes)}])
    with pytest.raises(DataError, match="row 1: field 'fine_grained_answer' must hold routes, each a list of legs"):
        load_dataset(root)
    assert load_dataset(root, on_bad_row="skip").problems[0].fine_grained_answer == [[LEG]]


def test_a_city_whose_name_no_file_can_have_has_no_geometry_file(root: Path) -> None:
    write_rows(root, [row(city="y" * 300)])
    data = load_dataset(root)
    assert len(data.topology(data.problems[0].network_id).lines) == 2


@pytest.mark.parametrize(("country", "city"), [("..", "outside"), ("x", "../../outside"), ("{root}", "outside")])
def test_a_city_that_names_a_file_outside_has_no_geometry_file(root: Path, country: str, city: str) -> None:
    country = country.format(root=root)
    elsewhere = Network(f"{country}/{city}", "hard", (Line("Other", "#000000", ("P", "Q")),), {})
    (root / "outside.json").write_text(json.dumps(network_as_json(elsewhere)), encoding="utf-8")
    (root / "geometry" / "x").mkdir(parents=True)
    write_rows(root, [row(country=country, city=city)])
    data = load_dataset(root)
    assert [line.name for line in data.topology(data.problems[0].network_id).lines] == list(NETWORK)


@pytest.mark.parametrize("name", ["../elsewhere.arrow", "{absolute}"])
def test_rows_are_read_from_the_split_alone(root: Path, name: str) -> None:
    write_rows(root, [row()])
    data = root / DATA_FOLDER
    elsewhere = (data / "train/data-00000-of-00001.arrow").rename(data / "elsewhere.arrow")
    state = json.loads((data / "train/state.json").read_text())
    name = name.format(absolute=elsewhere)
    state["_data_files"] = [{"filename": name}]
    (data / "train/state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match=re.escape(f"state.json: {name!r} is no file of this folder")):
        load_dataset(root)


def test_wrong_column_types_are_named(root: Path) -> None:
    write_rows(root, [row(answer="1")])
    with pytest.raises(DataError, match=r"row 0: field 'answer' must be a whole number, got '1'; store the column as"):
        load_dataset(root)
    shutil.rmtree(root / DATA_FOLDER)
    write_rows(root, [row(question=7)])
    with pytest.raises(DataError, match="field 'question' must be text, got 7"):
        load_dataset(root)


def test_repeated_uid_is_refused(root: Path) -> None:
    write_rows(root, [row(uid="a"), row(uid="a")])
    with pytest.raises(DataError, match="row 1: field 'uid' repeats 'a'"):
        load_dataset(root)


def test_pictures_too_narrow_for_the_processor_are_named(root: Path) -> None:
    for size in ((1, 2000), (401, 2)):
        (root / "maps/x/y.png").write_bytes(png(size))
        shutil.rmtree(root / "data", ignore_errors=True)
        write_rows(root, [row()])
        with pytest.raises(DataError, match=rf"row 0: field 'figure': .*y\.png' has {size[0]} x {size[1]} pixels"):
            load_dataset(root)
    (root / "maps/x/y.png").write_bytes(png((400, 2)))
    assert load_dataset(root).problems


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_truncated_and_oversized_pictures(root: Path, form: str) -> None:
    path = root / "maps/x/y.png"
    Image.effect_noise((200, 100), 90).save(path, form)
    write_rows(root, [row()])
    assert load_dataset(root, max_image_pixels=20_000).problems
    with pytest.raises(DataError, match=r"has 200 x 100 pixels, more than the limit of 19999; make it smaller"):
        load_dataset(root, max_image_pixels=19_999)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match="not a complete picture"):
        load_dataset(root)


def test_a_link_out_of_the_folder_is_refused(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("elsewhere") / "secret.png"
    outside.write_bytes(png())
    (root / "maps/x/link.png").symlink_to(outside)
    write_rows(root, [row(figure="./maps/x/link.png")])
    with pytest.raises(DataError, match="lies outside the data folder"):
        load_dataset(root)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: shutil.rmtree(data), "no data found; expected data/ReasonMap-Train"),
        (
            lambda data: (data / "train/data-00000-of-00001.arrow").write_bytes(b"nonsense"),
            "not a readable arrow",
        ),
        (lambda data: (data / "train/data-00000-of-00001.arrow").unlink(), "not a readable arrow file"),
        (lambda data: (data / "train/state.json").unlink(), "state.json: not readable as JSON"),
        (lambda data: (data / "train/state.json").write_text("{}"), "'_data_files' does not list files"),
        (
            lambda data: (data / "dataset_dict.json").write_text("[1"),
            "dataset_dict.json: not readable as JSON",
        ),
        (lambda data: (data / "dataset_dict.json").write_text("[1]"), "expected a JSON object, got list"),
    ],
)
def test_broken_files_are_named(root: Path, damage: Callable[[Path], object], message: str) -> None:
    write_rows(root, [row()])
    damage(root / DATA_FOLDER)
    with pytest.raises(DataError) as caught:
        load_dataset(root, on_bad_row="skip")
    assert message in str(caught.value) and str(root) in str(caught.value)


def test_missing_folder_and_wrong_options(root: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        load_dataset(root / "absent")
    with pytest.raises(ValueError, match="on_bad_row must be"):
        load_dataset(root, on_bad_row="ignore")  # type: ignore[arg-type]
    (root / "data").mkdir()
    (root / "data/train-0.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match=r"train-0\.parquet: not a readable parquet file"):
        load_dataset(root)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real maps are not here")
def test_real_cities_become_problems(tmp_path: Path) -> None:
    cities = {"oslo": ("norway", "middle"), "jinan": ("china", "easy"), "nanning": ("china", "middle")}
    cities["washington"] = ("america", "middle")
    rows = []
    for city, (country, difficulty) in cities.items():
        for kind, name in (("maps", f"{city}.png"), ("stations", f"{country}/{city}.json")):
            target = tmp_path / kind / country / Path(name).name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REAL / kind / name, target)
        network = json.loads((tmp_path / f"stations/{country}/{city}.json").read_text(encoding="utf-8"))
        line, stops = next(iter(network.items()))
        common = row(
            country=country,
            city=city,
            figure=f"./maps/{country}/{city}.png",
            json=f"./stations/{country}/{city}.json",
            difficulty_city=difficulty,
            station_1=stops[0],
            station_2=stops[-1],
        )
        rows += [
            {**common, "question": question_text("TorF1", stops[0], stops[-1])},
            {
                **common,
                "type": "TorF2",
                "station_2": line,
                "question": question_text("TorF2", stops[0], line),
            },
            {**common, "type": "Counting3", "answer": len(network), "question": question_text("Counting3")},
            {
                **common,
                "type": "planning",
                "answer": -1,
                "question": question_text("planning", stops[0], stops[-1]),
            },
        ]
    write_rows(tmp_path, rows, None)
    data = load_dataset(tmp_path)
    assert len(data.problems) == 16 and len(data.networks) == 4
    assert len(data.networks["norway/oslo"]) == 5
    with Image.open(str(data.problems[0].image)) as picture:
        assert picture.size == (1682, 1551)


def test_a_picture_larger_than_pillow_allows_is_opened():
    """Kuala Lumpur's map is 14,032 x 19,843."""
    with open_picture(encode_png(Image.new("1", (14_032, 19_843)))) as picture:
        assert picture.size == (14_032, 19_843)
