"""One-step-off: the next step's answers are sampled while this one trains.

The loop is that of ``Trainer``, whose verbs come in another order. A step's answers were begun with the weights of the
step before and are finished before those change, so that they lag behind by one step at most;
``rollout.importance_correction`` weighs each token by its probability now over that at the engine. Between two steps
nothing is running: evaluation, checkpoints and signals find what they find in the synchronous loop, and a checkpoint
holds the answers that wait to be trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from rewardmap.config import StageConfig
from rewardmap.train.background import in_background
from rewardmap.train.ranks import group_from_json, group_to_json
from rewardmap.train.trainer import Draw, Trainer
from rewardmap.types import DataError


@dataclass
class OneStepOff(Trainer):
    """A ``Trainer`` whose answers lag one step behind (``rollout.staleness = 1``)."""

    _ahead: Draw | None = field(default=None, init=False)
    """The next step, its answers sampled."""
    _coming: Future[Draw] | None = field(default=None, init=False)
    _trained: StageConfig | None = field(default=None, init=False)
    """The stage of the step made last."""

    def train_step(self) -> dict[str, Any]:
        """As ``Trainer.train_step``; the row has ``staleness``, the updates by which its answers lag behind."""
        now = self._ahead or self._answer(self._draw())
        self._ahead, self._trained = None, now.stage
        if self.curriculum.step < self.curriculum.total_steps:
            self._begin(self._draw())
        versions = [rollout.policy_version for group in now.groups for rollout in group.rollouts]
        stale = {"staleness": self.version - min(versions)} if versions else {}
        return self._learn(now) | stale

    @property
    def stage_ended(self) -> bool:
        return self._ahead is None or self._ahead.stage is not self._trained

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"ahead": None if self._ahead is None else self._to_json(self._ahead)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises DataError where waiting answers are to a question that is gone."""
        super().load_state_dict(state)
        self._ahead = None if state.get("ahead") is None else self._from_json(state["ahead"])

    def _begin(self, draw: Draw) -> None:
        for problem in draw.problems:
            self.policy.encode(problem)  # here, once: tokenizers are not for two threads
        if draw.stage.kind == "sft" or self.config.rollout.engine == "local":
            self._coming = Future()
            # The local engine computes with the weights and on the device that train: there is nothing to overlap.
            self._coming.set_result(self._answer(draw))
        else:
            self._coming = in_background(lambda: self._sample(draw), "next step's answers")

    def _before_update(self) -> None:
        if self._coming is not None:
            with self.timer.phase("rollout"):
                self._ahead, self._coming = self._coming.result(), None

    def _to_json(self, draw: Draw) -> dict[str, Any]:
        return {
            "stage": next(number for number, stage in enumerate(self.curriculum.stages) if stage is draw.stage),
            "uids": [problem.uid for problem in draw.problems],
            "groups": [group_to_json(group) for group in draw.groups],
            "greedy": [group_to_json(group) for group in draw.greedy],
        }

    def _from_json(self, state: Mapping[str, Any]) -> Draw:
        known = {problem.uid: problem for problem in self.curriculum.problems}
        gone = [uid for uid in state["uids"] if uid not in known]
        if gone:
            raise DataError(f"the checkpoint has answers to '{gone[0]}', which the data lacks; give it back")
        problems = [known[uid] for uid in state["uids"]]
        groups, greedy = (
            [group_from_json(problem, group) for problem, group in zip(problems, state[name], strict=False)]
            for name in ("groups", "greedy")
        )
        stage = self.curriculum.stages[state["stage"]]
        rewards = [self._score(stage, [group]) for group in groups]
        return Draw(stage, problems, self._sampling(), groups, rewards, greedy)
