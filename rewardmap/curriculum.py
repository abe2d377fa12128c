"""The curriculum: stages in order, each with its own question kinds, shuffled inside a stage, seeded and resumable.

RewardMap (arXiv 2510.02240, section 4.3): from judgement over counting to planning, and random order inside a stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rewardmap.config import ConfigError, StageConfig
from rewardmap.types import KINDS, Problem


@dataclass(frozen=True)
class StagePosition:
    """Where a step stands."""

    index: int
    stage: StageConfig
    step_in_stage: int


class Curriculum:
    """Draws each step's problems.

    Every pool (a stage's own kinds, or all kinds for its replay share) is walked in a fresh random order per pass, so
    no problem repeats before all of its pool were seen. Draws depend on the seed and on the state alone.
    """

    def __init__(self, problems: Sequence[Problem], stages: Sequence[StageConfig], batch: int, seed: int) -> None:
        if not stages:
            raise ConfigError("train.stages is empty; give at least one stage")
        self.stages = tuple(stages)
        self._batch = batch
        self._seed = seed
        self._pools = [self._pool(problems, stage) for stage in stages]
        self._all = tuple(problems)
        self._step = 0
        self._drawn = [0] * len(self.stages)
        self._replayed = 0

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def step(self) -> int:
        """Steps drawn so far."""
        return self._step

    def position(self, step: int) -> StagePosition:
        """The stage of a step (0-based); the last stage after the end."""
        for index, stage in enumerate(self.stages):
            if step < stage.steps:
                return StagePosition(index, stage, step)
            step -= stage.steps
        return StagePosition(len(self.stages) - 1, self.stages[-1], self.stages[-1].steps)

    def sample(self) -> tuple[StageConfig, list[Problem]]:
        """The next step's stage and problems."""
        at = self.position(self._step)
        replay = round(self._batch * at.stage.replay)
        pool = self._pools[at.index]
        problems = self._draw(pool, at.index, self._drawn[at.index], self._batch - replay)
        problems += self._draw(self._all, len(self.stages), self._replayed, replay)
        self._drawn[at.index] += self._batch - replay
        self._replayed += replay
        self._step += 1
        return at.stage, problems

    def state_dict(self) -> dict[str, Any]:
        """JSON values from which ``load_state_dict`` goes on exactly."""
        return {"step": self._step, "drawn": list(self._drawn), "replayed": self._replayed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if len(state["drawn"]) != len(self.stages):
            raise ConfigError(
                f"the checkpoint was made with {len(state['drawn'])} stages, the configuration has {len(self.stages)}; "
                "resume with the run's own config.toml"
            )
        self._step, self._drawn, self._replayed = state["step"], list(state["drawn"]), state["replayed"]

    def _draw(self, pool: Sequence[Problem], pool_number: int, start: int, count: int) -> list[Problem]:
        drawn: list[Problem] = []
        while len(drawn) < count:
            lap, offset = divmod(start + len(drawn), len(pool))
            order = np.random.default_rng([self._seed, pool_number, lap]).permutation(len(pool))
            drawn += [pool[index] for index in order[offset : offset + count - len(drawn)]]
        return drawn

    @staticmethod
    def _pool(problems: Sequence[Problem], stage: StageConfig) -> tuple[Problem, ...]:
        pool = tuple(problem for problem in problems if problem.kind in stage.question_kinds)
        if not pool and stage.steps:
            present = ", ".join(kind for kind in KINDS if any(problem.kind == kind for problem in problems))
            raise ConfigError(
                f"stage '{stage.name}' asks for {', '.join(stage.question_kinds)}, "
                f"but the data has only: {present or 'nothing'}"
            )
        return pool
