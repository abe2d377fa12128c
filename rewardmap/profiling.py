"""Where a run's time and memory go."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch


class PhaseTimer:
    """Seconds by named phase, for the current step and in total.

    A phase inside a phase is charged to the inner one alone, so that totals add up to the time inside phases. In a
    trace of ``torch.profiler`` phases are ranges of their name.

    Example:
        timer = PhaseTimer()
        with timer.phase("rollout"):
            ...
        row["seconds"] = timer.end_step()
    """

    def __init__(self) -> None:
        self.totals: dict[str, float] = {}
        """Seconds by phase since the start, this step included."""
        self._step: dict[str, float] = {}
        self._open: list[str] = []
        self._mark = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge the time of the block to ``name``, also when it raises."""
        self._charge()
        self._open.append(name)
        try:
            with torch.profiler.record_function(name):
                yield
        finally:
            self._charge()
            self._open.pop()

    def end_step(self) -> dict[str, float]:
        """Seconds by phase since the last call; starts the next step."""
        self._charge()
        step, self._step = self._step, {}
        return step

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._open:
            name = self._open[-1]
            self._step[name] = self._step.get(name, 0.0) + now - self._mark
            self.totals[name] = self.totals.get(name, 0.0) + now - self._mark
        self._mark = now


def speed(
    seconds: Mapping[str, float],
    *,
    packed_tokens: int,
    logical_tokens: int,
    slots: int,
    flop: Sequence[float],
    slowest_flop: float,
    model_flop: float,
    peak_flops: float | None,
) -> dict[str, float]:
    """How fast a step trained, over all ranks.

    Args:
        seconds: by phase, of this rank; ``train`` is forward, backward and update.
        packed_tokens: computed ones; ``logical_tokens`` those of the sequences without sharing.
        slots: tokens that the step's micro-batches have room for.
        flop: of each rank's micro-batches, by the cost model; ``slowest_flop`` the largest of each update's, for which
            all ranks wait; ``model_flop`` in all, without what is computed again.
        peak_flops: of one rank's device in the computing dtype, FLOP/s; None: not known, and no ``mfu``, ``hfu``.

    Returns:
        ``computed_tokens_per_second`` and ``logical_tokens_per_second`` of the phase ``train``; ``sharing``, logical
        over computed tokens; ``padding``, the share of room left empty; ``idle``, the share of all ranks' time spent
        waiting for the slowest, by the cost model; ``mfu`` and ``hfu``, model and hardware FLOP utilisation (arXiv
        2204.02311), of which the second counts what is computed again; ``peak_memory_gb`` of this rank's device, or
        resident.
    """
    row = {"peak_memory_gb": peak_memory_bytes() / 1e9}
    if not packed_tokens or not seconds.get("train"):
        return row
    train = seconds["train"]
    row |= {
        "computed_tokens_per_second": packed_tokens / train,
        "logical_tokens_per_second": logical_tokens / train,
        "sharing": logical_tokens / packed_tokens,
        "padding": 1 - packed_tokens / slots,
        "idle": 1 - sum(flop) / (len(flop) * slowest_flop),
    }
    if peak_flops is None:
        return row
    could = train * len(flop) * peak_flops
    return row | {"mfu": model_flop / could, "hfu": sum(flop) / could}


PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989.4e12, "H200": 989.4e12, "A100": 312e12, "B200": 2250e12}
"""Dense bf16 FLOP/s by the name of the device (vendors' data sheets)."""


def device_peak_flops(dtype: torch.dtype) -> float | None:
    """Of this process's GPU in bf16; None elsewhere, and for other dtypes."""
    if dtype != torch.bfloat16 or not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def peak_memory_bytes() -> int:
    """Largest memory of this process so far: of its GPU's allocator where there is one, else resident."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_rss_bytes()


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
