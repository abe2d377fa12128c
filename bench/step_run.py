"""One arm of the step bench in this process: the whole training step, timed. Prints one JSON row, on a GPU a fuller one
after it.

    PYTHONPATH=.:kernels python bench/step_run.py --device cpu --case "480+40" --arm ours

The step: rewards to advantages, packing or padding, pictures, forward, loss, backward, clipping, optimizer. Answers and
rewards are given; no arm samples.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import kernel_times
import numpy as np
import torch
from step_cases import ARMS, CASES, Case, Work, build_answers, build_model, build_problems, flop

from rewardmap.config import Config, PolicyConfig, RolloutConfig, StageConfig, TrainConfig
from rewardmap.curriculum import Curriculum
from rewardmap.policy import Policy, assemble
from rewardmap.profiling import peak_rss_bytes
from rewardmap.rewards import RewardBatch
from rewardmap.rollout.engine import OnGroup
from rewardmap.train import trainer as trainer_module
from rewardmap.train.forest import PackedForest, pack_forest
from rewardmap.train.forward import response_hidden
from rewardmap.train.plan import DEVICES, Workload, plan
from rewardmap.train.trainer import Trainer
from rewardmap.types import KINDS, Problem, RolloutGroup, SamplingParams
from rewardmap.vision import ImageFeatures
from rewardmap_kernels import linear_logprobs, linear_policy_loss

WARM_UP = 1
RATE = 1e-6
H100_FLOPS = 989.4e12
"""bfloat16 without sparsity, of H100 and H200 (SXM), as NVIDIA's data sheets give it."""


class Given:
    """An engine that has the answers already."""

    def __init__(self, groups: Sequence[RolloutGroup]) -> None:
        self._groups = {group.problem.uid: group for group in groups}

    def generate(
        self, problems: Sequence[Problem], group_size: int, sampling: SamplingParams, on_group: OnGroup | None = None
    ) -> list[RolloutGroup]:
        groups = [self._groups[problem.uid] for problem in problems]
        for index, group in enumerate(groups):
            if on_group is not None:
                on_group(index, group)
        return groups

    def update_weights(self, version: int) -> None: ...

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None: ...


class BenchTrainer(Trainer):
    """The trainer, with given rewards, less the savings that ``work`` is without."""

    work: Work
    rewards: dict[str, np.ndarray]
    probes: list[dict[str, list[float]]]

    def _score(self, stage: StageConfig, groups: Sequence[RolloutGroup]) -> RewardBatch:
        score = np.concatenate([self.rewards[group.problem.uid] for group in groups])
        yes, ones = np.ones(len(score), bool), np.ones(len(score))
        return RewardBatch(score, yes, ones, ones, yes, np.zeros(len(score), np.int8), ones)

    def _backward(self, forests: Sequence[PackedForest], *rest: Any) -> dict[str, float]:
        if self.work.old_pass:
            for forest in forests:
                with torch.no_grad():
                    vision: Any = Afresh(self.policy) if self.work.tower_per_sample else None
                    linear_logprobs(
                        response_hidden(self.policy, forest, vision),
                        self.policy.model.lm_head.weight,
                        forest.target.to(self.policy.device),
                    )
        return super()._backward(forests, *rest)

    def _update(self, *rest: Any) -> dict[str, Any]:
        if not self.probes:
            self.probes.append(probe(self.policy.model))
        return super()._update(*rest)


