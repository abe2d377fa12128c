"""One case of the kernel bench, providers taking turns: ``python bench/kernel_run.py NAME [--device cuda]``.

Prints a JSON row: seconds, ratios to every peer and to the floor, error beside each, useful and executed arithmetic,
peak memory. A peer that is not installed or fails (out of memory, a shape it does not take) is an entry with its
reason, never left out; a row without the peers that its case requires is not "ok".
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rewardmap_kernels import last_path

sys.path.append(str(Path(__file__).parent))
import kernel_cases
import kernel_peers
import kernel_problem
import kernel_times  # brings the profiler before the providers, so that its import is on nobody's clock
from kernel_problem import Case, Run

LONG = 10.0
"""Seconds: a slow peer must not cost the others their row."""


def device_name(device: str) -> str:
    """The GPU's name, or the processor's."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    return found.group(1) if found else platform.processor() or platform.machine()


def measure(case: Case, device: str, rounds: int) -> dict[str, Any]:
    """Errors first (a faster wrong answer is worth nothing), then times, then the peaks.

    ``times_faster_than`` are ratios of the fastest rounds: what a busy machine adds is not the code's. ``counts``:
    every required peer has a time, or ran out of memory.
    """
    errors: dict[str, float] = {}
    failed, first_call = dict(case.missing), {}
    providers = dict(case.providers)
    for name in case.providers:
        start = time.perf_counter()
        try:
            if name == "floor":
                providers[name]()
            else:
                errors[name] = kernel_problem.errors(case, name)
            _synchronize(device)
        except Exception as reason:
            if name == "ours":
                raise
            failed[name] = kernel_peers.why(reason)
            del providers[name]
            if device == "cuda":
                torch.cuda.empty_cache()
        first_call[name] = round(time.perf_counter() - start, 3)
        if name == "ours":
            path = list(last_path(case.name.removesuffix(".frozen")) or ())
    times = take_turns(providers, device, rounds)
    fastest = {name: min(values) for name, values in times.items()}
    median = {name: statistics.median(values) for name, values in times.items()}
    seconds = median if case.ratios == "median" else fastest
    row: dict[str, Any] = {
        "operation": case.name, "path": path, **case.about, "fastest_s": fastest, "median_s": median,
        "times_faster_than": {name: s / seconds["ours"] for name, s in seconds.items() if name != "ours"},
        "error": errors, "failed": failed, "first_call_s": first_call,
        "useful_gflop_per_s": {name: case.useful / s / 1e9 for name, s in seconds.items()},
        "executed_gflop_per_s": {name: case.flop[name] / s / 1e9 for name, s in seconds.items() if name in case.flop},
        "gbyte_per_s": case.bytes / seconds["ours"] / 1e9,
        "counts": all(name in times or "OutOfMemory" in failed.get(name, "") for name in case.required),
    }  # fmt: skip
    if device == "cuda":
        row["host_s"] = {name: _host(run) for name, run in providers.items()}
        row["on_device"] = {
            name: kernel_times.summary(kernel_times.kernel_events(run), 8) for name, run in providers.items()
        }
        row["peak_bytes"] = {name: _peak(run) for name, run in providers.items() if name != "floor"}
        row["ceilings"], row["launched"] = kernel_times.ceilings(), kernel_cases.launched()
    return row


def allowed_error(row: dict[str, Any]) -> float:
    """At most twice eager's own error; where eager cannot run, its budget in bfloat16."""
    return float(2 * row["error"].get("torch eager", 2**-8) + 1e-6)


def slower_than(row: dict[str, Any], stored: dict[str, Any], margin: float) -> str | None:
    """How a row's ratio to torch eager (to the floor where eager cannot run) fell by more than ``margin`` against the
    stored one; None where it did not."""
    ratios, before = row["times_faster_than"], stored["times_faster_than"]
    peer = next((peer for peer in ("torch eager", "floor") if peer in ratios and peer in before), None)
    if peer is None or ratios[peer] * margin >= before[peer]:
        return None
    return f"{ratios[peer]:.2f} x {peer}, was {before[peer]:.2f}"


def take_turns(
    providers: dict[str, Run], device: str, rounds: int, before: dict[str, Callable[[], Any]] | None = None
) -> dict[str, list[float]]:
    """Seconds of ``rounds`` calls of each provider, one after the other in every round, after a warm-up; at least three
    of one that has used up LONG. ``before``: what a provider needs done before each call, on nobody's clock."""
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    for round_ in range(rounds + 1):
        for name, run in providers.items():
            if len(seconds[name]) >= 3 and sum(seconds[name]) > LONG:
                continue
            if before and name in before:
                before[name]()
            _synchronize(device)
            start = _clock(device)
            run()
            _synchronize(device)
            if round_:
                seconds[name].append(_clock(device) - start)
    return seconds


def _host(run: Run) -> float:
    """Seconds until the call is back, the GPU idle before it: the fastest of three."""
    seconds = []
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return min(seconds)


def _peak(run: Run) -> int:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _clock(device: str) -> float:
    """CPU time where one thread works, so that a busy machine does not show; else wall time."""
    return time.process_time() if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    cases = kernel_cases.cases(arguments.device)
    if arguments.name not in cases:
        parser.error(f"no case {arguments.name!r}; there are {', '.join(cases)}")
    row = measure(cases[arguments.name](), arguments.device, arguments.rounds)
    allowed = allowed_error(row)
    ok = row["counts"] and row["error"]["ours"] <= allowed
    print(json.dumps(row | {"ok": ok, "allowed_error": allowed}))


if __name__ == "__main__":
    main()
