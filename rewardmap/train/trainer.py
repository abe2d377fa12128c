"""The training step: a list of verbs.

sample -> generate -> score -> advantage -> pack -> forward -> loss -> backward -> clip and step -> push weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from rewardmap.config import Config, StageConfig
from rewardmap.curriculum import Curriculum
from rewardmap.policy import Policy
from rewardmap.profiling import PhaseTimer
from rewardmap.rewards.rubric import RewardBatch, Rubric
from rewardmap.rollout.engine import RolloutEngine
from rewardmap.train.forest import Answers, PackedForest, pack_forest
from rewardmap.train.forward import response_hidden
from rewardmap.train.supervised import gold_answers, supervised_backward
from rewardmap.transit.questions import gold_response
from rewardmap.types import MetroData, Problem, RolloutGroup, SamplingParams
from rewardmap_kernels import (
    GroupAdvantage,
    PolicyObjective,
    group_advantage,
    linear_policy_loss,
    loss_normalizer,
)

Tensor = torch.Tensor


class NonFiniteError(RuntimeError):
    """A loss or gradient that is not a number: training on would destroy the weights."""


@dataclass
class Trainer:
    """Owns the policy, its optimizer and the step counter; everything else is handed in."""

    config: Config
    policy: Policy
    engine: RolloutEngine
    rubric: Rubric
    networks: Mapping[str, MetroData]
    curriculum: Curriculum
    timer: PhaseTimer = field(default_factory=PhaseTimer)
    version: int = 0
    """Optimizer steps taken: the policy version of the current weights."""
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        train = self.config.train
        self.objective = PolicyObjective(
            name=train.objective,
            clip_eps_low=train.clip_eps_low,
            clip_eps_high=train.clip_eps_high,
            entropy_coef=train.entropy_coef,
        )
        trainable = [parameter for parameter in self.policy.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trainable, lr=train.learning_rate, betas=train.betas, weight_decay=train.weight_decay, fused=True
        )

    def train_step(self) -> dict[str, Any]:
        """One step of the curriculum. Returns its metrics, JSON values.

        Raises:
            NonFiniteError: the loss or the gradient is not finite; the weights are those of before.
        """
        stage, problems = self.curriculum.sample()
        step = self.supervised_step if stage.kind == "sft" else self.policy_step
        return {"step": self.curriculum.step, "stage": stage.name} | step(stage, problems)

    def policy_step(self, stage: StageConfig, problems: Sequence[Problem]) -> dict[str, Any]:
        """Group-relative policy optimisation on fresh answers (arXiv 2402.03300), on-policy: the ratio is 1."""
        with self.timer.phase("rollout"):
            groups = self.engine.generate(problems, self.config.rollout.group_size, self._sampling())
        with self.timer.phase("reward"):
            rewards = self._score(groups)
            advantage = self._advantage(groups, rewards)
        with self.timer.phase("train"):
            forests = self._pack(groups, advantage.degenerate.tolist())
            loss, metrics = self._backward(forests, advantage.advantages, groups)
            grad_norm = self._update(stage)
        self.engine.update_weights(self.version)
        return (
            _step_metrics(groups, rewards, advantage)
            | _sums(forests)
            | metrics
            | {"loss": loss, "grad_norm": grad_norm}
        )

    def supervised_step(self, stage: StageConfig, problems: Sequence[Problem]) -> dict[str, Any]:
        """Maximum likelihood of the ideal answers, mean over tokens."""
        with self.timer.phase("train"):
            batch = [
                gold_answers(self.policy, problem, gold_response(problem), number)
                for number, problem in enumerate(problems)
            ]
            loss, forests = supervised_backward(self.policy, batch, self.config.train.max_tokens_per_micro_batch)
            grad_norm = self._update(stage)
        self.engine.update_weights(self.version)
        return _sums(forests) | {"loss": loss, "grad_norm": grad_norm}

    def state_dict(self) -> dict[str, Any]:
        """JSON values: everything of the loop but weights and optimizer."""
        return {"version": self.version, "curriculum": self.curriculum.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.version = state["version"]
        self.curriculum.load_state_dict(state["curriculum"])
        self.engine.update_weights(self.version)

    def _sampling(self) -> SamplingParams:
        rollout = self.config.rollout
        seed = int(np.random.SeedSequence([self.config.train.seed, self.curriculum.step]).generate_state(1)[0])
        return SamplingParams(rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_new_tokens, seed)

    def _score(self, groups: Sequence[RolloutGroup]) -> RewardBatch:
        problems = [group.problem for group in groups for _ in group.rollouts]
        return self.rubric.score(problems, [r.text for group in groups for r in group.rollouts], self.networks)

    def _advantage(self, groups: Sequence[RolloutGroup], rewards: RewardBatch) -> GroupAdvantage:
        """Advantages [B] of B answers in groups; the difficulty weight multiplies them where the rubric says so."""
        offsets = np.cumsum([0, *(len(group.rollouts) for group in groups)])
        advantage = group_advantage(
            torch.from_numpy(rewards.score).float(),
            torch.from_numpy(offsets),
            scale=self.config.train.advantage_scale,
            weights=torch.from_numpy(rewards.advantage_weight).float(),
        )
        control = self.config.train.advantage_control
        if control == "zero":
            return advantage._replace(advantages=torch.zeros_like(advantage.advantages))
        if control == "shuffle":
            order = np.random.default_rng([self.config.train.seed, self.curriculum.step]).permutation(
                len(rewards.score)
            )
            return advantage._replace(
                advantages=advantage.advantages[torch.from_numpy(order)],
                degenerate=torch.zeros_like(advantage.degenerate),
            )
        return advantage

    def _pack(self, groups: Sequence[RolloutGroup], degenerate: Sequence[bool]) -> list[PackedForest]:
        batch, first = [], 0
        for group, equal in zip(groups, degenerate, strict=True):
            numbers = tuple(range(first, first + len(group.rollouts)))
            first += len(group.rollouts)
            if equal and self.config.train.skip_equal_groups and not self.config.train.entropy_coef:
                continue
            responses = tuple(rollout.token_ids for rollout in group.rollouts)
            logprobs = tuple(rollout.rollout_logprobs for rollout in group.rollouts)
            problem = group.problem
            batch.append(Answers(self.policy.encode(problem), problem.image, responses, numbers, logprobs))
        return pack_forest(batch, self.config.train.max_tokens_per_micro_batch)

    def _backward(
        self, forests: Sequence[PackedForest], advantages: Tensor, groups: Sequence[RolloutGroup]
    ) -> tuple[float, dict[str, float]]:
        """Accumulate gradients. Denominators count every answer of the step, also those of skipped groups."""
        device = self.policy.device
        lengths = torch.tensor([len(rollout.token_ids) for group in groups for rollout in group.rollouts])
        rows = int(sum(len(forest.target) for forest in forests))
        totals = {"loss": 0.0, "entropy": 0.0, "rollout_drift": 0.0}
        for forest in forests:
            weights = _row_normalizer(self.objective, forest.sequence, lengths, self.config.rollout.max_new_tokens)
            out = linear_policy_loss(
                response_hidden(self.policy, forest),
                self.policy.model.lm_head.weight,
                forest.target.to(device),
                advantages=advantages[forest.sequence].to(device),
                normalizer=weights.to(device),
                objective=self.objective,
                sequence=forest.sequence.to(device),
                num_sequences=len(lengths),
                temperature=self.config.rollout.temperature,
            )
            out.loss.backward()
            totals["loss"] += float(out.loss.detach())
            totals["entropy"] += float(out.entropy.sum()) / rows
            if forest.rollout_logprobs is not None:
                drift = (out.logprobs.cpu() - forest.rollout_logprobs).abs().sum()
                totals["rollout_drift"] += float(drift) / rows
        return totals.pop("loss"), totals

    def _update(self, stage: StageConfig) -> float:
        """Clip, step, count. Returns the gradient norm before clipping."""
        train = self.config.train
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, train.max_grad_norm))
        if not math.isfinite(norm):
            self.optimizer.zero_grad()
            raise NonFiniteError(
                f"step {self.curriculum.step}: the gradient norm is {norm}; lower train.learning_rate and resume"
            )
        rate = train.learning_rate if stage.learning_rate is None else stage.learning_rate
        warmup = min(1.0, (self.version + 1) / max(1, train.warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = rate * warmup
        self.optimizer.step()
        self.optimizer.zero_grad()
        if not self.policy.freeze_vision:
            self.policy.forget_features()
        self.version += 1
        return norm


def _row_normalizer(objective: PolicyObjective, sequence: Tensor, lengths: Tensor, max_length: int) -> Tensor:
    """The divisor of each row's loss over the whole step: lengths [B] of all answers, ``sequence`` [N] of these
    rows."""
    if objective.name in ("grpo", "gspo", "sapo"):
        return (lengths[sequence] * len(lengths)).float()
    if objective.name == "dr_grpo":
        return torch.tensor(float(len(lengths) * max_length))
    return loss_normalizer(objective, torch.ones(len(sequence)), total_tokens=float(lengths.sum()))


def _step_metrics(groups: Sequence[RolloutGroup], rewards: RewardBatch, advantage: GroupAdvantage) -> dict[str, Any]:
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    kinds = np.array([group.problem.kind for group in groups for _ in group.rollouts])
    return {
        "reward": float(rewards.score.mean()),
        "accuracy": float(rewards.correct.mean()),
        "accuracy_by_kind": {str(kind): float(rewards.correct[kinds == kind].mean()) for kind in np.unique(kinds)},
        "format_valid": float(rewards.format_valid.mean()),
        "equal_groups": float(advantage.degenerate.float().mean()),
        "response_length": float(np.mean([len(rollout.token_ids) for rollout in rollouts])),
        "truncated": float(np.mean([rollout.finish_reason == "length" for rollout in rollouts])),
        "rollout_tokens": sum(len(rollout.token_ids) for rollout in rollouts),
    }


def _sums(forests: Sequence[PackedForest]) -> dict[str, int]:
    return {
        "packed_tokens": sum(len(forest.input_ids) for forest in forests),
        "logical_tokens": sum(forest.logical_tokens for forest in forests),
    }
