"""Transit networks with their true topology: lines, services, interchanges, and all optimal routes.

The published data keeps a flat station list per line (a branch is appended behind the main line, a loop is
mostly stored open), so list neighbours are not always track neighbours. Here a line is a trunk, an optional
loop and branches; ``Network.metro_data`` writes the flat form with the data's own markers.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np

TRANSFER_MARK = " (Transfer Station)"
BRANCH_MARK = " (Branch-starting Station)"
HAN_TRANSFER_MARK, HAN_BRANCH_MARK = "（换乘站）", "（支线起始站）"
"""What the released Chinese lists write instead."""


@dataclass(frozen=True, slots=True)
class Branch:
    """A side track. ``stations[0]`` is the trunk stop where it leaves; its trains run through to ``towards``."""

    stations: tuple[str, ...]
    towards: str = "start"
    """End of the trunk that the branch's trains run to: "start" or "end"."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line: the trunk in travel order; ``loop`` joins its last stop to its first (stored once)."""

    name: str
    colour: str
    """``#rrggbb``, exactly as drawn."""
    stations: tuple[str, ...]
    loop: bool = False
    branches: tuple[Branch, ...] = ()
    one_way: bool = False
    """May be travelled in the order of its services only."""

    def services(self) -> tuple[tuple[str, ...], ...]:
        """Stop sequences of one train each: the trunk (a loop repeats its first stop at the end), then branches."""
        trunk = (*self.stations, self.stations[0]) if self.loop else self.stations
        services = [trunk]
        for branch in self.branches:
            at = self.stations.index(branch.stations[0])
            if branch.towards == "start":
                services.append(self.stations[:at] + branch.stations)
            else:
                services.append(tuple(reversed(branch.stations)) + self.stations[at + 1 :])
        return tuple(services)

    def stops(self) -> tuple[str, ...]:
        """Every stop once, trunk first, then the branches without their joints."""
        seen = dict.fromkeys(self.stations)
        for branch in self.branches:
            seen.update(dict.fromkeys(branch.stations[1:]))
        return tuple(seen)

    def edges(self) -> tuple[tuple[str, str], ...]:
        """Neighbouring stops, each pair once and sorted."""
        pairs = {(min(a, b), max(a, b)) for service in self.services() for a, b in pairwise(service)}
        return tuple(sorted(pairs))


@dataclass(frozen=True, slots=True)
class Leg:
    """One ride on one line without changing trains; ``via`` excludes both ends."""

    line: str
    departure: str
    arrival: str
    via: tuple[str, ...]


Route = tuple[Leg, ...]


