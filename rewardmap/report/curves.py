"""The picture of a run: reward and accuracy over steps with their stages, and held-out accuracy."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewardmap.evaluate import DIRECT, TRANSFER, Evaluation
from rewardmap.files import replacing
from rewardmap.types import KINDS

INK, MUTED, GRID = "#1c2430", "#5d6673", "#e6e8ec"
BANDS = ("#eef3fb", "#f7f2e8", "#ecf6f0", "#f6eef5")
BEFORE, AFTER, ACCENT = "#b4bdc9", "#1a5fd0", "#d61f2c"
COLOURS = dict(zip(KINDS, ("#1a5fd0", "#7fb0f2", "#12804a", "#74c69d", "#c9d96f", "#e07a1f"), strict=True))
BARS = ("weighted_accuracy", *KINDS, DIRECT, TRANSFER, "format_valid")
NAMES = {
    "weighted_accuracy": "all, weighted",
    DIRECT: "– direct",
    TRANSFER: "– with transfer",
    "format_valid": "valid format",
}


def draw_curves(
    rows: Sequence[Mapping[str, Any]],
    evaluations: Mapping[str, Evaluation],
    path: Path,
    along: Mapping[int, Evaluation] | None = None,
) -> None:
    """Draw a PNG.

    Args:
        rows: of ``metrics.jsonl``; those without ``reward`` (supervised steps) only widen their stage's band.
        evaluations: any of ``before``, ``after`` and ``text_only``.
        along: held-out answers by step, drawn below as curves.

    Raises:
        OSError: naming ``path``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = 3 if along else 2
    figure = Figure(figsize=(13, 3.2 * panels), dpi=120, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(panels, 2, width_ratios=(1.35, 1), hspace=0.06)
    reward = figure.add_subplot(grid[0, 0])
    accuracy, *held_out = [figure.add_subplot(grid[row, 0], sharex=reward) for row in range(1, panels)]
    bars = figure.add_subplot(grid[:, 1])
    for axes in (reward, accuracy, *held_out, bars):
        _style(axes)
    _curve(reward, rows, "reward", AFTER)
    _curve(accuracy, rows, "accuracy", ACCENT)
    reward.set_title("mean reward of the sampled answers", loc="left", fontsize=11, color=INK, pad=32)
    accuracy.set_title("share of the sampled answers that are right", loc="left", fontsize=11, color=INK)
    for axes in held_out:
        axes.set_title("share right on held-out maps, by kind", loc="left", fontsize=11, color=INK, pad=24)
        _along(axes, along or {})
    for axes in (accuracy, *held_out):
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    for axes in (reward, accuracy, *held_out):
        _bands(axes, rows, label=axes is reward)
        axes.tick_params(labelbottom=False)
    if along:
        reward.set_xlim(left=min(reward.get_xlim()[0], min(along) - 0.5))
    lowest = (accuracy, *held_out)[-1]
    lowest.tick_params(labelbottom=True)
    lowest.set_xlabel("step", color=MUTED)
    lowest.xaxis.set_major_locator(MaxNLocator(integer=True))
    _bars(bars, evaluations)
    with replacing(path) as temporary:
        figure.savefig(temporary)


def smooth(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Centred mean over ``width`` neighbours, fewer at the ends: [n] -> [n]."""
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def stage_spans(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, int, int]]:
    """(name, first step, last step) of each run of rows of one stage."""
    start = 0
    for index in range(1, len(rows) + 1):
        if index == len(rows) or rows[index]["stage"] != rows[start]["stage"]:
            yield rows[start]["stage"], rows[start]["step"], rows[index - 1]["step"]
            start = index


def plain_axes(axes: Any) -> None:
    """One line below, small muted figures."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(colors=MUTED, length=0, labelsize=9)
    axes.set_axisbelow(True)


def _style(axes: Any) -> None:
    plain_axes(axes)
    axes.grid(axis="y", color=GRID, linewidth=0.8)


def _curve(axes: Any, rows: Sequence[Mapping[str, Any]], key: str, colour: str) -> None:
    """Smoothed within a stage only: the kinds change between stages, and so does what a mean means."""
    for _, first, last in stage_spans(rows):
        part = [row for row in rows if first <= row["step"] <= last and row.get(key) is not None]
        if not part:
            continue
        steps = [row["step"] for row in part]
        values = np.array([row[key] for row in part], dtype=np.float64)
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
        width = min(2 * (len(values) // 16) + 1, 41)
        marker = "o" if len(values) == 1 else None
        axes.plot(steps, smooth(values, width), color=colour, linewidth=2, solid_capstyle="round", marker=marker)


def _along(axes: Any, evaluations: Mapping[int, Evaluation]) -> None:
    """One thin line a kind, named at its end, and the weighted accuracy with its intervals."""
    steps = list(evaluations)
    kinds = [kind for kind in KINDS if any(kind in found.groups for found in evaluations.values())]
    for kind in kinds:
        values = [found.estimate(kind).value for found in evaluations.values()]
        axes.plot(steps, values, color=COLOURS[kind], linewidth=1.3, marker="o", markersize=3, label=kind)
    estimates = [found.estimate() for found in evaluations.values()]
    values = [estimate.value for estimate in estimates]
    errors = np.array([[e.value - e.low for e in estimates], [e.high - e.value for e in estimates]]).clip(min=0)
    line = {"color": INK, "linewidth": 2, "marker": "o", "markersize": 4, "elinewidth": 1.1, "capsize": 2.5}
    axes.errorbar(steps, values, errors, label="all, weighted", **line)
    row = {"ncols": 7, "fontsize": 8.5, "columnspacing": 1.0, "handlelength": 1.3, "handletextpad": 0.5}
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1), frameon=False, **row)


def _bands(axes: Any, rows: Sequence[Mapping[str, Any]], label: bool) -> None:
    spans = list(stage_spans(rows))
    if not spans:
        return
    whole = spans[-1][2] - spans[0][1] + 1
    axes.set_xlim(spans[0][1] - 0.5, spans[-1][2] + 0.5)
    for number, (name, first, last) in enumerate(spans):
        axes.axvspan(first - 0.5, last + 0.5, color=BANDS[number % len(BANDS)], linewidth=0, zorder=0)
        letters = (last - first + 1) / whole / 0.0095
        lines = textwrap.fill(name, max(1, int(letters)), break_long_words=False)
        if not label:
            continue
        style = {"xycoords": ("data", "axes fraction"), "ha": "center", "fontsize": 9, "color": MUTED}
        if max(map(len, lines.split("\n"))) <= letters and lines.count("\n") < 2:
            axes.annotate(lines, ((first + last) / 2, 1.02), **style)
        else:  # a narrow band carries its name upright
            axes.annotate(name, ((first + last) / 2, 0.03), rotation=90, va="bottom", **style)


def _bars(axes: Any, evaluations: Mapping[str, Evaluation]) -> None:
    axes.set_title("held-out maps, 95 % intervals", loc="left", fontsize=11, color=INK, pad=32)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    shown = [name for name in ("before", "after") if name in evaluations]
    asked = {group for name in shown for group in evaluations[name].groups}
    metrics = [m for m in BARS if m in asked or m in ("weighted_accuracy", "format_valid")]
    places = np.arange(len(metrics), dtype=np.float64)
    height = 0.76 / max(1, len(shown))
    for number, name in enumerate(shown):
        estimates = [evaluations[name].estimate(metric) for metric in metrics]
        values = np.array([estimate.value for estimate in estimates])
        # NaN, where there is no interval, draws none.
        errors = np.array([[e.value - e.low for e in estimates], [e.high - e.value for e in estimates]]).clip(min=0)
        axes.barh(
            places + height * (number + 0.5) - 0.38,
            values,
            height * 0.92,
            color=AFTER if name == "after" else BEFORE,
            xerr=errors,
            error_kw={"ecolor": INK, "elinewidth": 1.1, "capsize": 2.5},
            label=name,
        )
    if "text_only" in evaluations:
        text_only = evaluations["text_only"]
        blind = [text_only.estimate(metric).value for metric in metrics]
        axes.scatter(
            blind, places, marker="D", s=22, color=ACCENT, zorder=4, clip_on=False, label="after, maps swapped"
        )
    axes.set_yticks(places, [NAMES.get(metric, metric) for metric in metrics], fontsize=9.5, color=INK)
    axes.set_ylim(len(metrics) - 0.4, -0.6)
    if evaluations:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, fontsize=9)
