"""Weights & Biases and trackio are told what TensorBoard is told; stand-ins keep the test off the network."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from rewardmap.config import ConfigError
from rewardmap.config_file import load_config
from rewardmap.report import MetricsLog, read_metrics
from rewardmap.train import run
from rewardmap.train.trackers import open_trackers


class Library(SimpleNamespace):
    """What both libraries share: ``init`` gives a run with ``log`` and ``finish``."""

    def __init__(self) -> None:
        super().__init__(begun=[], rows=[], finished=0)

    def init(self, **settings):
        self.begun.append(settings)
        return self

    def log(self, numbers, step=None):
        self.rows.append((step, numbers))

    def finish(self):
        self.finished += 1


class Wandb(Library):
    """Takes steps that grow only, as W&B does; a row that comes without one has the next."""

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, numbers, step=None):
        last = self.rows[-1][0] if self.rows else 0
        step = last + 1 if step is None else step
        if step > last:
            self.rows.append((step, numbers))

    @property
    def shown(self):
        """Steps as its charts have them."""
        return [numbers.get("step", step) for step, numbers in self.rows]


def libraries_of(monkeypatch):
    libraries = {"wandb": Wandb(), "trackio": Library()}
    for name, library in libraries.items():
        monkeypatch.setitem(sys.modules, name, library)
    return libraries


def test_each_step_reaches_each_tracker(tmp_path, monkeypatch):
    libraries = libraries_of(monkeypatch)
    run_dir = tmp_path / "seed-3"
    run_dir.mkdir()
    for last in (0, 1):  # a run, and its resumption from a checkpoint of step 1
        trackers = open_trackers(["wandb", "trackio"], run_dir, {"train": {"seed": 3}})
        with MetricsLog(run_dir, last, trackers) as log:
            log.append({"step": last + 1, "stage": "a", "reward": 1.5, "seconds": {"train": 0.25}})
            log.append({"step": last + 2, "stage": "a", "reward": 2.5, "seconds": {"train": 0.5}})
    assert [row["step"] for row in read_metrics(run_dir)] == [1, 2, 3]
    for name, library in libraries.items():
        begun = library.begun[1]
        assert begun == library.begun[0]
        assert (begun["project"], begun["resume"], begun["config"]) == ("rewardmap", "allow", {"train": {"seed": 3}})
        assert (begun["name"] == "seed-3") == (name == "wandb") == ("id" in begun)
        assert library.finished == 2 and {"reward": 1.5, "seconds/train": 0.25}.items() <= library.rows[0][1].items()
    assert libraries["wandb"].shown == [step for step, _ in libraries["trackio"].rows] == [1, 2, 2, 3]


def test_two_folders_of_one_name_are_two_runs(tmp_path, monkeypatch):
    libraries = libraries_of(monkeypatch)
    for sweep in ("a", "b"):
        run_dir = tmp_path / sweep / "seed-3"
        run_dir.mkdir(parents=True)
        open_trackers(list(libraries), run_dir, {})
    assert len({begun["id"] for begun in libraries["wandb"].begun}) == 2
    assert len({begun["name"] for begun in libraries["trackio"].begun}) == 2


def test_a_tracker_that_is_not_installed_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "trackio", Library())
    with pytest.raises(ConfigError, match=r"'wandb', which is not installed: pip install 'rewardmap\[wandb\]'"):
        open_trackers(["trackio", "wandb"], tmp_path, {})
    assert sys.modules["trackio"].begun == []
    with pytest.raises(ConfigError, match="'wandb', which is not installed"):
        run.train(load_config("tiny", ["train.trackers=['wandb']"]), tmp_path / "run", console=Console(quiet=True))
    assert not (tmp_path / "run").exists()  # nothing was drawn or loaded
