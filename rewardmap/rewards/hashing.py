"""A table of names for compiled code: open addressing over one array of their bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rewardmap.rewards.jit import entry, inlined

MISS = -2
"""Nothing of the asked sort."""
_PRIME = np.uint64(0x9E3779B97F4A7C15)
_ONE, _TWO, _THREE, _FOUR = (np.uint64(n) for n in (1, 2, 3, 4))
_BITS_8, _BITS_16, _BITS_24, _BITS_29, _BITS_32 = (np.uint64(n) for n in (8, 16, 24, 29, 32))


def make_table(names: Sequence[NDArray[np.int32]], text: NDArray[np.uint8]) -> NDArray[np.int32]:
    """[power of two, 4] the rows of all ``names`` [.., 4] by name, at most two thirds full.

    A row is: the space that the name belongs to (-1 is empty), where it begins and ends in ``text``, its value.
    """
    rows = np.concatenate([np.zeros((0, 4), dtype=np.int32), *names])
    table = np.full((1 << max(4, (len(rows) * 3 // 2).bit_length()), 4), -1, dtype=np.int32)
    _fill(text, rows, table)
    return table


@inlined
def _hash(buf, start, end, space):  # type: ignore[no-untyped-def]
    # Unsigned places, or Numba would ask at each whether it counts from the end.
    i, stop = np.uint64(start), np.uint64(end)
    h = np.uint64(space) * _PRIME
    while i + _FOUR <= stop:
        word = np.uint64(buf[i]) | np.uint64(buf[i + _ONE]) << _BITS_8
        word |= np.uint64(buf[i + _TWO]) << _BITS_16 | np.uint64(buf[i + _THREE]) << _BITS_24
        h = (h ^ word) * _PRIME
        h ^= h >> _BITS_32
        i += _FOUR
    while i < stop:
        h = (h ^ np.uint64(buf[i])) * _PRIME
        i += _ONE
    return np.int64((h ^ (h >> _BITS_29)) >> _ONE)


@entry
def _fill(text, names, table):  # type: ignore[no-untyped-def]
    mask = len(table) - 1
    for name in range(len(names)):
        low, high, space = np.int64(names[name, 1]), np.int64(names[name, 2]), np.int64(names[name, 0])
        at = _hash(text, low, high, space) & mask
        while table[at, 0] >= 0:
            at = (at + 1) & mask
        for k in range(4):
            table[at, k] = names[name, k]


@inlined
def lookup(text, table, space, buf, start, end):  # type: ignore[no-untyped-def]
    """Value of the name buf[start:end] in a space of the table; MISS if it is not there."""
    size = end - start
    mask = len(table) - 1
    at = _hash(buf, start, end, space) & mask
    while table[at, 0] >= 0:
        low = table[at, 1]
        if table[at, 0] == space and table[at, 2] - low == size:
            i, j, stop = np.uint64(low), np.uint64(start), np.uint64(end)
            while j < stop and text[i] == buf[j]:
                i += _ONE
                j += _ONE
            if j == stop:
                return np.int64(table[at, 3])
        at = (at + 1) & mask
    return np.int64(MISS)
