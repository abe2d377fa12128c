"""What ``graph`` mode knows of a network: names folded to keys, services, and how far every stop is from a
goal."""

from __future__ import annotations

import heapq
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from rewardmap.transit.graph import Network
from rewardmap.types import DataError, MetroData

_SUFFIXES = (
    *("transferstation", "branchstartingstation", "换乘站", "支线起始站"),  # what the data appends
    *("metrostation", "subwaystation", "station"),
    *("地铁站", "站", "駅", "역"),
    *("stasjon", "allomas", "stazione", "estacao", "estacion", "stesen", "bahnhof"),
)
_LINE_WORDS = (
    "metrorail",
    "route",
    "linha",
    "linea",
    "linje",
    "vonal",
    "line",
    "轨道交通",
    "地铁",
    "号线",
    "线",
)
_LONGEST_NAME = 500
_LETTERS = str.maketrans({"ø": "o", "ł": "l", "đ": "d", "ð": "d", "þ": "th", "æ": "ae", "œ": "oe", "ı": "i"})


def fold(text: str) -> str:
    """Compatibility forms, case, diacritics, punctuation and spacing folded away; idempotent."""
    before = None
    while text != before:
        before = text
        text = unicodedata.normalize("NFKD", text).casefold().translate(_LETTERS)
        text = "".join(letter for letter in text if letter.isalnum())
    return text


_FOLDED_SUFFIXES = tuple(fold(suffix) for suffix in _SUFFIXES)


@lru_cache(maxsize=65_536)
def station_key(name: str) -> str:
    """A stop's name for comparison: folded, without what languages append for "station"; idempotent."""
    key = fold(name)
    while True:
        suffix = next((suffix for suffix in _FOLDED_SUFFIXES if key.endswith(suffix) and key != suffix), None)
        if suffix is None:
            return key
        key = key.removesuffix(suffix)


@lru_cache(maxsize=65_536)
def line_key(name: str) -> str:
    """A line's name for comparison: folded, without words for "line": Line 1, Route 1, 1号线 and 1 agree."""
    key = fold(name)
    while True:
        rests = (rest for word in _LINE_WORDS for rest in (key.removeprefix(word), key.removesuffix(word)))
        shorter = next((rest for rest in rests if rest not in ("", key)), None)
        if shorter is None:
            return key
        key = shorter


class Service(NamedTuple):
    """Stops that one train serves."""

    line: int
    stops: tuple[int, ...]
    closed: bool
    """A ring: the last stop is the first."""
    ordered: bool
    """In travel order, as far as is known."""
    one_way: bool = False
    """May be ridden in the order of ``stops`` only."""


class Ride(NamedTuple):
    """One way of riding a leg."""

    stops: int
    """Stops travelled, the last included; 0 where the order of stops is unknown."""
    passed: frozenset[int]
    """Stops between the ends."""


