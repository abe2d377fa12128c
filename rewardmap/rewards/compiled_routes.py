"""The published reward of routes over UTF-8 bytes, compiled by Numba: text in, numbers out, no interpreter in the loop.

Equal to ``score.score_reference`` (and ``score.score_paper``) on every input. The few answers that need more
of Unicode than a table can give come back as ``HAND_BACK`` and are scored there.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rewardmap.rewards.compiled_text import (
    ABSENT,
    ALIAS_1,
    ALIAS_4,
    ARRIVAL,
    DEPARTURE,
    OFFSETS,
    ROUTE,
    TEXT,
    UNSURE,
    ZERO,
    clean,
    find,
    strip,
)
from rewardmap.rewards.hashing import MISS, lookup
from rewardmap.rewards.jit import entry, helper, merged
from rewardmap.rewards.score import FAILURE_CODE
from rewardmap.rewards.scorer import HAND_BACK
from rewardmap.rewards.texts import utf8

LINE, CLEAN_NAME, RAW_NAME = range(3)
"""Sorts of interned names; a name's space is ``3 * network + sort``."""
LINE_1, LINE_4, MISSING_LINE, MISSING_STOP, STOPS, MEMBERS_AT = range(6)
"""Columns of ``Bank.about``: the lines that the two aliases mean, the line and stop that an unreadable leg
names (-1: none), the number of stops, and where the network's part of ``Bank.members`` begins."""

_NONE, _NO_ANSWER, _BAD_FORMAT = (np.int64(FAILURE_CODE[name]) for name in ("none", "no_answer", "bad_format"))
_ENDPOINT, _UNKNOWN_LINE = np.int64(FAILURE_CODE["endpoint"]), np.int64(FAILURE_CODE["unknown_line"])
_NOT_ON_LINE, _BROKEN = np.int64(FAILURE_CODE["stop_not_on_line"]), np.int64(FAILURE_CODE["broken_transfer"])


class Bank(NamedTuple):
    """The interned names of every network."""

    text: NDArray[np.uint8]
    """All names' bytes, end to end."""
    table: NDArray[np.int32]
    """[power of two, 4] see ``hashing.make_table``. The value numbers the line, or the cleaned stop, within its
    network; -1: no stop of the network."""
    about: NDArray[np.int64]
    """[networks, 6] see ``LINE_1``."""
    members: NDArray[np.bool_]
    """Per network a table [lines, stops]: is the stop on the line."""
    lower: NDArray[np.int32]
    """[code points] what to add for lower case, or ``NOT_SIMPLE``."""


class Room(NamedTuple):
    """Scratch for answers of up to a certain length."""

    legs: NDArray[np.int64]
    """[legs, 7] spans of line, departure and arrival, then in their place the numbers of what they name; and
    whether the labels are ``EXACT``."""
    buf: NDArray[np.uint8]
    spare: NDArray[np.uint8]


EXACT = 6


