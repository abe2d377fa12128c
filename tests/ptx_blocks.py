"""Thread blocks of the machine in ``ptx_machine.py``, and how their threads reach memory: races and accesses out of
bounds are refused here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ptx_memory import GENERIC, NOBODY, SHARED, Copy, Mask, Memory, PtxError, Region
from ptx_text import Kernel
from ptx_traffic import Traffic

WARP = 32
WARPGROUP = 4 * WARP


@dataclass
class Launch:
    """One launch of one kernel. ``threads`` are along x."""

    kernel: Kernel
    grid: tuple[int, int, int]
    threads: int
    parameters: bytes
    memory: Memory
    cluster: int = 1
    dynamic_shared: int = 0
    seed: int | None = None
    """None: the fewest steps, all warps together. A number: warps and blocks advance by chance."""
    traffic: Traffic | None = None
    fenced_copies: bool = True
    """Whether ``cp.async`` needs a proxy fence before an asynchronous product reads what it brought."""


@dataclass
class Barrier:
    """An mbarrier: arrivals and bytes that its phase still waits for."""

    count: int
    arrivals: int
    bytes: int = 0
    phase: int = 0


class Block:
    """A thread block: registers, shared memory, and where its threads are."""

    def __init__(self, launch: Launch, index: tuple[int, int, int], rank: int, cluster: Cluster) -> None:
        self.launch, self.index, self.rank, self.cluster = launch, index, rank, cluster
        self.threads = launch.threads
        kernel = launch.kernel
        width = {8: np.bool_, 16: np.uint16, 32: np.uint32, 64: np.uint64}
        poison = 0xFFFFFFFFFFFFFFFF
        self.registers: dict[str, NDArray[Any]] = {}
        for name, bits in kernel.widths.items():
            self.registers[name] = np.full(self.threads, poison & ((1 << bits) - 1) if bits > 8 else 0, width[bits])
        size = kernel.shared_bytes + launch.dynamic_shared
        self.base = (rank + 1) * SHARED
        self.shared = Region(self.base, np.full(size, 0xFF, np.uint8), owner=self, dirty=np.zeros(size, bool))
        self.at: dict[int, Mask] = {0: np.ones(self.threads, bool)}
        self.arrived: dict[int, Mask] = {}  # barrier -> threads that wait at it
        self.resume: dict[int, int] = {}  # barrier -> where they go on
        self.epoch = 0
        self.warp_epoch = np.zeros(self.threads, np.int32)
        self.exited = np.zeros(self.threads, bool)
        self.visited = NOBODY  # the cluster's epoch in which another block last touched the shared memory
        self.barriers: dict[int, Barrier] = {}
        self.groups: dict[tuple[str, int], list[list[Copy]]] = {}
        """(kind, warpgroup, warp or thread) -> groups of copies, the last one still open."""
        self.flight: dict[str, Mask] = {}
        """Registers of products under way -> threads."""
        self.results: dict[tuple[int, tuple[str, ...]], Any] = {}
        """(Warpgroup, accumulators) -> what products under way will have made of them."""
        self.fenced: dict[int, dict[str, NDArray[Any]]] = {}
        """Warpgroup -> the registers at its last ``wgmma.fence``."""
        self.proxy_fence = np.full(self.threads, -1, np.int32)
        """Epoch of each thread's last ``fence.proxy.async``."""
        linear = (index[2] * launch.grid[1] + index[1]) * launch.grid[0] + index[0]
        self.uid = linear * 1024 + np.arange(self.threads, dtype=np.int64)

    def special(self, name: str) -> Any:
        launch = self.launch
        t = np.arange(self.threads, dtype=np.uint32)
        zero = np.zeros_like(t)
        axis = "xyz".find(name[-1]) if "." in name else 0
        kind = name.split(".")[0]
        size = launch.cluster
        values = {
            "tid": t if axis == 0 else zero,
            "laneid": t % WARP,
            "warpid": t // WARP,
            "ntid": launch.threads if axis == 0 else 1,
            "ctaid": self.index[axis],
            "nctaid": launch.grid[axis],
            "cluster_ctarank": self.rank,
            "cluster_nctarank": size,
            "cluster_ctaid": self.rank if axis == 0 else 0,
            "cluster_nctaid": size if axis == 0 else 1,
        }
        return np.broadcast_to(np.asarray(values[kind], np.uint32), (self.threads,))

    def move(self, mask: Mask, to: int) -> None:
        there = self.at.get(to)
        self.at[to] = mask if there is None else there | mask

    def live(self) -> int:
        return self.threads - int(self.exited.sum())

    def release(self) -> None:
        """The barriers that everyone has reached."""
        for name, mask in list(self.arrived.items()):
            if int(mask.sum()) == self.live():
                del self.arrived[name]
                self.move(mask, self.resume[name])
                self.epoch += 1
                self.cluster.meet(self.rank)


