"""hidden [N, H] x weight [V, H] -> (logprobs, entropy), differentiable, for trainers that keep their own
loss.

d logp_n / d hidden_n = (W[y_n] - sum_v p_nv W_v) / T holds no coefficient of the loss, so it is made in the
forward, and backward multiplies it by the incoming gradient: 4NVH FLOP in all with a frozen head, where
recomputing the logits takes 6. With a trainable head the direction D = (onehot - p) / T itself is kept when
it fits a budget (6NVH: the weight's gradient is D^T (c x)), else the logits are made again (8NVH). An entropy
gradient is a second direction.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import _rows
from ._checks import check_linear, check_temperature, compute_dtype
from ._head import Head, accumulate_product, full_weight, product_into, row_chunks
from .torch_rows import RowStatistics

OPERATION = "linear_logprobs"

KEEP_BYTES = 4 << 30
"""Budget for the kept directions [N, V] of a trainable head."""


def _directions(
    impl: ModuleType, logits: Tensor, targets: Tensor, temperature: Tensor | float, found: RowStatistics,
    dtype: torch.dtype, entropy: bool,
) -> Tensor:  # fmt: skip
    """d logprob / d logits, or d entropy / d logits, [C, V]."""
    one, zero = torch.ones_like(found.lse), torch.zeros_like(found.lse)
    c, e = (zero, one) if entropy else (one, zero)
    made: Tensor = impl.gradient(OPERATION, logits, targets, temperature, found, c, e, None, dtype, in_place=False)
    return made


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor | float, chunks: list[slice],
        entropy_gradient: bool, keep_bytes: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        impl = _rows.implementation(OPERATION, hidden)
        head = Head(impl, hidden, weight, None, torch.float32, False, False, None)
        n, vocab = hidden.shape[0], weight.shape[0]
        whole = RowStatistics(
            *(torch.empty(n, dtype=compute_dtype(head.weight), device=hidden.device) for _ in range(3))
        )
        keep = need_weight and not entropy_gradient and n * vocab * head.dtype.itemsize <= keep_bytes
        factored = (need_hidden and not need_weight) or keep
        kept = torch.empty(n, vocab, dtype=head.dtype, device=hidden.device) if keep else None

        def direction(wanted: bool) -> Tensor | None:
            return torch.empty(hidden.shape, dtype=head.dtype, device=hidden.device) if wanted else None

        to_logprob = direction(factored and need_hidden)
        to_entropy = direction(factored and need_hidden and entropy_gradient)
        for rows in chunks:
            _, logits = head.logits(rows)
            divisor = _rows.row_slice(temperature, rows)
            found: RowStatistics = impl.statistics(OPERATION, logits, targets[rows], divisor, None)
            for all_rows, these in zip(whole, found, strict=True):
                all_rows[rows] = these
            if factored:
                made = _directions(impl, logits, targets[rows], divisor, found, head.dtype, entropy=False)
                if to_logprob is not None:
                    product_into(to_logprob[rows], made, head.weight)
                if kept is not None:
                    kept[rows] = made
            if to_entropy is not None:
                made = _directions(impl, logits, targets[rows], divisor, found, head.dtype, entropy=True)
                product_into(to_entropy[rows], made, head.weight)
        per_row = temperature if isinstance(temperature, Tensor) else None
        recompute = (need_hidden or need_weight) and not factored
        ctx.save_for_backward(
            hidden,
            weight,
            targets,
            per_row,
            *(whole if recompute else (None, None, None)),
            to_logprob,
            to_entropy,
            kept,
        )
        ctx.temperature, ctx.chunks, ctx.impl = temperature if per_row is None else None, chunks, impl
        if not entropy_gradient:
            ctx.mark_non_differentiable(whole.entropy)
        return whole.logprobs, whole.entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, per_row, lse, logprobs, entropy, to_logprob, to_entropy, kept = ctx.saved_tensors
        need_hidden = ctx.needs_input_grad[0]
        with _rows.no_autocast(hidden):
            if lse is not None:
                temperature = per_row if per_row is not None else ctx.temperature
                return _recompute(
                    ctx, hidden, weight, targets, temperature, RowStatistics(lse, logprobs, entropy), grads
                )
            d_hidden = d_weight = None
            if need_hidden:
                d_hidden = to_logprob * grads[0][:, None]
                if to_entropy is not None:
                    d_hidden += to_entropy * grads[1][:, None]
                d_hidden = d_hidden.to(hidden.dtype)
            if kept is not None:
                d_weight = torch.zeros(weight.shape, dtype=compute_dtype(kept), device=weight.device)
                for rows in ctx.chunks:
                    x = (hidden[rows] * grads[0][rows, None]).to(kept.dtype)
                    accumulate_product(d_weight, kept[rows].t(), x)
                d_weight = d_weight.to(weight.dtype)
        return d_hidden, d_weight, *([None] * 5)


def _recompute(
    ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor | float, whole: RowStatistics,
    grads: tuple[Tensor, ...],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Both gradients from logits made a second time."""
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    head = Head(ctx.impl, hidden, weight, None, torch.float32, need_hidden, need_weight, None)
    d_entropy = grads[1] if grads[1] is not None else torch.zeros_like(grads[0])
    for rows in ctx.chunks:
        x, logits = head.logits(rows)
        gradient = ctx.impl.gradient(
            OPERATION, logits, targets[rows], _rows.row_slice(temperature, rows),
            RowStatistics(*(values[rows] for values in whole)), grads[0][rows], d_entropy[rows], None,
            head.dtype, in_place=True,
        )  # fmt: skip
        head.backward(rows, x, gradient)
    to_hidden = None if head.d_hidden is None else head.d_hidden.to(hidden.dtype)
    to_weight = None if head.d_weight is None else head.d_weight.to(weight.dtype)
    return to_hidden, to_weight, *([None] * 5)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: Tensor | float = 1.0,
    entropy_gradient: bool = True,
    chunk_rows: int | None = None,
    keep_bytes: int = KEEP_BYTES,
) -> tuple[Tensor, Tensor]:
    """(logprobs [N], entropy [N]) of softmax(hidden @ weight.T / temperature), nats, float32; no [N, V]
    logits.

    Args: ``hidden`` [N, H], ``weight`` [V, H] floating point, ``targets`` [N] int64, ``temperature`` a
    positive number or [N]. Differentiable with respect to hidden and weight; a frozen one skips its product.
    ``entropy_gradient`` False
    returns the entropy detached, which saves 2NVH FLOP. ``keep_bytes`` is what a trainable head may keep from
    the forward (see above). FLOP forward and backward, without / with entropy gradient: frozen head 4 / 6
    NVH, trainable 6 / 8 (8 / 8 beyond the budget).

    Raises ValueError for a wrong shape, dtype or device and for a target outside [0, V).
    """
    weight = full_weight(weight)
    check_linear(hidden, weight, targets)
    check_temperature(temperature, hidden, hidden.shape[0])
    hidden = _rows.differentiable(_rows.autocast_operand(hidden))
    weight = _rows.differentiable(_rows.autocast_operand(weight))
    chunks = row_chunks(hidden.shape[0], weight.shape[0], chunk_rows)
    with _rows.no_autocast(hidden):
        result: tuple[Tensor, Tensor] = _LinearLogprobs.apply(
            hidden, weight, targets, temperature, chunks, entropy_gradient, keep_bytes
        )
    return result
