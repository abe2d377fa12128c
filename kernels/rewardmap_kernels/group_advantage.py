"""Advantages of answers relative to their group, for groups of any size side by side (CSR offsets).

Sources: GRPO (arXiv 2402.03300), Dr. GRPO (2503.20783: scale "none"), RLOO (2402.14740: leave-one-out),
REINFORCE++ (2501.03262: batch baseline and batch scale), GDPO (2601.05242: normalise each reward, then sum).
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ._checks import check_floating, check_integer, check_rows, check_tensor, compute_dtype, readable
from .dispatch import choose

SCALES = ("group", "batch", "none", "max_min", "mad")
BASELINES = ("mean", "leave_one_out", "batch_mean", "none")
COMBINE = ("sum_then_normalize", "normalize_then_sum")
NON_FINITE = ("propagate", "raise", "drop_group")


class GroupAdvantage(NamedTuple):
    """``advantages`` [B]; ``mean``, ``std`` [G] of each group's rewards; ``degenerate`` [G] bool: all of them
    are equal; ``token_advantages`` [N], each answer's advantage at its tokens, None without ``token_offsets``."""

    advantages: Tensor
    mean: Tensor
    std: Tensor
    degenerate: Tensor
    token_advantages: Tensor | None = None


def _check_offsets(name: str, offsets: Tensor, rewards: Tensor, total: int, what: str) -> None:
    check_tensor(name, offsets)
    if offsets.dim() != 1 or offsets.shape[0] < 1 or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be a vector of int32 or int64, got {tuple(offsets.shape)} {offsets.dtype}")
    if offsets.device.type != "cpu":
        if offsets.device != rewards.device:
            raise ValueError(f"{name} is on {offsets.device}, expected {rewards.device} or the CPU")
        return
    if isinstance(offsets, FakeTensor):
        return
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last != total:
        raise ValueError(f"{name} must run from 0 to {what} = {total}, got {first} to {last}")
    falling = (offsets[1:] < offsets[:-1]).nonzero()
    if len(falling):
        g = int(falling[0, 0])
        values = f"{name}[{g}] = {offsets[g]}, {name}[{g + 1}] = {offsets[g + 1]}"
        raise ValueError(f"{name} must not fall, got {values}")


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
    if not isinstance(ddof, Integral) or ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 or 1, got {ddof!r}")
    if not isinstance(eps, Real) or not eps >= 0:
        raise ValueError(f"eps must be >= 0, got {eps!r}")
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
    token_offsets: Tensor | None = None,
    num_tokens: int | None = None,
) -> GroupAdvantage:
    """(rewards - baseline) / (scale + eps) * weights, per group.

    Args: ``rewards`` [B], or [B, K] with ``component_weights`` [K]; ``offsets`` [G + 1] integer, group g is
    rewards[offsets[g]:offsets[g + 1]], on the CPU (checked) or with the rewards; ``scale``: "group" or
    "batch" standard deviation, "none", "max_min" (the group's range), "mad" (its median absolute deviation
    from the median); ``ddof`` 0 or 1; ``eps_inside``: sqrt(variance + eps) instead of std + eps;
    ``baseline``: "mean" of the group, "leave_one_out" (mean of the others), "batch_mean", "none"; ``weights``
    [B] multiply the finished advantage, so that a difficulty weight does not cancel in the normalisation;
    ``combine`` K components before or after normalising each; ``non_finite`` rewards "propagate" within their
    group (batch statistics: everywhere), "raise" (which waits for a GPU), or "drop_group": its advantages are
    0 and it counts as degenerate.

    ``token_offsets`` [B + 1]: answer b's tokens are [token_offsets[b], token_offsets[b + 1]) of ``num_tokens`` (needed
    when the offsets are on a GPU); its advantage is written to each of them in the same launch.

    Degenerate groups (all rewards equal, compared as they are, so also a group of one) get advantage exactly
    0 under the group's own baselines. The standard deviation of fewer than ddof + 1 rewards is 0. mean and
    std are those of the weighted sum of components. Not differentiable. float32 inside (float64 when rewards
    are). On CUDA: one launch, no host synchronisation, and offsets there that do not rise from 0 to B give
    NaN.

    Raises ValueError for a wrong shape, dtype, device or option.
    """
    check_tensor("rewards", rewards)
    check_floating("rewards", rewards, rewards.dim() if rewards.dim() == 2 else 1)
    check_rows("weights", weights, rewards, rewards.shape[0])
    if (rewards.dim() == 2) != (component_weights is not None):
        raise ValueError(f"rewards of shape {tuple(rewards.shape)}: [B, K] and component_weights [K] go together")
    if component_weights is not None:
        check_rows("component_weights", component_weights, rewards, rewards.shape[1])
    elif combine != "sum_then_normalize":
        raise ValueError(f"combine = {combine!r} needs rewards [B, K] and component_weights [K]")
    _check_options(scale, baseline, combine, non_finite, ddof, eps, eps_inside)
    _check_offsets("offsets", offsets, rewards, rewards.shape[0], "len(rewards)")
    tokens = _tokens(token_offsets, num_tokens, rewards)
    if non_finite == "raise":
        _raise_unless_finite(rewards)
    offsets = offsets.to(rewards.device, non_blocking=True)
    if token_offsets is not None:
        token_offsets = token_offsets.to(rewards.device, non_blocking=True)
    each, drop = combine == "normalize_then_sum", non_finite == "drop_group"
    name = choose("group_advantage", rewards)
    if name == "triton":
        from . import triton_advantage

        return GroupAdvantage(
            *triton_advantage.evaluate(
                rewards, offsets, scale, ddof, eps, eps_inside, baseline, weights, component_weights, each, drop,
                token_offsets, tokens,
            )
        )  # fmt: skip
    with torch.no_grad():
        options = (scale, ddof, eps, eps_inside, baseline)
        evaluate = _native if name == "native" else _evaluate
        out = _components(evaluate, rewards, offsets.long(), component_weights, each, options, weights)
        out = _drop_bad_groups(out, offsets) if drop else out
        if token_offsets is None:
            return out
        lengths = token_offsets[1:] - token_offsets[:-1]
        return out._replace(token_advantages=out.advantages.repeat_interleave(lengths, output_size=tokens))


