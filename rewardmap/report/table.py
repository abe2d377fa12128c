"""The closing table: ``report.json`` for programs, ``report.md`` and the screen for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

import rewardmap
from rewardmap.evaluate import DIRECT, TRANSFER, Estimate, Evaluation, TextPrior
from rewardmap.files import write_text
from rewardmap.report.parts import columns, parts_markdown, parts_report, parts_table
from rewardmap.types import KINDS

NAMES = {
    "weighted_accuracy": "weighted",
    DIRECT: "– direct",
    TRANSFER: "– transfer",
    "format_valid": "format",
}
METRICS = ("weighted_accuracy", *KINDS, DIRECT, TRANSFER, "format_valid")
HEAD = ("%", "before", "after", "gain", "swapped", "prior", "n")
NONE = "–"


def write_report(
    run_dir: Path,
    *,
    after: Evaluation,
    before: Evaluation | None = None,
    text_only: Evaluation | None = None,
    prior: TextPrior | None = None,
    seconds: float,
    tokens_per_second: float | None,
    phases: Mapping[str, float],
    peak_rss_bytes: int,
    seed: int | None,
    steps: int | None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Write ``report.json`` and ``report.md`` into ``run_dir`` and print the table.

    Args:
        after: held-out answers of the trained policy; ``before``: of the warm start; ``text_only``: of the trained
            policy with maps swapped between questions.
        prior: what the best answers that ignore the picture score.
        seconds: wall clock of the whole run; ``phases``: its parts.
        tokens_per_second: sampled tokens per second of rollout; None where nothing was sampled.
        steps: made, of one update or several; None, as for ``seed``: not those of a run.

    Returns:
        What ``report.json`` holds: fractions in 0..1, seconds, null for what was not measured.

    Raises:
        OSError: naming the file that could not be written.
    """
    report = {
        "weighted_accuracy": {
            "before": _value(before, "weighted_accuracy"),
            "after": after.weighted_accuracy,
            "text_only": _value(text_only, "weighted_accuracy"),
            "text_prior": prior.weighted_accuracy if prior else None,
        },
        "kinds": {kind: _pair(before, after, kind) for kind in KINDS if kind in after.groups},
        "planning_routes": {
            group.removeprefix("planning/"): _pair(before, after, group)
            for group in (DIRECT, TRANSFER)
            if group in after.groups
        },
        "format_valid": {"before": _value(before, "format_valid"), "after": after.format_valid},
        "intervals": {
            name: {metric: evaluation.estimate(metric).interval for metric in _metrics(after)}
            for name, evaluation in (("before", before), ("after", after), ("text_only", text_only))
            if evaluation is not None
        },
        "gain": {metric: _gain(before, after, metric) for metric in _metrics(after)} if before else None,
        "text_prior": asdict(prior) if prior else None,
        "gain_above_floor": _gain_above_floor(before, after, prior),
        "seconds": seconds,
        "tokens_per_second": tokens_per_second,
        "seconds_by_phase": dict(phases),
        "peak_rss_bytes": peak_rss_bytes,
        "parts": parts_report(after),
        "questions": len(after.records),
        "maps": len({record.network_id for record in after.records}),
        "steps": steps,
        "seed": seed,
        "version": rewardmap.__version__,
    }
    write_text(run_dir / "report.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    footer = footer_lines(report)
    rows = closing_rows(after, before, text_only, prior)
    write_text(run_dir / "report.md", _markdown(rows, footer) + "\n" + parts_markdown(after))
    if console is not None:
        for table in (_rich(closing_rows(after, before, text_only, prior, digits=0)), parts_table(after)):
            console.print()
            console.print(table)
        console.print()
        for line in footer:
            console.print(line, style="dim", highlight=False)
    return report


def closing_rows(
    after: Evaluation,
    before: Evaluation | None = None,
    text_only: Evaluation | None = None,
    prior: TextPrior | None = None,
    digits: int = 1,
) -> list[tuple[str, ...]]:
    """The closing table: cells under ``HEAD``, a row for each metric; ``digits`` of the intervals."""
    return [_row(metric, before, after, text_only, prior, digits) for metric in _metrics(after)]


def _gain_above_floor(before: Evaluation | None, after: Evaluation, prior: TextPrior | None) -> float | None:
    """Weighted accuracy above the larger of the warm start and the text prior; null where neither is known."""
    floors = [side.weighted_accuracy for side in (before, prior) if side is not None]
    return after.weighted_accuracy - max(floors) if floors else None


def _metrics(evaluation: Evaluation) -> list[str]:
    always = ("weighted_accuracy", "format_valid")
    return [metric for metric in METRICS if metric in always or metric in evaluation.groups]


def _value(evaluation: Evaluation | None, metric: str) -> float | None:
    return evaluation.estimate(metric).value if evaluation else None


def _pair(before: Evaluation | None, after: Evaluation, group: str) -> dict[str, float | int | None]:
    estimate = after.estimate(group)
    return {"before": _value(before, group), "after": estimate.value, "n": estimate.n}


def _gain(before: Evaluation, after: Evaluation, metric: str) -> dict[str, Any]:
    gain = after.gain_over(before, metric)
    return {"value": gain.value, "interval": gain.interval}


def _row(
    metric: str,
    before: Evaluation | None,
    after: Evaluation,
    text_only: Evaluation | None,
    prior: TextPrior | None,
    digits: int,
) -> tuple[str, ...]:
    """Cells under HEAD; ``digits`` after the point in the brackets (the screen is narrow)."""
    blind: float | None = None
    if prior is not None:
        blind = prior.weighted_accuracy if metric == "weighted_accuracy" else prior.kinds.get(metric)
    return (
        NAMES.get(metric, metric),
        _percent(before.estimate(metric), digits) if before else NONE,
        _percent(after.estimate(metric), digits),
        _percent(after.gain_over(before, metric), digits, sign="+") if before else NONE,
        f"{100 * text_only.estimate(metric).value:.1f}" if text_only else NONE,
        NONE if blind is None else f"{100 * blind:.1f}",
        str(after.estimate(metric).n),
    )


def _percent(estimate: Estimate, digits: int, sign: str = "") -> str:
    value = f"{100 * estimate.value:{sign}.1f}"
    if estimate.interval is None:
        return value
    return f"{value} [{100 * estimate.low:{sign}.{digits}f}…{100 * estimate.high:{sign}.{digits}f}]"


def footer_lines(report: Mapping[str, Any]) -> list[str]:
    """What stands below the closing table."""
    gain = report["gain_above_floor"]
    phases = sorted(report["seconds_by_phase"].items(), key=lambda item: -item[1])
    speed = report["tokens_per_second"]
    facts = [
        f"{report['questions']} questions about {report['maps']} held-out maps",
        *([] if report["steps"] is None else [f"{report['steps']} steps"]),
        f"{report['seconds']:.0f} s",
        *([] if speed is None else [f"{speed:.0f} sampled tokens/s"]),
        f"peak memory {report['peak_rss_bytes'] / 2**20:.0f} MiB",
        *([] if report["seed"] is None else [f"seed {report['seed']}"]),
        f"rewardmap {report['version']}",
    ]
    lines = [" · ".join(facts)]
    if gain is not None:
        lines.append(f"weighted accuracy above the larger of before and prior: {100 * gain:+.1f} points")
    phases = [(name, seconds) for name, seconds in phases if seconds >= 0.05]
    if phases:
        lines.append("time by phase: " + " · ".join(f"{name} {seconds:.1f} s" for name, seconds in phases))
    lines.append(
        "Accuracy on held-out maps, weighted as ReasonMap does, then by kind. Brackets: 95 % bootstrap "
        "intervals over maps. Swapped: the trained policy, every question with another map's picture. Prior: "
        "the best answers that ignore the picture. Format: answers in the asked form."
    )
    return lines


def _markdown(rows: list[tuple[str, ...]], footer: list[str]) -> str:
    lines = ["| " + " | ".join(HEAD) + " |", "|---|" + "---:|" * (len(HEAD) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, "", *(f"{line}\n" for line in footer)])


def _rich(rows: list[tuple[str, ...]]) -> Table:
    """Fits 80 columns; on a narrower screen cells take two lines."""
    table = Table(*columns(HEAD), box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for number, row in enumerate(rows):
        table.add_row(*row, style="bold" if number == 0 else "", end_section=number in (0, len(rows) - 2))
    return table
