"""What an engine that samples answers must do. ``local`` runs in this process, ``sglang`` on servers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from rewardmap.types import Problem, RolloutGroup, SamplingParams

OnGroup = Callable[[int, RolloutGroup], None]
"""Called with (index of the problem, its finished group) as groups finish, in any order, from any thread."""


class RolloutError(RuntimeError):
    """An engine cannot deliver: the message names the server or the problem's uid, what happened and the remedy."""


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples answers with the newest weights it was given."""

    def generate(
        self,
        problems: Sequence[Problem],
        group_size: int,
        sampling: SamplingParams,
        on_group: OnGroup | None = None,
    ) -> list[RolloutGroup]:
        """``group_size`` answers to each problem, groups in the problems' order.

        Every rollout carries the log-probabilities the engine sampled with and the version of the weights.
        ``on_group`` sees each group once, as soon as it is finished: to score it while others are being sampled.

        Raises:
            RolloutError: servers that cannot deliver.
        """
        ...

    def update_weights(self, version: int) -> None:
        """Take over the trainer's weights; later rollouts carry ``policy_version == version``."""
        ...

    def metrics(self) -> dict[str, float]:
        """What happened since the last call, for the step's row of metrics: seconds and drift of weight syncs."""
        ...

    def close(self) -> None:
        """Release servers and memory. A second call does nothing."""
        ...
