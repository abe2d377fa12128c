"""Whether planning questions name two stations of their maps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher

from rewardmap.rewards.parse import clean, strip_markers
from rewardmap.rewards.scorer import AnyNetwork, Networks
from rewardmap.rewards.topology import LONGEST_NAME, station_key, topology
from rewardmap.transit.graph import Network
from rewardmap.types import MetroData, Problem


class Stations:
    """The names that a question may use for a network's stations.

    ``graph`` knows a station or cannot score the question. The published modes can always score it, so there a name is
    refused only where no mode knows it: released lists hold names that the published normaliser never finds again.
    """

    def __init__(self, network_id: str, network: AnyNetwork, graph: bool) -> None:
        self._network_id = network_id
        self._topology = topology(network_id, network) if graph else None
        lists: MetroData = network.metro_data() if isinstance(network, Network) else network
        self._spelled = list(dict.fromkeys(station for stations in lists.values() for station in stations))
        self._keys = frozenset(key for station in self._spelled for key in _keys(station))
        self._known: dict[str, tuple[str | None, object]] = {}

    def complaint(self, start: str, goal: str) -> str | None:
        """None for a question between two stations of the network; else the field at fault, and what is wrong."""
        for field, station in (("station_1", start), ("station_2", goal)):
            wrong, _ = self._looked_up(station)
            if wrong:
                return f"field {field!r}: {wrong}"
        if self._looked_up(start) == self._looked_up(goal):
            return f"field 'station_2': {goal!r} is the station of 'station_1' ({start!r}); name another to go to"
        return None

    def _looked_up(self, station: str) -> tuple[str | None, object]:
        """What is wrong with a name, and what the mode takes it for."""
        if station not in self._known:
            meant = self._topology.ends(station) if self._topology is not None else _keys(station)[0]
            self._known[station] = (None if self._has(station) else self._unknown(station), meant)
        return self._known[station]

    def _has(self, station: str) -> bool:
        if self._topology is not None:
            return bool(self._topology.ends(station))
        return not self._keys.isdisjoint(_keys(station))

    def _unknown(self, station: str) -> str:
        key = station_key(station[:LONGEST_NAME])
        nearest = max(self._spelled, key=lambda name: SequenceMatcher(None, station_key(name), key).ratio(), default="")
        return f"{station!r} is no station of {self._network_id}; the nearest name there is {strip_markers(nearest)!r}"


def unanswerable(problems: Sequence[Problem], networks: Networks, graph: bool) -> Iterator[tuple[Problem, str]]:
    """Each planning question that names a station which its map does not have, or one station twice, and what is wrong
    with it."""
    known = {name: Stations(name, network, graph) for name, network in networks.items()}
    for problem in problems:
        if problem.kind == "planning":
            wrong = known[problem.network_id].complaint(problem.station_1, problem.station_2)
            if wrong:
                yield problem, wrong


def _keys(station: str) -> tuple[str, str]:
    # Marked, for the keys of the two sorts must not meet.
    return "published " + clean(strip_markers(station)), "folded " + station_key(station)
