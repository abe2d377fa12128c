"""Topologies and problems as numbers, for the compiled ``graph`` reward."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from rewardmap.rewards.graph import gold_keys, score_graph
from rewardmap.rewards.graph_compiled import LINE_KEY, LINE_NAME, STOP_KEY, STOP_NAME, Trips, score_trips
from rewardmap.rewards.graph_ride import STOPS, Atlas, room
from rewardmap.rewards.graph_short import Asked, score_said
from rewardmap.rewards.graph_text import folds, key_room
from rewardmap.rewards.hashing import make_table
from rewardmap.rewards.intern import BY_HAND, KIND_CODE, LARGEST_GOLD, PLANNING, columns, named_rows
from rewardmap.rewards.jit import announce
from rewardmap.rewards.score import Outcome
from rewardmap.rewards.scorer import HAND_BACK, Networks, Results
from rewardmap.rewards.texts import Chunk
from rewardmap.rewards.topology import LONGEST_NAME, Topology, line_key, topology
from rewardmap.types import DataError, Problem


@dataclass(frozen=True, slots=True)
class _Interned:
    """One network. Groups and lines count within it."""

    number: int
    topology: Topology
    group: dict[tuple[int, ...], int]
    """Stops that a name may mean -> their group."""
    ends: dict[str, int]
    """A station as a problem may spell it -> the group of the stops that it means."""
    text: bytes
    names: NDArray[np.int32]
    """[names, 4] rows for ``make_table``, places counted within ``text``."""
    groups: list[tuple[int, ...]]
    """The stops that share a key, then single ones of them, then the lines that share one."""
    apart: int
    """Groups of stops that share a key: each stop is in one of these."""
    line_at: list[int]
    """[lines + 1] where each line's services begin."""
    services: NDArray[np.int64]
    order: NDArray[np.int64]
    positions: NDArray[np.int32]


class Verified:
    """``graph``, and the networks it knows."""

    def __init__(self, networks: Networks | None = None, interned: Mapping[str, _Interned] | None = None) -> None:
        self.networks: Networks = networks or {}
        self._interned = interned or {}

    def knowing(self, networks: Networks) -> Verified:
        """The same mode, which also knows these. Raises DataError for a malformed one."""
        interned = dict(self._interned)
        for name, network in networks.items():
            number = interned[name].number if name in interned else len(interned)
            interned[name] = _intern(number, topology(name, network))
        return Verified({**self.networks, **networks}, interned)

    def score(self, chunk: Chunk, results: Results) -> None:
        """See ``Scorer``. Raises DataError where a route's ends are no stops of the network."""
        base = self._atlas[1]
        flat: list[int] = []
        keys: list[bytes] = []
        list_at = [0]
        for problem in chunk.problems:
            kind = KIND_CODE[problem.kind]
            known = self._interned[problem.network_id]
            gold = start = goal = -1
            if kind == PLANNING:
                start, goal = known.ends.get(problem.station_1, -1), known.ends.get(problem.station_2, -1)
                if start < 0 or goal < 0:
                    start, goal = _ends(problem, known)
                start, goal = start + base[known.number], goal + base[known.number]
            elif -LARGEST_GOLD < problem.answer < LARGEST_GOLD:
                gold = problem.answer
                if problem.fine_grained_answer:
                    keys += [key.encode("utf-8", "surrogatepass") for key in gold_keys(problem)]
            else:
                kind = BY_HAND
            list_at.append(len(keys))
            flat += (kind, gold, problem.kind != "Counting1", known.number, start, goal)
        kind_of, gold_of, of_lines, *trip = columns(flat, 6)
        kinds = kind_of[chunk.asked]
        longest = len(chunk.answers.data)
        planning = np.flatnonzero(kinds == PLANNING)
        if len(planning):
            announce("score_trips")
            atlas, trips = self._atlas[0], Trips(*trip)
            scratch = room(longest, int(atlas.about[:, STOPS].max()))
            score_trips(chunk.answers, planning, chunk.asked, trips, atlas, scratch, results)
        short = np.flatnonzero(kinds < PLANNING)
        if len(short):
            announce("score_said")
            key_at = np.cumsum([0, *map(len, keys)])
            text = np.frombuffer(bytearray().join(keys), dtype=np.uint8)
            lists = Asked(kind_of, gold_of, of_lines, np.array(list_at), key_at, text)
            letters = folds()
            buf = np.empty(max(longest, key_room()), dtype=np.uint8)
            found = np.empty(len(keys), dtype=np.uint8)
            score_said(chunk.answers, short, chunk.asked, lists, letters.text, letters.at, buf, found, results)
        results.failure[kinds == BY_HAND] = HAND_BACK

    def by_hand(self, problem: Problem, response: str) -> Outcome:
        """See ``Scorer``."""
        return score_graph(problem, response, self._interned[problem.network_id].topology)

    @cached_property
    def _atlas(self) -> tuple[Atlas, list[int]]:
        return _atlas(self._interned.values())


