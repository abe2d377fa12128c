"""Text primitives of the compiled ``graph`` reward, over UTF-8 bytes: names to keys, labels, short answers.

Each function is the compiled twin of one in ``graph`` or ``topology``, equal to it on every text.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rewardmap.rewards.compiled_text import ZERO, strip
from rewardmap.rewards.jit import helper, inlined
from rewardmap.rewards.topology import LONGEST_NAME, NAME_ENDINGS, NAME_WORDS, fold

LAST_LETTER = 0x33480
"""No letter or digit from this code point on."""
_WORDS = ("route", "name", "departure", "stop", "arrival", "stops", "lines", "textbf", "mathrm", "mbox", "text")
_ROUTE, _NAME, _DEPARTURE, _STOP, _ARRIVAL, STOPS, LINES, *_COMMANDS = np.arange(len(_WORDS))
COMMANDS = np.array(_COMMANDS)
"""What may stand around a short answer, longer ones first."""


def _joined(words: tuple[str, ...]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    data = [word.encode() for word in words]
    return np.frombuffer(b"".join(data), dtype=np.uint8), np.cumsum([0, *map(len, data)])


WORD, WORD_AT = _joined(_WORDS)
_ENDING, _ENDING_AT = _joined(NAME_ENDINGS)
_LINE_WORD, _LINE_WORD_AT = _joined(NAME_WORDS)


class Folds(NamedTuple):
    """What each code point folds to: ``text[at[point]:at[point + 1]]``."""

    text: NDArray[np.uint8]
    at: NDArray[np.int32]


@cache
def folds() -> Folds:
    """The table of ``topology.fold``, which works on each character alone."""
    parts = [fold(chr(point)).encode() for point in range(LAST_LETTER)]
    sizes = np.fromiter(map(len, parts), dtype=np.int32, count=LAST_LETTER)
    at = np.zeros(LAST_LETTER + 1, dtype=np.int32)
    np.cumsum(sizes, out=at[1:])
    return Folds(np.frombuffer(b"".join(parts), dtype=np.uint8), at)


@cache
def key_room() -> int:
    """Bytes that the longest key can take."""
    return LONGEST_NAME * int(np.diff(folds().at).max())


@helper
def point_at(data, i):  # type: ignore[no-untyped-def]
    """(code point at i, its length in bytes)."""
    c = np.int64(data[i])
    if c < 0x80:
        return c, 1
    size = 2 if c < 0xE0 else 3 if c < 0xF0 else 4
    point = c & (0x7F >> size)
    for k in range(1, size):
        point = point << 6 | (np.int64(data[i + k]) & 0x3F)
    return point, size


@helper
def _ends(key, n, text, low, size):  # type: ignore[no-untyped-def]
    """Whether key[:n] ends with text[low:low + size] and is longer."""
    if n <= size:
        return False
    k = 0
    while k < size and key[n - size + k] == text[low + k]:
        k += 1
    return k == size


@helper
def _begins(key, at, n, text, low, size):  # type: ignore[no-untyped-def]
    if n - at <= size:
        return False
    k = 0
    while k < size and key[at + k] == text[low + k]:
        k += 1
    return k == size


@helper
def key_of(data, start, end, is_line, fold_text, fold_at, key):  # type: ignore[no-untyped-def]
    """``topology.line_key`` or ``station_key`` of data[start:end] as the range of ``key``; (0, -1) if too
    long."""
    n = letters = ZERO
    i = start
    while i < end:
        point, size = point_at(data, i)
        i += size
        letters += 1
        if letters > LONGEST_NAME:
            return 0, -1
        if point < LAST_LETTER:
            for k in range(fold_at[point], fold_at[point + 1]):
                key[n] = fold_text[k]
                n += 1
    low = ZERO
    again = True
    while again:
        again = False
        if is_line:
            for word in range(len(_LINE_WORD_AT) - 1):
                at, size = _LINE_WORD_AT[word], _LINE_WORD_AT[word + 1] - _LINE_WORD_AT[word]
                if _begins(key, low, n, _LINE_WORD, at, size):
                    low += size
                    again = True
                    break
                if n - low > size and _ends(key, n, _LINE_WORD, at, size):
                    n -= size
                    again = True
                    break
        else:
            for word in range(len(_ENDING_AT) - 1):
                at, size = _ENDING_AT[word], _ENDING_AT[word + 1] - _ENDING_AT[word]
                if _ends(key, n, _ENDING, at, size):
                    n -= size
                    again = True
                    break
    return low, n


@helper
def after_word(data, i, end, word):  # type: ignore[no-untyped-def]
    """Where the word, in any case, ends that begins at i; -1 if another does."""
    low = WORD_AT[word]
    size = WORD_AT[word + 1] - low
    if i + size > end:
        return -1
    for k in range(size):
        if data[i + k] | 0x20 != WORD[low + k]:
            return -1
    return i + size


@helper
def after_colon(data, i, end):  # type: ignore[no-untyped-def]
    """Where the text behind a label's colon begins, bold marks and blanks skipped; -1 without a colon."""
    i = _after_marks(data, i, end)
    if i < end and data[i] == 0x3A:
        i += 1
    elif i + 2 < end and data[i] == 0xEF and data[i + 1] == 0xBC and data[i + 2] == 0x9A:
        i += 3
    else:
        return -1
    return _after_marks(data, i, end)


