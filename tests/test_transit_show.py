"""``rewardmap show``: maps with a route, a question or an answer laid over them, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from rewardmap.cli import app
from rewardmap.show import answer_on_map, find_problem, read_answer, read_map
from rewardmap.transit import Line, Network, gold_response, load_dataset, write_dataset
from rewardmap.transit.generate import generate_network
from rewardmap.transit.overlay import TINY_ZOOM, draw_route, draw_stops, with_caption
from rewardmap.types import KINDS, DataError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("show") / "data"
    write_dataset(folder, maps={"train": 3, "test": 1}, preset="tiny", seed=2)
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["show", *map(str, arguments)])


def picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_every_question_of_a_map_can_be_shown(data: Path, tmp_path: Path) -> None:
    problems = load_dataset(data, "test").problems
    assert {problem.kind for problem in problems} >= set(KINDS) - {"Counting2"}
    for problem in problems:
        out = tmp_path / f"{problem.uid}.png"
        result = run(problem.image, "--question", problem.uid, "--out", out)
        assert result.exit_code == 0, result.output
        plain, shown = picture(Path(str(problem.image))), picture(out)
        plain = plain.repeat(TINY_ZOOM, axis=0).repeat(TINY_ZOOM, axis=1)
        assert shown.shape[1] == plain.shape[1] and shown.shape[0] > plain.shape[0]  # a caption below
        assert (np.abs(shown[: len(plain)] - plain).max(axis=2) > 20).sum() > 300  # a pin at least


def test_a_map_is_named_by_any_of_its_files(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = load_dataset(data).problems[0]
    drawn = []
    for folder, ending in (("maps", "png"), ("geometry", "json"), ("stations", "json")):
        out = tmp_path / f"{folder}.png"
        assert run(data / folder / f"{problem.network_id}.{ending}", "--out", out).exit_code == 0
        drawn.append(out.read_bytes())
    assert drawn[0] == drawn[1] == drawn[2]
    monkeypatch.chdir(data / "maps")
    assert run(Path(f"{problem.network_id}.png"), "--out", tmp_path / "from-inside.png").exit_code == 0
    assert (tmp_path / "from-inside.png").read_bytes() == drawn[0]
    assert (picture(tmp_path / "maps.png") == picture(Path(str(problem.image)))).all()


def test_a_route_and_its_gold_answer_look_alike(data: Path, tmp_path: Path) -> None:
    problem = next(p for p in load_dataset(data).problems if p.transfers_required)
    _, network = read_map(Path(str(problem.image)))
    single = len(network.shortest_routes(problem.station_1, problem.station_2)) == 1
    gold = gold_response(problem)
    (tmp_path / "answer.txt").write_text(gold, encoding="utf-8")
    assert (
        run(problem.image, "--route", problem.station_1, problem.station_2, "--out", tmp_path / "r.png").exit_code == 0
    )
    assert run(problem.image, "--answer", tmp_path / "answer.txt", "--out", tmp_path / "a.png").exit_code == 0
    assert run(problem.image, "--answer", gold.replace("\n", "\\n"), "--out", tmp_path / "b.png").exit_code == 0
    height = TINY_ZOOM * network.size[1]
    route, answer = picture(tmp_path / "r.png")[:height], picture(tmp_path / "a.png")[:height]
    assert not single or (route == answer).all()
    assert (picture(tmp_path / "b.png")[:height] == answer).all()


def legs(*stated: tuple[str, str, str]) -> str:
    return "\n--\n".join(f"Route Name: {a}\nDeparture Stop: {b}\nArrival Stop: {c}" for a, b, c in stated)


def reds(image: Image.Image) -> int:
    """Pixels in the red of a ride that no train makes."""
    return int((np.asarray(image) == (0xD4, 0x00, 0x1A)).all(axis=2).sum())


def test_a_ride_that_no_train_makes_is_dashed_in_red() -> None:
    network = generate_network("easy", np.random.default_rng(3), "a/b")
    line = network.lines[0]
    good = answer_on_map(network, legs((line.name, line.stations[0], line.stations[4])))
    other = next(stop for stop in network.stations if stop not in line.stops())
    bad = answer_on_map(network, legs((line.name, line.stations[0], other)))
    assert reds(good) == 0 and reds(bad) > 100
    # Unknown names draw nothing, but each leg is told below the map.
    unknown = answer_on_map(network, legs((line.name, "Nowhere", other), ("Line 99", other, line.stations[0])))
    assert unknown.height > network.size[1] and reds(unknown) == 0
    with pytest.raises(DataError, match="states no leg"):
        answer_on_map(network, "Take the train.")


def test_ride_follows_the_trains_of_a_line() -> None:
    ring = Line("Ring", "#000000", ("A", "B", "C", "D", "E"), loop=True)
    street = Line("One way", "#000000", ("A", "X", "Y", "C"), one_way=True)
    network = Network("a/b", "easy", (ring, street), {})
    assert network.ride("Ring", "A", "D").via == ("E",)  # type: ignore[union-attr]
    assert network.ride("Ring", "D", "A").via == ("E",)  # type: ignore[union-attr]
    assert network.ride("One way", "A", "C").via == ("X", "Y")  # type: ignore[union-attr]
    assert network.ride("One way", "C", "A") is None
    assert network.ride("Ring", "A", "X") is None
    assert network.ride("Ring", "A", "A") is None
    with pytest.raises(KeyError):
        network.ride("Nowhere", "A", "B")


@pytest.mark.parametrize("level", ["tiny-hard", "easy", "grid-tiny-hard"])
def test_rides_are_the_shortest_routes_without_transfer(level: str) -> None:
    network = generate_network(level, np.random.default_rng(5), "a/b")
    for start in network.stations[:6]:
        for goal in network.stations:
            direct = [] if start == goal else [r for r in network.shortest_routes(start, goal) if len(r) == 1]
            rides = [network.ride(line.name, start, goal) for line in network.lines]
            found = [ride for ride in rides if ride is not None]
            assert bool(direct) == bool(found)
            if direct:
                assert min(len(ride.via) for ride in found) == len(direct[0][0].via)


def test_captions_are_legible_in_every_script() -> None:
    blank = Image.new("RGB", (800, 100), "#ffffff")
    texts = ["Brønnhaug 1", "Зелезовка 2", "云杉大道站 3"]
    captions = [np.asarray(with_caption(blank, text))[100:] for text in texts]
    lacking = np.asarray(with_caption(blank, "\U000f0000" * 5 + " 3"))[100:]
    assert all((caption < 128).any() for caption in captions)
    assert captions[2].shape != lacking.shape or (captions[2] != lacking).any()
    wrapped = with_caption(blank, "word " * 60)
    assert wrapped.height > with_caption(blank, "word").height and wrapped.width == 800
    for endless in ("word" * 100, "青禾村站" * 50):
        caption = np.asarray(with_caption(blank, endless))[100:]
        assert (caption[:, 780:] == 255).all() and caption.shape[0] > with_caption(blank, "word").height - 100


def test_lines_and_stations_can_be_marked() -> None:
    network = generate_network("easy", np.random.default_rng(3), "a/b")
    assert draw_stops(network, network.stations[:2], [network.lines[0].name]).size == network.size
    with pytest.raises(ValueError, match="no station 'Nowhere'"):
        draw_stops(network, ["Nowhere"])
    assert draw_route(network, []).size == network.size


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--route", "Nowhere", "B Station"], "no station 'Nowhere'"),
        (["--question", "x"], "no question 'x' about"),
        (["--answer", "take the train"], "states no leg"),
        (["--answer", "answers/absent.txt"], "--answer answers/absent.txt: no such file"),
        (["--route", "A", "B", "--question", "x"], "give one of --route, --question and --answer"),
    ],
)
def test_a_mistake_ends_in_one_line(data: Path, arguments: list[str], named: str) -> None:
    problem = load_dataset(data).problems[0]
    result = run(problem.image, *arguments)
    assert result.exit_code == 2 and named in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_map_without_coordinates_is_refused(data: Path, tmp_path: Path) -> None:
    assert "no such file" in run(tmp_path / "maps" / "a" / "b.png").stderr
    assert "not the file of a map; name a map" in run(data / "README.md").stderr
    lonely = tmp_path / "maps" / "norway" / "oslo.png"
    lonely.parent.mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(lonely)
    result = run(lonely)
    assert result.exit_code == 2 and "oslo.json is missing" in result.stderr
    same = run(next((data / "maps").rglob("*.png")), "--route", "A", "A").stderr
    assert "two different" in same or "no station 'A'" in same
    with pytest.raises(DataError, match="no question 'nothing' about a/b; the map has none"):
        find_problem(data, "a/b", "nothing")


def test_an_answer_in_a_file_may_follow_a_byte_order_mark(tmp_path: Path) -> None:
    for name, content in (("a.txt", "by train"), ("a.json", json.dumps({"response": "by train"}))):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert read_answer(str(tmp_path / name)) == "by train"
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"a\.json: not text, nor a JSON object with a 'response'"):
        read_answer(str(tmp_path / "a.json"))
