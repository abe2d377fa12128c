"""Launches of the Triton row kernels. Same functions as ``torch_rows``; imported only where triton runs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import triton
from torch import Tensor

from . import native_cuda
from . import triton_rows as kernels
from ._checks import number_on, temperatures
from .dispatch import launched, on_device_of
from .objective import CLIPPED, PolicyObjective
from .torch_rows import PRODUCT, Exponentials, FusedRows, RowStatistics, empty_matrix, over

# (values of a row that a program holds at a time, warps). docs/kernels.md says why; the bench's "tune" tries others.
STATISTICS = (2048, 4)
EXPONENTIALS = (2048, 8)
GRADIENT = SCALE = (4096, 8)
POLICY_ROW = (8192, 32)
"""1,024 threads of more than 32 registers: one row at a time on a multiprocessor, so that its second reading comes from
the caches."""
NATS_PER_UNIT = math.log(2.0)
PRODUCTS_ON_CPU = (torch.float16, torch.bfloat16)
"""Of the interpreter, which stands for the GPU."""

__all__ = [
    "NATS_PER_UNIT", "PRODUCT", "PRODUCTS_ON_CPU", "empty_matrix", "exponentials", "fused", "gradient", "scale_",
    "statistics",
]  # fmt: skip


P = ParamSpec("P")
R = TypeVar("R")


def _there(launch: Callable[Concatenate[str, Tensor, P], R]) -> Callable[Concatenate[str, Tensor, P], R]:
    """``launch`` on its tensor's device."""

    @functools.wraps(launch)
    def launch_there(operation: str, tensor: Tensor, *args: P.args, **kwargs: P.kwargs) -> R:
        with on_device_of(tensor):
            return launch(operation, tensor, *args, **kwargs)

    return launch_there


