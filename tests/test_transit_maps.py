"""Full-size maps: pictures are unambiguous by geometry; every answer agrees with an independent solver."""

from __future__ import annotations

import itertools
import json
import re
import string
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
from PIL import Image, ImageDraw

from rewardmap.transit import load_dataset, write_dataset
from rewardmap.transit.draw import draw_map, encode_png
from rewardmap.transit.fonts import map_font
from rewardmap.transit.generate import TINY_LEVELS, generate_network
from rewardmap.transit.graph import Branch, Line, Network
from rewardmap.transit.labels import Canvas, Lettering, Spot, box_distance, place_labels
from rewardmap.transit.names import HAN_SCRIPTS, SCRIPTS, fold, make_names, romanised
from rewardmap.transit.questions import Balance, make_questions
from rewardmap.transit.render import _marker
from rewardmap.transit.sketch import Track, _connected
from rewardmap.transit.styles import PAPER_LIGHTNESS_GAP, STYLES, colour_gap, lab, line_tints
from rewardmap.transit.topology import network_from_lists

MODEL_PIXELS = 12_845_056
"""Qwen2.5-VL shrinks pictures above this many pixels."""
SIZES = {"easy": (1, 3, 21, 82), "middle": (4, 6, 38, 171), "hard": (6, 22, 103, 403)}
"""Fewest and most lines and stations of the released maps of a level."""
LONG_CHECKS = [
    (TINY_LEVELS, "tiny", range(1000)),
    *((("easy",), "full", range(first, first + 275)) for first in (0, 275)),
    *((("middle",), "full", range(first, first + 76)) for first in range(0, 380, 76)),
    *((("hard",), "full", range(first, first + 14)) for first in range(0, 70, 14)),
]
"""Levels, questions and seeds: 1,000 tiny maps, and 1,000 full-size ones with all their questions."""
COUNTS = {"easy": 8, "middle": 6, "hard": 3}


def make(level: str, seed: int) -> Network:
    return generate_network(level, np.random.default_rng([11, seed]), f"x/{level}-{seed}")


@pytest.fixture(scope="module")
def maps() -> list[Network]:
    return [make(level, seed) for level, count in COUNTS.items() for seed in range(count)]


def geometry(network: Network) -> dict[str, Any]:
    return dict(network.extras["geometry"])  # type: ignore[call-overload]


def apart(first: np.ndarray, second: np.ndarray) -> bool:
    """Separating axis test of two convex polygons [4, 2]."""
    for polygon in (first, second):
        for a, b in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
            normal = np.array([a[1] - b[1], b[0] - a[0]])
            p, q = first @ normal, second @ normal
            if p.max() <= q.min() + 1e-6 or q.max() <= p.min() + 1e-6:
                return True
    return False


def gap(polygon: np.ndarray, points: np.ndarray) -> np.ndarray:
    """[N] distances from points [N, 2] to a convex polygon [4, 2]; 0 inside."""
    best = np.full(len(points), np.inf)
    inside = np.ones(len(points), dtype=bool)
    turn = 0.0
    for a, b in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        edge = b - a
        along = np.clip((points - a) @ edge / (edge @ edge), 0, 1)
        best = np.minimum(best, np.hypot(*(points - a - along[:, None] * edge).T))
        side = edge[0] * (points - a)[:, 1] - edge[1] * (points - a)[:, 0]
        turn = turn or float(np.sign(edge[0] * (polygon.mean(axis=0) - a)[1] - edge[1] * (polygon.mean(axis=0) - a)[0]))
        inside &= side * turn >= 0
    return np.where(inside, 0.0, best)


def test_sizes_are_those_of_the_released_maps(maps: list[Network]) -> None:
    for network in maps:
        fewest, most, few_stops, many_stops = SIZES[network.level]
        assert fewest <= len(network.lines) <= most
        assert few_stops <= len(network.stations) <= many_stops
        assert all(len(line.stations) >= 4 for line in network.lines)
        assert (network.fewest_transfers() >= 0).all()
    assert len({network.style for network in maps}) > 2


