"""The training step: a list of verbs.

sample -> generate -> score -> advantage -> pack -> forward -> loss -> backward -> clip and step -> push weights.
Under several ranks every rank makes the same step; they differ in what they sample and in the micro-batches they take.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rewardmap.config import Config, ConfigError, StageConfig
from rewardmap.curriculum import Curriculum
from rewardmap.policy import Policy
from rewardmap.profiling import PhaseTimer
from rewardmap.rewards import Networks, RewardBatch
from rewardmap.rollout.engine import RolloutEngine
from rewardmap.train.balance import CostModel
from rewardmap.train.faults import Guard, dump_batch
from rewardmap.train.forest import Answers, PackedForest, pack_forest
from rewardmap.train.forward import Vision, response_hidden
from rewardmap.train.parallel import Forward, each_micro_batch, whole
from rewardmap.train.ranks import ALONE, Ranks
from rewardmap.train.reference import Reference
from rewardmap.train.scoring import GroupScores, answer_advantages, join, stage_rubric, write_answers
from rewardmap.train.sound import fault_of
from rewardmap.train.step_metrics import SUMS, batch_flop, batch_sums, over_updates, row_sums, step_metrics
from rewardmap.train.supervised import gold_answers, supervised_backward
from rewardmap.transit.questions import gold_response
from rewardmap.types import DataError, Problem, RolloutGroup, SamplingParams
from rewardmap.vision import to_device
from rewardmap_kernels import GroupAdvantage, PolicyObjective, linear_policy_loss, loss_normalizer

Tensor = torch.Tensor


@dataclass(frozen=True)
class Draw:
    """The questions of one step, and the answers to them once they are sampled."""

    stage: StageConfig
    problems: Sequence[Problem]
    sampling: SamplingParams
    groups: Sequence[RolloutGroup] = ()
    rewards: Sequence[RewardBatch] = ()
    """Of each group's answers."""
    greedy: Sequence[RolloutGroup] = ()
    """One greedy answer to each, where ``train.advantage_baseline`` asks for it."""


