"""The row operations in C++ on the CPU. Same functions as ``torch_rows``; float32 and bfloat16.

Imported only where ``native.unavailable_reason()`` is None.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import native
from ._checks import number_on, temperatures
from .dispatch import launched
from .objective import CLIPPED, PolicyObjective
from .torch_rows import NATS_PER_UNIT, Exponentials, FusedRows, RowStatistics, over, scale_

__all__ = [
    "NATS_PER_UNIT", "PRODUCT", "PRODUCTS_ON_CPU", "empty_matrix", "exponentials", "fused", "gradient",
    "group_advantage", "scale_", "statistics",
]  # fmt: skip

PRODUCT = torch.ops.rewardmap.product_ if torch.ops.rewardmap.products(False) else None
_MULTIPLIES_BFLOAT16 = (
    torch.cpu._is_avx512_bf16_supported() if PRODUCT is None else "bf16" in torch.ops.rewardmap.products(True)
)
PRODUCTS_ON_CPU = (torch.bfloat16,) if _MULTIPLIES_BFLOAT16 else ()
"""Where the processor multiplies bfloat16, at twice the rate of float32: E and dW's operand are narrow then."""


def empty_matrix(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """See ``torch_rows.empty_matrix``; by large pages."""
    made: Tensor = torch.ops.rewardmap.empty_matrix(rows, columns, dtype)
    return made


def _note(operation: str, kernel: str) -> None:
    if not torch.compiler.is_compiling():
        launched(operation, f"{kernel}.{native.capability()}")


def _unit_stride(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _vector(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.detach().to(torch.float32).contiguous()


def _ids(targets: Tensor) -> Tensor:
    return targets.to(torch.int64).contiguous()


def _temperatures(temperature: Tensor | float) -> tuple[float, Tensor | None]:
    per_row, number = temperatures(temperature)
    return number, _vector(per_row)


def statistics(
    operation: str, logits: Tensor, targets: Tensor, temperature: Tensor | float, keep: Tensor | None
) -> RowStatistics:
    """See ``torch_rows.statistics``; masked rows are not read."""
    _note(operation, "row_statistics")
    on = None if keep is None else keep.contiguous()
    found = torch.ops.rewardmap.row_statistics(_unit_stride(logits), _ids(targets), *_temperatures(temperature), on)
    return RowStatistics(*found)


def exponentials(
    operation: str, logits: Tensor, targets: Tensor, temperature: Tensor | float, keep: Tensor | None,
    dtype: torch.dtype, out: Tensor | None,
) -> Exponentials:  # fmt: skip
    """See ``torch_rows.exponentials``; ``dtype`` float32 or bfloat16. Half the time of statistics and gradient: an
    exponential per element is computed once."""
    _note(operation, "row_exponentials")
    on = None if keep is None else keep.contiguous()
    logits = _unit_stride(logits)
    rows = (logits, _ids(targets), *_temperatures(temperature), on)
    if out is None and logits.dtype == dtype:
        *found, total = torch.ops.rewardmap.row_exponentials_(*rows)
        return Exponentials(RowStatistics(*found), total, logits)
    values = over(logits, dtype, upper=False) if out is None else out
    *found, total = torch.ops.rewardmap.row_exponentials(*rows, values)
    return Exponentials(RowStatistics(*found), total, values)


def gradient(
    operation: str, logits: Tensor, targets: Tensor, temperature: Tensor | float, rows: RowStatistics,
    d_logprob: Tensor, d_entropy: Tensor, scale: Tensor | None, dtype: torch.dtype, in_place: bool,
) -> Tensor:  # fmt: skip
    """See ``torch_rows.gradient``."""
    _note(operation, "row_gradient")
    given = [d_logprob, d_entropy] if scale is None else [d_logprob * scale, d_entropy * scale]
    vectors = [_vector(values) for values in (rows.lse, rows.entropy, *given)]
    logits = _unit_stride(logits)
    if in_place and dtype == logits.dtype:
        torch.ops.rewardmap.row_gradient_(logits, _ids(targets), *_temperatures(temperature), *vectors)
        return logits
    made: Tensor = torch.ops.rewardmap.row_gradient(
        logits, _ids(targets), *_temperatures(temperature), *vectors, dtype
    )
    return made


def fused(
    operation: str, logits: Tensor, targets: Tensor, temperature: Tensor | float, keep: Tensor | None,
    inputs: dict[str, Any], scale: Tensor | None, in_place: bool,
) -> FusedRows:  # fmt: skip
    """See ``torch_rows.fused``: statistics, coefficient and gradient of a row while it is in cache."""
    o: PolicyObjective = inputs["objective"]
    assert not o.needs_sequence
    _note(operation, "policy_rows")
    normalizer = number_on(inputs["normalizer"], logits.device)
    if scale is not None:
        normalizer = normalizer / scale
    logits = _unit_stride(logits)
    on = None if keep is None else keep.contiguous()
    rows = (
        logits, _ids(targets), *_temperatures(temperature), on, _vector(inputs["advantages"]),
        _vector(inputs["old_logprobs"]), _vector(inputs["ref_logprobs"]), _vector(inputs["rollout_logprobs"]),
        normalizer.contiguous(), "clipped" if o.name in CLIPPED else o.name, 1.0 - o.clip_eps_low,
        1.0 + o.clip_eps_high, o.dual_clip, o.delta, o.kl_estimator if o.kl_coef else "none", o.kl_coef,
        o.kl_bias_correction, o.entropy_coef, o.importance_correction, o.importance_min, o.importance_max,
        o.sapo_temperature_pos, o.sapo_temperature_neg,
    )  # fmt: skip
    if in_place:
        logprobs, entropy, d_logprob = torch.ops.rewardmap.policy_rows_(*rows)
        return FusedRows(logprobs, entropy, d_logprob, logits)
    return FusedRows(*torch.ops.rewardmap.policy_rows(*rows))


def group_advantage(
    rewards: Tensor, offsets: Tensor, scale: str, ddof: int, eps: float, eps_inside: bool, baseline: str,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(advantages [B], mean [G], std [G], degenerate [G]), float32 and bool; sums in double precision."""
    launched("group_advantage", "group_advantage")
    rewards = rewards.to(torch.float32).contiguous()
    made: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.rewardmap.group_advantage(
        rewards, _ids(offsets), scale, ddof, eps, eps_inside, baseline, _vector(weights)
    )
    return made