@helper
def _after_marks(data, i, end):  # type: ignore[no-untyped-def]
    while i < end and (data[i] == 0x2A or data[i] == 0x5F or data[i] == 0x20 or data[i] == 0x09):
        i += 1
    return i


@helper
def label_at(data, i, end):  # type: ignore[no-untyped-def]
    """(0, 1, 2 for a label of line, departure, arrival that begins at i, else -1; where its value begins)."""
    c = data[i] | 0x20
    if c == 0x72:
        which, first, second = 0, _ROUTE, _NAME
    elif c == 0x64:
        which, first, second = 1, _DEPARTURE, _STOP
    elif c == 0x61:
        which, first, second = 2, _ARRIVAL, _STOP
    else:
        return -1, i
    at = after_word(data, i, end, first)
    if at < 0:
        return -1, i
    while at < end and (data[at] == 0x20 or data[at] == 0x09):
        at += 1
    at = after_word(data, at, end, second)
    if at >= 0:
        at = after_colon(data, at, end)
    return (which, at) if at >= 0 else (-1, i)


@helper
def spans_of(data, start, end, spans):  # type: ignore[no-untyped-def]
    """``graph.read_legs``: the values' ranges into ``spans`` [.., 2], three per leg. Returns the legs; 0 if
    torn."""
    count = ZERO
    i = start
    while i < end:
        which, begin = label_at(data, i, end)
        if which < 0:
            i += 1
            continue
        if which != count % 3:
            return ZERO
        if count:
            spans[count - 1, 1] = i
        spans[count, 0] = begin
        count += 1
        i = begin
    if count == 0 or count % 3:
        return ZERO
    spans[count - 1, 1] = end
    for k in range(count):
        low, high = spans[k, 0], spans[k, 1]
        i = low
        while i < high and data[i] != 0x0A and data[i] != 0x3C:
            if data[i] == 0x2D and i + 1 < high and data[i + 1] == 0x2D:
                break
            i += 1
        low, high = strip(data, low, i)
        while low < high and _trimmed(data[low]):
            low += 1
        while low < high and _trimmed(data[high - 1]):
            high -= 1
        if low == high:
            return ZERO
        spans[k, 0], spans[k, 1] = low, high
    return count // 3


@inlined
def _trimmed(c):  # type: ignore[no-untyped-def]
    return c == 0x2C or c == 0x3B or c == 0x2A or c == 0x5F or c == 0x20 or c == 0x09
