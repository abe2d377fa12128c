"""PTX as text, read into instructions: what ``ptx_machine.py`` runs.

Reads what Triton's and NVIDIA's compilers write for a kernel without calls, local memory or branches by index.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from typing import NamedTuple

WIDTHS = {"pred": 8, "b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16}
WIDTHS |= {f"{kind}{bits}": bits for kind in "busf" for bits in (32, 64)}


class Register(NamedTuple):
    name: str


class Number(NamedTuple):
    """Of an instruction; a float as its bits."""

    bits: int


class Special(NamedTuple):
    """``%tid.x`` and its like."""

    name: str


class Symbol(NamedTuple):
    """The address of a variable in shared memory."""

    name: str


class Address(NamedTuple):
    """``[base + offset]``; the base of a parameter is its name."""

    base: Register | Symbol | Number
    offset: int


class Vector(NamedTuple):
    parts: tuple[Operand, ...]


Operand = Register | Number | Special | Symbol | Address | Vector | None
"""None: ``_``, a result that nobody wants."""


class Instruction(NamedTuple):
    """``@guard op operands``; ``parts`` are the words of ``op`` between its dots."""

    guard: Register | None
    negated: bool
    parts: tuple[str, ...]
    operands: tuple[Operand, ...]
    line: int
    text: str


class Parameter(NamedTuple):
    name: str
    offset: int
    size: int


@dataclass(eq=False)
class Kernel:
    """One entry of a module."""

    name: str
    parameters: list[Parameter] = field(default_factory=list)
    widths: dict[str, int] = field(default_factory=dict)
    """Register -> bits; a predicate's are 8."""
    shared: dict[str, int] = field(default_factory=dict)
    """Variable -> offset in a block's shared memory."""
    shared_bytes: int = 0
    """Of the variables of known size; one of unknown size begins there."""
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    @property
    def parameter_bytes(self) -> int:
        return max((p.offset + p.size for p in self.parameters), default=0)


_SPECIAL = re.compile(
    r"%((tid|ntid|ctaid|nctaid|cluster_ctaid|cluster_nctaid)\.[xyz]|laneid|warpid|cluster_ctarank|cluster_nctarank)$"
)
_VARIABLE = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]")
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?(\w+)(?:\[(\d+)\])?"
)
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)")
_SKIPPED = (".loc", ".file", ".section", ".pragma", ".version", ".address_size", ".visible", ".extern", ".global")


