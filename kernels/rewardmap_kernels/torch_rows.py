"""The row operations in plain torch: statistics of logits, their gradient, and both with the policy
coefficient between.

``triton_launch`` and ``native_rows`` have the same functions; ``dispatch`` says which of the three runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._checks import compute_dtype
from .policy_loss import evaluate

LOWEST_LOG_PROB = -1e3
"""Columns at -inf have this log-probability: e^-1000 is 0 in float64 too, and a coefficient times it is finite."""
NATS_PER_UNIT = 1.0
"""Of the log-sum-exp in this implementation."""
PRODUCTS_ON_CPU: tuple[torch.dtype, ...] = ()
"""The 16-bit dtypes that the head's products read as they are on the CPU; others are made float32."""

PRODUCT: Callable[[Tensor, Tensor, Tensor, bool], None] | None = None
"""(out, a, b, add): out [M, N] float32 = (or, ``add``, +=) a [M, K] @ b [K, N], float32 or bfloat16 each, accumulated
in float32; each has rows or columns of unit stride, ``out`` rows. None where torch multiplies."""


class RowStatistics(NamedTuple):
    """[N] each: the log-sum-exp (in the implementation's base), and logprobs and entropy in nats. 0 where
    masked."""

    lse: Tensor
    logprobs: Tensor
    entropy: Tensor


class Exponentials(NamedTuple):
    """``values`` E [N, V] with E / total = p - onehot, so that d logprob / d logits = -E / (total T); ``total`` [N] is
    the sum of exponentials on E's scale, 1 where masked (E is 0 there). A target below 0 has no column here: it is
    another rank's."""

    rows: RowStatistics
    total: Tensor
    values: Tensor


class FusedRows(NamedTuple):
    """``logprobs``, ``entropy`` and ``d_logprob`` (the coefficient, normalised and scaled) [N]; ``gradient``
    [N, V]."""

    logprobs: Tensor
    entropy: Tensor
    d_logprob: Tensor
    gradient: Tensor


