"""Instructions by which the threads of a block part, meet and exchange values: see ``ptx_machine.py``."""

from __future__ import annotations

from typing import Any

import numpy as np
from ptx_blocks import WARP, Block
from ptx_memory import Mask, PtxError
from ptx_text import Instruction, Kernel, Number, Symbol, Vector
from ptx_values import Maker, Operator, reader, whole_warps, write


def branch(kernel: Kernel, i: Instruction) -> Operator | None:
    target = i.operands[0]
    if not isinstance(target, Symbol) or target.name not in kernel.labels:
        return None
    to = kernel.labels[target.name]

    def go(block: Block, pc: int, mask: Mask, active: Mask) -> None:
        if active.any():
            block.move(active, to)
        if not active.all() and (mask & ~active).any():
            block.move(mask & ~active, pc + 1)

    return Operator(lambda b, m, w: None, go)


def leave(kernel: Kernel, i: Instruction) -> Operator:
    def go(block: Block, pc: int, mask: Mask, active: Mask) -> None:
        block.exited |= active
        if (mask & ~active).any():
            block.move(mask & ~active, pc + 1)
        if not block.live() and block.visited == block.cluster.epoch:
            raise PtxError("a block ends while another may still touch its shared memory")
        block.release()
        block.cluster.release()

    return Operator(lambda b, m, w: None, go)


def barrier(kernel: Kernel, i: Instruction) -> Operator | None:
    """``bar.sync``, ``bar.warp.sync``, ``barrier.cluster``."""
    if i.parts[1] == "warp":

        def together(b: Block, m: Mask, w: bool) -> None:
            b.warp_epoch = b.warp_epoch + m

        return Operator(together, ready=whole_warps)
    if i.parts[1] == "cluster":
        if "relaxed" in i.parts:
            return None
        if i.parts[2] == "arrive":
            after = kernel.code[kernel.code.index(i) + 1].parts
            return Operator(lambda b, m, w: None) if after[:3] == ("barrier", "cluster", "wait") else None

        def cluster(block: Block, pc: int, mask: Mask, active: Mask) -> None:
            held = block.cluster.waiting.get(block.rank)
            if held is not None and held[1] != pc + 1:
                raise PtxError("threads of one block wait at two barriers of the cluster")
            block.cluster.waiting[block.rank] = (mask if held is None else held[0] | mask, pc + 1)
            block.cluster.release()

        return Operator(lambda b, m, w: None, cluster)
    if i.parts[1] != "sync" or len(i.operands) != 1 or not isinstance(i.operands[0], Number):
        return None
    name = i.operands[0].bits

    def wait(block: Block, pc: int, mask: Mask, active: Mask) -> None:
        if i.guard is not None and not (active == mask).all():
            raise PtxError("a barrier for some of the threads")
        block.arrived[name] = block.arrived.get(name, np.zeros_like(mask)) | mask
        block.resume.setdefault(name, pc + 1)
        if block.resume[name] != pc + 1:
            raise PtxError("threads of one block wait at one barrier in two places")
        block.release()
        if name not in block.arrived:
            del block.resume[name]

    return Operator(lambda b, m, w: None, wait)


def shuffle(kernel: Kernel, i: Instruction) -> Operator | None:
    """``shfl.sync``."""
    to = i.operands[0]
    to, predicate = to.parts if isinstance(to, Vector) else (to, None)
    value = reader(kernel, i.operands[1], "b32")
    by, clamp = (reader(kernel, operand, "u32") for operand in i.operands[2:4])
    mode = i.parts[2]

    def run(b: Block, m: Mask, w: bool) -> None:
        lane = np.arange(b.threads) % WARP
        step, c = by(b).astype(np.int64), clamp(b).astype(np.int64)
        segment = c >> 8 & 31
        last, first = (lane & segment) | (c & 31 & ~segment), lane & segment
        source = {"bfly": lane ^ step, "down": lane + step, "up": lane - step}.get(mode)
        if source is None:
            source = first | (step & ~segment & 31)
        inside = source >= last if mode == "up" else source <= last
        source = np.where(inside, source, lane) + np.arange(b.threads) // WARP * WARP
        if (m & ~m[source]).any():
            raise PtxError("a shuffle from a thread that takes no part")
        write(kernel, b, to, value(b)[source], m, w)
        if predicate is not None:
            write(kernel, b, predicate, inside, m, w)

    return Operator(run, ready=whole_warps)


def reduce(kernel: Kernel, i: Instruction) -> Operator | None:
    """``redux.sync``."""
    value = reader(kernel, i.operands[1], i.parts[3])
    functions: dict[str, Any] = {"add": np.add, "min": np.minimum, "max": np.maximum, "or": np.bitwise_or}
    function = functions.get(i.parts[2])
    if function is None:
        return None

    def run(b: Block, m: Mask, w: bool) -> None:
        rows = m.reshape(-1, WARP)
        if not rows[rows.any(1)].all():
            raise PtxError("a reduction over part of a warp")
        values = value(b).reshape(-1, WARP)
        write(kernel, b, i.operands[0], np.repeat(function.reduce(values, 1, dtype=values.dtype), WARP), m, w)

    return Operator(run, ready=whole_warps)


FLOW: dict[str, Maker] = {
    "bra": branch, "ret": leave, "exit": leave, "bar": barrier, "barrier": barrier, "shfl": shuffle, "redux": reduce,
}  # fmt: skip