def test_no_label_lies_on_a_label_a_marker_or_the_legend(maps: list[Network]) -> None:
    for network in maps:
        drawn = geometry(network)
        boxes = {label["station"]: np.array(label["corners"]) for label in drawn["labels"]}
        assert set(boxes) == set(network.stations)
        centres = np.array([box.mean(axis=0) for box in boxes.values()])
        near = np.abs(centres[:, None] - centres).max(axis=2) < 400
        for (i, (a, first)), (j, (b, second)) in itertools.combinations(enumerate(boxes.items()), 2):
            if near[i, j]:
                assert apart(first, second), f"{network.network_id}: {a} on {b}"
        stations = np.array([[s["x"], s["y"]] for s in drawn["stations"]])
        radii = np.array([s["radius"] for s in drawn["stations"]])
        x0, y0, x1, y1 = drawn["panels"][0]
        panel = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
        for name, box in boxes.items():
            assert (gap(box, stations) >= radii).all(), f"{network.network_id}: {name} hides a station"
            assert box.min() >= 0 and (box.max(axis=0) <= np.array(network.size)).all()
            assert apart(box, panel)


def test_each_label_is_nearest_to_its_own_station(maps: list[Network]) -> None:
    for network in maps:
        drawn = geometry(network)
        stations = np.array([[s["x"], s["y"]] for s in drawn["stations"]])
        reach = np.array([s["radius"] + max(abs(lane) for lane in s["lanes"]) for s in drawn["stations"]])
        names = [s["name"] for s in drawn["stations"]]
        for label in drawn["labels"]:
            order = np.argsort(gap(np.array(label["corners"]), stations) - reach)
            assert names[order[0]] == label["station"], network.network_id


def test_text_stays_legible_at_the_models_resolution(maps: list[Network]) -> None:
    for network in maps:
        width, height = network.size
        shrink = min(1.0, (MODEL_PIXELS / (width * height)) ** 0.5)
        for label in geometry(network)["labels"]:
            assert max(label["px"]) * shrink >= 15 and min(label["px"]) * shrink >= 12


def test_a_crossing_is_plainly_an_interchange_or_plainly_none(maps: list[Network]) -> None:
    for network in maps:
        drawn = geometry(network)
        stations = {s["name"]: s for s in drawn["stations"]}
        at = np.array([[s["x"], s["y"]] for s in stations.values()])
        names = list(stations)
        for first, second in itertools.combinations(drawn["lines"], 2):
            for point in crossings(first["polylines"], second["polylines"]):
                distances = np.hypot(*(at - point).T)
                name = names[int(distances.argmin())]
                if {first["name"], second["name"]} <= set(network.lines_through(name)):
                    continue
                assert distances.min() > stations[name]["radius"] + 6, f"{network.network_id}: {point} by {name}"


def crossings(first: list[list[list[float]]], second: list[list[list[float]]]) -> list[np.ndarray]:
    """Points where polylines of two lines cross."""
    found = []
    for p, q in itertools.product(map(np.array, first), map(np.array, second)):
        # Only stretches whose boxes touch are compared point by point.
        stretches = [[line[at : at + 21] for at in range(0, len(line) - 1, 20)] for line in (p, q)]
        low = [np.array([stretch.min(axis=0) for stretch in half]) for half in stretches]
        high = [np.array([stretch.max(axis=0) for stretch in half]) for half in stretches]
        touch = (low[0][:, None] <= high[1]).all(axis=2) & (low[1] <= high[0][:, None]).all(axis=2)
        for i, j in np.argwhere(touch):
            found += meetings(stretches[0][i], stretches[1][j])
    return found


