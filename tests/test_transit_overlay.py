"""A route laid over a map keeps its own colours and fades the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from rewardmap.transit.draw import draw_map
from rewardmap.transit.generate import generate_network
from rewardmap.transit.graph import Leg, Line, Network
from rewardmap.transit.overlay import TINY_ZOOM, draw_ride, draw_route


@pytest.mark.parametrize("level", ["tiny-hard", "easy", "middle"])
def test_the_route_stays_and_the_rest_fades(level: str) -> None:
    network = generate_network(level, np.random.default_rng(3), "a/b")
    start, goal = network.stations[0], network.stations[-1]
    route = network.shortest_routes(start, goal)[0]
    laid = draw_route(network, route)
    zoom = TINY_ZOOM if level.startswith("tiny") else 1
    assert laid.size == (zoom * network.size[0], zoom * network.size[1])
    drawn = draw_map(network).resize(laid.size, Image.Resampling.LANCZOS)
    plain, shown = (np.asarray(image).astype(int) for image in (drawn, laid))
    ridden = {stop for leg in route for stop in (leg.departure, *leg.via, leg.arrival)}
    pins = [*(leg.departure for leg in route), goal]
    changed = np.abs(plain - shown).max(axis=2)
    for stop in network.stations:
        x, y = (int(zoom * value) for value in network.positions[stop])
        patch = changed[y - 2 : y + 3, x - 2 : x + 3]
        if stop not in ridden:
            assert patch.max() > 0 or plain[y - 2 : y + 3, x - 2 : x + 3].min() > 240
        elif all(np.hypot(*np.subtract(network.positions[stop], network.positions[pin])) > 60 for pin in pins):
            assert patch.max() == 0
    assert (changed > 20).mean() > 0.01


@pytest.mark.parametrize("level", ["easy", "middle", "hard"])
def test_no_pin_hides_a_name_of_its_ride(level: str) -> None:
    """Labels keep their pixels, but for the blunt corner of a pin."""
    network = generate_network(level, np.random.default_rng(3), "a/b")
    stops = max((line.services()[0] for line in network.lines), key=len)[:8]
    plain, shown = (np.asarray(image).astype(int) for image in (draw_map(network), draw_ride(network, stops)))
    labels: list[dict[str, Any]] = network.extras["geometry"]["labels"]  # type: ignore[index]
    upright = [label for label in labels if label["station"] in stops and label["angle"] == 0]
    assert upright
    for label in upright:
        (left, top), (right, bottom) = np.min(label["corners"], axis=0), np.max(label["corners"], axis=0)
        box = np.s_[int(top) : int(bottom), int(left) : int(right)]
        assert (np.abs(plain[box] - shown[box]).max(axis=2) > 60).mean() < 0.03, label["station"]


@pytest.mark.parametrize("level", ["tiny-hard", "easy"])
def test_a_ride_is_track_from_its_first_stop_to_its_last(level: str) -> None:
    network = generate_network(level, np.random.default_rng(3), "a/b")
    line = network.lines[0]
    stops = line.services()[0][:4]
    leg = Leg(line.name, stops[0], stops[-1], stops[1:-1])
    ride, route = (np.asarray(image).astype(int) for image in (draw_ride(network, stops), draw_route(network, [leg])))
    pins = 2 * 1400 * 2  # the pins of the stops between, and what the others moved aside for them
    assert (np.abs(ride - route).max(axis=2) > 60).sum() < pins


def test_wrong_answers_are_shown_too_but_unknown_names_are_refused() -> None:
    network = generate_network("easy", np.random.default_rng(3), "a/b")
    line, (first, last) = network.lines[0].name, (network.stations[0], network.stations[-1])
    assert draw_route(network, [Leg(line, first, last, ())]).size == network.size
    with pytest.raises(ValueError, match="no line 'Nowhere'"):
        draw_route(network, [Leg("Nowhere", first, last, ())])
    with pytest.raises(ValueError, match="no station 'Nowhere'"):
        draw_route(network, [Leg(line, "Nowhere", last, ())])
    with pytest.raises(ValueError, match="has no picture"):
        draw_route(Network("a/b", "easy", (Line("L", "#000000", ("A", "B")),), {}), [])
