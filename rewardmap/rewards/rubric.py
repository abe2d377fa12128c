"""From answers to rewards: modes, difficulty weights, and where the weights act."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from rewardmap.rewards.batch import score_texts
from rewardmap.rewards.graph import DETAIL
from rewardmap.rewards.graph_intern import Verified
from rewardmap.rewards.intern import Published
from rewardmap.rewards.scorer import Networks, Reader, Results
from rewardmap.types import KINDS, LEVELS, TRANSFERS, DataError, Problem

Mode = Literal["reference", "paper", "graph"]
MODES: tuple[Mode, ...] = get_args(Mode)
PUBLISHED_MAP_WEIGHTS = {"easy": 1.0, "middle": 1.2, "hard": 1.5}


@dataclass(frozen=True, slots=True)
class RewardBatch:
    """The rewards of n answers and what they are made of; row i belongs to ``responses[i]``."""

    score: NDArray[np.float64]
    """[n] the reward; holds W when the rubric weights the reward."""
    correct: NDArray[np.bool_]
    """[n] whether the answer is right."""
    detail: NDArray[np.float64]
    """[n] partial credit before alpha."""
    weight: NDArray[np.float64]
    """[n] W, the difficulty weight of the answer's problem."""
    format_valid: NDArray[np.bool_]
    """[n] whether the answer has the asked form: a boxed answer of the right sort, or only complete legs."""
    failure: NDArray[np.int8]
    """[n] what first went wrong: an index into ``FAILURES``; 0, or "not_optimal", when the answer is
    right."""
    advantage_weight: NDArray[np.float64]
    """[n] what to multiply normalised advantages by: W when the rubric weights the advantage, else 1."""


@dataclass(frozen=True)
class Rubric:
    """How answers become rewards: R = W (format + correctness + alpha detail), arXiv 2510.02240, section 4.2.

    Example:
        batch = Rubric(weight_on="advantage").score(problems, responses, networks)
        advantages = group_normalise(batch.score) * batch.advantage_weight
    """

    mode: Mode = "reference"
    """``reference``: the published code, bugs included. ``paper``: Algorithm 1 and a format term, as printed.
    ``graph``: every leg verified on the network, nothing below 0, every right answer above every wrong
    one."""
    weight_on: Literal["reward", "advantage"] = "reward"
    """``reward``: as published; division by the group's standard deviation cancels it, since W is the same
    for all answers to one problem. ``advantage``: applied after normalisation, where it acts."""
    map_weights: Mapping[str, float] = field(default_factory=lambda: dict(PUBLISHED_MAP_WEIGHTS), hash=False)
    """W of each map difficulty."""
    transfer_weight: float = 0.5
    """Added to W for planning questions that need a transfer."""
    alpha: float = 0.5
    """Weight of detail."""
    correct_reward: float = 10.0
    """What a right answer earns. The paper does not state it; 10 is the published code's."""
    format_reward: float | None = None
    """For ``paper`` mode: what an answer of the asked form earns. The paper does not state it; None is 1."""
    threads: int = 1
    """Threads that score a batch."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode {self.mode!r}: choose one of {', '.join(MODES)}")
        if self.weight_on not in ("reward", "advantage"):
            raise ValueError(f"weight_on {self.weight_on!r}: choose 'reward' or 'advantage'")
        if self.threads < 1:
            raise ValueError(f"threads {self.threads}: at least 1")
        if self.mode != "paper" and self.format_reward is not None:
            raise ValueError(f"format_reward {self.format_reward}: only paper mode has one, not {self.mode!r}")
        if self.mode == "graph" and not 0 <= self.alpha * DETAIL < self.correct_reward:
            raise ValueError(
                f"alpha {self.alpha}: in graph mode {DETAIL} alpha, the most that detail can add, must be at "
                f"least 0 and less than correct_reward ({self.correct_reward})"
            )
        if set(self.map_weights) != set(LEVELS):
            raise ValueError(f"map_weights {dict(self.map_weights)}: give one weight each for {', '.join(LEVELS)}")

    def score(
        self,
        problems: Sequence[Problem],
        responses: Sequence[str],
        networks: Networks,
    ) -> RewardBatch:
        """Score ``responses[i]`` as an answer to ``problems[i]``.

        Args:
            problems: n of them; repeat a problem once per answer of its group.
            responses: n texts.
            networks: ``network_id`` -> the raw stations file, markers and all, or a ``transit.Network``,
                whose true topology ``graph`` mode uses. Read once per object: not to be changed afterwards.

        Raises:
            DataError: names the row's uid and field where a problem is malformed or its network is missing.
            ValueError: the two sequences differ in length.
        """
        if len(problems) != len(responses):
            raise ValueError(f"{len(problems)} problems but {len(responses)} responses: give one each")
        reader = partial(self._reader.scorer, problems, networks)
        return self._batch(*score_texts(reader, problems, responses, self.threads, self.weights))

    def weights(self, problems: Sequence[Problem]) -> NDArray[np.float64]:
        """[n] W = W_map + W_question of each problem. Raises DataError where one is malformed."""
        check_problems(problems)
        of_map, more = self.map_weights, self.transfer_weight
        return np.array(
            [
                of_map[problem.map_difficulty] + more
                if problem.kind == "planning" and problem.transfers_required > 0
                else of_map[problem.map_difficulty]
                for problem in problems
            ]
        )

    @cached_property
    def _reader(self) -> Reader:
        return Reader(Verified() if self.mode == "graph" else Published(self.mode == "paper"))

    def _batch(self, results: Results, weights: NDArray[np.float64]) -> RewardBatch:
        # In the order of the published code, so that equal means equal to the last bit.
        score = self.correct_reward * results.correct + self.alpha * results.detail
        if self.mode == "paper":
            format_reward = 1.0 if self.format_reward is None else self.format_reward
            score = format_reward * results.format_valid + score
        on_reward = self.weight_on == "reward"
        return RewardBatch(
            score=score * weights if on_reward else score,
            correct=results.correct,
            detail=results.detail,
            weight=weights,
            format_valid=results.format_valid,
            failure=results.failure,
            advantage_weight=np.ones_like(weights) if on_reward else weights,
        )


def check_problems(problems: Sequence[Problem]) -> None:
    """Raise DataError naming uid and field of the first that cannot be scored."""
    for problem in problems:
        plan = problem.kind == "planning"
        if not plan and problem.kind not in KINDS:
            raise _bad(problem, "kind", problem.kind, f"one of {', '.join(KINDS)}")
        if problem.map_difficulty not in LEVELS:
            raise _bad(problem, "map_difficulty", problem.map_difficulty, f"one of {', '.join(LEVELS)}")
        if type(problem.answer) is not int and not _is_int(problem.answer):
            raise _bad(problem, "answer", problem.answer, "an integer (TorF 0 or 1, Counting a number, planning -1)")
        if not plan:
            continue
        transfers = problem.transfers_required
        if (type(transfers) is not int and not _is_int(transfers)) or transfers not in TRANSFERS:
            raise _bad(problem, "transfers_required", transfers, f"an integer from 0 to {TRANSFERS[-1]}")
        if not isinstance(problem.station_1, str):
            raise _bad(problem, "station_1", problem.station_1, "a station's name")
        if not isinstance(problem.station_2, str):
            raise _bad(problem, "station_2", problem.station_2, "a station's name")


def _bad(problem: Problem, field_name: str, value: object, want: str) -> DataError:
    return DataError(f"row {problem.uid!r}, field {field_name!r}: {value!r} is not {want}")


def _is_int(value: object) -> bool:
    if isinstance(value, bool):
        return False
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True
