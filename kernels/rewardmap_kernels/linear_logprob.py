"""hidden [N, H] x weight [V, H] -> (logprobs, entropy), differentiable, for trainers that keep their own
loss.

d logp_n / d hidden_n = (W[y_n] - sum_v p_nv W_v) / T holds no coefficient of the loss, so it is made in the
forward, and backward multiplies it by the incoming gradient: 4NVH FLOP in all with a frozen head, where
recomputing the logits takes 6. With a trainable head the exponentials E (E / total = p - onehot) are kept too when
they fit a budget (6NVH: the weight's gradient is E^T (-c x / (total T))), else the logits are made again (8NVH). An
entropy gradient is a second direction.

Forward and backward are custom operators, opaque to torch.compile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import _rows
from ._checks import (
    check_integer,
    check_linear,
    check_temperature,
    check_transforms,
    compute_dtype,
    first_order_only,
    positive,
    temperatures,
)
from ._head import (
    Head,
    accumulate_product,
    chunk_size,
    full_weight,
    operand_dtype,
    own_product,
    row_chunks,
    scaled_operand,
)
from .torch_rows import RowStatistics

OPERATION = "linear_logprobs"

KEEP_BYTES = 4 << 30
"""Budget for the kept exponentials [N, V] of a trainable head."""


def _plan(
    hidden: Tensor, weight: Tensor, entropy_gradient: bool, keep_bytes: int, need_hidden: bool, need_weight: bool
) -> tuple[torch.dtype, bool, bool, bool]:  # fmt: skip
    """(dtype of the products, whether directions are made in the forward, exponentials kept, logits made again)."""
    dtype = operand_dtype(hidden, weight, _rows.implementation(OPERATION, hidden))
    size = hidden.shape[0] * weight.shape[0] * dtype.itemsize
    keep = need_weight and not entropy_gradient and dtype != torch.float16 and size <= keep_bytes
    directions = need_hidden and (not need_weight or keep)
    return dtype, directions, keep, need_weight and not keep


@torch.library.custom_op("rewardmap_kernels::linear_logprobs", mutates_args=())
def _forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, row_temperature: Tensor | None, temperature: float,
    chunk_rows: int, entropy_gradient: bool, keep_bytes: int, need_hidden: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """logprobs, entropy, and for the backward (empty where not made): log-sum-exp, total, d logprob / d hidden,
    d entropy / d hidden, exponentials."""
    impl = _rows.implementation(OPERATION, hidden)
    divisor = temperature if row_temperature is None else row_temperature
    dtype, directions, keep, _ = _plan(hidden, weight, entropy_gradient, keep_bytes, need_hidden, need_weight)
    head = Head(impl, hidden, weight, None, torch.float32, directions, False, None, chunk_rows)
    n, device = hidden.shape[0], hidden.device
    parts = []
    totals = torch.empty(n if keep else 0, dtype=compute_dtype(hidden), device=device)
    kept = torch.empty((n, weight.shape[0]) if keep else (0, 0), dtype=dtype, device=device)
    to_entropy = torch.empty(hidden.shape if directions and entropy_gradient else (0, 0), dtype=dtype, device=device)
    # An entropy direction needs the logits after the first direction; float16 has too few exponents.
    exponentials = keep or (directions and not entropy_gradient and dtype != torch.float16)
    for rows in head.chunks:
        x, logits = head.logits(rows)
        per_row = _rows.row_slice(divisor, rows)
        if exponentials:
            out = kept[rows] if keep else None
            found, total, made = impl.exponentials(OPERATION, logits, targets[rows], per_row, None, dtype, out)
            head.backward(rows, x, made, (-1.0 / (total * per_row))[:, None])
            if keep:
                totals[rows] = total
        else:
            found = impl.statistics(OPERATION, logits, targets[rows], per_row, None)
            if directions:
                one, zero = torch.ones_like(found.lse), torch.zeros_like(found.lse)
                arguments = (OPERATION, logits, targets[rows], per_row, found)
                made = impl.gradient(*arguments, one, zero, None, dtype, not entropy_gradient)
                head.backward(rows, x, made)
                if entropy_gradient:
                    made = impl.gradient(*arguments, zero, one, None, dtype, True)
                    second = head.direction(made)
                    to_entropy[rows] = second
        parts.append(found)
    whole = _rows.joined(parts, hidden)
    to_logprob = hidden.new_empty(0, 0, dtype=dtype) if head.d_hidden is None else head.d_hidden
    return whole.logprobs, whole.entropy, whole.lse, totals, to_logprob, to_entropy, kept


@_forward.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, row_temperature: Tensor | None, temperature: float,
    chunk_rows: int, entropy_gradient: bool, keep_bytes: int, need_hidden: bool, need_weight: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    dtype, directions, keep, _ = _plan(hidden, weight, entropy_gradient, keep_bytes, need_hidden, need_weight)
    n, wide = hidden.shape[0], compute_dtype(hidden)
    vectors = [hidden.new_empty(size, dtype=wide) for size in (n, n, n, n if keep else 0)]
    second = directions and entropy_gradient
    return (
        *vectors, hidden.new_empty(hidden.shape if directions else (0, 0), dtype=dtype),
        hidden.new_empty(hidden.shape if second else (0, 0), dtype=dtype),
        hidden.new_empty((n, weight.shape[0]) if keep else (0, 0), dtype=dtype),
    )  # fmt: skip


@torch.library.custom_op("rewardmap_kernels::linear_logprobs_kept", mutates_args=())
def _weight_from_kept(
    hidden: Tensor, kept: Tensor, totals: Tensor, row_temperature: Tensor | None, temperature: float, grad: Tensor,
    chunk_rows: int,
) -> Tensor:  # fmt: skip
    """d_weight [V, H] in float32 (float64) from the kept exponentials."""
    divisor = temperature if row_temperature is None else row_temperature
    factor = torch.where(grad == 0, 0.0, -grad / (totals * divisor))[:, None]
    made = torch.zeros(kept.shape[1], hidden.shape[1], dtype=compute_dtype(hidden), device=hidden.device)
    product = own_product(_rows.implementation(OPERATION, hidden), hidden, kept)
    with _rows.no_autocast(hidden):
        for rows in row_chunks(hidden.shape[0], chunk_rows):
            x = scaled_operand(hidden[rows], factor[rows], kept.dtype)
            if product is not None:
                product(made, kept[rows].t(), x, True)
            else:
                accumulate_product(made, kept[rows].t(), x)
    return made


@_weight_from_kept.register_fake
def _(hidden: Tensor, kept: Tensor, *rest: Any) -> Tensor:
    return hidden.new_empty(kept.shape[1], hidden.shape[1], dtype=compute_dtype(hidden))


@torch.library.custom_op("rewardmap_kernels::linear_logprobs_recompute", mutates_args=())
def _recompute(
    hidden: Tensor, weight: Tensor, targets: Tensor, row_temperature: Tensor | None, temperature: float, lse: Tensor,
    logprobs: Tensor, entropy: Tensor, d_logprobs: Tensor, d_entropy: Tensor, chunk_rows: int, need_hidden: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Both gradients from logits made a second time (an empty one for a frozen hidden)."""
    impl = _rows.implementation(OPERATION, hidden)
    divisor = temperature if row_temperature is None else row_temperature
    whole = RowStatistics(lse, logprobs, entropy)
    with _rows.no_autocast(hidden):
        head = Head(impl, hidden, weight, None, torch.float32, need_hidden, True, None, chunk_rows)
        for rows in head.chunks:
            x, logits = head.logits(rows)
            gradient = impl.gradient(
                OPERATION, logits, targets[rows], _rows.row_slice(divisor, rows),
                RowStatistics(*(values[rows] for values in whole)), d_logprobs[rows], d_entropy[rows], None,
                head.dtype, in_place=True,
            )  # fmt: skip
            head.backward(rows, x, gradient)
    assert head.d_weight is not None
    return hidden.new_empty(0) if head.d_hidden is None else head.d_hidden, head.d_weight


