"""Runs the PTX of a kernel on the CPU, in the numbers of a GPU, and says what a GPU would keep to itself.

Refused, with the line of PTX: an access outside the tensors that were passed, or unaligned; two threads that touch one
byte, one of them writing another value, without a barrier between them; a barrier that not all threads reach, or a wait
without end; memory that is touched while a copy is under way. Warps and blocks advance in an order drawn from ``seed``.
Shared memory begins as NaN. Nothing is said of speed.
"""

from __future__ import annotations

import ctypes
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from ptx_text import Instruction, Kernel
from ptx_traffic import Traffic

Mask = NDArray[np.bool_]
WARP = 32
WARPGROUP = 4 * WARP
SHARED = 1 << 24
"""Block b of a cluster has its shared memory at (b + 1) * SHARED, of the 32-bit addresses that a cluster shares."""
GENERIC = 1 << 60
"""A generic address of shared memory is its 32-bit address beyond this."""
NOBODY = -1
WARPS = {"shfl", "redux", "vote", "mma", "ldmatrix", "stmatrix", "elect"}
"""Instructions that a warp executes together."""


class PtxError(Exception):
    """What a GPU would do silently, or not at all."""


@dataclass
class Region:
    """Memory with what is known of it: who wrote and who read it last, and when. Known of ``grain`` bytes together, as
    many as every access so far has touched together."""

    begin: int
    values: NDArray[np.uint8]
    allowed: Mask | None = None
    owner: Block | None = None
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


@dataclass
class Launch:
    """One launch of one kernel. ``threads`` are along x. ``run`` is all there is to call."""

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

    def run(self) -> None:
        from ptx_operators import compiled

        if self.threads % WARP or self.threads > 1024:
            raise PtxError(f"{self.threads} threads")
        assert len(self.parameters) >= self.kernel.parameter_bytes
        self.chance = None if self.seed is None else random.Random(self.seed)
        self.code = compiled(self.kernel)
        self.leaders = {0, *self.kernel.labels.values()}
        meetings: set[int] = set()
        for i, instruction in enumerate(self.kernel.code):
            if instruction.parts[0] in WARPS or instruction.parts[:2] == ("bar", "warp"):
                meetings |= {i, i + 1}
            elif instruction.parts[0] in ("bra", "ret", "exit") or _waits(instruction):
                self.leaders |= {i, i + 1} if _waits(instruction) else {i + 1}
        self.meetings = meetings - self.leaders  # that whole warps pass without a stop
        x, y, z = self.grid
        assert x % self.cluster == 0
        indices = [(i, j, k) for k in range(z) for j in range(y) for i in range(x)]
        clusters = [indices[i : i + self.cluster] for i in range(0, len(indices), self.cluster)]
        if self.chance is not None:
            self.chance.shuffle(clusters)
        with np.errstate(all="ignore"):
            for indices in clusters:
                self._run_cluster(indices)

    def _run_cluster(self, indices: list[tuple[int, int, int]]) -> None:
        cluster = Cluster()
        cluster.blocks = [Block(self, index, rank, cluster) for rank, index in enumerate(indices)]
        while True:
            ready = [(b, pc, mask) for b in cluster.blocks for pc, mask in self._runnable(b)]
            if cluster.pending and (not ready or (self.chance is not None and self.chance.random() < 0.1)):
                cluster.pending.pop(self.chance.randrange(len(cluster.pending)) if self.chance else 0).finish()
                continue
            if not ready:
                break
            if self.chance is None:
                block, pc, mask = min(ready, key=lambda entry: entry[1])
            else:
                block, pc, mask = self.chance.choice(ready)
                if self.chance.random() < 0.7:  # who is behind, so that warps meet again
                    pc, mask = min((entry[1:] for entry in ready if entry[0] is block), key=lambda entry: entry[0])
                warpgroups = self.kernel.code[pc : pc + 1] and self.kernel.code[pc].parts[0] == "wgmma"
                mask = self._some_warps(mask, WARPGROUP if warpgroups else WARP)
            self._step(block, pc, mask)
        stuck = [b for b in cluster.blocks if b.live()]
        if stuck:
            raise PtxError("no thread can go on: " + "; ".join(self._where(b) for b in stuck))
        kept = [groups for b in cluster.blocks for (kind, _), groups in b.groups.items() if kind == "bulk"]
        unread = any(copy.drains for groups in kept for group in groups for copy in group)
        if unread or not all(load.seen.any() for load in cluster.loads):
            raise PtxError("a block ended before its bulk copies")

    def _where(self, block: Block) -> str:
        places = [f"{int(m.sum())} threads before {self.kernel.code[pc].text!r}" for pc, m in block.at.items()]
        places += [f"{int(m.sum())} of {block.live()} threads at barrier {n}" for n, m in block.arrived.items()]
        if block.rank in block.cluster.waiting:
            places.append(f"{int(block.cluster.waiting[block.rank][0].sum())} threads at the cluster's barrier")
        return f"block {block.index}: " + ", ".join(places)

    def _some_warps(self, mask: Mask, together: int) -> Mask:
        """Of the warps, or of ``together`` threads, that could go on, one or several."""
        assert self.chance is not None
        groups = mask.reshape(-1, together)
        there = np.flatnonzero(groups.any(1))
        if len(there) == 1 or self.chance.random() < 0.6:
            return mask
        chosen = self.chance.sample(list(there), self.chance.randrange(1, len(there) + 1))
        some = np.zeros_like(groups)
        some[chosen] = groups[chosen]
        return some.reshape(-1)

    def _runnable(self, block: Block) -> Iterator[tuple[int, Mask]]:
        for pc, mask in block.at.items():
            instruction = self.kernel.code[pc] if pc < len(self.kernel.code) else None
            if instruction is not None and _waits(instruction):
                whole = self.code[pc].ready(block, mask)
                if whole is None:
                    continue
                yield pc, whole
            else:
                yield pc, mask

    def _step(self, block: Block, pc: int, mask: Mask) -> None:
        """From ``pc`` to the next place where threads may part or meet."""
        rest = block.at.pop(pc) & ~mask
        if rest.any():
            block.at[pc] = rest
        every = bool(mask.all())
        rows = mask.reshape(-1, WARP)
        stops = self.leaders if (rows.all(1) == rows.any(1)).all() else self.leaders | self.meetings
        first = True
        while first or pc not in stops:
            first = False
            if pc >= len(self.kernel.code):
                raise PtxError(f"{self.kernel.name} runs off its end")
            instruction, operator = self.kernel.code[pc], self.code[pc]
            active, whole = mask, every
            if instruction.guard is not None:
                guard = block.registers[instruction.guard.name]
                active = mask & (~guard if instruction.negated else guard)
                whole = bool(active.all())
            try:
                if operator.control is not None:
                    operator.control(block, pc, mask, active)
                    return
                if whole or active.any():
                    if block.flight:
                        for name in operator.registers & block.flight.keys():
                            if (block.flight[name] & active).any():
                                raise PtxError(f"{name} belongs to a product that is under way")
                    operator.run(block, active, whole)
            except PtxError as error:
                raise PtxError(f"{self.kernel.name}, line {instruction.line}, {instruction.text!r}: {error}") from None
            pc += 1
        block.move(mask, pc)


def _waits(instruction: Instruction) -> bool:
    """Whether it needs other threads, or a copy, to be there."""
    parts = instruction.parts
    return parts[0] in ("bar", "barrier", "wgmma", *WARPS) or parts[:2] == ("mbarrier", "try_wait")


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
            region.values[index] = values[here]
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
    """Raises PtxError where a byte changes that another thread, or a copy, may still have to read or to write."""
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
