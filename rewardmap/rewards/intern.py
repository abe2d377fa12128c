"""Networks and problems as numbers, for the compiled ``reference`` and ``paper`` rewards: every name is read once and
becomes an index."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from rewardmap.rewards.compiled_routes import CLEAN_NAME, LINE, RAW_NAME, Bank, Routes, room, score_routes
from rewardmap.rewards.compiled_short import CHOICE, COUNT, TRUE_FALSE, Shorts, score_short
from rewardmap.rewards.compiled_text import lower_table
from rewardmap.rewards.hashing import make_table
from rewardmap.rewards.jit import announce
from rewardmap.rewards.parse import MISSING, clean, clean_network, strip_markers
from rewardmap.rewards.score import CleanLines, Outcome, line_key, score_paper, score_reference
from rewardmap.rewards.scorer import HAND_BACK, AnyNetwork, Networks, Results
from rewardmap.rewards.texts import Chunk
from rewardmap.transit.graph import Network
from rewardmap.types import Problem

PLANNING, BY_HAND = 3, 4
KIND_CODE = {
    "TorF1": TRUE_FALSE,
    "TorF2": TRUE_FALSE,
    "Counting1": CHOICE,
    "Counting2": COUNT,
    "Counting3": COUNT,
    "planning": PLANNING,
}
LARGEST_GOLD = 10**17
"""Larger counts, and answers to ``BY_HAND`` questions in general, are left to the plain code."""


@dataclass(frozen=True, slots=True)
class _Interned:
    number: int
    lines: CleanLines
    stops: dict[str, int]
    """Cleaned stop -> its number."""
    gold: dict[str, int]
    """A station as a problem may spell it -> the number of its (once) cleaned name."""
    text: bytes
    """The names, end to end."""
    names: NDArray[np.int32]
    """[names, 4] rows for ``make_table``, places counted within ``text``."""
    special: tuple[int, int, int, int]
    members: NDArray[np.bool_]

    def number_of(self, station: str) -> int:
        """Number of a problem's station, however it is spelt; -1 if its cleaned name is none of the network's."""
        return self.stops.get(clean(station), -1)


class Published:
    """``reference``, or with ``paper`` that mode, and the networks it knows."""

    def __init__(
        self, paper: bool, networks: Networks | None = None, interned: Mapping[str, _Interned] | None = None
    ) -> None:
        self.networks: Networks = networks or {}
        self._paper = paper
        self._interned = interned or {}

    def knowing(self, networks: Networks) -> Published:
        """The same mode, which also knows these. Raises DataError for a malformed one."""
        interned = dict(self._interned)
        for name, network in networks.items():
            number = interned[name].number if name in interned else len(interned)
            interned[name] = _intern(number, name, network)
        return Published(self._paper, {**self.networks, **networks}, interned)

    def score(self, chunk: Chunk, results: Results) -> None:
        """See ``Scorer``."""
        flat: list[int] = []
        for problem in chunk.problems:
            kind = KIND_CODE[problem.kind]
            known = self._interned[problem.network_id]
            gold = start = goal = required = -1
            if kind == PLANNING:
                required = problem.transfers_required
                start, goal = known.gold.get(problem.station_1, -1), known.gold.get(problem.station_2, -1)
                if start < 0 or goal < 0:
                    start, goal = known.number_of(problem.station_1), known.number_of(problem.station_2)
                if start < 0 or goal < 0:
                    kind = BY_HAND
            elif -LARGEST_GOLD < problem.answer < LARGEST_GOLD:
                gold = problem.answer
            else:
                kind = BY_HAND
            flat += (kind, gold, known.number, start, goal, required)
        kind_of, gold_of, *route = columns(flat, 6)
        kinds = kind_of[chunk.asked]
        scratch = room(len(chunk.answers.data))
        planning = np.flatnonzero(kinds == PLANNING)
        if len(planning):
            announce("score_routes")
            score_routes(
                chunk.answers, planning, chunk.asked, Routes(*route), self._bank, self._paper, scratch, results
            )
        short = np.flatnonzero(kinds < PLANNING)
        if len(short):
            announce("score_short")
            asks, lower = Shorts(kind_of, gold_of), self._bank.lower
            score_short(chunk.answers, short, chunk.asked, asks, lower, scratch.buf, scratch.spare, results)
        results.failure[kinds == BY_HAND] = HAND_BACK

    @cached_property
    def _bank(self) -> Bank:
        return _bank(self._interned.values())

    def by_hand(self, problem: Problem, response: str) -> Outcome:
        """See ``Scorer``."""
        plain = score_paper if self._paper else score_reference
        return plain(
            problem.kind,
            response,
            problem.answer,
            clean(problem.station_1),
            clean(problem.station_2),
            problem.transfers_required,
            self._interned[problem.network_id].lines,
        )


def _intern(number: int, network_id: str, network: AnyNetwork) -> _Interned:
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
    entries += [(CLEAN_NAME, name, at) for name, at in stops.items()]
    twice = {name: clean(clean(name)) for name in spelled}
    entries += [(RAW_NAME, name, stops.get(cleaned, -1)) for name, cleaned in twice.items() if cleaned]
    special = (
        lines_at.get("Line 1", -1),
        lines_at.get("Line 4", -1),
        lines_at.get(MISSING, -1),
        stops.get(clean(clean(MISSING)), -1),
    )
    text, rows = named_rows((3 * number + sort, name, value) for sort, name, value in entries)
    return _Interned(number, lines, stops, gold, text, rows, special, members)


def columns(flat: list[int], count: int) -> NDArray[np.int64]:
    """[count, rows] of numbers that are listed row by row."""
    # Reading a buffer, NumPy need not ask each number what it is.
    return np.frombuffer(array("q", flat), dtype=np.int64).reshape(-1, count).T.copy()


def named_rows(entries: Iterable[tuple[int, str, int]]) -> tuple[bytes, NDArray[np.int32]]:
    """(names' bytes, [names, 4] rows for ``make_table``) of (space, name, value)."""
    text = bytearray()
    rows = []
    for space, name, value in entries:
        low = len(text)
        text += name.encode("utf-8", "surrogatepass")
        rows.append((space, low, len(text), value))
    return bytes(text), np.array(rows, dtype=np.int32).reshape(-1, 4)


def _bank(interned: Iterable[_Interned]) -> Bank:
    """In the order of their numbers, which is that of the mapping they are kept in."""
    names: list[NDArray[np.int32]] = []
    about: list[tuple[int, ...]] = []
    members_at = 0
    text = bytearray()
    members = [np.zeros(0, dtype=np.bool_)]
    for network in interned:
        names.append(network.names + np.array((0, len(text), len(text), 0), dtype=np.int32))
        text += network.text
        about.append((*network.special, len(network.stops), members_at))
        members.append(network.members.ravel())
        members_at += network.members.size
    data = np.frombuffer(text, dtype=np.uint8)
    return Bank(
        data,
        make_table(names, data),
        np.array(about, dtype=np.int64).reshape(-1, 6),
        np.concatenate(members),
        lower_table(),
    )
