"""Experiment trackers beside TensorBoard: Weights & Biases and trackio, each behind its own library."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from rewardmap.config import ConfigError
from rewardmap.files import write_text

PROJECT = "rewardmap"
ID = "tracker-id"
"""File of a run folder with what its run is called in the trackers."""


class Tracker(Protocol):
    """A run of a tracker."""

    def log(self, metrics: dict[str, Any], step: int | None = None) -> None: ...

    def finish(self) -> None: ...


class _WandbRun:
    """W&B drops rows whose step it has passed: those that a run makes again after a resume. Here the step is a number
    of the row, and the axis of the others."""

    def __init__(self, run: Any) -> None:
        run.define_metric("*", step_metric="step")
        self._run = run

    def log(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self._run.log({"step": step, **metrics})

    def finish(self) -> None:
        self._run.finish()


def open_trackers(names: Sequence[str], run_dir: Path, settings: Mapping[str, Any]) -> list[Tracker]:
    """Begin a run named after the run folder in each tracker, or go on with the one that this folder began: another
    folder of that name is another run.

    Args:
        names: of ``train.trackers``.
        settings: the configuration, shown beside the run.

    Raises:
        ConfigError: a library is not installed; before any is told of the run.
    """
    libraries = need_trackers(names)
    if not libraries:
        return []
    kept = run_dir / ID
    if not kept.exists():
        write_text(kept, f"{run_dir.name}-{secrets.token_hex(4)}")
    known = kept.read_text(encoding="utf-8")
    own = {"wandb": {"name": run_dir.name, "id": known, "dir": str(run_dir)}, "trackio": {"name": known}}
    runs = {
        name: library.init(project=PROJECT, config=dict(settings), resume="allow", **own[name])
        for name, library in libraries.items()
    }
    return [_WandbRun(run) if name == "wandb" else run for name, run in runs.items()]


def need_trackers(names: Sequence[str]) -> dict[str, Any]:
    """The trackers' libraries by name. Raises ConfigError for one that is not installed."""
    libraries = {}
    for name in names:
        try:
            libraries[name] = import_module(name)
        except ModuleNotFoundError:
            raise ConfigError(
                f"train.trackers names '{name}', which is not installed: pip install 'rewardmap[{name}]', or leave it "
                "out"
            ) from None
    return libraries
