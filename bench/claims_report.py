"""What ``bench/claims.py`` found: means with intervals over seeds, paired differences, a picture, and a paragraph.

Intervals are 95 % Student intervals over seeds. A seed has its own maps, so the spread over seeds holds that of maps,
questions and training alike. Differences are taken within a seed, where both arms saw the same maps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from records import write_between

Row = Mapping[str, Any]
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""97.5 % points of Student's distribution by degrees of freedom."""
START, END = "<!-- claims:start -->", "<!-- claims:end -->"


@dataclass(frozen=True)
class Metric:
    """A column: which part of the questions, which of its metrics, and its unit."""

    name: str
    part: str
    metric: str
    scale: float = 100.0

    def of(self, row: Row, world: str) -> float:
        """The value of a row in the column's unit."""
        return self.scale * float(row["tested"][world][self.part][self.metric])


PLANNING = Metric("planning (ReasonMap)", "ReasonMap", "weighted_accuracy")
PLUS = Metric("Plus", "ReasonMap-Plus", "weighted_accuracy")
WHOLE = Metric("all", "all", "weighted_accuracy")
MAIN = (PLANNING, PLUS, WHOLE)
COLUMNS = (
    *MAIN,
    Metric("counting", "Plus, counting", "weighted_accuracy"),
    Metric("true/false", "Plus, true/false", "weighted_accuracy"),
    Metric("verified routes", "ReasonMap", "verified"),
    Metric("map score", "ReasonMap", "map_score", 1.0),
)


@dataclass(frozen=True)
class Claim:
    """``better`` should beat ``worse``, both tested on ``world``, in what ``about`` names."""

    text: str
    better: str
    worse: str
    about: Metric = WHOLE
    world: str = "transit"


CLAIMS = (
    Claim("RL teaches planning", "RL on planning", "base", PLANNING),
    Claim("The detailed reward helps RL on planning", "RL on planning + reward", "RL on planning", PLANNING),
    Claim("SFT on Plus teaches Plus", "SFT", "base", PLUS),
    Claim("Plus data help planning: RL on all beats RL on planning", "RL on all", "RL on planning", PLANNING),
    Claim("RewardMap beats RL on planning, at planning", "RewardMap", "RL on planning", PLANNING),
    Claim("RewardMap beats RL on planning, on everything", "RewardMap", "RL on planning"),
    Claim(
        "Earlier stages help planning, at as many questions about planning",
        "RL in stages, no replay",
        "RL on planning, half the updates",
        PLANNING,
    ),
    Claim("RewardMap beats SFT → RL", "RewardMap", "SFT → RL"),
    Claim("RewardMap beats RL on all", "RewardMap", "RL on all"),
    Claim("The difficulty-aware reward with detail helps", "RL on all + reward", "RL on all"),
    Claim("Stages help", "RL in stages", "RL on all"),
    Claim("Replay helps", "RL in stages", "RL in stages, no replay"),
    Claim("Both together beat the reward alone", "RewardMap", "RL on all + reward"),
    Claim("Both together beat stages alone", "RewardMap", "RL in stages"),
    Claim("Weights act on the advantage, not on the reward", "RewardMap", "RewardMap, weights on the reward"),
    Claim("The printed reward beats the released one", "RewardMap, paper reward", "RewardMap"),
    Claim("The graph reward beats the released one", "RewardMap, graph reward", "RewardMap"),
    Claim("Training on transit maps helps on the grid", "RewardMap", "base", world="grid"),
    Claim("Training on the grid helps on transit maps", "RewardMap on the grid", "base"),
    Claim("Cold: RL on planning teaches planning", "cold RL on planning", "cold base", PLANNING),
    Claim(
        "Cold: the detailed reward helps RL on planning",
        "cold RL on planning + reward",
        "cold RL on planning",
        PLANNING,
    ),
    Claim("Cold: RewardMap beats RL on planning, at planning", "cold RewardMap", "cold RL on planning", PLANNING),
    Claim("Cold: RewardMap beats RL on planning, on everything", "cold RewardMap", "cold RL on planning"),
    Claim(
        "Cold: earlier stages help planning, at as many questions about planning",
        "cold RL in stages, no replay",
        "cold RL on planning, half the updates",
        PLANNING,
    ),
    Claim("Cold: RewardMap beats SFT → RL, at planning", "cold RewardMap", "cold SFT → RL", PLANNING),
    Claim("Cold: RewardMap beats RL on all", "cold RewardMap", "cold RL on all"),
    Claim("Cold: stages help", "cold RL in stages", "cold RL on all"),
    Claim("Cold: both together beat stages alone", "cold RewardMap", "cold RL in stages"),
)

TABLES = (
    ("Tested on transit maps", "transit", False),
    ("From the cold start, tested on transit maps", "transit", True),
    ("Tested on the grid world", "grid", False),
)
"""Heading, world, and whether of the cold arms."""


