"""The picture of a curriculum: what was asked at each step, where gates and pools stood, and what each stage set."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rewardmap.files import replacing
from rewardmap.report.curves import ACCENT, AFTER, BANDS, COLOURS, GRID, INK, MUTED, plain_axes, stage_spans
from rewardmap.types import KINDS

POOL_COLOURS = ("#264653", "#2a9d8f", "#8ab17d", "#e9c46a", "#f4a261", "#e76f51", "#9b5de5", "#577590", "#c9ada7")
MOST_POOLS = 9
"""Pools drawn apart; the smallest beyond them are summed."""
MOST_BINS = 150
"""Bars over the whole run; a bar is the mean of its steps, and never of two stages."""
LANES: tuple[tuple[str, Callable[[Mapping[str, Any]], str]], ...] = (
    ("trained by", lambda row: f"{row['reward_mode']} reward" if "reward_mode" in row else "supervised"),
    ("answers each", lambda row: str(row.get("group_size", "–"))),
    ("learning rate", lambda row: f"{row['learning_rate']:g}" if "learning_rate" in row else "–"),
)

Row = Mapping[str, Any]


def draw_curriculum(rows: Sequence[Row], path: Path) -> None:
    """Draw a PNG from the rows of ``metrics.jsonl``; nothing is drawn where there are none.

    Raises:
        OSError: naming ``path``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if not rows:
        return
    gates = any(row.get("gate") is not None for row in rows)
    pools = any(row.get("pools") for row in rows)
    heights = [2.4, *([1.5] if gates else []), *([1.9] if pools else []), 1.0]
    figure = Figure(figsize=(13, 1.7 + 1.15 * sum(heights)), dpi=120, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0].tolist()
    for axes in panels:
        plain_axes(axes)
        _stages(axes, rows, named=axes is panels[0])
    remaining = iter(panels)
    _asked(next(remaining), rows)
    if gates:
        _gate(next(remaining), rows)
    if pools:
        _pools(next(remaining), rows)
    _lanes(next(remaining), rows)
    panels[-1].set_xlabel("step", color=MUTED)
    panels[-1].set_xlim(rows[0]["step"] - 0.5, rows[-1]["step"] + 0.5)
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    with replacing(path) as temporary:
        figure.savefig(temporary)


