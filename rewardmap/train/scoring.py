"""Rewards off the critical path: a group is scored in a thread as soon as it is finished, while others are sampled.
What a stage scores by, and advantages from scores."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rewardmap.config import Config, ConfigError, RewardConfig, StageConfig, TrainConfig
from rewardmap.files import write_text
from rewardmap.rewards import FAILURES, Networks, RewardBatch, Rubric
from rewardmap.rewards.streaming import RewardFunction, reward_function, reward_of
from rewardmap.types import LEVELS, DataError, Problem, RolloutGroup
from rewardmap_kernels import GroupAdvantage, group_advantage

_BASELINES = {"group": "mean", "batch": "batch_mean", "greedy": "none"}
"""``train.advantage_baseline`` in the words of ``group_advantage``; greedy rewards are subtracted before."""


class GroupScores:
    """An engine's ``on_group`` that scores.

    Example:
        with GroupScores(score) as scores:
            groups = engine.generate(problems, group_size, sampling, scores)
        rewards = join(scores.take())
    """

    def __init__(self, score: Callable[[Sequence[RolloutGroup]], RewardBatch]) -> None:
        self._score, self._thread = score, ThreadPoolExecutor(1, thread_name_prefix="rewards")
        self._scored: dict[int, Future[RewardBatch]] = {}

    def __call__(self, index: int, group: RolloutGroup) -> None:
        """See ``OnGroup``; returns at once."""
        self._scored[index] = self._thread.submit(self._score, [group])

    def take(self) -> tuple[RewardBatch, ...]:
        """The rewards of each group's answers, in the problems' order. Raises what ``score`` raised."""
        return tuple(self._scored[index].result() for index in sorted(self._scored))

    def __enter__(self) -> GroupScores:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        self._thread.shutdown(cancel_futures=kind is not None)


def join(batches: Sequence[RewardBatch]) -> RewardBatch:
    """One after the other."""
    columns = ([getattr(batch, field.name) for batch in batches] for field in fields(RewardBatch))
    return RewardBatch(*map(np.concatenate, columns))


def answer_advantages(
    train: TrainConfig, step: int, groups: Sequence[RolloutGroup], rewards: RewardBatch, baseline: np.ndarray | None
) -> GroupAdvantage:
    """Advantages [B] of B answers in groups; the difficulty weight multiplies them where the rubric says so.

    Args:
        baseline: [B] subtracted from the scores before; None: nothing.
    """
    offsets = np.cumsum([0, *(len(group.rollouts) for group in groups)])
    scores = rewards.score if baseline is None else rewards.score - baseline
    advantage = group_advantage(
        torch.from_numpy(scores).float(),
        torch.from_numpy(offsets),
        scale=train.advantage_scale,
        baseline=_BASELINES[train.advantage_baseline],
        weights=torch.from_numpy(rewards.advantage_weight).float(),
    )
    if train.advantage_control == "zero":
        return advantage._replace(advantages=torch.zeros_like(advantage.advantages))
    if train.advantage_control == "shuffle":
        order = np.random.default_rng([train.seed, step]).permutation(len(rewards.score))
        return advantage._replace(
            advantages=advantage.advantages[torch.from_numpy(order)],
            degenerate=torch.zeros_like(advantage.degenerate),
        )
    return advantage


def write_answers(
    folder: Path, step: int, groups: Sequence[RolloutGroup], rewards: RewardBatch, advantage: GroupAdvantage
) -> None:
    """Write ``folder/step-NNNNNN.jsonl``, an answer a line: what it answers, its text, and what it earned.

    Raises:
        OSError: naming the file.
    """
    lines = []
    answers = [(group.problem, rollout) for group in groups for rollout in group.rollouts]
    for row, ((problem, rollout), own) in enumerate(zip(answers, advantage.advantages.tolist(), strict=True)):
        line = {
            "uid": problem.uid,
            "kind": problem.kind,
            "response": rollout.text,
            "reward": float(rewards.score[row]),
            "advantage": own,
            "correct": bool(rewards.correct[row]),
            "format_valid": bool(rewards.format_valid[row]),
            "failure": FAILURES[rewards.failure[row]],
            "num_tokens": len(rollout.token_ids),
            "finish_reason": rollout.finish_reason,
        }
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_text(folder / f"step-{step:06d}.jsonl", "".join(lines))


@dataclass(frozen=True, kw_only=True)
class OwnReward(Rubric):
    """A rubric whose score is a user's; what is right, and all else, stays the mode's."""

    function: RewardFunction

    def score(self, problems: Sequence[Problem], responses: Sequence[str], networks: Networks) -> RewardBatch:
        """Raises DataError where the function has no reward for an answer, beside what ``Rubric.score`` raises."""
        batch = super().score(problems, responses, networks)
        own = np.empty(len(problems))
        for row, (problem, response) in enumerate(zip(problems, responses, strict=True)):
            reward = reward_of(self.function, problem, response)
            if isinstance(reward, str):
                raise DataError(f"question '{problem.uid}': reward.function {reward}")
            own[row] = reward
        return replace(batch, score=own * batch.weight if self.weight_on == "reward" else own)


def stage_reward(reward: RewardConfig, stage: StageConfig) -> RewardConfig:
    """The reward inside a stage."""
    own: dict[str, Any] = {
        "mode": stage.reward_mode,
        "weight_on": stage.weight_on,
        "alpha": stage.alpha,
        "map_weights": stage.map_weights,
        "transfer_weight": stage.transfer_weight,
    }
    return replace(reward, **{name: value for name, value in own.items() if value is not None})


def stage_rubric(config: Config, stage: StageConfig) -> Rubric:
    """The rubric inside a stage. Raises ConfigError for values that do not go together."""
    reward = stage_reward(config.reward, stage)
    try:
        rubric = Rubric(
            mode=reward.mode,
            weight_on=reward.weight_on,
            map_weights=dict(zip(LEVELS, reward.map_weights, strict=True)),
            transfer_weight=reward.transfer_weight,
            alpha=reward.alpha,
        )
        if reward.function is None:
            return rubric
        return OwnReward(**vars(rubric), function=reward_function(reward.function))
    except ValueError as error:
        raise ConfigError(f"stage '{stage.name}': {error}") from None
