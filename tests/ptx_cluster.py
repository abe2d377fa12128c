"""Thread-block clusters and bulk copies: mbarriers, the asynchronous proxy, other blocks' shared memory. See
``ptx_machine.py``.

A bulk load arrives when the scheduler wants; then its bytes are for the threads that have waited for its mbarrier, and
for those that a barrier puts after one of them. A bulk store is under way until its thread has waited for it, as late
as a GPU may. What ordinary stores wrote is for bulk copies only after the proxy fence of the thread that wrote.
An mbarrier orders bulk loads alone here, no ordinary accesses.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import ptx_copies
from ptx_blocks import Barrier, Block, note_read, note_write, reach
from ptx_memory import GENERIC, NOBODY, SHARED, Copy, Mask, PtxError, Region
from ptx_text import Instruction, Kernel, Number
from ptx_values import Maker, Operator, addresses, reader, write

ALIGNMENT = 16
"""Of both addresses and the size of a bulk copy, in bytes."""
TRANSACTIONS = (1 << 20) - 1
"""Bytes that a phase of an mbarrier can wait for."""


class Load(Copy):
    """A bulk load into shared memory, until all threads of the cluster come after it."""

    def __init__(self, block: Block, to: tuple[Region, slice], source: tuple[Region, slice], barrier: Barrier) -> None:
        super().__init__(self._arrive, source, to)
        self.region, self.span = to
        self.barrier = barrier
        self.phase: int | None = None
        self.seen = np.zeros((len(block.cluster.blocks), block.threads), bool)

    def _arrive(self) -> None:
        self.phase = self.barrier.phase
        self.barrier.bytes -= self.span.stop - self.span.start
        _turn(self.barrier)


class Store(Copy):
    """A bulk store out of shared memory. Its bytes have moved; only who may touch them is still open."""

    def __init__(self, source: tuple[Region, slice], to: tuple[Region, slice]) -> None:
        super().__init__(lambda: None, source, to)
        self.to = to

    def know(self, block: Block, thread: int, read: bool) -> None:
        """Its thread knows that it is over, or only that the source has been read; now others can come after it."""
        who = np.array([thread])
        if self.drains is not None:
            (region, span), self.drains = self.drains, None
            region.drained[span] -= 1
            note_read(block, region, _index(span), who)
        if not read:
            self.finish()
            region, span = self.to
            note_write(block, region, _index(span), who, region.values[span][None])


def _threads(mask: Mask) -> list[int]:
    return [int(thread) for thread in np.flatnonzero(mask)]


def _turn(barrier: Barrier) -> None:
    """The next phase, once nothing is left to wait for."""
    if barrier.arrivals == 0 and barrier.bytes == 0:
        barrier.phase += 1
        barrier.arrivals = barrier.count


# --- mbarriers --------------------------------------------------------------------------------------------------------


def mbarrier(kernel: Kernel, i: Instruction) -> Operator | None:
    """``mbarrier.init``, ``.arrive.expect_tx``, ``.try_wait.parity``."""
    if i.parts[1] == "init":
        return _init(kernel, i)
    if i.parts[1:3] == ("arrive", "expect_tx") and i.operands[0] is None and "relaxed" not in i.parts:
        return _expect(kernel, i)
    if i.parts[1:3] == ("try_wait", "parity") and "relaxed" not in i.parts and len(i.operands) == 3:
        return _wait(kernel, i)
    return None


def _found(b: Block, owner: Block, address: int, who: Any) -> Barrier:
    """The mbarrier there, whose initialisation must have come before the threads ``who``."""
    if address not in owner.barriers:
        raise PtxError(f"no mbarrier has been initialised at {hex(address)}")
    at = address - owner.base + np.arange(8)
    note_read(b, owner.shared, np.broadcast_to(at, (len(who), 8)), who)
    return owner.barriers[address]


def _init(kernel: Kernel, i: Instruction) -> Operator:
    at, count = addresses(kernel, i.operands[0]), reader(kernel, i.operands[1], "u32")

    def run(b: Block, m: Mask, w: bool) -> None:
        for thread in _threads(m):
            address, region, arrivals = int(at(b)[thread]), b.shared, int(count(b)[thread])
            if address % 8 or not region.begin <= address < region.end:
                raise PtxError(f"an mbarrier at {hex(address)}")
            if address in b.barriers:
                raise PtxError("this mbarrier has been initialised before")
            index = (address - region.begin + np.arange(8))[None]
            note_write(b, region, index, np.array([thread]), ~region.values[index])
            if region.allowed is None:
                region.allowed = np.ones(len(region.values), bool)
            region.allowed[index] = False  # to ordinary accesses
            b.barriers[address] = Barrier(arrivals, arrivals)

    return Operator(run)


def _expect(kernel: Kernel, i: Instruction) -> Operator:
    at, size = addresses(kernel, i.operands[1]), reader(kernel, i.operands[2], "u32")

    def run(b: Block, m: Mask, w: bool) -> None:
        for thread in _threads(m):
            barrier = _found(b, b, int(at(b)[thread]), np.array([thread]))
            if barrier.arrivals == 0:
                raise PtxError("more arrivals at an mbarrier than its phase has")
            barrier.bytes += int(size(b)[thread])
            if barrier.bytes > TRANSACTIONS:
                raise PtxError(f"{barrier.bytes} bytes are more than a phase can wait for")
            barrier.arrivals -= 1
            _turn(barrier)

    return Operator(run)


def _wait(kernel: Kernel, i: Instruction) -> Operator:
    at, parity = addresses(kernel, i.operands[1]), reader(kernel, i.operands[2], "u32")

    def over(barrier: Barrier | None, parity: Any) -> Any:
        return barrier is None or (barrier.phase & 1) != parity

    def ready(b: Block, mask: Mask) -> Mask | None:
        where, p = at(b), parity(b)
        on = np.zeros_like(mask)
        for address in np.unique(where[mask]):
            on |= mask & (where == address) & over(b.barriers.get(int(address)), p)
        return on if on.any() else None

    def run(b: Block, m: Mask, w: bool) -> None:
        where = at(b)
        for address in np.unique(where[m]):
            here = m & (where == address)
            barrier = _found(b, b, int(address), np.flatnonzero(here))
            for load in b.cluster.loads:
                if load.barrier is barrier and load.phase is not None and load.phase < barrier.phase:
                    load.seen[b.rank] |= here
        write(kernel, b, i.operands[0], np.ones(b.threads, bool), m, w)

    return Operator(run, ready=ready)


# --- proxies and other blocks -----------------------------------------------------------------------------------------


def fence(kernel: Kernel, i: Instruction) -> Operator | None:
    """``fence.mbarrier_init``, ``fence.proxy.async``."""
    init, spaces = i.parts[1] == "mbarrier_init", i.parts[3:]
    if not init and i.parts[1:3] != ("proxy", "async"):
        return None

    def run(b: Block, m: Mask, w: bool) -> None:
        if not init and spaces != ("global",):
            b.proxy_fence = np.where(m, b.epoch, b.proxy_fence)
        for block in [b] if init or spaces == ("shared::cta",) else b.cluster.blocks if spaces != ("global",) else []:
            region = block.shared
            assert region.dirty is not None
            index = np.flatnonzero(region.dirty if not init else region.dirty & ~_ordinary(region))
            writer = region.writer[index // region.grain]
            own = (writer >> 10 == b.uid[0] >> 10) & m[writer & 1023]
            region.dirty[index[own]] = False

    return Operator(run)


def _ordinary(region: Region) -> Any:
    return np.ones(len(region.values), bool) if region.allowed is None else region.allowed


def mapped(kernel: Kernel, i: Instruction) -> Operator | None:
    """``mapa``: the address in another block's shared memory."""
    generic, kind = i.parts[1] != "shared::cluster", i.parts[-1]
    value, rank = reader(kernel, i.operands[1], kind), reader(kernel, i.operands[2], "u32")

    def run(b: Block, m: Mask, w: bool) -> None:
        at, to = value(b).astype(np.int64), rank(b).astype(np.int64)
        own = at[m] - (GENERIC if generic else 0) - b.base
        if ((own < 0) | (own >= len(b.shared.values))).any():
            raise PtxError("this is no address of the block's own shared memory")
        if (to[m] >= len(b.cluster.blocks)).any():
            raise PtxError(f"the cluster has no block {int(to[m].max())}")
        write(kernel, b, i.operands[0], (at + (to - b.rank) * SHARED).astype(value(b).dtype), m, w)

    return Operator(run)


