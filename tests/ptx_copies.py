"""Asynchronous copies of single threads into shared memory: ``cp.async``. See ``ptx_machine.py``.

The bytes move when their thread waits for the group, as late as a GPU may; until then nobody may touch them.
"""

from __future__ import annotations

import numpy as np
from ptx_blocks import WARP, Block, note_read, note_write, regions
from ptx_memory import Copy, Mask
from ptx_text import Instruction, Kernel, Number
from ptx_values import Maker, Operator, addresses, reader


def copy(kernel: Kernel, i: Instruction) -> Operator | None:
    """``cp.async``: bytes beyond the source's size are zeros."""
    if i.parts[2] not in ("ca", "cg"):
        return group(kernel, i)
    to, source = addresses(kernel, i.operands[0]), addresses(kernel, i.operands[1])
    assert isinstance(i.operands[2], Number)
    size = i.operands[2].bits
    given = reader(kernel, i.operands[3], "u32") if len(i.operands) > 3 else None

    def run(b: Block, m: Mask, w: bool) -> None:
        for warp in np.flatnonzero(m.reshape(-1, WARP).any(1)):
            begin(b, int(warp), np.flatnonzero(m[warp * WARP : (warp + 1) * WARP]) + warp * WARP)

    def begin(b: Block, warp: int, who: np.ndarray) -> None:
        at, values = to(b)[who], np.zeros((len(who), size), np.uint8)
        full = np.full(len(who), size) if given is None else given(b)[who]
        [(region, _)] = regions(b, at, size)
        index = (at - region.begin)[:, None] + np.arange(size)
        used = full > 0
        assert ((full == size) | ~used).all(), "a copy in part"
        if b.launch.traffic is not None:
            b.launch.traffic.add(who, at, size, "shared write")
        if used.any():
            from_ = source(b)[who[used]]
            if b.launch.traffic is not None:
                b.launch.traffic.add(who[used], from_, size, "global read")
            for origin, here in regions(b, from_, size):
                place = (from_[here] - origin.begin)[:, None] + np.arange(size)
                assert origin.allowed is None or origin.allowed[place].all(), "between the elements of a tensor"
                note_read(b, origin, place, who[used][here])
                values[np.flatnonzero(used)[here]] = origin.values[place]
        # Whoever reads or writes these bytes without an order to this copy is in the wrong, whichever comes first.
        note_write(b, region, index, who, np.full_like(values, 0xFF))

        def move() -> None:
            note_write(b, region, index, who, values)
            if not b.launch.fenced_copies:
                assert region.dirty is not None
                region.dirty[index] = False

        b.groups.setdefault(("async", warp), [[]])[-1].append(Copy(move, fills=(region, index)))

    return Operator(run)


def group(kernel: Kernel, i: Instruction) -> Operator | None:
    """``cp.async.commit_group``, ``.wait_group``, ``.wait_all``."""
    word = i.parts[2]
    if word not in ("commit_group", "wait_group", "wait_all"):
        return None
    left = i.operands[0].bits if word == "wait_group" and isinstance(i.operands[0], Number) else 0

    def run(b: Block, m: Mask, w: bool) -> None:
        for warp in np.flatnonzero(m.reshape(-1, WARP).any(1)):
            groups = b.groups.setdefault(("async", int(warp)), [[]])
            if word != "wait_group":
                groups.append([])
            if word != "commit_group":
                done, groups[:] = groups[: len(groups) - 1 - left], groups[max(len(groups) - 1 - left, 0) :]
                for copy in (copy for group in done for copy in group):
                    copy.finish()

    return Operator(run)


COPIES: dict[str, Maker] = {"cp": copy}
