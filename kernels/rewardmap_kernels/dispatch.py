"""Which implementation runs: Triton kernels, C++ or plain torch. Decided per call, said once, never silent.

Triton runs for CUDA tensors when the ``triton`` package is there, and for CPU tensors under its interpreter
(``TRITON_INTERPRET=1``, for tests). C++ ("native") runs for float32 and bfloat16 CPU tensors where it can be
compiled. float64 always runs in plain torch. Every decision is kept for ``last_path``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

Implementation = Literal["triton", "native", "torch"]
IMPLEMENTATIONS: tuple[Implementation, ...] = ("triton", "native", "torch")
NATIVE_OPERATIONS = (
    "decode_attention", "group_advantage", "linear_logprobs", "linear_policy_loss", "logits_policy_loss", "scale",
    "selective_log_softmax",
)  # fmt: skip

_LOGGER = logging.getLogger("rewardmap_kernels")
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_forced: list[Implementation] = []
_last: dict[str, tuple[Implementation, list[str]]] = {}
_said: set[str] = set()


@contextlib.contextmanager
def use_implementation(name: Implementation) -> Iterator[None]:
    """Run every operation of the process, in all its threads, by ``name`` until the block ends.

    ``name``: "triton", "native" or "torch"; where it cannot run, the operation raises ValueError. Raises ValueError for
    another name.
    """
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation = {name!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def _why_not_triton(tensor: Tensor) -> str | None:
    if not _HAS_TRITON:
        return "triton is not installed"
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{tensor.dtype} has no Triton kernel"
    if tensor.device.type == "cuda":
        return None
    if tensor.device.type != "cpu" or os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {tensor.device.type}"
    return "Triton's interpreter is wrong in bfloat16" if tensor.dtype == torch.bfloat16 else None


def _why_not_native(operation: str, tensor: Tensor) -> str | None:
    if operation not in NATIVE_OPERATIONS:
        return f"{operation} has no C++ kernel"
    if tensor.device.type != "cpu":
        return f"the tensors are on {tensor.device.type}"
    if tensor.dtype not in (torch.float32, torch.bfloat16):
        return f"{tensor.dtype} has no C++ kernel"
    # Late: ``python -m rewardmap_kernels.native`` must not be imported before it runs, nor torch._dynamo for nothing.
    from . import native

    return native.unavailable_reason()


def choose(operation: str, tensor: Tensor, refusal: str | None = None) -> Implementation:
    """The implementation that ``operation`` runs by for tensors like ``tensor``; recorded and said once.

    ``refusal``: why this call has no Triton kernel, None where it has one.
    """
    forced = _forced[-1] if _forced else None
    reasons: dict[Implementation, str | None] = {"torch": None}
    name: Implementation = "torch"
    for candidate in IMPLEMENTATIONS[:-1]:
        if forced not in (None, candidate):
            reasons[candidate] = f"use_implementation asked for {forced}"
            continue
        reasons[candidate] = (
            refusal or _why_not_triton(tensor) if candidate == "triton" else _why_not_native(operation, tensor)
        )
        if reasons[candidate] is None:
            name = candidate
            break
    if forced not in (None, name):
        raise ValueError(f"{operation} cannot run by {forced}: {reasons[forced]}")
    if not torch.compiler.is_compiling():  # a traced record would become a guard that every call breaks
        _last[operation] = (name, [])
        _say(operation, name, reasons)
    return name


def _say(operation: str, name: Implementation, reasons: dict[Implementation, str | None]) -> None:
    why = "; ".join(f"{candidate}: {reason}" for candidate, reason in reasons.items() if reason is not None)
    line = f"{operation} runs by {name}" + (f" ({why})" if why else "")
    if line not in _said:
        _said.add(line)
        _LOGGER.info(line)


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Where to launch a Triton kernel: it goes to the current device, whatever its arguments' is."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()


def launched(operation: str, kernel: str) -> None:
    """Note that ``operation`` launched the kernel of that name."""
    if kernel not in _last[operation][1]:
        _last[operation][1].append(kernel)


def last_path(operation: str) -> tuple[Implementation, tuple[str, ...]] | None:
    """How ``operation`` ran last: "triton", "native" or "torch", and the kernels launched. None before the first
    call."""
    found = _last.get(operation)
    return None if found is None else (found[0], tuple(found[1]))