@dataclass
class Cluster:
    blocks: list[Block] = field(default_factory=list)
    epoch: int = 0
    waiting: dict[int, tuple[Mask, int]] = field(default_factory=dict)
    """Block -> its threads at the cluster's barrier, and where they go on."""
    pending: list[Copy] = field(default_factory=list)
    loads: list[Any] = field(default_factory=list)
    """``ptx_cluster.Load``: bulk loads that not all threads come after."""

    def meet(self, rank: int | None) -> None:
        """A barrier of one block, or of all: its threads come after the bulk loads that one of them has waited for."""
        for load in self.loads:
            seen = load.seen if rank is None else load.seen[rank]
            seen |= seen.any()
        self.loads = [load for load in self.loads if not load.seen.all()]

    def release(self) -> None:
        """The cluster's barrier, once everyone waits at it."""
        there = {rank: int(mask.sum()) for rank, (mask, _) in self.waiting.items()}
        if there and all(there.get(b.rank, 0) == b.live() for b in self.blocks):
            self.epoch += 1
            self.meet(None)
            for b in self.blocks:
                b.epoch += 1
                if b.rank in self.waiting:
                    b.move(*self.waiting.pop(b.rank))


def regions(block: Block, addresses: NDArray[np.int64], size: int) -> Iterator[tuple[Region, Any]]:
    """Each region that the addresses lie in, and which of them do. Raises PtxError for those in none."""
    if (addresses % size).any():
        raise PtxError(f"{size} bytes at {hex(int(addresses[addresses % size != 0][0]))}, which is no multiple")
    every = (*(b.shared for b in block.cluster.blocks), *block.launch.memory.regions)
    first, last = int(addresses.min()), int(addresses.max()) + size
    for region in every:
        if region.begin <= first and last <= region.end:
            yield region, slice(None)
            return
    left = np.ones(len(addresses), bool)
    for region in every:
        here = (addresses >= region.begin) & (addresses + size <= region.end)
        if here.any():
            left &= ~here
            yield region, here
    if left.any():
        at = hex(int(addresses[left][0]))
        raise PtxError(f"{size} bytes at {at} are neither shared memory nor of a tensor passed")


