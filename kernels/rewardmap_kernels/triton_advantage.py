# mypy: disable-error-code="no-untyped-def"
"""Group advantage in one Triton launch: one warp per group, every sum in a fixed order.

Batch statistics are computed by every program for itself: the rewards of a step are a few kilobytes that stay
in cache, and a second launch or an atomic sum would cost more or change from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import launched

GROUP_BLOCK = 32
BATCH_BLOCK = 512


@triton.jit
def _moments(rewards_ptr, begin, end, ddof, BLOCK: tl.constexpr):
    """(mean, standard deviation with ddof and its square, maximum, minimum) of rewards[begin:end], in two
    passes."""
    count = (end - begin).to(tl.float32)
    total = 0.0
    high = float("-inf")
    low = float("inf")
    for start in range(begin, end, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < end
        r = tl.load(rewards_ptr + index, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(r, 0)
        high = tl.maximum(high, tl.max(tl.where(inside, r, float("-inf")), 0))
        low = tl.minimum(low, tl.min(tl.where(inside, r, float("inf")), 0))
    mean = total / tl.maximum(count, 1.0)
    squares = 0.0
    for start in range(begin, end, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < end
        r = tl.load(rewards_ptr + index, mask=inside, other=0.0).to(tl.float32)
        gap = tl.where(inside, r - mean, 0.0)
        squares += tl.sum(gap * gap, 0)
    variance = tl.where(count > ddof, squares / tl.maximum(count - ddof, 1.0), 0.0)
    return mean, variance, high, low


@triton.jit
def group_advantage_kernel(
    rewards_ptr, weights_ptr, offsets_ptr, advantages_ptr, mean_ptr, std_ptr, degenerate_ptr, total, groups, ddof, eps,
    SCALE: tl.constexpr, BASELINE: tl.constexpr, EPS_INSIDE: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """Advantages of one group. Offsets that do not rise from 0 to ``total`` give NaN in the groups they
    spoil."""
    group = tl.program_id(0)
    begin = tl.load(offsets_ptr + group).to(tl.int64)
    end = tl.load(offsets_ptr + group + 1).to(tl.int64)
    bad = (begin > end) | ((group == 0) & (begin != 0)) | ((group == groups - 1) & (end != total))
    begin = tl.minimum(tl.maximum(begin, 0), total)
    end = tl.minimum(tl.maximum(end, begin), total)
    mean, variance, high, low = _moments(rewards_ptr, begin, end, ddof, BLOCK)
    std = tl.sqrt(variance)
    degenerate = ((high == low) & (mean == mean)) | (end == begin)
    count = (end - begin).to(tl.float32)
    batch_mean = mean
    batch_variance = variance
    if (SCALE == "batch") | (BASELINE == "batch_mean"):
        first = begin * 0
        batch_mean, batch_variance, _, _ = _moments(rewards_ptr, first, first + total, ddof, BATCH)
    spread = variance
    if SCALE == "batch":
        spread = batch_variance
    if SCALE == "none":
        divisor = 1.0
    elif SCALE == "max_min":
        divisor = high - low + eps
    elif EPS_INSIDE:
        divisor = tl.sqrt(spread + eps)
    else:
        divisor = tl.sqrt(spread) + eps
    baseline = mean
    factor = 1.0
    if BASELINE == "batch_mean":
        baseline = batch_mean
    elif BASELINE == "none":
        baseline = 0.0
    elif BASELINE == "leave_one_out":
        factor = count / tl.maximum(count - 1.0, 1.0)
    for start in range(begin, end, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < end
        r = tl.load(rewards_ptr + index, mask=inside, other=0.0).to(tl.float32)
        advantage = (r - baseline) * factor / divisor
        if (BASELINE == "mean") | (BASELINE == "leave_one_out"):
            advantage = tl.where(degenerate, 0.0, advantage)
        if HAS_WEIGHTS:
            advantage *= tl.load(weights_ptr + index, mask=inside, other=0.0).to(tl.float32)
        advantage = tl.where(bad, float("nan"), advantage)
        tl.store(advantages_ptr + index, advantage, mask=inside)
    tl.store(mean_ptr + group, tl.where(bad, float("nan"), mean))
    tl.store(std_ptr + group, tl.where(bad, float("nan"), std))
    tl.store(degenerate_ptr + group, (degenerate & (bad == 0)).to(tl.int8))


def evaluate(
    rewards: Tensor, offsets: Tensor, scale: str, ddof: int, eps: float, eps_inside: bool, baseline: str,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(advantages [B], mean [G], std [G], degenerate [G]), float32 and bool: one launch."""
    groups, device = offsets.shape[0] - 1, rewards.device
    advantages = torch.empty(rewards.shape, dtype=torch.float32, device=device)
    mean, std = torch.empty(2, groups, dtype=torch.float32, device=device)
    degenerate = torch.empty(groups, dtype=torch.int8, device=device)
    launched("group_advantage", "group_advantage_kernel")
    if groups:
        group_advantage_kernel[(groups,)](
            rewards.contiguous(), advantages if weights is None else weights.contiguous(),
            offsets.contiguous(), advantages, mean, std, degenerate, rewards.shape[0], groups, ddof, eps,
            SCALE=scale, BASELINE=baseline, EPS_INSIDE=eps_inside, HAS_WEIGHTS=weights is not None,
            BLOCK=GROUP_BLOCK, BATCH=BATCH_BLOCK, num_warps=1,
        )  # fmt: skip
    return advantages, mean, std, degenerate.view(torch.bool)
