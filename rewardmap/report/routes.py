"""Routes as lines over a map: where the stops of an answer lie, and the track between them where it can be ridden."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from rewardmap.evaluate.reading import StatedLeg
from rewardmap.rewards.topology import line_key, station_key
from rewardmap.transit.graph import Network
from rewardmap.transit.overlay import track
from rewardmap.types import Problem

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Drawn:
    """One leg over the picture, in its pixels."""

    points: tuple[Point, ...]
    ridable: bool
    """Whether one train of the named line serves both stops in this order; else the leg is a straight line."""


def gold_legs(problem: Problem) -> list[StatedLeg]:
    """The legs of the first reference route, none where the problem has no route."""
    plans = problem.fine_grained_answer
    if problem.kind != "planning" or not plans or not isinstance(plans, list):
        return []
    try:
        return [
            StatedLeg(leg["route_name"], leg["departure_stop"], leg["arrival_stop"], None, None) for leg in plans[0]
        ]
    except (KeyError, TypeError):  # an annotation of another form
        return []


def draw_legs(network: Network, legs: Sequence[StatedLeg]) -> tuple[list[Drawn], list[str]]:
    """The legs that can be placed on the map, and the names that it does not have. Spelling is forgiven."""
    stations = {station_key(stop): stop for stop in network.positions}
    lines = {line_key(line.name): line for line in network.lines}
    drawn: list[Drawn] = []
    unknown: dict[str, None] = {}
    for leg in legs:
        line = lines.get(line_key(leg.line))
        ends = [stations.get(station_key(name)) for name in (leg.departure, leg.arrival)]
        if line is None:
            unknown[leg.line] = None
        unknown.update({name: None for name, stop in zip((leg.departure, leg.arrival), ends, strict=True) if not stop})
        if ends[0] is None or ends[1] is None:
            continue
        ride = network.ride(line.name, ends[0], ends[1]) if line else None
        points: list[Point] = []
        for a, b in pairwise((ends[0], *ride.via, ends[1]) if ride else (ends[0], ends[1])):
            along = track(network, ride.line, a, b) if ride else [network.positions[a], network.positions[b]]
            piece = [(float(x), float(y)) for x, y in along]
            start = network.positions[a]
            # A track has no direction: it is laid the way that it is ridden.
            if _distance(piece[0], start) > _distance(piece[-1], start):
                piece.reverse()
            points += piece
        drawn.append(Drawn(tuple(points), ride is not None))
    return drawn, list(unknown)


def named_stops(network: Network, problem: Problem) -> list[Point]:
    """Where the stops that a question names lie."""
    stations = {station_key(stop): place for stop, place in network.positions.items()}
    names = [problem.station_1, problem.station_2] if problem.kind != "Counting3" else []
    return [stations[station_key(name)] for name in names if name and station_key(name) in stations]


def closest(network: Network) -> float:
    """Pixels between the two stops that lie closest to each other."""
    places = np.array(list(network.positions.values()))
    gaps = np.hypot(*(places[:, None] - places[None]).transpose(2, 0, 1))
    return float(gaps[gaps > 0].min(initial=np.hypot(*network.size)))


def _distance(a: Point, b: Point) -> float:
    return float((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2)
