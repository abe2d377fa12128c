"""The second world, warehouse floors with one-way aisles: the same records, questions and rewards as transit maps."""

from __future__ import annotations

import dataclasses
import filecmp
import itertools
import json
import re
from collections import Counter
from pathlib import Path

import networkx as nx
import numpy as np
import pytest

import rewardmap.transit
from rewardmap.rewards.rubric import Rubric
from rewardmap.transit import Line, MapData, Network, gold_response, load_dataset, write_dataset
from rewardmap.transit.draw import draw_map
from rewardmap.transit.export import PRESET_LEVELS
from rewardmap.transit.generate import generate_network
from rewardmap.transit.grid import CELL_PX, TINY_GRID_LEVELS
from rewardmap.transit.grid_floor import BAY_PX, FLOOR_LEVELS
from rewardmap.transit.overlay import draw_route
from rewardmap.transit.questions import Balance, make_questions
from rewardmap.transit.topology import network_as_json, network_from_json

CHANGE = 10_000
"""Cost of a change in the independent solver; more than any route has stops."""


def networks(levels: tuple[str, ...], count: int) -> list[Network]:
    return [
        generate_network(level, np.random.default_rng([11, index]), f"x/{level}-{index}")
        for index, level in zip(range(count), itertools.cycle(levels), strict=False)
    ]


@pytest.fixture(scope="module")
def tiny_floors() -> list[Network]:
    return networks(TINY_GRID_LEVELS, 150)


@pytest.fixture(scope="module")
def floors() -> list[Network]:
    return networks(FLOOR_LEVELS, 50)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grid") / "set"
    write_dataset(folder, maps={"train": 60, "test": 12}, preset="grid-tiny", seed=3)
    return folder


@pytest.fixture(scope="module")
def data(folder: Path) -> MapData:
    return load_dataset(folder)


def asked(preset: str, maps: list[Network]) -> list[tuple[Network, dict]]:
    balance, rng = Balance(), np.random.default_rng(5)
    return [(network, row) for network in maps for row in make_questions(network, preset, rng, balance)]


def directed(network: Network) -> nx.DiGraph:
    """Stops of a line as nodes, rides (1) in the direction of travel, changes (``CHANGE``), free ends per place."""
    graph = nx.DiGraph()
    for line in network.lines:
        for a, b in itertools.pairwise(line.stations):
            graph.add_edge((line.name, a), (line.name, b), cost=1)
            if not line.one_way:
                graph.add_edge((line.name, b), (line.name, a), cost=1)
        for stop in line.stations:
            graph.add_edge(("from", stop), (line.name, stop), cost=0)
            graph.add_edge((line.name, stop), ("to", stop), cost=0)
    for line, other in itertools.permutations(network.lines, 2):
        for stop in set(line.stations) & set(other.stations):
            graph.add_edge((line.name, stop), (other.name, stop), cost=CHANGE)
    return graph


def test_an_independent_solver_agrees_with_every_planning_answer(
    tiny_floors: list[Network], floors: list[Network]
) -> None:
    seen: Counter[int] = Counter()
    one_sided = 0
    for preset, maps in (("grid-tiny", tiny_floors), ("grid", floors)):
        graphs = {network.network_id: directed(network) for network in maps}
        for network, row in asked(preset, maps):
            if row["type"] != "planning":
                continue
            graph, start, goal = graphs[network.network_id], row["station_1"], row["station_2"]
            paths = list(nx.all_shortest_paths(graph, ("from", start), ("to", goal), weight="cost"))
            cost = nx.path_weight(graph, paths[0], "cost")
            plans = json.loads(row["fine_grained_answer"])
            expected = set()
            for path in paths:
                rides = [
                    (name, [stop for _, stop in run]) for name, run in itertools.groupby(path[1:-1], lambda n: n[0])
                ]
                expected.add(tuple((name, tuple(stops)) for name, stops in rides))
            answered = {
                tuple(
                    (leg["route_name"], (leg["departure_stop"], *leg["via_stops"], leg["arrival_stop"])) for leg in plan
                )
                for plan in plans
            }
            assert answered == expected and len(plans) == len(expected)
            assert row["question_transfer_count"] == cost // CHANGE == len(plans[0]) - 1
            seen[row["question_transfer_count"]] += 1
            there, back = ("from", goal), ("to", start)
            one_sided += not nx.has_path(graph, there, back) or cost != nx.shortest_path_length(
                graph, there, back, weight="cost"
            )
    assert set(seen) == {0, 1, 2} and min(seen.values()) > 100
    assert one_sided > 200  # direction matters


