"""The tiny level end to end: networks, pictures, questions, a data set on disk, and loading it again."""

from __future__ import annotations

import filecmp
import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from rewardmap.transit import MapData, gold_response, load_dataset, write_dataset
from rewardmap.transit.draw import draw_map
from rewardmap.transit.generate import TINY_CELL_PX, TINY_CELLS, TINY_LEVELS, generate_network
from rewardmap.transit.graph import Network
from rewardmap.transit.wording import planning_text, question_text
from rewardmap.types import KINDS, Problem


def networks(count: int) -> list[Network]:
    return [
        generate_network(level, np.random.default_rng([7, index]), f"x/{level}-{index}")
        for index, level in zip(range(count), itertools.cycle(TINY_LEVELS), strict=False)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "set"
    write_dataset(folder, maps={"train": 60, "test": 30}, seed=3)
    return folder


@pytest.fixture(scope="module")
def data(folder: Path) -> MapData:
    return load_dataset(folder)


def test_tiny_networks_keep_the_rules_of_the_grid() -> None:
    for network in networks(150):
        cells = {stop: (int(x // TINY_CELL_PX), int(y // TINY_CELL_PX)) for stop, (x, y) in network.positions.items()}
        assert len(set(cells.values())) == len(cells) == len(network.stations)
        assert 5 <= len(cells) <= 11
        assert all(0 <= x < TINY_CELLS and 0 <= y < TINY_CELLS for x, y in cells.values())
        edges = [edge for line in network.lines for edge in line.edges()]
        assert len(set(edges)) == len(edges)
        for a, b in edges:
            assert max(abs(p - q) for p, q in zip(cells[a], cells[b], strict=True)) == 1
        diagonals = Counter(
            frozenset([tuple(min(p, q) for p, q in zip(cells[a], cells[b], strict=True))])
            for a, b in edges
            if cells[a][0] != cells[b][0] and cells[a][1] != cells[b][1]
        )
        assert max(diagonals.values(), default=1) == 1
        assert all(3 <= len(line.stations) <= 5 for line in network.lines)
        for a, b in itertools.combinations(network.stations, 2):
            assert network.shortest_routes(a, b)


def test_line_counts_are_balanced() -> None:
    lines = Counter(len(network.lines) for network in networks(300))
    assert set(lines) == {2, 3}
    assert 120 <= lines[2] <= 180


def test_picture_shows_each_line_in_its_colour_and_is_small() -> None:
    for network in networks(12):
        image = draw_map(network)
        assert image.size == (140, 140)
        pixels = np.asarray(image).reshape(-1, 3).astype(int)
        for line in network.lines:
            colour = np.array([int(line.colour[i : i + 2], 16) for i in (1, 3, 5)])
            assert (np.abs(pixels - colour).max(axis=1) < 24).sum() > 30, line.name


def test_labels_are_balanced(data: MapData) -> None:
    by_kind = {kind: [p for p in data.problems if p.kind == kind] for kind in KINDS}
    assert all(by_kind.values())
    for kind in ("TorF1", "TorF2"):
        answers = Counter(p.answer for p in by_kind[kind])
        assert abs(answers[0] - answers[1]) <= 2
    for counts in (
        Counter(p.answer for p in by_kind["Counting1"]),
        Counter(len(p.fine_grained_answer) for p in by_kind["Counting1"]),
    ):
        assert set(counts) == {0, 1, 2, 3} and max(counts.values()) - min(counts.values()) <= 4
    assert abs(sum(1 if p.answer == 1 else -1 for p in by_kind["Counting2"])) <= 2
    transfers = Counter(p.transfers_required for p in by_kind["planning"])
    assert abs(transfers[0] - transfers[1]) <= 2 and set(transfers) == {0, 1}


def test_text_alone_does_not_predict_the_answer(data: MapData) -> None:
    """Alphabetical order and the position in the question carry no information about yes or the transfer count."""
    for kind, label in (("TorF1", lambda p: p.answer), ("planning", lambda p: p.transfers_required)):
        problems = [p for p in data.problems if p.kind == kind]
        agree = sum((p.station_1 < p.station_2) == bool(label(p)) for p in problems)
        sigma = 0.5 * len(problems) ** 0.5
        assert abs(agree - len(problems) / 2) < 3.5 * sigma


def test_choices_are_four_distinct_counts_with_the_gold_one_at_its_letter(data: MapData) -> None:
    for p in data.problems:
        if p.kind == "Counting1":
            choices = [int(line.split(") ")[1]) for line in p.question.split("\n") if line[1:3] == ") "]
            assert len(set(choices)) == 4
            assert choices[p.answer] == len(p.fine_grained_answer)


def test_answers_follow_from_the_flat_networks(data: MapData) -> None:
    """Recomputed from the exported lists alone, without the generator's own topology."""
    for p in data.problems:
        lists = {
            line: [stop.removesuffix(" (Transfer Station)") for stop in stops]
            for line, stops in data.networks[p.network_id].items()
        }
        if p.kind == "TorF1":
            assert p.answer == any({p.station_1, p.station_2} <= set(stops) for stops in lists.values())
        elif p.kind == "TorF2":
            assert p.answer == (p.station_1 in lists[p.station_2])
        elif p.kind == "Counting2":
            assert p.answer == sum(p.station_1 in stops for stops in lists.values())
        elif p.kind == "Counting3":
            assert p.answer == len(lists)
        elif p.kind == "planning":
            direct = any({p.station_1, p.station_2} <= set(stops) for stops in lists.values())
            assert direct == (p.transfers_required == 0)
            for plan in p.fine_grained_answer:
                assert len(plan) == p.transfers_required + 1
                for leg in plan:
                    assert {leg["departure_stop"], leg["arrival_stop"]} <= set(lists[leg["route_name"]])


def test_gold_response_is_in_the_asked_form(data: MapData) -> None:
    first: dict[str, Problem] = {}
    for p in data.problems:
        first.setdefault(p.kind, p)
    assert gold_response(first["TorF1"]) in ("\\boxed{yes}", "\\boxed{no}")
    assert gold_response(first["Counting1"])[7] in "ABCD"
    assert gold_response(first["Counting3"]) in ("\\boxed{2}", "\\boxed{3}")
    two_legs = next(p for p in data.problems if p.transfers_required == 1)
    blocks = gold_response(two_legs).split("\n--\n")
    assert len(blocks) == 2
    assert blocks[0].startswith("Route Name: ") and f"Departure Stop: {two_legs.station_1}\n" in blocks[0]
    assert blocks[1].endswith(f"Arrival Stop: {two_legs.station_2}")


def test_gold_response_gives_what_the_long_templates_ask_for(data: MapData) -> None:
    asked = next(p for p in data.problems if p.transfers_required == 1 and p.fine_grained_answer[0][0]["via_stops"])
    leg = asked.fine_grained_answer[0][0]
    counting = replace(asked, question=planning_text(asked.station_1, asked.station_2, "count"))
    assert gold_response(counting).split("\n--\n")[0].endswith(f"\nNumber of Via Stops: {leg['num_via_stops']}")
    listing = replace(asked, question=planning_text(asked.station_1, asked.station_2, "list"))
    assert gold_response(listing).split("\n--\n")[0].endswith(f"\nVia Stops: {', '.join(leg['via_stops'])}")
    assert planning_text("A", "B") == question_text("planning", "A", "B")


def test_same_seed_gives_the_same_bytes_and_splits_share_no_map(folder: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_dataset(tmp_path / "again", maps={"train": 60, "test": 30}, seed=3, progress=lambda *step: seen.append(step))
    assert seen[-1] == (90, 90) and len(seen) == 90
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert files == sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file())
    _, different, broken = filecmp.cmpfiles(folder, tmp_path / "again", [str(f) for f in files], shallow=False)
    assert not different and not broken
    pictures = [path.read_bytes() for path in folder.rglob("*.png")]
    assert len(set(pictures)) == len(pictures) == 90


def test_datasets_reads_what_is_written(folder: Path) -> None:
    loaded = datasets.load_from_disk(str(folder / "data/ReasonMap-Train"))
    assert set(loaded) == {"train", "test"}
    row = loaded["train"][0]
    assert loaded["train"].features["answer"].dtype == "int64"
    assert isinstance(json.loads(row["fine_grained_answer"]), dict)
    with Image.open(folder / row["figure"]) as image:
        assert image.size == (140, 140)


def test_existing_folder_and_unknown_preset_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exists already"):
        write_dataset(folder, maps={"train": 1})
    with pytest.raises(ValueError, match="known presets: tiny"):
        write_dataset(tmp_path / "x", maps={"train": 1}, preset="huge")
    assert list(tmp_path.iterdir()) == []


def test_the_data_card_tells_what_is_inside_and_how_to_make_it_again(folder: Path) -> None:
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "| train | 60 | 120 | 120 | 120 | 120 | 60 | 240 | 780 |" in card
    assert 'maps={"train": 60, "test": 30}, preset="tiny", seed=3' in card


def test_true_networks_are_stored_with_the_maps(data: MapData) -> None:
    for network_id, lists in data.networks.items():
        network = data.topology(network_id)
        assert network.metro_data() == lists
        assert draw_map(network).size == (140, 140)
