"""Answers as compiled code reads them: the same UTF-8 as Python's for whatever text, and errors from every thread."""

from __future__ import annotations

from unittest.mock import Mock

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewardmap.rewards import Rubric
from rewardmap.rewards.texts import read_chunk, utf8
from rewardmap.types import DataError, Problem

ANY = st.text(st.characters(exclude_categories=()), max_size=40)
"""Lone surrogates, pairs of them and NULs included."""


def ask(uid: str, answer: object = 1) -> Problem:
    return Problem(uid, b"", "", "TorF1", answer, "", "", "net", "easy")  # type: ignore[arg-type]


@numba.njit(nogil=True)  # type: ignore[untyped-decorator, unused-ignore]
def read(answers, row):  # type: ignore[no-untyped-def]
    return utf8(answers, row)


def bytes_of(texts: list[str], low: int = 0) -> list[bytes]:
    chunk = read_chunk([ask("q")] * len(texts), texts, low, len(texts))
    return [bytes(chunk.answers.data[: read(chunk.answers, row)]) for row in range(len(chunk.texts))]


@settings(max_examples=300, deadline=None)
@given(st.lists(ANY, min_size=1, max_size=5), st.data())
def test_utf8_of_any_text(texts: list[str], data: st.DataObject) -> None:
    low = data.draw(st.integers(0, len(texts) - 1))
    assert bytes_of(texts, low) == [text.encode("utf-8", "surrogatepass") for text in texts[low:]]


def test_utf8_at_the_edges_of_every_width() -> None:
    edges = [0, 0x7F, 0x80, 0xFF, 0x100, 0x7FF, 0x800, 0xD7FF, 0xD800, 0xDFFF, 0xE000, 0xFFFF, 0x10000, 0x10FFFF]
    texts = ["", *map(chr, edges), "\ud83d\ude00", "".join(map(chr, edges))]
    assert bytes_of(texts) == [text.encode("utf-8", "surrogatepass") for text in texts]


def test_runs_of_one_problem() -> None:
    one, other = ask("1"), ask("2")
    chunk = read_chunk([one, one, other, one, one], list("abcde"), 1, 5)
    assert [id(problem) for problem in chunk.problems] == [id(one), id(other), id(one)]
    assert chunk.asked.tolist() == [0, 1, 2, 2]


class Text(str):
    """A string of a class of its own."""


def test_what_is_text_and_what_is_not() -> None:
    assert bytes_of([Text("ja"), Text("né")]) == [b"ja", "né".encode()]
    for impostor in (b"ja", 1, None, Mock(spec=str)):
        with pytest.raises(ValueError, match=f"response 2 is {type(impostor).__name__}, not text"):
            read_chunk([ask("q")] * 3, ["a", "b", impostor], 1, 3)  # type: ignore[list-item]


@pytest.mark.parametrize(("problems", "texts"), [(3, 2), (2, 3)])
def test_lists_that_became_shorter_are_not_read_beyond(problems: int, texts: int) -> None:
    with pytest.raises(ValueError, match="rows 0 to 3 are not there any more"):
        read_chunk([ask("q")] * problems, ["a"] * texts, 0, 3)


@pytest.mark.parametrize("row", [0, 700, 1499])
def test_a_bad_row_is_named_from_every_thread(row: int) -> None:
    rubric, network = Rubric(threads=3), {"net": {"A": ["B"]}}
    problems, texts = [ask(f"q{i}") for i in range(1500)], ["\\boxed{yes}"] * 1500
    assert rubric.score(problems, texts, network).correct.all()
    problems[row] = ask("bad", answer="yes")
    with pytest.raises(DataError, match="row 'bad', field 'answer'"):
        rubric.score(problems, texts, network)
    with pytest.raises(ValueError, match=f"response {row} is int, not text"):
        rubric.score(problems[:row] + [ask("q")] * (1500 - row), [*texts[:row], 5, *texts[row + 1 :]], network)  # type: ignore[list-item]


def test_sequences_of_any_sort() -> None:
    problems, texts = (ask("1"), ask("2", 0)), np.array(["\\boxed{yes}", "\\boxed{no}"])
    assert Rubric().score(problems, texts, {"net": {"A": ["B"]}}).correct.tolist() == [True, True]  # type: ignore[arg-type]
