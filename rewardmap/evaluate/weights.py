"""The benchmark's weights of questions, and which benchmark a question belongs to."""

from __future__ import annotations

from rewardmap.types import LEVELS, DataError, Problem


def evaluation_weight(problem: Problem) -> float:
    """The benchmark's weight of a question, not the training reward's W.

    ReasonMap-Plus kinds: 1, 1.5, 2 for easy, middle, hard maps. planning: 1 + 0.5 (q + m) with q and m the levels 0..2
    of the question and of the map; a question without a label has the level of its transfers (0, 1, 2 or more).
    Over the published test splits the weights sum to 576 and 2,212. Source: ReasonMap, arXiv 2505.18675.

    Raises:
        DataError: a difficulty outside ``LEVELS``.
    """
    level = _level(problem, "map", problem.map_difficulty)
    if problem.kind != "planning":
        return 1 + 0.5 * level
    label = problem.question_difficulty or LEVELS[min(problem.transfers_required, 2)]
    return 1 + 0.5 * (_level(problem, "question", label) + level)


def _level(problem: Problem, of: str, label: str) -> int:
    if label not in LEVELS:
        raise DataError(f"{problem.uid}: {of} difficulty {label!r}: use one of {', '.join(LEVELS)}")
    return LEVELS.index(label)