def meetings(p: np.ndarray, q: np.ndarray) -> list[np.ndarray]:
    """Points where polylines [P, 2] and [Q, 2] cross."""
    a, b, c, d = p[:-1, None], p[1:, None], q[None, :-1], q[None, 1:]
    r, s = b - a, d - c
    denominator = r[..., 0] * s[..., 1] - r[..., 1] * s[..., 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        t = ((c - a)[..., 0] * s[..., 1] - (c - a)[..., 1] * s[..., 0]) / denominator
        u = ((c - a)[..., 0] * r[..., 1] - (c - a)[..., 1] * r[..., 0]) / denominator
    hits = np.argwhere((np.abs(denominator) > 1e-9) & (t >= 0) & (t <= 1) & (u >= 0) & (u <= 1))
    return [p[i] + t[i, j] * (p[i + 1] - p[i]) for i, j in hits]


def test_every_station_lies_on_the_track_of_its_lines(maps: list[Network]) -> None:
    for network in maps:
        for track in geometry(network)["lines"]:
            points = np.concatenate([np.array(curve) for curve in track["polylines"]])
            for stop in network.line(track["name"]).stops():
                assert np.hypot(*(points - network.positions[stop]).T).min() < 14, f"{network.network_id}: {stop}"


def test_line_colours_differ(maps: list[Network]) -> None:
    for network in maps:
        least = colour_gap(network.level, len(network.lines))
        colours = [lab(line.colour) for line in network.lines]
        paper = lab(STYLES[network.style].background)
        assert all(np.linalg.norm(a - b) >= least for a, b in itertools.combinations(colours, 2))
        assert all(abs(colour[0] - paper[0]) >= PAPER_LIGHTNESS_GAP for colour in colours)
    for style, level in itertools.product(STYLES.values(), COUNTS):  # the most lines find their colours, too
        assert len(set(line_tints(style, level, SIZES[level][1], np.random.default_rng(0)))) == SIZES[level][1]


def test_a_dumb_bell_is_two_rings_and_a_neck() -> None:
    station = {"kind": "interchange", "x": 50, "y": 50, "radius": 7.5, "tangent": (1.0, 0.0), "lanes": (-11.0, 11.0)}
    for style in STYLES.values():
        picture = Image.new("L", (200, 200), 128)
        _marker(ImageDraw.Draw(picture), style, station)
        marker = np.asarray(picture) != 128
        rings, neck = marker[100 - 22].sum(), marker[100].sum()  # widths across the lanes' ends, and between them
        assert neck < 0.8 * rings if style.link == "dumb-bell" else neck > 0.9 * rings
    assert {style.link for style in STYLES.values()} == {"dumb-bell", "capsule"}


def test_lines_that_meet_only_through_others_hang_together() -> None:
    chain = [Track([(x, 0), (x + 1, 0), (x + 2, 0)]) for x in (0, 2, 4, 6)]
    assert _connected(chain) and _connected(chain[::-1])
    assert not _connected([*chain[:2], chain[3]])


@pytest.mark.parametrize("name", ["Fjellhaug", "Lillemark vest"])
@pytest.mark.parametrize("third", [(), ((0, -1),), ((1, 0),)])
def test_a_name_finds_room_where_diagonals_cross(name: str, third: tuple[tuple[int, int], ...]) -> None:
    canvas, centre = Canvas((600, 600)), np.array([300.0, 300.0])
    for way in ((1, 1), (1, -1), *third):
        canvas.line(centre + np.outer((-300, 300), way), 15)
    spot = Spot(name, centre, np.array([0.7071, 0.7071]), 11.5, 11.5, True, True, True)
    label = place_labels([spot], canvas, Lettering("noto", 16, 13))
    assert label is not None and label[name] is not None
    assert 11.5 <= box_distance(label[name], centre[None])[0] < 50


def test_drawing_is_deterministic() -> None:
    network = make("hard", 0)
    picture = draw_map(network)
    assert encode_png(picture) == encode_png(draw_map(make("hard", 0)))
    assert picture.size == network.size


def test_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown map level 'huge'; known levels: tiny-easy"):
        make("huge", 0)


def test_chinese_lists_carry_the_released_marks() -> None:
    line = Line("Line 1", "#000000", ("甲站", "乙站", "丙站", "丁站"), branches=(Branch(("乙站", "戊站"), "end"),))
    network = Network("x/y", "easy", (line, Line("Line 2", "#111111", ("乙站", "己站"))), {})
    lists = network.metro_data()
    assert lists["Line 1"] == ["甲站", "乙站（支线起始站）（换乘站）", "丙站", "丁站", "戊站"]
    assert lists["Line 2"] == ["乙站（换乘站）", "己站"]
    again = network_from_lists("x/y", lists, branch_starts=("戊站",))
    assert [line.services() for line in again.lines] == [line.services() for line in network.lines]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_typefaces_have_every_character_of_a_name(script: str) -> None:
    names = make_names(np.random.default_rng(1), 200, script)
    shown = names + [romanised(name) for name in names if script in HAN_SCRIPTS]
    for family in ["han"] if script in HAN_SCRIPTS else ["inter", "noto"]:
        for bold in (False, True):
            face = map_font(24, bold, family)
            absent = bytes(face.getmask("\U000f0000"))  # the box that stands for what a typeface lacks
            for character in sorted(
                {*"".join(shown), *string.printable.split()[0], *("→" if family != "noto" else "")} - {" "}
            ):
                assert bytes(face.getmask(character)) != absent, f"{family} lacks {character}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_names_never_fold_to_the_same_key(script: str) -> None:
    names = make_names(np.random.default_rng(0), 300, script)
    assert len({fold(name) for name in names}) == 300
    assert all(unicodedata.is_normalized("NFC", name) for name in names)


def rides(network: Network) -> nx.Graph:
    """Platforms (station, line, service) joined by rides (1) and changes (1000), and a hub node per station."""
    graph = nx.DiGraph()
    for line in network.lines:
        for number, service in enumerate(line.services()):
            for stop in service:
                graph.add_edge(("in", stop), (stop, line.name, number), weight=1000)
                graph.add_edge((stop, line.name, number), ("out", stop), weight=0)
            for a, b in itertools.pairwise(service):
                graph.add_edge((a, line.name, number), (b, line.name, number), weight=1)
                graph.add_edge((b, line.name, number), (a, line.name, number), weight=1)
    for stop in network.stations:
        graph.add_edge(("out", stop), ("in", stop), weight=0)
    return graph


def check(network: Network, rows: list[dict[str, Any]], graph: nx.Graph) -> None:
    lists = {
        line: [re.sub(r" \((Transfer|Branch-starting) Station\)|（(换乘站|支线起始站)）", "", stop) for stop in stops]
        for line, stops in network.metro_data().items()
    }
    for row in rows:
        first, second, answer = row["station_1"], row["station_2"], row["answer"]
        details = json.loads(row["fine_grained_answer"])
        if row["type"] == "TorF1":
            assert answer == any({first, second} <= set(stops) for stops in lists.values())
        elif row["type"] == "TorF2":
            assert answer == (first in lists[second])
        elif row["type"] == "Counting1":
            choices = [int(text) for text in re.findall(r"[ABCD]\) (\d+)", row["question"])]
            assert len(set(choices)) == 4 and choices[answer] == len(details)
            track = nx.Graph(edge for line in network.lines for edge in line.edges())
            assert all(track.has_edge(a, b) for a, b in itertools.pairwise([first, *details, second]))
        elif row["type"] == "Counting2":
            assert answer == sum(first in stops for stops in lists.values())
        elif row["type"] == "Counting3":
            assert answer == len(lists)
        else:
            cost = nx.dijkstra_path_length(graph, ("in", first), ("out", second))
            assert row["question_transfer_count"] == cost // 1000 - 1
            stops = {sum(leg["num_via_stops"] + 1 for leg in plan) for plan in details}
            assert stops == {cost % 1000}
            found = {
                tuple(
                    (leg["route_name"], leg["departure_stop"], *leg["via_stops"], leg["arrival_stop"]) for leg in plan
                )
                for plan in details
            }
            assert found == every_route(graph, first, second) and len(found) == len(details)


def every_route(graph: nx.Graph, start: str, goal: str) -> set[tuple[tuple[str, ...], ...]]:
    """All optimal routes as (line, stop, stop, ...) legs, by networkx alone."""
    routes = set()
    for path in nx.all_shortest_paths(graph, ("in", start), ("out", goal), weight="weight"):
        legs: list[tuple[str, ...]] = []
        for node in path:
            if node[0] == "in":
                legs.append(())
            elif node[0] != "out":
                legs[-1] = (*(legs[-1] or (node[1],)), node[0])
        routes.add(tuple(legs))
    return routes


def test_an_independent_solver_agrees_with_every_answer(maps: list[Network]) -> None:
    balance = Balance()
    for network in maps:
        rng = np.random.default_rng(0)
        check(network, make_questions(network, "full", rng, balance), rides(network))
    for seed in range(200):
        network = make(TINY_LEVELS[seed % 3], seed)
        check(network, make_questions(network, "tiny", np.random.default_rng(seed), balance), rides(network))


def pieces(name: str) -> set[str]:
    """Three letters in a row, or one Chinese character, of a station's name."""
    name = name.removesuffix(" Station").removesuffix("站").casefold()
    length = 1 if name[0] > "\u2e80" else 3
    return {name[at : at + length] for at in range(len(name) - length + 1)}


def test_priors_without_the_map_stay_at_chance(maps: list[Network]) -> None:
    balance = Balance()
    rows = [row for network in maps for row in make_questions(network, "full", np.random.default_rng(1), balance)]
    kinds = {
        kind: [row for row in rows if row["type"] == kind] for kind in ("TorF1", "TorF2", "Counting1", "Counting2")
    }
    for kind in ("TorF1", "TorF2"):
        yes = sum(row["answer"] for row in kinds[kind])
        assert abs(yes - len(kinds[kind]) / 2) <= len(maps)
    # Names that share letters say nothing about being on one line, nor does always answering B, nor a count's rank.
    overlap = [bool(pieces(row["station_1"]) & pieces(row["station_2"])) for row in kinds["TorF1"]]
    right = np.mean([guess == bool(row["answer"]) for guess, row in zip(overlap, kinds["TorF1"], strict=True)])
    assert sum(overlap) > 10 and abs(right - 0.5) < 2 / len(overlap) ** 0.5
    letters = Counter(row["answer"] for row in kinds["Counting1"])
    assert max(letters.values()) / len(kinds["Counting1"]) < 0.27
    ranks: Counter[int] = Counter()
    for row in kinds["Counting1"]:
        choices = [int(text) for text in re.findall(r"[ABCD]\) (\d+)", row["question"])]
        ranks[sorted(choices).index(choices[row["answer"]])] += 1
    assert max(ranks.values()) / len(kinds["Counting1"]) < 0.25 + 1.3 / len(kinds["Counting1"]) ** 0.5
    through = Counter(row["answer"] for row in kinds["Counting2"])
    assert max(through.values()) / len(kinds["Counting2"]) < 0.56


def test_a_full_data_set_has_the_papers_proportions_and_the_same_bytes_again(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_dataset(tmp_path / name, maps={"train": 3}, preset="full", seed=5)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) >= 3 * 3 + 4
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file
    data = load_dataset(tmp_path / "one")
    hard = Counter(p.kind for p in data.problems if p.map_difficulty == "hard")
    assert {kind: hard[kind] for kind in ("TorF1", "TorF2", "Counting1", "Counting3", "planning")} == {
        "TorF1": 35,
        "TorF2": 31,
        "Counting1": 35,
        "Counting3": 1,
        "planning": 40,
    }
    transfers = Counter(p.transfers_required for p in data.problems if p.map_difficulty == "hard")
    assert (transfers[1], transfers[2]) == (15, 5)
    for network_id, lists in data.networks.items():
        assert data.topology(network_id).metro_data() == lists


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 1300, 20))
@pytest.mark.parametrize("level", list(COUNTS))
def test_rules_hold_on_300_maps(level: str, first: int) -> None:
    balance = Balance()
    for seed in range(first, first + 20):
        network = make(level, seed)
        for rule in (
            test_no_label_lies_on_a_label_a_marker_or_the_legend,
            test_each_label_is_nearest_to_its_own_station,
            test_text_stays_legible_at_the_models_resolution,
            test_a_crossing_is_plainly_an_interchange_or_plainly_none,
            test_every_station_lies_on_the_track_of_its_lines,
        ):
            rule([network])
        check(network, make_questions(network, "tiny", np.random.default_rng(seed), balance), rides(network))


@pytest.mark.slow
@pytest.mark.parametrize(("levels", "preset", "seeds"), LONG_CHECKS)
def test_an_independent_solver_agrees_on_1000_maps(levels: tuple[str, ...], preset: str, seeds: range) -> None:
    balance = Balance()
    for seed in seeds:
        network = make(levels[seed % len(levels)], seed)
        check(network, make_questions(network, preset, np.random.default_rng(seed), balance), rides(network))


@pytest.mark.slow
def test_priors_stay_at_chance_on_90_maps() -> None:
    test_priors_without_the_map_stay_at_chance([make(level, seed) for level in COUNTS for seed in range(30)])
