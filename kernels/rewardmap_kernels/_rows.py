"""What the fused operations share: the choice of the row operations, autocast, rows of a chunk, scales."""

from __future__ import annotations

import contextlib
import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import torch_rows
from ._checks import compute_dtype, number_on, positive, scalar_there
from .dispatch import choose
from .torch_rows import RowStatistics


def implementation(operation: str, tensor: Tensor) -> ModuleType:
    """``triton_launch``, ``native_rows`` or ``torch_rows``, as ``dispatch`` decides."""
    name = choose(operation, tensor)
    if name == "torch":
        return torch_rows
    if name == "native":
        from . import native_rows

        return native_rows
    from . import triton_launch

    return triton_launch


def no_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Products choose their own precision: autocast must not narrow them."""
    device = tensor.device.type
    return contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def autocast_operand(tensor: Tensor) -> Tensor:
    """The tensor as autocast would hand it to a matrix product."""
    device = tensor.device.type
    if tensor.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def differentiable(tensor: Tensor) -> Tensor:
    """Under no_grad the tensor detached: a Function is told of requires_grad alone and would make the
    gradients."""
    return tensor if torch.is_grad_enabled() else tensor.detach()


def divisor_of(normalizer: Tensor | float, like: Tensor, on: Tensor | None) -> Tensor:
    """The normaliser of the rows ``on`` as a tensor on ``like``'s device. See ``positive``."""
    if isinstance(normalizer, Tensor):
        made: Tensor = positive("normalizer", scalar_there(normalizer, like.device), like, on)
        return made.to(like.device)
    # torch.full would make the number a constant of a compiled graph: a compilation for every value.
    return torch.ones((), dtype=compute_dtype(like), device=like.device) * normalizer


def row_slice(value: Any, rows: slice) -> Any:
    """The rows of a per-row tensor; anything else as it is."""
    return value[rows] if isinstance(value, Tensor) and value.dim() else value


def joined(parts: list[RowStatistics], like: Tensor) -> RowStatistics:
    """Statistics of all rows from those of their chunks, none where there are no chunks."""
    none = like.new_empty(0, dtype=compute_dtype(like))
    return RowStatistics(*(torch.cat(values) for values in zip((none,) * 3, *parts, strict=True)))


def float16_scale(dtype: torch.dtype, normalizer: Tensor | float, like: Tensor) -> Tensor | None:
    """A power of two near the normaliser (0-d), by which float16 gradients are kept from underflowing; None
    otherwise."""
    if dtype != torch.float16:
        return None
    divisors = number_on(normalizer, like.device)
    known = torch.where(divisors > 0, divisors, math.inf)  # others spoil their own rows only
    smallest = known.amin() if known.numel() else torch.ones((), device=like.device)
    return torch.exp2(torch.floor(torch.log2(smallest.clamp(1.0, 2.0**100))))
