"""The scoring queue, and users' reward functions: slow, broken and dying ones."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rewardmap.rewards import Rubric
from rewardmap.rewards.streaming import RewardFunctionError, RewardPool, ScoringQueue
from rewardmap.types import Problem

MODULE = """
import os, time

def length(problem, response):
    if response == "slow":
        time.sleep(60)
    if response == "spin":
        while True:
            pass
    if response == "raise":
        raise KeyError("no such thing")
    if response == "die":
        os._exit(3)
    if response == "nan":
        return float("nan")
    if response == "text":
        return "7"
    return len(response) + (0.5 if problem.kind == "planning" else 0)

constant = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "own_rewards.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "own_rewards"


def ask(uid: str) -> Problem:
    return Problem(uid, b"", "", "planning", -1, "A", "B", "net", "easy")


def test_slow_and_failed_samples_are_named_and_the_others_scored(module: str) -> None:
    texts = ["a", "slow", "bb", "raise", "die", "ccc", "nan", "text", "spin", "dddd"]
    problems = [ask(f"q{i}") for i in range(len(texts))]
    began = time.monotonic()
    with RewardPool(f"{module}:length", workers=2, time_limit_s=1.0) as pool:
        with pytest.raises(RewardFunctionError) as caught:
            pool.score(problems, texts)
        again = pool.score(problems[:3], ["x", "yy", "zzz"])
    assert time.monotonic() - began < 40
    error = caught.value
    assert [(one.row, one.uid) for one in error.failures] == [(i, f"q{i}") for i in (1, 3, 4, 6, 7, 8)]
    reasons = [one.reason for one in error.failures]
    assert reasons[0] == reasons[5] == "took longer than 1.0 s"
    assert reasons[1] == "raised KeyError: 'no such thing'"
    assert reasons[2] == "ended its process with code 3"
    assert reasons[3] == "returned nan, not a finite number"
    assert reasons[4] == "returned '7', not a finite number"
    np.testing.assert_array_equal(error.scores, [1.5, np.nan, 2.5, np.nan, np.nan, 3.5, *[np.nan] * 3, 4.5])
    assert "row 1 ('q1') took longer" in str(error) and "6 of 10" in str(error) and "and 1 more" in str(error)
    np.testing.assert_array_equal(again, [1.5, 2.5, 3.5])


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("own_rewards", "'module:function'"),
        ("nowhere_at_all:f", "ModuleNotFoundError"),
        ("own_rewards:absent", "AttributeError"),
        ("own_rewards:constant", "is int, not a function"),
    ],
)
def test_functions_that_cannot_be_used(module: str, name: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        RewardPool(name)


def test_the_queue_scores_while_the_caller_goes_on() -> None:
    rubric = Rubric()
    networks = {"net": {"Red": ["A", "B"]}}
    gate = threading.Event()

    def score(problems: object, responses: object) -> object:
        gate.wait(10)
        return rubric.score(problems, responses, networks)  # type: ignore[arg-type]

    with ScoringQueue(score) as queue:
        right = "Route Name: Red\nDeparture Stop: A\nArrival Stop: B"
        futures = [queue.submit([ask(f"q{i}")] * 2, [right, "no"]) for i in range(3)]
        lost = queue.submit([ask("q")], [])
        assert not futures[0].done()
        gate.set()
        assert [future.result().score.tolist() for future in futures] == [[10.5, 0.0]] * 3  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match="1 problems but 0 responses"):
            lost.result()
