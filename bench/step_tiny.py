"""One training step of the tiny model, timed, with its error against the CPU in fp32. Prints one JSON row.

A child of ``bench/gpu.py``; alone: ``PYTHONPATH=.:kernels python bench/step_tiny.py --device cpu``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np
import torch

from rewardmap import tiny
from rewardmap.config import Config, PolicyConfig, RolloutConfig, StageConfig, TrainConfig
from rewardmap.curriculum import Curriculum
from rewardmap.policy import Policy, cast_weights, load_policy
from rewardmap.rollout.local import LocalEngine
from rewardmap.train.supervised import gold_answers, supervised_backward
from rewardmap.train.trainer import Trainer
from rewardmap.transit import gold_response
from rewardmap.transit.draw import draw_map, encode_png
from rewardmap.transit.generate import TINY_LEVELS, generate_network
from rewardmap.transit.questions import Balance, as_problem, make_questions
from rewardmap.types import KINDS, MetroData, Problem

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
"""Relative error of the whole gradient against the CPU in fp32."""
MAPS, WARM_UP, TIMED = 12, 2, 5


def make_problems(maps: int) -> tuple[list[Problem], dict[str, MetroData]]:
    """Questions of all kinds about seeded tiny maps, pictures as bytes: no files."""
    problems: list[Problem] = []
    networks: dict[str, MetroData] = {}
    balance = Balance()
    for index in range(maps):
        rng = np.random.default_rng([7, index])
        network = generate_network(TINY_LEVELS[index % len(TINY_LEVELS)], rng, f"bench/map_{index}")
        networks[network.network_id] = network.metro_data()
        picture = encode_png(draw_map(network))
        rows = make_questions(network, "tiny", rng, balance)
        problems += [as_problem(row, picture, network.network_id) for row in rows]
    return problems, networks


def gradient(policy: Policy, problems: list[Problem]) -> tuple[float, torch.Tensor]:
    """Loss and flat fp32 gradient [parameters] of the ideal answers' likelihood, on the CPU."""
    batch = [gold_answers(policy, problem, gold_response(problem), i) for i, problem in enumerate(problems)]
    loss, _ = supervised_backward(policy, batch, 16_384)
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    flat = torch.cat([p.grad.detach().float().cpu().flatten() for p in parameters if p.grad is not None])
    policy.model.zero_grad()
    return loss, flat


def measure(device: str, dtype: str) -> dict[str, Any]:
    torch.backends.cuda.matmul.allow_tf32 = False
    problems, networks = make_problems(MAPS)
    shipped = (tiny.WARM_START / "config.json").is_file()
    cpu = PolicyConfig(device="cpu")
    reference, policy = (
        load_policy(tiny.WARM_START, cpu) if shipped else tiny.build_tiny(0, freeze_vision=True) for _ in range(2)
    )
    policy.model.to(device)
    cast_weights(policy.model, getattr(torch, dtype))
    sample = problems[::9]
    loss, expected = gradient(reference, sample)
    loss_here, found = gradient(policy, sample)
    error = float((found - expected).norm() / expected.norm())

    config = Config(
        policy=PolicyConfig(device=device, dtype=dtype),  # type: ignore[arg-type]
        rollout=RolloutConfig(max_new_tokens=48),
        train=TrainConfig(
            stages=(StageConfig(name="all", question_kinds=KINDS),),
            learning_rate=1e-5,
            skip_equal_groups=False,
        ),
    )
    train = config.train
    curriculum = Curriculum(problems, train.stages, train.prompts_per_step, train.seed)
    engine = LocalEngine(policy, config.rollout.batch_sequences)
    trainer = Trainer(config, policy, engine, {config.reward.mode: networks}, curriculum)
    seconds, rows = [], []
    for _ in range(WARM_UP + TIMED):
        _synchronize(device)
        start = time.perf_counter()
        rows.append(trainer.train_step() | {"seconds": trainer.timer.end_step()})
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    timed = rows[WARM_UP:]
    step = statistics.median(seconds[WARM_UP:])
    tokens = statistics.fmean(row["rollout_tokens"] for row in timed)
    return {
        "ok": error <= TOLERANCE[dtype] and bool(np.isfinite([row["grad_norm"] for row in timed]).all()),
        "dtype": dtype,
        "weights": "shipped" if shipped else "random",
        "gradient_error": error,
        "gradient_tolerance": TOLERANCE[dtype],
        "loss_error": abs(loss_here - loss) / abs(loss),
        "step_seconds": step,
        "steps_timed": [round(value, 4) for value in seconds[WARM_UP:]],
        "phase_seconds": {
            name: statistics.median(row["seconds"].get(name, 0.0) for row in timed) for name in timed[0]["seconds"]
        },
        "answers_per_step": train.prompts_per_step * config.rollout.group_size,
        "rollout_tokens": tokens,
        "rollout_tokens_per_second": tokens / step,
        "packed_tokens": statistics.fmean(row["packed_tokens"] for row in timed),
        "peak_device_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    }


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=tuple(TOLERANCE), default="float32")
    chosen = parser.parse_args()
    print(json.dumps(measure(chosen.device, chosen.dtype)))
