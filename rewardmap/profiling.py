"""Where a run's time and memory go."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


class PhaseTimer:
    """Seconds by named phase, for the current step and in total.

    A phase inside a phase is charged to the inner one alone, so that totals add up to the time inside phases.

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


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