def touch(
    block: Block, mask: Mask, addresses: NDArray[np.int64], size: int, values: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """Reads [active threads, size] bytes at the addresses of the active threads, or writes ``values``."""
    addresses = np.where(addresses >= GENERIC, addresses - GENERIC, addresses)
    out = np.empty((len(addresses), size), np.uint8) if values is None else values
    threads = np.flatnonzero(mask)
    for region, here in regions(block, addresses, size):
        if block.launch.traffic is not None:
            kind = f"{'global' if region.owner is None else 'shared'} {'read' if values is None else 'write'}"
            block.launch.traffic.add(threads[here], addresses[here], size, kind)
        index = (addresses[here] - region.begin)[:, None] + np.arange(size)
        if region.allowed is not None and not region.allowed[index].all():
            raise PtxError("an access to an mbarrier, or between the elements of the tensors passed")
        reach(block, region, index, threads[here])
        if values is None:
            note_read(block, region, index, threads[here])
            out[here] = region.values[index]
        else:
            note_write(block, region, index, threads[here], values[here])
    return out


Index = NDArray[np.int64]
EPOCH = 21
EPOCHS = (1 << EPOCH) - 1


def reach(block: Block, region: Region, index: Index, who: Index) -> None:
    """Raises PtxError for shared memory of a block that is not there, or that a bulk load has not reached for sure."""
    if region.owner is None:
        return
    if region.owner is not block:
        region.owner.visited = block.cluster.epoch
        if block.cluster.epoch == 0:
            raise PtxError("the shared memory of a block that may not have begun")
    if not region.owner.live():
        raise PtxError("the shared memory of a block that has ended")
    for load in block.cluster.loads:
        if load.region is region and not (seen := load.seen[block.rank, who]).all():
            late = (index >= load.span.start) & (index < load.span.stop) & ~seen[:, None]
            if late.any():
                raise PtxError(f"thread {who[late.any(1)][0]} has not waited for the bulk load of these bytes")


def _times(block: Block, who: Index) -> Index:
    """The epochs of each thread, [n, 1]: the cluster's, the block's, the warp's, of 21 bits each."""
    return ((block.cluster.epoch << EPOCH | block.epoch) << EPOCH | block.warp_epoch[who].astype(np.int64))[:, None]


def _unordered(block: Block, uid: Index, now: Index, other: Index, then: Index) -> Mask:
    """Where the access of another thread, ``then``, need not have come before that of ``uid``, ``now``."""
    same_block = other >> 10 == uid >> 10
    found = (other != NOBODY) & (other != uid) & ~(same_block & ((then ^ now) & EPOCHS << EPOCH != 0))
    if found.any():
        in_cluster = (other >> 10) // block.launch.cluster == (uid >> 10) // block.launch.cluster
        found &= same_block | ~in_cluster | (then >> 2 * EPOCH == now >> 2 * EPOCH)
        found &= (other >> 5 != uid >> 5) | ((then ^ now) & EPOCHS == 0)
    return found


def note_read(block: Block, region: Region, index: Index, who: Index) -> None:
    """Raises PtxError where another thread's write, or a copy, need not have come before."""
    first, at = region.grains(index)
    if region.filled[first].any():
        raise PtxError("a copy to these bytes is still under way")
    uid, now = block.uid[who][:, None], _times(block, who)
    race = _unordered(block, uid, now, region.writer[at], region.written[at])
    if race.any():
        row, column = np.argwhere(race)[0]
        writer = region.writer[at][row, column] & 1023
        raise PtxError(f"thread {who[row]} reads what thread {writer} has just written")
    reader, then, readers = region.reader[at], region.read[at], region.readers[at]
    # Earlier reads are forgotten once they are known to have come before.
    kept = _unordered(block, uid, now, reader, then)
    kept |= (reader >> 10 == uid >> 10) & np.where(readers == 2, then >> EPOCH == now >> EPOCH, then == now)
    several = np.where(reader >> 5 == uid >> 5, (reader != uid).astype(np.int8), np.int8(2))
    region.readers[at] = np.where(kept, np.maximum(readers, several), np.int8(0))
    region.reader[at], region.read[at] = uid, now
    crowd = region.reader[at] != uid  # of one instruction
    if crowd.any():
        same = region.reader[at] >> 5 == uid >> 5
        np.maximum.at(region.readers, at[crowd], np.where(same[crowd], np.int8(1), np.int8(2)))


def note_write(block: Block, region: Region, index: Index, who: Index, values: NDArray[np.uint8]) -> None:
    """Writes; raises PtxError where a byte changes that another thread, or a copy, may still have to read or write."""
    first, at = region.grains(index)
    if region.filled[first].any() or region.drained[first].any():
        raise PtxError("a copy of these bytes is still under way")
    uid, now = block.uid[who][:, None], _times(block, who)
    changed = (region.values[index] != values).reshape(*at.shape, -1).any(2)
    reader, readers = region.reader[at], region.readers[at]
    own_warp = reader >> 5 == uid >> 5
    # Of several readers one is known: the others are in its warp, or in another.
    reader = np.where((readers == 1) & (reader == uid), uid ^ 1, np.where((readers == 2) & own_warp, uid ^ 512, reader))
    for other, then in (region.writer[at], region.written[at]), (reader, region.read[at]):
        race = changed & _unordered(block, uid, now, other, then)
        if race.any():
            row, column = np.argwhere(race)[0]
            raise PtxError(f"thread {who[row]} writes where thread {other[row, column] & 1023} may not have been yet")
    region.values[index] = values
    if (region.values[index] != values).any():
        raise PtxError("two threads write different values to one place")
    region.writer[at], region.written[at] = uid, now
    if region.dirty is not None:
        region.dirty[index] = True
