"""Runs the PTX of a kernel on the CPU, in the numbers of a GPU, and says what a GPU would keep to itself.

Refused, with the line of PTX: an access outside the tensors that were passed, or unaligned; two threads that touch one
byte, one of them writing another value, without a barrier between them; a barrier that not all threads reach, or a wait
without end; memory that is touched while a copy is under way. Warps and blocks advance in an order drawn from ``seed``.
Shared memory begins as NaN. Nothing is said of speed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
from ptx_blocks import WARP, WARPGROUP, Block, Cluster, Launch
from ptx_memory import Mask, PtxError
from ptx_operators import compiled
from ptx_text import Instruction

WARPS = {"shfl", "redux", "vote", "mma", "ldmatrix", "stmatrix", "elect"}
"""Instructions that a warp executes together."""


def run(launch: Launch) -> None:
    """Every block of a launch, to its end. Raises PtxError."""
    _Machine(launch).run()


class _Machine:
    def __init__(self, launch: Launch) -> None:
        self.launch, self.kernel = launch, launch.kernel
        if launch.threads % WARP or launch.threads > 1024:
            raise PtxError(f"{launch.threads} threads")
        assert len(launch.parameters) >= self.kernel.parameter_bytes
        self.chance = None if launch.seed is None else random.Random(launch.seed)
        self.code = compiled(self.kernel)
        self.leaders = {0, *self.kernel.labels.values()}
        meetings: set[int] = set()
        for i, instruction in enumerate(self.kernel.code):
            if instruction.parts[0] in WARPS or instruction.parts[:2] == ("bar", "warp"):
                meetings |= {i, i + 1}
            elif instruction.parts[0] in ("bra", "ret", "exit") or _waits(instruction):
                self.leaders |= {i, i + 1} if _waits(instruction) else {i + 1}
        self.meetings = meetings - self.leaders  # that whole warps pass without a stop

    def run(self) -> None:
        (x, y, z), size = self.launch.grid, self.launch.cluster
        assert x % size == 0
        indices = [(i, j, k) for k in range(z) for j in range(y) for i in range(x)]
        clusters = [indices[i : i + size] for i in range(0, len(indices), size)]
        if self.chance is not None:
            self.chance.shuffle(clusters)
        with np.errstate(all="ignore"):
            for indices in clusters:
                self._run_cluster(indices)

    def _run_cluster(self, indices: list[tuple[int, int, int]]) -> None:
        cluster = Cluster()
        cluster.blocks = [Block(self.launch, index, rank, cluster) for rank, index in enumerate(indices)]
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