@dataclass
class Trainer:
    """Owns the policy, its optimizer and the step counter; everything else is handed in."""

    config: Config
    policy: Policy
    engine: RolloutEngine
    networks: Mapping[str, Networks]
    """By reward mode, what its answers are scored on."""
    curriculum: Curriculum
    timer: PhaseTimer = field(default_factory=PhaseTimer)
    ranks: Ranks = ALONE
    forward: Forward | None = None
    """Of a sharded policy; None: the policy is whole."""
    reference: Reference | None = None
    """Of the KL term; needed where ``train.kl_coef`` is not 0."""
    faults: Path | None = None
    """Where the batches of refused updates are written; None: nowhere."""
    answers: Path | None = None
    """Where sampled answers are written, see ``train.keep_answers_every``; None: nowhere."""
    step: int = 0
    """Steps made, refused updates included."""
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
            kl_coef=train.kl_coef,
            kl_estimator=train.kl_estimator,
            importance_correction=self.config.rollout.importance_correction,
            importance_max=self.config.rollout.importance_max,
        )
        if train.kl_coef and self.reference is None:
            raise ConfigError(f"train.kl_coef={train.kl_coef} needs a reference policy; see train/reference.py")
        self.guard = Guard(self.config.guard)
        self._forward: Forward = self.forward or partial(response_hidden, self.policy)
        cost = partial(
            CostModel.of,
            self.policy.model.config,
            freeze_vision=self.policy.freeze_vision,
            adapters=bool(self.config.policy.lora_rank),
            reference=bool(train.kl_coef),
        )
        self._cost = cost(checkpointing=self.config.parallel.activation_checkpointing)
        self._cost_once = cost(checkpointing=False)
        self._rubrics = {stage: stage_rubric(self.config, stage) for stage in self.curriculum.stages}
        trainable = [parameter for parameter in self.policy.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trainable, lr=train.learning_rate, betas=train.betas, weight_decay=train.weight_decay, fused=True
        )

    def train_step(self) -> dict[str, Any]:
        """One step of the curriculum. Returns its metrics, JSON values.

        An update that the guard refuses leaves the weights as they were; the row then says why under ``refused``.

        Raises:
            RefusedUpdatesError: too many updates in a row were refused.
        """
        return self._learn(self._answer(self._draw()))

    @property
    def stage_ended(self) -> bool:
        """Whether the step made last was its stage's last one."""
        return self.curriculum.stage_ended

    def _draw(self) -> Draw:
        stage, problems = self.curriculum.sample()
        self.policy.prefetch(problems)
        return Draw(stage, problems, self._sampling())

    def _answer(self, draw: Draw) -> Draw:
        """With the engine's answers; a supervised step needs none."""
        if draw.stage.kind == "sft":
            return draw
        with self.timer.phase("rollout"):
            return self._sample(draw)

    def _sample(self, draw: Draw) -> Draw:
        size = draw.stage.group_size or self.config.rollout.group_size
        with GroupScores(partial(self._score, draw.stage)) as scores:
            groups = self.engine.generate(draw.problems, size, draw.sampling, scores)
        greedy: list[RolloutGroup] = []
        if self.config.train.advantage_baseline == "greedy":  # ReMax, arXiv 2310.10505
            greedy = self.engine.generate(draw.problems, 1, replace(draw.sampling, temperature=0.0))
        return replace(draw, groups=groups, rewards=scores.take(), greedy=greedy)

    def _learn(self, draw: Draw) -> dict[str, Any]:
        self.step += 1
        asked = {"asked": dict(Counter(problem.kind for problem in draw.problems))}
        step = self.supervised_step if draw.stage.kind == "sft" else self.policy_step
        return {"step": self.step, "stage": draw.stage.name} | asked | step(draw)

    def policy_step(self, draw: Draw) -> dict[str, Any]:
        """Group-relative policy optimisation (arXiv 2402.03300). With one update the ratio to the policy before it is
        1; what the engine's policy was is ``rollout.importance_correction``'s, or the clipped ratio's of several."""
        stage = draw.stage
        with self.timer.phase("reward"):
            draw, bad = self._sound(draw)
            groups, rewards = draw.groups, join(draw.rewards)
            problems, size = [group.problem for group in groups], len(groups[0].rollouts)
            baseline = self._score(stage, draw.greedy).score.repeat(size) if draw.greedy else None
            advantage = self._advantage(groups, rewards, baseline)
            self.curriculum.update(stage, problems, rewards.correct.reshape(-1, size).mean(1).tolist())
            every = self.config.train.keep_answers_every
            if every and self.step % every == 0 and self.answers is not None and self.ranks.is_first:
                write_answers(self.answers, self.step, groups, rewards, advantage)
        with self.timer.phase("train"):
            updates, packed = [], []
            parts = list(_mini_batches(groups, advantage, self.config.train.updates_per_step))
            for number, (part, its_advantage) in enumerate(parts, 1):
                forests = self._pack(part, its_advantage)
                sums = self._backward(forests, its_advantage.advantages, part, number == len(parts))
                updates.append(sums | self._update(stage, sums["loss"], sums["rollout_kl"] / max(sums["rows"], 1)))
                packed.append(forests)
                if self.guard.ends:  # another one could end the streak, unsaid
                    break
            metrics = over_updates(updates)
        if "refused" in metrics:
            self._refuse(problems, groups, metrics | {"rewards": rewards.score.tolist()})
        left_out: dict[str, Any] = {"bad_groups": bad} if bad else {}
        row = step_metrics(groups, rewards, advantage) | self._sums(packed) | metrics | left_out
        return row | self._stage_metrics(stage) | self._sync()

    def supervised_step(self, draw: Draw) -> dict[str, Any]:
        """Maximum likelihood of the ideal answers, mean over tokens."""
        stage, problems = draw.stage, draw.problems
        with self.timer.phase("train"):
            batch = [
                gold_answers(self.policy, problem, gold_response(problem), number)
                for number, problem in enumerate(problems)
            ]
            self.policy.prefetch(self.curriculum.peek())
            loss, forests = supervised_backward(
                self.policy,
                batch,
                self.config.train.max_tokens_per_micro_batch,
                ranks=self.ranks,
                forward=self._forward,
                cost=self._cost,
            )
            metrics = {"loss": loss} | self._update(stage, loss, kl=0.0)
        if "refused" in metrics:
            self._refuse(problems, (), metrics)
        return self._sums([forests]) | metrics | self._sync()

    def state_dict(self) -> dict[str, Any]:
        """JSON values: everything of the loop but weights and optimizer."""
        return {
            "step": self.step,
            "version": self.version,
            "curriculum": self.curriculum.state_dict(),
            "refused": [self.guard.streak, self.guard.refused],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step, self.version = state["step"], state["version"]
        self.curriculum.load_state_dict(state["curriculum"])
        self.guard.streak, self.guard.refused = state["refused"]
        self.engine.update_weights(self.version)

    def _sound(self, draw: Draw) -> tuple[Draw, list[str]]:
        """With the groups alone that can be trained on, and what is wrong with the others.

        Raises:
            DataError: any is wrong and ``train.on_bad_group`` is ``raise``, or all are.
        """
        limit = self.config.train.max_tokens_per_micro_batch
        faults = [fault_of(group, self.policy, limit) for group in draw.groups]
        bad = [fault for fault in faults if fault is not None]
        if bad and (self.config.train.on_bad_group == "raise" or len(bad) == len(faults)):
            raise DataError(f"{bad[0]} (train.on_bad_group='skip' leaves such groups out and counts them)")

        def sound(values: Sequence[Any]) -> list[Any]:
            return [value for value, fault in zip(values, faults, strict=True) if fault is None]

        greedy = sound(draw.greedy) if draw.greedy else ()
        return replace(draw, groups=sound(draw.groups), rewards=sound(draw.rewards), greedy=greedy), bad

    def _sync(self) -> dict[str, float]:
        """The new weights to the engine; what it has to tell about that."""
        with self.timer.phase("sync"):
            self.engine.update_weights(self.version)
        return self.engine.metrics()

    def _sampling(self) -> SamplingParams:
        rollout = self.config.rollout
        seed = int(np.random.SeedSequence([self.config.train.seed, self.curriculum.step]).generate_state(1)[0])
        return SamplingParams(rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_new_tokens, seed)

    def _score(self, stage: StageConfig, groups: Sequence[RolloutGroup]) -> RewardBatch:
        problems = [group.problem for group in groups for _ in group.rollouts]
        texts = [rollout.text for group in groups for rollout in group.rollouts]
        rubric = self._rubrics[stage]
        return rubric.score(problems, texts, self.networks[rubric.mode])

    def _advantage(
        self, groups: Sequence[RolloutGroup], rewards: RewardBatch, baseline: np.ndarray | None
    ) -> GroupAdvantage:
        return answer_advantages(self.config.train, self.step, groups, rewards, baseline)

    def _pack(self, groups: Sequence[RolloutGroup], advantage: GroupAdvantage) -> list[PackedForest]:
        train = self.config.train
        # With other terms, or against another baseline than its own mean, a group of equal rewards still teaches.
        others = train.entropy_coef or train.kl_coef or train.advantage_baseline != "group"
        may_skip = train.skip_equal_groups and not others
        batch, first = [], 0
        for group, equal in zip(groups, advantage.degenerate.tolist(), strict=True):
            numbers = tuple(range(first, first + len(group.rollouts)))
            first += len(group.rollouts)
            if equal and may_skip:
                continue
            responses = tuple(rollout.token_ids for rollout in group.rollouts)
            logprobs = tuple(rollout.rollout_logprobs for rollout in group.rollouts)
            problem = group.problem
            batch.append(Answers(self.policy.encode(problem), problem.image, responses, numbers, logprobs))
        return pack_forest(
            batch,
            train.max_tokens_per_micro_batch,
            ranks=self.ranks.size,
            rank=self.ranks.rank,
            cost=self._cost,
        )

    def _backward(
        self, forests: Sequence[PackedForest], advantages: Tensor, groups: Sequence[RolloutGroup], last: bool = True
    ) -> dict[str, float]:
        """Accumulate gradients. Denominators count every answer of the update, also those of skipped groups.

        Returns:
            ``SUMS`` over all ranks, those that the configuration has something to tell of.
        """
        device, train = self.policy.device, self.config.train
        against_engine = train.updates_per_step > 1 and self.config.rollout.importance_correction == "none"
        lengths = torch.tensor([len(rollout.token_ids) for group in groups for rollout in group.rollouts])
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=device)  # one host sync an update
        vision = Vision(self.policy, forests, together=self.ranks.size > 1)
        if last:  # the step's own pictures are seen by now
            self.policy.prefetch(self.curriculum.peek())
        for forest in each_micro_batch(self.policy, forests):
            weights = _row_normalizer(self.objective, forest.sequence, lengths, self.config.rollout.max_new_tokens)
            mask = to_device(forest.loss_mask, device)
            sampled = None if forest.rollout_logprobs is None else to_device(forest.rollout_logprobs, device)
            ref = None
            if self.reference is not None:
                ref = self.reference.logprobs(forest, vision, self._forward, self.config.rollout.temperature)
            out = linear_policy_loss(
                self._forward(forest, vision),
                self.policy.model.lm_head.weight,
                to_device(forest.target, device),
                advantages=to_device(advantages[forest.sequence], device),
                normalizer=to_device(weights, device),
                objective=self.objective,
                sequence=to_device(forest.sequence, device),
                num_sequences=len(lengths),
                temperature=self.config.rollout.temperature,
                loss_mask=mask,
                old_logprobs=sampled if against_engine else None,
                ref_logprobs=ref,
                rollout_logprobs=sampled,
            )
            out.loss.backward()
            sums += row_sums(out, mask, sampled, ref)
        vision.backward()
        totals = self.ranks.sum(dict(zip(SUMS, sums.tolist(), strict=True)))
        unknown = [] if self.reference else ["reference_kl"]
        unknown += [] if against_engine else ["clip_fraction"]
        unknown += ["importance_mean", "importance_rejected"] if self.objective.importance_correction == "none" else []
        return {name: total for name, total in totals.items() if name not in unknown}

    def _update(self, stage: StageConfig, loss: float, kl: float) -> dict[str, Any]:
        """Clip, step, count, unless the guard refuses. Returns the gradient norm before clipping, and the rate."""
        self._before_update()
        train = self.config.train
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = float(whole(torch.nn.utils.clip_grad_norm_(parameters, train.max_grad_norm)))
        rate = train.learning_rate if stage.learning_rate is None else stage.learning_rate
        rate *= min(1.0, (self.version + 1) / max(1, train.warmup_steps))
        row = {"grad_norm": norm, "learning_rate": rate}
        refused = self.guard.check(loss, norm, kl)
        if refused:
            self.optimizer.zero_grad()
            return row | {"refused": refused}
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.version += 1
        return row

    def _before_update(self) -> None:
        """The weights are about to change."""

    def _refuse(self, problems: Sequence[Problem], groups: Sequence[RolloutGroup], numbers: dict[str, Any]) -> None:
        if self.faults is not None and self.ranks.is_first:
            dump_batch(self.faults, self.step, problems, groups, numbers)
        self.guard.stop_after_streak(self.step, numbers["refused"])

    def _sums(self, packed: Sequence[Sequence[PackedForest]]) -> dict[str, Any]:
        """What the micro-batches of each update hold, over all ranks, and each rank's arithmetic."""
        sums = Counter[str]()
        for forests in packed:
            sums.update(batch_sums(forests) | {"model_flop": batch_flop(forests, self._cost_once)})
        counts = {name: int(count) for name, count in self.ranks.sum(sums).items()}
        flop = self.ranks.gather([batch_flop(forests, self._cost) for forests in packed])
        return counts | {"train_flop": list(map(sum, flop)), "slowest_flop": sum(map(max, zip(*flop, strict=True)))}

    def _stage_metrics(self, stage: StageConfig) -> dict[str, Any]:
        """What the stage sets, and where its gate and its pools stand."""
        row: dict[str, Any] = {
            "reward_mode": self._rubrics[stage].mode,
            "group_size": stage.group_size or self.config.rollout.group_size,
        }
        if stage.advance_at is not None:
            row |= {"gate": self.curriculum.success(stage), "advance_at": stage.advance_at}
        return row | ({"pools": self.curriculum.pool_shares(stage)} if stage.pools == "adaptive" else {})


def _mini_batches(
    groups: Sequence[RolloutGroup], advantage: GroupAdvantage, count: int
) -> Iterator[tuple[Sequence[RolloutGroup], GroupAdvantage]]:
    """Consecutive groups for each of ``count`` updates, and their advantages; fewer updates where groups are fewer."""
    size = len(groups[0].rollouts)
    count = min(count, len(groups))
    for part in range(count):
        first, end = part * len(groups) // count, (part + 1) * len(groups) // count
        own = advantage.advantages[first * size : end * size], advantage.degenerate[first:end]
        yield groups[first:end], advantage._replace(advantages=own[0], degenerate=own[1])


def _row_normalizer(objective: PolicyObjective, sequence: Tensor, lengths: Tensor, max_length: int) -> Tensor:
    """The divisor of each row's loss over the whole step: lengths [B] of all answers, ``sequence`` [N] of these
    rows."""
    if objective.name in ("grpo", "gspo", "sapo"):
        return (lengths[sequence] * len(lengths)).float()
    if objective.name == "dr_grpo":
        return torch.tensor(float(len(lengths) * max_length))
    return loss_normalizer(objective, torch.ones(len(sequence)), total_tokens=float(lengths.sum()))
