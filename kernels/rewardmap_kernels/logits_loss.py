"""Logits [N, V] -> log-probabilities and entropy, and -> policy loss with its gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._checks import check_floating, check_targets, check_temperature, compute_dtype
from .policy_loss import PolicyObjective, policy_loss


class LogitsPolicyLoss(NamedTuple):
    """``loss`` 0-d, differentiable with respect to logits; ``logprobs``, ``entropy`` [N] detached; ``metrics`` 0-d."""

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor
    metrics: dict[str, Tensor]


def row_temperature(temperature: Tensor | float, dtype: torch.dtype) -> Tensor | float:
    """A divisor that broadcasts against [N, V]."""
    return temperature.to(dtype)[:, None] if isinstance(temperature, Tensor) else temperature


def row_statistics(
    logits: Tensor, targets: Tensor, temperature: Tensor | float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(scaled logits [N, V] in the compute dtype, log-sum-exp, logprobs, entropy [N])."""
    dtype = compute_dtype(logits)
    scaled = logits.to(dtype) / row_temperature(temperature, dtype)
    lse = torch.logsumexp(scaled, dim=1)
    logprobs = scaled.gather(1, targets.long()[:, None])[:, 0] - lse
    probs = torch.exp(scaled - lse[:, None])
    entropy = lse - (probs * torch.where(probs == 0, 0.0, scaled)).sum(1)
    return scaled, lse, logprobs, entropy


def row_gradient_(
    scaled: Tensor,
    targets: Tensor,
    lse: Tensor,
    entropy: Tensor,
    d_logprob: Tensor,
    d_entropy: Tensor,
    temperature: Tensor | float,
) -> Tensor:
    """d loss / d logits, overwriting ``scaled``: (c (onehot - p) - e p (log p + H)) / T. Rows with c = e = 0 are exactly 0."""
    log_probs = scaled.sub_(lse[:, None])
    probs = torch.exp(log_probs)
    inner = torch.where(probs == 0, 0.0, log_probs).add_(entropy[:, None])
    gradient = torch.mul(inner, d_entropy[:, None], out=log_probs).add_(d_logprob[:, None]).mul_(probs).neg_()
    gradient.scatter_add_(1, targets.long()[:, None], d_logprob[:, None])
    gradient.div_(row_temperature(temperature, scaled.dtype))
    return gradient.masked_fill_(((d_logprob == 0) & (d_entropy == 0))[:, None], 0.0)


class _SelectiveLogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: Tensor | float) -> tuple[Tensor, Tensor]:
        _, lse, logprobs, entropy = row_statistics(logits, targets, temperature)
        ctx.save_for_backward(logits, targets, lse, entropy, temperature if isinstance(temperature, Tensor) else None)
        ctx.temperature = temperature if not isinstance(temperature, Tensor) else None
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, lse, entropy, per_row = ctx.saved_tensors
        temperature = per_row if per_row is not None else ctx.temperature
        scaled = logits.to(lse.dtype) / row_temperature(temperature, lse.dtype)
        gradient = row_gradient_(scaled, targets, lse, entropy, grads[0].contiguous(), grads[1].contiguous(), temperature)
        return gradient.to(logits.dtype), None, None


def selective_log_softmax(
    logits: Tensor, targets: Tensor, temperature: Tensor | float = 1.0
) -> tuple[Tensor, Tensor]:
    """logits [N, V], targets [N] -> (logprobs [N], entropy [N]) of softmax(logits / temperature), float32, nats.

    Differentiable with respect to logits through both outputs. ``temperature`` is a positive number or [N].
    Raises ValueError for a wrong shape, dtype or device and for a target outside [0, V).
    """
    check_floating("logits", logits, 2)
    check_targets(targets, logits, logits.shape[1])
    check_temperature(temperature, logits, logits.shape[0])
    result: tuple[Tensor, Tensor] = _SelectiveLogSoftmax.apply(logits, targets, temperature)
    return result


class _LogitsPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, temperature: Tensor | float, inputs: dict[str, Any], mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        if mask is not None:
            # A masked row may hold anything: its statistics are those of a row of zeros.
            logits = torch.where((mask != 0)[:, None], logits, 0.0)
        scaled, lse, logprobs, entropy = row_statistics(logits, targets, temperature)
        out = policy_loss(logprobs, entropy=entropy, loss_mask=mask, **inputs)
        if ctx.needs_input_grad[0]:
            gradient = row_gradient_(scaled, targets, lse, entropy, out.d_logprob, out.d_entropy, temperature)
            ctx.save_for_backward(gradient.to(logits.dtype))
        if mask is not None:
            logprobs, entropy = torch.where(mask != 0, logprobs, 0.0), torch.where(mask != 0, entropy, 0.0)
        ctx.mark_non_differentiable(logprobs, entropy)
        return out.row_loss.sum(), logprobs, entropy, out.metrics

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None, None, None, None


def logits_policy_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    advantages: Tensor,
    normalizer: Tensor | float,
    objective: PolicyObjective,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    sequence: Tensor | None = None,
    num_sequences: int | None = None,
    loss_mask: Tensor | None = None,
    temperature: Tensor | float = 1.0,
) -> LogitsPolicyLoss:
    """logits [N, V], targets [N] -> policy loss, its gradient made in the same call.

    The arguments other than logits and targets are those of ``policy_loss``; ``temperature`` is a positive number or [N].
    Raises ValueError for a wrong shape, dtype or device and for a target outside [0, V).
    """
    check_floating("logits", logits, 2)
    check_targets(targets, logits, logits.shape[1])
    check_temperature(temperature, logits, logits.shape[0])
    inputs = {
        "advantages": advantages, "normalizer": normalizer, "objective": objective, "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs, "rollout_logprobs": rollout_logprobs, "sequence": sequence,
        "num_sequences": num_sequences,
    }  # fmt: skip
    return LogitsPolicyLoss(*_LogitsPolicyLoss.apply(logits, targets, temperature, inputs, loss_mask))
