"""The curriculum: stages in order, each with its own questions; gates, replay and pools that adapt; seeded, resumable.

RewardMap (arXiv 2510.02240, section 4.3): from judgement over counting to planning, and random order inside a stage.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rewardmap.config import ConfigError, StageConfig
from rewardmap.types import KINDS, Problem

FLOOR = 0.1
"""Weight of an adaptive pool that teaches nothing at present; one whose groups all disagree has 1 + FLOOR."""
MEMORY = 0.9
"""How much of a pool's old signal one step of new groups keeps."""


@dataclass(frozen=True)
class _Pool:
    """Questions walked in a fresh random order per pass, so that none repeats before all were seen."""

    name: str
    problems: tuple[Problem, ...]
    seed: tuple[int, ...]
    maps: int = 0
    """From how many maps a draw of ``batch`` questions comes; 0: from any."""
    batch: int = 0
    _walks: dict[int, np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    """Orders of the passes drawn from last, each as long as a pass."""

    def draw(self, start: int, count: int) -> list[Problem]:
        """``count`` problems from place ``start`` of the endless walk."""
        drawn: list[Problem] = []
        while len(drawn) < count:
            lap, offset = divmod(start + len(drawn), len(self.problems))
            order = self._walk(lap)
            drawn += [self.problems[index] for index in order[offset : offset + count - len(drawn)]]
        return drawn

    def _walk(self, lap: int) -> np.ndarray:
        """``_order``, remembered while it is walked."""
        if lap not in self._walks:
            for gone in self._walks.keys() - {lap - 1}:
                del self._walks[gone]
            self._walks[lap] = self._order(lap)
        return self._walks[lap]

    def _order(self, lap: int) -> np.ndarray:
        """Places of all questions as one pass walks them."""
        rng = np.random.default_rng([*self.seed, lap])
        order = rng.permutation(len(self.problems))
        if not self.maps:
            return order
        left: dict[str, list[int]] = {}
        for index in order.tolist():
            left.setdefault(self.problems[index].network_id, []).append(index)
        # The batch that the last pass began goes on over its end: passes rarely hold whole batches.
        size = (-lap * len(self.problems)) % self.batch or self.batch
        walk: list[int] = []
        while left:
            names = list(left)
            rng.shuffle(names)
            count = self.maps
            while count < len(names) and sum(len(left[name]) for name in names[:count]) < size:
                count += 1
            chosen = [index for name in names[:count] for index in left[name]]
            taken = rng.permutation(chosen)[:size].tolist()
            walk += taken
            gone = set(taken)
            for name in names[:count]:
                left[name] = [index for index in left[name] if index not in gone]
                if not left[name]:
                    del left[name]
            size = self.batch
        return np.array(walk)


class Curriculum:
    """Draws each step's problems. Draws depend on the seed and on the state alone.

    One step: ``sample``, then ``update`` with how the answers fared, on which gates and adaptive pools depend.
    """

    def __init__(self, problems: Sequence[Problem], stages: Sequence[StageConfig], batch: int, seed: int) -> None:
        if not stages:
            raise ConfigError("train.stages is empty; give at least one stage")
        self.stages = tuple(stages)
        self.problems = tuple(problems)
        self._batch = batch
        self._seed = seed
        self._pools = [self._stage_pools(number) for number in range(len(stages))]
        self._replay = [self._replay_pool(number) for number in range(len(stages))]
        self._step = 0
        self._stage = 0
        self._in_stage = 0
        self._passed = False
        self._rates: list[float] = []
        self._drawn: dict[str, int] = {}
        self._signal: dict[str, float] = {}
        self._skip_empty()

    @property
    def step(self) -> int:
        """Steps drawn so far."""
        return self._step

    @property
    def total_steps(self) -> int:
        """Steps drawn so far and those that may still come; fewer when a gate opens early."""
        left = 0 if self.stage_ended else self.stages[self._stage].steps - self._in_stage
        return self._step + left + sum(stage.steps for stage in self.stages[self._stage + 1 :])

    @property
    def stage_ended(self) -> bool:
        """Whether the step drawn last was its stage's last one."""
        return self._passed or self._in_stage >= self.stages[self._stage].steps

    def success(self, stage: StageConfig) -> float | None:
        """What a stage's gate compares with ``advance_at``; None before its first update and once the next stage has
        been drawn from."""
        window = self._rates[-stage.advance_window :]
        return sum(window) / len(window) if window and stage is self.stages[self._stage] else None

    def pool_shares(self, stage: StageConfig) -> dict[str, float]:
        """Present share of each pool of an adaptive stage; empty for a uniform one."""
        if stage.pools == "uniform":
            return {}
        pools = self._pools[self.stages.index(stage)]
        return dict(zip((pool.name for pool in pools), self._shares(pools).tolist(), strict=True))

    def sample(self) -> tuple[StageConfig, list[Problem]]:
        """The next step's stage and problems; after the end, more of the last stage."""
        if self.stage_ended and self._stage + 1 < len(self.stages):
            self._stage, self._in_stage, self._passed, self._rates = self._stage + 1, 0, False, []
            self._skip_empty()
        stage, pools = self.stages[self._stage], self._pools[self._stage]
        replay = round(self._batch * stage.replay)
        counts = [self._batch - replay]
        if len(pools) > 1:
            rng = np.random.default_rng([self._seed, self._stage, self._step])
            counts = rng.multinomial(counts[0], self._shares(pools)).tolist()
        problems: list[Problem] = []
        for pool, count in zip((*pools, self._replay[self._stage]), (*counts, replay), strict=True):
            if count:
                problems += pool.draw(self._drawn.get(pool.name, 0), count)
                self._drawn[pool.name] = self._drawn.get(pool.name, 0) + count
        self._step += 1
        self._in_stage += 1
        return stage, problems

    def peek(self) -> list[Problem]:
        """What ``sample`` would draw now, without drawing it; nothing after the last step."""
        if self._step >= self.total_steps:
            return []
        state = self.state_dict()
        problems = self.sample()[1]
        self.load_state_dict(state)
        return problems

    def update(self, stage: StageConfig, problems: Sequence[Problem], success: Sequence[float]) -> None:
        """Take note of how a step's answers fared.

        Args:
            stage, problems: as ``sample`` gave them.
            success: [n] share of right answers in each problem's group, 0..1.
        """
        signals: dict[str, list[float]] = {}
        own = []
        for problem, rate in zip(problems, success, strict=True):
            signals.setdefault(_bucket(problem), []).append(4 * rate * (1 - rate))
            if problem.kind in stage.question_kinds:
                own.append(float(rate))
        for bucket, values in signals.items():
            self._signal[bucket] = MEMORY * self._signal.get(bucket, 1.0) + (1 - MEMORY) * float(np.mean(values))
        if stage is not self.stages[self._stage] or stage.advance_at is None or not own:
            return
        self._rates = [*self._rates, float(np.mean(own))][-stage.advance_window :]
        full = len(self._rates) == stage.advance_window and self._in_stage >= stage.min_steps
        # Once open it stays so: a step drawn before it opened may be scored after.
        self._passed |= full and float(np.mean(self._rates)) >= stage.advance_at

    def state_dict(self) -> dict[str, Any]:
        """JSON values from which ``load_state_dict`` goes on exactly."""
        return {
            "stages": len(self.stages),
            "step": self._step,
            "stage": self._stage,
            "in_stage": self._in_stage,
            "passed": self._passed,
            "rates": list(self._rates),
            "drawn": dict(self._drawn),
            "signal": dict(self._signal),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ConfigError where the state is of other stages."""
        if state["stages"] != len(self.stages):
            raise ConfigError(
                f"the checkpoint was made with {state['stages']} stages, the configuration has {len(self.stages)}; "
                "resume with the run's own config.toml"
            )
        self._step, self._stage, self._in_stage = state["step"], state["stage"], state["in_stage"]
        self._passed, self._rates = state["passed"], list(state["rates"])
        self._drawn, self._signal = dict(state["drawn"]), dict(state["signal"])

    def _skip_empty(self) -> None:
        while not self.stages[self._stage].steps and self._stage + 1 < len(self.stages):
            self._stage += 1

    def _shares(self, pools: Sequence[_Pool]) -> np.ndarray:
        """[pools] share of each: as many as it has questions, times how much its groups teach."""
        weights = np.array([len(pool.problems) * (FLOOR + self._signal.get(pool.name, 1.0)) for pool in pools])
        return weights / weights.sum()

    def _of_kinds(self, kinds: Collection[str]) -> tuple[Problem, ...]:
        return tuple(problem for problem in self.problems if problem.kind in kinds)

    def _stage_pools(self, number: int) -> list[_Pool]:
        stage = self.stages[number]
        chosen = self._of_kinds(stage.question_kinds)
        if not chosen and stage.steps:
            present = ", ".join(kind for kind in KINDS if self._of_kinds([kind]))
            raise ConfigError(
                f"stage '{stage.name}' asks for {', '.join(stage.question_kinds)}, "
                f"but the data has only: {present or 'nothing'}"
            )
        if stage.pools == "uniform":
            return [_Pool(f"stage {number}", chosen, (self._seed, number), stage.maps_per_step, self._batch)]
        buckets: dict[str, list[Problem]] = {}
        for problem in chosen:
            buckets.setdefault(_bucket(problem), []).append(problem)
        # Named and seeded by what is inside: a later stage goes on with the same walk.
        return [
            _Pool(bucket, tuple(found), (self._seed, zlib.crc32(bucket.encode())))
            for bucket, found in sorted(buckets.items())
        ]

    def _replay_pool(self, number: int) -> _Pool:
        stage = self.stages[number]
        if stage.replay_from == "all":
            return _Pool("replay", self.problems, (self._seed, len(self.stages)))
        earlier = {kind for before in self.stages[:number] if before.steps for kind in before.question_kinds}
        chosen = self._of_kinds(earlier)
        if stage.replay and not chosen:
            raise ConfigError(f"stage '{stage.name}' replays earlier stages, but none before it draws questions")
        return _Pool(f"replay {number}", chosen, (self._seed, len(self.stages) + 1 + number))


def _bucket(problem: Problem) -> str:
    """Difficulty pool of a question: ``planning/hard/1`` by kind, map level and transfers, ``TorF1/easy`` else."""
    name = f"{problem.kind}/{problem.map_difficulty}"
    return f"{name}/{min(problem.transfers_required, 2)}" if problem.kind == "planning" else name
