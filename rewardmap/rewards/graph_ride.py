"""Networks as the compiled ``graph`` reward sees them: how far every stop is from a goal, and riding a leg.

Compiled twin of ``topology`` and of the riding in ``graph``, equal to both.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rewardmap.rewards.graph_text import key_room
from rewardmap.rewards.jit import helper, inlined
from rewardmap.rewards.score import FAILURE_CODE
from rewardmap.rewards.scorer import HAND_BACK
from rewardmap.rewards.topology import LONGEST_NAME

STATES = 64
"""Ways of reading a route that are followed at once; with more it is left to the plain code."""
FAR = np.int64(1 << 30)
FIRST, LENGTH, CLOSED, ORDERED, ONE_WAY, BRANCHING = range(6)
"""Columns of ``Atlas.services``: where its stops begin in ``Atlas.order``, how many they are, and four flags."""
STOPS, SERVICES, SERVICES_END, POSITIONS, STOPS_AT = range(5)
"""Columns of ``Atlas.about``."""
NONE, NOT_ON_LINE, WRONG_BRANCH, REPEATED = (
    np.int64(FAILURE_CODE[name]) for name in ("none", "stop_not_on_line", "wrong_branch", "repeated_stop")
)
OVERFLOW = np.int64(HAND_BACK)
_ZERO, _ONE, _NO = (np.int64(n) for n in (0, 1, -1))
_ONE_BIT = np.uint64(1)


class Atlas(NamedTuple):
    """The interned networks."""

    text: NDArray[np.uint8]
    """All names' bytes, end to end."""
    table: NDArray[np.int32]
    """[power of two, 4] see ``hashing.make_table``; the value numbers a group."""
    group_at: NDArray[np.int64]
    """[groups + 1] where each group of stops, or of lines, that share a key begins in ``groups``."""
    groups: NDArray[np.int64]
    """Stops count within their network, lines over all."""
    group_of: NDArray[np.int64]
    """The group of each stop; a network's begin at its ``STOPS_AT``."""
    about: NDArray[np.int64]
    """[networks, 5] number of stops, first service, end of services, where its ``positions`` and its part of
    ``group_of`` begin."""
    line_at: NDArray[np.int64]
    """[lines + 1] where each line's services begin."""
    services: NDArray[np.int64]
    """[services, 6] see ``FIRST``."""
    order: NDArray[np.int64]
    """Stops of the services, in travel order."""
    positions: NDArray[np.int32]
    """Per network a table [services, stops]: first place of the stop in the service; -1 if it is not there."""
    fold_text: NDArray[np.uint8]
    fold_at: NDArray[np.int32]


class Room(NamedTuple):
    """Scratch of one thread. Of the places where a traveller may be there are two sets: before and after a
    leg."""

    legs: NDArray[np.int64]
    """[stops] legs to the goal; -1: unreachable."""
    stops: NDArray[np.int64]
    """[stops] stops to the goal, over the fewest legs."""
    stop: NDArray[np.int64]
    """[2, STATES] where the traveller is."""
    far: NDArray[np.int64]
    """[2, STATES] stops ridden so far."""
    seen: NDArray[np.uint64]
    """[2, STATES, words] one bit per stop visited."""
    spans: NDArray[np.int64]
    """[values, 2] where the labels' values stand in the answer."""
    key: NDArray[np.uint8]
    spare: NDArray[np.uint8]


