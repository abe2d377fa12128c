"""Held-out accuracy: the benchmark's weighting, by kind, with intervals, and against text-only controls.

Intervals are percentile bootstraps over *maps*, not questions: questions about one map share its picture.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rewardmap.blind import blind_policies
from rewardmap.files import write_text
from rewardmap.rewards import Rubric
from rewardmap.rollout.engine import RolloutEngine
from rewardmap.types import KINDS, LEVELS, DataError, MetroData, Problem, SamplingParams

Array = NDArray[np.float64]
Progress = Callable[[int, int], None]
"""Called with (problems done, problems in all)."""

DIRECT, TRANSFER = "planning/direct", "planning/transfer"
GROUPS = (*KINDS, DIRECT, TRANSFER)
"""The six kinds, and planning once more by whether the shortest route needs a change of line."""
RESAMPLES = 2_000
CONFIDENCE = 0.95


def evaluation_weight(problem: Problem) -> float:
    """The benchmark's weight of a question, not the training reward's W.

    ReasonMap-Plus kinds: 1, 1.5, 2 for easy, middle, hard maps. planning: 1 + 0.5 (q + m) with q and m the
    levels 0..2 of the question (0, 1, 2 or more transfers) and of the map. Source: ReasonMap, arXiv
    2505.18675.

    Raises:
        DataError: a map difficulty outside ``LEVELS``.
    """
    if problem.map_difficulty not in LEVELS:
        raise DataError(
            f"{problem.uid}: map difficulty {problem.map_difficulty!r}: use one of {', '.join(LEVELS)}"
        )
    level = LEVELS.index(problem.map_difficulty)
    if problem.kind != "planning":
        return 1 + 0.5 * level
    return 1 + 0.5 * (min(problem.transfers_required, 2) + level)


@dataclass(frozen=True, slots=True)
class Record:
    """One evaluated answer."""

    uid: str
    kind: str
    network_id: str
    map_difficulty: str
    transfers_required: int
    weight: float
    correct: bool
    format_valid: bool
    response: str
    num_tokens: int

    @property
    def group(self) -> str:
        """The narrowest of ``GROUPS``: the kind, or for planning whether the route needs a transfer."""
        if self.kind != "planning":
            return self.kind
        return TRANSFER if self.transfers_required else DIRECT


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over n questions with its 95 % interval; its bounds are NaN where there is one map only."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Evaluation:
    """The answers to a held-out set.

    A *metric* is ``weighted_accuracy``, ``format_valid``, or one of ``GROUPS`` for that group's plain
    accuracy.
    """

    records: tuple[Record, ...]

    def __post_init__(self) -> None:
        if not self.records:
            raise ValueError("an evaluation needs at least one answer; the split is empty")

    @property
    def weighted_accuracy(self) -> float:
        """Σ weight·correct / Σ weight, in 0..1."""
        return self._ratio("weighted_accuracy")

    @property
    def format_valid(self) -> float:
        """Share of answers in the asked form, in 0..1."""
        return self._ratio("format_valid")

    @property
    def num_tokens(self) -> int:
        """Tokens answered, stop tokens included."""
        return sum(record.num_tokens for record in self.records)

    @property
    def groups(self) -> tuple[str, ...]:
        """Those of ``GROUPS`` that were asked about."""
        return tuple(group for group in GROUPS if self._terms(group)[1].any())

    def estimate(self, metric: str = "weighted_accuracy", seed: int = 0) -> Estimate:
        """Value and interval of a metric, ``RESAMPLES`` draws. Raises ValueError for an unknown metric."""
        numerator, denominator = self._terms(metric)
        samples = self._bootstrap(numerator, denominator, seed)
        return Estimate(self._ratio(metric), *_bounds(samples), n=int((denominator > 0).sum()))

    def gain_over(self, before: Evaluation, metric: str = "weighted_accuracy", seed: int = 0) -> Estimate:
        """Paired difference self - before: both are resampled by the same maps.

        Raises:
            ValueError: the two did not answer the same questions in the same order.
        """
        if [(r.uid, r.weight) for r in self.records] != [(r.uid, r.weight) for r in before.records]:
            raise ValueError("a paired difference needs the same questions in the same order on both sides")
        numerator, denominator = self._terms(metric)
        difference = numerator - before._terms(metric)[0]
        samples = self._bootstrap(difference, denominator, seed)
        value = difference.sum() / denominator.sum() if denominator.any() else np.nan
        return Estimate(float(value), *_bounds(samples), n=int((denominator > 0).sum()))

    def to_jsonl(self, path: Path) -> None:
        """One record a line, written at once. Raises OSError naming the path."""
        lines = (json.dumps(dataclasses.asdict(record), ensure_ascii=False) for record in self.records)
        write_text(path, "".join(f"{line}\n" for line in lines))

    @classmethod
    def from_jsonl(cls, path: Path) -> Evaluation:
        """Read what ``to_jsonl`` wrote. Raises DataError naming file and line."""
        records = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                records.append(Record(**json.loads(line)))
            except (json.JSONDecodeError, TypeError) as error:
                raise DataError(f"{path}, line {number}: not an evaluation record: {error}") from None
        if not records:
            raise DataError(f"{path}: holds no evaluation record")
        return cls(tuple(records))

    @cached_property
    def _maps(self) -> tuple[int, NDArray[np.int64]]:
        """Number of maps, and each record's map index [n]."""
        names, index = np.unique([record.network_id for record in self.records], return_inverse=True)
        return len(names), index

    def _ratio(self, metric: str) -> float:
        numerator, denominator = self._terms(metric)
        return float(numerator.sum() / denominator.sum()) if denominator.any() else float("nan")

    def _terms(self, metric: str) -> tuple[Array, Array]:
        """Numerator and denominator of a metric by record, [n] each."""
        if metric == "format_valid":
            valid = np.array([record.format_valid for record in self.records], dtype=np.float64)
            return valid, np.ones_like(valid)
        if metric == "weighted_accuracy":
            share = np.array([record.weight for record in self.records])
        elif metric in GROUPS:
            share = np.array([metric in (r.kind, r.group) for r in self.records], dtype=np.float64)
        else:
            known = ", ".join(("weighted_accuracy", "format_valid", *GROUPS))
            raise ValueError(f"metric {metric!r}: choose one of {known}")
        return share * np.array([record.correct for record in self.records]), share

    def _bootstrap(self, numerator: Array, denominator: Array, seed: int) -> Array:
        """[at most RESAMPLES] resampled ratios; those that drew no question of the metric are left out."""
        count, index = self._maps
        if count < 2:
            return np.empty(0)
        draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
        above = draws @ np.bincount(index, numerator, count)
        below = draws @ np.bincount(index, denominator, count)
        return above[below > 0] / below[below > 0]


