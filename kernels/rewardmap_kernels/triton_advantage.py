# mypy: disable-error-code="no-untyped-def"
"""Group advantage in one Triton launch: one warp per group, every sum in a fixed order.

Batch statistics are computed by every program for itself: the rewards of a step are a few kilobytes that stay
in cache, and a second launch or an atomic sum would cost more or change from run to run. Medians are found by
counting, for every reward of a group, those below it: groups are small.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import choose, launched, on_device_of

GROUP_BLOCK = 32
BATCH_BLOCK = 512
TOKEN_BLOCK = 256


@triton.jit
def _reward(rewards_ptr, parts_ptr, index, inside, COMPONENT: tl.constexpr, COMPONENTS: tl.constexpr):
    """Rewards at ``index``: component COMPONENT, or the weighted sum of all where it is negative. COMPONENTS is 0 for
    rewards of one kind, which have no weight."""
    if COMPONENTS == 0:
        return tl.load(rewards_ptr + index, mask=inside, other=0.0).to(tl.float32)
    if COMPONENT >= 0:
        return tl.load(rewards_ptr + index * COMPONENTS + COMPONENT, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros_like(index).to(tl.float32)
    for k in tl.static_range(COMPONENTS):
        part = tl.load(rewards_ptr + index * COMPONENTS + k, mask=inside, other=0.0).to(tl.float32)
        total += part * tl.load(parts_ptr + k).to(tl.float32)
    return total


@triton.jit
def _moments(
    rewards_ptr, parts_ptr, begin, end, ddof, COMPONENT: tl.constexpr, COMPONENTS: tl.constexpr, BLOCK: tl.constexpr
):
    """(mean, variance with ddof, maximum, minimum) of rewards[begin:end], in two passes."""
    count = (end - begin).to(tl.float32)
    total = 0.0
    high = float("-inf")
    low = float("inf")
    for start in range(begin, end, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < end
        r = _reward(rewards_ptr, parts_ptr, index, inside, COMPONENT, COMPONENTS)
        total += tl.sum(r, 0)
        high = tl.maximum(high, tl.max(tl.where(inside, r, float("-inf")), 0))
        low = tl.minimum(low, tl.min(tl.where(inside, r, float("inf")), 0))
    mean = total / tl.maximum(count, 1.0)
    squares = 0.0
    for start in range(begin, end, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < end
        r = _reward(rewards_ptr, parts_ptr, index, inside, COMPONENT, COMPONENTS)
        gap = tl.where(inside, r - mean, 0.0)
        squares += tl.sum(gap * gap, 0)
    variance = tl.where(count > ddof, squares / tl.maximum(count - ddof, 1.0), 0.0)
    return mean, variance, high, low


@triton.jit
def _median(
    rewards_ptr, parts_ptr, begin, end, centre, DISTANCE: tl.constexpr, COMPONENT: tl.constexpr,
    COMPONENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Median of rewards[begin:end] (the mean of the middle two of an even number), or of their distances from
    ``centre``. NaN where one of them is."""
    lower = (end - begin - 1) // 2
    upper = (end - begin) // 2
    at_lower = float("-inf")
    at_upper = float("-inf")
    spoilt = 0.0
    for start in range(begin, end, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < end
        r = _reward(rewards_ptr, parts_ptr, index, inside, COMPONENT, COMPONENTS)
        if DISTANCE:
            r = tl.abs(r - centre)
        spoilt += tl.sum(tl.where(inside, r - r, 0.0), 0)
        below = tl.zeros([BLOCK], tl.int32)
        through = tl.zeros([BLOCK], tl.int32)
        for other in range(begin, end, BLOCK):
            others = other + tl.arange(0, BLOCK)
            there = others < end
            q = _reward(rewards_ptr, parts_ptr, others, there, COMPONENT, COMPONENTS)
            if DISTANCE:
                q = tl.abs(q - centre)
            less = (q[None, :] < r[:, None]) & there[None, :]
            less_or_equal = (q[None, :] <= r[:, None]) & there[None, :]
            below += tl.sum(less.to(tl.int32), 1)
            through += tl.sum(less_or_equal.to(tl.int32), 1)
        low_here = inside & (below <= lower) & (lower < through)
        high_here = inside & (below <= upper) & (upper < through)
        at_lower = tl.maximum(at_lower, tl.max(tl.where(low_here, r, float("-inf")), 0))
        at_upper = tl.maximum(at_upper, tl.max(tl.where(high_here, r, float("-inf")), 0))
    return (at_lower + at_upper) * 0.5 + spoilt


# Compiled once for all lengths: one of 1 or a multiple of 16, and where a slice begins, would each be a variant.
@triton.jit(
    do_not_specialize=["total", "groups", "tokens_total"],
    do_not_specialize_on_alignment=[
        "rewards_ptr", "parts_ptr", "weights_ptr", "offsets_ptr", "token_offsets_ptr", "mean_ptr", "std_ptr",
    ],
)  # fmt: skip
def group_advantage_kernel(
    rewards_ptr, parts_ptr, weights_ptr, offsets_ptr, token_offsets_ptr, advantages_ptr, tokens_ptr, mean_ptr, std_ptr,
    degenerate_ptr, total, groups, tokens_total, ddof, eps,
    SCALE: tl.constexpr, BASELINE: tl.constexpr, EPS_INSIDE: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    COMPONENTS: tl.constexpr, EACH: tl.constexpr, DROP: tl.constexpr, HAS_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr, BATCH: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Advantages of one group. Offsets that do not rise from 0 to ``total`` (tokens: to ``tokens_total``) give NaN in
    the groups they spoil. EACH: components are normalised one by one, then summed."""
    group = tl.program_id(0)
    begin = tl.load(offsets_ptr + group).to(tl.int64)
    end = tl.load(offsets_ptr + group + 1).to(tl.int64)
    bad = (begin > end) | ((group == 0) & (begin != 0)) | ((group == groups - 1) & (end != total))
    begin = tl.minimum(tl.maximum(begin, 0), total)
    end = tl.minimum(tl.maximum(end, begin), total)
    count = (end - begin).to(tl.float32)
    whole_mean, whole_variance, high, low = _moments(rewards_ptr, parts_ptr, begin, end, ddof, -1, COMPONENTS, BLOCK)
    degenerate = ((high == low) & (whole_mean == whole_mean)) | (end == begin)
    if EACH:
        degenerate = end >= begin
    dropped = begin > end
    if DROP:
        dropped = whole_mean - whole_mean != 0.0
    for k in tl.static_range(COMPONENTS if EACH else 1):
        mean = whole_mean
        variance = whole_variance
        if EACH:
            mean, variance, high, low = _moments(rewards_ptr, parts_ptr, begin, end, ddof, k, COMPONENTS, BLOCK)
        equal = ((high == low) & (mean == mean)) | (end == begin)
        degenerate = degenerate & equal
        batch_mean = mean
        spread = variance
        if (SCALE == "batch") | (BASELINE == "batch_mean"):
            first = begin * 0
            batch_mean, batch_variance, _, _ = _moments(
                rewards_ptr, parts_ptr, first, first + total, ddof, k if EACH else -1, COMPONENTS, BATCH
            )
            if SCALE == "batch":
                spread = batch_variance
        if SCALE == "none":
            divisor = 1.0
        elif SCALE == "max_min":
            divisor = high - low + eps + (mean - mean)  # NaN where a reward is not finite: a GPU's maximum hides it
        elif SCALE == "mad":
            centre = _median(rewards_ptr, parts_ptr, begin, end, 0.0, False, k if EACH else -1, COMPONENTS, BLOCK)
            gap = _median(rewards_ptr, parts_ptr, begin, end, centre, True, k if EACH else -1, COMPONENTS, BLOCK)
            divisor = gap + eps
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
            r = _reward(rewards_ptr, parts_ptr, index, inside, k if EACH else -1, COMPONENTS)
            advantage = (r - baseline) * factor / divisor
            if (BASELINE == "mean") | (BASELINE == "leave_one_out"):
                advantage = tl.where(equal, 0.0, advantage)
            if HAS_WEIGHTS:
                advantage *= tl.load(weights_ptr + index, mask=inside, other=0.0).to(tl.float32)
            if EACH:
                advantage *= tl.load(parts_ptr + k).to(tl.float32)
                if k > 0:
                    advantage += tl.load(advantages_ptr + index, mask=inside, other=0.0)
            advantage = tl.where(dropped, 0.0, advantage)
            tl.store(advantages_ptr + index, tl.where(bad, float("nan"), advantage), mask=inside)
    tl.store(mean_ptr + group, tl.where(bad, float("nan"), whole_mean))
    tl.store(std_ptr + group, tl.where(bad, float("nan"), tl.sqrt(whole_variance)))
    tl.store(degenerate_ptr + group, (degenerate | dropped) & (bad == 0))
    if HAS_TOKENS:
        tl.debug_barrier()
        for row in range(begin, end):
            advantage = tl.load(advantages_ptr + row)
            first_token = tl.load(token_offsets_ptr + row).to(tl.int64)
            last_token = tl.load(token_offsets_ptr + row + 1).to(tl.int64)
            wrong = (first_token < 0) | (last_token > tokens_total) | ((row == 0) & (first_token != 0))
            wrong = wrong | ((row == total - 1) & (last_token != tokens_total)) | (first_token > last_token)
            advantage = tl.where(wrong, float("nan"), advantage)
            first_token = tl.maximum(first_token, 0)
            for start in range(first_token, tl.minimum(last_token, tokens_total), TOKENS):
                index = start + tl.arange(0, TOKENS)
                tl.store(tokens_ptr + index, tl.zeros([TOKENS], tl.float32) + advantage,
                         mask=index < tl.minimum(last_token, tokens_total))  # fmt: skip


def evaluate(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """(advantages [B], mean, std, degenerate [G], advantages by token or None), float32 and bool: one launch."""
    if not torch.compiler.is_compiling():
        return _evaluate(*inputs)
    with torch.no_grad():
        *found, by_token = _operator(*inputs)
    return *found, None if inputs[-2] is None else by_token  # type: ignore[return-value]


def _evaluate(
    rewards: Tensor, offsets: Tensor, scale: str, ddof: int, eps: float, eps_inside: bool, baseline: str,
    weights: Tensor | None, parts: Tensor | None, each: bool, drop: bool, token_offsets: Tensor | None, tokens: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    groups, device = offsets.shape[0] - 1, rewards.device
    found = torch.empty(rewards.shape[0] + 2 * groups, dtype=torch.float32, device=device)
    advantages, mean, std = found.split_with_sizes((rewards.shape[0], groups, groups))
    degenerate = torch.empty(groups, dtype=torch.bool, device=device)
    by_token = None if token_offsets is None else torch.empty(tokens, dtype=torch.float32, device=device)
    launched("group_advantage", "group_advantage_kernel")
    with on_device_of(rewards):
        if groups:
            group_advantage_kernel[(groups,)](
                rewards.contiguous(), advantages if parts is None else parts.contiguous(),
                advantages if weights is None else weights.contiguous(), offsets.contiguous(),
                offsets if token_offsets is None else token_offsets.contiguous(), advantages,
                advantages if by_token is None else by_token, mean, std, degenerate, rewards.shape[0], groups, tokens,
                ddof, eps, SCALE=scale, BASELINE=baseline, EPS_INSIDE=eps_inside, HAS_WEIGHTS=weights is not None,
                COMPONENTS=0 if parts is None else parts.shape[0], EACH=each, DROP=drop,
                HAS_TOKENS=token_offsets is not None, BLOCK=GROUP_BLOCK, BATCH=BATCH_BLOCK, TOKENS=TOKEN_BLOCK,
                num_warps=1,
            )  # fmt: skip
    return advantages, mean, std, degenerate, by_token


# For torch.compile, which would else look into the launch. Eager calls go without: an operator in Python costs the host
# as much as the rest.
@torch.library.custom_op("rewardmap_kernels::group_advantage", mutates_args=())
def _operator(
    rewards: Tensor, offsets: Tensor, scale: str, ddof: int, eps: float, eps_inside: bool, baseline: str,
    weights: Tensor | None, parts: Tensor | None, each: bool, drop: bool, token_offsets: Tensor | None, tokens: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    choose("group_advantage", rewards)  # written down when it runs, not when it was traced
    *found, by_token = _evaluate(
        rewards, offsets, scale, ddof, eps, eps_inside, baseline, weights, parts, each, drop, token_offsets, tokens
    )
    found = [t.clone() for t in found]  # they share memory, as an operator's outputs must not
    return *found, rewards.new_empty(0) if by_token is None else by_token  # type: ignore[return-value]


@_operator.register_fake
def _(
    rewards: Tensor, offsets: Tensor, scale: str, ddof: int, eps: float, eps_inside: bool, baseline: str,
    weights: Tensor | None, parts: Tensor | None, each: bool, drop: bool, token_offsets: Tensor | None, tokens: int,
) -> Any:  # fmt: skip
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return rewards.new_empty(shape, dtype=dtype)

    groups = offsets.shape[0] - 1
    by_token = rewards.new_empty(0) if token_offsets is None else empty(tokens)
    return empty(rewards.shape[0]), empty(groups), empty(groups), empty(groups, dtype=torch.bool), by_token