def room(longest: int, stops: int) -> Room:
    """For answers of up to so many bytes, a label being 10 at least, on networks of up to so many stops."""
    return Room(
        np.empty(stops, np.int64),
        np.empty(stops, np.int64),
        np.empty((2, STATES), np.int64),
        np.empty((2, STATES), np.int64),
        np.empty((2, STATES, (stops + 63) // 64), np.uint64),
        np.empty((longest // 10 + 4, 2), np.int64),
        np.empty(key_room(), np.uint8),
        np.empty(4 * LONGEST_NAME, np.uint8),
    )


@helper
def search(group, network, group_at, groups, about, services, order, positions, legs, stops):  # type: ignore[no-untyped-def]
    """``Topology.costs`` to a group of stops: fills ``legs`` and ``stops``. Returns how many stops are
    reached.

    Breadth first by legs; within one, sweeps along each service find the fewest stops.
    """
    size, base = about[network, STOPS], about[network, POSITIONS]
    low, high = about[network, SERVICES], about[network, SERVICES_END]
    for stop in range(size):
        legs[stop] = -1
        stops[stop] = 0
    reached = _ZERO
    for k in range(group_at[group], group_at[group + 1]):
        legs[groups[k]] = 0
        reached += 1
    level = _ZERO
    grown = True
    while grown:
        grown = False
        level += 1
        for service in range(low, high):
            row = base + (service - low) * size
            at, length = services[service, FIRST], services[service, LENGTH]
            ordered = services[service, ORDERED]
            ring = length - services[service, CLOSED]
            # Twice around, where the stops before the first goal are reached from the last.
            steps = ring if ordered == 1 and services[service, CLOSED] == 0 else 2 * ring
            for way in range(2 - services[service, ONE_WAY]):
                carry = FAR
                for step in range(steps):
                    place = step if step < ring else step - ring
                    if way == 0:
                        place = ring - 1 - place
                    stop = order[at + place]
                    carry += ordered
                    if positions[row + stop] != place:
                        continue
                    if legs[stop] == level - 1:
                        carry = stops[stop] if stops[stop] < carry else carry
                    elif carry < FAR and (legs[stop] < 0 or (legs[stop] == level and carry < stops[stop])):
                        reached += 1 if legs[stop] < 0 else 0
                        legs[stop] = level
                        stops[stop] = carry
                        grown = True
    return reached


@inlined
def _length(services, service, a, b, way):  # type: ignore[no-untyped-def]
    """Stops from place a to place b inside (way 0) or around the ring (way 1); -1 if there is no such way."""
    if services[service, ORDERED] == 0:
        return _ZERO if way == 0 else _NO
    if services[service, ONE_WAY] == 1 and (a < b) != (way == 0):
        return _NO
    apart = b - a if a < b else a - b
    if way == 1:
        return services[service, LENGTH] - 1 - apart if services[service, CLOSED] == 1 else _NO
    return apart if apart > 0 else _ONE


@helper
def ride(line, start, end, far, visited, network, atlas, count, out_stop, out_far, out_seen):  # type: ignore[no-untyped-def]
    """``graph._move`` on one line to one stop, from one place: enters where it may end.

    Returns (NONE or the failure's code or OVERFLOW; how many places are entered by now).
    """
    services, positions = atlas.services, atlas.positions
    size, base, low = atlas.about[network, STOPS], atlas.about[network, POSITIONS], atlas.about[network, SERVICES]
    starts = ends = False
    least = _NO
    for service in range(atlas.line_at[line], atlas.line_at[line + 1]):
        row = base + (service - low) * size
        a, b = np.int64(positions[row + start]), np.int64(positions[row + end])
        starts, ends = starts or a >= 0, ends or b >= 0
        if a >= 0 and b >= 0:
            for way in range(2):
                length = _length(services, service, a, b, way)
                if length >= 0 and (least < 0 or length < least):
                    least = length
    if not (starts and ends):
        return NOT_ON_LINE, count
    if least < 0:
        return WRONG_BRANCH, count
    if visited[end >> 6] >> np.uint64(end & 63) & _ONE_BIT:
        return REPEATED, count
    failure = REPEATED
    for service in range(atlas.line_at[line], atlas.line_at[line + 1]):
        row = base + (service - low) * size
        a, b = np.int64(positions[row + start]), np.int64(positions[row + end])
        for way in range(2 if a >= 0 and b >= 0 else 0):
            if _length(services, service, a, b, way) != least:
                continue
            if count == STATES:
                return OVERFLOW, count
            seen = out_seen[count]
            if _pass(atlas.order, services, service, a, b, way, least, visited, seen):
                failure = NONE
                seen[end >> 6] |= _ONE_BIT << np.uint64(end & 63)
                if not _entered(end, far + least, seen, count, out_stop, out_far, out_seen):
                    out_stop[count] = end
                    out_far[count] = far + least
                    count += 1
    return failure, count


@inlined
def _pass(order, services, service, a, b, way, stops, visited, seen):  # type: ignore[no-untyped-def]
    """Whether the stops between are new; if so ``seen`` is ``visited`` with them."""
    for word in range(len(visited)):
        seen[word] = visited[word]
    if services[service, BRANCHING] == 1:
        return True
    low, high = (a, b) if a < b else (b, a)
    at, ring = services[service, FIRST], services[service, LENGTH] - 1
    for k in range(1, stops):
        place = low + k if way == 0 else high + k
        stop = order[at + (place - ring if way == 1 and place >= ring else place)]
        bit = _ONE_BIT << np.uint64(stop & 63)
        if visited[stop >> 6] & bit:
            return False
        seen[stop >> 6] |= bit
    return True


@inlined
def _entered(end, far, seen, count, out_stop, out_far, out_seen):  # type: ignore[no-untyped-def]
    """Whether this place is there already."""
    for other in range(count):
        if out_stop[other] == end and out_far[other] == far:
            word = 0
            while word < len(seen) and out_seen[other, word] == seen[word]:
                word += 1
            if word == len(seen):
                return True
    return False
