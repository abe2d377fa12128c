"""Experiment trackers beside TensorBoard: Weights & Biases and trackio, each behind its own library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from rewardmap.config import ConfigError

PROJECT = "rewardmap"


class Tracker(Protocol):
    """A run as both libraries give it."""

    def log(self, metrics: dict[str, Any], step: int | None = None) -> None: ...

    def finish(self) -> None: ...


def open_trackers(names: Sequence[str], run_dir: Path, settings: Mapping[str, Any]) -> list[Tracker]:
    """Begin a run of the run folder's name in each tracker, or go on with the one of that name.

    Args:
        names: of ``train.trackers``.
        settings: the configuration, shown beside the run.

    Raises:
        ConfigError: a library is not installed; before any is told of the run.
    """
    libraries = {name: _library(name) for name in names}
    own = {"wandb": {"id": run_dir.name, "dir": str(run_dir)}}
    return [
        library.init(project=PROJECT, name=run_dir.name, config=dict(settings), resume="allow", **own.get(name, {}))
        for name, library in libraries.items()
    ]


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError:
        raise ConfigError(
            f"train.trackers names '{name}', which is not installed: pip install 'rewardmap[{name}]', or leave it out"
        ) from None
