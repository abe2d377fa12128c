"""Whether the stations that planning questions name are on their maps."""

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
        self._complaints: dict[str, str | None] = {}

    def complaint(self, station: str) -> str | None:
        """None for a station of the network; else what is wrong with the name."""
        if station not in self._complaints:
            self._complaints[station] = None if self._has(station) else self._unknown(station)
        return self._complaints[station]

    def _has(self, station: str) -> bool:
        if self._topology is not None:
            return bool(self._topology.ends(station))
        return not self._keys.isdisjoint(_keys(station))

    def _unknown(self, station: str) -> str:
        key = station_key(station[:LONGEST_NAME])
        nearest = max(self._spelled, key=lambda name: SequenceMatcher(None, station_key(name), key).ratio(), default="")
        return f"{station!r} is no station of {self._network_id}; the nearest name there is {strip_markers(nearest)!r}"


def off_the_map(problems: Sequence[Problem], networks: Networks, graph: bool) -> Iterator[tuple[Problem, str]]:
    """Each planning question that names a station which its map does not have, and what is wrong with it."""
    known = {name: Stations(name, network, graph) for name, network in networks.items()}
    for problem in problems:
        for field in ("station_1", "station_2") if problem.kind == "planning" else ():
            wrong = known[problem.network_id].complaint(getattr(problem, field))
            if wrong:
                yield problem, f"field {field!r}: {wrong}"
                break


def _keys(station: str) -> tuple[str, str]:
    # Marked, for the keys of the two sorts must not meet.
    return "published " + clean(strip_markers(station)), "folded " + station_key(station)
