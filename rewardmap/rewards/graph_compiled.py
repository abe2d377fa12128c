"""The ``graph`` reward compiled by Numba: answers as UTF-8 bytes in, numbers out, no interpreter in the loop.

Equal to ``graph.score_graph`` on every text. Routes that can be read in more than ``graph_ride.STATES`` ways
at once, which takes many stops of one name, come back as ``HAND_BACK`` and are scored there.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rewardmap.rewards.compiled_text import THOUGHT, ZERO, rfind, strip, unbracketed
from rewardmap.rewards.graph import DETAIL, PARTIAL
from rewardmap.rewards.graph_ride import FAR, NONE, NOT_ON_LINE, OVERFLOW, STATES, STOPS_AT, ride, search
from rewardmap.rewards.graph_text import key_of, spans_of
from rewardmap.rewards.hashing import MISS, lookup
from rewardmap.rewards.jit import entry, helper
from rewardmap.rewards.score import FAILURE_CODE
from rewardmap.rewards.texts import utf8

STOP_KEY, LINE_KEY, STOP_NAME, LINE_NAME = (np.int64(n) for n in range(4))
"""Sorts of interned names, folded and as the network spells them; a name's space is ``4 * network + sort``."""
_NO_ANSWER, _BAD_FORMAT, _ENDPOINT, _UNKNOWN_LINE, _BROKEN, _NOT_OPTIMAL = (
    np.int64(FAILURE_CODE[name])
    for name in ("no_answer", "bad_format", "endpoint", "unknown_line", "broken_transfer", "not_optimal")
)


class Trips(NamedTuple):
    """Planning problems as columns; ``start`` and ``goal`` are groups of stops."""

    network: NDArray[np.int64]
    start: NDArray[np.int64]
    goal: NDArray[np.int64]


@helper
def _group(data, start, end, network, sort, text, table, fold_text, fold_at, key, spare):  # type: ignore[no-untyped-def]
    """The group that the name data[start:end] means, ``sort`` being that of its key; below 0 if none."""
    known = lookup(text, table, 4 * network + sort + STOP_NAME, data, start, end)
    if known != MISS:
        return known
    low, high = key_of(data, start, end, sort == LINE_KEY, fold_text, fold_at, key)
    if high < 0:
        return np.int64(MISS)
    known = lookup(text, table, 4 * network + sort, key, low, high)
    if known != MISS:
        return known
    n = end - start
    for i in range(n):
        spare[i] = data[start + i]
    bare = unbracketed(spare, n)
    if bare == n:
        return known
    low, high = key_of(spare, ZERO, bare, sort == LINE_KEY, fold_text, fold_at, key)
    return lookup(text, table, 4 * network + sort, key, low, high)


@helper
def _away(stop, reached, legs, stops):  # type: ignore[no-untyped-def]
    """``graph._distance``."""
    return legs[stop] + stops[stop] / (1.0 + 2 * reached) if legs[stop] >= 0 else np.float64(reached)


