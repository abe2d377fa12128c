"""Answers to arrays: runs a scorer over a batch, on one thread or several."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache

import numpy as np
from numpy.typing import NDArray

from rewardmap.rewards.scorer import HAND_BACK, Results, Scorer
from rewardmap.rewards.texts import read_chunk
from rewardmap.types import Problem

_CHUNKS = 4
"""Chunks per thread: so many that the threads end together, so few that they seldom meet at the interpreter's
lock."""
_SMALLEST_CHUNK = 128


def score_texts(
    reader: Callable[[Sequence[Problem]], Scorer],
    problems: Sequence[Problem],
    texts: Sequence[str],
    threads: int,
    weigh: Callable[[Sequence[Problem]], NDArray[np.float64]],
) -> tuple[Results, NDArray[np.float64]]:
    """Score ``texts[i]`` as an answer to ``problems[i]`` with what ``reader`` gives for some of the problems.

    Returns the results and, [n], what ``weigh`` says of each answer's problem.

    With several threads one prepares its chunk while the others score: compiled code runs without the
    interpreter's lock. Raises what ``reader`` and ``weigh`` raise, and ValueError for what is no text.
    """
    n = len(texts)
    size = max(_SMALLEST_CHUNK, -(-n // (_CHUNKS * threads)) if threads > 1 else n)
    weights = np.zeros(n)
    results = Results(np.zeros(n, np.bool_), np.zeros(n), np.zeros(n, np.bool_), np.zeros(n, np.int8))
    chunks = iter(range(0, n, size))

    def work() -> None:
        for low in chunks:
            rows = slice(low, min(low + size, n))
            chunk, part = read_chunk(problems, texts, low, rows.stop), results.part(rows)
            weights[rows] = weigh(chunk.problems)[chunk.asked]
            scorer = reader(chunk.problems)
            scorer.score(chunk, part)
            for row in np.flatnonzero(part.failure == HAND_BACK).tolist():
                outcome = scorer.by_hand(chunk.problems[chunk.asked[row]], chunk.texts[row])
                part.correct[row], part.detail[row] = outcome.correct, outcome.detail
                part.format_valid[row], part.failure[row] = outcome.format_valid, outcome.failure

    if size >= n:
        work()
        return results, weights
    others = [_pool(threads - 1).submit(work) for _ in range(threads - 1)]
    try:
        work()
    finally:
        # What has not begun has nothing left to do; what has must end before its arrays go.
        wait([other for other in others if not other.cancel()])
    for other in others:
        if not other.cancelled():
            other.result()
    return results, weights


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    """Kept: to start a thread takes as long as to score a few hundred answers."""
    return ThreadPoolExecutor(workers, thread_name_prefix="rewardmap-rewards")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads
