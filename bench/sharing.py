"""Does sharing change what is learned? The small run with and without shared prefixes, and with batches from few maps.

    python bench/sharing.py --runs runs/sharing                 # four arms, three seeds
    python bench/sharing.py --runs runs/sharing --seeds 1 2 --arm "any map" --arm "few maps"
    python bench/sharing.py --runs runs/short --seeds 0 --share 0.2 --problems 400

Arms: ``shared`` and ``unshared`` train the shipped configuration; ``any map`` and ``few maps`` train it without replay,
each batch from all maps or from MAPS of them. ``--share`` shortens every stage, ``--problems`` the held-out questions.
An arm whose report is there is not run again, a stopped one is resumed; what the folder then holds is written to
``bench/results/sharing.json`` and the table of ``docs/forest.md``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from records import write_between
from tiny import machine

from rewardmap.config import Config, StageConfig
from rewardmap.config_file import dump_toml, load_config
from rewardmap.report import read_metrics

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "sharing.json"
DOC = ROOT / "docs" / "forest.md"
START, END = "<!-- sharing-table:start -->", "<!-- sharing-table:end -->"
MAPS = 8
ARMS = ("shared", "unshared", "any map", "few maps")
UNSHARED = """
import functools
from rewardmap.train import trainer
trainer.pack_forest = functools.partial(trainer.pack_forest, share=False)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "sharing", help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arm", action="append", choices=ARMS, help="default: all")
    parser.add_argument("--share", type=float, default=1.0, help="of each stage's steps")
    parser.add_argument("--problems", type=int, default=0, help="held-out questions; 0: all")
    chosen = parser.parse_args()
    runs = chosen.runs.resolve()
    for seed in chosen.seeds:
        for arm in chosen.arm or ARMS:
            folder = runs / named(arm, seed)
            if not (folder / "report.json").is_file():
                train(arm, configured(arm, seed, chosen.share, chosen.problems), folder)
    seeds = sorted({int(report.parent.name.rpartition("-")[2]) for report in runs.glob("*-*/report.json")})
    rows = [
        summary(arm, seed, runs / named(arm, seed))
        for seed in seeds
        for arm in ARMS
        if (runs / named(arm, seed) / "report.json").is_file()
    ]
    found = {"machine": machine(), "share": chosen.share, "maps_per_step": MAPS, "arms": rows}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    write_between(DOC, START, END, markdown(found))


def named(arm: str, seed: int | str) -> str:
    return f"{arm.replace(' ', '-')}-{seed}"


def configured(arm: str, seed: int, share: float, problems: int) -> Config:
    config = load_config("tiny", [f"data.seed={seed}", f"train.seed={seed}"])

    def changed(stage: StageConfig) -> StageConfig:
        steps = max(1, round(stage.steps * share)) if stage.steps else 0
        if "map" not in arm or not steps:
            return dataclasses.replace(stage, steps=steps)
        return dataclasses.replace(stage, steps=steps, replay=0.0, maps_per_step=MAPS * (arm == "few maps"))

    stages = tuple(map(changed, config.train.stages))
    return dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, stages=stages),
        eval=dataclasses.replace(config.eval, max_problems=problems, text_only=False, samples=0),
    )


def train(arm: str, config: Config, run_dir: Path) -> None:
    """One run in a process of its own; a stopped one is resumed."""
    if (run_dir / "config.toml").is_file():
        arguments = ["--resume", str(run_dir)]
    else:
        file = run_dir.with_suffix(".toml")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(dump_toml(config), encoding="utf-8")
        arguments = [str(file), "--run-dir", str(run_dir)]
    code = UNSHARED * (arm == "unshared") + "from rewardmap.cli import main; main()"
    command = [sys.executable, "-P", "-c", code, "train", *arguments]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONSAFEPATH": "1"})


def summary(arm: str, seed: int, run_dir: Path) -> dict[str, Any]:
    report = json.loads((run_dir / "report.json").read_text(encoding="utf-8"))
    steps = [row for row in read_metrics(run_dir) if "reward" in row]
    logical, packed = (sum(row[key] for row in steps) for key in ("logical_tokens", "packed_tokens"))
    return {
        "arm": arm,
        "seed": seed,
        "accuracy": report["weighted_accuracy"]["after"],
        "interval": report["intervals"]["after"]["weighted_accuracy"],
        "gain": report["gain"]["weighted_accuracy"],
        "steps": report["steps"],
        "questions": report["questions"],
        "tokens_per_packed_token": logical / packed,
        "train_seconds": sum(row["seconds"]["train"] for row in steps),
    }


def markdown(found: dict[str, Any]) -> str:
    rows: Sequence[dict[str, Any]] = found["arms"]
    names = {"few maps": f"few maps ({found['maps_per_step']} a step)"}
    lines = [
        "| seed | arm | steps | trained | gain | logical tokens per computed one |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        low, high = (100 * value for value in row["interval"])
        gain = row["gain"]
        lines.append(
            f"| {row['seed']} | {names.get(row['arm'], row['arm'])} | {row['steps']} | "
            f"{100 * row['accuracy']:.1f} [{low:.1f}, {high:.1f}] | {100 * gain['value']:+.1f} "
            f"[{100 * gain['interval'][0]:+.1f}, {100 * gain['interval'][1]:+.1f}] | "
            f"{row['tokens_per_packed_token']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
