"""Text primitives of the compiled scorers, over UTF-8 bytes: search, replace, strip, lower, clean.

``clean`` is the compiled twin of the one in ``parse``. A text is a range [start, end) of a byte array; a word
is an index into a table of constants. Scratch arrays ``buf`` and ``spare`` must hold five times the text.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from rewardmap.rewards.jit import helper, inlined

NOT_SIMPLE = 1 << 30
"""In a table of lower cases: not one code point, or dependent on the context."""
_CASED = 0x20000
"""Unicode has no letters with case from here on."""
UNSURE = np.int64(-3)
"""The plain code has to look at it."""

_WORDS = (
    *(
        "Metro",
        "metro",
        "Univ.",
        "Univ",
        "Tech.",
        "Tech",
        "road",
        "Road",
        "Station",
        "station",
        "Asian Games Village",
    ),
    *("University", "Technology", "lu", "yayuncun", "", "站", "（", "）", "八通", "大兴", "\n", ". "),
    *("Route Name", "Departure Stop", "Arrival Stop", "\\boxed{", "oxed{", "{}", "{", "}", "=", "\\approx"),
    *(
        "the final answer is",
        "The final answer is",
        "the answer is",
        "The answer is",
        "the correct answer is",
    ),
    *("The correct answer is", "the answer should be", "The answer should be", "yes", "no"),
    *(
        " ",
        "\\,",
        "\\\\",
        "\\",
        "\\text",
        "\\mbox",
        "\\left",
        "\\right",
        "^{\\circ}",
        "^\\circ",
        "{m}^3",
        "m^3",
    ),
    *("{units}", "units", "{km}", "km", "\\!", "\\$", "$", "\\%", "</think>"),
)
TEXT = np.frombuffer("".join(_WORDS).encode(), dtype=np.uint8)
OFFSETS = np.cumsum([0, *(len(word.encode()) for word in _WORDS)])


def word(text: str) -> np.int64:
    # Not an int: Numba would compile every helper anew for each literal it is called with.
    return np.int64(_WORDS.index(text))


def steps(*pairs: tuple[str, str]) -> NDArray[np.int64]:
    return np.array([(word(old), word(new)) for old, new in pairs])


_CLEAN_STEPS = steps(
    *(("Univ.", "University"), ("Univ", "University"), ("Tech.", "Technology"), ("Tech", "Technology")),
    *(("road", "lu"), ("Road", "lu"), ("Station", ""), ("station", ""), ("Asian Games Village", "yayuncun")),
)
_METRO, _LOWER_METRO, _STATION_SIGN = word("Metro"), word("metro"), word("站")
_OPEN, _CLOSE, ALIAS_1, ALIAS_4 = word("（"), word("）"), word("八通"), word("大兴")
ROUTE, DEPARTURE, ARRIVAL = word("Route Name"), word("Departure Stop"), word("Arrival Stop")
THOUGHT, BOXED, NOTHING = word("</think>"), word("\\boxed{"), word("")
ABSENT, ZERO, ONE = (np.int64(n) for n in (-1, 0, 1))


@helper
def matches(buf, i, end, word):  # type: ignore[no-untyped-def]
    """Whether the word stands at i of buf[:end]."""
    low = OFFSETS[word]
    size = OFFSETS[word + 1] - low
    if i + size > end:
        return False
    k = 0
    while k < size and buf[i + k] == TEXT[low + k]:
        k += 1
    return k == size


@helper
def find(buf, start, end, word):  # type: ignore[no-untyped-def]
    first = TEXT[OFFSETS[word]]
    for i in range(start, end):
        if buf[i] == first and matches(buf, i, end, word):
            return i
    return -1


@helper
def rfind(buf, start, end, word):  # type: ignore[no-untyped-def]
    first = TEXT[OFFSETS[word]]
    for i in range(end - 1, start - 1, -1):
        if buf[i] == first and matches(buf, i, end, word):
            return i
    return -1


@helper
def replace(buf, start, end, word, by, spare):  # type: ignore[no-untyped-def]
    """str.replace on buf[start:end] in place; returns the new end."""
    i = find(buf, start, end, word)
    if i < 0:
        return end
    out = i
    size = end - i
    for k in range(size):
        spare[k] = buf[i + k]
    k = ZERO
    while k < size:
        if matches(spare, k, size, word):
            for at in range(OFFSETS[by], OFFSETS[by + 1]):
                buf[out] = TEXT[at]
                out += 1
            k += OFFSETS[word + 1] - OFFSETS[word]
        else:
            buf[out] = spare[k]
            out += 1
            k += 1
    return out


@helper
def space(buf, i, end):  # type: ignore[no-untyped-def]
    """Length in bytes of the white space (str.isspace) that begins at i; 0 if none does."""
    c = buf[i]
    if c < 0x80:
        return 1 if c == 0x20 or 0x09 <= c <= 0x0D or 0x1C <= c <= 0x1F else 0
    if c == 0xC2:
        return 2 if buf[i + 1] == 0x85 or buf[i + 1] == 0xA0 else 0
    if c == 0xE2:
        d, e = buf[i + 1], buf[i + 2]
        wide = d == 0x80 and (e <= 0x8A or e == 0xA8 or e == 0xA9 or e == 0xAF)
        return 3 if wide or (d == 0x81 and e == 0x9F) else 0
    if c == 0xE1:
        return 3 if buf[i + 1] == 0x9A and buf[i + 2] == 0x80 else 0
    if c == 0xE3:
        return 3 if buf[i + 1] == 0x80 and buf[i + 2] == 0x80 else 0
    return 0


@inlined
def strip(buf, start, end):  # type: ignore[no-untyped-def]
    """str.strip: the range without white space at both ends."""
    while start < end and not 0x20 < buf[start] < 0x80:
        size = space(buf, start, end)
        if size == 0:
            break
        start += size
    while start < end and not 0x20 < buf[end - 1] < 0x80:
        last = end - 1
        while last > start and buf[last] & 0xC0 == 0x80:
            last -= 1
        if space(buf, last, end) == 0:
            break
        end = last
    return start, end


@helper
def lowered(buf, start, end, out, at, lower, squeeze):  # type: ignore[no-untyped-def]
    """Lower case of buf[start:end] into out[at:], without white space and hyphens if ``squeeze``.

    Returns the end in ``out``, or UNSURE.
    """
    i = start
    while i < end:
        c = np.int64(buf[i])
        if c < 0x80:
            i += 1
            if squeeze and (c == 0x2D or c == 0x20 or 0x09 <= c <= 0x0D or 0x1C <= c <= 0x1F):
                continue
            out[at] = c + 0x20 if 0x41 <= c <= 0x5A else c
            at += 1
            continue
        if squeeze:
            skip = space(buf, i, end)
            if skip:
                i += skip
                continue
        size = 2 if c < 0xE0 else 3 if c < 0xF0 else 4
        point = c & (0x7F >> size)
        for k in range(1, size):
            point = point << 6 | (np.int64(buf[i + k]) & 0x3F)
        change = lower[point] if point < len(lower) else 0
        if change == NOT_SIMPLE:
            return UNSURE
        if change == 0:
            for k in range(size):
                out[at + k] = buf[i + k]
            at += size
        else:
            point += change
            if point < 0x80:
                out[at] = point
                at += 1
            elif point < 0x800:
                out[at] = 0xC0 | point >> 6
                out[at + 1] = 0x80 | point & 0x3F
                at += 2
            elif point < 0x10000:
                out[at] = 0xE0 | point >> 12
                out[at + 1] = 0x80 | point >> 6 & 0x3F
                out[at + 2] = 0x80 | point & 0x3F
                at += 3
            else:
                out[at] = 0xF0 | point >> 18
                out[at + 1] = 0x80 | point >> 12 & 0x3F
                out[at + 2] = 0x80 | point >> 6 & 0x3F
                out[at + 3] = 0x80 | point & 0x3F
                at += 4
        i += size
    return at


@helper
def clean(buf, n, spare, lower):  # type: ignore[no-untyped-def]
    """One pass of ``parse.clean`` over buf[:n] in place; the new length, or UNSURE."""
    n = replace(buf, ZERO, n, _METRO, NOTHING, spare)
    n = replace(buf, ZERO, n, _LOWER_METRO, NOTHING, spare)
    seen = np.uint64(0)
    out = ZERO
    for i in range(n):
        c = buf[i]
        if c != 0x2C and c != 0x2A and c != 0x0A and c != 0x27:
            seen |= np.uint64(1) << np.uint64(c & 0x3F)
            buf[out] = c
            out += 1
    n = out
    for k in range(len(_CLEAN_STEPS)):
        word = _CLEAN_STEPS[k, 0]
        if seen >> np.uint64(TEXT[OFFSETS[word]] & 0x3F) & np.uint64(1):
            n = replace(buf, ZERO, n, word, _CLEAN_STEPS[k, 1], spare)
    if n >= 3 and matches(buf, n - 3, n, _STATION_SIGN):
        n -= 3
    n = unbracketed(buf, n)
    end = lowered(buf, ZERO, n, spare, ZERO, lower, ONE)
    for i in range(end):
        buf[i] = spare[i]
    return end


@helper
def unbracketed(buf, n):  # type: ignore[no-untyped-def]
    """Without bracketed text, ASCII or full-width; a bracket that is never closed stays."""
    i = ZERO
    out = ZERO
    closed = True
    while i < n:
        size = 0
        if closed:
            size = 1 if buf[i] == 0x28 else 3 if buf[i] == 0xEF and matches(buf, i, n, _OPEN) else 0
        k = i + size
        while size and k < n and buf[k] != 0x29 and not (buf[k] == 0xEF and matches(buf, k, n, _CLOSE)):
            k += 1
        if size and k < n:
            i = k + (1 if buf[k] == 0x29 else 3)
            continue
        closed = closed and size == 0
        buf[out] = buf[i]
        out += 1
        i += 1
    return out


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
