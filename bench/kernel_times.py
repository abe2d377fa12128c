"""What the GPU spends its time on, kernel by kernel, and the two ceilings of it, measured where they are used."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.profiler
from records import why


def kernel_events(run: Callable[[], Any]) -> list[tuple[str, float, float]]:
    """(name, start, end) in seconds of every kernel and copy of a call, in their order."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    found = [
        (event.name, event.time_range.start / 1e6, event.time_range.end / 1e6)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    return sorted(found, key=lambda event: event[1])


def looked_at(run: Callable[[], Any], most: int) -> dict[str, Any]:
    """``summary`` of a call's events, or why there is none: no look may cost the times that were taken before it."""
    try:
        return summary(kernel_events(run), most)
    except Exception as reason:
        return {"failed": why(reason)}


def summary(events: Iterable[tuple[str, float, float]], most: int) -> dict[str, Any]:
    """``launches``; ``seconds`` of all together, ``span_seconds`` from the first's start to the last's end; and for the
    ``most`` costly names [launches, seconds, median seconds]."""
    events = list(events)
    taken: dict[str, list[float]] = defaultdict(list)
    for name, start, end in events:
        taken[name[:120]].append(end - start)
    costly = sorted(taken, key=lambda name: -sum(taken[name]))[:most]
    return {
        "launches": len(events),
        "seconds": sum(end - start for _, start, end in events),
        "span_seconds": max((end for *_, end in events), default=0.0) - min((e[1] for e in events), default=0.0),
        "kernels": {name: [len(taken[name]), sum(taken[name]), statistics.median(taken[name])] for name in costly},
    }


def ceilings() -> dict[str, float]:
    """FLOP/s of a large bfloat16 product and bytes/s of a large copy, of random numbers, the best of ten each."""
    square = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    block = torch.randn(1 << 29, device="cuda")
    other = torch.empty_like(block)
    product, copy = (_best(work) for work in (lambda: square @ square, lambda: other.copy_(block)))
    return {"flop_per_s": 2 * 8192**3 / product, "bytes_per_s": 2 * block.nbytes / copy}


def _best(work: Callable[[], Any], tries: int = 10) -> float:
    seconds = []
    for _ in range(tries):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return min(seconds)
