"""Flat lists to true networks and back, the real ones included."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rewardmap.transit.graph import Branch, Line, Network
from rewardmap.transit.questions import Balance, make_questions
from rewardmap.transit.topology import network_as_json, network_from_json, network_from_lists
from rewardmap.types import DataError

REAL = Path(__file__).parents[2] / "shared" / "data" / "stations"
CITIES = sorted(REAL.glob("*/*.json")) if REAL.is_dir() else []
needs_real = pytest.mark.skipif(not CITIES, reason="the real networks are not here")


def real(network_id: str) -> Network:
    path = REAL / f"{network_id}.json"
    return network_from_lists(network_id, json.loads(path.read_text(encoding="utf-8")))


def test_a_branch_needs_a_change_of_trains_at_its_junction() -> None:
    lists = {
        "Red": ["A", "B (Branch-starting Station)", "C", "D", "E", "X", "Y"],
        "Blue": ["D (Transfer Station)", "F"],
    }
    network = network_from_lists("a/b", lists, branch_starts={"X"})
    red = network.line("Red")
    assert red.stations == ("A", "B", "C", "D", "E")
    assert red.branches == (Branch(("B", "X", "Y"), "end"),)
    assert ("E", "X") not in red.edges() and ("B", "X") in red.edges()
    (through,) = network.shortest_routes("Y", "D")
    assert [leg.via for leg in through] == [("X", "B", "C")]
    (changing,) = network.shortest_routes("A", "Y")
    assert [(leg.departure, leg.arrival) for leg in changing] == [("A", "B"), ("B", "Y")]
    assert network.metro_data() == lists


def test_without_its_start_a_branch_stays_in_the_trunk() -> None:
    network = network_from_lists("a/b", {"Red": ["A", "B (Branch-starting Station)", "C", "X"]}, branch_starts=())
    assert network.line("Red").stations == ("A", "B", "C", "X")


def test_a_closed_list_is_a_loop_and_rides_go_the_short_way() -> None:
    network = network_from_lists("a/b", {"Ring": ["A", "B", "C", "D", "E", "F", "A"]})
    assert network.line("Ring").loop and len(network.stations) == 6
    (route,) = network.shortest_routes("B", "E")[:1]
    assert len(route) == 1
    assert {leg.via for routes in network.shortest_routes("B", "E") for leg in routes} == {
        ("C", "D"),
        ("A", "F"),
    }
    assert network.shortest_routes("F", "B")[0][0].via == ("A",)


def test_one_stop_is_refused() -> None:
    with pytest.raises(DataError, match="line 'Red' has 1 stop"):
        network_from_lists("a/b", {"Red": ["A"]})


def test_json_keeps_everything() -> None:
    line = Line("Red", "#ff0000", ("A", "B", "C"), branches=(Branch(("B", "D"), "start"),))
    network = Network("a/b", "hard", (line,), {"A": (1.0, 2.0)}, (10, 20), "night", {"geometry": {"size": [1, 2]}})
    assert network_from_json(json.loads(json.dumps(network_as_json(network)))) == network


@needs_real
@pytest.mark.parametrize("path", CITIES, ids=lambda path: path.stem)
def test_real_networks_load_round_trip_and_yield_questions(path: Path) -> None:
    lists = json.loads(path.read_text(encoding="utf-8"))
    network = network_from_lists(f"{path.parent.name}/{path.stem}", lists)
    assert network.metro_data() == lists
    assert [line.name for line in network.lines] == list(lists)
    rows = make_questions(network, "tiny", np.random.default_rng(0), Balance())
    kinds = {row["type"] for row in rows}
    assert kinds >= {"Counting2", "Counting3", "TorF2", "planning"}
    for row in rows:
        if row["type"] == "planning":
            plans = json.loads(row["fine_grained_answer"])
            assert plans and all(len(plan) == row["question_transfer_count"] + 1 for plan in plans)


@needs_real
def test_real_branches_and_loops() -> None:
    shanghai = real("china/shanghai")
    assert shanghai.line("Line 4").loop
    (branch,) = shanghai.line("Line 10").branches
    assert branch.stations == ("龙溪路站", "龙柏新村站", "紫藤路站", "航中路站") and branch.towards == "end"
    assert shanghai.line("Line 10").stations[-1] == "基隆路站"
    assert shanghai.shortest_routes("航中路站", "水城路站")[0][0].via == (
        "紫藤路站",
        "龙柏新村站",
        "龙溪路站",
    )
    assert len(shanghai.shortest_routes("航中路站", "上海动物园站")[0]) == 2
    assert real("china/xian").line("Line 8").loop
    (dubai,) = real("united_arab_emirates/dubai").line("Red Line").branches
    assert dubai.stations[:2] == ("Jabal Ali Station", "lbn Battuta Station") and dubai.towards == "start"
    marked = [
        line.name
        for city in ("china/dalian", "china/hefei", "china/kunming", "china/shanghai")
        for line in real(city).lines
        if line.branches
    ]
    assert marked == ["Line 3", "Line 4", "Line 1", "Line 5", "Line 10", "Line 11"]
    assert not any(line.branches for line in real("america/washington").lines)


@needs_real
def test_shared_track_is_found() -> None:
    oslo = real("norway/oslo")
    shared = set(oslo.line("Line 1").edges()) & set(oslo.line("Line 4").edges())
    assert ("Nationaltheatret Station", "Stortinget Station") in shared
