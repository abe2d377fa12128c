"""An evaluation cut into parts: by benchmark, kind, map level, transfers and city, with sums of weights and lengths."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.table import Column, Table

from rewardmap.evaluate import Estimate, Evaluation

METRICS = {
    "weighted_accuracy": "weighted %",
    "accuracy": "plain %",
    "format_valid": "format %",
    "verified": "verified %",
    "map_score": "map score",
    "map_score_paper": "… as the paper",
}
HEAD = ("n", "Σw", *METRICS.values(), "tokens")
SHARES = ("weighted_accuracy", "accuracy", "format_valid", "verified")
MOST_CITIES = 30
"""Cities that the readable table lists; ``report.json`` has all."""
NOTE = (
    "n questions with the sum of their weights (576 on ReasonMap's published test split, 2,212 on ReasonMap-Plus's). "
    "Verified: routes that can be ridden on the true network. Map score: as the published scripts count it, then as "
    "the paper defines it, weighted, of at most 20 points for short and 40 for long questions. Tokens: mean length."
)


def parts_report(evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """What ``report.json`` holds: cut -> part -> its numbers; fractions in 0..1, null for what does not apply."""
    whole = {"whole": {"all": evaluation}, **evaluation.parts()}
    return {cut: {name: _numbers(part) for name, part in named.items()} for cut, named in whole.items()}


def parts_table(evaluation: Evaluation) -> Table:
    """The benchmarks' own parts for the screen; fits 80 columns, on a narrower screen cells take two lines."""
    head = ("", "n", "Σw", "weighted %", "map score", "paper", "tokens")
    table = Table(*columns(head), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for name, part in evaluation.parts()["benchmark"].items():
        cells = dict(_cells(part))
        scores = (cells[column].split(" [")[0] for column in ("map score", "… as the paper", "tokens"))
        table.add_row(name, cells["n"], cells["Σw"], cells["weighted %"], *scores)
    return table


def columns(head: Sequence[str]) -> list[Column]:
    """Of a table for the screen: names, then numbers; where it is narrow cells take two lines."""
    return [Column(name, justify="right" if place else "left", overflow="fold") for place, name in enumerate(head)]


def parts_markdown(evaluation: Evaluation) -> str:
    """Every part as a table, one section a cut."""
    lines = []
    for cut, rows, left_out in parts_rows(evaluation):
        lines += [f"| {cut} | " + " | ".join(HEAD) + " |", "|---|" + "---:|" * len(HEAD)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        lines += [*(["", left_out] if left_out else []), ""]
    return "\n".join([*lines, NOTE, ""])


def parts_rows(evaluation: Evaluation) -> Iterator[tuple[str, list[tuple[str, ...]], str]]:
    """For each cut its name, a row for each part (the name, then cells under ``HEAD``), and what was left out."""
    for cut, named in evaluation.parts().items():
        shown = list(named.items())[: MOST_CITIES if cut == "city" else None]
        rest = len(named) - len(shown)
        rows = []
        for name, part in shown:
            cells = dict(_cells(part))
            rows.append((name, *(cells[column] for column in HEAD)))
        yield cut, rows, f"{rest} more cities are in report.json." if rest else ""


def _numbers(part: Evaluation) -> dict[str, Any]:
    found: dict[str, Any] = {"n": len(part.records), "total_weight": part.total_weight}
    for metric in METRICS:
        estimate = part.estimate(metric)
        found[metric] = {"value": estimate.value, "interval": estimate.interval} if estimate.n else None
    length = part.response_length
    return {**found, "tokens": length if math.isfinite(length) else None}


def _cells(part: Evaluation) -> Iterator[tuple[str, str]]:
    yield "n", str(len(part.records))
    yield "Σw", f"{part.total_weight:g}"
    for metric, name in METRICS.items():
        yield name, _cell(part.estimate(metric), 100.0 if metric in SHARES else 1.0)
    yield "tokens", f"{part.response_length:.0f}" if math.isfinite(part.response_length) else "–"


def _cell(estimate: Estimate, scale: float) -> str:
    if not estimate.n:
        return "–"
    digits = 1 if scale == 100 else 2
    value = f"{scale * estimate.value:.{digits}f}"
    if estimate.interval is None:
        return value
    return f"{value} [{scale * estimate.low:.{digits}f}, {scale * estimate.high:.{digits}f}]"
