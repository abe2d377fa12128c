"""Advantages of answers relative to their group, for groups of any size side by side (CSR offsets).

Sources: GRPO (arXiv 2402.03300), Dr. GRPO (2503.20783: scale "none"), RLOO (2402.14740: leave-one-out),
REINFORCE++ (2501.03262: batch baseline and batch scale).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import check_floating, check_rows, compute_dtype

SCALES = ("group", "batch", "none", "max_min", "mad")
BASELINES = ("mean", "leave_one_out", "batch_mean", "none")


class GroupAdvantage(NamedTuple):
    """``advantages`` [B]; ``mean``, ``std`` [G] of each group's rewards; ``degenerate`` [G] bool: all its
    rewards are equal."""

    advantages: Tensor
    mean: Tensor
    std: Tensor
    degenerate: Tensor


def _check_offsets(offsets: Tensor, rewards: Tensor) -> None:
    total = rewards.shape[0]
    if offsets.dim() != 1 or offsets.shape[0] < 1 or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"offsets must be [G + 1] int32 or int64, got {tuple(offsets.shape)} {offsets.dtype}"
        )
    if offsets.device != rewards.device:
        raise ValueError(f"offsets is on {offsets.device}, expected {rewards.device}")
    if offsets.device.type == "cpu" and not torch.compiler.is_compiling():
        first, last = int(offsets[0]), int(offsets[-1])
        if first != 0 or last != total:
            raise ValueError(f"offsets must run from 0 to len(rewards) = {total}, got {first} to {last}")
        falling = (offsets[1:] < offsets[:-1]).nonzero()
        if len(falling):
            g = int(falling[0, 0])
            raise ValueError(
                f"offsets must not fall, got offsets[{g}] = {offsets[g]}, offsets[{g + 1}] = {offsets[g + 1]}"
            )
    else:
        valid = (offsets[0] == 0) & (offsets[-1] == total) & (offsets[1:] >= offsets[:-1]).all()
        torch._assert_async(valid, "offsets must rise from 0 to len(rewards)")


def _batch_std(rewards: Tensor, ddof: int) -> Tensor:
    return rewards.std(correction=ddof) if rewards.shape[0] > ddof else rewards.new_zeros(())


def _group_median(values: Tensor, group: Tensor, offsets: Tensor, sizes: Tensor) -> Tensor:
    """[G] medians (the mean of the middle two for an even size); 0 for an empty group."""
    if values.numel() == 0:
        return values.new_zeros(sizes.shape)
    by_value = torch.sort(values, stable=True).indices
    ordered = values[by_value[torch.sort(group[by_value], stable=True).indices]]
    last = values.shape[0] - 1
    low = (offsets[:-1] + (sizes - 1).clamp(min=0) // 2).clamp(max=last)
    high = (offsets[:-1] + sizes // 2).clamp(max=last)
    return torch.where(sizes > 0, (ordered[low] + ordered[high]) / 2, 0.0)


def group_advantage(
    rewards: Tensor,
    offsets: Tensor,
    *,
    scale: str = "group",
    ddof: int = 1,
    eps: float = 1e-6,
    baseline: str = "mean",
    weights: Tensor | None = None,
) -> GroupAdvantage:
    """(rewards - baseline) / (scale + eps) * weights, per group.

    Args: ``rewards`` [B]; ``offsets`` [G + 1] integer, group g is rewards[offsets[g]:offsets[g + 1]];
    ``scale``: "group" or "batch" standard deviation, "none", "max_min" (the group's range), "mad" (its median
    absolute deviation from the median); ``ddof`` 0 or 1; ``baseline``: "mean" of the group, "leave_one_out"
    (mean of the others), "batch_mean", "none"; ``weights`` [B] multiply the finished advantage, so that a
    difficulty weight does not cancel in the normalisation.

    Degenerate groups (all rewards equal, compared as they are, so also of one answer) get advantage exactly 0
    under the group's own baselines. A standard deviation of fewer than ddof + 1 rewards is 0. Non-finite
    rewards propagate within their group (with "batch" statistics: everywhere). Not differentiable. float32
    inside (float64 when rewards are).

    Raises ValueError for a wrong shape, dtype, device or option.
    """
    check_floating("rewards", rewards, 1)
    check_rows("weights", weights, rewards, rewards.shape[0])
    if scale not in SCALES:
        raise ValueError(f"scale = {scale!r} is not one of {', '.join(SCALES)}")
    if baseline not in BASELINES:
        raise ValueError(f"baseline = {baseline!r} is not one of {', '.join(BASELINES)}")
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 or 1, got {ddof}")
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    _check_offsets(offsets, rewards)
    with torch.no_grad():
        return _evaluate(rewards, offsets.long(), scale, ddof, eps, baseline, weights)


def _evaluate(
    rewards: Tensor, offsets: Tensor, scale: str, ddof: int, eps: float, baseline: str, weights: Tensor | None
) -> GroupAdvantage:
    r = rewards.to(compute_dtype(rewards))
    groups, total = offsets.shape[0] - 1, r.shape[0]
    sizes = offsets[1:] - offsets[:-1]
    group = torch.repeat_interleave(torch.arange(groups, device=r.device), sizes, output_size=total)

    def reduce(values: Tensor, how: str) -> Tensor:
        return values.new_zeros(groups).scatter_reduce_(0, group, values, how, include_self=False)

    def per_row(values: Tensor) -> Tensor:
        return values[group]

    mean = reduce(r, "sum") / sizes.clamp(min=1)
    deviation = r - per_row(mean)
    variance = reduce(deviation * deviation, "sum") / (sizes - ddof).clamp(min=1)
    std = torch.where(sizes > ddof, variance.sqrt(), 0.0)
    high, low = reduce(r, "amax"), reduce(r, "amin")
    degenerate = high == low
    if baseline == "leave_one_out":
        centred = deviation * per_row(sizes.to(r.dtype) / (sizes - 1).clamp(min=1))
    elif baseline == "batch_mean":
        centred = r - (r.mean() if total else 0.0)
    elif baseline == "none":
        centred = r
    else:
        centred = deviation
    if scale == "group":
        centred = centred / (per_row(std) + eps)
    elif scale == "batch":
        centred = centred / (_batch_std(r, ddof) + eps)
    elif scale == "max_min":
        centred = centred / (per_row(high - low) + eps)
    elif scale == "mad":
        distance = (r - per_row(_group_median(r, group, offsets, sizes))).abs()
        centred = centred / (per_row(_group_median(distance, group, offsets, sizes)) + eps)
    if baseline in ("mean", "leave_one_out"):
        centred = torch.where(per_row(degenerate), 0.0, centred)
    if weights is not None:
        centred = centred * weights.to(centred.dtype)
    return GroupAdvantage(centred, mean, std, degenerate)
