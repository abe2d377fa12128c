"""What each instruction of PTX does to the registers of the threads that execute it: see ``ptx_machine.py``.

Values are computed for all threads of a block at once and kept for the active ones. Roundings are those of the PTX
manual but for approximate functions, which are more accurate here than on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from ptx_blocks import Block, touch
from ptx_cluster import CLUSTERS
from ptx_copies import COPIES
from ptx_flow import FLOW
from ptx_memory import GENERIC, Mask, PtxError
from ptx_products import PRODUCTS
from ptx_text import Address, Instruction, Kernel, Operand, Register, Vector
from ptx_values import (
    KINDS,
    UNSIGNED,
    Maker,
    Operator,
    Values,
    addresses,
    divided,
    fused,
    fused_down,
    least,
    left,
    most,
    product,
    reader,
    remainder,
    right,
    rounded,
    to_tf32,
    widened,
    write,
)
from ptx_warpgroups import WARPGROUPS

TWO: dict[str, Callable[[Values, Values], Values]] = {
    "add": np.add, "sub": np.subtract, "min": least, "max": most, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "div": divided, "rem": remainder,
}  # fmt: skip
ONE: dict[str, Callable[[Values], Values]] = {
    "neg": np.negative, "abs": np.abs, "not": np.invert, "ex2": np.exp2, "lg2": np.log2, "sqrt": np.sqrt,
    "rcp": np.reciprocal, "rsqrt": lambda x: np.reciprocal(np.sqrt(x)), "mov": lambda x: x,
}  # fmt: skip
COMPARED: dict[str, Callable[[Values, Values], Values]] = {
    "eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "ne": lambda a, b: (a != b) & ~(_nan(a) | _nan(b)), "neu": lambda a, b: a != b,
    "equ": lambda a, b: (a == b) | _nan(a) | _nan(b), "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b), "geu": lambda a, b: ~(a < b), "num": lambda a, b: ~(_nan(a) | _nan(b)),
    "nan": lambda a, b: _nan(a) | _nan(b), "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def _nan(x: Values) -> Values:
    return np.isnan(x) if x.dtype.kind == "f" else np.zeros(x.shape, bool)


def arithmetic(kernel: Kernel, i: Instruction) -> Operator | None:
    """Operators of one, two or three values of one kind."""
    name, kind = i.parts[0], i.parts[-1]
    if kind in ("bf16", "f16", "bf16x2", "f16x2", "f32x2"):
        return _packed(kernel, i)
    if kind not in KINDS:
        return None
    to, sources = i.operands[0], i.operands[1:]
    if name in ("shl", "shr"):
        value, by = reader(kernel, sources[0], kind), reader(kernel, sources[1], "u32")
        shift = left if name == "shl" else right
        return Operator(lambda b, m, w: write(kernel, b, to, shift(value(b), by(b)), m, w))
    if name in ("mul", "mad"):
        kinds = [kind, kind] + ([f"{kind[0]}{2 * int(kind[1:])}" if "wide" in i.parts else kind] * (name == "mad"))
        read = [reader(kernel, source, k) for source, k in zip(sources, kinds, strict=True)]

        def multiply(b: Block, m: Mask, w: bool) -> None:
            made = product(read[0](b), read[1](b), i.parts)
            write(kernel, b, to, made + read[2](b) if len(read) == 3 else made, m, w)

        return Operator(multiply)
    read = [reader(kernel, source, kind) for source in sources]
    if name == "fma":
        rule = fused_down if "rm" in i.parts else fused
        return Operator(lambda b, m, w: write(kernel, b, to, rule(*(r(b) for r in read)), m, w))
    table: dict[str, Any] = TWO if len(read) >= 2 else ONE
    if name not in table or any(p in i.parts for p in ("sat", "rz", "rm", "rp")):
        return None
    if len(read) > 2 and name not in ("min", "max"):
        return None
    function = table[name]
    if len(read) > 2:
        return Operator(lambda b, m, w: write(kernel, b, to, functools.reduce(function, (r(b) for r in read)), m, w))
    return Operator(lambda b, m, w: write(kernel, b, to, function(*(r(b) for r in read)), m, w))


def _packed(kernel: Kernel, i: Instruction) -> Operator | None:
    """Numbers of 16 bits, or two in one register: computed in float32 and rounded once."""
    name, kind = i.parts[0], i.parts[-1].removesuffix("x2")
    size = 4 if kind == "f32" else 2
    whole = size * (2 if i.parts[-1].endswith("x2") else 1)
    table: dict[str, Any] = {**TWO, **ONE, "mul": np.multiply, "fma": fused}
    if name not in table or name in ("and", "or", "xor", "not", "mov"):
        return None
    function, read = table[name], [reader(kernel, source, f"b{whole * 8}") for source in i.operands[1:]]
    wide, narrow = {"bf16": (widened, rounded), "f16": (_from_half, _to_half), "f32": (_as_float, _as_float)}[kind]

    def run(b: Block, m: Mask, w: bool) -> None:
        bits = [np.ascontiguousarray(r(b)).view(UNSIGNED[size]) for r in read]
        write(kernel, b, i.operands[0], narrow(function(*(wide(x) for x in bits))).view(UNSIGNED[whole]), m, w)

    return Operator(run)


def _as_float(bits: Values) -> Values:
    return bits.view(np.float32)


def _from_half(bits: Values) -> Values:
    return bits.view(np.float16).astype(np.float32)


def _to_half(values: Values) -> Values:
    return values.astype(np.float16).view(np.uint16)


def move(kernel: Kernel, i: Instruction) -> Operator | None:
    """``mov``: also between one register and a vector of its parts."""
    to, source = i.operands
    if isinstance(to, Vector):
        read = reader(kernel, source, f"b{i.parts[1][1:]}")

        def unpack(b: Block, m: Mask, w: bool) -> None:
            size = np.dtype(KINDS[i.parts[1]]).itemsize // len(to.parts)
            pieces = np.ascontiguousarray(read(b)).view(UNSIGNED[size]).reshape(b.threads, -1)
            for k, part in enumerate(to.parts):
                write(kernel, b, part, pieces[:, k], m, w)

        return Operator(unpack)
    if isinstance(source, Vector):
        size = np.dtype(KINDS[i.parts[1]]).itemsize // len(source.parts)
        reads = [reader(kernel, part, f"b{size * 8}") for part in source.parts]

        def pack(b: Block, m: Mask, w: bool) -> None:
            made = np.stack([r(b) for r in reads], 1)
            write(kernel, b, to, np.ascontiguousarray(made).view(KINDS[i.parts[1]])[:, 0], m, w)

        return Operator(pack)
    return arithmetic(kernel, i)


def compare(kernel: Kernel, i: Instruction) -> Operator | None:
    """``setp``."""
    if len(i.parts) != 3 or len(i.operands) != 3 or i.parts[1] not in COMPARED:
        return None
    if i.parts[2] in ("bf16", "f16"):
        return None
    a, b = (reader(kernel, operand, i.parts[2]) for operand in i.operands[1:])
    function = COMPARED[i.parts[1]]
    return Operator(lambda block, m, w: write(kernel, block, i.operands[0], function(a(block), b(block)), m, w))


def select(kernel: Kernel, i: Instruction) -> Operator:
    """``selp``."""
    a, b = (reader(kernel, operand, i.parts[1]) for operand in i.operands[1:3])
    p = reader(kernel, i.operands[3], "pred")
    to = i.operands[0]
    return Operator(lambda block, m, w: write(kernel, block, to, np.where(p(block), a(block), b(block)), m, w))


def convert(kernel: Kernel, i: Instruction) -> Operator | None:
    """``cvt``."""
    *modes, to_kind, from_kind = i.parts[1:]
    to = i.operands[0]
    if from_kind not in KINDS and from_kind not in ("bf16", "f16"):
        return None
    sixteen = from_kind in ("bf16", "f16")
    read = [reader(kernel, operand, "b16" if sixteen else from_kind) for operand in i.operands[1:]]
    widen = widened if from_kind == "bf16" else _from_half if sixteen else None

    def run(b: Block, m: Mask, w: bool) -> None:
        values = [widen(r(b)) if widen else r(b) for r in read]
        x = values[0]
        if to_kind in ("bf16x2", "f16x2"):  # the first source is the upper half
            narrow = rounded if to_kind == "bf16x2" else _to_half
            high, low = (narrow(v).astype(np.uint32) for v in values)
            made: Values = (high << np.uint32(16)) | low
        elif to_kind == "bf16":
            made = rounded(x)
        elif to_kind == "f16":
            made = _to_half(x)
        elif to_kind == "tf32":
            made = to_tf32(x)
        elif to_kind == "f32" and x.dtype.kind == "f":
            made = np.rint(x) if "rni" in modes else x.astype(np.float32)
            made = np.fmin(np.fmax(made, np.float32(0)), np.float32(1)) if "sat" in modes else made
        elif KINDS[to_kind] in (np.float32, np.float64):
            made = x.astype(KINDS[to_kind])
        elif x.dtype.kind == "f":
            limits = np.iinfo(KINDS[to_kind])
            whole = np.rint(x.astype(np.float64)) if "rni" in modes else np.trunc(x.astype(np.float64))
            made = np.clip(np.nan_to_num(whole), limits.min, limits.max).astype(KINDS[to_kind])
        else:
            made = x.astype(KINDS[to_kind])
        write(kernel, b, to, made, m, w)

    known = {"rn", "rna", "rni", "rzi", "sat", "ftz"}
    return Operator(run) if set(modes) <= known else None


def bits_of_field(kernel: Kernel, i: Instruction) -> Operator:
    """``bfe``."""
    kind = i.parts[1]
    a = reader(kernel, i.operands[1], kind)
    at, count = (reader(kernel, operand, "u32") for operand in i.operands[2:])

    def run(b: Block, m: Mask, w: bool) -> None:
        x, start, length = a(b), at(b) & 255, count(b) & 255
        bits = x.dtype.itemsize * 8
        length = np.minimum(length, bits - np.minimum(start, bits))
        up = left(x.view(UNSIGNED[x.dtype.itemsize]), (bits - start - length).astype(np.uint32)).view(x.dtype)
        write(kernel, b, i.operands[0], np.where(length == 0, x.dtype.type(0), right(up, bits - length)), m, w)

    return Operator(run)


# --- memory -----------------------------------------------------------------------------------------------------------


def load(kernel: Kernel, i: Instruction) -> Operator | None:
    """``ld``."""
    kind, count = i.parts[-1], next((int(p[1:]) for p in i.parts if p in ("v2", "v4", "v8")), 1)
    if kind not in KINDS:
        return None
    at, dtype = addresses(kernel, i.operands[1]), np.dtype(KINDS[kind])
    to = i.operands[0].parts if isinstance(i.operands[0], Vector) else (i.operands[0],)

    def run(b: Block, m: Mask, w: bool) -> None:
        where = at(b)
        if i.parts[1] == "param":
            begin = int(where[m][0])
            raw = np.frombuffer(b.launch.parameters, np.uint8, dtype.itemsize * count, begin)
            for k, value in enumerate(raw.view(dtype)):
                write(kernel, b, to[k], np.full(b.threads, value, dtype), m, w)
            return
        raw = touch(b, m, where[m], dtype.itemsize * count)
        values = np.zeros((b.threads, count), dtype)
        values[m] = raw.view(dtype)
        for k, operand in enumerate(to):
            write(kernel, b, operand, np.ascontiguousarray(values[:, k]), m, w)

    return Operator(run)


def store(kernel: Kernel, i: Instruction) -> Operator | None:
    """``st``."""
    kind = i.parts[-1]
    if kind not in KINDS:
        return None
    at = addresses(kernel, i.operands[0])
    parts = i.operands[1].parts if isinstance(i.operands[1], Vector) else (i.operands[1],)
    values = [reader(kernel, part, kind) for part in parts]

    def run(b: Block, m: Mask, w: bool) -> None:
        made = np.ascontiguousarray(np.stack([v(b) for v in values], 1)[m]).view(np.uint8)
        touch(b, m, at(b)[m], made.shape[1], made)

    return Operator(run)


def policy(kernel: Kernel, i: Instruction) -> Operator:
    return Operator(lambda b, m, w: write(kernel, b, i.operands[0], np.zeros(b.threads, np.uint64), m, w))


def to_generic(kernel: Kernel, i: Instruction) -> Operator:
    """``cvta``: global memory has its generic addresses."""
    value = reader(kernel, i.operands[1], i.parts[-1])
    step = np.uint64((GENERIC if "shared" in i.parts else 0) * (1 if "to" not in i.parts else -1) % (1 << 64))
    return Operator(lambda b, m, w: write(kernel, b, i.operands[0], value(b) + step, m, w))


MAKERS: dict[str, Maker] = {
    **dict.fromkeys((*TWO, *ONE, "shl", "shr", "mul", "mad", "fma"), arithmetic),
    "mov": move, "setp": compare, "selp": select, "cvt": convert, "bfe": bits_of_field, "ld": load, "st": store,
    "createpolicy": policy, "cvta": to_generic,
    **FLOW, **COPIES, **CLUSTERS, **PRODUCTS, **WARPGROUPS,
}  # fmt: skip


@functools.cache
def compiled(kernel: Kernel) -> list[Operator]:
    """Every instruction of a kernel. Raises PtxError for one that is not known, with its line."""
    made = []
    for instruction in kernel.code:
        make = MAKERS.get(instruction.parts[0])
        operator = None if make is None else make(kernel, instruction)
        if operator is None:
            raise PtxError(f"{kernel.name}, line {instruction.line}: {instruction.text!r} is not known here")
        if instruction.parts[0] != "wgmma":
            operator.registers = frozenset(_registers(instruction.operands))
        made.append(operator)
    return made


def _registers(operands: Iterable[Operand]) -> Iterator[str]:
    for operand in operands:
        if isinstance(operand, Register):
            yield operand.name
        elif isinstance(operand, Vector):
            yield from _registers(operand.parts)
        elif isinstance(operand, Address):
            yield from _registers([operand.base])
