"""Input checks shared by every operation: one clear ``ValueError`` with names and values, before any work."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.forward_ad import unpack_dual


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype arithmetic is done in: float64 stays, everything else becomes float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def readable(tensor: Tensor) -> bool:
    """Whether the host can look at the values: no accelerator to wait for, no compiler, no fake tensor."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(tensor, FakeTensor)


def check_tensor(name: str, value: object) -> None:
    """Raise unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def check_integer(name: str, value: object) -> None:
    """Raise unless ``value`` is an integer (a compiler's too)."""
    if not isinstance(value, Integral | torch.SymInt):
        raise ValueError(f"{name} must be an integer, got {value!r}")


def check_floating(name: str, tensor: Tensor, dims: int) -> None:
    """Raise unless ``tensor`` is a floating-point tensor of ``dims`` dimensions."""
    check_tensor(name, tensor)
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
    if tensor.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimension(s), got shape {tuple(tensor.shape)}")


def check_rows(name: str, tensor: Tensor | None, like: Tensor, rows: int, kind: str = "float") -> None:
    """Raise unless ``tensor`` is None or a [rows] vector of the kind on ``like``'s device.

    ``kind``: "float", "int" (int32 or int64) or "mask" (bool, integer or float).
    """
    if tensor is None:
        return
    check_tensor(name, tensor)
    if tuple(tensor.shape) != (rows,):
        raise ValueError(f"{name} must have shape ({rows},), got {tuple(tensor.shape)}")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, expected {like.device}")
    if kind == "float" and not tensor.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
    if kind == "int" and tensor.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 or int64, got {tensor.dtype}")


def check_range(name: str, tensor: Tensor, low: int, high: int) -> None:
    """Raise unless every value of the integer ``tensor`` is in [low, high).

    On an accelerator the check runs as an asynchronous device assertion, so that it costs no host
    synchronisation.
    """
    if tensor.numel() == 0:
        return
    if readable(tensor):
        smallest, largest = int(tensor.min()), int(tensor.max())
        if smallest < low or largest >= high:
            row = int(((tensor < low) | (tensor >= high)).nonzero()[0, 0])
            raise ValueError(f"{name}[{row}] = {int(tensor[row])} is outside [{low}, {high})")
    else:
        # A bound in the message would become a constant of a compiled graph: one graph per length.
        bounds = "its range" if torch.compiler.is_compiling() else f"[{low}, {high})"
        torch._assert_async(((tensor >= low) & (tensor < high)).all(), f"{name} has values outside {bounds}")


def check_no_overlap(name: str, matrix: Tensor) -> None:
    """Raise unless every element of ``matrix`` [R, C], which is written to, has memory of its own."""
    dimensions = list(zip(matrix.shape, matrix.stride(), strict=True))
    row_major = matrix.stride(1) <= matrix.stride(0)
    (outer, outer_stride), (inner, inner_stride) = dimensions if row_major else dimensions[::-1]
    if (inner > 1 and inner_stride < 1) or (outer > 1 and outer_stride <= (inner - 1) * inner_stride):
        shape = tuple(matrix.shape)
        raise ValueError(f"{name} is written to, but its elements overlap: shape {shape}, strides {matrix.stride()}")


def check_normalizer(normalizer: Tensor | float, like: Tensor, rows: int) -> None:
    """Raise unless ``normalizer`` is a positive number, a 0-d tensor or a [rows] tensor on ``like``'s
    device."""
    if isinstance(normalizer, Tensor):
        if normalizer.dim() > 1 or (normalizer.dim() == 1 and normalizer.shape[0] != rows):
            raise ValueError(f"normalizer must be 0-d or of shape ({rows},), got {tuple(normalizer.shape)}")
        if normalizer.dim() == 1 and normalizer.device != like.device:
            raise ValueError(f"normalizer is on {normalizer.device}, expected {like.device}")
    elif not isinstance(normalizer, Real | torch.SymInt | torch.SymFloat) or not normalizer > 0:
        raise ValueError(f"normalizer must be positive, got {normalizer!r}")


def check_temperature(temperature: Tensor | float, like: Tensor, rows: int) -> None:
    """Raise unless ``temperature`` is a positive, finite number or a [rows] floating tensor on ``like``'s device."""
    if isinstance(temperature, Tensor):
        check_rows("temperature", temperature, like, rows)
        if temperature.requires_grad and torch.is_grad_enabled():
            raise ValueError("temperature gets no gradient; pass it detached")
    elif not isinstance(temperature, Real | torch.SymFloat) or not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature!r}")


def temperatures(temperature: Tensor | float) -> tuple[Tensor | None, float]:
    """(per row, or None; one number for all rows, 1 where each has its own)."""
    return (temperature, 1.0) if isinstance(temperature, Tensor) else (None, float(temperature))


