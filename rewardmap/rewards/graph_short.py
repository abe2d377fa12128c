"""The ``graph`` reward of short answers (yes or no, letters, counts) compiled by Numba, over UTF-8 bytes.

Equal to ``graph.score_graph`` on every text.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rewardmap.rewards.compiled_short import CHOICE, COUNT, TRUE_FALSE
from rewardmap.rewards.compiled_text import BOXED, THOUGHT, ZERO, find, rfind, space, strip
from rewardmap.rewards.graph import DETAIL
from rewardmap.rewards.graph_text import (
    COMMANDS,
    LAST_LETTER,
    LINES,
    STOPS,
    WORD,
    WORD_AT,
    after_colon,
    after_word,
    key_of,
    point_at,
)
from rewardmap.rewards.jit import entry, helper, merged
from rewardmap.rewards.score import FAILURE_CODE
from rewardmap.rewards.texts import utf8

NOTHING = np.int64(-(1 << 40))
"""No value of the asked sort; no value is so small."""
_NONE, _NO_ANSWER, _BAD_FORMAT, _WRONG = (
    np.int64(FAILURE_CODE[name]) for name in ("none", "no_answer", "bad_format", "wrong")
)


class Asked(NamedTuple):
    """Problems with short answers as columns."""

    kind: NDArray[np.int64]
    gold: NDArray[np.int64]
    lines_listed: NDArray[np.int64]
    """1 where a list in the answer holds lines, 0 where it holds stops."""
    list_at: NDArray[np.int64]
    """[n + 1] where the keys of each problem's list begin in ``key_at``."""
    key_at: NDArray[np.int64]
    """[keys + 1] where each key begins in ``keys``."""
    keys: NDArray[np.uint8]


@helper
def _value(kind, data, start, end, fold_text, fold_at, buf):  # type: ignore[no-untyped-def]
    """``graph._value`` of data[start:end]: a number, or NOTHING."""
    n = ZERO
    i = start
    while i < end:
        c = data[i]
        if c == 0x5C:
            skip = ZERO
            for command in COMMANDS:
                low, size = WORD_AT[command], WORD_AT[command + 1] - WORD_AT[command]
                k = ZERO
                while k < size and i + 1 + k < end and data[i + 1 + k] == WORD[low + k]:
                    k += 1
                if k == size:
                    skip = size
                    break
            if skip == 0:
                buf[n] = c
                n += 1
            i += skip + 1
            continue
        blank = space(data, i, end)
        if blank:
            i += blank
            continue
        point, size = point_at(data, i)
        i += size
        if size > 1:
            single = point < LAST_LETTER and fold_at[point + 1] - fold_at[point] == 1
            buf[n] = fold_text[fold_at[point]] if single else 0x80
            n += 1
        elif not (c == 0x7B or c == 0x7D or c == 0x28 or c == 0x29 or c == 0x2A or c == 0x24):
            buf[n] = c + 0x20 if 0x41 <= c <= 0x5A else c
            n += 1
    while n > 0 and (buf[n - 1] == 0x2E or buf[n - 1] == 0x2C):
        n -= 1
    if kind == TRUE_FALSE:
        if n == 3 and buf[0] == 0x79 and buf[1] == 0x65 and buf[2] == 0x73:
            return np.int64(1)
        return ZERO if n == 2 and buf[0] == 0x6E and buf[1] == 0x6F else NOTHING
    if kind == CHOICE:
        return np.int64(buf[0]) - 0x61 if n == 1 and 0x61 <= buf[0] <= 0x64 else NOTHING
    first = 1 if n > 0 and (buf[0] == 0x2B or buf[0] == 0x2D) else 0
    if not 1 <= n - first <= 9:
        return NOTHING
    value = ZERO
    for k in range(first, n):
        if not 0x30 <= buf[k] <= 0x39:
            return NOTHING
        value = value * 10 + (np.int64(buf[k]) - 0x30)
    return -value if buf[0] == 0x2D else value


@helper
def _box_end(data, start, end):  # type: ignore[no-untyped-def]
    """Where the text of a box that begins at ``start`` ends, braces nested once; -1 if it is none."""
    i = start
    while i < end:
        if data[i] == 0x7D:
            return i
        if data[i] == 0x7B:
            i += 1
            while i < end and data[i] != 0x7B and data[i] != 0x7D:
                i += 1
            if i == end or data[i] == 0x7B:
                return np.int64(-1)
        i += 1
    return np.int64(-1)


