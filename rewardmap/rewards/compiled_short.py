"""The published reward of short answers (yes or no, letters, counts) over UTF-8 bytes, compiled by Numba.

Equal to ``score.score_reference`` on every input, with ``HAND_BACK`` as in ``compiled_routes``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rewardmap.rewards import parse
from rewardmap.rewards.compiled_text import (
    BOXED,
    NOTHING,
    OFFSETS,
    ONE,
    UNSURE,
    ZERO,
    find,
    lowered,
    matches,
    replace,
    rfind,
    steps,
    strip,
    word,
)
from rewardmap.rewards.hashing import MISS
from rewardmap.rewards.jit import entry, merged
from rewardmap.rewards.score import FAILURE_CODE
from rewardmap.rewards.scorer import HAND_BACK
from rewardmap.rewards.texts import utf8

TRUE_FALSE, CHOICE, COUNT = range(3)
"""Kinds of short answers."""

_LATEX_STEPS = steps(*parse.LATEX_REWRITES)
_PHRASES = np.array([word(phrase) for phrase in parse.PHRASES])
_NEWLINE, _FULL_STOP, _OXED, _BRACES = word("\n"), word(". "), word("oxed{"), word("{}")
_LEFT, _RIGHT, _EQUALS, _ABOUT = word("{"), word("}"), word("="), word("\\approx")
_YES, _NO = word("yes"), word("no")
_NONE, _NO_ANSWER, _BAD_FORMAT, _WRONG = (
    np.int64(FAILURE_CODE[name]) for name in ("none", "no_answer", "bad_format", "wrong")
)


class Shorts(NamedTuple):
    """Problems with short answers as columns."""

    kind: NDArray[np.int64]
    gold: NDArray[np.int64]


@merged
def extract(data, start, end, lower, buf, spare):  # type: ignore[no-untyped-def]
    """``parse.extract_answer``: the range of ``buf`` that holds the answer, or (UNSURE, 0)."""
    box = rfind(data, start, end, _OXED)
    if box >= 0:
        if find(data, start, end, _OXED) < box:
            start = box
    else:
        for phrase in _PHRASES:
            at = rfind(data, start, end, phrase)
            if at >= 0:
                start = at + OFFSETS[phrase + 1] - OFFSETS[phrase]
            start, end = strip(data, start, end)
            if at >= 0:
                stop = find(data, start, end, _NEWLINE)
                end = stop if stop >= 0 else end
                stop = find(data, start, end, _FULL_STOP)
                end = stop if stop >= 0 else end
    n = lowered(data, start, end, buf, ONE, lower, ZERO)
    if n < 0:
        return UNSURE, ZERO
    low = ONE
    n = replace(buf, low, n, _BRACES, NOTHING, spare)
    box = find(buf, low, n, _OXED)
    close = rfind(buf, low, n, _RIGHT)
    if box >= 0 and close >= box + 5:
        low, n = box + 5, close
    close = find(buf, low, n, _RIGHT)
    brace = find(buf, low, n, _LEFT)
    if close >= 0 and (brace < 0 or close < brace):
        n = close
    low = max(low, rfind(buf, low, n, _EQUALS) + 1)
    about = rfind(buf, low, n, _ABOUT)
    low = about + 7 if about >= 0 else low
    for k in range(len(_LATEX_STEPS)):
        n = replace(buf, low, n, _LATEX_STEPS[k, 0], _LATEX_STEPS[k, 1], spare)
    if low < n and buf[low] == 0x2E:
        low -= 1
        buf[low] = 0x30
    about = rfind(buf, low, n, _ABOUT)
    if about >= 0 and find(buf, low, n, _ABOUT) == about:
        low = about + 7
    while low < n and buf[n - 1] == 0x2E:
        n -= 1
    while low < n and buf[low] == 0x3A:
        low += 1
    return strip(buf, low, n)


@merged
def short(kind, buf, low, n):  # type: ignore[no-untyped-def]
    """(what buf[low:n] says: a number, MISS if nothing of the asked sort, UNSURE; for the plain code)."""
    size = n - low
    if kind == TRUE_FALSE:
        if size == 3 and matches(buf, low, n, _YES):
            return 1
        return 0 if size == 2 and matches(buf, low, n, _NO) else MISS
    if kind == CHOICE:
        letter = buf[low] - 0x61 if size == 1 else 4
        return letter if 0 <= letter < 4 else MISS
    value = 0
    digits = 0
    negative = False
    for i in range(low, n):
        c = buf[i]
        if c >= 0x80 or c == 0x5F or digits > 17:
            return UNSURE
        if i == low and (c == 0x2D or c == 0x2B):
            negative = c == 0x2D
        elif 0x30 <= c <= 0x39:
            value = value * 10 + (c - 0x30)
            digits += 1
        else:
            return MISS
    if digits == 0:
        return MISS
    return UNSURE if negative else value


@entry
def score_short(answers, rows, asked, questions, lower, buf, spare, results):  # type: ignore[no-untyped-def]
    """Score the answers numbered ``rows``, each to the question asked[row].

    Time is linear in the bytes. ``buf`` and ``spare`` are scratch, twice as long as the longest answer and 64.
    """
    data, start = answers.data, ZERO
    for row in rows:
        end, question = utf8(answers, row), asked[row]
        kind = questions.kind[question]
        low, high = extract(data, start, end, lower, buf, spare)
        said = short(kind, buf, low, high) if low >= 0 else UNSURE
        failure = _NONE
        if said == UNSURE:
            results.failure[row] = HAND_BACK
            continue
        if said == MISS:
            low, high = strip(data, start, end)
            failure = _NO_ANSWER if low == high else _BAD_FORMAT
        else:
            gold = questions.gold[question]
            right = said == (gold == 1) if kind == TRUE_FALSE else said == gold
            failure = _NONE if right else _WRONG
            box = rfind(data, start, end, BOXED)
            results.format_valid[row] = box >= 0 and find(data, box, end, _RIGHT) >= 0
        results.correct[row] = failure == _NONE
        results.failure[row] = failure