def positive(name: str, values: Tensor | float, like: Tensor, on: Tensor | None, finite: bool = False) -> Any:
    """What the rows ``on`` (None: all) of ``like`` are divided by: ``values`` 0-d or [N], a number as it is. The other
    rows, which may hold anything, get infinity.

    Raises ValueError for one that is not positive (``finite``: or infinite), in compiled code RuntimeError. On an
    accelerator, whose values the host cannot read without waiting, it becomes NaN instead, and so do its row's results.
    """
    if not isinstance(values, Tensor):
        return values
    good = (values > 0) & (values < math.inf) if finite else values > 0
    counts = None if on is None else on != 0
    if like.device.type == "cpu":
        fine = good if counts is None else good | ~counts
        wanted = "positive and finite" if finite else "positive"
        if not readable(fine):
            torch._assert_async(fine.all(), f"{name} must be {wanted}")
        elif not fine.all():
            row = int((~fine).nonzero()[0, 0]) if values.dim() else None
            found = float(values) if row is None else f"{float(values[row])} in row {row}"
            raise ValueError(f"{name} must be {wanted}, got {found}")
    else:
        values = torch.where(good, values, math.nan)
    return values if counts is None or not values.dim() else torch.where(counts, values, math.inf)


def check_linear(hidden: Tensor, weight: Tensor, targets: Tensor, slices: int = 1) -> None:
    """Raise unless hidden [N, H], weight [V / slices, H] and targets [N] fit one another."""
    check_floating("hidden", hidden, 2)
    check_floating("weight", weight, 2)
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"hidden has width {hidden.shape[1]} and weight has width {weight.shape[1]}; they must agree")
    if weight.device != hidden.device:
        raise ValueError(f"weight is on {weight.device}, expected {hidden.device}")
    if (weight.dtype == torch.float64) != (hidden.dtype == torch.float64):
        raise ValueError(f"hidden is {hidden.dtype} and weight is {weight.dtype}; float64 does not mix")
    check_targets(targets, hidden, weight.shape[0] * slices)


def check_targets(targets: Tensor, like: Tensor, vocab: int) -> None:
    """Raise unless targets is an integer [N] vector of values in [0, vocab)."""
    if targets is None:
        raise ValueError("targets must be an integer [N] tensor, got None")
    check_rows("targets", targets, like, like.shape[0], "int")
    if vocab == 0:
        raise ValueError("the vocabulary is empty")
    check_range("targets", targets, 0, vocab)


def check_row_index(rows: Tensor, like: Tensor) -> None:
    """Raise unless ``rows`` is an int64 [M] index of distinct rows of ``like``, on its device."""
    check_tensor("rows", rows)
    if rows.dim() != 1 or rows.dtype != torch.int64 or rows.device != like.device:
        found = f"{rows.dtype} {tuple(rows.shape)} on {rows.device}"
        raise ValueError(f"rows must be int64 [M] on {like.device}, got {found}")
    check_range("rows", rows, 0, like.shape[0])
    times = torch.zeros(like.shape[0], dtype=torch.int32, device=rows.device)
    times.index_add_(0, rows, torch.ones_like(rows, dtype=torch.int32))
    if readable(rows):
        if len(rows) and int(times.max()) > 1:
            raise ValueError(f"rows must be distinct, got {int(times.argmax())} {int(times.max())} times")
    else:
        torch._assert_async((times <= 1).all(), "rows must be distinct")


def check_transforms(operation: str, *inputs: Tensor | None) -> None:
    """Raise RuntimeError under torch.func's transforms and for inputs with a forward-mode tangent: without a rule for
    them an operation's derivative would be 0 there, compiled or under no_grad (which does not end forward mode)."""
    if not torch.compiler.is_compiling() and any(
        value is not None and unpack_dual(value).tangent is not None for value in inputs
    ):
        raise RuntimeError(f"{operation} has no forward-mode derivative; differentiate by backward")
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(f"{operation} does not take torch.func's transforms; differentiate by backward")


def first_order_only(operation: str) -> None:
    """Raise RuntimeError in a backward with create_graph=True: a second derivative would be 0, which it is not."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{operation} has first-order gradients only, and create_graph=True asks for more")


def number_on(value: Tensor | float, device: torch.device) -> Tensor:
    """A tensor on ``device``, float32. A number is filled in there: copied, a GPU's host would wait for it."""
    if isinstance(value, Tensor):
        return scalar_there(value, device).to(device, torch.float32)
    return torch.full((), float(value), dtype=torch.float32, device=device)


def scalar_there(value: Tensor, device: torch.device) -> Tensor:
    """A 0-d CPU tensor on ``device``, as the argument of a kernel, for which the host need not wait; others as they
    are."""
    if value.device == device or value.dim() or value.device.type != "cpu":
        return value
    return torch.ones((), dtype=compute_dtype(value), device=device) * value
