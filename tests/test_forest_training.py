"""Training on forests: ten updates with and without sharing, the KL term's reference, answers refused before the step,
batches from few maps."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import re
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from rewardmap.config import Config, ConfigError, PolicyConfig, RolloutConfig, StageConfig, TrainConfig
from rewardmap.curriculum import Curriculum
from rewardmap.rewards import RewardBatch
from rewardmap.tiny import build_tiny
from rewardmap.train import trainer as trainer_module
from rewardmap.train.forest import Answers, pack_forest
from rewardmap.train.forward import Vision, response_hidden
from rewardmap.train.lora import add_lora, without_adapters
from rewardmap.train.reference import make_reference
from rewardmap.train.trainer import Trainer
from rewardmap.types import KINDS, DataError, Problem, Rollout, RolloutGroup

sys.path.append(str(Path(__file__).parent))
import forest_models as models

GROUP = 4
PROBLEMS = [
    Problem(f"q{place}", models.PICTURES[place % 2], "who? " * (place % 3) + "why", "TorF1", 1, "", "", "a/b", "easy")
    for place in range(6)
]


class Recorded:
    """An engine that answers every step from a record: seeded answers of 1 to 9 tokens that often begin alike."""

    def __init__(self, policy, step=0):
        self.policy, self.step = policy, step
        self.change = lambda group: group

    def generate(self, problems, group_size, sampling, on_group=None):
        rng = np.random.default_rng([5, self.step])
        self.step += 1
        groups = []
        for problem in problems:
            start = rng.integers(0, 200, 3).tolist()
            rollouts = []
            for _ in range(group_size):
                tokens = start[: rng.integers(0, 4)] + rng.integers(0, 200, rng.integers(1, 7)).tolist()
                rollouts.append(Rollout(tuple(tokens), (-1.0,) * len(tokens), "", "stop", 0))
            groups.append(self.change(RolloutGroup(problem, self.policy.encode(problem).token_ids, tuple(rollouts))))
            if on_group is not None:
                on_group(len(groups) - 1, groups[-1])
        return groups

    def update_weights(self, version): ...

    def metrics(self):
        return {}

    def close(self): ...


class GivenRewards(Trainer):
    def _score(self, stage, groups):
        uids = [group.problem.uid for group in groups]
        seeds = ([6, self.curriculum.step, *uid.encode()] for uid in uids)
        score = np.concatenate([np.random.default_rng(seed).integers(0, 3, GROUP) / 2 for seed in seeds])
        ones = np.ones(len(score))
        return RewardBatch(score, score > 0, ones, ones, score > 0, np.zeros(len(score), np.int8), ones)


def make(policy, reference=None, **train):
    config = Config(
        policy=PolicyConfig(freeze_vision=policy.freeze_vision),
        rollout=RolloutConfig(group_size=GROUP),
        train=TrainConfig(
            stages=(StageConfig(name="all", question_kinds=KINDS),), prompts_per_step=4, max_grad_norm=0.5, **train
        ),
    )
    curriculum = Curriculum(PROBLEMS, config.train.stages, 4, 0)
    return GivenRewards(config, policy, Recorded(policy), {config.reward.mode: {}}, curriculum, reference=reference)


def double(freeze_vision=False):
    policy = build_tiny(3, freeze_vision)
    policy.model.double()
    return policy


def test_ten_updates_with_and_without_sharing_give_the_same_parameters(monkeypatch):
    found = []
    for share in (True, False):
        monkeypatch.setattr(trainer_module, "pack_forest", functools.partial(pack_forest, share=share))
        trainer = make(double(), max_tokens_per_micro_batch=600, learning_rate=0.05)
        trainer.optimizer = torch.optim.SGD(trainer.optimizer.param_groups[0]["params"])
        rows = [trainer.train_step() for _ in range(10)]
        assert rows[0]["packed_tokens"] < rows[0]["logical_tokens"] or not share
        assert all(row["grad_norm"] > 0 for row in rows)
        found.append({name: value.detach() for name, value in trainer.policy.model.named_parameters()})
    start = dict(double().model.named_parameters())
    moved = 0
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=0, atol=1e-7)
        moved += not torch.allclose(value, start[name], rtol=0, atol=1e-4)
    assert moved > 20


def near(policy):
    """A change that gives a group the log-probabilities of an engine whose policy is near this one."""

    def change(group):
        answers = tuple(rollout.token_ids for rollout in group.rollouts)
        with torch.no_grad():
            prompt = policy.encode(group.problem)
            rows = models.unshared_logprobs(policy, [Answers(prompt, group.problem.image, answers, (0, 1, 2, 3))])
        rng = np.random.default_rng([*group.problem.uid.encode()])
        rollouts = []
        for number, rollout in enumerate(group.rollouts):
            said = rows[number].numpy() + rng.normal(0, 0.3, len(rows[number]))
            rollouts.append(dataclasses.replace(rollout, rollout_logprobs=tuple(said.tolist())))
        return dataclasses.replace(group, rollouts=tuple(rollouts))

    return change


def test_several_updates_on_a_step_s_answers_are_those_of_clipped_policy_gradients():
    """arXiv 1707.06347, eq. 7, against the engine's policy, over the tokens of each update's share of the groups."""
    settings = {"updates_per_step": 2, "objective": "dapo", "clip_eps_high": 0.28, "learning_rate": 5.0}
    trainer = make(double(), max_tokens_per_micro_batch=600, **settings)
    trainer.optimizer = torch.optim.SGD(trainer.optimizer.param_groups[0]["params"])
    trainer.engine.change = near(double())
    plain, drawn = double(), []
    answer = trainer._answer
    trainer._answer = lambda draw: drawn.append(answer(draw)) or drawn[-1]
    row = trainer.train_step()
    groups = drawn[0].groups
    advantages = trainer._advantage(groups, trainer_module.join(drawn[0].rewards), None).advantages.double()
    losses, clipped, count = [], 0, 0
    for half in (0, 1):
        loss, tokens = 0.0, 0
        for place in (2 * half, 2 * half + 1):
            group = groups[place]
            answers = tuple(rollout.token_ids for rollout in group.rollouts)
            batch = [Answers(plain.encode(group.problem), group.problem.image, answers, (0, 1, 2, 3))]
            for number, logprobs in models.unshared_logprobs(plain, batch).items():
                advantage = advantages[4 * place + number]
                ratio = (logprobs - torch.tensor(group.rollouts[number].rollout_logprobs, dtype=torch.float64)).exp()
                loss = loss - torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage).sum()
                tokens += len(logprobs)
                if len(set(advantages[4 * place : 4 * place + 4].tolist())) > 1:
                    clipped += int(((ratio > 1.28) & (advantage > 0) | (ratio < 0.8) & (advantage < 0)).sum())
                    count += len(logprobs)
        (loss / tokens).backward()
        losses.append(loss.item() / tokens)
        weights = [parameter for parameter in plain.model.parameters() if parameter.grad is not None]
        torch.nn.utils.clip_grad_norm_(weights, 0.5)
        with torch.no_grad():
            for parameter in weights:
                parameter -= 5.0 * parameter.grad
                parameter.grad = None
    assert trainer.version == 2 and clipped > 3
    assert row["loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert row["clip_fraction"] == pytest.approx(clipped / count)
    start = dict(double().model.named_parameters())
    moved = 0
    for (name, value), expected in zip(trainer.policy.model.named_parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6, msg=name)
        moved += not torch.allclose(value, start[name], rtol=0, atol=1e-4)
    assert moved > 20


@pytest.mark.parametrize(("kind", "updates"), [("rl", 1), ("rl", 2), ("sft", 1)])
def test_the_next_step_s_pictures_are_decoded_while_this_one_trains(kind, updates, monkeypatch):
    policy = build_tiny(3, True)
    trainer = make(policy, max_tokens_per_micro_batch=600, updates_per_step=updates)
    trainer.curriculum.stages = (dataclasses.replace(trainer.curriculum.stages[0], kind=kind),)
    asked, sampled = [], []
    backward, draw = torch.Tensor.backward, trainer._draw
    monkeypatch.setattr(policy, "prefetch", lambda problems: asked.append([problem.uid for problem in problems]))
    monkeypatch.setattr(torch.Tensor, "backward", lambda *a, **k: (asked.append("trains"), backward(*a, **k))[1])

    def noted():
        asked.append("step")
        drawn = draw()
        sampled.append([problem.uid for problem in drawn.problems])
        return drawn

    monkeypatch.setattr(trainer, "_draw", noted)
    for _ in range(4):
        trainer.train_step()
    steps = " ".join(map(str, asked)).split("step")[1:]
    for step, following in zip(steps, sampled[1:], strict=False):
        before, _, after = step.partition("trains")
        if updates == 1:
            assert str(following) in before and "trains" in step
        else:  # only once all pictures of its own are seen: in a full cache they would take the place of those
            assert step.count(str(following)) == 1 and str(following) in after and "trains" in after


def law_of_the_kl_term(policy, reference_rows, groups, coef):
    """Gradients of coef times the mean over answers of the mean k3 over their tokens, one sequence at a time."""
    batch = [
        Answers(policy.encode(g.problem), g.problem.image, tuple(r.token_ids for r in g.rollouts),
                tuple(range(place * GROUP, (place + 1) * GROUP)))
        for place, g in enumerate(groups)
    ]  # fmt: skip
    rows = models.unshared_logprobs(policy, batch)
    if reference_rows is None:
        return {number: row.detach() for number, row in rows.items()}
    off = {number: reference_rows[number] - row for number, row in rows.items()}
    loss = sum((x.exp() - x - 1).mean() for x in off.values()) * coef / len(rows)
    loss.backward()
    return loss.item(), models.gradients(policy)


@pytest.mark.parametrize("lora", [False, True])
def test_the_kl_term_holds_to_the_reference(lora):
    if lora and importlib.util.find_spec("peft") is None:
        pytest.skip("peft is not installed")
    policy = double(freeze_vision=True)
    settings = PolicyConfig(lora_rank=2 * lora)
    config = Config(policy=settings, train=TrainConfig(kl_coef=0.3))
    if lora:
        add_lora(policy, settings)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    reference = make_reference(policy, config, None if lora else policy)
    if not lora:
        with torch.no_grad():
            for parameter in policy.text_model.parameters():
                parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    trainer = make(policy, reference, kl_coef=0.3, advantage_control="zero", max_tokens_per_micro_batch=600)
    _, problems = trainer.curriculum.sample()
    groups = trainer.engine.generate(problems, GROUP, None)
    advantage = trainer._advantage(groups, trainer._score(None, groups), None)
    metrics = trainer._backward(trainer._pack(groups, advantage), advantage.advantages, groups)
    found = models.gradients(policy)
    if lora:
        with without_adapters(policy.model):
            rows = law_of_the_kl_term(policy, None, groups, 0.3)
    else:
        rows = law_of_the_kl_term(reference.frozen, None, groups, 0.3)
    loss, expected = law_of_the_kl_term(policy, rows, groups, 0.3)
    assert loss > 1e-4 and metrics["reference_kl"] > 1e-3
    assert metrics["loss"] == pytest.approx(loss, rel=1e-6)
    assert found.keys() == expected.keys() and found
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-6 * max(float(gradient.abs().max()), 1e-6), name


def test_a_reference_that_would_not_be_one_is_refused():
    policy = double()
    config = Config(policy=PolicyConfig(lora_rank=2, freeze_vision=False), train=TrainConfig(kl_coef=0.1))
    with pytest.raises(ConfigError, match=r"policy\.freeze_vision=true"):
        make_reference(policy, config, None)
    with pytest.raises(ConfigError, match="needs a reference policy"):
        make(policy, kl_coef=0.1)


def spoiled(policy, how):
    """A change that makes the group of problem q1 untrainable."""

    def change(group):
        if group.problem.uid != "q1":
            return group
        first, *rest = group.rollouts
        if how == "empty":
            first = dataclasses.replace(first, token_ids=(), rollout_logprobs=())
        elif how == "placeholder":
            first = dataclasses.replace(first, token_ids=(7, policy.banned_token_ids[0]), rollout_logprobs=(0.0, 0.0))
        elif how == "long":
            first = dataclasses.replace(first, token_ids=(7,) * 600, rollout_logprobs=(0.0,) * 600)
        prompt = group.prompt_token_ids
        if how == "image":
            prompt = tuple(token for place, token in enumerate(prompt) if place != 5)
        if how == "prompt":
            prompt = (*prompt[:-1], 3)
        return RolloutGroup(group.problem, prompt, (first, *rest))

    return change


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("empty", "q1: answer 0 has no tokens"),
        ("placeholder", "q1: answer 0 holds the placeholder token"),
        ("long", r"q1: the prompt with answer 0 takes \d+ tokens, over train.max_tokens_per_micro_batch=600"),
        ("image", r"q1: the engine's prompt holds \d+ image tokens, the picture's grid \(1, \d+, \d+\) makes \d+"),
        ("prompt", r"q1: the engine's prompt \(\d+ tokens\) is not the trainer's"),
    ],
)
def test_answers_that_cannot_be_trained_on(how, says):
    policy = build_tiny(3, True)
    for on_bad in ("raise", "skip"):
        trainer = make(policy, max_tokens_per_micro_batch=600, on_bad_group=on_bad)
        trainer.engine.change = spoiled(policy, how)
        before = {name: value.clone() for name, value in policy.model.named_parameters()}
        rows = []
        try:
            for _ in range(3):
                rows.append(trainer.train_step())
        except DataError as error:
            assert on_bad == "raise"
            assert re.search(says, str(error)) and "on_bad_group='skip'" in str(error)
            if not rows:
                assert all(torch.equal(value, before[name]) for name, value in policy.model.named_parameters())
            continue
        assert on_bad == "skip"
        bad = [row["bad_groups"] for row in rows if "bad_groups" in row]
        assert bad and all(fault.startswith("q1: ") for found in bad for fault in found)
        assert json.dumps(rows)


def test_groups_are_scored_while_others_are_sampled(monkeypatch):
    trainer, plain = make(build_tiny(3, True)), make(build_tiny(3, True))
    generate, score, scored = trainer.engine.generate, trainer._score, threading.Event()

    def slow(problems, group_size, sampling, on_group):
        def hand_on(index, group):
            on_group(index, group)
            assert scored.wait(60)  # before the next group is there

        return generate(problems, group_size, sampling, hand_on)

    def watched(stage, groups):
        batch = score(stage, groups)
        scored.set()
        return batch

    monkeypatch.setattr(trainer.engine, "generate", slow)
    monkeypatch.setattr(trainer, "_score", watched)
    row, expected = trainer.train_step(), plain.train_step()
    assert row["reward"] == expected["reward"] and row["loss"] == expected["loss"]


def test_a_step_without_any_sound_group_stops():
    trainer = make(build_tiny(3, True), on_bad_group="skip")
    trainer.engine.change = lambda group: dataclasses.replace(group, prompt_token_ids=())
    with pytest.raises(DataError, match="image tokens"):
        trainer.train_step()


@pytest.mark.parametrize(("k", "per_map", "batch"), [(1, 7, 4), (2, 12, 16), (3, 5, 16), (40, 6, 16)])
def test_a_batch_comes_from_few_maps(k, per_map, batch):
    problems = [
        Problem(f"{place}/{number}", "", "", "TorF1", 1, "", "", f"map-{place}", "easy")
        for place in range(20)
        for number in range(per_map)
    ]
    stage = StageConfig(name="a", question_kinds=("TorF1",), maps_per_step=k, steps=1000)
    curriculum = Curriculum(problems, (stage,), batch, 3)
    again = Curriculum(problems, (stage,), batch, 3)
    seen, maps = [], []
    for step in range(len(problems) * 3 // batch):
        if step == 9:
            saved = json.loads(json.dumps(curriculum.state_dict()))
            again.load_state_dict(saved)
        drawn = curriculum.sample()[1]
        if step >= 9:
            assert drawn == again.sample()[1]
        seen += [problem.uid for problem in drawn]
        maps.append(len({problem.network_id for problem in drawn}))
    need = max(min(k, 20), -(-batch // per_map))
    assert np.median(maps) <= need + (per_map < batch)
    # Every question once before any comes again.
    for lap in range(2):
        assert len(set(seen[lap * len(problems) : (lap + 1) * len(problems)])) == len(problems)
    other = Curriculum(problems, (stage,), batch, 4).sample()[1]
    assert [problem.uid for problem in other] != seen[:batch]


def test_maps_per_step_does_not_go_with_draws_from_all_maps():
    for other in ({"pools": "adaptive"}, {"replay": 0.5}):
        with pytest.raises(ValueError, match="maps_per_step=2: 0, or so many maps"):
            StageConfig(name="a", maps_per_step=2, **other)
    with pytest.raises(ValueError, match="maps_per_step\n  Input should be greater than or equal to 0"):
        StageConfig(name="a", maps_per_step=-1)


def test_memory_grows_with_the_siblings_own_tokens_only():
    """What the forward pass keeps for the backward, weights aside: as much for a sibling's token as for any other."""
    policy = build_tiny(3, True)
    prompt = policy.encode(PROBLEMS[0])
    weights = {parameter.untyped_storage().data_ptr() for parameter in policy.model.parameters()}
    rng = np.random.default_rng(0)

    def kept(siblings):
        responses = tuple((place, *rng.integers(0, 200, 20).tolist()) for place in range(siblings))
        (forest,) = pack_forest([Answers(prompt, PROBLEMS[0].image, responses, tuple(range(siblings)))], 10_000)
        storages = {}

        def note(tensor):
            storage = tensor.untyped_storage()
            if tensor.is_floating_point() and storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = response_hidden(policy, forest, Vision(policy, [forest]))
        assert out.requires_grad
        return len(forest.input_ids), sum(storage.nbytes() for storage in storages.values())

    (tokens, small), (more_tokens, large) = kept(2), kept(16)
    assert more_tokens == tokens + 14 * 20
    assert (large - small) / (more_tokens - tokens) <= 1.05 * small / tokens