def _tokens(token_offsets: Tensor | None, num_tokens: int | None, rewards: Tensor) -> int:
    """Number of tokens that the advantages go to. Raises ValueError for offsets that do not fit."""
    if token_offsets is None:
        if num_tokens is not None:
            raise ValueError(f"num_tokens = {num_tokens} needs token_offsets ([B + 1]), got None")
        return 0
    check_tensor("token_offsets", token_offsets)
    if token_offsets.shape != (rewards.shape[0] + 1,):
        raise ValueError(f"token_offsets must have shape ({rewards.shape[0] + 1},), got {tuple(token_offsets.shape)}")
    if num_tokens is None:
        if token_offsets.device.type != "cpu":
            raise ValueError("token_offsets on a GPU need num_tokens, got None: reading them would wait for the GPU")
        num_tokens = int(token_offsets[-1])
    check_integer("num_tokens", num_tokens)
    _check_offsets("token_offsets", token_offsets, rewards, num_tokens, "num_tokens")
    return num_tokens


def _components(
    evaluate: Callable[..., GroupAdvantage], rewards: Tensor, offsets: Tensor, parts: Tensor | None, each: bool,
    options: tuple[str, int, float, bool, str], weights: Tensor | None,
) -> GroupAdvantage:  # fmt: skip
    """One reward or several, by ``evaluate``."""
    if parts is None:
        return evaluate(rewards, offsets, *options, weights)
    values, parts = rewards.to(compute_dtype(rewards)), parts.to(compute_dtype(rewards))
    out = evaluate(values @ parts, offsets, *options, weights)
    if not each:
        return out
    columns = [evaluate(column, offsets, *options, weights) for column in values.t().contiguous()]
    return out._replace(
        advantages=torch.stack([c.advantages for c in columns], 1) @ parts,
        degenerate=torch.stack([c.degenerate for c in columns]).all(0),
    )


def _raise_unless_finite(rewards: Tensor) -> None:
    finite = torch.isfinite(rewards)
    if not readable(rewards):
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


def _native(rewards: Tensor, *rest: Any) -> GroupAdvantage:
    from . import native_rows

    return GroupAdvantage(*native_rows.group_advantage(rewards, *rest))


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
    spoilt = mean - mean  # NaN where a reward is not finite: an order hides it
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
        centred = centred / (per_row(high - low + spoilt) + eps)
    elif scale == "mad":
        distance = (r - per_row(_group_median(r, group, offsets, sizes))).abs()
        centred = centred / (per_row(_group_median(distance, group, offsets, sizes) + spoilt) + eps)
    if baseline in ("mean", "leave_one_out"):
        centred = torch.where(per_row(degenerate), 0.0, centred)
    if weights is not None:
        centred = centred * weights.to(centred.dtype)
    return GroupAdvantage(centred, mean, variance.sqrt(), degenerate)