def empty_matrix(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a large matrix."""
    return torch.empty(rows, columns, dtype=dtype, device=device)


def over(logits: Tensor, dtype: torch.dtype, upper: bool) -> Tensor:
    """[N, V] of ``dtype`` in the memory of the logits: all of it, or a half of each row where they are twice as wide;
    new memory where they are narrower."""
    if dtype == logits.dtype:
        return logits
    if logits.element_size() != 2 * dtype.itemsize:
        return torch.empty(logits.shape, dtype=dtype, device=logits.device)
    halves, stride = logits.view(dtype), logits.stride(0)
    return halves.as_strided(logits.shape, (2 * stride, 1), halves.storage_offset() + (stride if upper else 0))


def _scaled(logits: Tensor, temperature: Tensor | float, keep: Tensor | None) -> Tensor:
    dtype = compute_dtype(logits)
    scaled = logits.to(dtype)
    if keep is not None:
        scaled = torch.where(keep[:, None], scaled, 0.0)
    if isinstance(temperature, Tensor):
        return scaled / temperature.to(dtype)[:, None]
    return scaled if temperature == 1.0 else scaled / temperature


def _logprob_and_entropy(log_probs: Tensor, probs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Columns at -inf become finite in ``log_probs``, so that they add 0 to sums over p log p."""
    picked = log_probs.gather(1, targets.long()[:, None])[:, 0]
    log_probs.clamp_(min=LOWEST_LOG_PROB)
    return picked, -torch.linalg.vecdot(probs, log_probs)


def statistics(
    operation: str, logits: Tensor, targets: Tensor, temperature: Tensor | float, keep: Tensor | None
) -> RowStatistics:
    """Statistics of softmax(logits / temperature); rows outside ``keep`` (bool [N]) are not looked at."""
    scaled = _scaled(logits, temperature, keep)
    log_probs = torch.log_softmax(scaled, dim=1)
    lse = scaled.amax(1) - log_probs.amax(1)  # of the largest column: the target's may be -inf
    logprobs, entropy = _logprob_and_entropy(log_probs, log_probs.exp(), targets)
    if keep is not None:
        logprobs, entropy = torch.where(keep, logprobs, 0.0), torch.where(keep, entropy, 0.0)
    return RowStatistics(lse, logprobs, entropy)


def _gradient(
    log_probs: Tensor, probs: Tensor, targets: Tensor, temperature: Tensor | float, entropy: Tensor,
    c: Tensor, e: Tensor | None, scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """scale * (c (onehot - p) - e p (log p + H)) / T, over ``log_probs`` and ``probs``."""
    factor = torch.ones_like(c) if scale is None else scale.to(c.dtype).expand(c.shape)
    factor = factor / temperature
    c = c * factor
    if e is None:
        result = probs.mul_(-c[:, None])
    else:
        e = e * factor
        result = log_probs.mul_(-e[:, None]).sub_((c + e * entropy)[:, None]).mul_(probs)
    live = c != 0 if e is None else (c != 0) | (e != 0)
    # A target below 0 is another rank's: it has no column here.
    own = torch.where(targets >= 0, c, 0.0)
    result.scatter_add_(1, targets.long().clamp(min=0)[:, None], own[:, None])
    return result.masked_fill_(~live[:, None], 0.0)


def _stored(result: Tensor, logits: Tensor, dtype: torch.dtype, in_place: bool) -> Tensor:
    return logits.copy_(result) if in_place and dtype == logits.dtype else result.to(dtype)


def gradient(
    operation: str, logits: Tensor, targets: Tensor, temperature: Tensor | float, rows: RowStatistics,
    d_logprob: Tensor, d_entropy: Tensor, scale: Tensor | None, dtype: torch.dtype, in_place: bool,
) -> Tensor:  # fmt: skip
    """scale * d loss / d logits [N, V]; rows whose two coefficients are 0 are exactly 0 whatever they hold.

    ``in_place``: ``logits`` are not needed any more and the result may lie in their memory.
    """
    wide = rows.lse.dtype
    log_probs = _scaled(logits, temperature, (d_logprob != 0) | (d_entropy != 0)) - rows.lse[:, None]
    probs = log_probs.exp()
    log_probs.clamp_(min=LOWEST_LOG_PROB)
    c, e = d_logprob.to(wide), d_entropy.to(wide)
    return _stored(
        _gradient(log_probs, probs, targets, temperature, rows.entropy, c, e, scale), logits, dtype, in_place
    )


def exponentials(
    operation: str, logits: Tensor, targets: Tensor, temperature: Tensor | float, keep: Tensor | None,
    dtype: torch.dtype, out: Tensor | None,
) -> Exponentials:  # fmt: skip
    """Statistics and exponentials (in ``dtype``, into ``out``, or over the logits where None) without a coefficient."""
    scaled = _scaled(logits, temperature, keep)
    top = scaled.amax(1)
    gap = scaled - top[:, None]
    values = gap.exp()
    has, column = targets >= 0, targets.long().clamp(min=0)[:, None]
    own, own_gap = values.gather(1, column)[:, 0], gap.gather(1, column)[:, 0]
    gap.clamp_(min=torch.finfo(gap.dtype).min)  # -inf: adds 0 below
    moment = torch.linalg.vecdot(values, gap)
    values.scatter_(1, column, torch.where(has, 0.0, own)[:, None])
    others = values.sum(1)
    total = others + torch.where(has, own, 0.0)
    values.scatter_(1, column, torch.where(has, -others, own)[:, None])
    log_total = total.log()
    rows = RowStatistics(top + log_total, own_gap - log_total, log_total - moment / total)
    if keep is not None:
        rows = RowStatistics(*(torch.where(keep, each, 0.0) for each in rows))
        total = torch.where(keep, total, 1.0)
        values.masked_fill_(~keep[:, None], 0.0)
    if out is not None:
        return Exponentials(rows, total, out.copy_(values))
    return Exponentials(rows, total, _stored(values, logits, dtype, in_place=True))


def fused(
    operation: str, logits: Tensor, targets: Tensor, temperature: Tensor | float, keep: Tensor | None,
    inputs: dict[str, Any], scale: Tensor | None, in_place: bool,
) -> FusedRows:  # fmt: skip
    """Statistics and gradient of a policy loss whose coefficients need no other row. ``inputs`` are policy_loss's."""
    log_probs = torch.log_softmax(_scaled(logits, temperature, keep), dim=1)
    probs = log_probs.exp()
    logprobs, entropy = _logprob_and_entropy(log_probs, probs, targets)
    if keep is not None:
        logprobs, entropy = torch.where(keep, logprobs, 0.0), torch.where(keep, entropy, 0.0)
    out = evaluate(logprobs, entropy=entropy, loss_mask=keep, with_metrics=False, **inputs)
    d_entropy = out.d_entropy if inputs["objective"].entropy_coef else None
    result = _gradient(log_probs, probs, targets, temperature, entropy, out.d_logprob, d_entropy, scale)
    d_logprob = out.d_logprob if scale is None else out.d_logprob * scale
    return FusedRows(logprobs, entropy, d_logprob, _stored(result, logits, logits.dtype, in_place))


def scale_(operation: str, values: Tensor, scale: Tensor) -> Tensor:
    """values *= scale, in place; no pass on the CPU when the scale is 1, which it almost always is."""
    if values.device.type == "cpu" and float(scale) == 1.0:
        return values
    return values.mul_(scale)
