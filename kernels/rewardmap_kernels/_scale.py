"""Multiplying a gradient made in the forward by the one that comes in, without a pass where that is 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _rows
from ._checks import first_order_only


@torch.library.custom_op("rewardmap_kernels::scale_", mutates_args=("values",))
def scale_(values: Tensor, scale: Tensor) -> None:
    """values [R, C] *= scale (0-d), in place; costs no pass when the scale is 1, which it almost always is."""
    _rows.implementation("scale", values).scale_("scale", values, scale)


def taken(ctx: Any, operation: str, grad: Tensor) -> tuple[Tensor, ...]:
    """The gradients made in the forward, which backward hands over instead of copying; ``grad`` is what comes in.

    Raises RuntimeError where an earlier backward took them, where something else wrote over them, and where several are
    asked for at once.
    """
    first_order_only(operation)
    gone = f"the gradient of {operation} was handed over by an earlier backward or overwritten; call it again"
    if not torch.compiler.is_compiling():  # hooks that save tensors hide that they were written over
        batched = torch._C._functorch
        if batched.is_batchedtensor(grad) or batched.is_legacy_batchedtensor(grad):
            raise RuntimeError(f"{operation} hands its gradient over once: no batches (is_grads_batched, torch.vmap)")
        if getattr(ctx, "handed_over", False):
            raise RuntimeError(gone)
        ctx.handed_over = True
    try:
        made: tuple[Tensor, ...] = ctx.saved_tensors
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        raise RuntimeError(gone) from error
    return made


def scaled(values: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """values * grad in ``dtype``, rounded once; in place first: they are handed over."""
    scale_(values, grad)
    return values.to(dtype)