@dataclass(frozen=True)
class Network:
    """A map's network. ``positions`` are picture coordinates in pixels, (x, y), y down."""

    network_id: str
    """``country/city``."""
    level: str
    """Generator level, for example "tiny-easy" or "hard"."""
    lines: tuple[Line, ...]
    positions: Mapping[str, tuple[float, float]]
    size: tuple[int, int] = (0, 0)
    """Picture width and height in pixels; (0, 0) where no picture belongs to the network."""
    style: str = "tiny"
    extras: Mapping[str, object] = field(default_factory=dict)
    """What only the drawer needs (labels, river), JSON values."""

    @property
    def map_difficulty(self) -> str:
        """``difficulty_city``: easy, middle or hard."""
        return self.level.rsplit("-", 1)[-1]

    @cached_property
    def stations(self) -> tuple[str, ...]:
        """Every stop once, in the order of the lines."""
        return tuple(dict.fromkeys(stop for line in self.lines for stop in line.stops()))

    @cached_property
    def _lines_of(self) -> dict[str, tuple[str, ...]]:
        lines_of: dict[str, list[str]] = {}
        for line in self.lines:
            for stop in line.stops():
                lines_of.setdefault(stop, []).append(line.name)
        return {stop: tuple(names) for stop, names in lines_of.items()}

    def lines_through(self, station: str) -> tuple[str, ...]:
        """Names of the lines that stop at ``station``, in the network's order. Raises KeyError for an unknown one."""
        return self._lines_of[station]

    def line(self, name: str) -> Line:
        """The line of that name. Raises KeyError."""
        for line in self.lines:
            if line.name == name:
                return line
        raise KeyError(name)

    def metro_data(self) -> dict[str, list[str]]:
        """The flat lists of ReasonMap: trunk, then branches appended, with the data's exact markers."""
        imported = self.extras.get("lists")
        if isinstance(imported, dict):
            return imported
        data: dict[str, list[str]] = {}
        for line in self.lines:
            joints = {branch.stations[0] for branch in line.branches}
            data[line.name] = []
            for stop in line.stops():
                han = stop.endswith("站")
                marks = (HAN_BRANCH_MARK if han else BRANCH_MARK) if stop in joints else ""
                if len(self._lines_of[stop]) > 1:
                    marks += HAN_TRANSFER_MARK if han else TRANSFER_MARK
                data[line.name].append(stop + marks)
        return data

    def transfer_marks(self) -> int:
        """``city_transfer_count``: transfer markers summed over the lines' lists, not distinct stations."""
        return sum(len(self._lines_of[stop]) > 1 for line in self.lines for stop in line.stops())

    @cached_property
    def _services(self) -> tuple[tuple[str, tuple[str, ...], bool], ...]:
        """(line, stops, one-way) of each service."""
        return tuple((line.name, service, line.one_way) for line in self.lines for service in line.services())

    @cached_property
    def _states(self) -> dict[str, list[tuple[int, int]]]:
        """Station -> (service, index) pairs where a train of that service calls there."""
        states: dict[str, list[tuple[int, int]]] = {}
        for number, (_, service, _) in enumerate(self._services):
            # A closed service names its first stop again at the end; there it is the same place.
            for index, stop in enumerate(service[:-1] if _closed(service) else service):
                states.setdefault(stop, []).append((number, index))
        return states

    def _moves(self, state: tuple[int, int]) -> list[tuple[tuple[int, int], int, int]]:
        """Neighbour states with the transfers and stops they cost."""
        number, index = state
        _, service, one_way = self._services[number]
        steps = (1,) if one_way else (-1, 1)
        if _closed(service):
            around = len(service) - 1
            moves = [((number, (index + step) % around), 0, 1) for step in steps]
        else:
            moves = [((number, index + step), 0, 1) for step in steps if 0 <= index + step < len(service)]
        moves += [(other, 1, 0) for other in self._states[service[index]] if other[0] != number]
        return moves

    def ride(self, line: str, departure: str, arrival: str) -> Leg | None:
        """The shortest ride on one train of a line, or None where no train of it runs that way. Raises KeyError."""
        found: list[tuple[str, ...]] = []
        chosen = self.line(line)
        for service in chosen.services():
            stops = service[:-1] if _closed(service) else service
            if departure == arrival or departure not in stops or arrival not in stops:
                continue
            start, end = stops.index(departure), stops.index(arrival)
            if start < end:
                found.append(stops[start + 1 : end])
            elif not chosen.one_way:
                found.append(stops[end + 1 : start][::-1])
            if _closed(service):
                if start > end:
                    found.append(stops[start + 1 :] + stops[:end])
                elif not chosen.one_way:
                    found.append((stops[end + 1 :] + stops[:start])[::-1])
        return Leg(line, departure, arrival, min(found, key=len)) if found else None

    def fewest_transfers(self) -> np.ndarray:
        """[S, S] int: fewest transfers from station to station in the order of ``stations``; -1 where none leads there.

        Symmetric but for one-way lines.
        """
        index = {stop: i for i, stop in enumerate(self.stations)}
        rides = np.eye(len(self.stations), dtype=np.float32)
        for _, service, one_way in self._services:
            at = [index[stop] for stop in service]
            for i, stop in enumerate(at):
                rides[stop, at[i:] if one_way and not _closed(service) else at] = 1
        fewest = np.full(rides.shape, -1)
        reached = rides
        for transfers in range(len(self._services)):
            new = (reached > 0) & (fewest < 0)
            if not new.any():
                break
            fewest[new] = transfers
            reached = ((reached @ rides) > 0).astype(np.float32)
        return fewest

    def shortest_routes(self, start: str, goal: str) -> list[Route]:
        """All optimal routes: fewest transfers, then fewest stops; sorted, no repeats; empty if unreachable.

        Changing between two branches of one line is a transfer, for a train serves only one of them.
        Raises KeyError for an unknown station, ValueError when both are the same.
        """
        if start == goal:
            raise ValueError(f"a route needs two different stations, got {start!r} twice")
        goals = set(self._states[goal])
        best: dict[tuple[int, int], tuple[int, int]] = dict.fromkeys(self._states[start], (0, 0))
        before: dict[tuple[int, int], list[tuple[int, int]]] = {state: [] for state in best}
        heap = [((0, 0), state) for state in best]
        heapq.heapify(heap)
        bound: tuple[int, int] | None = None
        while heap:
            cost, state = heapq.heappop(heap)
            if bound is not None and cost > bound:
                break
            if cost > best[state]:
                continue
            if state in goals:
                bound = cost
            for other, transfers, stops in self._moves(state):
                reached = (cost[0] + transfers, cost[1] + stops)
                if other not in best or reached < best[other]:
                    best[other], before[other] = reached, [state]
                    heapq.heappush(heap, (reached, other))
                elif reached == best[other] and state not in before[other]:
                    before[other].append(state)
        routes: set[Route] = set()
        stack: list[tuple[tuple[int, int], ...]] = [(state,) for state in goals if bound and best.get(state) == bound]
        while stack:
            path = stack.pop()
            earlier = before[path[0]]
            if not earlier:
                routes.add(self._legs(path))
                continue
            stack.extend((state, *path) for state in earlier if state not in path)
        return sorted(routes, key=lambda route: [(leg.line, leg.arrival, leg.via) for leg in route])

    def _legs(self, path: tuple[tuple[int, int], ...]) -> Route:
        rides: list[tuple[int, list[str]]] = []
        for number, index in path:
            stop = self._services[number][1][index]
            if not rides or rides[-1][0] != number:
                rides.append((number, [stop]))
            else:
                rides[-1][1].append(stop)
        return tuple(Leg(self._services[n][0], stops[0], stops[-1], tuple(stops[1:-1])) for n, stops in rides)


def _closed(service: tuple[str, ...]) -> bool:
    return len(service) > 3 and service[0] == service[-1]
