"""A GPU for Triton that is a program: launches go through Triton's own path and compiler, and ``ptx_machine.py`` runs
what the compiler made of the kernel. Tensors are the CPU's.

    with ptx_gpu(90):
        kernel[grid](...)
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from ptx_blocks import Launch
from ptx_machine import run
from ptx_memory import Memory
from ptx_text import Kernel, parse
from ptx_traffic import Traffic
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver

SHARED_BYTES = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""That a block may have, by compute capability."""
FENCED_COPIES = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)
"""Before, Triton left out the proxy fence between ``cp.async`` and ``wgmma``."""
RUNS: Counter[str] = Counter()
"""Kernel -> launches."""


@contextmanager
def ptx_gpu(
    capability: int, seed: int | None = None, edit: Callable[[str], str] = str, traffic: Traffic | None = None
) -> Iterator[Counter[str]]:
    """Launches inside the block run as on this compute capability; see ``Launch`` for ``seed`` and ``traffic``.
    ``edit``: of the PTX, to see that a fault shows. Yields ``RUNS``."""
    RUNS.clear()
    target = GPUTarget("cuda", capability, 32)
    active = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: capability,  # Triton keeps what it has compiled by device
        get_current_stream=lambda device: 0,
        get_active_torch_device=lambda: torch.device("cpu"),
    )

    def launcher(compiled: Any) -> Any:
        kernel = parse(edit(compiled.asm["ptx"]))

        def launch(x: int, y: int, z: int, stream: Any, function: Any, packed: Any, meta: Any, *rest: Any) -> None:
            _launch(compiled, kernel, SHARED_BYTES[capability], (x, y, z), rest[2:], seed, traffic)

        return launch

    before = driver._active
    driver.set_active(active)
    try:
        with (
            mock.patch.object(CompiledKernel, "_init_handles", lambda compiled: None),
            mock.patch.object(CompiledKernel, "run", property(launcher)),
        ):
            yield RUNS
    finally:
        driver._active = before


def _launch(
    compiled: Any, kernel: Kernel, limit: int, grid: tuple[int, int, int], given: Sequence[Any], seed: int | None,
    traffic: Traffic | None,
) -> None:  # fmt: skip
    metadata = compiled.metadata
    if metadata.shared > limit:
        raise RuntimeError(f"{kernel.name} wants {metadata.shared} bytes of shared memory of {limit}")
    kinds = list(compiled.src.signature.values())
    values = [value for value, kind in zip(given, kinds, strict=True) if kind != "constexpr"]
    raw = bytearray(kernel.parameter_bytes)
    for parameter, value in zip(kernel.parameters, [*values, 0, 0], strict=True):
        if isinstance(value, torch.Tensor):
            value = value.data_ptr()
        form = "f" if isinstance(value, float) else {4: "i", 8: "Q" if value >= 0 else "q"}[parameter.size]
        struct.pack_into(form, raw, parameter.offset, value)
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    assert not metadata.global_scratch_size and metadata.num_ctas == 1
    RUNS[kernel.name] += 1
    run(Launch(
        kernel, grid, 32 * metadata.num_warps, bytes(raw), Memory(tensors), 1, metadata.shared, seed, traffic,
        FENCED_COPIES,
    ))  # fmt: skip