class Afresh:
    """In the place of ``Vision``: the tower once for every sequence, in each micro-batch's own graph."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def of(self, images: Sequence[str | bytes]) -> list[ImageFeatures]:
        return self._policy._see([self._policy.image(image) for image in images])

    def backward(self) -> None: ...


def every_row(forest: PackedForest) -> PackedForest:
    """The same forest, its other tokens through the head as well, without weight in the loss."""
    others = torch.from_numpy(np.setdiff1d(np.arange(len(forest.input_ids)), forest.hidden_index.numpy()))
    zero = torch.zeros_like(others)
    assert forest.rollout_logprobs is not None
    return dataclasses.replace(
        forest,
        hidden_index=torch.cat([forest.hidden_index, others]),
        target=torch.cat([forest.target, zero]),
        sequence=torch.cat([forest.sequence, zero + forest.sequence[0]]),
        loss_mask=torch.cat([forest.loss_mask, zero.float()]),
        rollout_logprobs=torch.cat([forest.rollout_logprobs, zero.float()]),
    )


def run_ours(case: Case, work: Work, device: str, dtype: torch.dtype, turn: Callable[[], None]) -> dict[str, Any]:
    model, tokenizer, processor = build_model(case, device, dtype)
    policy = assemble(model, tokenizer, processor, case.freeze_vision)
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    problems = build_problems(case, tokenizer)
    groups, rewards = build_answers(case, problems, policy.stop_token_ids[0])
    groups = [dataclasses.replace(g, prompt_token_ids=policy.encode(g.problem).token_ids) for g in groups]
    longest = case.prompt + case.response
    config = Config(
        policy=PolicyConfig(device=device, freeze_vision=case.freeze_vision),
        rollout=RolloutConfig(group_size=case.group, max_new_tokens=case.response),
        train=TrainConfig(
            stages=(StageConfig(name="bench", question_kinds=KINDS),),
            prompts_per_step=len(problems),
            learning_rate=RATE,
            max_grad_norm=1e9,
            skip_equal_groups=False,
            # Eight sequences a micro-batch at most where nothing is shared, as the peer has.
            max_tokens_per_micro_batch=longest * case.group,
        ),
    )
    curriculum = Curriculum(problems, config.train.stages, len(problems), 0)
    trainer = BenchTrainer(config, policy, Given(groups), {config.reward.mode: {}}, curriculum)
    trainer.work, trainer.probes = work, []
    trainer.rewards = {g.problem.uid: row for g, row in zip(groups, rewards.reshape(-1, case.group), strict=True)}
    _without(trainer, work)
    before, times, rows = _memory(device), [], []
    for _ in range(WARM_UP + case.timed):
        turn()
        start = _now(device)
        rows.append(trainer.train_step())
        times.append(_now(device) - start)
        phases = trainer.timer.end_step()
    return {
        "seconds": times[WARM_UP:],
        "loss": rows[0]["loss"],
        "computed_tokens": rows[-1]["packed_tokens"],
        "memory": _peak(device) - before,
        "phase_seconds": phases,
        "planned": planned(config, case, dtype, model.config, _data_sheet(device)) if work == ARMS["ours"] else None,
        "probe": trainer.probes[0],
        "again": trainer.train_step,
    }


def planned(
    config: Config, case: Case, dtype: torch.dtype, model_config: Any, device: str | None
) -> dict[str, Any] | None:
    """What ``rewardmap plan`` says of this step: bytes by part, seconds by phase; or why it should not fit. None for a
    GPU it does not know."""
    if device is None:
        return None
    policy = dataclasses.replace(config.policy, dtype=str(dtype).removeprefix("torch."))
    parallel = dataclasses.replace(config.parallel, activation_checkpointing=case.checkpointing)
    config = dataclasses.replace(config, policy=policy, parallel=parallel)
    try:
        found = plan(config, model_config, 1, device, Workload(case.prompt, case.response))
    except Exception as error:  # a forecast must not cost the measurement
        return {"refused": f"{type(error).__name__}: {error}"}
    return {"memory": found.memory, "seconds": found.seconds}


def _without(trainer: Trainer, work: Work) -> None:
    """Take savings away from this process."""
    module: Any = trainer_module
    policy = trainer.policy
    if work.tower_per_sample:
        module.Vision = lambda policy, forests, together: Afresh(policy)
    if work.head_on_all:
        weights: list[torch.Tensor] = []

        def hidden(forest: PackedForest, vision: Any) -> torch.Tensor:
            weights[:] = [forest.loss_mask.to(policy.device)]
            return response_hidden(policy, forest, vision)

        def loss(*arguments: Any, advantages: torch.Tensor, loss_mask: object, **options: Any) -> Any:
            return linear_policy_loss(*arguments, advantages=advantages * weights[0], **options)

        trainer._forward, module.linear_policy_loss = hidden, loss
    if not work.shared or work.head_on_all:

        def pack(*arguments: Any, **options: Any) -> list[PackedForest]:
            forests = pack_forest(*arguments, **options, share=work.shared)
            return [every_row(forest) for forest in forests] if work.head_on_all else forests

        module.pack_forest = pack


def run_trl(case: Case, device: str, dtype: torch.dtype, turn: Callable[[], None]) -> dict[str, Any]:
    import step_trl

    return step_trl.run(case, device, dtype, WARM_UP, RATE, probe, lambda: _now(device), _memory, _peak, turn)


@torch.no_grad()
def probe(model: torch.nn.Module) -> dict[str, list[float]]:
    """Per trained parameter: its gradient's product with fixed random signs, and its norm. The signs' products differ
    by as much as the gradients do, in the mean."""
    found = {}
    for name, parameter in sorted(model.named_parameters()):
        if parameter.grad is None:
            continue
        grad = parameter.grad.detach().float().flatten()
        signs = torch.arange(grad.numel(), device=grad.device).mul_(0x1E3779B97F4A7C15).bitwise_right_shift_(62)
        found[name] = [float((grad * (1 - 2 * (signs & 1))).double().sum()), float(grad.double().norm())]
    return found


def _data_sheet(device: str) -> str | None:
    """The name under which ``rewardmap plan`` knows this GPU."""
    return next((name for name in DEVICES if name in torch.cuda.get_device_name()), None) if device == "cuda" else None


def _now(device: str) -> float:
    """Wall seconds on a GPU. On the CPU this process's CPU seconds, which on one thread are the same but for what other
    processes take."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def _memory(device: str) -> int:
    """Bytes now: of the GPU, or resident."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else peak_rss_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=tuple(CASES), default="cuda")
    parser.add_argument("--case", required=True)
    parser.add_argument("--arm", choices=tuple(ARMS), required=True)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--turns", action="store_true", help="say 'ready' and wait for a line before every step")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    case, work = CASES[chosen.device][chosen.case], ARMS[chosen.arm]
    dtype = torch.bfloat16 if chosen.device == "cuda" else torch.float32

    def turn() -> None:
        if chosen.turns:
            print("ready", flush=True)
            sys.stdin.readline()

    if chosen.arm == "TRL":
        row = run_trl(case, chosen.device, dtype, turn)
    else:
        row = run_ours(case, work, chosen.device, dtype, turn)
    again = row.pop("again", None)
    median = statistics.median(row["seconds"])
    arithmetic = flop(case, work)
    hopper = _data_sheet(chosen.device) in ("H100", "H200")
    row = {
        "ok": bool(np.isfinite(row["loss"])),
        "arm": chosen.arm,
        "step_seconds": median,
        "fastest_seconds": min(row["seconds"]),
        **row,
        "logical_tokens": case.sequences * (case.prompt + case.response - 1),
        "flop": arithmetic,
        "flop_per_second": arithmetic["total"] / median,
        "mfu": arithmetic["total"] / median / H100_FLOPS if hopper else None,
    }
    print(json.dumps(row), flush=True)
    if chosen.device == "cuda":
        row["ceilings"] = kernel_times.ceilings()
        row["kernels"] = kernel_times.looked_at(again, 30) if again is not None and chosen.arm == "ours" else None
        print(json.dumps(row))


if __name__ == "__main__":
    main()