# --- bulk copies ------------------------------------------------------------------------------------------------------


def copy(kernel: Kernel, i: Instruction) -> Operator | None:
    """``cp.async.bulk`` beside the copies of single threads."""
    if i.parts[2] != "bulk":
        return ptx_copies.copy(kernel, i)
    form = i.parts[3:]
    if form == ("shared::cluster", "global", "mbarrier::complete_tx::bytes") and len(i.operands) == 4:
        return _load(kernel, i)
    if form == ("global", "shared::cta", "bulk_group") and len(i.operands) == 3:
        return _store(kernel, i)
    if form == ("commit_group",):
        return _commit()
    if form in (("wait_group",), ("wait_group", "read")) and isinstance(i.operands[0], Number):
        return _wait_group(i.operands[0].bits, "read" in form)
    return None


def _place(block: Block, address: int, size: int) -> tuple[Region, slice]:
    if address % ALIGNMENT or size % ALIGNMENT or not size:
        raise PtxError(f"a bulk copy of {size} bytes at {hex(address)}: both have to be multiples of {ALIGNMENT}")
    for region in (*(b.shared for b in block.cluster.blocks), *block.launch.memory.regions):
        if region.begin <= address and address + size <= region.end:
            span = slice(address - region.begin, address - region.begin + size)
            if region.allowed is not None and not region.allowed[span].all():
                raise PtxError("a bulk copy over an mbarrier, or between the elements of the tensors passed")
            return region, span
    raise PtxError(f"{size} bytes at {hex(address)} are neither shared memory nor of a tensor passed")


