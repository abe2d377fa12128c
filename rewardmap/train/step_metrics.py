"""What a step measures: sums over the rows it trained on and their micro-batches, means over the answers it sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from rewardmap.rewards import RewardBatch
from rewardmap.train.balance import CostModel
from rewardmap.train.forest import PackedForest
from rewardmap.types import RolloutGroup
from rewardmap_kernels import GroupAdvantage, LinearPolicyLoss

Tensor = torch.Tensor
SUMS = (
    "loss",
    "rows",
    "entropy",
    "rollout_drift",
    "rollout_kl",
    "reference_kl",
    "clip_fraction",
    "importance_mean",
    "importance_rejected",
)
"""What an update adds up over its rows."""


def row_sums(out: LinearPolicyLoss, mask: Tensor, sampled: Tensor | None, ref: Tensor | None) -> Tensor:
    """``SUMS`` [9] float64 of one micro-batch on its device, over rows [N] whose ``mask`` is not 0."""
    trained, logprobs = mask > 0, out.logprobs.detach().double()

    def total(rows: Tensor) -> Tensor:
        return torch.where(trained, rows.double(), 0.0).sum()

    def k3(off: Tensor) -> Tensor:
        """The other policy against this one (joschu.net/blog/kl-approx.html)."""
        return total(off.expm1() - off)

    off = torch.zeros_like(logprobs) if sampled is None else logprobs - sampled.double()
    away = torch.zeros_like(logprobs) if ref is None else ref.double() - logprobs
    loss, count = out.loss.detach().double(), trained.sum().double()

    def measured(name: str) -> Tensor:
        """The loss's own mean, times its rows; 0 where the objective has none."""
        return out.metrics[name].double() * count if name in out.metrics else torch.zeros_like(count)

    clipped = measured("clip_fraction_low") + measured("clip_fraction_high")
    weighed = measured("importance_mean"), measured("importance_rejected")
    return torch.stack([loss, count, total(out.entropy), total(off.abs()), k3(off), k3(away), clipped, *weighed])


def over_updates(updates: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A step's numbers from its updates': means over their rows of what ``SUMS`` names, mean loss and gradient norm,
    the last learning rate, and why updates were refused, where any were."""
    rows = sum(update["rows"] for update in updates)
    row = {name: sum(update[name] for update in updates) / len(updates) for name in ("loss", "grad_norm")}
    row["learning_rate"] = updates[-1]["learning_rate"]
    for name in SUMS[2:]:
        if name in updates[0]:
            row[name] = sum(update[name] for update in updates) / max(rows, 1)
    refused = [update["refused"] for update in updates if "refused" in update]
    return row | ({"refused": "; ".join(refused)} if refused else {})


def batch_sums(forests: Sequence[PackedForest]) -> dict[str, int]:
    """What micro-batches hold. Fillers hold nothing, but are micro-batches too."""
    real = _without_fillers(forests)
    return {
        "packed_tokens": sum(len(forest.input_ids) for forest in real),
        "logical_tokens": sum(forest.logical_tokens for forest in real),
        "micro_batches": len(forests),
    }


def batch_flop(forests: Sequence[PackedForest], cost: CostModel) -> float:
    """Of micro-batches, each picture once."""
    real = _without_fillers(forests)
    decoder = sum(cost.flop(len(forest.input_ids), forest.pairs, len(forest.target)) for forest in real)
    seen = {image: size for forest in real for image, size in zip(forest.images, forest.image_tokens, strict=True)}
    return decoder + sum(map(cost.tower, seen.values()))


def _without_fillers(forests: Sequence[PackedForest]) -> list[PackedForest]:
    return [forest for forest in forests if forest.logical_tokens]


def step_metrics(groups: Sequence[RolloutGroup], rewards: RewardBatch, advantage: GroupAdvantage) -> dict[str, Any]:
    """Of ``metrics.jsonl``, over a step's answers."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    kinds = np.array([group.problem.kind for group in groups for _ in group.rollouts])
    return {
        "reward": float(rewards.score.mean()),
        "accuracy": float(rewards.correct.mean()),
        "accuracy_by_kind": {str(kind): float(rewards.correct[kinds == kind].mean()) for kind in np.unique(kinds)},
        "format_valid": float(rewards.format_valid.mean()),
        "equal_groups": float(advantage.degenerate.float().mean()),
        "response_length": float(np.mean([len(rollout.token_ids) for rollout in rollouts])),
        "truncated": float(np.mean([rollout.finish_reason == "length" for rollout in rollouts])),
        "rollout_tokens": sum(len(rollout.token_ids) for rollout in rollouts),
    }
