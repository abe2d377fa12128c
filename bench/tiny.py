"""Does the small run learn to read maps? Three seeds, and two controls in which learning must vanish.

    python bench/tiny.py    # trains what is missing under runs/tiny-bench, writes results and the README's table

Arms: ``train`` with seeds 0, 1, 2 (seed of maps, questions and training alike); ``zero`` (advantages zeroed) and
``shuffle`` (advantages shuffled within the batch) with seed 0. An arm whose report is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from records import commit, processor, write_between

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "tiny.json"
README = ROOT / "README.md"
START, END = "<!-- tiny-table:start -->", "<!-- tiny-table:end -->"
ARMS = (("train", 0), ("train", 1), ("train", 2), ("zero", 0), ("shuffle", 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "tiny-bench", help="folder of the runs")
    runs = parser.parse_args().runs.resolve()
    for arm, seed in ARMS:
        if not (runs / f"{arm}-{seed}" / "report.json").is_file():
            train(arm, seed, runs / f"{arm}-{seed}")
    rows = [summary(arm, seed, runs / f"{arm}-{seed}") for arm, seed in ARMS]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": machine(), "arms": rows}, indent=1) + "\n", encoding="utf-8")
    table = markdown(rows)
    write_between(README, START, END, table)
    print(table)


def train(arm: str, seed: int, run_dir: Path) -> None:
    """One run of the shipped configuration in a process of its own; a stopped one is resumed."""
    if (run_dir / "config.toml").is_file():
        arguments = ["--resume", str(run_dir)]
    else:
        control = [] if arm == "train" else [f"train.advantage_control={arm}"]
        arguments = ["tiny", f"data.seed={seed}", f"train.seed={seed}", *control, "--run-dir", str(run_dir)]
    command = [sys.executable, "-P", "-c", "from rewardmap.cli import main; main()", "train", *arguments]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONSAFEPATH": "1"})


def summary(arm: str, seed: int, run_dir: Path) -> dict[str, Any]:
    """What the table shows of a run's report, fractions in 0..1."""
    report = json.loads((run_dir / "report.json").read_text(encoding="utf-8"))
    kept = ("weighted_accuracy", "gain", "intervals", "kinds", "planning_routes", "format_valid")
    kept += ("seconds", "tokens_per_second", "peak_rss_bytes", "steps", "questions", "maps")
    return {"arm": arm, "seed": seed, **{key: report[key] for key in kept}}


def machine() -> dict[str, Any]:
    import torch

    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """Weighted accuracy on held-out maps in percent, with 95 % intervals over maps."""
    names = {"train": "", "zero": ", advantages zeroed", "shuffle": ", advantages shuffled"}
    lines = [
        "| seed | warm start | trained | gain | maps swapped | best text-only prior | seconds |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        accuracy, intervals, gain = row["weighted_accuracy"], row["intervals"], row["gain"]["weighted_accuracy"]
        cells = (
            f"{row['seed']}{names[row['arm']]}",
            _with_interval(accuracy["before"], intervals["before"]["weighted_accuracy"]),
            _with_interval(accuracy["after"], intervals["after"]["weighted_accuracy"]),
            _with_interval(gain["value"], gain["interval"], sign="+"),
            f"{100 * accuracy['text_only']:.1f}",
            f"{100 * accuracy['text_prior']:.1f}",
            f"{row['seconds']:.0f}" if row["arm"] == "train" else "",  # controls may share the machine
        )
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Gain by kind, in points, for each seed:", "", "| seed | " + " | ".join(_kinds(rows[0])) + " |"]
    lines.append("|---|" + "---:|" * len(_kinds(rows[0])))
    for row in rows:
        if row["arm"] == "train":
            gains = [f"{100 * (pair['after'] - pair['before']):+.1f}" for pair in _kinds(row).values()]
            lines.append(f"| {row['seed']} | " + " | ".join(gains) + " |")
    return "\n".join(lines)


def _kinds(row: dict[str, Any]) -> dict[str, dict[str, float]]:
    routes = {f"planning, {name}": pair for name, pair in row["planning_routes"].items()}
    return {**{kind: pair for kind, pair in row["kinds"].items() if kind != "planning"}, **routes}


def _with_interval(value: float, interval: list[float], sign: str = "") -> str:
    low, high = interval
    return f"{100 * value:{sign}.1f} [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"


if __name__ == "__main__":
    main()
