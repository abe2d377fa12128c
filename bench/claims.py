"""Which of the paper's claims hold in small? Every arm on the tiny model and drawn maps, five seeds each.

    python bench/claims.py                   # trains what is missing under runs/claims, then writes the result
    python bench/claims.py --table           # the table of what is there
    python bench/claims.py --scale mini      # the same in a minute, to see that it works

A seed has its own maps and questions, shared by all arms, and every arm makes the same number of updates (but where its
name says otherwise). Cold arms start from a policy that plans hardly any route right. Arms run side by side, one thread
each; a stopped one is resumed, a finished one is not run again.
A full run writes bench/results/claims.json, docs/claims/claims.png, the table in docs/claims.md, and README's section.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import claims_report as report
from records import ROOT, commit, processor

WARM_START = ROOT / "rewardmap" / "assets" / "tiny"
PLUS = ("TorF1", "TorF2", "Counting1", "Counting2", "Counting3")
ALL = (*PLUS, "planning")
COLD = {"answer_steps": 400}
"""What the cold start's recipe (``rewardmap.train.warmstart``) has otherwise: fewer lessons in answering. It counts
lines well, has three of four true/false questions right, and fewer than one route in twenty."""
WORLDS = {"transit": "tiny", "grid": "grid-tiny"}
"""World -> the generator's preset."""
PLAIN = ("reward.alpha=0.0", "reward.map_weights=[1.0, 1.0, 1.0]", "reward.transfer_weight=0.0")
"""Correctness alone: no detail, no difficulty weights."""
COMMON = (
    "reward.mode=reference",
    "reward.weight_on=advantage",
    "eval.before=false",
    "eval.text_only=false",
    "eval.samples=0",
    "train.threads=1",
    "train.keep_checkpoints=1",
    "train.checkpoint_every=100",
)
KEPT = ("weighted_accuracy", "verified", "format_valid", "map_score", "map_score_paper")


@dataclass(frozen=True)
class Scale:
    """How large an experiment is."""

    seeds: int
    maps: tuple[int, int]
    """Trained on, tested on; in each world."""
    steps: int
    prompts: int
    group: int


SCALES = {"full": Scale(5, (150, 120), 400, 32, 8), "mini": Scale(2, (3, 3), 8, 4, 2)}


@dataclass(frozen=True)
class Arm:
    """One way of training: stages as (name, kind, share of the steps, question kinds, replay), and settings."""

    stages: tuple[tuple[str, str, float, tuple[str, ...], float], ...] = ()
    settings: tuple[str, ...] = ()
    world: str = "transit"
    cold: bool = False
    """From the cold start, not the shipped warm one."""


