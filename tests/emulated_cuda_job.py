"""Training on an emulated GPU and on the CPU: ``python emulated_cuda_job.py FOLDER``, by ``test_emulated_cuda.py``.

Writes ``FOLDER/VARIANT.json``: each step's loss and gradient norm on both, and where the host waited in the last one;
and the run folders ``FOLDER/run-cuda`` and ``FOLDER/run-cpu`` of ``rewardmap train``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
sys.path.append(str(Path(__file__).parent))
import emulated_cuda  # isort: skip  # before torch

import kernels_cases as cases
import torch
from forest_models import build
from parallel_job import put_together
from rich.console import Console

from rewardmap.config import Config, PolicyConfig, RolloutConfig, StageConfig, TrainConfig
from rewardmap.config_file import load_config
from rewardmap.train import run
from rewardmap.train.ranks import Ranks, join_ranks
from rewardmap.train.trainer import Trainer
from rewardmap_kernels import (
    PolicyObjective,
    group_advantage,
    last_path,
    linear_logprobs,
    linear_policy_loss,
    logits_policy_loss,
    loss_normalizer,
    policy_loss,
    selective_log_softmax,
    use_implementation,
)

STEPS, DAPO = 2, PolicyObjective("dapo")
VARIANTS: dict[str, dict[str, Any]] = {
    "frozen": {},
    "tower": {"policy": {"freeze_vision": False}},
    "reference": {"train": {"kl_coef": 0.3}},
    "sharded": {"sharded": True, "policy": {"freeze_vision": False}},
    "qwen3_vl": {"family": "qwen3_vl", "policy": {"freeze_vision": False}},
    "half": {"policy": {"freeze_vision": False}, "half": True},
}
"""``sharded``: by FSDP2, on one rank. ``half``: in float16, which takes the paths of bfloat16, in which Triton's
interpreter is wrong."""
RUN = [
    "data.train_maps=3", "data.test_maps=3", "train.prompts_per_step=3", "rollout.group_size=2",
    "rollout.max_new_tokens=12", "train.checkpoint_every=1", "train.kl_coef=0.05",
    "eval.max_problems=3", "eval.samples=0", "eval.text_only=false",
    "train.stages=[{name='warm', kind='sft', steps=0, checkpoint='shipped'}, {name='all', steps=2}]",
]  # fmt: skip


def make_trainer(variant: dict[str, Any], device: str, ranks: Ranks) -> Trainer:
    config = Config(
        policy=PolicyConfig(device=device, **variant.get("policy", {})),
        rollout=RolloutConfig(group_size=3, max_new_tokens=12),
        train=TrainConfig(
            stages=(StageConfig(name="all", question_kinds=("TorF1",)),), prompts_per_step=2, learning_rate=1e-3,
            max_tokens_per_micro_batch=300, objective="dapo", **variant.get("train", {}),
        ),
    )  # fmt: skip
    dtype = torch.float16 if variant.get("half") else torch.float32
    policy = build(variant.get("family", "qwen2_5_vl"), config.policy.freeze_vision, dtype)
    sharded = variant.get("sharded") and device == "cuda"
    if not sharded:
        policy.model.to(device)
    return put_together(config, policy, ranks, emulated_cuda.CUDA if sharded else None)


def make_steps(variant: dict[str, Any], device: str) -> list[dict[str, Any]]:
    rows = []
    with join_ranks(60, alone=bool(variant.get("sharded"))) as ranks:
        trainer = make_trainer(variant, device, ranks)
        for _ in range(STEPS):
            emulated_cuda.WAITS.clear()
            rows.append(trainer.train_step())
    return [{key: row[key] for key in ("loss", "grad_norm", "packed_tokens")} for row in rows]


def compare(variant: dict[str, Any]) -> dict[str, Any]:
    with use_implementation("torch"):  # the definitions; the half of them that is rounded is not what is compared
        expected = make_steps({**variant, "half": False}, "cpu")
    with emulated_cuda.emulated() as waits:
        got = make_steps(variant, "cuda")
        return {"cpu": expected, "cuda": got, "waits": dict(waits), "kernel": last_path("linear_policy_loss")}


def refusals() -> dict[str, Any]:
    """That the emulation sees what it is for."""
    with emulated_cuda.emulated() as waits:
        there, here = torch.ones(3).to("cuda"), torch.ones(3)
        try:
            there + here
        except RuntimeError as error:
            said = str(error)
        waits.clear()
        (there * 2).to("cuda") + 1
        here.pin_memory().to("cuda", non_blocking=True)
        quiet = dict(waits)
        here.to("cuda", non_blocking=True), there.cpu(), there.sum().item(), there.tolist(), there[there > 0]
        return {"said": said, "quiet": quiet, "waits": sum(waits.values())}


def operations() -> dict[str, int]:
    """Where the kernel library waits, every operation forward and backward."""
    with emulated_cuda.emulated() as waits:
        there = {key: value.to("cuda") for key, value in cases.row_inputs(24, dtype=torch.float32).items()}
        hidden, weight = (torch.randn(n, 16, device="cuda", requires_grad=True) for n in (24, 77))
        logits = torch.randn(24, 77, device="cuda", requires_grad=True)
        targets, offsets = (torch.arange(0, n, step, device="cuda") for n, step in ((24, 1), (25, 8)))
        waits.clear()
        for objective in (cases.OBJECTIVES[0], *(one for one in cases.OBJECTIVES if one.needs_sequence)):
            rows = there | {"normalizer": loss_normalizer(DAPO, there["loss_mask"], total_tokens=19)}
            linear_policy_loss(hidden, weight, targets, objective=objective, **rows).loss.backward()
            logits_policy_loss(logits, targets, objective=objective, **rows).loss.backward()
        here = there | {"normalizer": torch.tensor(19.0)}
        linear_policy_loss(hidden, weight, targets, objective=DAPO, **here).loss.backward()
        policy_loss(hidden[:, 0], objective=DAPO, **here).row_loss.sum().backward()
        half = hidden.detach().half().requires_grad_(), weight.detach().half()
        linear_policy_loss(*half, targets, objective=DAPO, **there | {"normalizer": 19.0}).loss.backward()
        for one in (*linear_logprobs(hidden, weight, targets), *selective_log_softmax(logits, targets)):
            one.sum().backward(retain_graph=True)
        group_advantage(there["advantages"], offsets)
        return dict(waits)


def divisors() -> list[list[float | None]]:
    """Rows of log-probabilities, losses and gradients where two divisors and two temperatures are not positive."""
    with emulated_cuda.emulated():
        hidden, weight = (torch.randn(n, 16, device="cuda", requires_grad=True) for n in (6, 77))
        logits, targets = (hidden @ weight.T).detach().requires_grad_(), torch.arange(6, device="cuda")
        mask = torch.tensor([1, 1, 1, 1, 1, 0]).to("cuda")
        rows = {"advantages": torch.ones(6).to("cuda"), "loss_mask": mask, "objective": DAPO}
        rows["normalizer"] = torch.tensor([1.0, -1.0, 0.0, 1.0, 1.0, 0.0]).to("cuda")
        temperature = torch.tensor([1.0, 1.0, 1.0, -1.0, 0.0, -1.0]).to("cuda")
        by_linear = linear_policy_loss(hidden, weight.detach(), targets, temperature=temperature, **rows)
        by_logits = logits_policy_loss(logits, targets, temperature=temperature, **rows)
        (alone,) = linear_logprobs(hidden.detach(), weight.detach(), targets, temperature=temperature)[:1]
        alone_2 = selective_log_softmax(logits.detach(), targets, temperature)[0]
        (one,) = torch.autograd.grad(by_linear.loss, hidden)
        (two,) = torch.autograd.grad(by_logits.loss, logits)
        by_row = policy_loss(alone.nan_to_num(), **rows).row_loss
        found = (by_linear.logprobs, by_logits.logprobs, alone, alone_2, by_row, one.sum(1), two.sum(1))
        return [[x if x == x else None for x in values.tolist()] for values in found]


if __name__ == "__main__":
    out = Path(sys.argv[1])
    (out / "refusals.json").write_text(json.dumps(refusals()))
    (out / "operations.json").write_text(json.dumps(operations()))
    (out / "divisors.json").write_text(json.dumps(divisors()))
    for name, chosen in VARIANTS.items():
        (out / f"{name}.json").write_text(json.dumps(compare(chosen)))
    with use_implementation("torch"):
        run.train(load_config("tiny", RUN), out / "run-cpu", console=Console(quiet=True))
    with emulated_cuda.emulated():
        run.train(load_config("tiny", RUN), out / "run-cuda", console=Console(quiet=True))
        run.resume(out / "run-cuda", console=Console(quiet=True))
