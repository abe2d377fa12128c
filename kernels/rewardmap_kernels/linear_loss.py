"""hidden [N, H] x weight [V, H] -> policy loss, in chunks of rows, with the gradients made in the forward.

The logits of a chunk live only while the chunk is worked on; [N, V] never exists. A row's coefficient dL/dlogprob depends on
its own log-probability and on numbers known beforehand, so the gradient is formed at once: 6NVH FLOP with a trainable head,
4NVH when weight or hidden is frozen. Sequence-level objectives make a pass for the log-probabilities first (2NVH more),
unless one chunk holds every row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._checks import check_linear, check_normalizer, check_rows, check_temperature, compute_dtype
from .logits_loss import row_gradient_, row_statistics
from .policy_loss import PolicyObjective, policy_loss, require_inputs

CHUNK_BYTES = 2 << 30
"""Default budget of a chunk's float32 logits."""


class LinearPolicyLoss(NamedTuple):
    """``loss`` 0-d, differentiable; ``logprobs``, ``entropy`` [N] detached float32 nats, 0 where masked; ``metrics`` 0-d."""

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor
    metrics: dict[str, Tensor]


def rows_per_chunk(rows: int, vocab: int, chunk_rows: int | None) -> int:
    """Rows of one chunk: as asked, else what CHUNK_BYTES of float32 logits hold, rounded down to 128."""
    if chunk_rows is not None:
        if chunk_rows < 1:
            raise ValueError(f"chunk_rows must be >= 1, got {chunk_rows}")
        return chunk_rows
    return max(128, CHUNK_BYTES // (4 * vocab) // 128 * 128)


def _slice(value: Any, rows: slice) -> Any:
    return value[rows] if isinstance(value, Tensor) and value.dim() else value


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor | float,
        inputs: dict[str, Any], mask: Tensor | None, chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:  # fmt: skip
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        dtype = compute_dtype(hidden)
        n, objective = hidden.shape[0], inputs["objective"]
        head = weight.to(dtype)
        logprobs = torch.zeros(n, dtype=dtype, device=hidden.device)
        entropy = torch.zeros_like(logprobs)
        keep = None if mask is None else mask != 0
        d_hidden = torch.zeros(n, hidden.shape[1], dtype=dtype, device=hidden.device) if need_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=dtype, device=hidden.device) if need_weight else None
        chunks = [slice(start, min(start + chunk, n)) for start in range(0, n, chunk)]
        two_passes = objective.needs_sequence and len(chunks) > 1 and (need_hidden or need_weight)

        def statistics(rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            x = hidden[rows].to(dtype)
            if keep is not None:
                x = torch.where(keep[rows, None], x, 0.0)
            scaled, lse, logprobs[rows], entropy[rows] = row_statistics(
                x @ head.t(), targets[rows], _slice(temperature, rows)
            )
            return x, scaled, lse, entropy[rows]

        if two_passes:
            for rows in chunks:
                statistics(rows)
            whole = policy_loss(logprobs, entropy=entropy, loss_mask=mask, **inputs)
        for rows in chunks if need_hidden or need_weight or not two_passes else []:
            x, scaled, lse, row_entropy = statistics(rows)
            if not (need_hidden or need_weight):
                continue
            if two_passes:
                d_logprob, d_entropy = whole.d_logprob[rows], whole.d_entropy[rows]
            else:
                part = {name: _slice(value, rows) for name, value in inputs.items()}
                out = policy_loss(logprobs[rows], entropy=row_entropy, loss_mask=_slice(mask, rows), **part)
                d_logprob, d_entropy = out.d_logprob, out.d_entropy
            gradient = row_gradient_(
                scaled, targets[rows], lse, row_entropy, d_logprob, d_entropy, _slice(temperature, rows)
            )
            if d_hidden is not None:
                torch.mm(gradient, head, out=d_hidden[rows])
            if d_weight is not None:
                d_weight.addmm_(gradient.t(), x)
        out = policy_loss(logprobs, entropy=entropy, loss_mask=mask, **inputs)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtypes = (hidden.dtype, weight.dtype)
        if keep is not None:
            logprobs, entropy = torch.where(keep, logprobs, 0.0), torch.where(keep, entropy, 0.0)
        ctx.mark_non_differentiable(logprobs, entropy)
        return out.row_loss.sum(), logprobs, entropy, out.metrics

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        grad = grads[0]
        to_hidden = None if d_hidden is None else (d_hidden * grad).to(ctx.dtypes[0])
        to_weight = None if d_weight is None else (d_weight * grad).to(ctx.dtypes[1])
        return to_hidden, to_weight, None, None, None, None, None


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
) -> LinearPolicyLoss:
    """Policy loss of the token distribution softmax(hidden @ weight.T / temperature), without the [N, V] logits.

    Args: ``hidden`` [N, H] and ``weight`` [V, H], floating point (a frozen one skips its product); ``targets`` [N] int64 token
    ids; ``temperature`` a positive number or [N]; ``chunk_rows`` rows per chunk (None: a chunk's logits fill at most
    CHUNK_BYTES). The others are those of ``policy_loss``. Weight gradients accumulate in float32 and are rounded once.
    Masked rows get gradient exactly 0 whatever they hold. The gradients are first-order only.

    Raises ValueError for a wrong shape, dtype or device, for a target outside [0, V), and for an input that the objective
    needs and that is None, before any work.
    """
    check_linear(hidden, weight, targets)
    n = hidden.shape[0]
    inputs = {
        "advantages": advantages, "normalizer": normalizer, "objective": objective, "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs, "rollout_logprobs": rollout_logprobs, "sequence": sequence,
        "num_sequences": n if num_sequences is None else num_sequences,
    }  # fmt: skip
    for name in ("advantages", "old_logprobs", "ref_logprobs", "rollout_logprobs"):
        check_rows(name, inputs[name], hidden, n)  # type: ignore[arg-type]
    check_rows("sequence", sequence, hidden, n, "int")
    check_rows("loss_mask", loss_mask, hidden, n, "mask")
    check_normalizer(normalizer, hidden, n)
    check_temperature(temperature, hidden, n)
    require_inputs(
        objective, entropy=True, ref_logprobs=ref_logprobs, rollout_logprobs=rollout_logprobs, sequence=sequence
    )
    chunk = rows_per_chunk(n, weight.shape[0], chunk_rows)
    return LinearPolicyLoss(*_LinearPolicyLoss.apply(hidden, weight, targets, temperature, inputs, loss_mask, chunk))
