"""The metrics of a run: ``metrics.jsonl``, one object a step, and TensorBoard events beside it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rewardmap.files import write_text
from rewardmap.types import DataError

FILE = "metrics.jsonl"
EVENTS = "tensorboard"


class MetricsLog:
    """Writes one row per step, flushed at once; a context manager.

    Example:
        with MetricsLog(run_dir, last_step=trainer.step) as log:
            log.append({"step": 1, "stage": "planning", "reward": 3.2, "seconds": {"rollout": 0.2, "train": 0.1}})
    """

    def __init__(self, run_dir: Path, last_step: int = 0, trackers: Sequence[Any] = ()) -> None:
        """Rows after ``last_step`` are cut away in both files: a run resumes from there. 0 starts anew.

        Args:
            trackers: told each row's numbers with ``log(numbers, step=step)``, ended with ``finish()``.
        """
        from torch.utils.tensorboard import SummaryWriter

        self._path, self._trackers = run_dir / FILE, trackers
        kept = [row for row in read_metrics(run_dir) if row["step"] <= last_step]
        write_text(self._path, "".join(_line(row) for row in kept))
        # Unbuffered: nothing is left to be written, and to fail again, when the log closes after a full disk.
        self._file = self._path.open("ab", buffering=0)
        self._events = SummaryWriter(str(run_dir / EVENTS), purge_step=last_step + 1)
        self._stage = kept[-1].get("stage") if kept else None

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row of JSON values with an integer ``step``; numbers that are not finite become null.

        Raises:
            OSError: naming the file, e.g. when the disk is full.
        """
        line = memoryview(_line(row).encode())
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        self._tell({name: value for name, value in _scalars(row) if name != "step"}, row["step"])
        if row.get("stage") != self._stage:
            self._stage = row.get("stage")
            self._events.add_text("stage", str(self._stage), row["step"])

    def held_out(self, step: int, numbers: Mapping[str, float]) -> None:
        """Tell TensorBoard and the trackers what was measured on held-out maps after a step; its row stays as it is."""
        self._tell({f"held_out/{name}": value for name, value in numbers.items()}, step)

    def _tell(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._events.add_scalar(name, value, step)
        for tracker in self._trackers:
            tracker.log(numbers, step=step)

    def sync(self) -> None:
        """Every row is on the disk when this returns: before a checkpoint that a run resumes from behind them.

        Raises:
            OSError: naming the file.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def close(self) -> None:
        self._file.close()
        self._events.close()
        for tracker in self._trackers:
            tracker.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows written so far, none when there is no file. A last line cut off by a kill is left out.

    Raises DataError, naming the line, for a damaged file.
    """
    path = run_dir / FILE
    if not path.exists():
        return []
    *lines, unfinished = path.read_text(encoding="utf-8").split("\n")
    del unfinished  # what follows the last newline
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error}); mend or remove the line") from None
    return rows


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _scalars(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)):
            yield f"{prefix}{key}", float(value)