@_recompute.register_fake
def _(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = operand_dtype(hidden, weight, _rows.implementation(OPERATION, hidden))
    wide = dtype if hidden.shape[0] <= rest[8] else compute_dtype(hidden)
    return hidden.new_empty(hidden.shape if rest[9] else (0,), dtype=dtype), weight.new_empty(weight.shape, dtype=wide)


def _register_flop() -> None:
    """For ``FlopCounterMode``: the products that run, 2NVH each, by what came out (``out_shape``)."""

    def products(hidden: torch.Size, vocab: int, count: int) -> int:
        return 2 * count * hidden[0] * hidden[1] * vocab

    @register_flop_formula(torch.ops.rewardmap_kernels.linear_logprobs)
    def _(hidden: torch.Size, weight: torch.Size, *rest: Any, out_shape: Any) -> int:
        return products(hidden, weight[0], 1 + sum(made == hidden for made in out_shape[4:6]))

    @register_flop_formula(torch.ops.rewardmap_kernels.linear_logprobs_kept)
    def _(hidden: torch.Size, kept: torch.Size, *rest: Any, out_shape: Any) -> int:
        return products(hidden, kept[1], 1)

    @register_flop_formula(torch.ops.rewardmap_kernels.linear_logprobs_recompute)
    def _(hidden: torch.Size, weight: torch.Size, *rest: Any, out_shape: Any) -> int:
        return products(hidden, weight[0], 2 + (out_shape[0] == hidden))


_register_flop()


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, row_temperature: Tensor | None, temperature: float,
        chunk_rows: int, entropy_gradient: bool, keep_bytes: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        need = ctx.needs_input_grad[:2]
        logprobs, entropy, lse, *made = _forward(
            hidden, weight, targets, row_temperature, temperature, chunk_rows, entropy_gradient, keep_bytes, *need
        )
        _, ctx.directions, ctx.keep, ctx.again = _plan(hidden, weight, entropy_gradient, keep_bytes, *need)
        ctx.temperature, ctx.chunk_rows, ctx.entropy_gradient = temperature, chunk_rows, entropy_gradient
        ctx.save_for_backward(hidden, weight, targets, row_temperature, lse, logprobs, entropy, *made)
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        first_order_only(OPERATION)
        hidden, weight, targets, row_temperature, lse, logprobs, entropy, *made = ctx.saved_tensors
        totals, to_logprob, to_entropy, kept = made
        d_hidden = d_weight = None
        if ctx.again:
            second = grads[1] if ctx.entropy_gradient else torch.zeros_like(grads[0])
            d_hidden, d_weight = _recompute(
                hidden, weight, targets, row_temperature, ctx.temperature, lse, logprobs, entropy, grads[0], second,
                ctx.chunk_rows, ctx.needs_input_grad[0],
            )  # fmt: skip
        else:
            if ctx.directions:
                d_hidden = to_logprob * grads[0][:, None]
                if ctx.entropy_gradient:
                    d_hidden = d_hidden + to_entropy * grads[1][:, None]
            if ctx.keep:
                d_weight = _weight_from_kept(
                    hidden, kept, totals, row_temperature, ctx.temperature, grads[0], ctx.chunk_rows
                )
        return (
            d_hidden.to(hidden.dtype) if d_hidden is not None and ctx.needs_input_grad[0] else None,
            None if d_weight is None else d_weight.to(weight.dtype), *([None] * 6),
        )  # fmt: skip


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

    Args: ``hidden`` [N, H], ``weight`` [V, H] floating point, ``targets`` [N] int32 or int64, ``temperature`` a
    positive number or [N]. Differentiable with respect to hidden and weight; a frozen one skips its product.
    ``entropy_gradient`` False returns the entropy detached, which saves 2NVH FLOP. ``chunk_rows``: rows whose logits
    are alive at a time (None: by a budget of bytes). ``keep_bytes``: what a trainable head may keep from the forward
    (see above). FLOP forward and backward, without / with entropy gradient: frozen head 4 / 6 NVH, trainable 6 / 8
    (8 / 8 beyond the budget).

    Raises ValueError for a wrong shape, dtype or device, for a target outside [0, V) and for a temperature that is not
    positive.
    """
    weight = full_weight(weight)
    check_linear(hidden, weight, targets)
    check_temperature(temperature, hidden, hidden.shape[0])
    temperature = positive("temperature", temperature, hidden, None, finite=True)
    check_integer("keep_bytes", keep_bytes)
    check_transforms(OPERATION, hidden, weight)
    hidden = _rows.differentiable(_rows.autocast_operand(hidden))
    weight = _rows.differentiable(_rows.autocast_operand(weight))
    chunk = chunk_size(hidden.shape[0], weight.shape[0], chunk_rows, hidden.device)
    with _rows.no_autocast(hidden):
        result: tuple[Tensor, Tensor] = _LinearLogprobs.apply(
            hidden, weight, targets, *temperatures(temperature), chunk, entropy_gradient, keep_bytes
        )
    return result
