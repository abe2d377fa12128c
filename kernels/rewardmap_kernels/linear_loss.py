"""hidden [N, H] x weight [V, H] -> policy loss, in chunks of rows, with the gradients made in the forward.

The logits of a chunk live only while the chunk is worked on; [N, V] never exists. A row's coefficient dL/dlogprob
depends on its own log-probability and on numbers known beforehand, so the gradient is formed at once, over the logits:
6NVH FLOP with a trainable head, 4NVH when weight or hidden is frozen. Sequence-level objectives make a pass for the
log-probabilities first (2NVH more), unless one chunk holds every row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import _rows
from ._checks import check_linear, check_range, compute_dtype
from ._head import Head, full_weight, row_chunks
from ._shard import VocabShard
from .policy_loss import PolicyObjective, policy_loss
from .torch_rows import RowStatistics

OPERATION = "linear_policy_loss"


class LinearPolicyLoss(NamedTuple):
    """``loss`` 0-d, differentiable; ``logprobs``, ``entropy`` [N] detached float32 nats, 0 where a row was
    left out; ``metrics`` 0-d tensors, those of ``policy_loss``."""

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor
    metrics: dict[str, Tensor]


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor | float,
        inputs: dict[str, Any], mask: Tensor | None, chunks: list[slice], logits_dtype: torch.dtype,
        weight_grad: Tensor | None, shard: VocabShard | None,
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:  # fmt: skip
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        impl = _rows.implementation(OPERATION, hidden)
        objective: PolicyObjective = inputs["objective"]
        keep = None if mask is None else mask != 0
        head = Head(impl, hidden, weight, keep, logits_dtype, need_hidden, need_weight, weight_grad)
        scale = _rows.float16_scale(head.dtype, inputs["normalizer"], hidden)
        n, wide = hidden.shape[0], compute_dtype(head.weight)
        whole = RowStatistics(*(torch.zeros(n, dtype=wide, device=hidden.device) for _ in range(3)))
        training = need_hidden or need_weight
        # Coefficients that need no other row are known chunk by chunk.
        at_once = training and not objective.needs_sequence
        if shard is not None:
            targets = shard.local(targets)
        kept: tuple[Tensor, Tensor] | None = None
        for rows in chunks:
            x, logits = head.logits(rows)
            per_row, on = _rows.row_slice(temperature, rows), _rows.row_slice(keep, rows)
            part = {name: _rows.row_slice(value, rows) for name, value in inputs.items()} if at_once else {}
            if at_once and shard is None:
                done = impl.fused(OPERATION, logits, targets[rows], per_row, on, part, scale, head.dtype, in_place=True)
                whole.logprobs[rows], whole.entropy[rows] = done.logprobs, done.entropy
                head.backward(rows, x, done.gradient)
                continue
            found = impl.statistics(OPERATION, logits, targets[rows].clamp(min=0), per_row, on)
            if shard is not None:
                found = shard.combine(found, targets[rows], on, impl.NATS_PER_UNIT)
            for all_rows, these in zip(whole, found, strict=True):
                all_rows[rows] = these
            if at_once:
                out = policy_loss(found.logprobs, entropy=found.entropy, loss_mask=on, **part)
                gradient = impl.gradient(
                    OPERATION, logits, targets[rows], per_row, found, out.d_logprob, out.d_entropy, scale, head.dtype,
                    in_place=True,
                )  # fmt: skip
                head.backward(rows, x, gradient)
            elif len(chunks) == 1:
                kept = (x, logits)
        out = policy_loss(whole.logprobs, entropy=whole.entropy, loss_mask=keep, **inputs)
        if training and not at_once:
            for rows in chunks:
                x, logits = kept if kept is not None else head.logits(rows)
                gradient = impl.gradient(
                    OPERATION, logits, targets[rows], _rows.row_slice(temperature, rows),
                    RowStatistics(*(values[rows] for values in whole)), out.d_logprob[rows],
                    out.d_entropy[rows], scale, head.dtype, in_place=True,
                )  # fmt: skip
                head.backward(rows, x, gradient)
        if shard is not None:
            shard.add_up(head.d_hidden)
        ctx.save_for_backward(head.d_hidden, None if weight_grad is not None else head.d_weight, scale)
        ctx.dtypes = (hidden.dtype, weight.dtype)
        ctx.accumulated = need_weight and weight_grad is not None
        ctx.mark_non_differentiable(whole.logprobs, whole.entropy)
        return out.row_loss.sum(), whole.logprobs, whole.entropy, out.metrics

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, scale = ctx.saved_tensors
        grad = grads[0] if scale is None else grads[0] / scale
        if ctx.accumulated:
            message = "weight_grad already holds the gradient: backward from this loss itself, with gradient 1"
            if grads[0].device.type == "cpu":
                if float(grads[0]) != 1.0:
                    raise ValueError(f"{message}, got {float(grads[0])}")
            else:
                torch._assert_async(grads[0] == 1.0, message)

        def scaled(values: Tensor | None, dtype: torch.dtype) -> Tensor | None:
            # One pass: multiplied in the wider dtype, rounded once.
            return None if values is None else torch.mul(values, grad, out=torch.empty_like(values, dtype=dtype))

        return scaled(d_hidden, ctx.dtypes[0]), scaled(d_weight, ctx.dtypes[1]), *([None] * 8)


def contributing_rows(objective: PolicyObjective, advantages: Tensor, loss_mask: Tensor | None = None) -> Tensor:
    """int64 [M] index of the rows whose gradient can be other than zero, for ``linear_policy_loss(rows=)``.

    Unmasked rows, without those of zero advantage when the objective has neither a KL nor an entropy term.
    ``advantages`` and ``loss_mask`` [N] are on the CPU, where the trainer made them: on a GPU this would wait
    for it.
    Raises ValueError for tensors elsewhere.
    """
    if advantages.device.type != "cpu" or (loss_mask is not None and loss_mask.device.type != "cpu"):
        raise ValueError(f"contributing_rows needs CPU tensors, got advantages on {advantages.device}")
    on = torch.ones_like(advantages, dtype=torch.bool) if loss_mask is None else loss_mask != 0
    if not objective.kl_coef and not objective.entropy_coef:
        on = on & (advantages != 0)
    return on.nonzero()[:, 0]


def _check_weight_grad(weight_grad: Tensor, hidden: Tensor, weight: Tensor) -> None:
    if torch.float16 in (hidden.dtype, weight.dtype) or weight.dtype == torch.float64:
        raise ValueError(f"weight_grad needs bfloat16 or float32 operands, got {hidden.dtype} and {weight.dtype}")
    if weight_grad.shape != weight.shape or weight_grad.dtype != torch.float32:
        raise ValueError(
            f"weight_grad must be torch.float32 {tuple(weight.shape)}, "
            f"got {weight_grad.dtype} {tuple(weight_grad.shape)}"
        )
    if weight_grad.device != weight.device:
        raise ValueError(f"weight_grad is on {weight_grad.device}, expected {weight.device}")


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
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
    chunk_rows: int | None = None,
    rows: Tensor | None = None,
    weight_grad: Tensor | None = None,
    logits_dtype: torch.dtype = torch.float32,
    group: dist.ProcessGroup | None = None,
) -> LinearPolicyLoss:
    """Policy loss of softmax(hidden @ weight.T / temperature), without the [N, V] logits.

    Args: ``hidden`` [N, H] and ``weight`` [V, H], floating point; a frozen one skips its product. ``targets``
    [N] int64 token ids. ``temperature`` a positive number or [N]. ``chunk_rows`` rows per chunk (None: 2.5
    GiB of logits). ``rows`` int64 [M], distinct: only these rows enter the products, the others count as
    masked (they must not be able to contribute: see ``contributing_rows``; a sequence-level objective must
    see whole sequences). ``weight_grad`` [V, H] float32: the weight's gradient is added to it in this call
    and the weight gets none; backward must then start at the loss itself. ``logits_dtype`` bfloat16 rounds
    the logits as an engine that computes them so does. ``group``: the head is split over these ranks, ``weight``
    [V / ranks, H] is this rank's slice, in rank order; every rank passes the same rows and gets the whole loss and
    hidden gradient, and its slice's weight gradient; one collective per chunk, one for the hidden gradient. The
    others are those of ``policy_loss``; ``normalizer`` is a divisor and counts every row it is meant to.

    Products accumulate in float32, the weight gradient over all chunks, and are rounded once. Masked rows get
    gradient exactly 0 whatever they hold. First-order gradients only.

    Raises ValueError for a wrong shape, dtype or device, for a target outside [0, V), and for an input that
    the objective needs and that is None, before any work.
    """
    weight = full_weight(weight)
    shard = None if group is None else VocabShard(group, weight.shape[0])
    check_linear(hidden, weight, targets, slices=1 if shard is None else shard.size)
    n = hidden.shape[0]
    inputs: dict[str, Any] = {
        "advantages": advantages, "normalizer": normalizer, "objective": objective, "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs, "rollout_logprobs": rollout_logprobs, "sequence": sequence,
        "num_sequences": n if num_sequences is None else num_sequences,
    }  # fmt: skip
    _rows.check_policy_inputs(inputs, loss_mask, temperature, hidden)
    hidden = _rows.differentiable(_rows.autocast_operand(hidden))
    weight = _rows.differentiable(_rows.autocast_operand(weight))
    if logits_dtype not in (torch.float32, torch.bfloat16) or (
        logits_dtype == torch.bfloat16 and torch.promote_types(hidden.dtype, weight.dtype) == torch.float64
    ):
        raise ValueError(f"logits_dtype must be float32 or, below float64, bfloat16; got {logits_dtype}")
    if weight_grad is not None:
        _check_weight_grad(weight_grad, hidden, weight)
    mask = loss_mask
    if rows is not None:
        if rows.dim() != 1 or rows.dtype != torch.int64 or rows.device != hidden.device:
            raise ValueError(f"rows must be int64 [M] on {hidden.device}, got {rows.dtype} {tuple(rows.shape)}")
        check_range("rows", rows, 0, n)
        hidden, targets = hidden.index_select(0, rows), targets.index_select(0, rows)
        inputs = {k: v.index_select(0, rows) if _is_per_row(v) else v for k, v in inputs.items()}
        temperature = temperature.index_select(0, rows) if isinstance(temperature, Tensor) else temperature
        mask = None if loss_mask is None else loss_mask.index_select(0, rows)
    chunks = row_chunks(hidden.shape[0], weight.shape[0], chunk_rows)
    with _rows.no_autocast(hidden):
        out = LinearPolicyLoss(
            *_LinearPolicyLoss.apply(
                hidden, weight, targets, temperature, inputs, mask, chunks, logits_dtype, weight_grad, shard
            )
        )
    if rows is None:
        return out
    spread = [torch.zeros(n, dtype=v.dtype, device=v.device).index_copy_(0, rows, v) for v in out[1:3]]
    return out._replace(logprobs=spread[0], entropy=spread[1])


def _is_per_row(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 1
