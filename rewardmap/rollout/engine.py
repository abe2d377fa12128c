"""What an engine that samples answers must do. ``local`` runs in this process, servers elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from rewardmap.types import Problem, RolloutGroup, SamplingParams


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples answers with the newest weights it was given."""

    def generate(
        self, problems: Sequence[Problem], group_size: int, sampling: SamplingParams
    ) -> list[RolloutGroup]:
        """``group_size`` answers to each problem, groups in the problems' order.

        Every rollout carries the log-probabilities the engine sampled with and the version of the weights.
        """
        ...

    def update_weights(self, version: int) -> None:
        """Take over the trainer's weights; later rollouts carry ``policy_version == version``."""
        ...

    def close(self) -> None:
        """Release servers and memory. A second call does nothing."""
        ...
