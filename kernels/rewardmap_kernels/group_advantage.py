"""Advantages of answers relative to their group, for groups of any size side by side (CSR offsets).

Sources: GRPO (arXiv 2402.03300), Dr. GRPO (2503.20783: scale "none"), RLOO (2402.14740: leave-one-out),
REINFORCE++ (2501.03262: batch baseline and batch scale), GDPO (2601.05242: normalise each reward, then sum).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import check_floating, check_rows, compute_dtype
from .dispatch import choose

SCALES = ("group", "batch", "none", "max_min", "mad")
BASELINES = ("mean", "leave_one_out", "batch_mean", "none")
COMBINE = ("sum_then_normalize", "normalize_then_sum")
NON_FINITE = ("propagate", "raise", "drop_group")


class GroupAdvantage(NamedTuple):
    """``advantages`` [B]; ``mean``, ``std`` [G] of each group's rewards; ``degenerate`` [G] bool: all of them
    are equal."""

    advantages: Tensor
    mean: Tensor
    std: Tensor
    degenerate: Tensor


def _check_offsets(offsets: Tensor, rewards: Tensor) -> None:
    total = rewards.shape[0]
    if offsets.dim() != 1 or offsets.shape[0] < 1 or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"offsets must be [G + 1] int32 or int64, got {tuple(offsets.shape)} {offsets.dtype}")
    if offsets.device.type != "cpu":
        if offsets.device != rewards.device:
            raise ValueError(f"offsets is on {offsets.device}, expected {rewards.device} or the CPU")
        return
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last != total:
        raise ValueError(f"offsets must run from 0 to len(rewards) = {total}, got {first} to {last}")
    falling = (offsets[1:] < offsets[:-1]).nonzero()
    if len(falling):
        g = int(falling[0, 0])
        values = f"offsets[{g}] = {offsets[g]}, offsets[{g + 1}] = {offsets[g + 1]}"
        raise ValueError(f"offsets must not fall, got {values}")


def _check_options(
    scale: str, baseline: str, combine: str, non_finite: str, ddof: int, eps: float, inside: bool
) -> None:
    for name, value, allowed in (
        ("scale", scale, SCALES),
        ("baseline", baseline, BASELINES),
        ("combine", combine, COMBINE),
        ("non_finite", non_finite, NON_FINITE),
    ):
        if value not in allowed:
            raise ValueError(f"{name} = {value!r} is not one of {', '.join(allowed)}")
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 or 1, got {ddof}")
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    if inside and scale not in ("group", "batch"):
        raise ValueError(f"eps_inside is for the standard deviations; scale {scale!r} has no variance")
    if non_finite == "drop_group" and (scale == "batch" or baseline == "batch_mean"):
        raise ValueError("non_finite = 'drop_group' cannot keep a bad reward out of batch statistics")


def group_advantage(
    rewards: Tensor,
    offsets: Tensor,
    *,
    scale: str = "group",
    ddof: int = 1,
    eps: float = 1e-6,
    eps_inside: bool = False,
    baseline: str = "mean",
    weights: Tensor | None = None,
    component_weights: Tensor | None = None,
    combine: str = "sum_then_normalize",
    non_finite: str = "propagate",
) -> GroupAdvantage:
    """(rewards - baseline) / (scale + eps) * weights, per group.

    Args: ``rewards`` [B], or [B, K] with ``component_weights`` [K]; ``offsets`` [G + 1] integer, group g is
    rewards[offsets[g]:offsets[g + 1]], on the CPU (checked) or with the rewards; ``scale``: "group" or
    "batch" standard deviation, "none", "max_min" (the group's range), "mad" (its median absolute deviation
    from the median); ``ddof`` 0 or 1; ``eps_inside``: sqrt(variance + eps) instead of std + eps;
    ``baseline``: "mean" of the group, "leave_one_out" (mean of the others), "batch_mean", "none"; ``weights``
    [B] multiply the finished advantage, so that a difficulty weight does not cancel in the normalisation;
    ``combine`` K components before or after normalising each; ``non_finite`` rewards "propagate" within their
    group (batch statistics: everywhere), "raise", or "drop_group": its advantages are 0 and it counts as
    degenerate.

    Degenerate groups (all rewards equal, compared as they are, so also a group of one) get advantage exactly
    0 under the group's own baselines. The standard deviation of fewer than ddof + 1 rewards is 0. mean and
    std are those of the weighted sum of components. Not differentiable. float32 inside (float64 when rewards
    are). On CUDA: one launch, no host synchronisation, and offsets there that do not rise from 0 to B give
    NaN.

    Raises ValueError for a wrong shape, dtype, device or option.
    """
    check_floating("rewards", rewards, rewards.dim() if rewards.dim() == 2 else 1)
    check_rows("weights", weights, rewards, rewards.shape[0])
    if (rewards.dim() == 2) != (component_weights is not None):
        raise ValueError(f"rewards of shape {tuple(rewards.shape)}: [B, K] and component_weights [K] go together")
    if component_weights is not None:
        check_rows("component_weights", component_weights, rewards, rewards.shape[1])
    elif combine != "sum_then_normalize":
        raise ValueError(f"combine = {combine!r} needs rewards [B, K] and component_weights [K]")
    _check_options(scale, baseline, combine, non_finite, ddof, eps, eps_inside)
    _check_offsets(offsets, rewards)
    with torch.no_grad():
        values = rewards.to(compute_dtype(rewards)) if rewards.dim() == 2 else rewards
        if non_finite == "raise":
            _raise_unless_finite(rewards)
        offsets = offsets.to(rewards.device, non_blocking=True)
        options = (scale, ddof, eps, eps_inside, baseline)
        if component_weights is None:
            out = _one(values, offsets, *options, weights)
        else:
            parts = component_weights.to(values.dtype)
            out = _one(values @ parts, offsets, *options, weights)
            if combine == "normalize_then_sum":
                columns = values.t().contiguous()
                each = [_one(column, offsets, *options, weights) for column in columns]
                out = out._replace(
                    advantages=torch.stack([e.advantages for e in each], 1) @ parts,
                    degenerate=torch.stack([e.degenerate for e in each]).all(0),
                )
        return _drop_bad_groups(out, offsets) if non_finite == "drop_group" else out


def _raise_unless_finite(rewards: Tensor) -> None:
    finite = torch.isfinite(rewards)
    if rewards.device.type != "cpu":
        torch._assert_async(finite.all(), "rewards are not finite")
    elif not finite.all():
        where = (~finite).nonzero()[0].tolist()
        raise ValueError(f"rewards{where} = {float(rewards[tuple(where)])} is not finite")


def _drop_bad_groups(out: GroupAdvantage, offsets: Tensor) -> GroupAdvantage:
    # A sum of rewards is finite exactly when none of them is infinite or not a number (or they overflow
    # together).
    bad = ~torch.isfinite(out.mean)
    group = _group_of_rows(offsets, out.advantages.shape[0])
    return out._replace(advantages=torch.where(bad[group], 0.0, out.advantages), degenerate=out.degenerate | bad)


def _group_of_rows(offsets: Tensor, total: int) -> Tensor:
    index = torch.arange(offsets.shape[0] - 1, device=offsets.device)
    return torch.repeat_interleave(index, offsets[1:] - offsets[:-1], output_size=total)


def _one(
    rewards: Tensor, offsets: Tensor, scale: str, ddof: int, eps: float, eps_inside: bool, baseline: str,
    weights: Tensor | None,
) -> GroupAdvantage:  # fmt: skip
    # The median needs a sort, which the one-launch kernel does not have.
    refusal = "the median of scale 'mad' has no Triton kernel" if scale == "mad" else None
    if choose("group_advantage", rewards, refusal) == "triton":
        from . import triton_advantage

        return GroupAdvantage(
            *triton_advantage.evaluate(rewards, offsets, scale, ddof, eps, eps_inside, baseline, weights)
        )
    return _evaluate(rewards, offsets.long(), scale, ddof, eps, eps_inside, baseline, weights)


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


def _evaluate(
    rewards: Tensor, offsets: Tensor, scale: str, ddof: int, eps: float, eps_inside: bool, baseline: str,
    weights: Tensor | None,
) -> GroupAdvantage:  # fmt: skip
    r = rewards.to(compute_dtype(rewards))
    groups, total = offsets.shape[0] - 1, r.shape[0]
    sizes = offsets[1:] - offsets[:-1]
    group = _group_of_rows(offsets, total)

    def reduce(values: Tensor, how: str) -> Tensor:
        return values.new_zeros(groups).scatter_reduce_(0, group, values, how, include_self=False)

    def per_row(values: Tensor) -> Tensor:
        return values[group]

    mean = reduce(r, "sum") / sizes.clamp(min=1)
    deviation = r - per_row(mean)
    variance = reduce(deviation * deviation, "sum") / (sizes - ddof).clamp(min=1)
    variance = torch.where(sizes > ddof, variance, 0.0)
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
    if scale in ("group", "batch"):
        batch = r.var(correction=ddof) if total > ddof else r.new_zeros(())
        spread = per_row(variance) if scale == "group" else batch
        centred = centred / ((spread + eps).sqrt() if eps_inside else spread.sqrt() + eps)
    elif scale == "max_min":
        centred = centred / (per_row(high - low) + eps)
    elif scale == "mad":
        distance = (r - per_row(_group_median(r, group, offsets, sizes))).abs()
        centred = centred / (per_row(_group_median(distance, group, offsets, sizes)) + eps)
    if baseline in ("mean", "leave_one_out"):
        centred = torch.where(per_row(degenerate), 0.0, centred)
    if weights is not None:
        centred = centred * weights.to(centred.dtype)
    return GroupAdvantage(centred, mean, variance.sqrt(), degenerate)
