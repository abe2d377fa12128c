"""Python's lists and strings as compiled code reads them: an answer becomes UTF-8 without the interpreter.

``_item``, ``_length`` and ``_points`` are of CPython's stable interface. On lists and strings that nobody changes they
neither count references nor fail, so they need no lock.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numba import types
from numpy.typing import NDArray

from rewardmap.rewards.jit import announce, helper, locked_entry
from rewardmap.types import Problem

_OBJECT, _SIZE = types.intp, types.intp
_item = types.ExternalFunction("PyList_GetItem", _OBJECT(_OBJECT, _SIZE))
_length = types.ExternalFunction("PyUnicode_GetLength", _SIZE(_OBJECT))
_points = types.ExternalFunction("PyUnicode_AsUCS4", types.voidptr(_OBJECT, types.voidptr, _SIZE, types.intc))
_type = types.ExternalFunction("PyObject_Type", _OBJECT(_OBJECT))
_is_subtype = types.ExternalFunction("PyType_IsSubtype", types.intc(_OBJECT, _OBJECT))
_release = types.ExternalFunction("Py_DecRef", types.void(_OBJECT))

_ONE, _TWO, _THREE, _FOUR = (np.uint64(n) for n in (1, 2, 3, 4))


class Answers(NamedTuple):
    """A list of texts for one thread of compiled code. The list must outlive them."""

    texts: int
    """Where the list is."""
    points: NDArray[np.uint32]
    """Room for the characters of one text."""
    data: NDArray[np.uint8]
    """The text that was read last, in UTF-8."""


class Chunk(NamedTuple):
    """Answers and what they are to."""

    problems: list[Problem]
    """The distinct ones, where a run of one object is one."""
    asked: NDArray[np.int64]
    """[n] which of the problems each answer is to; never falls."""
    texts: list[str]
    """[n], kept for ``answers``, and by nobody else: another thread cannot change them."""
    answers: Answers


def read_chunk(problems: Sequence[Problem], texts: Sequence[str], low: int, high: int) -> Chunk:
    """Rows low to high of both. Raises ValueError naming the row of what is no text, or where rows are missing."""
    # Copied by the threads in turn, not at once before: to touch strings that no cache holds takes time.
    rows, own = list(problems[low:high]), list(texts[low:high])
    if not len(rows) == len(own) == high - low:  # compiled code would read beyond them
        raise ValueError(f"rows {low} to {high} are not there any more: the lists were changed while they were scored")
    firsts, asked = np.empty((2, high - low), dtype=np.int64)
    announce("survey")
    longest, distinct = survey(id(rows), id(own), id(str), firsts, asked)
    if longest < 0:
        row = -1 - longest
        raise ValueError(f"response {low + row} is {type(own[row]).__name__}, not text")
    room = np.empty(longest + 1, np.uint32), np.empty(4 * (longest + 1), np.uint8)
    return Chunk([rows[row] for row in firsts[:distinct].tolist()], asked, own, Answers(id(own), *room))


@locked_entry
def survey(problems, texts, kind, firsts, asked):  # type: ignore[no-untyped-def]
    """Finds runs of one problem: where they begin into ``firsts``, which of them each row is in into ``asked``.

    Returns (characters of the longest text, runs); (-1 - its row, 0) where one is no text.
    """
    longest = distinct = before = 0
    for i in range(len(asked)):
        problem, text = _item(problems, i), _item(texts, i)
        if problem != before:
            firsts[distinct] = i
            distinct += 1
            before = problem
        asked[i] = distinct - 1
        found = _type(text)
        is_text = _is_subtype(found, kind)
        _release(found)
        if not is_text:
            return -1 - i, 0
        longest = max(longest, _length(text))
    return longest, distinct


@helper
def utf8(answers, row):  # type: ignore[no-untyped-def]
    """Reads the text numbered ``row`` into ``answers.data``; its bytes. Lone surrogates become three."""
    points, data = answers.points, answers.data
    text = _item(answers.texts, row)
    size = np.uint64(_length(text))
    _points(text, points.ctypes, size, 0)
    n = i = np.uint64(0)
    while i < size:
        c = points[i]
        i += _ONE
        if c < 0x80:
            data[n] = c
            n += _ONE
        elif c < 0x800:
            data[n] = 0xC0 | c >> 6
            data[n + _ONE] = 0x80 | c & 0x3F
            n += _TWO
        elif c < 0x10000:
            data[n] = 0xE0 | c >> 12
            data[n + _ONE] = 0x80 | c >> 6 & 0x3F
            data[n + _TWO] = 0x80 | c & 0x3F
            n += _THREE
        else:
            data[n] = 0xF0 | c >> 18
            data[n + _ONE] = 0x80 | c >> 12 & 0x3F
            data[n + _TWO] = 0x80 | c >> 6 & 0x3F
            data[n + _THREE] = 0x80 | c & 0x3F
            n += _FOUR
    return np.int64(n)
