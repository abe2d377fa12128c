"""Logits [N, V] -> log-probabilities and entropy, and -> policy loss with its gradient, in place where
asked."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _rows
from ._checks import check_floating, check_targets, check_temperature
from .policy_loss import PolicyObjective, policy_loss
from .torch_rows import RowStatistics


class LogitsPolicyLoss(NamedTuple):
    """``loss`` 0-d, differentiable with respect to logits; ``logprobs``, ``entropy`` [N] detached, nats, 0
    where masked; ``metrics`` 0-d tensors, those of ``policy_loss``."""

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor
    metrics: dict[str, Tensor]


class _SelectiveLogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: Tensor | float) -> tuple[Tensor, Tensor]:
        impl = _rows.implementation("selective_log_softmax", logits)
        rows: RowStatistics = impl.statistics("selective_log_softmax", logits, targets, temperature, None)
        per_row = temperature if isinstance(temperature, Tensor) else None
        ctx.save_for_backward(logits, targets, rows.lse, rows.entropy, per_row)
        ctx.temperature, ctx.impl = temperature if per_row is None else None, impl
        return rows.logprobs, rows.entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, lse, entropy, per_row = ctx.saved_tensors
        temperature = per_row if per_row is not None else ctx.temperature
        gradient = ctx.impl.gradient(
            "selective_log_softmax", logits, targets, temperature, RowStatistics(lse, lse, entropy), grads[0],
            grads[1], None, logits.dtype, in_place=False,
        )  # fmt: skip
        return gradient, None, None


def selective_log_softmax(logits: Tensor, targets: Tensor, temperature: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """logits [N, V], targets [N] -> (logprobs [N], entropy [N]) of softmax(logits / temperature), float32,
    nats.

    One read of the logits. Differentiable with respect to logits through both outputs. ``temperature`` is a
    positive number or [N]. Raises ValueError for a wrong shape, dtype or device and for a target outside [0,
    V).
    """
    check_floating("logits", logits, 2)
    check_targets(targets, logits, logits.shape[1])
    check_temperature(temperature, logits, logits.shape[0])
    result: tuple[Tensor, Tensor] = _SelectiveLogSoftmax.apply(logits, targets, temperature)
    return result


class _LogitsPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, temperature: Tensor | float, inputs: dict[str, Any],
        mask: Tensor | None, inplace: bool,
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:  # fmt: skip
        operation = "logits_policy_loss"
        impl = _rows.implementation(operation, logits)
        keep = None if mask is None else mask != 0
        scale = _rows.float16_scale(logits.dtype, inputs["normalizer"], logits)
        training = ctx.needs_input_grad[0]
        gradient = None
        if training and not inputs["objective"].needs_sequence:
            done = impl.fused(operation, logits, targets, temperature, keep, inputs, scale, logits.dtype, inplace)
            logprobs, entropy, gradient = done.logprobs, done.entropy, done.gradient
            out = policy_loss(logprobs, entropy=entropy, loss_mask=keep, **inputs)
        else:
            rows = impl.statistics(operation, logits, targets, temperature, keep)
            logprobs, entropy = rows.logprobs, rows.entropy
            out = policy_loss(logprobs, entropy=entropy, loss_mask=keep, **inputs)
            if training:
                gradient = impl.gradient(
                    operation, logits, targets, temperature, rows, out.d_logprob, out.d_entropy, scale,
                    logits.dtype, inplace,
                )  # fmt: skip
        if training and inplace:
            # Whoever saved these logits for a backward of its own learns that they are gone.
            torch.autograd.graph.increment_version(logits)
        ctx.impl, ctx.gradient, ctx.scale = impl, gradient, scale
        ctx.mark_non_differentiable(logprobs, entropy)
        return out.row_loss.sum(), logprobs, entropy, out.metrics

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError(
                "the gradient of logits_policy_loss was handed over by an earlier backward; call it again"
            )
        factor = grads[0] if ctx.scale is None else grads[0] / ctx.scale
        return ctx.impl.scale_("logits_policy_loss", gradient, factor), None, None, None, None, None


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
    inplace: bool = False,
) -> LogitsPolicyLoss:
    """logits [N, V], targets [N] -> policy loss, its gradient made in the same call: one read and one write.

    ``inplace`` writes the gradient over the logits, whose values are then gone (not for a leaf).
    ``temperature`` is a positive number or [N]. The other arguments are those of ``policy_loss``. Backward
    runs once: the gradient is handed over, not copied.

    Raises ValueError for a wrong shape, dtype or device, for a target outside [0, V), and for an input that
    the objective needs and that is None, before any work.
    """
    check_floating("logits", logits, 2)
    check_targets(targets, logits, logits.shape[1])
    inputs: dict[str, Any] = {
        "advantages": advantages, "normalizer": normalizer, "objective": objective, "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs, "rollout_logprobs": rollout_logprobs, "sequence": sequence,
        "num_sequences": num_sequences,
    }  # fmt: skip
    _rows.check_policy_inputs(inputs, loss_mask, temperature, logits)
    if inplace and logits.requires_grad and logits.is_leaf:
        raise ValueError("inplace = True would overwrite a leaf that requires a gradient; pass inplace = False")
    if inplace and logits.stride(1) != 1:
        raise ValueError(f"inplace = True needs rows of stride 1, got strides {logits.stride()}")
    logits = _rows.differentiable(logits)
    return LogitsPolicyLoss(*_LogitsPolicyLoss.apply(logits, targets, temperature, inputs, loss_mask, inplace))
