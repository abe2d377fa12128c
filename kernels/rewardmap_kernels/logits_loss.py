"""Logits [N, V] -> log-probabilities and entropy, and -> policy loss with its gradient, in place where
asked."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _rows
from ._checks import (
    check_floating,
    check_targets,
    check_temperature,
    check_transforms,
    compute_dtype,
    first_order_only,
    positive,
    temperatures,
)
from ._scale import scale_, taken
from .objective import PolicyObjective, from_key
from .policy_loss import check_policy_inputs, evaluate, metric_names
from .torch_rows import RowStatistics


class LogitsPolicyLoss(NamedTuple):
    """``loss`` 0-d, differentiable with respect to logits; ``logprobs``, ``entropy`` [N] detached, nats, 0
    where masked; ``metrics`` 0-d tensors, those of ``policy_loss``."""

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor
    metrics: dict[str, Tensor]


@torch.library.custom_op("rewardmap_kernels::selective_log_softmax", mutates_args=())
def _statistics(
    logits: Tensor, targets: Tensor, row_temperature: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """log-sum-exp (in the implementation's base), logprobs, entropy."""
    impl = _rows.implementation("selective_log_softmax", logits)
    divisor = temperature if row_temperature is None else row_temperature
    found: RowStatistics = impl.statistics("selective_log_softmax", logits, targets, divisor, None)
    return found


@_statistics.register_fake
def _(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    a, b, c = (logits.new_empty(logits.shape[0], dtype=compute_dtype(logits)) for _ in range(3))
    return a, b, c


@torch.library.custom_op("rewardmap_kernels::selective_log_softmax_gradient", mutates_args=())
def _statistics_gradient(
    logits: Tensor, targets: Tensor, row_temperature: Tensor | None, temperature: float, lse: Tensor, entropy: Tensor,
    d_logprobs: Tensor, d_entropy: Tensor,
) -> Tensor:  # fmt: skip
    impl = _rows.implementation("selective_log_softmax", logits)
    divisor = temperature if row_temperature is None else row_temperature
    made: Tensor = impl.gradient(
        "selective_log_softmax", logits, targets, divisor, RowStatistics(lse, lse, entropy), d_logprobs, d_entropy,
        None, logits.dtype, in_place=False,
    )  # fmt: skip
    return made


@_statistics_gradient.register_fake
def _(logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


class _SelectiveLogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, row_temperature: Tensor | None, temperature: float
    ) -> tuple[Tensor, Tensor]:
        lse, logprobs, entropy = _statistics(logits, targets, row_temperature, temperature)
        ctx.save_for_backward(logits, targets, row_temperature, lse, entropy)
        ctx.temperature = temperature
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        first_order_only("selective_log_softmax")
        logits, targets, row_temperature, lse, entropy = ctx.saved_tensors
        gradient = _statistics_gradient(logits, targets, row_temperature, ctx.temperature, lse, entropy, *grads)
        return gradient, None, None, None


def selective_log_softmax(logits: Tensor, targets: Tensor, temperature: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """logits [N, V], targets [N] -> (logprobs [N], entropy [N]) of softmax(logits / temperature), float32,
    nats.

    One read of the logits. Differentiable with respect to logits through both outputs. ``temperature`` is a
    positive number or [N]. Raises ValueError for a wrong shape, dtype or device, for a target outside [0, V) and for a
    temperature that is not positive.
    """
    check_floating("logits", logits, 2)
    check_targets(targets, logits, logits.shape[1])
    check_temperature(temperature, logits, logits.shape[0])
    temperature = positive("temperature", temperature, logits, None, finite=True)
    check_transforms("selective_log_softmax", logits)
    result: tuple[Tensor, Tensor] = _SelectiveLogSoftmax.apply(logits, targets, *temperatures(temperature))
    return result


@torch.library.custom_op("rewardmap_kernels::logits_policy_loss", mutates_args=("over",))
def _policy_forward(
    logits: Tensor, over: Tensor | None, targets: Tensor, row_temperature: Tensor | None, temperature: float,
    advantages: Tensor, normalizer: Tensor, old_logprobs: Tensor | None, ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None, sequence: Tensor | None, num_sequences: int, loss_mask: Tensor | None,
    objective: str, training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """loss, logprobs, entropy, metrics [M], gradient (empty where not made, or where it lies in ``over``, which is the
    logits themselves), its scale."""
    operation = "logits_policy_loss"
    impl = _rows.implementation(operation, logits)
    goal = from_key(objective)
    inputs: dict[str, Any] = {
        "advantages": advantages, "normalizer": normalizer, "objective": goal, "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs, "rollout_logprobs": rollout_logprobs, "sequence": sequence,
        "num_sequences": num_sequences,
    }  # fmt: skip
    divisor = temperature if row_temperature is None else row_temperature
    keep = None if loss_mask is None else loss_mask.bool()
    scale = _rows.float16_scale(logits.dtype, normalizer, logits)
    source, gradient = logits if over is None else over, None
    if training and not goal.needs_sequence:
        done = impl.fused(operation, source, targets, divisor, keep, inputs, scale, over is not None)
        logprobs, entropy, gradient = done.logprobs, done.entropy, done.gradient
        out = evaluate(logprobs, entropy=entropy, loss_mask=keep, **inputs)
    else:
        rows = impl.statistics(operation, source, targets, divisor, keep)
        logprobs, entropy = rows.logprobs, rows.entropy
        out = evaluate(logprobs, entropy=entropy, loss_mask=keep, **inputs)
        if training:
            gradient = impl.gradient(
                operation, source, targets, divisor, rows, out.d_logprob, out.d_entropy, scale, logits.dtype,
                over is not None,
            )  # fmt: skip
    return (
        out.row_loss.sum(), logprobs, entropy, torch.stack(list(out.metrics.values())),
        logits.new_empty(0, 0) if gradient is None or over is not None else gradient,
        logits.new_ones((), dtype=compute_dtype(logits)) if scale is None else scale,
    )  # fmt: skip


@_policy_forward.register_fake
def _(logits: Tensor, over: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    wide = compute_dtype(logits)
    names = metric_names(from_key(rest[11]), entropy=True, reference=rest[6] is not None)
    n = logits.shape[0]
    shape = logits.shape if rest[12] and over is None else (0, 0)
    return (
        logits.new_empty((), dtype=wide), logits.new_empty(n, dtype=wide), logits.new_empty(n, dtype=wide),
        logits.new_empty(len(names), dtype=wide), logits.new_empty(shape), logits.new_empty((), dtype=wide),
    )  # fmt: skip


class _LogitsPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, inplace: bool, *rest: Any) -> tuple[Tensor, ...]:
        training = ctx.needs_input_grad[0]
        over = logits.detach() if inplace and training else None
        loss, logprobs, entropy, metrics, gradient, scale = _policy_forward(logits, over, *rest, training)
        # In place: whoever saved these logits for a backward of its own learns that they are gone.
        ctx.save_for_backward(gradient if over is None else over, scale)
        ctx.arguments = len(rest)
        ctx.mark_non_differentiable(logprobs, entropy, metrics)
        return loss, logprobs, entropy, metrics

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        gradient, scale = taken(ctx, "logits_policy_loss", grads[0])
        scale_(gradient, grads[0] / scale)
        return gradient, None, *([None] * ctx.arguments)


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

    Raises ValueError for a wrong shape, dtype or device, for a target outside [0, V), for a divisor or temperature that
    is not positive, and for an input that the objective needs and that is None, before any work.
    """
    check_floating("logits", logits, 2)
    check_targets(targets, logits, logits.shape[1])
    inputs: dict[str, Any] = {
        "advantages": advantages, "normalizer": normalizer, "objective": objective, "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs, "rollout_logprobs": rollout_logprobs, "sequence": sequence,
        "num_sequences": logits.shape[0] if num_sequences is None else num_sequences,
    }  # fmt: skip
    check_policy_inputs(logits, loss_mask=loss_mask, **inputs)
    check_temperature(temperature, logits, logits.shape[0])
    check_transforms("logits_policy_loss", logits)
    if inplace and logits.requires_grad:
        base = logits if logits._base is None else logits._base  # of a view
        if base.requires_grad and base.is_leaf:
            raise ValueError("inplace = True would overwrite a leaf that requires a gradient; pass inplace = False")
    if inplace and (logits.stride(1) != 1 or (logits.shape[0] > 1 and logits.stride(0) < logits.shape[1])):
        raise ValueError(f"inplace = True needs rows of stride 1 that do not overlap, got strides {logits.stride()}")
    logits = _rows.differentiable(logits)
    temperature = positive("temperature", temperature, logits, loss_mask, finite=True)
    loss, logprobs, entropy, metrics = _LogitsPolicyLoss.apply(
        logits, inplace, targets, *temperatures(temperature), advantages,
        _rows.divisor_of(normalizer, logits, loss_mask), old_logprobs, ref_logprobs, rollout_logprobs, sequence,
        inputs["num_sequences"], loss_mask, objective.key,
    )  # fmt: skip
    names = metric_names(objective, entropy=True, reference=ref_logprobs is not None)
    return LogitsPolicyLoss(loss, logprobs, entropy, dict(zip(names, metrics.unbind(), strict=True)))