@dataclass(frozen=True)
class Interval:
    """A mean over seeds; the bounds are NaN for one seed."""

    value: float
    low: float
    high: float
    seeds: int

    @property
    def verdict(self) -> str:
        """Of a difference: does its interval lie above 0, below it, or neither?"""
        return "holds" if self.low > 0 else "the reverse holds" if self.high < 0 else "not resolved"

    def text(self, sign: str = "") -> str:
        value = f"{self.value:{sign}.1f}"
        return value if math.isnan(self.low) else f"{value} [{self.low:{sign}.1f}, {self.high:{sign}.1f}]"


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % Student interval."""
    array = np.array(values, dtype=np.float64)
    mean, count = float(array.mean()), len(array)
    if count < 2:
        return Interval(mean, math.nan, math.nan, count)
    half = STUDENT.get(count - 1, 1.96) * float(array.std(ddof=1)) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


def values(rows: Sequence[Row], arm: str, metric: Metric, world: str) -> dict[int, float]:
    """By seed, where the arm was tested on that world."""
    return {row["seed"]: metric.of(row, world) for row in rows if row["arm"] == arm and world in row["tested"]}


def difference(rows: Sequence[Row], claim: Claim, metric: Metric) -> Interval | None:
    """Paired by seed; None where no seed has both arms."""
    better, worse = (values(rows, arm, metric, claim.world) for arm in (claim.better, claim.worse))
    shared = sorted(better.keys() & worse.keys())
    return interval([better[seed] - worse[seed] for seed in shared]) if shared else None


def arms_on(rows: Sequence[Row], world: str) -> list[str]:
    """The arms tested on a world, in the order of the rows."""
    return list(dict.fromkeys(row["arm"] for row in rows if world in row["tested"]))


def is_cold(arm: str) -> bool:
    return arm.startswith("cold ")


def markdown(rows: Sequence[Row]) -> str:
    """The tables and what follows from them."""
    lines = []
    for heading, world, cold in TABLES:
        arms = [arm for arm in arms_on(rows, world) if is_cold(arm) == cold]
        if arms:
            lines += [f"{heading}:", ""]
            lines += _table(("arm", *(metric.name for metric in COLUMNS), "seeds"), _arm_rows(rows, arms, world))
    head = ("claim", *(metric.name for metric in MAIN), "about", "verdict")
    lines += ["Paired differences in points:", "", *_table(head, _claim_rows(rows)), paragraph(rows)]
    return "\n".join(lines)


def _arm_rows(rows: Sequence[Row], arms: Sequence[str], world: str) -> Iterator[tuple[str, ...]]:
    for arm in arms:
        found = [values(rows, arm, metric, world) for metric in COLUMNS]
        yield (arm, *(interval(list(by_seed.values())).text() for by_seed in found), str(len(found[0])))


def _claim_rows(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    for claim in CLAIMS:
        about = difference(rows, claim, claim.about)
        if about is None:
            continue
        shown = (difference(rows, claim, metric) for metric in MAIN)
        cells = (found.text("+") if found else "–" for found in shown)
        name = f"{claim.text} ({claim.better} − {claim.worse})"
        yield (name, *cells, claim.about.name, about.verdict if about.seeds > 1 else "one seed")


def _table(head: Sequence[str], rows: Iterator[tuple[str, ...]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def paragraph(rows: Sequence[Row], intervals: bool = True) -> str:
    """What holds, what does not, and what these runs cannot tell."""
    said: dict[str, list[str]] = {"holds": [], "the reverse holds": [], "not resolved": []}
    for claim in CLAIMS:
        found = difference(rows, claim, claim.about)
        if found is not None and found.seeds > 1:
            points = f"{claim.about.name} {found.text('+')}" if intervals else f"{found.value:+.1f}"
            said[found.verdict].append(f"{claim.text} ({points})")
    parts = [
        f"- {lead}: {'; '.join(said[verdict])}."
        for verdict, lead in (
            ("holds", "**Holds**, the interval of the paired difference above 0"),
            ("the reverse holds", "**The reverse holds**, the interval below 0"),
            ("not resolved", "**Not resolved** by these seeds, the interval across 0"),
        )
        if said[verdict]
    ]
    return "\n".join(parts) or "One seed tells nothing about what holds."


def draw(rows: Sequence[Row], path: Path) -> None:
    """One dot a seed, mean and interval of every arm, for the three main metrics on transit maps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from rewardmap.files import replacing
    from rewardmap.report.curves import ACCENT, AFTER, GRID, INK, plain_axes

    arms = arms_on(rows, "transit")
    figure = Figure(figsize=(13, 1.6 + 0.36 * len(arms)), dpi=120, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(MAIN), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, MAIN, strict=True):
        plain_axes(axes)
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        for place, arm in enumerate(arms):
            found = list(values(rows, arm, metric, "transit").values())
            mean = interval(found)
            colour = ACCENT if arm in ("RewardMap", "cold RewardMap") else AFTER
            axes.plot(found, [place] * len(found), "o", color=colour, alpha=0.3, markersize=5, markeredgewidth=0)
            if not math.isnan(mean.low):
                axes.plot([mean.low, mean.high], [place, place], color=colour, linewidth=1.8)
            axes.plot(mean.value, place, "|", color=colour, markersize=13, markeredgewidth=2.4)
        if any(map(is_cold, arms)):
            axes.axhline(sum(not is_cold(arm) for arm in arms) - 0.5, color=INK, linewidth=0.8)
        axes.set_title(metric.name, loc="left", fontsize=11, color=INK)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f} %")
    panels[0].set_yticks(range(len(arms)), arms, fontsize=9.5, color=INK)
    panels[0].set_ylim(len(arms) - 0.5, -0.5)
    with replacing(path) as temporary:
        figure.savefig(temporary)


def publish(root: Path, rows: Sequence[Row], facts: Mapping[str, Any]) -> None:
    """The result file, the picture, the table in docs/claims.md and README's section."""
    from rewardmap.files import write_text

    result = json.dumps({**facts, "rows": list(rows)}, indent=1, ensure_ascii=False) + "\n"
    write_text(root / "bench" / "results" / "claims.json", result)
    draw(rows, root / "docs" / "claims" / "claims.png")
    tables = markdown(rows)
    write_between(root / "docs" / "claims.md", START, END, f"![Every arm](claims/claims.png)\n\n{tables}")
    picture = "![Every arm: one dot a seed, mean and 95 % interval](docs/claims/claims.png)"
    write_between(root / "README.md", START, END, f"{picture}\n\n{paragraph(rows, intervals=False)}")
