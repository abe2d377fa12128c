"""One-step-off: answers lag by one update, are made while the step before trains, and survive a kill."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from rewardmap.config import Config, ConfigError
from rewardmap.config_file import load_config
from rewardmap.curriculum import Curriculum
from rewardmap.policy import load_policy
from rewardmap.report import read_metrics
from rewardmap.rollout.local import LocalEngine
from rewardmap.tiny import WARM_START
from rewardmap.train import run
from rewardmap.train.ahead import OneStepOff
from rewardmap.train.checkpoint import list_checkpoints
from rewardmap.train.trainer import Trainer
from rewardmap.transit.reasonmap import load_dataset
from rewardmap.types import DataError

SMALL = [
    "train.prompts_per_step=6",
    "rollout.group_size=4",
    "rollout.importance_correction=truncate",
    "train.checkpoint_every=2",
    "train.warmup_steps=0",
    "eval.before=false",
    "eval.text_only=false",
    "eval.max_problems=2",
    "eval.samples=0",
    "train.stages=[{name='warm', kind='sft', steps=0, checkpoint='shipped'}, {name='study', kind='sft', steps=1}, "
    "{name='yes or no', steps=3, question_kinds=['TorF1', 'TorF2'], advance_at=0.01, advance_window=1, "
    "pools='adaptive'}, "
    "{name='routes', steps=3, question_kinds=['planning'], replay=0.5, pools='adaptive'}]",
]


def settings(data: Path, *more: str) -> Config:
    return load_config("tiny", [*SMALL, f"data.path={data}", "rollout.staleness=1", *more])


def make(kind: type[Trainer], config: Config) -> Trainer:
    loaded = load_dataset(config.data.path, "train")
    policy = load_policy(WARM_START, config.policy)
    curriculum = Curriculum(loaded.problems, config.train.stages, config.train.prompts_per_step, config.train.seed)
    return kind(config, policy, LocalEngine(policy, 64), {"reference": loaded.networks}, curriculum)


def numbers(run_dir: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in ("seconds", "speed")} for row in read_metrics(run_dir)]


def test_answers_lag_by_one_update_and_a_killed_run_resumes_to_the_same_numbers(tmp_path, data, monkeypatch):
    """Killed before the first checkpoint, at a stage's end, and between checkpoints. The gate of the second stage opens
    after its first step, when its second is drawn already."""
    console, config = Console(quiet=True), settings(data)
    whole = run.train(config, tmp_path / "whole", console=console)
    rows = read_metrics(whole)
    assert [row["stage"] for row in rows] == ["study", *["yes or no"] * 2, *["routes"] * 3]
    # Also of a stage's last step, after which the next stage has been drawn from.
    assert [{pool.split("/")[0] for pool in row["pools"]} for row in rows[1:]] == (
        [{"TorF1", "TorF2"}] * 2 + [{"planning"}] * 3
    )
    assert [row.get("staleness") for row in rows] == [None, 1, 1, 1, 1, 1]
    assert all(row["rollout_drift"] > 1e-6 for row in rows[1:])  # the weights did change in between
    assert [path.name for path in list_checkpoints(whole / "checkpoints")] == ["step-000004", "step-000006"]
    learn, killed = Trainer._learn, tmp_path / "killed"
    for dies_at in (1, 4, 6):

        def dying(self, draw, at=dies_at):
            if self.step + 1 == at:
                raise RuntimeError("killed")
            return learn(self, draw)

        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
            patch.setattr(Trainer, "_learn", dying)
            if killed.exists():
                run.resume(killed, console=console)
            else:
                run.train(config, killed, console=console)
    run.resume(killed, console=console)
    assert numbers(killed) == numbers(whole)
    expected, got = (load_file(path / "checkpoints/step-000006/model.safetensors") for path in (whole, killed))
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_without_learning_it_is_the_synchronous_loop(data):
    """At a learning rate of 0 stale weights are the weights."""
    stages = "train.stages=[{name='warm', kind='sft', steps=0, checkpoint='shipped'}, {name='all', steps=3}]"
    config = settings(data, "train.learning_rate=0.0", stages, "train.advantage_baseline=greedy",
                      "train.advantage_scale=batch")  # fmt: skip
    ahead, plain = make(OneStepOff, config), make(Trainer, config)
    for _ in range(3):
        row = ahead.train_step()
        row.pop("staleness")
        assert row == plain.train_step()


def test_the_next_batch_is_sampled_meanwhile_and_finished_before_the_weights_change(data, monkeypatch):
    """An engine that answers only once the step before is in its backward pass."""
    trainer = make(OneStepOff, settings(data, "rollout.engine=sglang"))
    trained = threading.Event()
    generate, backward, seen = trainer.engine.generate, trainer._backward, []
    weight = trainer.policy.model.lm_head.weight

    def slow(*arguments):
        if threading.current_thread() is not threading.main_thread():
            before = weight.detach().clone()
            assert trained.wait(60), "the answers were waited for before the step had trained"
            groups = generate(*arguments)
            seen.append(torch.equal(before, weight))
            return groups
        return generate(*arguments)

    def noted(*arguments):
        metrics = backward(*arguments)
        trained.set()
        return metrics

    monkeypatch.setattr(trainer.engine, "generate", slow)
    monkeypatch.setattr(trainer, "_backward", noted)
    trained.set()
    trainer.train_step()  # supervised: nothing of it is recorded
    seen.clear()
    for _ in range(2):
        trained.clear()
        before = weight.detach().clone()
        assert trainer.train_step()["staleness"] == 1
        assert not torch.equal(before, weight)
    assert seen == [True, True]


def test_an_engine_that_fails_meanwhile_ends_the_step(data, monkeypatch):
    trainer = make(OneStepOff, settings(data, "rollout.engine=sglang"))
    monkeypatch.setattr(trainer.engine, "generate", lambda *arguments: 1 / 0)
    version = trainer.version
    with pytest.raises(ZeroDivisionError):
        trainer.train_step()
    assert trainer.version == version


def test_answers_that_wait_are_not_left_out_by_a_synchronous_resume(tmp_path, data, monkeypatch):
    """The curriculum would be a step ahead of the trainer, and the run would never end."""
    folder, console, learn = tmp_path / "run", Console(quiet=True), Trainer._learn

    def dying(self, draw):
        return learn(self, draw) if self.step < 2 else 1 / 0

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Trainer, "_learn", dying)
        run.train(settings(data, "train.stages=[{name='all', steps=4}]"), folder, console=console)
    written = folder / "config.toml"
    written.write_text(written.read_text().replace("staleness = 1", "staleness = 0"))
    with pytest.raises(ConfigError, match=r"step-000002 holds .* resume with rollout\.staleness=1"):
        run.resume(folder, console=console)


def test_answers_to_a_question_that_is_gone_are_named(data):
    config = settings(data, "train.stages=[{name='all', steps=3}]")
    trainer, other = make(OneStepOff, config), make(OneStepOff, config)
    trainer.train_step()
    state = trainer.state_dict()
    gone = state["ahead"]["uids"][0]
    other.curriculum.problems = tuple(problem for problem in other.curriculum.problems if problem.uid != gone)
    with pytest.raises(DataError, match=f"answers to '{gone}', which the data lacks"):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("rollout.importance_correction=none", "set importance_correction='truncate' or 'mask'"),
        ("rollout.server.colocated=true", "not with server.colocated=true"),
    ],
)
def test_settings_that_do_not_go_together(data, wrong, says):
    with pytest.raises(ConfigError, match=says):
        settings(data, wrong)
