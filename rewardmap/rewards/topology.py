"""What ``graph`` mode knows of a network: names folded to keys, services, and how far every stop is from a
goal."""

from __future__ import annotations

import heapq
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from rewardmap.rewards.parse import strip_markers, unbracketed
from rewardmap.transit.graph import Network
from rewardmap.transit.topology import bare_name, is_junction
from rewardmap.types import DataError, MetroData

_SUFFIXES = (
    *("transferstation", "branchstartingstation", "换乘站", "支线起始站"),  # what the data appends
    *("metrostation", "subwaystation", "station"),
    *("地铁站", "站", "駅", "역"),
    *("stasjon", "allomas", "stazione", "estacao", "estacion", "stesen", "bahnhof"),
)
NAME_WORDS = (
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
LONGEST_NAME = 500
"""Letters; a longer name is none."""
_LETTERS = str.maketrans({"ø": "o", "ł": "l", "đ": "d", "ð": "d", "þ": "th", "æ": "ae", "œ": "oe", "ı": "i"})


def fold(text: str) -> str:
    """Compatibility forms, case, diacritics, punctuation and spacing folded away; idempotent."""
    before = None
    while text != before:
        before = text
        text = unicodedata.normalize("NFKD", text).casefold().translate(_LETTERS)
        text = "".join(letter for letter in text if letter.isalnum())
    return text


NAME_ENDINGS = tuple(fold(suffix) for suffix in _SUFFIXES)


@lru_cache(maxsize=65_536)
def station_key(name: str) -> str:
    """A stop's name for comparison: folded, without what languages append for "station"; idempotent."""
    key = fold(name)
    while True:
        suffix = next((suffix for suffix in NAME_ENDINGS if key.endswith(suffix) and key != suffix), None)
        if suffix is None:
            return key
        key = key.removesuffix(suffix)


@lru_cache(maxsize=65_536)
def line_key(name: str) -> str:
    """A line's name for comparison: folded, without words for "line": Line 1, Route 1, 1号线 and 1 agree."""
    key = fold(name)
    while True:
        rests = (rest for word in NAME_WORDS for rest in (key.removeprefix(word), key.removesuffix(word)))
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
    branching: bool = False
    """A branch stands in it, nobody knows from where on: what a train passes between two stops is not known."""


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
    """Station key -> the stops of that name. Each stop is in one group, which several keys may name."""
    lines: dict[str, tuple[int, ...]]
    """Line key -> the lines of that name."""
    stop_names: tuple[str, ...] = ()
    """The stops as the network spells them, with and without markers."""
    line_names: tuple[str, ...] = ()
    stops: dict[str, int] = field(default_factory=dict)
    """Name, as the network spells it -> its stop, where spelling tells stops apart."""
    _costs: dict[frozenset[int], dict[int, tuple[int, int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._at: dict[int, list[int]] = {}
        for number, service in enumerate(self.services):
            for stop in dict.fromkeys(service.stops):
                self._at.setdefault(stop, []).append(number)

    def stops_named(self, name: str) -> tuple[int, ...]:
        """The stops of that name, spelt in any way; empty for unknown and for absurdly long ones."""
        return self._named(name) if len(name) <= LONGEST_NAME else ()

    def ends(self, name: str) -> tuple[int, ...]:
        """The stops that a question means by a name: the one so spelt, else all of that name; empty if unknown."""
        stop = self.stops.get(name)
        return self._named(name) if stop is None else (stop,)

    def _named(self, name: str) -> tuple[int, ...]:
        """Bracketed text is dropped where the whole is no name."""
        found = self.stations.get(station_key(name))
        return self.stations.get(station_key(unbracketed(name)), ()) if found is None else found

    def lines_named(self, name: str) -> tuple[int, ...]:
        """The lines of that name, spelt in any way; empty for unknown and for absurdly long ones."""
        if len(name) > LONGEST_NAME:
            return ()
        found = self.lines.get(line_key(name))
        return self.lines.get(line_key(unbracketed(name)), ()) if found is None else found

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
    return [Ride(len(way) + 1, frozenset() if service.branching else frozenset(way)) for way in ways]


def topology(network_id: str, network: MetroData | Network) -> Topology:
    """The topology of a network, exact from a ``Network``, cautious from flat lists.

    A flat list hides where a branch begins, and loops are mostly stored open. So a line is then a set of
    stops that one train serves, and routes differ in their legs only. In released lists, read as they are or
    into a ``Network``, spellings of one name are one stop (``_speller``).
    Raises DataError where a list is not one of names.
    """
    number: dict[str, int] = {}
    services = []
    key: Callable[[str], str]
    if isinstance(network, Network):
        names = [line.name for line in network.lines]
        released = network.extras.get("lists")
        lists = released if isinstance(released, Mapping) else {"": network.stations}
        key = str if lists is not released else _speller(lists)
        for i, line in enumerate(network.lines):
            marked = not line.branches and any(map(is_junction, lists.get(line.name, ())))
            for stops in line.services():
                closed = len(stops) > 2 and stops[0] == stops[-1]
                services.append(Service(i, _numbered(map(key, stops), number), closed, True, line.one_way, marked))
    else:
        names = list(network)
        for name, stations in network.items():
            if isinstance(stations, str) or not all(isinstance(station, str) for station in stations):
                raise DataError(f"network {network_id!r}, line {name!r}: {stations!r} is not a list of names")
        lists, key = network, _speller(network)
        for i, stations in enumerate(network.values()):
            services.append(Service(i, _numbered(dict.fromkeys(map(key, stations)), number), False, False))
    spelled = dict.fromkeys(name for stations in lists.values() for name in stations)
    lines_by_key: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        lines_by_key.setdefault(line_key(name), []).append(i)
    return Topology(
        tuple(services),
        _by_key({name: number[key(name)] for name in spelled}),
        {key: tuple(lines) for key, lines in lines_by_key.items()},
        tuple(dict.fromkeys(shown for name in spelled for shown in (name, strip_markers(name)))),
        tuple(names),
        number if key is str else {},
    )


def _speller(lists: MetroData) -> Callable[[str], str]:
    """What tells the stops of released lists apart, which spell one station in several ways: the name without its
    brackets, and with them only where several differ, such as Airport (T1) and Airport (T2)."""
    told: dict[str, set[str]] = {}
    for name in (name for stations in lists.values() for name in stations):
        told.setdefault(_one_key(name), set()).add(_bracketed(name))

    def key(name: str) -> str:
        one, text = _one_key(name), _bracketed(name)
        return f"{one} {text}" if text and len(told[one] - {""}) > 1 else one

    return key


def _one_key(name: str) -> str:
    bare = bare_name(name)  # a network's stops are bare, the lists that it was read from are not
    return station_key(unbracketed(bare)) or station_key(bare)


def _bracketed(name: str) -> str:
    """What the name holds in brackets, for comparison."""
    return fold("".join(re.findall(r"[(（]([^()（）]*)[)）]", bare_name(name))))


def _by_key(stops: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Key -> group of stops. Whole names first; without their brackets where that says which stop is meant."""
    groups: dict[str, dict[int, None]] = {}
    whole: dict[int, str] = {}
    for name, stop in stops.items():
        # A stop that is spelt in several ways belongs to the group of its first.
        groups.setdefault(whole.setdefault(stop, station_key(name)), {})[stop] = None
    by_key = {key: tuple(group) for key, group in groups.items()}
    for shorten in (station_key, _one_key):
        meant: dict[str, set[str]] = {}
        for name, stop in stops.items():
            meant.setdefault(shorten(name), set()).add(whole[stop])
        for key, wholes in meant.items():
            if len(wholes) == 1:
                by_key.setdefault(key, by_key[wholes.pop()])
    return by_key


def _numbered(stops: Iterable[str], number: dict[str, int]) -> tuple[int, ...]:
    return tuple(number.setdefault(stop, len(number)) for stop in stops)
