"""Memory of the machine in ``ptx_machine.py``: tensors at their own addresses, shared memory, copies under way."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
SHARED = 1 << 24
"""Block b of a cluster has its shared memory at (b + 1) * SHARED, of the 32-bit addresses that a cluster shares."""
GENERIC = 1 << 60
"""A generic address of shared memory is its 32-bit address beyond this."""
NOBODY = -1


class PtxError(Exception):
    """What a GPU would do silently, or not at all."""


@dataclass
class Region:
    """Memory with what is known of it: who wrote and who read it last, and when. Known of ``grain`` bytes together, as
    many as every access so far has touched together."""

    begin: int
    values: NDArray[np.uint8]
    allowed: Mask | None = None
    owner: Any = None
    """The block, of shared memory."""
    dirty: Mask | None = None
    """Of shared memory: written by a thread that has made no fence to the proxy of asynchronous copies since."""

    def __post_init__(self) -> None:
        self.grain = min(16, self.begin & -self.begin)
        size = -(-len(self.values) // self.grain)
        self.writer, self.reader = (np.full(size, NOBODY, np.int64) for _ in range(2))
        self.written, self.read = (np.full(size, -1, np.int64) for _ in range(2))  # times: see ``_times``
        self.readers = np.zeros(size, np.int8)  # at that time: 0 one, 1 several of a warp, 2 of several warps
        self.filled, self.drained = (np.zeros(len(self.values), np.int16) for _ in range(2))  # by copies under way

    @property
    def end(self) -> int:
        return self.begin + len(self.values)

    def grains(self, index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of accesses to neighbouring bytes [n, size]: the first byte of each grain, and which grain it is."""
        grain = math.gcd(index.shape[1], self.grain)
        if grain < self.grain:
            size = -(-len(self.values) // grain)
            for name in ("writer", "reader", "written", "read", "readers"):
                setattr(self, name, np.repeat(getattr(self, name), self.grain // grain)[:size])
            self.grain = grain
        first = index[:, ::grain]
        return first, first // grain


class Memory:
    """The tensors that a kernel may touch, at their own addresses."""

    def __init__(self, tensors: Any) -> None:
        self.regions: list[Region] = []
        spans: list[tuple[int, int, torch.Tensor]] = []
        for tensor in tensors:
            if tensor.numel():
                elements = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
                begin = tensor.data_ptr()
                spans.append((begin, begin + elements * tensor.itemsize, tensor))
        spans.sort(key=lambda span: span[:2])
        while spans:
            begin, end, _ = spans[0]
            group = [spans.pop(0)]
            while spans and spans[0][0] < end:
                group.append(spans.pop(0))
                end = max(end, group[-1][1])
            allowed = torch.zeros(end - begin, dtype=torch.bool)
            for at, _, tensor in group:
                strides = [s * tensor.itemsize for s in tensor.stride()]
                torch.as_strided(
                    allowed, (*tensor.shape, tensor.itemsize), (*strides, 1), at - begin
                ).fill_(True)  # fmt: skip
            self.regions.append(Region(begin, _bytes_at(begin, end - begin), allowed.numpy()))


def _bytes_at(address: int, size: int) -> NDArray[np.uint8]:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


class Copy:
    """An asynchronous copy under way: ``move`` does it; it reads ``drains`` and writes ``fills``, (region, index) of
    shared memory."""

    def __init__(
        self,
        move: Callable[[], None],
        drains: tuple[Region, Any] | None = None,
        fills: tuple[Region, Any] | None = None,
    ) -> None:
        self.move, self.drains, self.fills, self.done = move, drains, fills, False
        self.registers: tuple[str, ...] = ()
        """That it reads or writes."""
        self._count(1)

    def finish(self) -> None:
        if not self.done:
            self.done = True
            self._count(-1)
            self.move()

    def _count(self, step: int) -> None:
        if self.drains is not None:
            self.drains[0].drained[self.drains[1]] += step
        if self.fills is not None:
            self.fills[0].filled[self.fills[1]] += step
