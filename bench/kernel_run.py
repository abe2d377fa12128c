"""One case of the kernel bench, providers taking turns: ``python bench/kernel_run.py NAME [--device cuda]``.

Prints a JSON row: seconds, ratios to every peer and to the floor, error beside each, useful and executed arithmetic,
peak memory. On a GPU it comes once more after each closer look; the last one counts. A peer that is not installed or
fails (out of memory, a shape it does not take) is an entry with its reason, never left out; a row without the peers
that its case requires is not "ok".
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from rewardmap_kernels import last_path

sys.path.append(str(Path(__file__).parent))
import kernel_cases
import kernel_problem
import kernel_times  # brings the profiler before the providers, so that its import is on nobody's clock
from kernel_problem import Case, Run
from records import Row, processor, why

T = TypeVar("T")
LONG = 10.0
"""Seconds: a slow peer must not cost the others their row."""

YARDSTICKS = ("torch eager", "floor", "unshared causal SDPA")
"""torch's own: beside what has our code in it nothing of ours could fall, and others' change with their versions."""


def device_name(device: str) -> str:
    """The GPU's name, or the processor's."""
    return torch.cuda.get_device_name() if device == "cuda" else processor()


def measure(case: Case, device: str, rounds: int, early: Callable[[Row], None] = lambda row: None) -> Row:
    """Errors first (a faster wrong answer is worth nothing), then times, then the peaks.

    ``times_faster_than`` are ratios of the fastest rounds: what a busy machine adds is not the code's. ``counts``:
    every required peer has a time, or ran out of memory. ``early`` gets the row of a GPU as soon as it has its times.
    """
    errors: dict[str, float] = {}
    failed, first_call = dict(case.missing), {}
    providers = dict(case.providers)

    def first(name: str) -> None:
        if name == "floor":
            providers[name]()
        else:
            errors[name] = kernel_problem.errors(case, name)
        _synchronize(device)

    for name in case.providers:
        start = time.perf_counter()
        _unless_it_fails(name, partial(first, name), providers, failed, device)
        first_call[name] = round(time.perf_counter() - start, 3)
        if name == "ours":
            path = list(last_path(case.name.removesuffix(".frozen")) or ())
    times = take_turns(providers, device, rounds, failed=failed)
    fastest = {name: min(values) for name, values in times.items()}
    median = {name: statistics.median(values) for name, values in times.items()}
    seconds = median if case.ratios == "median" else fastest
    row: Row = {
        "operation": case.name, "path": path, **case.about, "fastest_s": fastest, "median_s": median,
        "times_faster_than": {name: s / seconds["ours"] for name, s in seconds.items() if name != "ours"},
        "error": errors, "failed": failed, "first_call_s": first_call,
        "useful_gflop_per_s": {name: case.useful / s / 1e9 for name, s in seconds.items()},
        "executed_gflop_per_s": {name: case.flop[name] / s / 1e9 for name, s in seconds.items() if name in case.flop},
        "gbyte_per_s": case.bytes / seconds["ours"] / 1e9,
        "counts": all(name in times or "OutOfMemory" in failed.get(name, "") for name in case.required),
    }  # fmt: skip
    if device == "cuda":
        row["launched"] = kernel_cases.launched()
        early(row)
        row["ceilings"] = kernel_times.ceilings()
        looks: dict[str, Callable[[Run], Any]] = {"host_s": _host, "on_device": _on_device, "peak_bytes": _peak}
        for look, of in looks.items():
            row[look] = {}
            for name, run in list(providers.items()):
                found = _unless_it_fails(name, partial(of, run), providers, failed, device)
                if name in providers:
                    row[look][name] = found
            early(row)
    return row


def _unless_it_fails(
    name: str, call: Callable[[], T], providers: dict[str, Any], failed: dict[str, str], device: str
) -> T | None:
    """What the call gives. Where it raises, unless it is ours, the provider goes from ``providers`` into ``failed``,
    with the reason: a peer must not cost the others their row."""
    try:
        return call()
    except Exception as reason:
        if name == "ours":
            raise
        failed[name] = why(reason)
        del providers[name]
    if device == "cuda":  # not before: until here the exception held the memory of the call
        torch.cuda.empty_cache()
    return None


def allowed_error(row: dict[str, Any]) -> float:
    """At most twice eager's own error; where eager cannot run, its budget in bfloat16."""
    return float(2 * row["error"].get("torch eager", 2**-8) + 1e-6)


def slower_than(row: dict[str, Any], stored: dict[str, Any], margin: float) -> str | None:
    """How a row's ratios to YARDSTICKS all fell by more than ``margin`` against the stored ones; None where one did
    not: then it was that yardstick, or what else the machine did, and not ours."""
    ratios, before = row["times_faster_than"], stored["times_faster_than"]
    peers = [peer for peer in YARDSTICKS if peer in ratios and peer in before]
    if not peers or any(ratios[peer] * margin >= before[peer] for peer in peers):
        return None
    return "; ".join(f"{ratios[peer]:.2f} x {peer}, was {before[peer]:.2f}" for peer in peers)


def take_turns(
    providers: dict[str, Run], device: str, rounds: int, before: dict[str, Callable[[], Any]] | None = None,
    failed: dict[str, str] | None = None,
) -> dict[str, list[float]]:  # fmt: skip
    """Seconds of ``rounds`` calls of each provider, one after the other in every round, after a warm-up; at least three
    of one that has used up LONG. ``before``: what a provider needs done before each call, on nobody's clock. Where
    ``failed`` is given, one that raises, unless it is ours, is taken from ``providers`` and named there."""
    seconds: dict[str, list[float]] = {name: [] for name in providers}

    def turn(name: str, timed: bool) -> None:
        if before and name in before:
            before[name]()
        _synchronize(device)
        start = _clock(device)
        providers[name]()
        _synchronize(device)
        if timed:
            seconds[name].append(_clock(device) - start)

    for round_ in range(rounds + 1):
        for name in list(providers):
            if len(seconds[name]) >= 3 and sum(seconds[name]) > LONG:
                continue
            if failed is None:
                turn(name, round_ > 0)
            else:
                _unless_it_fails(name, partial(turn, name, round_ > 0), providers, failed, device)
    return {name: seconds[name] for name in providers}


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


def _on_device(run: Run) -> dict[str, Any]:
    return kernel_times.looked_at(run, 8)


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

    def tell(row: Row) -> None:
        allowed = allowed_error(row)
        ok = row["counts"] and row["error"]["ours"] <= allowed
        print(json.dumps(row | {"ok": ok, "allowed_error": allowed}), flush=True)

    tell(measure(cases[arguments.name](), arguments.device, arguments.rounds, tell))


if __name__ == "__main__":
    main()
