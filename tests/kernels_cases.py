"""Inputs shared by the kernel tests: objectives and random rows."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from rewardmap_kernels import PolicyObjective

OBJECTIVES = [
    PolicyObjective("grpo"),
    PolicyObjective("grpo", clip_eps_low=0.1, clip_eps_high=0.3, dual_clip=1.5),
    PolicyObjective("grpo", delta=1.6),
    PolicyObjective("bnpo", kl_coef=0.1, kl_estimator="k1"),
    PolicyObjective("dr_grpo", kl_coef=0.1, kl_estimator="k2"),
    PolicyObjective("dapo", clip_eps_high=0.28, kl_coef=0.1, entropy_coef=0.05),
    PolicyObjective("cispo", clip_eps_low=1.0, clip_eps_high=0.3),
    PolicyObjective("grpo", kl_coef=0.2, kl_bias_correction=True, delta=1.5),
    PolicyObjective("gspo", clip_eps_low=0.05, clip_eps_high=0.05, dual_clip=1.1),
    PolicyObjective("sapo", sapo_temperature_pos=2.0, entropy_coef=-0.02),
    PolicyObjective("reinforce", entropy_coef=0.01, kl_coef=0.05),
    PolicyObjective("grpo", importance_correction="truncate", importance_max=1.2),
    PolicyObjective("grpo", importance_correction="mask", importance_min=0.7, importance_max=1.2),
    PolicyObjective("cispo", importance_correction="truncate", importance_level="sequence", importance_max=1.5),
    PolicyObjective("gspo", importance_correction="mask", importance_level="sequence", importance_min=0.2),
    PolicyObjective("reinforce", importance_correction="truncate", importance_min=0.9, importance_max=1.1),
]


def objective_id(objective: PolicyObjective) -> str:
    """A readable test id: the name and the fields that differ from the defaults."""
    default = asdict(PolicyObjective())
    changed = [f"{k}={v}" for k, v in asdict(objective).items() if v != default[k] and k != "name"]
    return "-".join([objective.name, *changed])


def read_by_derivative(objective: PolicyObjective) -> list[str]:
    """The inputs of a row that its derivative with respect to the log-probability depends on."""
    corrected = objective.importance_correction != "none"
    names = ["advantages"]
    if objective.name != "reinforce" or corrected:
        names.append("old_logprobs")
    if objective.kl_coef and (objective.kl_estimator != "k1" or objective.kl_bias_correction):
        names.append("ref_logprobs")
    return [*names, "rollout_logprobs"] if corrected else names


def row_inputs(n: int, seed: int = 0, dtype: torch.dtype = torch.float64, sequences: int = 3) -> dict[str, Any]:
    """Everything ``policy_loss`` reads beside logprobs and entropy; log-ratios of about 0.3, a fifth of rows
    masked."""
    g = torch.Generator().manual_seed(seed)

    def draw(spread: float, centre: float = 0.0) -> Tensor:
        return (torch.randn(n, generator=g, dtype=torch.float64) * spread + centre).to(dtype)

    return {
        "advantages": draw(1.0),
        "old_logprobs": draw(0.5, -1.5),
        "ref_logprobs": draw(0.5, -1.5),
        "rollout_logprobs": draw(0.3, -1.5),
        "sequence": torch.randint(0, sequences, (n,), generator=g),
        "loss_mask": torch.rand(n, generator=g) > 0.2,
        "normalizer": torch.rand(n, generator=g, dtype=torch.float64).to(dtype) + n,
    }
