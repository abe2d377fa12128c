"""Rewards off the critical path: a group is scored in a thread as soon as it is finished, while others are sampled. And
what a stage scores by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields

import numpy as np

from rewardmap.config import Config, ConfigError, StageConfig, stage_reward
from rewardmap.rewards import RewardBatch, Rubric
from rewardmap.types import LEVELS, RolloutGroup


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


def stage_rubric(config: Config, stage: StageConfig) -> Rubric:
    """The rubric inside a stage. Raises ConfigError for values that do not go together."""
    reward = stage_reward(config.reward, stage)
    try:
        return Rubric(
            mode=reward.mode,
            weight_on=reward.weight_on,
            map_weights=dict(zip(LEVELS, reward.map_weights, strict=True)),
            transfer_weight=reward.transfer_weight,
            alpha=reward.alpha,
        )
    except ValueError as error:
        raise ConfigError(f"stage '{stage.name}': {error}") from None