def _ends(problem: Problem, known: _Interned) -> tuple[int, int]:
    """Groups of the route's ends, however they are spelt."""
    ends = []
    for name in ("station_1", "station_2"):
        station = getattr(problem, name)
        group = known.ends.get(station)
        if group is None:
            group = known.group.get(known.topology.ends(station))
        if group is None:
            raise DataError(
                f"row {problem.uid!r}, field {name!r}: {station!r} is not in network {problem.network_id!r}"
            )
        ends.append(group)
    return ends[0], ends[1]


def _intern(number: int, known: Topology) -> _Interned:
    shared = dict.fromkeys(known.stations.values())
    single = dict.fromkeys((stop,) for group in shared if len(group) > 1 for stop in group)
    group = {stops: at for at, stops in enumerate([*shared, *single])}
    line_group = {key: len(group) + at for at, key in enumerate(known.lines)}
    names = [(STOP_KEY, key, group[stops]) for key, stops in known.stations.items()]
    names += [(LINE_KEY, key, at) for key, at in line_group.items()]
    shown = [name for name in known.stop_names if len(name) <= LONGEST_NAME]
    names += [(STOP_NAME, name, group[known.stops_named(name)]) for name in shown if known.stops_named(name)]
    shown = [name for name in known.line_names if len(name) <= LONGEST_NAME]
    names += [(LINE_NAME, name, line_group[line_key(name)]) for name in shown]
    text, rows = named_rows((4 * number + int(sort), name, at) for sort, name, at in names)
    ends = {name: group[known.ends(name)] for name in known.stop_names if known.ends(name)}
    size = sum(map(len, shared))
    numbered = sorted(known.services, key=lambda service: service.line)
    positions = np.full((len(numbered), size), -1, dtype=np.int32)
    services: list[tuple[int, int, bool, bool, bool, bool]] = []
    order: list[int] = []
    for places, one in zip(positions, numbered, strict=True):
        for place, stop in reversed(list(enumerate(one.stops))):
            places[stop] = place
        services.append((len(order), len(one.stops), one.closed, one.ordered, one.one_way, one.branching))
        order += one.stops
    lines = sum(map(len, known.lines.values()))
    return _Interned(
        number,
        known,
        group,
        ends,
        text,
        rows,
        [*group, *known.lines.values()],
        len(shared),
        np.searchsorted([one.line for one in numbered], range(lines + 1)).tolist(),
        np.array(services, dtype=np.int64).reshape(-1, 6),
        np.array(order, dtype=np.int64),
        positions,
    )


def _atlas(interned: Iterable[_Interned]) -> tuple[Atlas, list[int]]:
    """The arrays, networks in the order of their numbers (which is that of the mapping they are kept in); and the
    number of each network's first group."""
    text = bytearray()
    names: list[NDArray[np.int32]] = []
    base: list[int] = []
    group_at = [0]
    groups: list[int] = []
    group_of: list[int] = []
    about: list[tuple[int, ...]] = []
    line_at: list[int] = []
    services = [np.zeros((0, 6), dtype=np.int64)]
    order = [np.zeros(0, dtype=np.int64)]
    positions = [np.zeros(0, dtype=np.int32)]
    first = ordered = placed = 0
    for one in interned:
        base.append(len(group_at) - 1)
        names.append(one.names + np.array((0, len(text), len(text), base[-1]), dtype=np.int32))
        text += one.text
        stops = one.positions.shape[1]
        about.append((stops, first, first + len(one.services), placed, len(group_of)))
        of = [0] * stops
        for number, members in enumerate(one.groups):
            stops_here = number < len(one.group)
            groups += members if stops_here else [member + len(line_at) for member in members]
            group_at.append(len(groups))
            for stop in members if number < one.apart else ():
                of[stop] = base[-1] + number
        group_of += of
        line_at += [first + at for at in one.line_at[:-1]]
        services.append(one.services + np.array((ordered, 0, 0, 0, 0, 0)))
        order.append(one.order)
        positions.append(one.positions.ravel())
        first, ordered, placed = first + len(one.services), ordered + len(one.order), placed + one.positions.size
    data = np.frombuffer(text, dtype=np.uint8)
    letters = folds()
    atlas = Atlas(
        data,
        make_table(names, data),
        np.array(group_at, dtype=np.int64),
        np.array(groups, dtype=np.int64),
        np.array(group_of, dtype=np.int64),
        np.array(about, dtype=np.int64).reshape(-1, 5),
        np.array([*line_at, first], dtype=np.int64),
        np.concatenate(services),
        np.concatenate(order),
        np.concatenate(positions),
        letters.text,
        letters.at,
    )
    return atlas, base
