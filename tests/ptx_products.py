"""Products of matrices that a warp computes together, and the loads and stores of their fragments: ``ldmatrix``,
``stmatrix``, ``mma``. See ``ptx_machine.py``.

A product is exact, its sum is rounded to float32 once per instruction; tensor cores round a few times more.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ptx_blocks import WARP, Block, touch
from ptx_memory import Mask
from ptx_text import Instruction, Kernel, Operand, Vector
from ptx_values import Maker, Operator, Values, addresses, reader, whole_warps, widened, write

Floats = NDArray[np.float64]
DEPTHS = {("m16n8k16", "bf16"): 2, ("m16n8k16", "f16"): 2, ("m16n8k8", "tf32"): 1}
"""Shape and format of a product that is known -> elements in a register."""


def numbers(bits: Values, kind: str) -> Floats:
    """Registers as the elements that they hold, along the last axis."""
    if kind == "bf16":
        return widened(np.ascontiguousarray(bits).view(np.uint16)).astype(np.float64)
    if kind == "f16":
        return np.ascontiguousarray(bits).view(np.float16).astype(np.float64)
    return (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)  # what lies below is not looked at


def added(product: Floats, c: Values) -> Values:
    return (product + c).astype(np.float32)


def parts(operand: Operand) -> tuple[Operand, ...]:
    return operand.parts if isinstance(operand, Vector) else (operand,)


def stacked(kernel: Kernel, operand: Operand, kind: str) -> Any:
    """Reads a vector of registers: [warps, lanes, registers]."""
    reads = [reader(kernel, part, kind) for part in parts(operand)]
    return lambda block: np.stack([r(block) for r in reads], 1).reshape(-1, WARP, len(reads))


@cache
def places(rows: int, columns: int, together: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and column, [lanes, registers, together], of what a lane holds of a matrix of A or C: tiles of 8 by
    4 * together, those of one column first; ``together`` neighbours of a row in a register."""
    tiles = [(i, j) for j in range(columns // (4 * together)) for i in range(rows // 8)]
    lane = np.arange(WARP)[:, None, None]
    i, j = np.array(tiles).T[:, None, :, None]
    row = 8 * i + lane // 4 + np.zeros(together, np.int64)
    return row, 4 * together * j + lane % 4 * together + np.arange(together)


def assembled(held: Values, rows: int, columns: int, together: int) -> Values:
    """[warps, rows, columns] of fragments [warps, lanes, elements]."""
    made = np.empty((len(held), rows, columns), held.dtype)
    row, column = places(rows, columns, together)
    made[:, row, column] = held.reshape(len(held), *row.shape)
    return made


def fragments(made: Values, together: int) -> Values:
    """The inverse of ``assembled``."""
    row, column = places(*made.shape[1:], together)
    return made[:, row, column].reshape(len(made), WARP, -1)


def product(kernel: Kernel, i: Instruction) -> Operator | None:
    """``mma``: C + A B of one warp."""
    shape, kind = i.parts[3], i.parts[7]
    together = DEPTHS.get((shape, kind))
    if together is None or i.parts != ("mma", "sync", "aligned", shape, "row", "col", "f32", kind, kind, "f32"):
        return None
    depth = int(shape.split("k")[1])
    a, b = (stacked(kernel, operand, "b32") for operand in i.operands[1:3])
    c = stacked(kernel, i.operands[3], "f32")

    def run(block: Block, m: Mask, w: bool) -> None:
        left = assembled(numbers(a(block), kind), 16, depth, together)
        right = assembled(numbers(b(block), kind), 8, depth, together)  # transposed, B has the places of A
        made = added(left @ right.swapaxes(1, 2), assembled(c(block), 16, 8, 2))
        scatter(kernel, block, i.operands[0], fragments(made, 2), m, w)

    return Operator(run, ready=whole_warps)


def scatter(kernel: Kernel, block: Block, to: Operand, held: Values, m: Mask, w: bool) -> None:
    """Fragments [warps, lanes, registers] to a vector of registers."""
    flat = held.reshape(block.threads, -1)
    for k, part in enumerate(parts(to)):
        write(kernel, block, part, flat[:, k].copy(), m, w)


def matrices(kernel: Kernel, i: Instruction) -> Operator | None:
    """``ldmatrix``, ``stmatrix``: matrices of 8 by 8; lane 8 k + r gives the address of row r of the k-th."""
    count = {"x1": 1, "x2": 2, "x4": 4}.get(i.parts[4])
    transposed = "trans" in i.parts
    loads = i.parts[0] == "ldmatrix"
    if count is None or i.parts[1:4] != ("sync", "aligned", "m8n8") or i.parts[-1] != "b16":
        return None
    where = addresses(kernel, i.operands[loads])
    of = i.operands[not loads]
    giving = np.arange(WARP) < 8 * count

    def load(b: Block, m: Mask, w: bool) -> None:
        which = (m.reshape(-1, WARP) & giving).ravel()
        rows = np.zeros((b.threads // WARP, WARP, 16), np.uint8)
        rows.reshape(-1, 16)[which] = touch(b, which, where(b)[which], 16)
        made = rows[:, : 8 * count].view(np.uint16).reshape(-1, count, 8, 8)
        made = np.ascontiguousarray(made.swapaxes(2, 3) if transposed else made)
        held = made.view(np.uint32).reshape(-1, count, WARP).swapaxes(1, 2)
        scatter(kernel, b, of, held, m, w)

    if loads:
        return Operator(load, ready=whole_warps)
    read = stacked(kernel, of, "b32")

    def store(b: Block, m: Mask, w: bool) -> None:
        which = (m.reshape(-1, WARP) & giving).ravel()
        made = np.ascontiguousarray(read(b).swapaxes(1, 2)).view(np.uint16).reshape(-1, count, 8, 8)
        made = np.ascontiguousarray(made.swapaxes(2, 3) if transposed else made)
        rows = np.zeros((b.threads // WARP, WARP, 16), np.uint8)
        rows[:, : 8 * count] = made.view(np.uint8).reshape(-1, 8 * count, 16)
        touch(b, which, where(b)[which], 16, rows.reshape(-1, 16)[which])

    return Operator(store, ready=whole_warps)


PRODUCTS: dict[str, Maker] = {"mma": product, "ldmatrix": matrices, "stmatrix": matrices}
