"""Networks and problems as numbers, for the compiled scorer: every name is read once and becomes an index."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rewardmap.rewards import compiled, compiled_text
from rewardmap.rewards.compiled import CLEAN_NAME, LINE, RAW_NAME, Bank, Questions
from rewardmap.rewards.compiled_text import NOT_SIMPLE
from rewardmap.rewards.parse import MISSING, clean, clean_network, strip_markers
from rewardmap.rewards.score import CleanLines, line_key
from rewardmap.transit.graph import Network
from rewardmap.types import DataError, MetroData, Problem

_KINDS = {
    "TorF1": compiled_text.TRUE_FALSE,
    "TorF2": compiled_text.TRUE_FALSE,
    "Counting1": compiled_text.CHOICE,
    "Counting2": compiled_text.COUNT,
    "Counting3": compiled_text.COUNT,
    "planning": compiled_text.PLANNING,
}
_LARGEST_GOLD = 10**17
_CASED = 0x20000
"""Unicode has no letters with case from here on."""


class _Interned(NamedTuple):
    network: MetroData | Network
    lines: CleanLines
    stops: dict[str, int]
    """Cleaned stop -> its number."""
    gold: dict[str, int]
    """A station as a problem may spell it -> the number of its (once) cleaned name."""
    names: list[tuple[int, str, int]]
    """(sort, name, value) of each interned name."""
    special: tuple[int, int, int, int]
    members: NDArray[np.bool_]

    def number(self, station: str) -> int:
        """Number of a problem's station; -1 if its cleaned name is none of the network's."""
        number = self.gold.get(station)
        return self.stops.get(clean(station), -1) if number is None else number


class Names:
    """The networks read so far. One given again is recognised by identity and not read twice."""

    def __init__(self) -> None:
        self._number: dict[str, int] = {}
        self._read: list[_Interned] = []
        self._bank: Bank | None = None

    def number(self, problem: Problem, networks: Mapping[str, MetroData | Network]) -> int:
        """The number of the problem's network, read now if new. Raises DataError where it is missing."""
        metro = network_of(problem, networks)
        number = self._number.get(problem.network_id, len(self._read))
        if number == len(self._read):
            self._read.append(_intern(problem.network_id, metro))
        elif self._read[number].network is not metro:
            self._read[number] = _intern(problem.network_id, metro)
        else:
            return number
        self._number[problem.network_id] = number
        self._bank = None
        return number

    def lines(self, number: int) -> CleanLines:
        """The network's lines as the plain scorer reads them."""
        return self._read[number].lines

    def bank(self) -> Bank:
        """Everything read so far, as the compiled scorer reads it."""
        if self._bank is None:
            self._bank = _bank(self._read)
        return self._bank

    def questions(self, problems: Sequence[Problem], numbers: Sequence[int]) -> Questions:
        """The problems as columns; ``numbers`` are their networks'."""
        rows = []
        for problem, number in zip(problems, numbers, strict=True):
            kind = _KINDS[problem.kind]
            start = goal = required = -1
            if kind == compiled_text.PLANNING:
                required = problem.transfers_required
                known = self._read[number]
                start, goal = known.number(problem.station_1), known.number(problem.station_2)
                if start < 0 or goal < 0:
                    kind = compiled_text.BY_HAND
            if not -_LARGEST_GOLD < problem.answer < _LARGEST_GOLD:
                kind = compiled_text.BY_HAND
            gold = 0 if kind == compiled_text.BY_HAND else problem.answer
            rows.append((kind, number, start, goal, required, gold))
        return Questions(*np.array(rows, dtype=np.int64).reshape(-1, 6).T.copy())


def network_of(problem: Problem, networks: Mapping[str, MetroData | Network]) -> MetroData | Network:
    """The problem's network. Raises DataError where it is missing."""
    network = networks.get(problem.network_id)
    if network is None:
        raise DataError(
            f"row {problem.uid!r}, field 'network_id': no network {problem.network_id!r} among the "
            f"{len(networks)} given; load its stations file"
        )
    return network


def _intern(network_id: str, network: MetroData | Network) -> _Interned:
    metro = network.metro_data() if isinstance(network, Network) else network
    lines = clean_network(network_id, metro)
    stops: dict[str, int] = {}
    for names in lines.values():
        for name in sorted(names):
            stops.setdefault(name, len(stops))
    lines_at = {line: i for i, line in enumerate(lines)}
    members = np.zeros((len(lines), len(stops)), dtype=np.bool_)
    for line, names in lines.items():
        members[lines_at[line], [stops[name] for name in names]] = True
    marked = {station for stations in metro.values() for station in stations}
    spelled = marked | {strip_markers(station) for station in marked}
    gold = {name: stops.get(clean(name), -1) for name in spelled}
    spelled |= {name.removesuffix(" Station").removesuffix("站") for name in spelled}
    entries = [(LINE, line, lines_at.get(line_key(line), -1)) for line in lines]
    entries += [(CLEAN_NAME, name, number) for name, number in stops.items()]
    twice = {name: clean(clean(name)) for name in spelled}
    entries += [(RAW_NAME, name, stops.get(cleaned, -1)) for name, cleaned in twice.items() if cleaned]
    special = (
        lines_at.get("Line 1", -1),
        lines_at.get("Line 4", -1),
        lines_at.get(MISSING, -1),
        stops.get(clean(clean(MISSING)), -1),
    )
    return _Interned(network, lines, stops, gold, entries, special, members)


def _bank(read: Iterable[_Interned]) -> Bank:
    read = list(read)
    keys: list[bytes] = []
    rows: list[tuple[int, int, int, int]] = []
    about: list[tuple[int, ...]] = []
    at = members_at = 0
    for number, network in enumerate(read):
        for sort, name, value in network.names:
            keys.append(name.encode("utf-8", "surrogatepass"))
            rows.append((3 * number + sort, at, at + len(keys[-1]), value))
            at += len(keys[-1])
        about.append((*network.special, len(network.stops), members_at))
        members_at += network.members.size
    text = np.frombuffer(bytearray().join(keys), dtype=np.uint8)
    table = np.full((1 << max(4, (len(rows) * 4 // 3).bit_length()), 4), -1, dtype=np.int32)
    compiled.fill_table(text, np.array(rows, dtype=np.int32).reshape(-1, 4), table)
    members = np.concatenate([np.zeros(0, dtype=np.bool_), *(network.members.ravel() for network in read)])
    return Bank(text, table, np.array(about, dtype=np.int64).reshape(-1, 6), members, lower_table())


@cache
def lower_table() -> NDArray[np.int32]:
    """[code points] what to add to a code point for its lower case.

    ``NOT_SIMPLE`` where lower case is longer (capital dotted I) or depends on its neighbours (capital sigma).
    """
    table = np.zeros(_CASED, dtype=np.int32)
    for point in range(0x80, _CASED):
        low = chr(point).lower()
        table[point] = ord(low) - point if len(low) == 1 else NOT_SIMPLE
    table[ord("Σ")] = NOT_SIMPLE
    return table