def _index(span: slice) -> Any:
    return np.arange(span.start, span.stop)[None]


def _move(b: Block, thread: int, source: tuple[Region, slice], to: tuple[Region, slice]) -> None:
    """At once; until the copy is known to be over, the marks of ``Copy`` keep everyone away from the bytes."""
    who = np.array([thread])
    for region, span in (source, to):
        if region.dirty is not None and region.dirty[span].any():
            raise PtxError("a bulk copy of bytes that were written without a proxy fence since")
        reach(b, region, _index(span), who)
    note_read(b, source[0], _index(source[1]), who)
    into = to[0].values[to[1]]
    note_write(b, to[0], _index(to[1]), who, ~into[None])  # every byte counts as changed
    into[:] = source[0].values[source[1]]
    if to[0].dirty is not None:
        to[0].dirty[to[1]] = False


def _load(kernel: Kernel, i: Instruction) -> Operator:
    at, from_ = addresses(kernel, i.operands[0]), addresses(kernel, i.operands[1])
    size, tells = reader(kernel, i.operands[2], "u32"), addresses(kernel, i.operands[3])

    def run(b: Block, m: Mask, w: bool) -> None:
        for thread in _threads(m):
            to = _place(b, int(at(b)[thread]), int(size(b)[thread]))
            source = _place(b, int(from_(b)[thread]), int(size(b)[thread]))
            owner = to[0].owner
            if owner is None or source[0].owner is not None:
                raise PtxError("a bulk load is from global to shared memory")
            address = int(tells(b)[thread])
            barrier = _found(b, owner, address, np.array([thread]))
            assert owner.shared.dirty is not None
            if owner.shared.dirty[address - owner.base]:
                raise PtxError("an mbarrier without a fence since its initialisation")
            _move(b, thread, source, to)
            # From here on ``Load`` knows who comes after it.
            grains = slice(to[1].start // to[0].grain, to[1].stop // to[0].grain)
            to[0].writer[grains] = to[0].reader[grains] = NOBODY
            load, cluster = Load(b, to, source, barrier), b.cluster
            cluster.loads = [x for x in cluster.loads if x.region is not to[0] or not _meet(x.span, to[1])]
            cluster.loads.append(load)
            cluster.pending.append(load)

    return Operator(run)


def _meet(a: slice, b: slice) -> bool:
    return bool(a.start < b.stop and b.start < a.stop)


def _store(kernel: Kernel, i: Instruction) -> Operator:
    to, from_ = addresses(kernel, i.operands[0]), addresses(kernel, i.operands[1])
    size = reader(kernel, i.operands[2], "u32")

    def run(b: Block, m: Mask, w: bool) -> None:
        for thread in _threads(m):
            into = _place(b, int(to(b)[thread]), int(size(b)[thread]))
            source = _place(b, int(from_(b)[thread]), int(size(b)[thread]))
            if into[0].owner is not None or source[0].owner is not b:
                raise PtxError("a bulk store is from the block's own shared memory to global memory")
            _move(b, thread, source, into)
            b.groups.setdefault(("bulk", thread), [[]])[-1].append(Store(source, into))

    return Operator(run)


def _commit() -> Operator:
    def run(b: Block, m: Mask, w: bool) -> None:
        for thread in _threads(m):
            b.groups.setdefault(("bulk", thread), [[]]).append([])

    return Operator(run)


def _wait_group(left: int, read: bool) -> Operator:
    def run(b: Block, m: Mask, w: bool) -> None:
        for thread in _threads(m):
            groups = b.groups.setdefault(("bulk", thread), [[]])
            over = max(len(groups) - 1 - left, 0)
            for store in (store for group in groups[:over] for store in group):
                assert isinstance(store, Store)
                store.know(b, thread, read)
            if not read:
                del groups[:over]

    return Operator(run)


CLUSTERS: dict[str, Maker] = {"mbarrier": mbarrier, "fence": fence, "mapa": mapped, "cp": copy}
