"""The training step by itself: every objective, its denominators, controls, guards, a stage's own settings."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_run import SMALL, changed, stages

from rewardmap.config import Config, ConfigError
from rewardmap.config_file import load_config
from rewardmap.curriculum import Curriculum
from rewardmap.policy import assemble, load_policy
from rewardmap.rollout.local import LocalEngine
from rewardmap.tiny import WARM_START
from rewardmap.train.balance import CostModel
from rewardmap.train.faults import RefusedUpdatesError
from rewardmap.train.parallel import prepare_policy
from rewardmap.train.scoring import stage_rubric
from rewardmap.train.supervised import gold_answers
from rewardmap.train.trainer import Trainer
from rewardmap.transit.questions import gold_response
from rewardmap.transit.reasonmap import load_dataset
from rewardmap.types import DataError


@pytest.fixture
def config(data) -> Config:
    return load_config("tiny", [*SMALL, f"data.path={data}"])


def make_trainer(config: Config) -> Trainer:
    loaded = load_dataset(config.data.path, "train")
    policy = load_policy(WARM_START, config.policy)
    curriculum = Curriculum(loaded.problems, config.train.stages, config.train.prompts_per_step, config.train.seed)
    networks = dict.fromkeys(("reference", "graph"), loaded.networks)
    return Trainer(config, policy, LocalEngine(policy, 64), networks, curriculum)


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


OWN = """
def by_kind(problem, response):
    return {"TorF1": 1, "TorF2": 3.0}[problem.kind]

def none(problem, response):
    return None
