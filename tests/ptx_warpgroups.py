"""Asynchronous products of four warps that read shared memory by descriptors: ``wgmma``. See ``ptx_machine.py``.

Results are kept aside until their group has been waited for. Until then nobody may touch the registers, nor write the
shared memory, that a product reads or writes.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray
from ptx_blocks import EPOCH, EPOCHS, WARP, WARPGROUP, Block, note_read, reach
from ptx_memory import Copy, Mask, PtxError
from ptx_products import added, assembled, fragments, numbers, parts, stacked
from ptx_text import Instruction, Kernel, Number, Register, Vector
from ptx_values import Maker, Operator, Values, reader

SWIZZLES = {0: 0, 1: 3, 2: 2, 3: 1}
"""Of a descriptor: bits of the address that are exchanged; rows are 16 bytes << these."""


def whole_groups(block: Block, mask: Mask) -> Mask | None:
    rows: NDArray[np.bool_] = mask.reshape(-1, WARPGROUP)
    there = np.asarray(rows.all(1))
    return np.repeat(there, WARPGROUP) if there.any() else None


def _groups(mask: Mask) -> list[int]:
    return [int(g) for g in np.flatnonzero(mask.reshape(-1, WARPGROUP).any(1))]


@cache
def chunks(descriptor: int, rows: int, transposed: bool) -> NDArray[np.int64]:
    """Where a matrix of ``rows`` by 32 bytes lies, in pieces of 16 bytes, [rows, 2]; transposed, of 16 by ``rows``
    elements of two bytes, [16, rows / 8]. Layouts of the manual's "matrix descriptor"."""
    start, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    bits = SWIZZLES[descriptor >> 62]
    assert not descriptor >> 49 & 7, "a base offset"
    width = 16 << bits
    if transposed:
        k, piece = np.ogrid[:16, : rows // 8]
        outer, inner = (leading, stride) if bits else (stride, leading)
        at = piece % (width // 16) * 16 + piece // (width // 16) * outer + k % 8 * width + k // 8 * inner
    else:
        row, piece = np.ogrid[:rows, :2]
        at = row % 8 * width + row // 8 * stride + piece * (16 if bits else leading)
    at = at + start
    return at ^ (at >> 7 & (1 << bits) - 1) << 4


def from_shared(block: Block, group: int, place: NDArray[np.int64], kind: str, transposed: bool) -> Values:
    """The matrix at ``place``, [rows, elements]."""
    region = block.shared
    if place.min() < 0 or place.max() + 16 > len(region.values):
        raise PtxError("a descriptor points beyond the block's shared memory")
    index = _bytes(place)
    who = _readers(group, len(index))
    reach(block, region, index, who)
    note_read(block, region, index, who)
    assert region.dirty is not None
    first, at = region.grains(index)
    fenced = int(block.proxy_fence[group * WARPGROUP : (group + 1) * WARPGROUP].min())
    if (region.dirty[first] & ((region.written[at] >> EPOCH & EPOCHS) >= fenced)).any():
        raise PtxError("a product reads what was written without a fence to its proxy")
    values = numbers(region.values[index].reshape(len(place), -1).view(np.uint32), kind)
    return values.T if transposed else values


def _bytes(place: NDArray[np.int64]) -> NDArray[np.int64]:
    return place.reshape(-1, 1) + np.arange(16)


def _readers(group: int, count: int) -> NDArray[np.int64]:
    """A thread of the group for each access: any other that touches the place without a barrier is in the wrong."""
    return group * WARPGROUP + np.arange(count) % WARPGROUP


class Accumulators:
    """What the products under way will have made of some registers of a warpgroup."""

    def __init__(self, names: tuple[str, ...], values: Values) -> None:
        self.names, self.values, self.products = names, values, 0


def multiply(kernel: Kernel, i: Instruction) -> Operator | None:
    """``wgmma.mma_async``: C + A B of a warpgroup, or A B; A from registers or from shared memory."""
    if i.parts[1:4] != ("mma_async", "sync", "aligned"):
        return wait(kernel, i)
    kind = i.parts[-1]
    if i.parts[5:] != ("f32", kind, kind) or kind not in ("bf16", "f16", "tf32"):
        return None
    columns, depth = (int(n) for n in i.parts[4].removeprefix("m64n").split("k"))
    held = i.operands[1] if isinstance(i.operands[1], Vector) else None
    a = reader(kernel, i.operands[1], "b64") if held is None else stacked(kernel, held, "b32")
    b = reader(kernel, i.operands[2], "b64")
    keep = reader(kernel, i.operands[3], "pred")
    sign_a, sign_b, *turned = (n.bits for n in i.operands[4:] if isinstance(n, Number))
    turn_a, turn_b = (bool(t) for t in [0, 0, *turned][-2:])
    to = tuple(part.name for part in parts(i.operands[0]) if isinstance(part, Register))
    assert len(to) == columns // 2
    left = tuple(part.name for part in parts(held) if isinstance(part, Register))

    def run(block: Block, m: Mask, w: bool) -> None:
        for group in _groups(m):
            begin(block, group, slice(group * WARPGROUP, (group + 1) * WARPGROUP))

    def begin(block: Block, group: int, who: slice) -> None:
        at = {"b": chunks(_one(b(block)[who]), columns, turn_b)}
        if held is None:
            at["a"] = chunks(_one(a(block)[who]), 64, turn_a)
            x = from_shared(block, group, at["a"], kind, turn_a)
        else:
            mine = numbers(a(block)[group * 4 : group * 4 + 4], kind)
            x = assembled(mine, 16, depth, 1 if kind == "tf32" else 2).reshape(64, depth)
        y = from_shared(block, group, at["b"], kind, turn_b)
        made = sign_a * sign_b * (x @ y.T)
        key = (group, to)
        results = block.results.get(key)
        _check(block, group, left, () if results else to)
        if results is None:
            now = np.stack([block.registers[name][who] for name in to], 1).view(np.float32)
            results = block.results[key] = Accumulators(to, now)
        if _one(keep(block)[who]):
            c = assembled(results.values.reshape(4, WARP, -1), 16, columns, 2)
        else:
            c = np.zeros((4, 16, columns), np.float32)
        results.values = fragments(added(made.reshape(c.shape), c), 2).reshape(WARPGROUP, -1)
        results.products += 1
        for name in (*to, *left):
            block.flight.setdefault(name, np.zeros(block.threads, bool))[who] = True
        index = np.concatenate([_bytes(place) for place in at.values()])

        def end() -> None:
            note_read(block, block.shared, index, _readers(group, len(index)))
            results.products -= 1
            if not results.products:
                del block.results[key]
                for name, values in zip(to, np.ascontiguousarray(results.values.T).view(np.uint32), strict=True):
                    block.registers[name] = block.registers[name].copy()
                    block.registers[name][who] = values
                    block.fenced[group][name] = block.registers[name]

        copy = Copy(end, drains=(block.shared, index))
        copy.registers = (*to, *left)
        block.groups.setdefault(("wgmma", group), [[]])[-1].append(copy)

    return Operator(run, ready=whole_groups)


def _one(values: Values) -> int:
    if (values != values[0]).any():
        raise PtxError("threads of one warpgroup give different operands")
    return int(values[0])


def _check(block: Block, group: int, left: tuple[str, ...], to: tuple[str, ...]) -> None:
    """That no product under way writes these registers and that accumulators are those of the last ``wgmma.fence``. Of
    the left side, the assembler fences what compilers move behind theirs."""
    who = slice(group * WARPGROUP, (group + 1) * WARPGROUP)
    if group not in block.fenced:
        raise PtxError("no wgmma.fence before")
    writing = {name for g, results in block.results for name in results if g == group}
    for name in writing.intersection((*left, *to)):
        raise PtxError(f"{name} belongs to a product that is under way")
    for name in to:
        now, then = block.registers[name], block.fenced[group][name]
        if now is not then and (now[who] != then[who]).any():
            raise PtxError(f"{name} was written after wgmma.fence")


def wait(kernel: Kernel, i: Instruction) -> Operator | None:
    """``wgmma.fence``, ``.commit_group``, ``.wait_group``."""
    word = i.parts[1]
    if word not in ("fence", "commit_group", "wait_group"):
        return None
    left = i.operands[0].bits if i.operands and isinstance(i.operands[0], Number) else 0

    def run(block: Block, m: Mask, w: bool) -> None:
        for group in _groups(m):
            groups = block.groups.setdefault(("wgmma", group), [[]])
            if word == "fence":
                block.fenced[group] = dict(block.registers)
            elif word == "commit_group":
                groups.append([])
            else:
                count = max(len(groups) - 1 - left, 0)
                for copy in (copy for one in groups[:count] for copy in one):
                    copy.finish()
                del groups[:count]
                under_way = {name for one in groups for copy in one for name in copy.registers}
                for name, threads in block.flight.items():
                    threads[group * WARPGROUP : (group + 1) * WARPGROUP] = name in under_way
                block.flight = {name: threads for name, threads in block.flight.items() if threads.any()}

    return Operator(run, ready=whole_groups)


WARPGROUPS: dict[str, Maker] = {"wgmma": multiply}