MIXED = (("all mixed", "rl", 1.0, ALL, 0.0),)
STAGED = (
    ("true/false", "rl", 0.325, ("TorF1", "TorF2"), 0.5),
    ("counting", "rl", 0.075, ("Counting2", "Counting3"), 0.5),
    ("local counting", "rl", 0.1, ("Counting1",), 0.5),
    ("planning", "rl", 0.5, ("planning",), 0.5),
)
"""The paper's order, with half of each batch replayed from all kinds: without replay the tiny model forgets."""
ARMS: dict[str, Arm] = {
    "base": Arm(),
    "SFT": Arm((("SFT", "sft", 1.0, PLUS, 0.0),)),
    "SFT → RL": Arm((("SFT", "sft", 0.5, PLUS, 0.0), ("planning", "rl", 0.5, ("planning",), 0.0)), PLAIN),
    "RL on planning": Arm((("planning", "rl", 1.0, ("planning",), 0.0),), PLAIN),
    "RL on planning, half the updates": Arm((("planning", "rl", 0.5, ("planning",), 0.0),), PLAIN),
    "RL on planning + reward": Arm((("planning", "rl", 1.0, ("planning",), 0.0),)),
    "RL on all": Arm(MIXED, PLAIN),
    "RL on all + reward": Arm(MIXED),
    "RL in stages": Arm(STAGED, PLAIN),
    "RL in stages, no replay": Arm(tuple((*stage[:4], 0.0) for stage in STAGED), PLAIN),
    "RewardMap": Arm(STAGED),
    "RewardMap, weights on the reward": Arm(STAGED, ("reward.weight_on=reward",)),
    "RewardMap, paper reward": Arm(STAGED, ("reward.mode=paper",)),
    "RewardMap, graph reward": Arm(STAGED, ("reward.mode=graph",)),
    "RewardMap on the grid": Arm(STAGED, world="grid"),
    "cold base": Arm(cold=True),
}
COLD_ARMS = (
    "SFT → RL",
    "RL on planning",
    "RL on planning, half the updates",
    "RL on planning + reward",
    "RL on all",
    "RL in stages",
    "RL in stages, no replay",
    "RewardMap",
)
ARMS |= {f"cold {name}": replace(ARMS[name], cold=True) for name in COLD_ARMS}
TRANSFER = ("base", "RewardMap", "RewardMap on the grid")
"""Arms that are tested on both worlds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--runs", type=Path, help="folder of data, runs and rows (default: runs/claims[-SCALE])")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="arms side by side, one thread each")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    parser.add_argument("--table", action="store_true", help="print the table of the rows that are there, run nothing")
    options = parser.parse_args()
    scale = SCALES[options.scale]
    runs = (options.runs or ROOT / "runs" / f"claims{'' if options.scale == 'full' else '-' + options.scale}").resolve()
    if not options.table:
        runs.mkdir(parents=True, exist_ok=True)
        with (runs / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                sys.exit(f"{runs}: another bench/claims.py is at work there")
            run_all(runs, scale, options.arms, options.jobs)
    rows = read_rows(runs)
    if not rows:
        sys.exit(f"{runs} holds no rows yet")
    print(report.markdown(rows))
    complete = {(row["arm"], row["seed"]) for row in rows} >= {(arm, s) for arm in ARMS for s in range(scale.seeds)}
    if complete and options.scale == "full":
        report.publish(ROOT, rows, {"scale": vars(scale), **machine()})
        print("written: bench/results/claims.json, docs/claims/claims.png, docs/claims.md, README.md")
    elif not complete:
        print(f"\n{len(rows)} of {len(ARMS) * scale.seeds} runs are there; nothing was published")


def run_all(runs: Path, scale: Scale, arms: Sequence[str], jobs: int) -> None:
    """Every missing row, seed by seed. Raises the first failure after the runs at work have ended."""
    jobs_left = [(arm, seed) for seed in range(scale.seeds) for arm in arms if not row_file(runs, arm, seed).is_file()]
    locks = {(world, seed): threading.Lock() for world in WORLDS for seed in range(scale.seeds)}
    if any(ARMS[arm].cold for arm, _ in jobs_left):
        make_cold_start(cold_start(runs))
    failed = threading.Event()
    done = 0

    def work(job: tuple[str, int]) -> None:
        nonlocal done
        if failed.is_set():
            return
        arm, seed = job
        try:
            row = run_arm(runs, scale, arm, seed, locks)
        except BaseException:
            failed.set()
            raise
        write_json(row_file(runs, arm, seed), row)
        done += 1
        accuracy = row["tested"][ARMS[arm].world]["all"]["weighted_accuracy"]
        told = f"{100 * accuracy:.1f} % in {row['seconds']:.0f} s"
        print(f"{done}/{len(jobs_left)} {arm}, seed {seed}: {told}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        for result in [pool.submit(work, job) for job in jobs_left]:
            result.result()


def run_arm(
    runs: Path, scale: Scale, name: str, seed: int, locks: dict[tuple[str, int], threading.Lock]
) -> dict[str, Any]:
    """Train an arm on a seed's maps and test it; returns its row."""
    arm, begin = ARMS[name], time.monotonic()
    data = {world: data_folder(runs, scale, world, seed, locks[world, seed]) for world in worlds_of(name)}
    folder = runs / "runs" / row_file(runs, name, seed).stem
    tested = {}
    if arm.stages:
        if not (folder / "report.json").is_file():
            train(folder, train_arguments(runs, scale, name, seed))
        tested[arm.world] = numbers(folder / "report.json")
    for world in data:
        if world not in tested:
            out = folder / f"on-{world}"
            if not (out / "report.json").is_file():
                target = str(folder if arm.stages else cold_start(runs) if arm.cold else WARM_START)
                settings = ["rollout.max_new_tokens=24", "rollout.batch_sequences=512", *COMMON]
                where = ["--data", str(data[world]), "--out", str(out)]
                rewardmap("eval", target, *settings, *where, "--normaliser", "training")
            tested[world] = numbers(out / "report.json")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    seconds = time.monotonic() - begin
    facts = {"arm": name, "seed": seed, "trained_on": arm.world, "commit": commit(), "seconds": seconds}
    return {**facts, "tested": tested}