@helper
def _travel(data, spans, count, network, start, goal, reached, atlas, room, key, spare):  # type: ignore[no-untyped-def]
    """``graph._score_route`` of the legs in ``spans``: (failure code or OVERFLOW, detail)."""
    text, table, fold_text, fold_at = atlas.text, atlas.table, atlas.fold_text, atlas.fold_at
    group_at, groups = atlas.group_at, atlas.groups
    group_of = atlas.group_of[atlas.about[network, STOPS_AT] :]
    before, nearest = np.inf, np.inf
    least_legs = least_stops = FAR
    now = number = ZERO
    named = _group(data, spans[1, 0], spans[1, 1], network, STOP_KEY, text, table, fold_text, fold_at, key, spare)
    for k in range(group_at[start], group_at[start + 1]):
        stop = groups[k]
        away = _away(stop, reached, room.legs, room.stops)
        before = away if away < before else before
        legs, stops = room.legs[stop], room.stops[stop]
        if legs >= 0 and (legs < least_legs or (legs == least_legs and stops < least_stops)):
            least_legs, least_stops = legs, stops
        if group_of[stop] != named:
            continue
        if number == STATES:
            return OVERFLOW, 0.0
        room.stop[0, number] = stop
        room.far[0, number] = 0
        room.seen[0, number] = 0
        room.seen[0, number, stop >> 6] |= np.uint64(1) << np.uint64(stop & 63)
        number += 1
    failure = NONE if number else _ENDPOINT
    for leg in range(count):
        if failure != NONE:
            break
        at = 3 * leg
        line = _group(data, spans[at, 0], spans[at, 1], network, LINE_KEY, text, table, fold_text, fold_at, key, spare)
        at += 1
        named = _group(data, spans[at, 0], spans[at, 1], network, STOP_KEY, text, table, fold_text, fold_at, key, spare)
        at += 1
        ends = _group(data, spans[at, 0], spans[at, 1], network, STOP_KEY, text, table, fold_text, fold_at, key, spare)
        then = 1 - now
        moved = ZERO
        furthest = _BROKEN
        departs = False
        for state in range(number):
            stop = room.stop[now, state]
            if group_of[stop] != named:
                continue
            if not departs:
                furthest = _UNKNOWN_LINE if line < 0 else NOT_ON_LINE
                departs = True
            if line < 0 or ends < 0:
                continue
            for k in range(group_at[line], group_at[line + 1]):
                for j in range(group_at[ends], group_at[ends + 1]):
                    why, moved = ride(
                        groups[k], stop, groups[j], room.far[now, state], room.seen[now, state], network, atlas,
                        moved, room.stop[then], room.far[then], room.seen[then],
                    )  # fmt: skip
                    if why == OVERFLOW:
                        return OVERFLOW, 0.0
                    furthest = why if why > furthest else furthest
        if moved == 0:
            failure = furthest
            continue
        now, number = then, moved
        for state in range(number):
            away = _away(room.stop[now, state], reached, room.legs, room.stops)
            nearest = away if away < nearest else nearest
    arrived = FAR
    for state in range(number):
        if room.legs[room.stop[now, state]] == 0 and room.far[now, state] < arrived:
            arrived = room.far[now, state]
    if failure == NONE and arrived < FAR:
        excess = (count - least_legs) + (arrived - least_stops) / max(least_stops, 1)
        return (_NOT_OPTIMAL if excess > 0 else NONE), DETAIL / (1.0 + (excess if excess > 0.0 else 0.0))
    progress = 1.0 - nearest / before if before > 0.0 else 0.0
    return (_ENDPOINT if failure == NONE else failure), PARTIAL * DETAIL * (progress if progress > 0.0 else 0.0)


@entry
def score_trips(answers, rows, asked, questions, atlas, room, results):  # type: ignore[no-untyped-def]
    """Score the answers numbered ``rows``, each to the question asked[row].

    Time is linear in the bytes.
    """
    spans, key, spare = room.spans, room.key, room.spare
    data, low = answers.data, ZERO
    searched = np.int64(-1)
    reached = ZERO
    for row in rows:
        end, question = utf8(answers, row), asked[row]
        start = rfind(data, low, end, THOUGHT)
        start = low if start < 0 else start + 8
        count = spans_of(data, start, end, spans)
        if count == 0:
            a, b = strip(data, low, end)
            results.failure[row] = _NO_ANSWER if a == b else _BAD_FORMAT
            continue
        network, goal = questions.network[question], questions.goal[question]
        if goal != searched:
            reached = search(
                goal, network, atlas.group_at, atlas.groups, atlas.about, atlas.services, atlas.order,
                atlas.positions, room.legs, room.stops,
            )  # fmt: skip
            searched = goal
        failure, detail = _travel(
            data, spans, count, network, questions.start[question], goal, reached, atlas, room, key, spare
        )
        results.correct[row] = failure in (NONE, _NOT_OPTIMAL)
        results.detail[row] = detail
        results.format_valid[row] = True
        results.failure[row] = failure
