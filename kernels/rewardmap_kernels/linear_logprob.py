"""hidden [N, H] x weight [V, H] -> (logprobs, entropy), differentiable, for trainers that keep their own loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._checks import check_linear, check_temperature, compute_dtype
from .linear_loss import rows_per_chunk
from .logits_loss import row_gradient_, row_statistics


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor | float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(hidden)
        n = hidden.shape[0]
        lse, logprobs, entropy = (torch.empty(n, dtype=dtype, device=hidden.device) for _ in range(3))
        head = weight.to(dtype)
        for start in range(0, n, chunk):
            rows = slice(start, min(start + chunk, n))
            divisor = temperature[rows] if isinstance(temperature, Tensor) else temperature
            logits = hidden[rows].to(dtype) @ head.t()
            _, lse[rows], logprobs[rows], entropy[rows] = row_statistics(logits, targets[rows], divisor)
        per_row = temperature if isinstance(temperature, Tensor) else None
        ctx.save_for_backward(hidden, weight, targets, lse, entropy, per_row)
        ctx.temperature, ctx.chunk = temperature if per_row is None else None, chunk
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, lse, entropy, per_row = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        n, dtype = hidden.shape[0], lse.dtype
        head = weight.to(dtype)
        d_hidden = torch.empty(hidden.shape, dtype=dtype, device=hidden.device) if need_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=dtype, device=hidden.device) if need_weight else None
        for start in range(0, n, ctx.chunk):
            rows = slice(start, min(start + ctx.chunk, n))
            temperature = per_row[rows] if per_row is not None else ctx.temperature
            x = hidden[rows].to(dtype)
            divisor = temperature[:, None] if isinstance(temperature, Tensor) else temperature
            gradient = row_gradient_(
                (x @ head.t()).div_(divisor), targets[rows], lse[rows], entropy[rows], grads[0][rows], grads[1][rows],
                temperature,
            )  # fmt: skip
            if d_hidden is not None:
                torch.mm(gradient, head, out=d_hidden[rows])
            if d_weight is not None:
                d_weight.addmm_(gradient.t(), x)
        to_hidden = None if d_hidden is None else d_hidden.to(hidden.dtype)
        to_weight = None if d_weight is None else d_weight.to(weight.dtype)
        return to_hidden, to_weight, None, None, None


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: Tensor | float = 1.0,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(logprobs [N], entropy [N]) of softmax(hidden @ weight.T / temperature), nats, float32; [N, V] never exists.

    Args: ``hidden`` [N, H], ``weight`` [V, H] floating point; ``targets`` [N] int64; ``temperature`` a positive number or [N].
    Differentiable with respect to hidden and weight through both outputs; a frozen one skips its product.
    Raises ValueError for a wrong shape, dtype or device and for a target outside [0, V).
    """
    check_linear(hidden, weight, targets)
    check_temperature(temperature, hidden, hidden.shape[0])
    chunk = rows_per_chunk(hidden.shape[0], weight.shape[0], chunk_rows)
    result: tuple[Tensor, Tensor] = _LinearLogprobs.apply(hidden, weight, targets, temperature, chunk)
    return result
