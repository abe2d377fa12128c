"""The experimental Hopper kernel of ``logits_policy_loss``: off unless asked for, since no GPU has measured it yet.

Inside ``with experimental_hopper():`` bfloat16 logits on an sm_90 GPU whose gradient is written in place go through it
where ``refusal`` is None; everything else goes to Triton, said once.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import native
from ._checks import number_on, temperatures
from .objective import CLIPPED, PolicyObjective
from .torch_rows import FusedRows

STAGES = 3
STAGE_BYTES = (232_448 - 1_024) // STAGES
"""Of a block's shared memory; 1,024 for barriers and what blocks tell each other."""
CLUSTERS = (1, 2, 4, 8)
VECTOR = 8
"""bfloat16 values in the 16 bytes that bulk copies are aligned to."""

_LOGGER = logging.getLogger("rewardmap_kernels")
_enabled: list[bool] = []
_KINDS = ("clipped", "cispo", "sapo", "reinforce")
_KL = ("none", "k1", "k2", "k3")
_IMPORTANCE = ("none", "truncate", "mask")


class _Objective(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("kind", "kl", "importance")),
        *((name, ctypes.c_bool) for name in ("has_old", "has_dual_clip", "has_delta", "kl_bias")),
        *(
            (name, ctypes.c_float)
            for name in (
                "clip_low", "clip_high", "dual_clip", "delta", "kl_coef", "entropy_coef", "importance_min",
                "importance_max", "tau_positive", "tau_negative",
            )
        ),
    ]  # fmt: skip


class Arguments(ctypes.Structure):
    """csrc/cuda/kernel_arguments.h, field by field."""

    _fields_ = [
        ("logits", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("stride", "rows", "vocab")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "targets", "temperatures", "keep", "advantages", "old_logprobs", "ref_logprobs", "rollout_logprobs",
                "normalizer",
            )
        ),
        ("normalizer_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("logprobs", "entropy", "d_logprob")),
        ("temperature", ctypes.c_float),
        ("objective", _Objective),
    ]  # fmt: skip


@contextlib.contextmanager
def experimental_hopper(on: bool = True) -> Iterator[None]:
    """Use the kernel inside the block where it can run."""
    _enabled.append(on)
    try:
        yield
    finally:
        _enabled.pop()


def cluster_size(vocab: int) -> int | None:
    """Blocks that share a row: the fewest, 1 to 8, whose part fits a stage and is whole 16-byte vectors; else None."""
    for size in CLUSTERS:
        if vocab % (size * VECTOR) == 0 and vocab // size * 2 <= STAGE_BYTES:
            return size
    return None


def refusal(logits: Tensor, in_place: bool) -> str | None:
    """Why the kernel cannot take these logits, None where it can (its library is then built and loaded)."""
    if not in_place:
        return "the gradient is not written in place"
    if logits.dtype != torch.bfloat16:
        return f"it is for bfloat16, not {logits.dtype}"
    if cluster_size(logits.shape[1]) is None:
        return f"V = {logits.shape[1]} cannot be split into parts of whole 16-byte vectors that fit"
    if logits.stride(1) != 1 or logits.stride(0) % VECTOR or logits.data_ptr() % 16:
        return f"rows of stride {logits.stride()} are not aligned to 16 bytes"
    return native.unavailable_reason("cuda")


@functools.cache
def _said(reason: str) -> None:
    _LOGGER.warning("logits_policy_loss runs by Triton instead of the Hopper kernel: %s", reason)


def wanted(logits: Tensor, in_place: bool) -> bool:
    """Whether this call goes to the kernel; says once why not where it was asked for."""
    if not _enabled or not _enabled[-1]:
        return False
    reason = refusal(logits, in_place)
    if reason is not None:
        _said(reason)
    return reason is None


@functools.cache
def _library() -> ctypes.CDLL:
    library = native.load_cuda(native.library("cuda"))
    library.rewardmap_logits_policy_loss.argtypes = [ctypes.POINTER(Arguments), ctypes.c_int, ctypes.c_void_p]
    return library


def _pointer(values: Tensor | None) -> int | None:
    return None if values is None else values.data_ptr()


def fused(
    logits: Tensor, targets: Tensor, temperature: Tensor | float, keep: Tensor | None, inputs: dict[str, Any]
) -> FusedRows:
    """See ``torch_rows.fused``; in place. Raises RuntimeError with CUDA's words where the launch fails."""
    o: PolicyObjective = inputs["objective"]
    assert not o.needs_sequence
    n, device = logits.shape[0], logits.device

    def vector(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.detach().to(device, torch.float32).contiguous()

    logprobs, entropy, d_logprob = (torch.empty(n, dtype=torch.float32, device=device) for _ in range(3))
    normalizer = number_on(inputs["normalizer"], device).detach().contiguous()
    # Kept alive until the launch: the kernel sees their addresses alone.
    index, on = targets.to(torch.int64).contiguous(), None if keep is None else keep.contiguous()
    per_row, number = temperatures(temperature)
    per_row = vector(per_row)
    given = [
        vector(inputs[name]) for name in ("advantages", "old_logprobs", "ref_logprobs", "rollout_logprobs")
    ]
    objective = _Objective(
        _KINDS.index("clipped" if o.name in CLIPPED else o.name), _KL.index(o.kl_estimator if o.kl_coef else "none"),
        _IMPORTANCE.index(o.importance_correction), given[1] is not None, o.dual_clip is not None, o.delta is not None,
        o.kl_bias_correction, 1.0 - o.clip_eps_low, 1.0 + o.clip_eps_high, o.dual_clip or 0.0, o.delta or 0.0,
        o.kl_coef, o.entropy_coef, o.importance_min, o.importance_max, o.sapo_temperature_pos, o.sapo_temperature_neg,
    )  # fmt: skip
    arguments = Arguments(
        logits.data_ptr(), logits.stride(0), n, logits.shape[1], index.data_ptr(), _pointer(per_row), _pointer(on),
        *(_pointer(values) for values in given), normalizer.data_ptr(), int(normalizer.dim() > 0),
        logprobs.data_ptr(), entropy.data_ptr(), d_logprob.data_ptr(),
        number, objective,
    )  # fmt: skip
    size = cluster_size(logits.shape[1])
    assert size is not None
    library = _library()
    if n:
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            error = library.rewardmap_logits_policy_loss(ctypes.byref(arguments), size, stream)
        if error:
            raise RuntimeError(f"the Hopper kernel was not launched: {library.rewardmap_cuda_error(error).decode()}")
    return FusedRows(logprobs, entropy, d_logprob, logits)
