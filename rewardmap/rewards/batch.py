"""Answers to arrays: encodes texts and runs the compiled scorer over chunks, on one thread or several."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from rewardmap.rewards import compiled
from rewardmap.rewards.compiled import Bank, Questions, Results
from rewardmap.rewards.jit import announce

_CHUNK = 512


def empty_results(n: int) -> Results:
    """Room for n answers."""
    return Results(np.zeros(n, np.bool_), np.zeros(n), np.zeros(n, np.bool_), np.zeros(n, np.int8))


def score_texts(
    responses: Sequence[str],
    asked: NDArray[np.int64],
    questions: Questions,
    bank: Bank,
    *,
    paper: bool,
    threads: int,
) -> Results:
    """Score ``responses[i]`` as an answer to question ``asked[i]``; detail as printed if ``paper``, else as
    coded.

    Rows whose failure is ``compiled.HAND_BACK`` are left to the caller. With several threads one encodes
    while the others score: compiled code runs without the interpreter's lock. Raises ValueError for what is
    no text.
    """
    announce()
    results = empty_results(len(responses))

    def score_chunk(low: int) -> None:
        high = min(low + _CHUNK, len(responses))
        data, starts = encode(responses[low:high], low)
        rows = slice(low, high)
        part = Results(results.correct[rows], results.detail[rows], results.format_valid[rows], results.failure[rows])
        compiled.score_rows(data, starts, asked[low:high], questions, bank, paper, part)

    chunks = range(0, len(responses), _CHUNK)
    if threads == 1 or len(chunks) == 1:
        for low in chunks:
            score_chunk(low)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(score_chunk, chunks))
    return results


def encode(texts: Sequence[str], first: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """UTF-8 bytes of the texts, end to end, and [n + 1] where each begins. Lone surrogates become three
    bytes.

    Raises ValueError naming the row (counted from ``first``) for what is no text.
    """
    try:
        parts = [text.encode() for text in texts]
    except UnicodeEncodeError:
        parts = [text.encode("utf-8", "surrogatepass") for text in texts]
    except AttributeError:
        row = next(i for i, text in enumerate(texts) if not isinstance(text, str))
        raise ValueError(f"response {first + row} is {type(texts[row]).__name__}, not text") from None
    starts = np.zeros(len(parts) + 1, dtype=np.int64)
    np.cumsum(np.fromiter(map(len, parts), dtype=np.int64, count=len(parts)), out=starts[1:])
    return np.frombuffer(bytearray().join(parts), dtype=np.uint8), starts