@merged
def _said(kind, data, start, end, fold_text, fold_at, buf):  # type: ignore[no-untyped-def]
    """``graph._said``: (the one answer given, or NOTHING; whether it is boxed)."""
    said = NOTHING
    boxed = False
    i = find(data, start, end, BOXED)
    while i >= 0:
        i += 7
        close = _box_end(data, i, end)
        if close >= 0:
            value = _value(kind, data, i, close, fold_text, fold_at, buf)
            if value == NOTHING or (boxed and value != said):
                return NOTHING, True
            said, boxed = value, True
            i = close + 1
        i = find(data, i, end, BOXED)
    if not boxed:
        said = _value(kind, data, start, end, fold_text, fold_at, buf)
    return said, boxed


@merged
def _last_list(data, start, end):  # type: ignore[no-untyped-def]
    """``graph._LISTED``: what the last list of stops or lines holds; (-1, -1) without one."""
    low = high = np.int64(-1)
    i = start
    while i < end:
        c = data[i] | 0x20
        at = np.int64(-1)
        if c == 0x73 or c == 0x6C:
            before = data[i - 1] if i > start else 0x20
            inside = before == 0x5F or 0x30 <= before <= 0x39 or 0x61 <= before | 0x20 <= 0x7A
            at = after_word(data, i, end, STOPS if c == 0x73 else LINES) if not inside else at
            at = after_colon(data, at, end) if at >= 0 else at
        i += 1
        if at < 0 or at >= end or data[at] != 0x5B:
            continue
        close = at + 1
        while close < end and data[close] != 0x5B and data[close] != 0x5D:
            close += 1
        if close < end and data[close] == 0x5D:
            low, high = at + 1, close
            i = close + 1
    return low, high


@merged
def _f1(data, low, high, is_line, first, last, key_at, keys, fold_text, fold_at, buf, found):  # type: ignore[no-untyped-def]
    """F1 of the list data[low:high] against the keys [first, last); ``found`` [longest list] is scratch."""
    want = last - first
    for k in range(want):
        found[k] = 0
    listed = hits = ZERO
    i = low
    while i <= high:
        stop = i
        while stop < high and data[stop] != 0x2C:
            stop += 1
        a, b = strip(data, i, stop)
        i = stop + 1
        if a == b:
            continue
        listed += 1
        begin, size = key_of(data, a, b, is_line, fold_text, fold_at, buf)
        size -= begin
        for k in range(want if size > 0 else 0):
            at = key_at[first + k]
            if found[k] or key_at[first + k + 1] - at != size:
                continue
            same = ZERO
            while same < size and keys[at + same] == buf[begin + same]:
                same += 1
            if same == size:
                found[k] = 1
                hits += 1
    return 2 * hits / (want + listed) if listed else 0.0


@entry
def score_said(answers, rows, asked, questions, fold_text, fold_at, buf, found, results):  # type: ignore[no-untyped-def]
    """Score the answers numbered ``rows``, each to the question asked[row].

    Time is linear in the bytes. Scratch: ``buf`` for the longest answer and the longest key, ``found`` for the
    longest list.
    """
    data, low = answers.data, ZERO
    for row in rows:
        end, question = utf8(answers, row), asked[row]
        start = rfind(data, low, end, THOUGHT)
        start = low if start < 0 else start + 8
        kind = questions.kind[question]
        said, boxed = _said(kind, data, start, end, fold_text, fold_at, buf)
        closeness = 0.0
        failure = _BAD_FORMAT
        if said != NOTHING:
            error = abs(said - questions.gold[question])
            failure = _WRONG if error else _NONE
            closeness = 1.0
            for _ in range(min(error, 64) if kind == COUNT or error == 0 else 1):
                closeness = closeness * 0.5 if kind == COUNT else 0.0
            results.format_valid[row] = boxed
        else:
            a, b = strip(data, low, end)
            failure = _NO_ANSWER if a == b else _BAD_FORMAT
        first, last = questions.list_at[question], questions.list_at[question + 1]
        if last > first:
            a, b = _last_list(data, start, end)
            if a >= 0:
                is_line = questions.lines_listed[question] == 1
                f1 = _f1(
                    data, a, b, is_line, first, last, questions.key_at, questions.keys, fold_text, fold_at, buf, found
                )
                closeness = f1 if f1 > closeness else closeness
        results.correct[row] = failure == _NONE
        results.detail[row] = DETAIL * closeness
        results.failure[row] = failure