def _block(config: tuple[int, int], columns: int) -> dict[str, int]:
    # Each thread has values of its own: one that read another's might come after that one has written over it.
    block = min(max(triton.next_power_of_2(columns), 32), config[0])
    return {"BLOCK": block, "num_warps": min(config[1], block // 32)}


def _per_row(values: Tensor | None, dummy: Tensor) -> Tensor:
    if values is None:
        return dummy
    values = values.contiguous()
    return values.view(torch.uint8) if values.dtype == torch.bool else values


def _unit_stride(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _one(scale: Tensor | None, like: Tensor) -> Tensor:
    return torch.ones((), dtype=torch.float32, device=like.device) if scale is None else scale


@_there
def statistics(
    operation: str, logits: Tensor, targets: Tensor, temperature: Tensor | float, keep: Tensor | None
) -> RowStatistics:
    """See ``torch_rows.statistics``. The log-sum-exp is in base 2."""
    logits = _unit_stride(logits)
    n = logits.shape[0]
    lse2, logprobs, entropy = (torch.empty(n, dtype=torch.float32, device=logits.device) for _ in range(3))
    per_row, number = temperatures(temperature)
    launched(operation, "statistics_kernel")
    if n:
        kernels.statistics_kernel[(n,)](
            logits, logits.stride(0), targets.contiguous(),
            _per_row(per_row, lse2), _per_row(keep, lse2), lse2, logprobs, entropy, logits.shape[1], number,
            HAS_MASK=keep is not None, HAS_TEMPERATURE=per_row is not None, **_block(STATISTICS, logits.shape[1]),
        )  # fmt: skip
    return RowStatistics(lse2, logprobs, entropy)


@_there
def gradient(
    operation: str, logits: Tensor, targets: Tensor, temperature: Tensor | float, rows: RowStatistics,
    d_logprob: Tensor, d_entropy: Tensor, scale: Tensor | None, dtype: torch.dtype, in_place: bool,
) -> Tensor:  # fmt: skip
    """See ``torch_rows.gradient``."""
    logits = _unit_stride(logits)
    out = over(logits, dtype, upper=True) if in_place else torch.empty(logits.shape, dtype=dtype, device=logits.device)
    n = logits.shape[0]
    per_row, number = temperatures(temperature)
    launched(operation, "gradient_kernel")
    if n:
        kernels.gradient_kernel[(n,)](
            logits, logits.stride(0), out, out.stride(0), targets.contiguous(),
            _per_row(per_row, rows.lse), _one(scale, logits),
            rows.lse, rows.entropy, d_logprob.contiguous(), d_entropy.contiguous(), logits.shape[1],
            number, HAS_TEMPERATURE=per_row is not None, BARRIER=in_place and dtype != logits.dtype,
            **_block(GRADIENT, logits.shape[1]),
        )  # fmt: skip
    return out


@_there
def exponentials(
    operation: str, logits: Tensor, targets: Tensor, temperature: Tensor | float, keep: Tensor | None,
    dtype: torch.dtype, out: Tensor | None,
) -> Exponentials:  # fmt: skip
    """See ``torch_rows.exponentials``: one launch, one read and one write. The log-sum-exp is in base 2."""
    n = logits.shape[0]
    into = over(logits, dtype, upper=False) if out is None else out
    lse2, total, logprobs, entropy = (torch.empty(n, dtype=torch.float32, device=logits.device) for _ in range(4))
    per_row, number = temperatures(temperature)
    launched(operation, "exponentials_kernel")
    if n:
        kernels.exponentials_kernel[(n,)](
            logits, logits.stride(0), into, into.stride(0), targets.contiguous(),
            _per_row(per_row, lse2), _per_row(keep, lse2), lse2, total, logprobs, entropy, logits.shape[1], number,
            HAS_MASK=keep is not None, HAS_TEMPERATURE=per_row is not None, IN_PLACE=out is None,
            **_block(EXPONENTIALS, logits.shape[1]),
        )  # fmt: skip
    return Exponentials(RowStatistics(lse2, logprobs, entropy), total, into)


@_there
def fused(
    operation: str, logits: Tensor, targets: Tensor, temperature: Tensor | float, keep: Tensor | None,
    inputs: dict[str, Any], scale: Tensor | None, in_place: bool,
) -> FusedRows:  # fmt: skip
    """See ``torch_rows.fused``: one launch."""
    objective: PolicyObjective = inputs["objective"]
    assert not objective.needs_sequence
    logits = _unit_stride(logits)
    if native_cuda.wanted(logits, in_place):
        launched(operation, "hopper")
        return native_cuda.fused(logits, targets, temperature, keep, inputs)
    out = logits if in_place else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    n = logits.shape[0]
    logprobs, entropy, d_logprob = (torch.empty(n, dtype=torch.float32, device=logits.device) for _ in range(3))
    normalizer = number_on(inputs["normalizer"], logits.device)
    per_row, number = temperatures(temperature)
    launched(operation, "policy_row_kernel")
    if n:
        kernels.policy_row_kernel[(n,)](
            logits, logits.stride(0), out, out.stride(0), targets.contiguous(),
            _per_row(per_row, logprobs), _per_row(keep, logprobs), _per_row(inputs["advantages"], logprobs),
            _per_row(inputs["old_logprobs"], logprobs), _per_row(inputs["ref_logprobs"], logprobs),
            _per_row(inputs["rollout_logprobs"], logprobs), normalizer.contiguous(), normalizer.dim(),
            _one(scale, logits), logprobs, entropy, d_logprob, logits.shape[1], number, 1.0 - objective.clip_eps_low,
            1.0 + objective.clip_eps_high, objective.dual_clip or 0.0, objective.delta or 0.0,
            objective.kl_coef, objective.entropy_coef, objective.importance_min, objective.importance_max,
            objective.sapo_temperature_pos, objective.sapo_temperature_neg,
            OBJECTIVE="clipped" if objective.name in CLIPPED else objective.name,
            DUAL_CLIP=objective.dual_clip is not None, DELTA=objective.delta is not None,
            KL=objective.kl_estimator if objective.kl_coef else "none", KL_BIAS=objective.kl_bias_correction,
            IMPORTANCE=objective.importance_correction, ENTROPY=objective.entropy_coef != 0.0,
            HAS_OLD=inputs["old_logprobs"] is not None, HAS_MASK=keep is not None, HAS_TEMPERATURE=per_row is not None,
            **_block(POLICY_ROW, logits.shape[1]),
        )  # fmt: skip
    return FusedRows(logprobs, entropy, d_logprob, out)


@_there
def scale_(operation: str, values: Tensor, scale: Tensor) -> Tensor:
    """values [N, V] *= scale (0-d) in place; costs no pass when the scale is 1."""
    n, columns = values.shape
    launched(operation, "scale_kernel")
    if n:
        kernels.scale_kernel[(n,)](values, values.stride(0), columns, scale, **_block(SCALE, columns))
    return values
