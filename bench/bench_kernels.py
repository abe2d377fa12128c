"""Kernel speed as ratios to peers measured in the same run, error on the same row, and a gate on the ratios.

``pytest bench/bench_kernels.py`` times every case, providers taking turns, and fails by name where a ratio to
torch eager is more than MARGIN worse than the stored one of the same device. ``REWARDMAP_BENCH_WRITE=1``
stores the run as that device's baseline in ``bench/results/kernels-<device>.json``. On a GPU the shapes are
those of real heads.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rewardmap_kernels import last_path

sys.path.append(str(Path(__file__).parent))
import kernel_cases

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS = 15
MARGIN = 1.35
"""A ratio may be this much worse than the stored one: several times the spread of repeated runs of the CPU
bench."""
ROWS: dict[str, dict[str, Any]] = {}


def device_name() -> str:
    """The GPU's name, or the processor's."""
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    return found.group(1) if found else platform.processor() or platform.machine()


BASELINE = Path(__file__).parent / "results" / f"kernels-{re.sub(r'[^a-z0-9]+', '-', device_name().lower())}.json"


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def clock() -> float:
    """CPU time where one thread works, so that a busy machine does not show; else wall time."""
    return time.process_time() if DEVICE == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def take_turns(providers: dict[str, kernel_cases.Run]) -> dict[str, list[float]]:
    """Seconds of ROUNDS calls of each provider, one after the other in every round, after a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    for round_ in range(ROUNDS + 1):
        for name, run in providers.items():
            synchronize()
            start = clock()
            run()
            synchronize()
            if round_:
                seconds[name].append(clock() - start)
    return seconds


@pytest.mark.parametrize("make", kernel_cases.cases(DEVICE))
def test_speed(benchmark: Any, make: Callable[[], kernel_cases.Case]) -> None:
    case = make()
    # Ratios are of the fastest rounds: what a busy machine adds is not the code's.
    times = take_turns(case.providers)
    seconds = {name: min(values) for name, values in times.items()}
    ours = seconds["ours"]
    row = {
        "fastest_s": ours,
        "median_s": statistics.median(times["ours"]),
        "path": list(last_path(case.name.removesuffix(".frozen")) or ()),
        "times_faster_than": {name: s / ours for name, s in seconds.items() if name != "ours"},
        "error": {name: kernel_cases.errors(case, name) for name in case.providers if name != "floor"},
        "useful_gflop_per_s": case.flop / ours / 1e9,
        "gbyte_per_s": case.bytes / ours / 1e9,
    }
    name = f"{case.name}#{sum(key.startswith(case.name + '#') for key in ROWS)}"
    ROWS[name] = row
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        case.providers["ours"]()
        row["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    benchmark.extra_info.update(row)
    benchmark.pedantic(lambda: (case.providers["ours"](), synchronize()), rounds=3, warmup_rounds=1)
    # A faster wrong answer is worth nothing: at most twice eager's own error.
    assert row["error"]["ours"] <= 2 * row["error"]["torch eager"] + 1e-6


def test_no_ratio_is_worse_than_this_device_s_baseline() -> None:
    if os.environ.get("REWARDMAP_BENCH_WRITE") == "1":
        threads = torch.get_num_threads()
        about = {"device": device_name(), "threads": threads, "torch": torch.__version__, "rounds": ROUNDS}
        BASELINE.write_text(json.dumps({**about, "rows": ROWS}, indent=1) + "\n")
    if not BASELINE.exists():
        pytest.skip(f"no baseline of {device_name()}: REWARDMAP_BENCH_WRITE=1 stores one")
    stored = json.loads(BASELINE.read_text())
    if stored["threads"] != torch.get_num_threads():
        pytest.skip(f"the baseline of {device_name()} was made with {stored['threads']} threads")
    worse = [
        f"{name}: {row['times_faster_than']['torch eager']:.2f} x torch eager, "
        f"was {stored['rows'][name]['times_faster_than']['torch eager']:.2f}"
        for name, row in ROWS.items()
        if name in stored["rows"]
        and row["times_faster_than"]["torch eager"] * MARGIN < stored["rows"][name]["times_faster_than"]["torch eager"]
    ]
    assert not worse, "\n".join(worse)
