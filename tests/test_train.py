"""A run from end to end on a handful of maps: what it leaves behind, resuming, stopping, controls, and what can go
wrong."""

import errno
import fcntl
import io
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from rewardmap.config import Config, ConfigError
from rewardmap.config_file import load_config
from rewardmap.curriculum import Curriculum
from rewardmap.evaluate import ask
from rewardmap.policy import assemble, load_policy
from rewardmap.report import read_metrics
from rewardmap.rollout.local import LocalEngine
from rewardmap.tiny import WARM_START
from rewardmap.train import checkpoint, examine, run
from rewardmap.train.examine import EvalRequest, evaluate_target
from rewardmap.train.faults import RefusedUpdatesError, Stopped
from rewardmap.train.ranks import ALONE
from rewardmap.train.supervised import gold_answers
from rewardmap.train.trainer import Trainer
from rewardmap.transit.questions import gold_response, question_text
from rewardmap.transit.reasonmap import load_dataset, write_dataset, write_rows
from rewardmap.types import DataError

REAL = Path(__file__).parents[2] / "shared" / "data"
SMALL = [
    "data.train_maps=6",
    "data.test_maps=4",
    "train.prompts_per_step=6",
    "rollout.group_size=4",
    "train.checkpoint_every=2",
    "train.warmup_steps=0",
    "eval.samples=2",
    "train.stages=[{name='warm', kind='sft', steps=0, checkpoint='shipped'}, {name='yes or no', steps=2, "
    "question_kinds=['TorF1', 'TorF2']}, {name='routes', steps=3, question_kinds=['planning'], replay=0.5}]",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "maps"
    write_dataset(folder, maps={"train": 6, "test": 4}, seed=1)
    return folder


@pytest.fixture
def config(data) -> Config:
    return load_config("tiny", [*SMALL, f"data.path={data}"])


@pytest.fixture
def console() -> Console:
    return Console(quiet=True)


def make_trainer(config: Config) -> Trainer:
    loaded = load_dataset(config.data.path, "train")
    policy = load_policy(WARM_START, config.policy)
    curriculum = Curriculum(loaded.problems, config.train.stages, config.train.prompts_per_step, config.train.seed)
    networks = dict.fromkeys(("reference", "graph"), loaded.networks)
    return Trainer(config, policy, LocalEngine(policy, 64), networks, curriculum)


def changed(config: Config, **train) -> Config:
    overrides = [f"train.{key}={json.dumps(value)}" for key, value in train.items()]
    return load_config("tiny", [*SMALL, f"data.path={config.data.path}", *overrides])


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(run_dir: Path) -> list[dict]:
    return [
        {key: value for key, value in row.items() if key not in ("seconds", "speed")} for row in read_metrics(run_dir)
    ]


def test_a_run_leaves_everything_behind(tmp_path, console):
    out = run.train(load_config("tiny", SMALL), tmp_path / "run", console=console)
    rows = read_metrics(out)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["stage"] for row in rows] == ["yes or no"] * 2 + ["routes"] * 3
    assert set(rows[0]["accuracy_by_kind"]) <= {"TorF1", "TorF2"}
    assert all(row["logical_tokens"] >= row["packed_tokens"] and row["rollout_drift"] < 1e-4 for row in rows)
    report = json.loads((out / "report.json").read_text())
    assert set(report["weighted_accuracy"]) >= {"before", "after", "text_only"}
    assert all(0 <= value <= 1 for value in report["weighted_accuracy"].values())
    assert set(report["kinds"]) == {"TorF1", "TorF2", "Counting1", "Counting2", "Counting3", "planning"}
    assert report["kinds"]["planning"].keys() == {"before", "after", "n"}
    assert report["format_valid"].keys() == {"before", "after"}
    assert report["seconds"] > 0 and report["tokens_per_second"] > 0
    for name in (
        "curves.png",
        "samples/samples-1.png",
        "report.md",
        "config.toml",
        "evaluation/before.jsonl",
    ):
        assert (out / name).stat().st_size > 0
    assert list((out / "tensorboard").glob("events*"))
    assert load_config(out / "config.toml") == load_config("tiny", SMALL)
    last = checkpoint.list_checkpoints(out / "checkpoints")
    assert [path.name for path in last] == ["step-000004", "step-000005"]
    model = AutoModelForImageTextToText.from_pretrained(last[-1])
    assert model.config.model_type == "qwen2_5_vl"
    again = evaluate_target(EvalRequest(str(out)), console)
    repeated = json.loads((again / "report.json").read_text())
    assert repeated["weighted_accuracy"]["after"] == report["weighted_accuracy"]["after"]
    assert repeated["weighted_accuracy"]["before"] == report["weighted_accuracy"]["before"]
    elsewhere = evaluate_target(EvalRequest(str(out), data=out / "data"), console)
    assert json.loads((elsewhere / "report.json").read_text())["kinds"] == report["kinds"]
    with pytest.raises(ConfigError, match="already holds a run"):
        run.train(load_config("tiny", SMALL), out, console=console)
    with (out / "config.toml").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process trains this run"):
            run.resume(out, console=console)
    weights = last[-1] / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(DataError, match=r"step-000005: model\.safetensors does not match its checksum; resume"):
        evaluate_target(EvalRequest(str(out)), console)


