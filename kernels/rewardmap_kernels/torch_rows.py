"""The row operations in plain torch: statistics of logits, their gradient, and both with the policy
coefficient between.

Same functions as ``triton_launch``; ``dispatch`` says which of the two runs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._checks import compute_dtype
from .policy_loss import policy_loss


class RowStatistics(NamedTuple):
    """[N] each: the log-sum-exp (in the implementation's base), and logprobs and entropy in nats. 0 where
    masked."""

    lse: Tensor
    logprobs: Tensor
    entropy: Tensor


class FusedRows(NamedTuple):
    """``logprobs``, ``entropy`` and ``d_logprob`` (the coefficient, normalised and scaled) [N]; ``gradient``
    [N, V]."""

    logprobs: Tensor
    entropy: Tensor
    d_logprob: Tensor
    gradient: Tensor


def _scaled(logits: Tensor, temperature: Tensor | float, keep: Tensor | None) -> Tensor:
    dtype = compute_dtype(logits)
    scaled = logits.to(dtype)
    if keep is not None:
        scaled = torch.where(keep[:, None], scaled, 0.0)
    if isinstance(temperature, Tensor):
        return scaled / temperature.to(dtype)[:, None]
    return scaled if temperature == 1.0 else scaled / temperature


def statistics(
    operation: str, logits: Tensor, targets: Tensor, temperature: Tensor | float, keep: Tensor | None
) -> RowStatistics:
    """Statistics of softmax(logits / temperature); rows outside ``keep`` (bool [N]) are not looked at."""
    scaled = _scaled(logits, temperature, keep)
    # Relative to the maximum, so that the entropy of large logits is not a difference of large numbers.
    top = scaled.amax(1)
    pivot = torch.where(torch.isinf(top), 0.0, top)
    scaled = scaled - pivot[:, None]
    weights = torch.exp(scaled)
    total = weights.sum(1)
    picked = scaled.gather(1, targets.long()[:, None])[:, 0]
    moment = torch.where(weights == 0, 0.0, weights * scaled).sum(1)
    log_total = total.log()
    logprobs, entropy = picked - log_total, log_total - moment / total
    if keep is not None:
        logprobs, entropy = torch.where(keep, logprobs, 0.0), torch.where(keep, entropy, 0.0)
    return RowStatistics(pivot + log_total, logprobs, entropy)


def gradient(
    operation: str, logits: Tensor, targets: Tensor, temperature: Tensor | float, rows: RowStatistics,
    d_logprob: Tensor, d_entropy: Tensor, scale: Tensor | None, dtype: torch.dtype, in_place: bool,
) -> Tensor:  # fmt: skip
    """scale * d loss / d logits [N, V] = (c (onehot - p) - e p (log p + H)) / T; rows with c = e = 0 are
    exactly 0.

    ``in_place``: ``logits`` are not needed any more and the result may lie in their memory.
    """
    live = (d_logprob != 0) | (d_entropy != 0)
    c, e = d_logprob.to(rows.lse.dtype), d_entropy.to(rows.lse.dtype)
    log_probs = _scaled(logits, temperature, live) - rows.lse[:, None]
    probs = torch.exp(log_probs)
    log_probs = torch.where(probs == 0, 0.0, log_probs)
    result = log_probs.add_(rows.entropy[:, None]).mul_(e[:, None]).add_(c[:, None]).mul_(probs).neg_()
    result.scatter_add_(1, targets.long()[:, None], c[:, None])
    factor = 1.0 / temperature.to(result.dtype)[:, None] if isinstance(temperature, Tensor) else 1.0 / temperature
    result.mul_(factor if scale is None else factor * scale)
    result.masked_fill_(~live[:, None], 0.0)
    if in_place and dtype == logits.dtype:
        return logits.copy_(result)
    return result.to(dtype)


def fused(
    operation: str, logits: Tensor, targets: Tensor, temperature: Tensor | float, keep: Tensor | None,
    inputs: dict[str, Any], scale: Tensor | None, dtype: torch.dtype, in_place: bool,
) -> FusedRows:  # fmt: skip
    """Statistics and gradient of a policy loss whose coefficients need no other row. ``inputs`` are
    policy_loss's."""
    rows = statistics(operation, logits, targets, temperature, keep)
    out = policy_loss(rows.logprobs, entropy=rows.entropy, loss_mask=keep, **inputs)
    grad = gradient(operation, logits, targets, temperature, rows, out.d_logprob, out.d_entropy, scale, dtype, in_place)
    d_logprob = out.d_logprob if scale is None else out.d_logprob * scale
    return FusedRows(rows.logprobs, rows.entropy, d_logprob, grad)


def scale_(operation: str, values: Tensor, scale: Tensor) -> Tensor:
    """values *= scale, in place."""
    return values.mul_(scale)
