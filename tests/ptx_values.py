"""Operands of PTX instructions as arrays over a block's threads, and the formats of numbers: see ``ptx_machine.py``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ptx_blocks import WARP, Block
from ptx_memory import Mask, PtxError
from ptx_text import Address, Instruction, Kernel, Number, Operand, Register, Special, Symbol

Values = NDArray[Any]
Run = Callable[[Block, Mask, bool], None]
KINDS: dict[str, Any] = {"pred": np.bool_, "f32": np.float32, "f64": np.float64}
KINDS |= {f"s{n}": np.dtype(f"i{n // 8}").type for n in (8, 16, 32, 64)}
KINDS |= {f"{kind}{n}": np.dtype(f"u{n // 8}").type for kind in "bu" for n in (8, 16, 32, 64)}
Maker = Callable[[Kernel, Instruction], "Operator | None"]
"""None: an instruction of a form that is not known."""
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass
class Operator:
    """An instruction made ready. ``control`` moves the threads itself; ``ready`` says which of them can execute it."""

    run: Run
    control: Callable[[Block, int, Mask, Mask], None] | None = None
    ready: Callable[[Block, Mask], Mask | None] = lambda block, mask: mask
    registers: frozenset[str] = frozenset()
    """That it touches at once."""


# --- operands ---------------------------------------------------------------------------------------------------------


def reader(kernel: Kernel, operand: Operand, kind: str) -> Callable[[Block], Values]:
    """The values of an operand for all threads, as numbers of this kind."""
    dtype = np.dtype(KINDS[kind])
    if isinstance(operand, Register):
        name, bits = operand.name, kernel.widths[operand.name]
        if kind == "pred" or bits == dtype.itemsize * 8:
            return lambda block: block.registers[name].view(dtype)
        narrow = UNSIGNED[dtype.itemsize]
        return lambda block: block.registers[name].astype(narrow).view(dtype)
    if isinstance(operand, Number):
        if kind == "pred":
            constant = np.array(bool(operand.bits))
        else:
            constant = np.array(operand.bits & ((1 << dtype.itemsize * 8) - 1), UNSIGNED[dtype.itemsize]).view(dtype)
        spread = functools.cache(lambda threads: np.broadcast_to(constant, (threads,)))
        return lambda block: spread(block.threads)
    if isinstance(operand, Special):
        special = operand.name
        return lambda block: block.special(special).astype(UNSIGNED[dtype.itemsize]).view(dtype)
    if isinstance(operand, Symbol):
        parameter = next((p for p in kernel.parameters if p.name == operand.name), None)
        if parameter is not None:
            offset = parameter.offset
            return lambda block: np.full(block.threads, offset, dtype)
        if operand.name in kernel.shared:
            offset = kernel.shared[operand.name]
            return lambda block: np.full(block.threads, block.base + offset, dtype)
    raise PtxError(f"{operand} cannot be read")


def write(kernel: Kernel, block: Block, operand: Operand, values: Values, active: Mask, whole: bool) -> None:
    """Keep the bits of ``values`` for the active threads; a wider register gets them extended as their kind says."""
    if operand is None:
        return
    assert isinstance(operand, Register), operand
    held = block.registers[operand.name]
    if held.dtype != np.bool_:
        if values.dtype.itemsize < held.itemsize:
            values = values.astype(np.dtype(f"{'i' if values.dtype.kind == 'i' else 'u'}{held.itemsize}"))
        values = np.ascontiguousarray(values).view(held.dtype)
    if whole:
        block.registers[operand.name] = values if values.flags.writeable else values.copy()
    else:
        block.registers[operand.name] = np.where(active, values, held)


def addresses(kernel: Kernel, operand: Operand) -> Callable[[Block], NDArray[np.int64]]:
    assert isinstance(operand, Address)
    offset = operand.offset
    bits = kernel.widths[operand.base.name] if isinstance(operand.base, Register) else 64
    base = reader(kernel, operand.base, "u64" if bits == 64 else "u32")
    return lambda block: base(block).astype(np.int64) + offset


# --- numbers ----------------------------------------------------------------------------------------------------------


def widened(bits: Values) -> Values:
    """bfloat16 as float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def rounded(values: Values) -> Values:
    """float32 to the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    up = ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)
    return np.where(np.isnan(values), np.uint16(0x7FFF), ((bits + up) >> np.uint32(16)).astype(np.uint16))


def to_tf32(values: Values) -> Values:
    """float32 to the nearest with 10 bits of mantissa, ties away from zero."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    kept = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(values), kept, values)


def least(a: Values, b: Values) -> Values:
    return np.fmin(a, b) if a.dtype.kind == "f" else np.minimum(a, b)


def most(a: Values, b: Values) -> Values:
    return np.fmax(a, b) if a.dtype.kind == "f" else np.maximum(a, b)


def left(a: Values, by: Values) -> Values:
    bits = a.dtype.itemsize * 8
    shifted = np.left_shift(a, np.minimum(by, bits - 1).astype(a.dtype))
    return np.where(by >= bits, a.dtype.type(0), shifted)


def right(a: Values, by: Values) -> Values:
    bits = a.dtype.itemsize * 8
    shifted = np.right_shift(a, np.minimum(by, bits - 1).astype(a.dtype))
    return shifted if a.dtype.kind == "i" else np.where(by >= bits, a.dtype.type(0), shifted)


def divided(a: Values, b: Values) -> Values:
    if a.dtype.kind == "f":
        return a / b
    safe = np.where(b == 0, a.dtype.type(1), b)
    quotient = np.floor_divide(a, safe)
    if a.dtype.kind == "i":  # towards zero
        quotient = quotient + ((quotient * safe != a) & ((a < 0) != (safe < 0)))
    return quotient.astype(a.dtype)


def remainder(a: Values, b: Values) -> Values:
    return (a - divided(a, b) * np.where(b == 0, 1, b)).astype(a.dtype)


def product(a: Values, b: Values, parts: tuple[str, ...]) -> Values:
    if a.dtype.kind == "f":
        return a * b
    if "wide" in parts:
        twice = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
        return a.astype(twice) * b.astype(twice)
    if "hi" in parts:
        bits = a.dtype.itemsize * 8
        high = [(int(x) * int(y)) >> bits for x, y in zip(a, b, strict=True)]
        return np.array([h & ((1 << bits) - 1) for h in high], UNSIGNED[a.dtype.itemsize]).view(a.dtype)
    return a * b


def fused(a: Values, b: Values, c: Values) -> Values:
    """a b + c, rounded once (but for the few sums whose 53 bits fall on a tie)."""
    if a.dtype == np.float32:
        return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float32)
    return a * b + c


def fused_down(a: Values, b: Values, c: Values) -> Values:
    exact = a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)
    near = exact.astype(np.float32)
    return np.where(near > exact, np.nextafter(near, np.float32(-np.inf)), near)


def whole_warps(block: Block, mask: Mask) -> Mask | None:
    """The warps of which every thread that has not ended is in ``mask``; None where there are none."""
    rows: NDArray[np.bool_] = mask.reshape(-1, WARP)
    there = np.asarray((mask | block.exited).reshape(-1, WARP).all(1) & rows.any(1))
    return (rows & there[:, None]).ravel() if there.any() else None