def test_fewest_transfers_agree_with_the_independent_solver(tiny_floors: list[Network], floors: list[Network]) -> None:
    for network in (*tiny_floors[:30], *floors[:6]):
        graph = directed(network)
        fewest = network.fewest_transfers()
        for i, start in enumerate(network.stations):
            costs = nx.single_source_dijkstra_path_length(graph, ("from", start), weight="cost")
            for j, goal in enumerate(network.stations):
                expected = costs[("to", goal)] // CHANGE if ("to", goal) in costs else -1
                assert fewest[i, j] == expected, (network.network_id, start, goal)


def test_a_one_way_line_is_ridden_forwards_only() -> None:
    a = Line("Red Line", "#ff0000", ("P", "Q", "R"), one_way=True)
    b = Line("Blue Line", "#0000ff", ("R", "S", "P"))
    network = Network("x/y", "grid-tiny-easy", (a, b), {})
    assert {route[0].line for route in network.shortest_routes("P", "R")} == {"Red Line", "Blue Line"}
    assert {route[0].line for route in network.shortest_routes("R", "P")} == {"Blue Line"}
    assert [leg.line for leg in network.shortest_routes("R", "Q")[0]] == ["Blue Line", "Red Line"]
    ring = Line("Green Line", "#00ff00", ("A", "B", "C", "D"), loop=True, one_way=True)
    around = Network("x/y", "grid-tiny-easy", (ring,), {})
    assert around.shortest_routes("B", "A")[0][0].via == ("C", "D")
    assert around.fewest_transfers().max() == 0
    dead_end = Network("x/y", "grid-tiny-easy", (a,), {})
    assert dead_end.shortest_routes("R", "P") == [] and dead_end.fewest_transfers()[2, 0] == -1


def test_one_way_survives_the_way_to_json_and_back(tiny_floors: list[Network], floors: list[Network]) -> None:
    for network in (*tiny_floors[:10], *floors[:3]):
        again = network_from_json(json.loads(json.dumps(network_as_json(network))))
        assert again.lines == network.lines and any(line.one_way for line in tiny_floors[1].lines)
        assert draw_map(again).tobytes() == draw_map(network).tobytes()


