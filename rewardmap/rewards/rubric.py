"""From answers to rewards: modes, difficulty weights, and where the weights act."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rewardmap.rewards.batch import empty_results, score_texts
from rewardmap.rewards.compiled import HAND_BACK, Results
from rewardmap.rewards.graph import DETAIL, score_graph
from rewardmap.rewards.intern import Names, network_of
from rewardmap.rewards.parse import clean
from rewardmap.rewards.score import score_paper, score_reference
from rewardmap.rewards.topology import Topology, station_key, topology
from rewardmap.transit.graph import Network
from rewardmap.types import KINDS, LEVELS, DataError, MetroData, Problem

Mode = Literal["reference", "paper", "graph"]
MODES: tuple[Mode, ...] = ("reference", "paper", "graph")
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
    """Threads that score a batch in ``reference`` and ``paper`` mode."""
    _names: Names = field(default_factory=Names, init=False, repr=False, compare=False, hash=False)
    _topologies: dict[str, tuple[MetroData | Network, Topology]] = field(
        default_factory=dict, init=False, repr=False, compare=False, hash=False
    )

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode {self.mode!r}: choose one of {', '.join(MODES)}")
        if self.weight_on not in ("reward", "advantage"):
            raise ValueError(f"weight_on {self.weight_on!r}: choose 'reward' or 'advantage'")
        if self.threads < 1 or (self.mode == "graph" and self.threads > 1):
            raise ValueError(f"threads {self.threads}: at least 1, and in graph mode only 1")
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
        networks: Mapping[str, MetroData | Network],
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
        asked, distinct = distinct_problems(problems)
        for problem in distinct:
            check_problem(problem)
        weights = np.array([self.weight(problem) for problem in distinct], dtype=np.float64)[asked]
        return self._batch(self._results(asked, distinct, responses, networks), weights)

    def weight(self, problem: Problem) -> float:
        """W = W_map + W_question of a problem."""
        weight = self.map_weights[problem.map_difficulty]
        transfers = problem.kind == "planning" and problem.transfers_required > 0
        return weight + self.transfer_weight if transfers else weight

    def _results(
        self,
        asked: NDArray[np.int64],
        distinct: Sequence[Problem],
        responses: Sequence[str],
        networks: Mapping[str, MetroData | Network],
    ) -> Results:
        if self.mode == "graph":
            return self._verified(asked, distinct, responses, networks)
        numbers = [self._names.number(problem, networks) for problem in distinct]
        questions = self._names.questions(distinct, numbers)
        bank = self._names.bank()
        paper = self.mode == "paper"
        results = score_texts(responses, asked, questions, bank, paper=paper, threads=self.threads)
        plain = score_paper if paper else score_reference
        for row in np.flatnonzero(results.failure == HAND_BACK).tolist():
            problem = distinct[asked[row]]
            outcome = plain(
                problem.kind,
                responses[row],
                problem.answer,
                clean(problem.station_1),
                clean(problem.station_2),
                problem.transfers_required,
                self._names.lines(numbers[asked[row]]),
            )
            results.correct[row], results.detail[row] = outcome.correct, outcome.detail
            results.format_valid[row], results.failure[row] = outcome.format_valid, outcome.failure
        return results

    def _verified(
        self,
        asked: NDArray[np.int64],
        distinct: Sequence[Problem],
        responses: Sequence[str],
        networks: Mapping[str, MetroData | Network],
    ) -> Results:
        known = [self._topology(problem, networks) for problem in distinct]
        for problem, network in zip(distinct, known, strict=True):
            check_stations(problem, network)
        results = empty_results(len(responses))
        for row, (number, response) in enumerate(zip(asked.tolist(), responses, strict=True)):
            if not isinstance(response, str):
                raise ValueError(f"response {row} is {type(response).__name__}, not text")
            outcome = score_graph(distinct[number], response, known[number])
            results.correct[row], results.detail[row] = outcome.correct, outcome.detail
            results.format_valid[row], results.failure[row] = outcome.format_valid, outcome.failure
        return results

    def _topology(self, problem: Problem, networks: Mapping[str, MetroData | Network]) -> Topology:
        network = network_of(problem, networks)
        known = self._topologies.get(problem.network_id)
        if known is None or known[0] is not network:
            known = (network, topology(problem.network_id, network))
            self._topologies[problem.network_id] = known
        return known[1]

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


def distinct_problems(problems: Sequence[Problem]) -> tuple[NDArray[np.int64], list[Problem]]:
    """([n] which distinct problem each row asks, the distinct ones), where a run of one object is one."""
    identity = np.fromiter(map(id, problems), dtype=np.int64, count=len(problems))
    begins = np.ones(len(problems), dtype=np.bool_)
    np.not_equal(identity[1:], identity[:-1], out=begins[1:])
    return np.cumsum(begins) - 1, [problems[i] for i in np.flatnonzero(begins).tolist()]


def check_problem(problem: Problem) -> None:
    """Raise DataError naming uid and field where a problem cannot be scored."""

    def bad(field_name: str, value: object, want: str) -> DataError:
        return DataError(f"row {problem.uid!r}, field {field_name!r}: {value!r} is not {want}")

    if problem.kind not in KINDS:
        raise bad("kind", problem.kind, f"one of {', '.join(KINDS)}")
    if problem.map_difficulty not in LEVELS:
        raise bad("map_difficulty", problem.map_difficulty, f"one of {', '.join(LEVELS)}")
    if type(problem.answer) is not int and not _is_int(problem.answer):
        raise bad("answer", problem.answer, "an integer (TorF 0 or 1, Counting a number, planning -1)")
    if problem.kind != "planning":
        return
    transfers = problem.transfers_required
    if (type(transfers) is not int and not _is_int(transfers)) or transfers < 0:
        raise bad("transfers_required", transfers, "an integer of at least 0")
    if not isinstance(problem.station_1, str):
        raise bad("station_1", problem.station_1, "a station's name")
    if not isinstance(problem.station_2, str):
        raise bad("station_2", problem.station_2, "a station's name")


def check_stations(problem: Problem, network: Topology) -> None:
    """Raise DataError naming uid and field where a route's ends are no stops of the network, or one stop."""
    if problem.kind != "planning":
        return
    for name in ("station_1", "station_2"):
        station = getattr(problem, name)
        if station_key(station) not in network.stations:
            raise DataError(
                f"row {problem.uid!r}, field {name!r}: {station!r} is not in network {problem.network_id!r}"
            )
    if station_key(problem.station_1) == station_key(problem.station_2):
        raise DataError(f"row {problem.uid!r}, field 'station_2': {problem.station_2!r} is where the route starts")


def _is_int(value: object) -> bool:
    if isinstance(value, bool):
        return False
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True
