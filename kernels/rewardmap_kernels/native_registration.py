"""What torch must know of the C++ operators beside their schemas: shapes without values, and derivatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def register() -> None:
    """Once, after the library is loaded."""
    fake = torch.library.register_fake
    fake("rewardmap::product_", lambda out, *rest: None)
    register_flop_formula(torch.ops.rewardmap.product_)(_product_flop)
    fake("rewardmap::row_statistics", _row_statistics)
    fake("rewardmap::row_exponentials", lambda logits, *rest: (*_vectors(logits), _vectors(logits)[0]))
    fake("rewardmap::row_exponentials_", lambda logits, *rest: (*_vectors(logits), _vectors(logits)[0]))
    fake("rewardmap::row_gradient", lambda logits, *rest: _like(logits, rest[-1]))
    fake("rewardmap::row_gradient_", lambda logits, *rest: None)
    fake("rewardmap::policy_rows", lambda logits, *rest: (*_vectors(logits), _like(logits, logits.dtype)))
    fake("rewardmap::policy_rows_", lambda logits, *rest: _vectors(logits))
    fake("rewardmap::group_advantage", _group_advantage)
    fake("rewardmap::decode_attention", lambda query, *rest: torch.empty_like(query))
    fake("rewardmap::add_norm_", lambda hidden, *rest: torch.empty_like(hidden))
    torch.library.register_autograd("rewardmap::row_statistics", _backward, setup_context=_save)


def _product_flop(out: Any, a: Any, b: Any, add: bool, **shapes: Any) -> int:
    return 2 * int(a[0] * a[1] * b[1])


def _like(logits: Tensor, dtype: torch.dtype) -> Tensor:
    return logits.new_empty(logits.shape, dtype=dtype)


def _vectors(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    first, second, third = (logits.new_empty(logits.shape[:1], dtype=torch.float32) for _ in range(3))
    return first, second, third


def _row_statistics(
    logits: Tensor, targets: Tensor, temperature: float, temperatures: Tensor | None, keep: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _vectors(logits)


def _group_advantage(rewards: Tensor, offsets: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    groups = offsets.shape[0] - 1
    mean, std = (rewards.new_empty(groups) for _ in range(2))
    return torch.empty_like(rewards), mean, std, rewards.new_empty(groups, dtype=torch.bool)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, temperature, temperatures, keep = inputs
    ctx.save_for_backward(logits, targets, temperatures, keep, output[0], output[2])
    ctx.temperature = temperature


def _backward(ctx: Any, d_lse: Tensor, d_logprob: Tensor, d_entropy: Tensor) -> tuple[Tensor | None, ...]:
    """lse = z_target / T - logprob, so its gradient is one at the target less that of logprob."""
    logits, targets, temperatures, keep, lse, entropy = ctx.saved_tensors
    # A target of -1 has no column here: logprob is the constant 0.
    d_logprob = torch.where(targets >= 0, d_logprob, 0.0)
    if keep is not None:
        d_lse, d_logprob, d_entropy = (torch.where(keep, d, 0.0) for d in (d_lse, d_logprob, d_entropy))
    gradient = torch.ops.rewardmap.row_gradient(
        logits, targets, ctx.temperature, temperatures, lse, entropy, (d_logprob - d_lse).contiguous(),
        d_entropy.contiguous(), torch.float32,
    )  # fmt: skip
    divisor = ctx.temperature if temperatures is None else temperatures
    at_target = torch.where(targets >= 0, d_lse / divisor, 0.0)
    gradient = gradient.scatter_add(1, targets.clamp(min=0)[:, None], at_target[:, None])
    return gradient.to(logits.dtype), None, None, None, None
