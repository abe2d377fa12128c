"""Evaluated answers and what they add up to: the benchmark's metrics with intervals, whole and in parts.

Intervals are percentile bootstraps over *maps*, not questions: questions about one map share its picture.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rewardmap.files import write_text
from rewardmap.types import KINDS, LEVELS, DataError

Array = NDArray[np.float64]
DIRECT, TRANSFER = "planning/direct", "planning/transfer"
GROUPS = (*KINDS, DIRECT, TRANSFER)
"""The six kinds, and planning once more by whether the shortest route needs a change of line."""
METRICS = (
    "weighted_accuracy",
    "accuracy",
    "format_valid",
    "verified",
    "map_score",
    "map_score_unweighted",
    "map_score_paper",
)
"""Beside ``GROUPS``. Shares are in 0..1, map scores in points. ``verified``: planning answers that a train could ride.
``map_score`` counts as released and is weighted, as the published tables are; the scripts print it unweighted."""
BENCHMARKS: dict[str, Callable[[Record], bool]] = {
    "ReasonMap": lambda record: record.kind == "planning",
    "ReasonMap-Plus": lambda record: record.kind != "planning",
    "Plus, counting": lambda record: record.kind.startswith("Counting"),
    "Plus, true/false": lambda record: record.kind.startswith("TorF"),
}
"""The published benchmarks and the parts that they are reported in."""
_CHANGES = ("none", "one", "two or more")
_CUTS: dict[str, tuple[Sequence[str], Callable[[Record], str]]] = {
    "kind": (KINDS, lambda record: record.kind),
    "map level": (LEVELS, lambda record: record.map_difficulty),
    "transfers": (_CHANGES, lambda r: _CHANGES[min(r.transfers_required, 2)] if r.kind == "planning" else ""),
    "city": ((), lambda record: record.network_id),
}
"""Other cuts, into parts that do not overlap: their names in order (none given: sorted), and a record's."""
RESAMPLES = 2_000
CONFIDENCE = 0.95


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
    num_tokens: int | None
    """Tokens answered, stop token included; None where a file of responses does not say."""
    verified: bool | None = None
    """planning: whether the route can be ridden on the true network; None for other kinds, or where not checked."""
    map_score: float | None = None
    """planning: as the published scripts count it; None for other kinds, or where there is no reference route."""
    map_score_paper: float | None = None

    @property
    def group(self) -> str:
        """The narrowest of ``GROUPS``: the kind, or for planning whether the route needs a transfer."""
        if self.kind != "planning":
            return self.kind
        return TRANSFER if self.transfers_required else DIRECT


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over n questions with its 95 % interval; its bounds are NaN where these are about one map only."""

    value: float
    low: float
    high: float
    n: int

    @property
    def interval(self) -> list[float] | None:
        """Both bounds as JSON values; None where there is one map only."""
        return [self.low, self.high] if math.isfinite(self.low) else None


@dataclass(frozen=True)
class Evaluation:
    """The answers to a held-out set.

    A *metric* is one of ``METRICS``, or one of ``GROUPS`` for that group's plain accuracy.
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
        """Tokens answered, stop tokens included, where they are known."""
        return sum(record.num_tokens or 0 for record in self.records)

    @property
    def total_weight(self) -> float:
        """Σ weight: 576 on ReasonMap's published test split, 2,212 on ReasonMap-Plus's."""
        return sum(record.weight for record in self.records)

    @property
    def response_length(self) -> float:
        """Mean length of an answer: in tokens where all are known, else NaN."""
        known = [record.num_tokens for record in self.records if record.num_tokens is not None]
        return sum(known) / len(known) if len(known) == len(self.records) else float("nan")

    def where(self, wanted: Callable[[Record], bool]) -> Evaluation | None:
        """The answers for which ``wanted`` holds; None where there are none."""
        chosen = tuple(record for record in self.records if wanted(record))
        return Evaluation(chosen) if chosen else None

    def parts(self) -> dict[str, dict[str, Evaluation]]:
        """The answers cut by benchmark, kind, map level, transfers (planning) and city; parts without answers are left
        out."""
        benchmarks = {name: self.where(wanted) for name, wanted in BENCHMARKS.items()}
        found = {"benchmark": {name: part for name, part in benchmarks.items() if part is not None}}
        for cut, (names, name_of) in _CUTS.items():
            named: dict[str, list[Record]] = {}
            for record in self.records:
                named.setdefault(name_of(record), []).append(record)
            found[cut] = {name: Evaluation(tuple(named[name])) for name in names or sorted(named) if name in named}
        return {cut: parts for cut, parts in found.items() if parts}

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
        # Not splitlines: answers may hold other line separators than the newline, unescaped.
        for number, line in enumerate(path.read_text(encoding="utf-8").removesuffix("\n").split("\n"), 1):
            try:
                records.append(Record(**json.loads(line)))
            except (ValueError, TypeError, RecursionError) as error:
                raise DataError(f"{path}, line {number}: not an evaluation record: {error}") from None
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
        if metric in GROUPS:
            share = np.array([metric in (r.kind, r.group) for r in self.records], dtype=np.float64)
            return share * np.array([record.correct for record in self.records]), share
        if metric not in METRICS:
            raise ValueError(f"metric {metric!r}: choose one of {', '.join((*METRICS, *GROUPS))}")
        field = {"weighted_accuracy": "correct", "accuracy": "correct", "map_score_unweighted": "map_score"}
        values = [getattr(record, field.get(metric, metric)) for record in self.records]
        weighted = metric in ("weighted_accuracy", "map_score", "map_score_paper")
        share = np.array(
            [
                0.0 if value is None else record.weight if weighted else 1.0
                for record, value in zip(self.records, values, strict=True)
            ]
        )
        return share * np.array([float(value or 0) for value in values]), share

    def _bootstrap(self, numerator: Array, denominator: Array, seed: int) -> Array:
        """[at most RESAMPLES] resampled ratios; those that drew no question of the metric are left out."""
        count, index = self._maps
        in_map = np.bincount(index, denominator, count)
        if np.count_nonzero(in_map) < 2:  # every draw would give the same
            return np.empty(0)
        draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
        above, below = draws @ np.bincount(index, numerator, count), draws @ in_map
        return above[below > 0] / below[below > 0]


def _bounds(samples: Array) -> tuple[float, float]:
    if not len(samples):
        return float("nan"), float("nan")
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(samples, [tail, 100 - tail])
    return float(low), float(high)