def room(longest: int) -> Room:
    """For answers of up to so many bytes, a leg being 39 at least: "Univ" grows fourfold when it is cleaned, and a
    lower-cased letter by half at most."""
    size = 5 * longest + 64
    return Room(np.empty((longest // 39 + 2, 7), np.int64), np.empty(size, np.uint8), np.empty(size, np.uint8))


class Routes(NamedTuple):
    """Planning problems as columns. ``start`` and ``goal`` are stops by number."""

    network: NDArray[np.int64]
    start: NDArray[np.int64]
    goal: NDArray[np.int64]
    required: NDArray[np.int64]


@merged
def _stop(bank, network, data, start, end, buf, spare):  # type: ignore[no-untyped-def]
    """(number of the stop that data[start:end] names, or -1, or UNSURE; whether any text is left of the name).

    Only names that are not spelled as in the network are cleaned, twice.
    """
    known = lookup(bank.text, bank.table, 3 * network + RAW_NAME, data, start, end)
    if known != MISS:
        return known, True
    n = end - start
    for i in range(n):
        buf[i] = data[start + i]
    for _ in range(2):
        n = clean(buf, n, spare, bank.lower) if n >= 0 else n
    if n < 0:
        return UNSURE, True
    known = lookup(bank.text, bank.table, 3 * network + CLEAN_NAME, buf, ZERO, n)
    return (ABSENT if known == MISS else known), n > 0


@merged
def _line(bank, network, data, start, end):  # type: ignore[no-untyped-def]
    """Number of the line that data[start:end] names, aliases included; -1 if none."""
    known = lookup(bank.text, bank.table, 3 * network + LINE, data, start, end)
    if known != MISS:
        return known
    if find(data, start, end, ALIAS_1) >= 0:
        return bank.about[network, LINE_1]
    if find(data, start, end, ALIAS_4) >= 0:
        return bank.about[network, LINE_4]
    return ABSENT


@helper
def _label(data, low, colon, label):  # type: ignore[no-untyped-def]
    """How the label stands before the colon: 0 not at all, 1 in another case, 2 exactly."""
    at = OFFSETS[label]
    size = OFFSETS[label + 1] - at
    start = colon - size
    if start < low:
        return 0
    found = 2
    for k in range(size):
        have, want = data[start + k], TEXT[at + k]
        if have != want:
            if want == 0x20 or have | 0x20 != want | 0x20:
                return 0
            found = 1
    return found


@merged
def _read(data, start, end, legs):  # type: ignore[no-untyped-def]
    """Where the legs of data[start:end] name what, into ``legs``: the spans of line, departure and arrival (a
    span that ends at -1 cannot be read), and whether all labels are exact.

    Returns (number of legs, torn or incomplete ones among them).
    """
    count = ZERO
    flawed = False
    piece = start
    lowered = exact = 0
    line_at = departure_at = arrival_at = ABSENT
    line_end = departure_end = ABSENT
    i = start
    while True:
        while i < end and data[i] > 0x3A:  # letters: neither a colon, a dash nor a newline
            i += 1
        dash = i + 1 < end and data[i] == 0x2D and data[i + 1] == 0x2D
        if i >= end or dash:
            if lowered == 7:
                legs[count, 0], legs[count, 1] = line_at, line_end
                legs[count, 2], legs[count, 3] = departure_at, departure_end
                legs[count, 4], legs[count, 5] = arrival_at if arrival_at >= 0 else piece, i
                legs[count, EXACT] = exact == 7
                count += 1
                if exact != 7 or line_end < 0 or departure_end < 0:
                    flawed = True
            elif lowered:
                flawed = True
            if i >= end:
                break
            i += 2
            piece = i
            lowered = exact = 0
            line_at = departure_at = arrival_at = ABSENT
            line_end = departure_end = ABSENT
            continue
        if data[i] == 0x0A:
            if line_at >= 0 and line_end < 0:
                line_end = i
            if departure_at >= 0 and departure_end < 0:
                departure_end = i
        elif data[i] == 0x3A and i > piece:
            last = data[i - 1] | 0x20
            label = ROUTE if last == 0x65 else DEPARTURE
            found = _label(data, piece, i, label) if last == 0x65 or last == 0x70 else 0
            if last == 0x70 and not found:
                label = ARRIVAL
                found = _label(data, piece, i, label)
            if found:
                bit = 1 if label == ROUTE else 2 if label == DEPARTURE else 4
                lowered |= bit
                if found == 2:
                    exact |= bit
                    after = i + 1
                    spaced = after < end and data[after] == 0x20
                    if label == ARRIVAL:
                        arrival_at = after
                    elif label == ROUTE and line_at < 0 and spaced:
                        line_at = after + 1
                    elif label == DEPARTURE and departure_at < 0 and spaced:
                        departure_at = after + 1
        i += 1
    return count, flawed


@merged
def _judge(legs, count, start, goal, members, stops):  # type: ignore[no-untyped-def]
    """Failure code of the exactly labelled legs: ``score.check_route``. ``members`` is [lines * stops]."""
    last = -1
    first = -1
    for i in range(count):
        if legs[i, EXACT]:
            first = i if first < 0 else first
            last = i
    if first < 0:
        return _BAD_FORMAT
    if legs[first, 1] != start or legs[last, 2] != goal:
        return _ENDPOINT
    i = first
    while i <= last:
        line, departure, arrival = legs[i, 0], legs[i, 1], legs[i, 2]
        if line < 0:
            return _UNKNOWN_LINE
        if departure < 0 or arrival < 0:
            return _NOT_ON_LINE
        if not (members[line * stops + departure] and members[line * stops + arrival]):
            return _NOT_ON_LINE
        i += 1
        while i <= last and not legs[i, EXACT]:
            i += 1
        if i <= last and arrival != legs[i, 1]:
            return _BROKEN
    return _NONE


@merged
def _detail(legs, count, start, goal, required, members, stops, paper):  # type: ignore[no-untyped-def]
    """``score.route_detail`` or, with ``paper``, ``score.paper_detail`` (whose legs are all exact)."""
    if count == 0:
        return 0.0
    departs, arrives = legs[0, 1] == start, legs[count - 1, 2] == goal
    if not paper and not (departs and arrives):
        return 0.0
    score = 2.0 if departs or arrives else 0.0
    for i in range(count):
        excess = i > required if paper else i + 1 > required
        if excess:
            score -= 5.0
        line = legs[i, 0]
        if line < 0:
            continue
        row = line * stops
        if paper:
            score += 4.0 if i == 0 else 0.0
        elif required > 0:
            score += 3.0
        elif members[row + start] and members[row + goal]:
            score += 4.0
        departure, arrival = legs[i, 1], legs[i, 2]
        joined = i + 1 < count and departure >= 0 and arrival >= 0 and arrival == legs[i + 1, 1]
        if joined and (paper or not excess) and members[row + departure] and members[row + arrival]:
            score += 1.0
    return min(score, 10.0)


@merged
def _exact_only(legs, count):  # type: ignore[no-untyped-def]
    kept = 0
    for i in range(count):
        if legs[i, EXACT]:
            for k in range(3):
                legs[kept, k] = legs[i, k]
            kept += 1
    return kept


@entry
def score_routes(answers, rows, asked, questions, bank, paper, room, results):  # type: ignore[no-untyped-def]
    """Score the answers numbered ``rows``, each to the question asked[row].

    Time is linear in the bytes. An answer with more Unicode than ``Bank.lower`` knows gets ``HAND_BACK``.
    """
    legs, buf, spare = room.legs, room.buf, room.spare
    data, start = answers.data, ZERO
    for row in rows:
        end, question = utf8(answers, row), asked[row]
        network = questions.network[question]
        count, flawed = _read(data, start, end, legs)
        unsure = False
        for name in range(3 * count):
            leg, which = name // 3, name % 3
            low, high = legs[leg, 2 * which], legs[leg, 2 * which + 1]
            if which != 1:
                low, high = strip(data, low, high)
            if which == 0:
                number = bank.about[network, MISSING_LINE]
                if high >= 0:
                    number = _line(bank, network, data, low, high)
            else:
                number = bank.about[network, MISSING_STOP]
                if high >= 0:
                    number, named = _stop(bank, network, data, low, high, buf, spare)
                    flawed = flawed or not (which == 1 or named)
                    unsure = unsure or number == UNSURE
            legs[leg, which] = number
        if unsure:
            results.failure[row] = HAND_BACK
            continue
        stops = bank.about[network, STOPS]
        members = bank.members[bank.about[network, MEMBERS_AT] :]
        first, last = questions.start[question], questions.goal[question]
        failure = _judge(legs, count, first, last, members, stops)
        if failure == _BAD_FORMAT:
            low, high = strip(data, start, end)
            failure = _NO_ANSWER if low == high else _BAD_FORMAT
        results.correct[row] = failure == _NONE
        results.failure[row] = failure
        results.format_valid[row] = count > 0 and not flawed
        if paper:
            count = _exact_only(legs, count)
        required = questions.required[question]
        results.detail[row] = _detail(legs, count, first, last, required, members, stops, paper)