@dataclass
class Topology:
    """A network as services between numbered stops. Stops that only share a name keep their own numbers."""

    services: tuple[Service, ...]
    stations: dict[str, tuple[int, ...]]
    """Station key -> the stops of that name."""
    lines: dict[str, tuple[int, ...]]
    """Line key -> the lines of that name."""
    _costs: dict[frozenset[int], dict[int, tuple[int, int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._at: dict[int, list[int]] = {}
        for number, service in enumerate(self.services):
            for stop in dict.fromkeys(service.stops):
                self._at.setdefault(stop, []).append(number)

    def stops_named(self, name: str) -> tuple[int, ...]:
        """The stops of that name, spelt in any way; empty for unknown and for absurdly long ones."""
        return self.stations.get(station_key(name), ()) if len(name) <= _LONGEST_NAME else ()

    def lines_named(self, name: str) -> tuple[int, ...]:
        """The lines of that name, spelt in any way; empty for unknown and for absurdly long ones."""
        return self.lines.get(line_key(name), ()) if len(name) <= _LONGEST_NAME else ()

    def on_line(self, stop: int, line: int) -> bool:
        """Whether the line calls at the stop."""
        return any(self.services[number].line == line for number in self._at[stop])

    def rides(self, line: int, start: int, end: int) -> list[Ride]:
        """The shortest rides between two stops on one train of the line; two where a ring makes them
        equal."""
        found: list[Ride] = []
        for number in self._at[start]:
            service = self.services[number]
            if service.line == line and end in service.stops:
                found += _rides(service, start, end)
        least = min((ride.stops for ride in found), default=0)
        return [ride for ride in found if ride.stops == least]

    def costs(self, goals: Iterable[int]) -> dict[int, tuple[int, int]]:
        """Stop -> (legs, stops) still needed to the nearest goal, fewest legs first; absent if
        unreachable."""
        key = frozenset(goals)
        known = self._costs.get(key)
        if known is None:
            known = self._costs[key] = self._search(key)
        return known

    def _search(self, goals: frozenset[int]) -> dict[int, tuple[int, int]]:
        best = dict.fromkeys(goals, (0, 0))
        heap = [((0, 0), goal) for goal in goals]
        heapq.heapify(heap)
        while heap:
            cost, stop = heapq.heappop(heap)
            if cost > best[stop]:
                continue
            for number in self._at[stop]:
                service = self.services[number]
                for other in set(service.stops) - {stop}:
                    if other in best and best[other][0] <= cost[0]:
                        continue
                    rides = _rides(service, other, stop)
                    if not rides:
                        continue
                    reached = (cost[0] + 1, cost[1] + min(ride.stops for ride in rides))
                    if other not in best or reached < best[other]:
                        best[other] = reached
                        heapq.heappush(heap, (reached, other))
        return best


def _rides(service: Service, start: int, end: int) -> list[Ride]:
    """The ways from one stop of the service to another: one, two around a ring; none against a one-way service."""
    if not service.ordered:
        return [Ride(0, frozenset())]
    first, last = service.stops.index(start), service.stops.index(end)
    low, high = sorted((first, last))
    inside = service.stops[low + 1 : high]
    around = service.stops[high + 1 : -1] + service.stops[:low]
    ways = [inside, around] if service.closed else [inside]
    if service.one_way:
        ways = ways[:1] if first < last else ways[1:]
    return [Ride(len(way) + 1, frozenset(way)) for way in ways]


def topology(network_id: str, network: MetroData | Network) -> Topology:
    """The topology of a network, exact from a ``Network``, cautious from flat lists.

    A flat list hides where a branch begins, and loops are mostly stored open. So a line is then a set of
    stops that one train serves, routes differ in their legs only, and spellings with one key are one stop.
    Raises DataError where a list is not one of names.
    """
    number: dict[str, int] = {}
    services = []
    names: list[str]
    if isinstance(network, Network):
        names = [line.name for line in network.lines]
        for i, line in enumerate(network.lines):
            for stops in line.services():
                closed = len(stops) > 2 and stops[0] == stops[-1]
                services.append(Service(i, _numbered(stops, number), closed, True, line.one_way))
    else:
        names = list(network)
        for i, (name, stations) in enumerate(network.items()):
            if isinstance(stations, str) or not all(isinstance(station, str) for station in stations):
                raise DataError(f"network {network_id!r}, line {name!r}: {stations!r} is not a list of names")
            stops = tuple(dict.fromkeys(map(station_key, stations)))
            services.append(Service(i, _numbered(stops, number), False, False))
    stations_by_key: dict[str, list[int]] = {}
    for name, stop in number.items():
        stations_by_key.setdefault(station_key(name), []).append(stop)
    lines_by_key: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        lines_by_key.setdefault(line_key(name), []).append(i)
    return Topology(
        tuple(services),
        {key: tuple(stops) for key, stops in stations_by_key.items()},
        {key: tuple(lines) for key, lines in lines_by_key.items()},
    )


def _numbered(stops: Sequence[str], number: dict[str, int]) -> tuple[int, ...]:
    return tuple(number.setdefault(stop, len(number)) for stop in stops)
