"""Answers to arrays: encodes texts and runs a scorer over chunks of them, on one thread or several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from rewardmap.rewards.scorer import HAND_BACK, Results, Scorer
from rewardmap.types import Problem

_CHUNK = 1024
_SMALLEST_CHUNK = 128


def score_texts(
    scorer: Scorer,
    problems: Sequence[Problem],
    asked: NDArray[np.int64],
    responses: Sequence[str],
    threads: int,
    weigh: Callable[[Problem], float],
) -> tuple[Results, NDArray[np.float64]]:
    """Score ``responses[i]`` as an answer to ``problems[asked[i]]``, where ``asked`` never falls.

    Returns the results and, [n], what ``weigh`` says of each answer's problem.

    With several threads one prepares its chunk while the others score: compiled code runs without the
    interpreter's lock. Raises what ``weigh`` raises for a problem, and ValueError for what is no text.
    """
    n = len(responses)
    weights = np.zeros(n)
    # Small enough that the threads end together and soon have something to do.
    chunk = min(_CHUNK, max(_SMALLEST_CHUNK, n // (8 * threads)))
    results = Results(np.zeros(n, np.bool_), np.zeros(n), np.zeros(n, np.bool_), np.zeros(n, np.int8))

    def score_chunk(low: int) -> None:
        rows = slice(low, min(low + chunk, n))
        part = Results(results.correct[rows], results.detail[rows], results.format_valid[rows], results.failure[rows])
        first, last = int(asked[low]), int(asked[rows.stop - 1])
        texts, posed, here = responses[rows], problems[first : last + 1], asked[rows] - first
        data, begins = encode(texts, low)
        weights[rows] = np.array(list(map(weigh, posed)))[here]
        scorer.score(posed, here, data, begins, part)
        for row in np.flatnonzero(part.failure == HAND_BACK).tolist():
            outcome = scorer.by_hand(problems[asked[low + row]], texts[row])
            part.correct[row], part.detail[row] = outcome.correct, outcome.detail
            part.format_valid[row], part.failure[row] = outcome.format_valid, outcome.failure

    chunks = range(0, n, chunk)
    if threads == 1 or len(chunks) == 1:
        for low in chunks:
            score_chunk(low)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(score_chunk, chunks))
    return results, weights


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