def test_tiny_floors_keep_the_rules_of_the_cells(tiny_floors: list[Network]) -> None:
    for network in tiny_floors:
        cells = {stop: (int(x // CELL_PX), int(y // CELL_PX)) for stop, (x, y) in network.positions.items()}
        assert len(set(cells.values())) == len(cells) == len(network.stations) <= 12
        taken: Counter[frozenset[tuple[int, int]]] = Counter()
        for line in network.lines:
            assert line.name in ("Red Line", "Blue Line", "Green Line") and len(line.stations) >= 3
            for a, b in itertools.pairwise(line.stations):
                (ax, ay), (bx, by) = cells[a], cells[b]
                assert (ax == bx) != (ay == by)
                steps = max(abs(ax - bx), abs(ay - by))
                way = [(ax + (bx - ax) * k // steps, ay + (by - ay) * k // steps) for k in range(steps + 1)]
                assert not set(way[1:-1]) & set(cells.values()), "passes a place without stopping"
                taken.update(frozenset(pair) for pair in itertools.pairwise(way))
        assert max(taken.values()) == 1


def test_every_bay_of_a_floor_can_be_reached_and_every_crossing_is_one(floors: list[Network]) -> None:
    aisles: dict[str, list[int]] = {}
    for network in floors:
        graph = directed(network)
        assert nx.is_strongly_connected(graph.subgraph(n for n in graph if n[0] not in ("from", "to")))
        assert any(line.one_way for line in network.lines)
        aisles.setdefault(network.map_difficulty, []).append(len(network.lines))
        assert len({line.colour for line in network.lines}) == len({line.name for line in network.lines})
        at = network.positions
        spans = []
        for line in network.lines:
            xs, ys = zip(*(at[stop] for stop in line.stations), strict=True)
            assert len(set(xs)) == 1 or len(set(ys)) == 1
            spans.append((min(xs), max(xs), min(ys), max(ys), set(line.stations)))
        for a, b in itertools.combinations(spans, 2):
            meet = a[0] <= b[1] and b[0] <= a[1] and a[2] <= b[3] and b[2] <= a[3]
            assert meet == bool(a[4] & b[4]) and len(a[4] & b[4]) <= 1
    assert max(aisles["easy"]) < min(aisles["middle"]) and max(aisles["middle"]) < min(aisles["hard"])


def test_plates_and_signs_of_a_floor_do_not_touch(floors: list[Network]) -> None:
    for network in floors:
        width, height = network.size
        assert 800 <= width <= 1600 and 600 <= height <= 1600
        geometry = network.extras["geometry"]
        assert isinstance(geometry, dict)
        boxes = [(x, y, BAY_PX[0] / 2, BAY_PX[1] / 2) for x, y in network.positions.values()]
        boxes += [(badge["x"], badge["y"], 15, 15) for badge in geometry["badges"]]
        x0, y0, x1, y1 = geometry["wall"]
        for a, b in itertools.combinations(boxes, 2):
            assert abs(a[0] - b[0]) > a[2] + b[2] or abs(a[1] - b[1]) > a[3] + b[3], network.network_id
        assert all(x0 < x - w and x + w < x1 and y0 < y - h and y + h < y1 for x, y, w, h in boxes)
        assert geometry["legend"][0] > x1 and geometry["legend"][2] < width and geometry["legend"][3] < height


def test_pictures_show_each_aisle_in_its_colour(tiny_floors: list[Network], floors: list[Network]) -> None:
    for network in (*tiny_floors[:12], *floors[:3]):
        image = draw_map(network)
        assert image.size == network.size
        pixels = np.asarray(image).reshape(-1, 3).astype(int)
        for line in network.lines:
            colour = np.array([int(line.colour[i : i + 2], 16) for i in (1, 3, 5)])
            assert (np.abs(pixels - colour).max(axis=1) < 24).sum() > 30, line.name


def test_an_arrowhead_tells_the_direction_of_a_one_way_aisle() -> None:
    """The arrowhead is a white triangle that narrows in the direction of travel; a two-way aisle has none."""
    at = {"A": (14.0, 70.0), "B": (126.0, 70.0)}
    heights = []
    for stops, one_way in ((("A", "B"), True), (("B", "A"), True), (("A", "B"), False)):
        line = Line("Red Line", "#d61f2c", stops, one_way=one_way)
        picture = np.asarray(draw_map(Network("x/y", "grid-tiny-easy", (line,), at, (140, 140), "grid-tiny")))
        heights.append((picture[62:79, 28:113].min(axis=2) > 200).sum(axis=0))
    right, left, both = heights
    for columns in (right, left[::-1]):
        drawn = columns[columns > 0]
        assert len(drawn) > 3 and drawn[0] > drawn[-1] and (np.diff(drawn) <= 0).all()
    assert not both.any()


def test_a_route_is_laid_over_a_floor(floors: list[Network]) -> None:
    network = floors[2]
    route = network.shortest_routes(network.stations[0], network.stations[-1])[0]
    picture = np.asarray(draw_map(network)).astype(int)
    laid = np.asarray(draw_route(network, route)).astype(int)
    x, y = (round(value) for value in network.positions[route[0].via[0] if route[0].via else route[0].arrival])
    assert (laid[y + 6 : y + 10, x - 8 : x + 8] == picture[y + 6 : y + 10, x - 8 : x + 8]).all()
    assert (laid != picture).any(axis=2).mean() > 0.5


@pytest.mark.parametrize("preset", ["grid-tiny", "grid"])
def test_labels_are_balanced_and_names_tell_nothing(
    preset: str, tiny_floors: list[Network], floors: list[Network]
) -> None:
    rows = [row for _, row in asked(preset, tiny_floors if preset == "grid-tiny" else floors)]
    by_kind = {kind: [row for row in rows if row["type"] == kind] for kind in {row["type"] for row in rows}}
    for kind in ("TorF1", "TorF2"):
        answers = Counter(row["answer"] for row in by_kind[kind])
        assert abs(answers[0] - answers[1]) <= 0.03 * answers.total() + 2
    letters = Counter(row["answer"] for row in by_kind["Counting1"])
    assert set(letters) == {0, 1, 2, 3} and max(letters.values()) - min(letters.values()) <= 4
    through = Counter(row["answer"] for row in by_kind["Counting2"])
    assert set(through) == {1, 2} and max(through.values()) <= 0.6 * through.total()
    planning = Counter(row["question_transfer_count"] for row in by_kind["planning"])
    if preset == "grid-tiny":
        assert abs(planning[0] - planning[1]) <= 2 and set(planning) == {0, 1}
    else:
        assert planning[0] == 20 * len(floors) and set(planning) == {0, 1, 2}
    for kind, label in (("TorF1", "answer"), ("planning", "question_transfer_count")):
        asked_of = by_kind[kind]
        agree = sum((row["station_1"] < row["station_2"]) == bool(row[label]) for row in asked_of)
        expected = np.mean([row["station_1"] < row["station_2"] for row in asked_of])
        positive = np.mean([bool(row[label]) for row in asked_of])
        chance = expected * positive + (1 - expected) * (1 - positive)
        assert abs(agree - chance * len(asked_of)) < 3.5 * 0.5 * len(asked_of) ** 0.5
    for row in by_kind["TorF2"]:  # neither a number nor a letter is shared between a bay and its aisle
        assert not set(re.findall(r"\w+", row["station_1"])) & set(re.findall(r"\w+", row["station_2"]))


def test_short_answers_follow_from_the_drawn_aisles(tiny_floors: list[Network]) -> None:
    for network, row in asked("grid-tiny", tiny_floors):
        stops = {line.name: line.stations for line in network.lines}
        a, b = row["station_1"], row["station_2"]
        if row["type"] == "TorF1":
            assert row["answer"] == any({a, b} <= set(along) for along in stops.values())
        elif row["type"] == "TorF2":
            assert row["answer"] == (a in stops[b])
        elif row["type"] == "Counting1":
            gaps = {abs(s.index(a) - s.index(b)) - 1 for s in stops.values() if {a, b} <= set(s)}
            choices = dict(re.findall(r"([ABCD])\) (\d+) ", row["question"]))
            assert gaps == {int(choices["ABCD"[row["answer"]]])} and len(set(choices.values())) == 4
        elif row["type"] == "Counting2":
            assert row["answer"] == sum(a in along for along in stops.values())
        elif row["type"] == "Counting3":
            assert row["answer"] == len(stops)


def test_gold_answers_earn_full_marks_from_the_published_reward(data: MapData) -> None:
    responses = [gold_response(problem) for problem in data.problems]
    batch = Rubric(mode="reference").score(data.problems, responses, data.networks)
    assert batch.correct.all() and batch.format_valid.all() and not batch.failure.any()
    marks: dict[tuple[str, str, int], set[float]] = {}
    for problem, score, weight in zip(data.problems, batch.score, batch.weight, strict=True):
        group = (problem.kind, problem.map_difficulty, problem.transfers_required)
        marks.setdefault(group, set()).add(round(float(score / weight), 9))
    assert all(len(scores) == 1 for scores in marks.values())
    wrong = ["Route Name: none\nDeparture Stop: none\nArrival Stop: none"] * len(data.problems)
    worse = Rubric(mode="reference").score(data.problems, wrong, data.networks)
    assert not worse.correct.any() and (worse.score < batch.score).all()


def test_the_verified_reward_knows_one_way_aisles(data: MapData) -> None:
    networks = {network_id: data.topology(network_id) for network_id in data.networks}
    rubric = Rubric(mode="graph")
    batch = rubric.score(data.problems, [gold_response(problem) for problem in data.problems], networks)
    assert batch.correct.all() and not batch.failure.any()
    against = []
    for problem in data.problems:
        if problem.kind == "planning" and problem.transfers_required == 0:
            leg = problem.fine_grained_answer[0][0]
            (line,) = (line for line in networks[problem.network_id].lines if line.name == leg["route_name"])
            if line.one_way:
                back = dataclasses.replace(problem, station_1=problem.station_2, station_2=problem.station_1)
                against.append((back, leg))
    wrong = [
        f"Route Name: {leg['route_name']}\nDeparture Stop: {leg['arrival_stop']}\nArrival Stop: {leg['departure_stop']}"
        for _, leg in against
    ]
    assert len(wrong) > 10
    assert not rubric.score([problem for problem, _ in against], wrong, networks).correct.any()


def test_the_round_trip_keeps_rows_and_networks(data: MapData, folder: Path) -> None:
    assert Counter(p.kind for p in data.problems)["planning"] == 240
    assert {p.map_difficulty for p in data.problems} == {"easy", "middle", "hard"}
    for network_id, lists in data.networks.items():
        network = data.topology(network_id)
        assert network.metro_data() == lists
        picture = (folder / "maps" / f"{network_id}.png").read_bytes()
        assert picture[:4] == b"\x89PNG"
    assert any(line.one_way for network_id in data.networks for line in data.topology(network_id).lines)


@pytest.mark.parametrize(("preset", "maps"), [("grid-tiny", 6), ("grid", 3)])
def test_same_seed_gives_the_same_bytes(preset: str, maps: int, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_dataset(tmp_path / name, maps={"train": maps}, preset=preset, seed=9)
    files = sorted(str(path.relative_to(tmp_path / "a")) for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) > 3 * maps
    same, _, _ = filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", files, shallow=False)
    assert same == files
    card = (tmp_path / "a/README.md").read_text(encoding="utf-8")
    assert f'preset="{preset}"' in card and "warehouse floors" in card and PRESET_LEVELS[preset][0] in card


def test_the_tiny_models_phrases_cover_the_questions() -> None:
    """What is not a letter or a number in a tiny floor's question is one of the phrases that the tokenizer knows."""
    tiny = pytest.importorskip("rewardmap.tiny")
    known = sorted(tiny.phrases(), key=len, reverse=True)
    for _, row in asked("grid-tiny", networks(TINY_GRID_LEVELS, 12)):
        rest = row["question"]
        for phrase in known:
            rest = rest.replace(phrase, "\0")
        assert all(len(piece) <= 1 for piece in rest.split("\0")), (row["question"], rest)


def test_nothing_above_the_transit_room_knows_of_floors() -> None:
    """The other rooms see lines, stations and rows: none names a floor, an aisle, or the modules that draw them."""
    package = Path(rewardmap.transit.__file__ or "").parent.parent
    words = re.compile(r"aisle|warehouse|shel(?:f|ves)\b|grid_(?:network|floor|draw)|transit[. ]grid|\"grid[\"-]", re.I)
    sources = [path for path in package.rglob("*.py") if "transit" not in path.relative_to(package).parts]
    assert len(sources) > 30
    found = [f"{path.name}: {word.group()}" for path in sources for word in words.finditer(path.read_text("utf-8"))]
    assert not found
