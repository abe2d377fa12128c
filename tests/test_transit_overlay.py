"""A route laid over a map keeps its own colours and fades the rest."""

from __future__ import annotations

import numpy as np
import pytest

from rewardmap.transit.draw import draw_map
from rewardmap.transit.generate import generate_network
from rewardmap.transit.graph import Leg, Line, Network
from rewardmap.transit.overlay import draw_route


@pytest.mark.parametrize("level", ["tiny-hard", "easy", "middle"])
def test_the_route_stays_and_the_rest_fades(level: str) -> None:
    network = generate_network(level, np.random.default_rng(3), "a/b")
    start, goal = network.stations[0], network.stations[-1]
    route = network.shortest_routes(start, goal)[0]
    plain, shown = (np.asarray(image).astype(int) for image in (draw_map(network), draw_route(network, route)))
    assert plain.shape == shown.shape
    ridden = {stop for leg in route for stop in (leg.departure, *leg.via, leg.arrival)}
    pins = [*(leg.departure for leg in route), goal]
    changed = np.abs(plain - shown).max(axis=2)
    for stop in network.stations:
        x, y = (int(value) for value in network.positions[stop])
        patch = changed[y - 2 : y + 3, x - 2 : x + 3]
        if stop not in ridden:
            assert patch.max() > 0 or plain[y - 2 : y + 3, x - 2 : x + 3].min() > 240
        elif all(np.hypot(*np.subtract(network.positions[stop], network.positions[pin])) > 60 for pin in pins):
            assert patch.max() == 0
    assert (changed > 20).mean() > 0.01


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