def worlds_of(name: str) -> list[str]:
    """The worlds that an arm needs, its own first."""
    own = ARMS[name].world
    return [own, *(world for world in WORLDS if world != own and name in TRANSFER)]


def train_arguments(runs: Path, scale: Scale, name: str, seed: int) -> list[str]:
    """Arguments of ``rewardmap train`` for an arm."""
    arm = ARMS[name]
    start = cold_start(runs) if arm.cold else "shipped"
    stages = [f"{{name='start', kind='sft', steps=0, checkpoint='{start}'}}"]
    for title, kind, share, kinds, replay in arm.stages:
        steps = max(1, round(share * scale.steps))
        stages.append(
            f"{{name='{title}', kind='{kind}', steps={steps}, question_kinds={list(kinds)}, replay={replay}}}"
        )
    sizes = [f"train.prompts_per_step={scale.prompts}", f"rollout.group_size={scale.group}", f"train.seed={seed}"]
    data = data_path(runs, arm.world, seed)
    return ["tiny", f"data.path={data}", *COMMON, *sizes, f"train.stages=[{', '.join(stages)}]", *arm.settings]


def train(folder: Path, arguments: Sequence[str]) -> None:
    """Train into a folder; a stopped run is resumed, what never became one is removed."""
    if (folder / "config.toml").is_file():
        rewardmap("train", "--resume", str(folder))
        return
    shutil.rmtree(folder, ignore_errors=True)
    rewardmap("train", *arguments, "--run-dir", str(folder))


def rewardmap(*arguments: str) -> None:
    """The command line in a process of its own, with one thread."""
    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    command = [sys.executable, "-P", "-c", "from rewardmap.cli import main; main()", *arguments]
    environment = {**os.environ, "PYTHONSAFEPATH": "1", **one}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"rewardmap {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-2000:]}")


def cold_start(runs: Path) -> Path:
    return runs / "cold-start"


def make_cold_start(folder: Path) -> None:
    """Train it, in one thread, where it is not there yet."""
    import torch
    from rich.console import Console

    from rewardmap.train.warmstart import make_warm_start

    if folder.exists():
        return
    print("the cold start is made first: three minutes", flush=True)
    torch.set_num_threads(1)
    partial = folder.with_name(f"{folder.name}.partial")
    make_warm_start(partial, Console(), COLD)
    partial.rename(folder)


def data_path(runs: Path, world: str, seed: int) -> Path:
    return runs / f"data-{world}-{seed}"


def data_folder(runs: Path, scale: Scale, world: str, seed: int, lock: threading.Lock) -> Path:
    """A seed's maps and questions, drawn when first asked for."""
    from rewardmap.transit import write_dataset

    folder = data_path(runs, world, seed)
    with lock:
        if not folder.exists():
            counts = dict(zip(("train", "test"), scale.maps, strict=True))
            write_dataset(folder, maps=counts, preset=WORLDS[world], seed=seed)
    return folder


def numbers(file: Path) -> dict[str, dict[str, float | None]]:
    """What a row keeps of a report: metrics of the whole, of both benchmarks and of the kinds; fractions and points."""
    parts = json.loads(file.read_text(encoding="utf-8"))["parts"]
    named = {"all": parts["whole"]["all"], **parts["benchmark"], **parts["kind"]}
    return {name: {metric: part[metric] and part[metric]["value"] for metric in KEPT} for name, part in named.items()}


def row_file(runs: Path, arm: str, seed: int) -> Path:
    name = "".join(letter if letter.isalnum() else "-" for letter in arm.lower().replace("→", "to"))
    return runs / "rows" / f"{name}-{seed}.json"


def write_json(path: Path, value: Any) -> None:
    """The whole file or none."""
    from rewardmap.files import write_text

    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_rows(runs: Path) -> list[dict[str, Any]]:
    """The rows of known arms, in the order of ``ARMS``."""
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((runs / "rows").glob("*.json"))]
    order = list(ARMS)
    return sorted((row for row in rows if row["arm"] in ARMS), key=lambda row: (order.index(row["arm"]), row["seed"]))


def machine() -> dict[str, Any]:
    import torch

    facts = {"cpu": processor(), "cores": os.cpu_count(), "torch": torch.__version__}
    return {"command": "python bench/claims.py", **facts}


if __name__ == "__main__":
    main()