def _bounds(samples: Array) -> tuple[float, float]:
    if not len(samples):
        return float("nan"), float("nan")
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(samples, [tail, 100 - tail])
    return float(low), float(high)


def evaluate(
    engine: RolloutEngine,
    problems: Sequence[Problem],
    networks: Mapping[str, MetroData],
    rubric: Rubric,
    sampling: SamplingParams,
    progress: Progress | None = None,
    batch: int = 256,
) -> Evaluation:
    """Answer every problem once, greedily, and score the answers.

    Args:
        sampling: taken as it is but for the temperature, which is 0.
        batch: problems handed to the engine at a time; ``progress`` is called after each batch.

    Raises:
        ValueError: no problems.
        DataError: a malformed problem, a missing network or picture.
    """
    greedy = dataclasses.replace(sampling, temperature=0.0)
    records: list[Record] = []
    for start in range(0, len(problems), batch):
        chunk = problems[start : start + batch]
        answers = [group.rollouts[0] for group in engine.generate(chunk, 1, greedy)]
        scores = rubric.score(chunk, [answer.text for answer in answers], networks)
        for index, (problem, answer) in enumerate(zip(chunk, answers, strict=True)):
            records.append(
                Record(
                    uid=problem.uid,
                    kind=problem.kind,
                    network_id=problem.network_id,
                    map_difficulty=problem.map_difficulty,
                    transfers_required=problem.transfers_required,
                    weight=evaluation_weight(problem),
                    correct=bool(scores.correct[index]),
                    format_valid=bool(scores.format_valid[index]),
                    response=answer.text,
                    num_tokens=len(answer.token_ids),
                )
            )
        if progress is not None:
            progress(len(records), len(problems))
    return Evaluation(tuple(records))


def swap_maps(problems: Sequence[Problem], seed: int) -> list[Problem]:
    """The ``text_only`` control: every question gets the picture of another map; its network and answer stay.

    Maps are permuted along one random cycle: none keeps its picture, and every picture stays in use.

    Raises:
        ValueError: fewer than two maps.
    """
    pictures = {problem.network_id: problem.image for problem in problems}
    if len(pictures) < 2:
        raise ValueError("swapping maps needs at least two of them; give a split with more maps")
    order = [list(pictures)[index] for index in np.random.default_rng(seed).permutation(len(pictures))]
    swapped = {name: pictures[other] for name, other in zip(order, order[1:] + order[:1], strict=True)}
    return [dataclasses.replace(problem, image=swapped[problem.network_id]) for problem in problems]


@dataclass(frozen=True, slots=True)
class TextPrior:
    """What the best answer that ignores the picture scores on a test split."""

    weighted_accuracy: float
    kinds: dict[str, float]
    """Plain accuracy by kind."""
    policies: dict[str, str]
    """By kind: which policy was the best."""


def text_prior(
    train: Sequence[Problem], test: Sequence[Problem], networks: Mapping[str, MetroData], rubric: Rubric
) -> TextPrior:
    """Accuracy of the best picture-blind policy for each kind (``rewardmap.blind`` lists them).

    Policies are fitted on ``train``; of each kind's, the one with the highest accuracy on ``test`` itself
    counts, which makes the bar higher, not lower. A kind that ``train`` lacks is fitted on ``test``.

    Args:
        networks: those of both splits.

    Raises:
        ValueError: no test problems.
    """
    if not test:
        raise ValueError("a text prior needs test problems; the split is empty")
    kinds, policies = {}, {}
    above = below = 0.0
    for kind in KINDS:
        asked = [problem for problem in test if problem.kind == kind]
        if not asked:
            continue
        seen = [problem for problem in train if problem.kind == kind] or asked
        options = blind_policies(kind, seen, asked, networks, rubric)
        name = max(options, key=lambda option: options[option].mean())
        weights = np.array([evaluation_weight(problem) for problem in asked])
        kinds[kind], policies[kind] = float(options[name].mean()), name
        above += float(weights @ options[name])
        below += float(weights.sum())
    return TextPrior(above / below, kinds, policies)
