"""Compiles the tree-attention kernels for GPUs that need not be there: registers, spills and shared memory.

``python tests/tree_resources.py`` rewrites ``tree_resources.json``, the table that the test holds them to.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from rewardmap_kernels import tree_kernels, tree_op

TABLE = Path(__file__).with_suffix(".json")
CAPABILITIES = (80, 90, 100, 120)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
INTEGER_POINTERS = {"ends_ptr", "rows_ptr", "keys_ptr", "columns_ptr"}
FLOAT_POINTERS = {"lse_ptr", "delta_ptr"}
COUNTS = {"total", "group", "parts"}


class Build(NamedTuple):
    """One kernel with one set of compile-time values."""

    name: str
    function: JITFunction[Any]
    dtype: str
    head_dim: int
    place: int
    partial: bool


def builds() -> Iterator[Build]:
    """Every kernel at the head dimensions of real models, and at one that is padded."""
    for dtype, dims in (("bf16", (64, 80, 128)), ("fp32", (64,))):
        for dim in dims:
            functions = (tree_kernels.tree_forward_kernel, tree_kernels.tree_dq_kernel, tree_kernels.tree_dkv_kernel)
            for place, function in enumerate(functions):
                name = f"{function.fn.__name__}.{dtype}.d{dim}"
                yield Build(name, function, dtype, dim, place, partial=place == 2)


def _type(build: Build, argument: str) -> str:
    if argument.isupper():
        return "constexpr"
    if argument in INTEGER_POINTERS:
        return "*i32"
    if argument in FLOAT_POINTERS or (build.partial and argument in ("dk_ptr", "dv_ptr")):
        return "*fp32"
    if argument.endswith("_ptr"):
        return f"*{build.dtype}"
    return "fp32" if argument.endswith("scale") else "i32"


def resources(build: Build, capability: int) -> dict[str, int]:
    """{registers per thread, bytes spilled, bytes of shared memory, 1 where the assembler had to put a wait after every
    product of a warpgroup} of one kernel."""
    # In the interpreter's process the kernel is wrapped; its Python function compiles all the same.
    function = build.function
    if not isinstance(function, JITFunction):
        function = JITFunction(function.fn, **function.kwargs)
    signature = {name: _type(build, name) for name in function.arg_names}
    blocks = tree_op.plan(DTYPES[build.dtype], build.head_dim, capability // 10)[build.place]
    constants = {
        "HEAD_DIM": build.head_dim,
        "BLOCK_D": tree_op.padded(build.head_dim),
        "BLOCK_M": blocks.m,
        "BLOCK_N": blocks.n,
    }
    # As at launch: pointers and strides are multiples of 16, counts need not be.
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (kind == "i32" and name not in COUNTS)
    }
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    found = re.search(r"\.target (\w+)", compiled.asm["ptx"])
    assert found
    assembler = "ptxas-blackwell" if capability >= 100 else "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(compiled.asm["ptx"])
        command = [
            Path(triton.__file__).parent / "backends/nvidia/bin" / assembler,
            "-v",
            f"--gpu-name={found.group(1)}",
        ]
        done = subprocess.run([*command, ptx, "-o", Path(folder, "k")], capture_output=True, text=True, check=True)

    def number(pattern: str) -> int:
        match = re.search(pattern, done.stderr)
        assert match, done.stderr
        return int(match.group(1))

    return {
        "registers": number(r"Used (\d+) registers"),
        "spilled": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        "shared": int(compiled.metadata.shared),
        "serialized": int("wgmma.mma_async instructions are serialized" in done.stderr),
    }


def main() -> None:
    """Measure everything and write the table."""
    table: dict[str, dict[str, dict[str, int]]] = {}
    for build in builds():
        table[build.name] = {f"sm_{c}": resources(build, c) for c in CAPABILITIES}
        print(build.name, table[build.name], flush=True)
    TABLE.write_text(json.dumps({"triton": triton.__version__, "kernels": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