"""


def test_a_reward_of_ones_own_takes_the_place_of_the_score_alone(config, tmp_path, monkeypatch):
    (tmp_path / "own_reward.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = [*SMALL, f"data.path={config.data.path}", "reward.function=own_reward:by_kind"]
    row, published = make_trainer(load_config("tiny", settings)).train_step(), make_trainer(config).train_step()
    asked = row["asked"]
    assert row["reward"] == (asked.get("TorF1", 0) + 3 * asked.get("TorF2", 0)) / sum(asked.values())
    assert row["accuracy"] == published["accuracy"] and row["equal_groups"] == 1 and row["loss"] == 0

    weighted = load_config("tiny", [*settings, "reward.weight_on=reward"])
    loaded = load_dataset(config.data.path, "train")
    problems = [problem for problem in loaded.problems if problem.kind in ("TorF1", "TorF2")]
    batch = stage_rubric(weighted, weighted.train.stages[1]).score(problems, [""] * len(problems), loaded.networks)
    assert len(set(batch.weight)) > 1
    assert batch.score.tolist() == [
        {"TorF1": 1, "TorF2": 3}[problem.kind] * weight
        for problem, weight in zip(problems, batch.weight, strict=True)
    ]


def test_rewards_of_ones_own_that_fail_are_named(config, tmp_path, monkeypatch):
    (tmp_path / "own_reward.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = [*SMALL, f"data.path={config.data.path}"]
    with pytest.raises(ConfigError, match=r"stage 'warm': reward function 'own_reward:absent': cannot be imported"):
        make_trainer(load_config("tiny", [*settings, "reward.function=own_reward:absent"]))
    trainer = make_trainer(load_config("tiny", [*settings, "reward.function=own_reward:none"]))
    with pytest.raises(DataError, match=r"question '\S+': reward\.function returned None, not a finite number"):
        trainer.train_step()


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


def test_a_warm_up_shows_in_the_rows(config):
    trainer = make_trainer(changed(config, warmup_steps=4, learning_rate=1e-3))
    rates = []
    for _ in range(5):
        rates.append(trainer.train_step()["learning_rate"])
        assert [group["lr"] for group in trainer.optimizer.param_groups] == rates[-1:]
    assert rates == [0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3]


def test_the_arithmetic_of_a_step_counts_a_tower_that_trains_once_a_picture(config):
    flop = []
    for freeze in (True, False):
        settings = [f"data.path={config.data.path}", f"policy.freeze_vision={str(freeze).lower()}"]
        more = ["train.skip_equal_groups=false", "train.max_tokens_per_micro_batch=150"]
        trainer = make_trainer(load_config("tiny", [*SMALL, *settings, *more]))
        problems = trainer.curriculum.peek()
        flop.append(trainer.train_step()["train_flop"][0])
    pictures = {problem.image: 4 * trainer.policy.encode(problem).image_tokens for problem in problems}
    cost = CostModel.of(trainer.policy.model.config, freeze_vision=False)
    assert len(pictures) < len(problems)
    assert flop[1] - flop[0] == sum(cost.patch * n + cost.patch_pair * n**2 for n in pictures.values())  # n patches


@pytest.mark.parametrize("again", [False, True])
def test_blocks_computed_again_count_as_work_of_the_hardware_alone(config, again):
    settings = [f"data.path={config.data.path}", f"parallel.activation_checkpointing={str(again).lower()}"]
    row = make_trainer(load_config("tiny", [*SMALL, *settings, "train.skip_equal_groups=false"])).train_step()
    assert (row["train_flop"][0] > row["model_flop"]) == again and row["train_flop"][0] >= row["model_flop"] > 0


def test_a_policy_of_which_nothing_trains_is_refused():
    config = load_config("tiny", ["policy.freeze=['*']"])
    with pytest.raises(ConfigError, match=r"policy\.freeze=\['\*'\] leaves nothing to train"):
        prepare_policy(load_policy(WARM_START, config.policy), config)


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


@pytest.mark.parametrize("correction", ["none", "truncate"])
def test_several_updates_a_step_are_counted_measured_and_told_the_engine_once(config, correction):
    settings = [f"data.path={config.data.path}", "train.updates_per_step=4", "train.skip_equal_groups=false"]
    trainer = make_trainer(load_config("tiny", [*SMALL, *settings, f"rollout.importance_correction={correction}"]))
    versions = []
    trainer.engine.update_weights = versions.append
    rows = [trainer.train_step() for _ in range(2)]
    assert versions == [4, 8] and trainer.step == 2 and rows[1]["step"] == 2
    whole = make_trainer(changed(config, skip_equal_groups=False)).train_step()
    for key in ("reward", "rollout_tokens", "logical_tokens"):
        assert rows[0][key] == whole[key]
    assert rows[0]["packed_tokens"] >= whole["packed_tokens"]  # questions about one map may come to two updates
    assert rows[0]["micro_batches"] == 4 > whole["micro_batches"]
    assert rows[0]["rollout_drift"] > 1e-5  # the later updates are off the policy that was sampled
    own = {"clip_fraction"} if correction == "none" else {"importance_mean", "importance_rejected"}
    assert rows[0].keys() - whole.keys() == own
    if correction == "truncate":
        assert rows[0]["importance_mean"] == pytest.approx(1, abs=0.2) and rows[0]["importance_mean"] != 1
    else:
        assert 0 <= rows[0]["clip_fraction"] < 1


def test_one_of_several_updates_may_be_refused(config, tmp_path):
    trainer = make_trainer(changed(config, skip_equal_groups=False, updates_per_step=3))
    trainer.faults, spoil = tmp_path, iter([1.0, float("nan"), 1.0])
    backward = trainer._backward

    def sometimes(*arguments):
        found = backward(*arguments)
        trainer.policy.model.lm_head.weight.grad *= next(spoil)
        return found

    trainer._backward = sometimes
    row = trainer.train_step()
    assert row["refused"] == "the gradient norm is nan" and trainer.version == 2 and trainer.guard.streak == 0
    assert len(json.loads((tmp_path / "step-000001.json").read_text())["answers"]) == 6


def test_refused_updates_in_a_row_end_the_run_though_a_later_one_of_the_step_is_good(config):
    trainer = make_trainer(changed(config, skip_equal_groups=False, updates_per_step=6))
    made, backward = [], trainer._backward

    def bad_until_the_fifth(*arguments):
        found = backward(*arguments)
        made.append(found)
        if len(made) < 5:
            trainer.policy.model.lm_head.weight.grad *= float("nan")
        return found

    trainer._backward = bad_until_the_fifth
    with pytest.raises(RefusedUpdatesError, match=r"step 1: .*; 3 updates in a row were refused"):
        trainer.train_step()
    assert len(made) == 3 and trainer.version == 0


def test_ranks_wait_for_the_slowest_of_each_update(config):
    trainer = make_trainer(changed(config, skip_equal_groups=False, updates_per_step=2))

    class Two:
        """This rank, and one whose two updates cost 1 and 9 as this one's cost 5 and 5."""

        def __init__(self, ranks):
            self.gather = lambda flop: [[5.0, 5.0], [1.0, 9.0]] if isinstance(flop, list) else ranks.gather(flop)
            self.sum, self.size, self.rank, self.is_first = ranks.sum, ranks.size, ranks.rank, True

    trainer.ranks = Two(trainer.ranks)
    row = trainer.train_step()
    assert row["train_flop"] == [10.0, 10.0] and row["slowest_flop"] == 14.0


def test_updates_that_a_step_cannot_make_are_refused():
    with pytest.raises(ConfigError, match=r"updates_per_step=7: at most train\.prompts_per_step=6, a question each"):
        load_config("tiny", [*SMALL, "train.updates_per_step=7"])
    off = [*SMALL, "train.updates_per_step=2", "train.objective=reinforce"]
    with pytest.raises(ConfigError, match=r"no ratio to them: set rollout\.importance_correction='truncate' or 'mask'"):
        load_config("tiny", off)
    load_config("tiny", [*off, "rollout.importance_correction=mask"])


def test_a_trainable_tower_trains(config):
    settings = [*SMALL, f"data.path={config.data.path}", "policy.freeze_vision=false"]
    trainer = make_trainer(load_config("tiny", settings))
    before = trainer.policy.model.model.visual.merger.mlp[2].weight.clone()
    trainer.train_step()
    assert not torch.equal(before, trainer.policy.model.model.visual.merger.mlp[2].weight)
    assert trainer.train_step()["rollout_drift"] < 1e-4  # no stale vision features


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