@functools.cache
def parse(text: str) -> Kernel:
    """The first kernel of a module. Raises ValueError for what it does not know."""
    text = re.sub(r"/\*.*?\*/", lambda found: "\n" * found.group().count("\n"), text, flags=re.DOTALL)
    found = re.search(r"\.entry\s+([\w$]+)\s*\(", text)
    if found is None:
        raise ValueError("no .entry in this PTX")
    kernel = Kernel(found.group(1))
    end = text.index(")", found.end())
    offset = 0
    for align, kind, name, count in _PARAMETER.findall(text[found.end() : end]):
        size = WIDTHS[kind] // 8 * int(count or 1)
        offset = -(-offset // int(align or WIDTHS[kind] // 8)) * int(align or WIDTHS[kind] // 8)
        kernel.parameters.append(Parameter(name, offset, size))
        offset += size
    start = text.index("{", end)
    # A variable may stand before the kernel. One without a size comes last: it is what a launch adds.
    variables = _VARIABLE.findall(text)
    for align, name, size in sorted(variables, key=lambda found: not found[2]):
        kernel.shared_bytes = -(-kernel.shared_bytes // int(align)) * int(align)
        kernel.shared[name] = kernel.shared_bytes
        kernel.shared_bytes += int(size or 0)
    _body(kernel, text[start + 1 :], text.count("\n", 0, start + 1) + 1)
    return kernel


def _body(kernel: Kernel, body: str, line: int) -> None:
    scopes: list[dict[str, str]] = [{}]  # names of the blocks in braces around -> unique names
    scoped = 0
    depth_of_vector = False
    statement, begun = "", line
    for raw in body.split("\n"):
        code = raw.split("//", 1)[0]
        for piece in re.split(r"([;{}]|(?<![:\w.])[\w$]+:(?!:))", code):
            stripped = piece.strip()
            if not statement.strip():
                begun = line
            if piece == "{" and not statement.strip():
                scopes.append({})
                scoped += 1
            elif piece == "{":
                depth_of_vector = True
                statement += piece
            elif piece == "}" and depth_of_vector:
                depth_of_vector = False
                statement += piece
            elif piece == "}":
                scopes.pop()
                if not scopes:
                    return
            elif piece == ";":
                _statement(kernel, statement.strip(), begun, scopes, scoped)
                statement = ""
            elif re.fullmatch(r"[\w$]+:", stripped) and not statement.strip():
                name = stripped[:-1]
                if len(scopes) > 1:
                    scopes[-1][name] = name = scopes[-1].get(name, f"{name}#{scoped}")
                kernel.labels[name] = len(kernel.code)
            elif stripped.startswith(_SKIPPED) and not statement.strip():
                break  # the rest of the line
            else:
                statement += piece
        statement += " "
        line += 1
    raise ValueError(f"{kernel.name} has no end")


def _statement(kernel: Kernel, text: str, line: int, scopes: list[dict[str, str]], scoped: int) -> None:
    registers = _REGISTERS.match(text)
    if registers:
        kind, names = registers.groups()
        for name in names.split(","):
            many = re.fullmatch(r"(%\w+)<(\d+)>", name.strip())
            if many:
                kernel.widths |= {f"{many.group(1)}{i}": WIDTHS[kind] for i in range(int(many.group(2)))}
            else:
                own = f"{name.strip()}#{scoped}" if len(scopes) > 1 else name.strip()
                scopes[-1][name.strip()] = own
                kernel.widths[own] = WIDTHS[kind]
        return
    if not text or text.startswith(".shared"):
        return
    guard, negated = None, False
    guarded = re.match(r"@(!?)([\w%]+)\s+(.*)", text, re.DOTALL)
    if guarded:
        negated, text = bool(guarded.group(1)), guarded.group(3)
        guard = Register(_resolved(guarded.group(2), scopes))
    words = text.split(None, 1)
    op = words[0]
    operands = tuple(_operand(kernel, piece, scopes, scoped) for piece in _split(words[1])) if len(words) > 1 else ()
    kernel.code.append(Instruction(guard, negated, tuple(op.split(".")), operands, line, " ".join(text.split())))


def _split(text: str) -> list[str]:
    """At the commas outside of braces and brackets."""
    pieces, depth, piece = [], 0, ""
    for letter in text:
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            pieces.append(piece)
            piece = ""
        else:
            piece += letter
    return [p.strip() for p in (*pieces, piece)]


def _resolved(name: str, scopes: list[dict[str, str]]) -> str:
    return next((scope[name] for scope in reversed(scopes) if name in scope), name)


def _number(text: str) -> int | None:
    if re.fullmatch(r"0[fFdD][0-9a-fA-F]+", text):
        return int(text[2:], 16)
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        return int(text.rstrip("U"), 0)
    return None


def _operand(kernel: Kernel, text: str, scopes: list[dict[str, str]], scoped: int) -> Operand:
    number = _number(text)
    if number is not None:
        return Number(number)
    if text == "_":
        return None
    if text.startswith("{"):
        return Vector(tuple(_operand(kernel, piece, scopes, scoped) for piece in _split(text[1:-1])))
    if text.startswith("["):
        base, sign, offset = re.fullmatch(r"\[\s*([\w%$]+)\s*(?:([+-])\s*(-?\w+))?\s*\]", text).groups()  # type: ignore[union-attr]
        at = _operand(kernel, base, scopes, scoped)
        assert isinstance(at, Register | Symbol | Number), text
        return Address(at, (_number(offset) or 0) * (-1 if sign == "-" else 1) if offset else 0)
    if _SPECIAL.match(text):
        return Special(text[1:])
    name = _resolved(text, scopes)
    if name in kernel.widths:
        return Register(name)
    if "|" in text:
        return Vector(tuple(_operand(kernel, piece, scopes, scoped) for piece in text.split("|")))
    if len(scopes) > 1 and not text.startswith(("%", "$")) and name not in kernel.shared and name == text:
        # A label ahead of its place, in a block of its own.
        scopes[-1][text] = name = f"{text}#{scoped}"
    return Symbol(name)
