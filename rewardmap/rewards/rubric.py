"""From answers to rewards: modes, difficulty weights, and where the weights act."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rewardmap.rewards.parse import clean, clean_network
from rewardmap.rewards.score import CORRECTNESS, CleanLines, Outcome, score_reference
from rewardmap.types import KINDS, LEVELS, DataError, MetroData, Problem

Mode = Literal["reference", "paper", "graph"]
MODES: tuple[Mode, ...] = ("reference",)
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
    """[n] what first went wrong: an index into ``FAILURES``; 0 when the answer is right."""
    advantage_weight: NDArray[np.float64]
    """[n] what to multiply normalised advantages by: W when the rubric weights the advantage, else 1."""


@dataclass(frozen=True)
class Rubric:
    """How answers become rewards: R = W (10 correct + alpha detail), from arXiv 2510.02240.

    Example:
        batch = Rubric(weight_on="advantage").score(problems, responses, networks)
        advantages = group_normalise(batch.score) * batch.advantage_weight
    """

    mode: Mode = "reference"
    """``reference``: the published code, bugs included."""
    weight_on: Literal["reward", "advantage"] = "reward"
    """``reward``: as published; division by the group's standard deviation cancels it, since W is the same
    for all answers to one problem. ``advantage``: applied after normalisation, where it acts."""
    map_weights: Mapping[str, float] = field(default_factory=lambda: dict(PUBLISHED_MAP_WEIGHTS), hash=False)
    """W of each map difficulty."""
    transfer_weight: float = 0.5
    """Added to W for planning questions that need a transfer."""
    alpha: float = 0.5
    """Weight of detail."""
    _lines: dict[str, tuple[MetroData, CleanLines]] = field(
        default_factory=dict, init=False, repr=False, compare=False, hash=False
    )

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode {self.mode!r}: choose one of {', '.join(MODES)}")
        if self.weight_on not in ("reward", "advantage"):
            raise ValueError(f"weight_on {self.weight_on!r}: choose 'reward' or 'advantage'")
        if set(self.map_weights) != set(LEVELS):
            raise ValueError(
                f"map_weights {dict(self.map_weights)}: give one weight each for {', '.join(LEVELS)}"
            )

    def score(
        self, problems: Sequence[Problem], responses: Sequence[str], networks: Mapping[str, MetroData]
    ) -> RewardBatch:
        """Score ``responses[i]`` as an answer to ``problems[i]``.

        Args:
            problems: n of them; repeat a problem once per answer of its group.
            responses: n texts.
            networks: ``network_id`` -> the raw stations file, markers and all. Read once per object: not to
                be changed afterwards.

        Raises:
            DataError: names the row's uid and field where a problem is malformed or its network is missing.
            ValueError: the two sequences differ in length.
        """
        if len(problems) != len(responses):
            raise ValueError(f"{len(problems)} problems but {len(responses)} responses: give one each")
        outcomes = []
        weights = np.empty(len(problems))
        for i, (problem, response) in enumerate(zip(problems, responses, strict=True)):
            check_problem(problem)
            lines = self._clean_lines(problem, networks)
            weights[i] = self.weight(problem)
            outcomes.append(self._outcome(problem, response, lines))
        return self._batch(outcomes, weights)

    def weight(self, problem: Problem) -> float:
        """W = W_map + W_question of a problem."""
        weight = self.map_weights[problem.map_difficulty]
        transfers = problem.kind == "planning" and problem.transfers_required > 0
        return weight + self.transfer_weight if transfers else weight

    def _outcome(self, problem: Problem, response: str, lines: CleanLines) -> Outcome:
        return score_reference(
            problem.kind,
            response,
            problem.answer,
            clean(problem.station_1),
            clean(problem.station_2),
            problem.transfers_required,
            lines,
        )

    def _batch(self, outcomes: Sequence[Outcome], weights: NDArray[np.float64]) -> RewardBatch:
        correct = np.array([outcome.correct for outcome in outcomes], dtype=np.bool_)
        detail = np.array([outcome.detail for outcome in outcomes], dtype=np.float64)
        score = CORRECTNESS * correct + self.alpha * detail
        ones = np.ones_like(weights)
        return RewardBatch(
            score=score * weights if self.weight_on == "reward" else score,
            correct=correct,
            detail=detail,
            weight=weights,
            format_valid=np.array([outcome.format_valid for outcome in outcomes], dtype=np.bool_),
            failure=np.array([outcome.failure for outcome in outcomes], dtype=np.int8),
            advantage_weight=weights if self.weight_on == "advantage" else ones,
        )

    def _clean_lines(self, problem: Problem, networks: Mapping[str, MetroData]) -> CleanLines:
        metro = network_of(problem, networks)
        cached = self._lines.get(problem.network_id)
        if cached is None or cached[0] is not metro:
            cached = (metro, clean_network(problem.network_id, metro))
            self._lines[problem.network_id] = cached
        return cached[1]


def network_of(problem: Problem, networks: Mapping[str, MetroData]) -> MetroData:
    """The problem's stations file. Raises DataError where it is missing."""
    metro = networks.get(problem.network_id)
    if metro is None:
        raise DataError(
            f"row {problem.uid!r}, field 'network_id': no network {problem.network_id!r} among the "
            f"{len(networks)} given; load its stations file"
        )
    return metro


def check_problem(problem: Problem) -> None:
    """Raise DataError naming uid and field where a problem cannot be scored."""

    def bad(field_name: str, value: object, want: str) -> DataError:
        return DataError(f"row {problem.uid!r}, field {field_name!r}: {value!r} is not {want}")

    if problem.kind not in KINDS:
        raise bad("kind", problem.kind, f"one of {', '.join(KINDS)}")
    if problem.map_difficulty not in LEVELS:
        raise bad("map_difficulty", problem.map_difficulty, f"one of {', '.join(LEVELS)}")
    if not _is_int(problem.answer):
        raise bad("answer", problem.answer, "an integer (TorF 0 or 1, Counting a number, planning -1)")
    if problem.kind != "planning":
        return
    if not _is_int(problem.transfers_required) or problem.transfers_required < 0:
        raise bad("transfers_required", problem.transfers_required, "an integer of at least 0")
    for name in ("station_1", "station_2"):
        if not isinstance(getattr(problem, name), str):
            raise bad(name, getattr(problem, name), "a station's name")


def _is_int(value: object) -> bool:
    if isinstance(value, bool):
        return False
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True
