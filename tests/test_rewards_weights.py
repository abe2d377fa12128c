"""Where the difficulty weight acts: on the reward it cancels, on the advantage it does not."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from rewardmap.rewards import RewardBatch, Rubric
from rewardmap.types import Problem

METRO = {"Red": ["A", "B", "C"], "Blue": ["C", "D", "E"]}
GROUP = 8


def ask(level: str, transfers: int) -> Problem:
    goal = "E" if transfers else "C"
    return Problem(
        f"{level}-{transfers}", b"", "", "planning", -1, "A", goal, "net", level, transfers_required=transfers
    )


PROBLEMS = [ask(level, transfers) for level in ("easy", "middle", "hard") for transfers in (0, 1)]


def leg(line: str, start: str, end: str) -> str:
    return f"Route Name: {line}\nDeparture Stop: {start}\nArrival Stop: {end}"


ANSWERS = [
    leg("Red", "A", "C"),
    leg("Red", "A", "C") + "\n--\n" + leg("Blue", "C", "E"),
    leg("Green", "A", "C"),
    leg("Red", "A", "E"),
    "nothing",
    leg("Blue", "A", "E"),
    leg("Red", "A", "B"),
    leg("Red", "A", "C") + "\n--\n" + leg("Blue", "D", "E"),
]


def scored(**options: object) -> RewardBatch:
    rubric = Rubric(**options)  # type: ignore[arg-type]
    return rubric.score([one for one in PROBLEMS for _ in range(GROUP)], ANSWERS * len(PROBLEMS), {"net": METRO})


def normalised(batch: RewardBatch, *, by_deviation: bool) -> NDArray[np.float64]:
    """[problems, GROUP] advantages: mean-centred, as published divided by the group's unbiased deviation +
    1e-6."""
    rewards = batch.score.reshape(-1, GROUP)
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    if by_deviation:
        centred = centred / (rewards.std(axis=1, ddof=1, keepdims=True) + 1e-6)
    return centred * batch.advantage_weight.reshape(-1, GROUP)


UNWEIGHTED = {"map_weights": {"easy": 1.0, "middle": 1.0, "hard": 1.0}, "transfer_weight": 0.0}
WEIGHTS = np.array([1.0, 1.5, 1.2, 1.7, 1.5, 2.0])[:, None]


@pytest.mark.parametrize("mode", ["reference", "paper", "graph"])
def test_on_the_reward_the_weight_cancels(mode: str) -> None:
    weighted, plain = scored(mode=mode), scored(mode=mode, **UNWEIGHTED)
    assert not np.allclose(weighted.score, plain.score)
    same = normalised(weighted, by_deviation=True), normalised(plain, by_deviation=True)
    assert np.abs(same[0]).max() > 0.5
    np.testing.assert_allclose(*same, atol=1e-6)


@pytest.mark.parametrize("mode", ["reference", "paper", "graph"])
def test_on_the_advantage_it_acts(mode: str) -> None:
    plain = normalised(scored(mode=mode, **UNWEIGHTED), by_deviation=True)
    weighted = scored(mode=mode, weight_on="advantage")
    np.testing.assert_allclose(normalised(weighted, by_deviation=True), WEIGHTS * plain, rtol=1e-12)
    np.testing.assert_array_equal(weighted.weight.reshape(-1, GROUP), np.broadcast_to(WEIGHTS, (6, GROUP)))


def test_without_the_division_it_acts_on_the_reward_too() -> None:
    plain = normalised(scored(**UNWEIGHTED), by_deviation=False)
    np.testing.assert_allclose(normalised(scored(), by_deviation=False), WEIGHTS * plain, rtol=1e-12)
