"""The whole training step: ours, ours without its savings, and TRL's, on the same model, maps, answers and rewards.

    python bench/step.py --trl-python <an interpreter with trl 1.16 and accelerate>

Each arm runs in a process of its own (``step_run.py``); they take turns. Writes ``bench/results/step-cpu.json`` and the
tables of ``docs/forest.md``. Speed stands beside the error of the gradient, against ours without shared prefixes, and
beside the ideal ratio, which is that of the arithmetic (``step_cases.flop``). On a GPU: ``bench/gpu.py --stage step``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT), str(ROOT / "kernels")]

import records  # noqa: E402
from records import commit, processor, write_between  # noqa: E402
from step_cases import CASES, arms_of  # noqa: E402

RESULTS = records.RESULTS / "step-cpu.json"
DOC = ROOT / "docs" / "forest.md"
START, END = "<!-- step-table:start -->", "<!-- step-table:end -->"
BASE = "without shared prefixes"
TOLERANCE = 2e-3
"""Relative error of the whole gradient allowed in float32, where every arm sums in another order."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", default=sys.executable, help="interpreter that imports trl")
    parser.add_argument("--case", action="append", choices=tuple(CASES["cpu"]), help="default: all")
    parser.add_argument("--table", action="store_true", help="only write the tables from the results")
    chosen = parser.parse_args()
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {"cases": {}}
    found["cases"] = {name: case for name, case in found["cases"].items() if name in CASES["cpu"]}
    for name in [] if chosen.table else chosen.case or CASES["cpu"]:
        found["cases"][name] = summary(run(name, chosen.trl_python)) | {"machine": machine()}
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    table = markdown(found["cases"])
    write_between(DOC, START, END, table)
    print(table)


def run(case: str, trl_python: str) -> dict[str, dict[str, Any]]:
    """Rows by arm, each arm in a process of its own; they take turns, step by step, so that whatever else the machine
    does falls on all of them. Raises RuntimeError where an arm fails."""
    path = os.pathsep.join(str(ROOT / folder) for folder in ("bench", ".", "kernels"))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}
    arms = arms_of("cpu", case)
    children = {}
    for arm in arms:
        python = trl_python if arm == "TRL" else sys.executable
        script = str(ROOT / "bench" / "step_run.py")
        command = [python, script, "--device", "cpu", "--case", case, "--arm", arm, "--turns"]
        # stderr goes where ours does: a pipe that nobody reads would hold up an arm that fills it.
        children[arm] = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    rows: dict[str, dict[str, Any]] = {}
    try:
        for arm, child in children.items():
            _until(child, arm, "ready")
        while len(rows) < len(arms):
            for arm, child in children.items():
                assert child.stdin is not None
                child.stdin.write("go\n")
                child.stdin.flush()
                line = _until(child, arm, "ready", '{"ok"')
                if line.startswith("{"):
                    rows[arm] = json.loads(line)
            print(f"{case}: a step of every arm", file=sys.stderr, flush=True)
    finally:
        for child in children.values():  # without this the other arms of one that failed would go on
            child.kill()
            child.wait()
    return rows


def _until(child: subprocess.Popen[str], arm: str, *starts: str) -> str:
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith(starts):
            return line
    raise RuntimeError(f"{arm} failed: see above")


def summary(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Rows by arm with error and ratios. A ratio is the median over rounds of times taken side by side."""
    base, ours = rows[BASE], rows["ours"]
    arms = {}
    for arm, row in rows.items():
        seconds = row["step_seconds"]
        ideal = row["flop"]["total"] / ours["flop"]["total"]
        ratio = statistics.median(a / b for a, b in zip(row["seconds"], ours["seconds"], strict=True))
        arms[arm] = {
            **{key: value for key, value in row.items() if key not in ("probe", "arm", "ok")},
            "gradient_error": error(row["probe"], base["probe"]),
            "logical_tokens_per_second": row["logical_tokens"] / seconds,
            "computed_tokens_per_second": row["computed_tokens"] / seconds,
            "ours_is_faster": ratio,
            "ideal": ideal,
            "of_ideal": ratio / ideal,
        }
        if not arms[arm]["gradient_error"] <= TOLERANCE:
            raise RuntimeError(f"{arm}: its gradient is off by {arms[arm]['gradient_error']:.1e}; no speed without it")
    return {"arms": arms}


def error(found: dict[str, list[float]], expected: dict[str, list[float]]) -> float:
    """Estimated relative error of the whole gradient, from ``step_run.probe``."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    off = sum((found[name][0] - product) ** 2 for name, (product, _) in expected.items())
    return math.sqrt(off / sum(norm**2 for _, norm in expected.values()))


def machine() -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"cpu": processor(), "threads": 1, "dtype": "float32", **versions, "commit": commit(), "date": date}


def markdown(cases: dict[str, Any]) -> str:
    """The first case arm by arm, then a line for each of the others."""
    cases = {name: cases[name] for name in CASES["cpu"] if name in cases}  # none that are no longer measured
    first = next(iter(CASES["cpu"]))
    lines = _by_arm(first, cases.pop(first)) if first in cases else []
    if cases:
        lines += [
            "",
            "Other cases, ours beside ours without shared prefixes and TRL:",
            "",
            "| case | ours, s | memory, MB | without sharing: ours is faster | ideal | of ideal | TRL: ours is faster "
            "| ideal | memory, MB |",
            "| --- " + "| ---: " * 8 + "|",
        ]
    for name, case in cases.items():
        ours, unshared, trl = (case["arms"][arm] for arm in ("ours", BASE, "TRL"))
        lines.append(
            f"| {name} | {ours['step_seconds']:.2f} | {ours['memory'] / 1e6:.0f} | {unshared['ours_is_faster']:.2f} | "
            f"{unshared['ideal']:.2f} | {100 * unshared['of_ideal']:.0f} % | {trl['ours_is_faster']:.2f} | "
            f"{trl['ideal']:.2f} | {trl['memory'] / 1e6:.0f} |"
        )
    return "\n".join(lines)


def _by_arm(name: str, case: dict[str, Any]) -> list[str]:
    head = CASES["cpu"][name]
    lines = [
        f"\n**{name}**: {head.maps} map(s), {head.questions} question(s) each, groups of {head.group}; prompt "
        f"{head.prompt}, answer {head.response} tokens; {'frozen' if head.freeze_vision else 'trainable'} tower\n",
        "| step | seconds | tokens/s, logical | tokens/s, computed | GFLOP | GFLOP/s | memory, MB | gradient error "
        "| ours is faster | ideal | of ideal |",
        "| --- " + "| ---: " * 10 + "|",
    ]
    for arm, row in case["arms"].items():
        work = row["flop"]["total"] / 1e9
        lines.append(
            f"| {arm} | {row['step_seconds']:.2f} | {row['logical_tokens_per_second']:,.0f} | "
            f"{row['computed_tokens_per_second']:,.0f} | {work:.0f} | {work / row['step_seconds']:.0f} | "
            f"{row['memory'] / 1e6:.0f} | {row['gradient_error']:.0e} | {row['ours_is_faster']:.2f} | "
            f"{row['ideal']:.2f} | {100 * row['of_ideal']:.0f} % |"
        )
    return lines


if __name__ == "__main__":
    main()