@pytest.mark.parametrize(("correction", "times"), [("none", 1.0), ("truncate", 2.0), ("mask", 0.0)])
def test_tokens_the_engine_found_less_likely_weigh_more(config, correction, times):
    """An engine that says a third of each probability: the weight is 3, capped at 2 or left out."""
    norms = []
    for shift in (0.0, float(np.log(3))):
        settings = [f"rollout.importance_correction={correction}", f"data.path={config.data.path}"]
        trainer = make_trainer(load_config("tiny", [*SMALL, *settings]))
        generate = trainer.engine.generate

        def shifted(*arguments, generate=generate, shift=shift):
            groups = generate(*arguments)
            return [
                replace(
                    group,
                    rollouts=tuple(
                        replace(one, rollout_logprobs=tuple(nats - shift for nats in one.rollout_logprobs))
                        for one in group.rollouts
                    ),
                )
                for group in groups
            ]

        trainer.engine.generate = shifted
        norms.append(trainer.train_step()["grad_norm"])
    assert norms[0] > 0 and norms[1] == pytest.approx(times * norms[0], rel=1e-4)


@pytest.mark.parametrize("dies_at", [1, 3, 4], ids=["before-a-checkpoint", "inside-a-stage", "between-checkpoints"])
def test_a_killed_run_resumes_to_the_same_numbers(tmp_path, config, console, monkeypatch, dies_at):
    whole = run.train(config, tmp_path / "whole", console=console)
    train_step = Trainer.train_step

    def dying(self):
        if self.curriculum.step + 1 == dies_at:
            raise RuntimeError("killed")
        return train_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", dying)
        with pytest.raises(RuntimeError, match="killed"):
            run.train(config, tmp_path / "killed", console=console)
    resumed = run.resume(tmp_path / "killed", console=console)
    assert without_times(resumed) == without_times(whole)
    expected, got = (weights(path / "checkpoints" / "step-000005") for path in (whole, resumed))
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    assert (resumed / "evaluation/after.jsonl").read_text() == (whole / "evaluation/after.jsonl").read_text()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)], ids=str
)
def test_a_signal_saves_and_stops(tmp_path, config, console, monkeypatch, number, code):
    train_step = Trainer.train_step

    def interrupted(self):
        if self.curriculum.step == 2:
            os.kill(os.getpid(), number)
        return train_step(self)

    screen = Console(file=io.StringIO(), width=100)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted)
        with pytest.raises(Stopped, match=r"saved after step 3; go on with: rewardmap train --resume") as stopped:
            run.train(config, tmp_path / "run", console=screen)
    assert stopped.value.exit_code == code
    assert f"{number.name}: stopping after the step in progress; a second signal" in screen.file.getvalue()
    assert checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "step-000003"
    run.resume(tmp_path / "run", console=console)
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_a_signal_leaves_an_evaluation_at_once_and_its_answers_are_kept(tmp_path, config, console, monkeypatch):
    def interrupted(engine, problems, sampling, store, progress):
        ask(engine, problems[:3], sampling, store)
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("left already")

    with monkeypatch.context() as patch:
        patch.setattr(examine, "ask", interrupted)
        with pytest.raises(Stopped, match=r"^go on with: rewardmap train --resume .*/run$") as stopped:
            run.train(config, tmp_path / "run", console=console)
    assert stopped.value.exit_code == 143
    assert len((tmp_path / "run/evaluation/answers.jsonl").read_text().splitlines()) == 3
    run.resume(tmp_path / "run", console=console)
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5]

    def leave(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(examine, "ask", leave)
    with pytest.raises(KeyboardInterrupt, match=r"answers so far are kept in .*/eval-test; the same command goes on"):
        evaluate_target(EvalRequest(str(tmp_path / "run")), console)


def test_micro_batches_do_not_change_the_step(config):
    rows = [make_trainer(changed(config, max_tokens_per_micro_batch=size)).train_step() for size in (16_384, 150)]
    for key in ("loss", "grad_norm", "entropy"):
        assert rows[0][key] == pytest.approx(rows[1][key], rel=1e-4, abs=1e-6)
    assert rows[0]["reward"] == rows[1]["reward"]


def test_skipped_groups_keep_the_denominator(config):
    rows = [make_trainer(changed(config, skip_equal_groups=skip)).train_step() for skip in (True, False)]
    assert rows[0]["equal_groups"] > 0
    assert rows[0]["packed_tokens"] < rows[1]["packed_tokens"]
    for key in ("loss", "grad_norm"):
        assert rows[0][key] == pytest.approx(rows[1][key], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("objective", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo", "sapo", "reinforce"])
def test_every_objective_takes_a_step(config, objective):
    row = make_trainer(changed(config, objective=objective)).train_step()
    assert np.isfinite(row["loss"]) and row["grad_norm"] > 0


def test_controls(config):
    plain, zero, shuffled = (
        make_trainer(changed(config, advantage_control=control)) for control in ("none", "zero", "shuffle")
    )
    rows = [trainer.train_step() for trainer in (plain, zero, shuffled)]
    assert rows[0]["grad_norm"] > 0 and rows[1]["grad_norm"] == 0
    assert rows[2]["grad_norm"] > 0 and rows[2]["grad_norm"] != rows[0]["grad_norm"]
    assert rows[0]["reward"] == rows[1]["reward"] == rows[2]["reward"]  # only the update differs


def test_learning_goes_the_right_way(config):
    """Reinforcing the same problems raises their reward."""
    stage = "[{name='w', kind='sft', steps=0, checkpoint='shipped'}, {name='s', steps=30, question_kinds=['planning']}]"
    settings = [*SMALL, f"data.path={config.data.path}", f"train.stages={stage}", "rollout.group_size=8"]
    trainer = make_trainer(load_config("tiny", [*settings, "train.learning_rate=5e-4"]))
    rewards = [trainer.train_step()["reward"] for _ in range(30)]
    assert np.mean(rewards[-8:]) > np.mean(rewards[:8]) + 1


def test_supervised_steps_learn(config):
    stage = "[{name='study', kind='sft', steps=20, question_kinds=['planning'], learning_rate=0.001}]"
    trainer = make_trainer(load_config("tiny", [*SMALL, f"data.path={config.data.path}", f"train.stages={stage}"]))
    losses = [trainer.train_step()["loss"] for _ in range(20)]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


def test_a_given_answer_ends_as_the_chat_template_ends_a_turn(config, data):
    """Published Qwen models generate until <|im_end|> or <|endoftext|>, whose id is smaller."""
    loaded = load_policy(WARM_START, config.policy)
    own = loaded.tokenizer.convert_tokens_to_ids("<|im_end|>")
    loaded.model.generation_config.eos_token_id = [own, own - 1]
    policy = assemble(loaded.model, loaded.tokenizer, loaded.image_processor, True)
    assert set(policy.stop_token_ids) == {own, own - 1}
    problem = load_dataset(data, "train").problems[0]
    assert gold_answers(policy, problem, gold_response(problem), 0).responses[0][-1] == own


def test_a_gradient_that_is_no_number_never_reaches_the_weights(config, tmp_path):
    trainer = make_trainer(changed(config, skip_equal_groups=False))
    trainer.faults = tmp_path
    before = {name: tensor.clone() for name, tensor in trainer.policy.model.state_dict().items()}
    parameter = trainer.policy.model.model.language_model.norm.weight
    hook = parameter.register_hook(lambda gradient: gradient * float("nan"))
    rows = [trainer.train_step() for _ in range(2)]
    assert [row["refused"] for row in rows] == ["the gradient norm is nan"] * 2
    assert trainer.version == 0 and trainer.guard.refused == 2
    batch = json.loads((tmp_path / "step-000002.json").read_text())
    assert len(batch["answers"]) == len(batch["problems"]) == 6 and len(batch["rewards"]) == 24
    with pytest.raises(RefusedUpdatesError, match=r"step 3: the gradient norm is nan; 3 updates in a row were refused"):
        trainer.train_step()
    assert (tmp_path / "step-000003.json").is_file()
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.policy.model.state_dict().items())
    hook.remove()
    row = trainer.train_step()  # a finite gradient ends the streak
    assert "refused" not in row and trainer.version == 1 and trainer.guard.streak == 0


def test_an_infinite_loss_is_refused_in_a_supervised_step_too(config):
    stage = "[{name='study', kind='sft', steps=2, question_kinds=['planning']}]"
    trainer = make_trainer(load_config("tiny", [*SMALL, f"data.path={config.data.path}", f"train.stages={stage}"]))
    trainer.policy.model.lm_head.weight.data[3] = float("inf")
    row = trainer.train_step()
    assert row["refused"].startswith("the loss is ") and trainer.version == 0


@pytest.mark.parametrize("guard", ["max_grad_norm=1e-09", "max_kl=1e-30"])
def test_guards_refuse_large_updates(config, guard):
    settings = [*SMALL, f"data.path={config.data.path}", f"guard.{guard}", "train.skip_equal_groups=false"]
    trainer = make_trainer(load_config("tiny", settings))
    row = trainer.train_step()
    assert f"over guard.{guard}" in row["refused"] and trainer.version == 0


def test_a_trainable_tower_trains(config):
    settings = [*SMALL, f"data.path={config.data.path}", "policy.freeze_vision=false"]
    trainer = make_trainer(load_config("tiny", settings))
    before = trainer.policy.model.model.visual.merger.mlp[2].weight.clone()
    trainer.train_step()
    assert not torch.equal(before, trainer.policy.model.model.visual.merger.mlp[2].weight)
    assert trainer.train_step()["rollout_drift"] < 1e-4  # no stale vision features


def stages(config: Config, *later: str, questions: int = 6) -> Config:
    text = ", ".join(["{name='w', kind='sft', steps=0, checkpoint='shipped'}", *later])
    settings = [f"data.path={config.data.path}", f"train.stages=[{text}]", f"train.prompts_per_step={questions}"]
    return load_config("tiny", [*SMALL, *settings])


def test_a_stage_has_its_own_reward_group_size_and_rate(config):
    two = stages(
        config,
        "{name='a', steps=1, question_kinds=['planning']}",
        "{name='b', steps=1, question_kinds=['planning'], reward_mode='graph', group_size=3, learning_rate=1e-5}",
    )
    trainer = make_trainer(two)
    first, second = trainer.train_step(), trainer.train_step()
    assert (first["reward_mode"], first["group_size"], first["learning_rate"]) == ("reference", 4, 3e-4)
    assert (second["reward_mode"], second["group_size"], second["learning_rate"]) == ("graph", 3, 1e-5)
    assert first["asked"] == second["asked"] == {"planning": 6}
    assert trainer.optimizer.param_groups[0]["lr"] == 1e-5


def test_a_stage_reward_changes_what_is_trained(config):
    """Same questions, same answers: another update."""
    kinds = "question_kinds=['planning']"
    rows = []
    other = ("reward_mode='graph'", "alpha=0.0", "map_weights=[1.0, 5.0, 9.0]", "transfer_weight=4.0")
    for reward in ("", *(f", {setting}" for setting in other)):
        trainer = make_trainer(stages(config, f"{{name='a', steps=1, {kinds}{reward}}}", questions=24))
        rows.append(trainer.train_step())
    assert len({row["response_length"] for row in rows}) == 1
    assert rows[1]["reward"] != rows[0]["reward"] != rows[2]["reward"]
    assert rows[3]["reward"] == rows[4]["reward"] == rows[0]["reward"]  # the weight acts on the advantage
    assert len({row["grad_norm"] for row in rows}) == len(rows)


def test_values_of_a_stage_that_do_not_go_together_are_named(config, console, tmp_path):
    wrong = stages(config, "{name='routes', steps=1, reward_mode='graph', alpha=3.0}")
    with pytest.raises(ConfigError, match=r"stage 'routes': alpha 3\.0"):
        run.train(wrong, tmp_path / "run", console=console)
    assert not (tmp_path / "run").exists()


def test_a_gate_ends_a_stage_and_a_resumed_run_goes_on_inside_it(tmp_path, config, console, monkeypatch):
    """The gate of an easy stage opens after three steps; a kill in each stage changes nothing."""
    gated = stages(
        config,
        "{name='a', steps=9, question_kinds=['TorF1', 'TorF2'], advance_at=0.05, advance_window=2, min_steps=3}",
        "{name='b', steps=4, question_kinds=['planning'], replay=0.34, replay_from='earlier', pools='adaptive'}",
    )
    whole = run.train(gated, tmp_path / "whole", console=console)
    rows = read_metrics(whole)
    assert [row["stage"] for row in rows] == ["a"] * 3 + ["b"] * 4
    assert all(set(row["asked"]) <= {"TorF1", "TorF2"} for row in rows[:3])
    assert all(row["asked"]["planning"] == 4 for row in rows[3:])
    assert all(sum(row["pools"].values()) == pytest.approx(1) for row in rows[3:])
    assert rows[3]["pools"] != rows[6]["pools"]
    train_step = Trainer.train_step
    folder = tmp_path / "killed"
    for dies_at in (3, 6):

        def dying(self, at=dies_at):
            if self.curriculum.step + 1 == at:
                raise RuntimeError("killed")
            return train_step(self)

        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
            patch.setattr(Trainer, "train_step", dying)
            if folder.exists():
                run.resume(folder, console=console)
            else:
                run.train(gated, folder, console=console)
    run.resume(folder, console=console)
    assert without_times(folder) == without_times(whole)
    expected, got = (weights(path / "checkpoints" / "step-000007") for path in (whole, folder))
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_a_run_that_went_back_and_on_otherwise_is_evaluated_anew(tmp_path, config, console):
    folder = run.train(changed(config, keep_checkpoints=3), tmp_path / "run", console=console)
    answers = folder / "evaluation/answers.jsonl"
    asked = len(answers.read_text().splitlines())
    run.resume(folder, console=console)
    assert len(answers.read_text().splitlines()) == asked
    shutil.rmtree(folder / "checkpoints/step-000005")
    written = folder / "config.toml"
    written.write_text(written.read_text().replace("learning_rate = 0.0003", "learning_rate = 0.001"))
    run.resume(folder, console=console)
    assert len(answers.read_text().splitlines()) == 2 * asked - len(json_lines(folder / "evaluation/before.jsonl"))


@pytest.mark.parametrize(("baseline", "scale"), [("batch", "batch"), ("greedy", "none"), ("greedy", "batch")])
def test_baselines_by_hand(config, monkeypatch, baseline, scale):
    """REINFORCE++ and ReMax: advantages from the rewards, as their papers define them."""
    trainer = make_trainer(changed(config, advantage_baseline=baseline, advantage_scale=scale))
    seen = {}
    advantage, score = trainer._advantage, trainer._score

    def watch(groups, rewards, base):
        seen.update(rewards=rewards, base=base, advantage=advantage(groups, rewards, base))
        return seen["advantage"]

    def scored(stage, groups):
        seen.setdefault("sizes", []).append([len(group.rollouts) for group in groups])
        return score(stage, groups)

    monkeypatch.setattr(trainer, "_advantage", watch)
    monkeypatch.setattr(trainer, "_score", scored)
    row = trainer.train_step()
    assert np.isfinite(row["loss"]) and row["grad_norm"] > 0
    rewards = seen["rewards"].score
    if baseline == "batch":
        expected = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
        assert seen["base"] is None and seen["sizes"] == [[4]] * 6
    else:
        assert seen["sizes"] == [*[[4]] * 6, [1] * 6]
        assert all(len(set(seen["base"][4 * i : 4 * i + 4])) == 1 for i in range(6))
        expected = rewards - seen["base"]
        expected = expected / (expected.std(ddof=1) + 1e-6) if scale == "batch" else expected
    expected = expected * seen["rewards"].advantage_weight
    np.testing.assert_allclose(seen["advantage"].advantages.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert row["packed_tokens"] == make_trainer(changed(config, skip_equal_groups=False)).train_step()["packed_tokens"]


def test_a_run_on_nfs_is_locked_too(tmp_path, monkeypatch):
    """There an exclusive lock on a file opened for reading is EBADF (flock(2))."""
    (tmp_path / "config.toml").touch()
    flock = fcntl.flock

    def nfs(number, operation):
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(number, operation)

    monkeypatch.setattr(run.fcntl, "flock", nfs)
    with (
        run._alone_in(tmp_path, ALONE),
        pytest.raises(ConfigError, match="another process trains this run"),
        run._alone_in(tmp_path, ALONE),
    ):
        pass


def test_an_error_after_the_start_leaves_what_was_there(console, tmp_path, monkeypatch):
    def broken(job):
        raise DataError("map 7 cannot be read")

    monkeypatch.setattr(run, "_train_loop", broken)
    with pytest.raises(DataError, match="map 7"):
        run.train(load_config("tiny", SMALL), tmp_path / "run", console=console)
    assert (tmp_path / "run" / "config.toml").is_file()
    monkeypatch.undo()
    assert (run.resume(tmp_path / "run", console=console) / "report.json").is_file()


def test_only_the_first_stage_names_a_checkpoint(config, console, tmp_path):
    text = "[{name='a', steps=1}, {name='b', kind='sft', steps=0, checkpoint='shipped'}]"
    wrong = load_config("tiny", [*SMALL, f"data.path={config.data.path}", f"train.stages={text}"])
    with pytest.raises(ConfigError, match="only the first stage"):
        run.train(wrong, tmp_path / "run", console=console)
    assert not (tmp_path / "run").exists()


def test_other_peoples_files_are_left_alone(config, console, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="is not empty"):
        run.train(config, tmp_path, console=console)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.skipif(not REAL.is_dir(), reason="the real networks and pictures are not here")
def test_real_maps_train_two_steps_and_evaluate(tmp_path, console):
    """Real Oslo and Jinan: networks, pictures and question templates through the whole loop."""
    rows = []
    for name, level in (("norway/oslo", "middle"), ("china/jinan", "easy")):
        country, city = name.split("/")
        for kind, suffix in (("maps", ".png"), ("stations", ".json")):
            target = tmp_path / "data" / kind / country / f"{city}{suffix}"
            target.parent.mkdir(parents=True, exist_ok=True)
            source = REAL / kind / (f"{city}{suffix}" if kind == "maps" else f"{name}{suffix}")
            shutil.copy(source, target)
        network = json.loads((REAL / "stations" / f"{name}.json").read_text(encoding="utf-8"))
        for index, (line, stops) in enumerate(network.items()):
            first, last = (stop.split(" (")[0].split("（")[0] for stop in (stops[0], stops[-1]))
            common = {
                "country": country,
                "city": city,
                "station_1": first,
                "station_2": last,
                "figure": f"./maps/{name}.png",
                "json": f"./stations/{name}.json",
                "difficulty_city": level,
                "city_line_count": len(network),
                "city_transfer_count": 4,
                "question_transfer_count": 0,
            }
            rows += [
                {**common, "type": "TorF1", "answer": 1, "question": question_text("TorF1", first, last)},
                {
                    **common,
                    "type": "planning",
                    "answer": -1,
                    "question": question_text("planning", first, last),
                },
                {
                    **common,
                    "type": "TorF2",
                    "answer": 1,
                    "station_2": line,
                    "question": question_text("TorF2", first, line),
                },
            ]
            if index == 0:
                rows.append(
                    {
                        **common,
                        "type": "Counting3",
                        "answer": len(network),
                        "question": question_text("Counting3"),
                    }
                )
    for split in ("train", "test"):
        write_rows(tmp_path / "data", rows, split)
    config = load_config(
        "tiny",
        [
            *SMALL,
            f"data.path={tmp_path / 'data'}",
            "policy.max_pixels=50176",
            "rollout.max_new_tokens=16",
            "train.stages=[{name='warm', kind='sft', steps=0, checkpoint='shipped'}, {name='real', steps=2}]",
        ],
    )
    out = run.train(config, tmp_path / "run", console=console)
    report = json.loads((out / "report.json").read_text())
    assert [row["step"] for row in read_metrics(out)] == [1, 2]
    assert set(report["kinds"]) == {"TorF1", "TorF2", "Counting3", "planning"}
    assert (out / "samples" / "samples-1.png").is_file()
