"""Kernel speed as ratios to peers measured in the same run, error on the same row, and a gate on the ratios.

``pytest bench/bench_kernels.py`` times every case, providers taking turns, and fails by name where a ratio to
torch eager is more than MARGIN worse than the stored one of the same device. ``REWARDMAP_BENCH_WRITE=1``
stores the run as that device's baseline in ``bench/results/kernels-<device>.json``. On a GPU the shapes are
those of real heads.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parent))
import kernel_cases
import kernel_run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS = 15
MARGIN = 1.35
"""A ratio may be this much worse than the stored one: several times the spread of repeated runs of the CPU
bench."""
ROWS: dict[str, dict[str, Any]] = {}
CASES = kernel_cases.cases(DEVICE)
DEVICE_NAME = kernel_run.device_name(DEVICE)
BASELINE = Path(__file__).parent / "results" / f"kernels-{re.sub(r'[^a-z0-9]+', '-', DEVICE_NAME.lower())}.json"


@pytest.mark.parametrize("name", CASES)
def test_speed(benchmark: Any, name: str) -> None:
    case = CASES[name]()
    ROWS[name] = row = kernel_run.measure(case, DEVICE, ROUNDS)
    benchmark.extra_info.update(row)

    def synchronised() -> None:
        case.providers["ours"]()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(synchronised, rounds=3, warmup_rounds=1)
    # A faster wrong answer is worth nothing.
    assert row["error"]["ours"] <= kernel_run.allowed_error(row)


def test_no_ratio_is_worse_than_this_device_s_baseline() -> None:
    if os.environ.get("REWARDMAP_BENCH_WRITE") == "1":
        threads = torch.get_num_threads()
        about = {"device": DEVICE_NAME, "threads": threads, "torch": torch.__version__, "rounds": ROUNDS}
        BASELINE.write_text(json.dumps({**about, "rows": ROWS}, indent=1) + "\n")
    if not BASELINE.exists():
        pytest.skip(f"no baseline of {DEVICE_NAME}: REWARDMAP_BENCH_WRITE=1 stores one")
    stored = json.loads(BASELINE.read_text())
    if stored["threads"] != torch.get_num_threads():
        pytest.skip(f"the baseline of {DEVICE_NAME} was made with {stored['threads']} threads")
    worse = [
        f"{name}: {fall}"
        for name, row in ROWS.items()
        if name in stored["rows"] and (fall := kernel_run.slower_than(row, stored["rows"][name], MARGIN))
    ]
    assert not worse, "\n".join(worse)
