"""Kernel speed as ratios to peers measured in the same run, error on the same row, and a gate on the ratios.

``pytest bench/bench_kernels.py`` times every case, providers taking turns, and fails by name where its ratios to
torch eager and to the floor are both more than MARGIN worse than those stored of the same device, twice.
``REWARDMAP_BENCH_WRITE=1`` stores the run as that device's baseline in ``bench/results/kernels-<device>.json``. On a
CPU one thread works and its CPU time is taken, so that what else the machine does shows least; on a GPU the shapes are
those of real heads.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parent))
import kernel_cases
import kernel_run
from records import RESULTS, commit, slug

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS = 15
MARGIN = 1.35
"""A ratio may be this much worse than the stored one: several times the spread of repeated runs of the CPU
bench."""
ROWS: dict[str, dict[str, Any]] = {}
"""Of the cases that passed."""
CASES = kernel_cases.cases(DEVICE)
DEVICE_NAME = kernel_run.device_name(DEVICE)
BASELINE = RESULTS / f"kernels-{slug(DEVICE_NAME)}.json"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    if DEVICE == "cpu":
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CASES)
def test_speed(benchmark: Any, name: str) -> None:
    case = CASES[name]()
    row = kernel_run.measure(case, DEVICE, ROUNDS)
    benchmark.extra_info.update(row)

    def synchronised() -> None:
        case.providers["ours"]()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(synchronised, rounds=3, warmup_rounds=1)
    # A faster wrong answer is worth nothing.
    assert row["error"]["ours"] <= kernel_run.allowed_error(row)
    ROWS[name] = row


def test_no_ratio_is_worse_than_this_device_s_baseline() -> None:
    if os.environ.get("REWARDMAP_BENCH_WRITE") == "1":
        lacking = ", ".join(CASES.keys() - ROWS.keys())
        assert not lacking, f"no baseline without {lacking}: run all of bench_kernels.py, and all must pass"
        about = {
            "device": DEVICE_NAME, "threads": torch.get_num_threads(), "torch": torch.__version__, "rounds": ROUNDS,
            "commit": commit(),
        }  # fmt: skip
        BASELINE.write_text(json.dumps({**about, "rows": ROWS}, indent=1) + "\n")
    if not BASELINE.exists():
        told = f"nothing is guarded: there is no baseline of {DEVICE_NAME}, {BASELINE.name}. On a commit whose speed "
        told += "is right and a quiet machine, REWARDMAP_BENCH_WRITE=1 pytest bench/bench_kernels.py stores it"
        warnings.warn(told, stacklevel=1)  # pytest keeps the reason of a skip to itself
        pytest.skip(told)
    stored = json.loads(BASELINE.read_text())

    def fall(name: str, row: dict[str, Any]) -> str | None:
        return kernel_run.slower_than(row, stored["rows"][name], MARGIN) if name in stored["rows"] else None

    # Once more: a busy machine is seldom so twice, a slower kernel always.
    slower = [name for name, row in ROWS.items() if fall(name, row)]
    again = {name: fall(name, kernel_run.measure(CASES[name](), DEVICE, ROUNDS)) for name in slower}
    worse = [f"{name}: {told}" for name, told in again.items() if told]
    assert not worse, "\n".join([*worse, f"(baseline: torch {stored['torch']}, here {torch.__version__})"])
