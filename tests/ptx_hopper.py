"""The Hopper kernel in the machine: ``native_cuda.fused`` runs as it is, with CPU tensors, and its launch runs the PTX.

with hopper_gpu(compiled(folder), clusters=2, cluster=4):
    native_cuda.fused(...)
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from ptx_blocks import Launch
from ptx_machine import run
from ptx_memory import Memory
from ptx_text import parse

from rewardmap_kernels import native, native_cuda

THREADS = 512
FILES = ("objective.h", "cuda/pipeline.h", "cuda/kernel_arguments.h", "cuda/logits_policy_loss.cu")


def compiled(folder: Path, edit: tuple[str, str] | None = None) -> str:
    """The PTX of the shipped build, or of sources in which one text is another."""
    found = 0
    for name in FILES:
        text = (native.sources() / name).read_text()
        if edit is not None:
            found += text.count(edit[0])
            text = text.replace(*edit)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    assert edit is None or found == 1, f"{edit} is there {found} times"
    flags = [flag.replace("code=sm_90a", "code=compute_90a") for flag in native._NVCC_FLAGS]
    made = folder / "hopper.ptx"
    subprocess.run([native.compiler("cuda"), *flags, "--ptx", str(folder / FILES[-1]), "-o", str(made)], check=True)
    return made.read_text()


def _tensors(a: Any) -> list[torch.Tensor]:
    """What the kernel may touch, by the contract of kernel_arguments.h."""
    n, per_row = a.rows, (a.rows,)
    spans: list[tuple[int | None, torch.dtype, tuple[int, ...], tuple[int, ...]]] = [
        (a.logits, torch.bfloat16, (n, a.vocab), (a.stride, 1)),
        (a.targets, torch.int64, per_row, (1,)),
        (a.keep, torch.bool, per_row, (1,)),
        (a.normalizer, torch.float32, per_row if a.normalizer_stride else (1,), (1,)),
    ]
    for name in ("temperatures", "advantages", "old_logprobs", "ref_logprobs", "rollout_logprobs", "logprobs",
                 "entropy", "d_logprob"):  # fmt: skip
        spans.append((getattr(a, name), torch.float32, per_row, (1,)))
    made = []
    for address, dtype, shape, strides in spans:
        if address is not None:
            size = (1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))) * dtype.itemsize
            raw = torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)
            made.append(raw.view(dtype).as_strided(shape, strides))
    return made


@contextmanager
def hopper_gpu(ptx: str, clusters: int = 1, cluster: int | None = None, seed: int | None = None) -> Iterator[None]:
    """Launches run as on a GPU that has room for so many clusters. ``cluster``: blocks of one, where not those that
    ``native_cuda`` wants. ``seed``: see ``Launch``."""
    kernel = parse(ptx)

    def launch(reference: Any, size: int, stream: int) -> int:
        a = reference._obj
        assert ctypes.sizeof(a) == kernel.parameter_bytes and stream == 0
        dynamic = a.vocab // size * 2 * native_cuda.STAGES  # as the host code in logits_policy_loss.cu
        grid = (clusters * size, 1, 1)
        run(Launch(kernel, grid, THREADS, bytes(a), Memory(_tensors(a)), size, dynamic, seed))
        return 0

    library = SimpleNamespace(rewardmap_logits_policy_loss=launch)
    wanted = native_cuda.cluster_size if cluster is None else lambda vocab: cluster
    with (
        mock.patch.object(native_cuda, "_library", lambda: library),
        mock.patch.object(native_cuda, "cluster_size", wanted),
        mock.patch.object(torch.cuda, "device", lambda device: nullcontext()),
        mock.patch.object(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0)),
    ):
        yield