def bins(rows: Sequence[Row]) -> list[list[Row]]:
    """Consecutive rows, at most ``MOST_BINS`` groups and one more a stage, none across two stages."""
    size = -(-len(rows) // MOST_BINS)
    groups: list[list[Row]] = []
    for row in rows:
        if groups and len(groups[-1]) < size and groups[-1][-1]["stage"] == row["stage"]:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _title(axes: Any, text: str, above: int = 6) -> None:
    axes.set_title(text, loc="left", fontsize=10.5, color=INK, pad=above)


def _stages(axes: Any, rows: Sequence[Row], named: bool) -> None:
    spans = list(stage_spans(rows))
    whole = spans[-1][2] - spans[0][1] + 1
    for number, (name, first, last) in enumerate(spans):
        if number:
            axes.axvline(first - 0.5, color=INK, linewidth=0.9, alpha=0.55, zorder=3)
        if not named:
            continue
        letters = max(1, int((last - first + 1) / whole * 165))
        lines = textwrap.wrap(name, max(3, letters), break_long_words=False) or [""]
        style = {"xycoords": ("data", "axes fraction"), "ha": "center", "fontsize": 9, "color": MUTED}
        if max(map(len, lines)) <= letters and len(lines) <= 2:
            axes.annotate("\n".join(lines), ((first + last) / 2, 1.02), va="bottom", **style)
        else:  # a narrow stage carries its name upright, on its bars
            style |= {"color": INK, "bbox": {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1.5}}
            axes.annotate(name, ((first + last) / 2, 0.05), rotation=90, va="bottom", **style)


def _stack(axes: Any, groups: Sequence[Sequence[Row]], parts: Mapping[str, np.ndarray], colours: Sequence[str]) -> None:
    """Bars of height 1 in all over the steps of each group."""
    left = [group[0]["step"] - 0.5 for group in groups]
    width = [group[-1]["step"] - group[0]["step"] + 1 for group in groups]
    floor = np.zeros(len(groups))
    for (name, values), colour in zip(parts.items(), colours, strict=True):
        axes.bar(left, values, width, floor, align="edge", color=colour, linewidth=0, label=name)
        floor = floor + values
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.legend(loc="center left", bbox_to_anchor=(1.005, 0.5), frameon=False, fontsize=8.5, reverse=True)


def _asked(axes: Any, rows: Sequence[Row]) -> None:
    groups = bins(rows)
    counts = {
        kind: np.array([sum(row.get("asked", {}).get(kind, 0) for row in group) for group in groups], dtype=np.float64)
        for kind in KINDS
    }
    whole = np.maximum(sum(counts.values()), 1)
    shown = {kind: values / whole for kind, values in counts.items() if values.any()}
    _stack(axes, groups, shown, [COLOURS[kind] for kind in shown])
    _title(axes, "questions asked, by kind", above=32)


def _gate(axes: Any, rows: Sequence[Row]) -> None:
    for number, (_, first, last) in enumerate(stage_spans(rows)):
        part = [row for row in rows if first <= row["step"] <= last and row.get("gate") is not None]
        if not part:
            continue
        axes.axvspan(first - 0.5, last + 0.5, color=BANDS[number % len(BANDS)], linewidth=0, zorder=0)
        axes.plot([row["step"] for row in part], [row["gate"] for row in part], color=AFTER, linewidth=1.8)
        aim = part[-1]["advance_at"]
        axes.hlines(aim, first - 0.5, last + 0.5, color=ACCENT, linewidth=1.2, linestyle="--")
        if part[-1]["gate"] >= aim:
            axes.plot(part[-1]["step"], part[-1]["gate"], "o", color=ACCENT, markersize=5, zorder=4)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    _title(axes, "gates: right answers to the stage's own questions, and where the next stage begins (dashed)")


def _pools(axes: Any, rows: Sequence[Row]) -> None:
    groups = bins(rows)
    names = dict.fromkeys(name for row in rows for name in row.get("pools") or {})
    shares = {
        name: np.array([np.mean([(row.get("pools") or {}).get(name, 0.0) for row in group]) for group in groups])
        for name in names
    }
    largest = sorted(shares, key=lambda name: -shares[name].max())
    kept = largest if len(largest) <= MOST_POOLS else largest[: MOST_POOLS - 1]
    shown = {name: shares[name] for name in names if name in kept}
    if len(kept) < len(largest):
        rest = [name for name in largest if name not in kept]
        shown[f"{len(rest)} others"] = np.sum([shares[name] for name in rest], axis=0)
    _stack(axes, groups, shown, POOL_COLOURS[: len(shown)])
    _title(axes, "difficulty pools of adaptive stages: share of each")


def _lanes(axes: Any, rows: Sequence[Row]) -> None:
    whole = rows[-1]["step"] - rows[0]["step"] + 1
    by_step = {row["step"]: row for row in rows}
    for lane, (_, value) in enumerate(LANES):
        seen: dict[str, str] = {}
        for _, first, last in stage_spans(rows):
            text = value(by_step[last])  # past a warm-up
            colour = seen.setdefault(text, BANDS[len(seen) % len(BANDS)])
            axes.barh(lane, last - first + 1, 0.86, first - 0.5, color=colour, edgecolor="white", linewidth=1.5)
            if len(text) <= (last - first + 1) / whole * 150:
                axes.text((first + last) / 2, lane, text, ha="center", va="center", fontsize=8.5, color=INK)
    axes.set_yticks(range(len(LANES)), [name for name, _ in LANES])
    axes.set_ylim(len(LANES) - 0.5, -0.5)
    axes.spines["bottom"].set_visible(False)
    _title(axes, "what each stage sets")
