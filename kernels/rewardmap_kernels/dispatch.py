"""Which implementation runs: Triton kernels or plain torch. Decided per call, said once, never silent.

Triton runs for CUDA tensors when the ``triton`` package is there, and for CPU tensors under its interpreter
(``TRITON_INTERPRET=1``, for tests). float64 always runs in plain torch. Every decision is kept for
``last_path``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

Implementation = Literal["triton", "torch"]

_LOGGER = logging.getLogger("rewardmap_kernels")
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_forced: list[Implementation] = []
_last: dict[str, tuple[Implementation, list[str]]] = {}
_said: set[str] = set()


@contextlib.contextmanager
def use_implementation(name: Implementation) -> Iterator[None]:
    """Run every operation inside the block by ``name``; "triton" where it cannot run raises ValueError."""
    if name not in ("triton", "torch"):
        raise ValueError(f"implementation = {name!r} is not one of triton, torch")
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


def choose(operation: str, tensor: Tensor, refusal: str | None = None) -> Implementation:
    """The implementation that ``operation`` runs by for tensors like ``tensor``; recorded and said once.

    ``refusal``: why this call has no Triton kernel, None where it has one.
    """
    reason = refusal or _why_not_triton(tensor)
    if _forced and _forced[-1] == "triton" and reason is not None:
        raise ValueError(f"{operation} cannot run by triton: {reason}")
    if _forced and _forced[-1] == "torch":
        reason = "use_implementation asked for it"
    name: Implementation = "triton" if reason is None else "torch"
    _last[operation] = (name, [])
    if torch.compiler.is_compiling():
        return name
    line = f"{operation} runs by {name}" + (f": {reason}" if reason else "")
    if line not in _said:
        _said.add(line)
        _LOGGER.info(line)
    return name


def launched(operation: str, kernel: str) -> None:
    """Note that ``operation`` launched the Triton kernel of that name."""
    if kernel not in _last[operation][1]:
        _last[operation][1].append(kernel)


def last_path(operation: str) -> tuple[Implementation, tuple[str, ...]] | None:
    """How ``operation`` ran last: "torch" or "triton", and the kernels launched. None before the first
    call."""
    found = _last.get(operation)
    return None if found is None else (found[0], tuple(found[1]))
