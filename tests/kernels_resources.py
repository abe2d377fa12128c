"""Compiles every Triton kernel for GPUs that need not be there and reads registers, spills and shared memory.

``python tests/kernels_resources.py`` rewrites ``kernels_resources.json``, the table that the test holds them
to.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from rewardmap_kernels import triton_advantage, triton_launch, triton_rows

TABLE = Path(__file__).with_suffix(".json")
CAPABILITIES = (80, 90, 100)
STRIDES = {"vocab", "logits_stride", "out_stride", "stride", "columns_total"}
INTEGERS = STRIDES | {"normalizer_stride", "total", "groups", "ddof"}
POINTERS = {"targets_ptr": "*i64", "offsets_ptr": "*i64", "mask_ptr": "*u8", "degenerate_ptr": "*i8"}


class Build(NamedTuple):
    """One kernel with one set of compile-time values."""

    name: str
    function: JITFunction[Any]
    dtypes: dict[str, str]
    constants: dict[str, Any]
    warps: int


def builds() -> Iterator[Build]:
    """Every kernel, with the logits of both paths: float32 under a bfloat16 gradient, and bfloat16 in
    place."""
    objective = {
        "OBJECTIVE": "clipped",
        "DUAL_CLIP": True,
        "DELTA": True,
        "KL": "k3",
        "KL_BIAS": True,
        "IMPORTANCE": "truncate",
        "ENTROPY": True,
        "HAS_OLD": True,
        "HAS_MASK": True,
        "HAS_TEMPERATURE": True,
        "IN_PLACE": True,
    }
    sapo = {
        **objective,
        "OBJECTIVE": "sapo",
        "DUAL_CLIP": False,
        "DELTA": False,
        "ENTROPY": False,
        "KL": "none",
        "KL_BIAS": False,
    }
    rows, warps = triton_rows, triton_launch.WARPS
    for logits, size in (("fp32", 4), ("bf16", 2)):
        dtypes = {"logits_ptr": f"*{logits}", "out_ptr": "*bf16", "values_ptr": f"*{logits}"}
        block = {"BLOCK": triton_launch.BLOCK_BYTES // size}
        yield Build(f"policy_row_kernel.{logits}", rows.policy_row_kernel, dtypes, {**objective, **block}, warps)
        yield Build(f"policy_row_kernel.{logits}.sapo", rows.policy_row_kernel, dtypes, {**sapo, **block}, warps)
        masks = {"HAS_MASK": True, "HAS_TEMPERATURE": True, **block}
        yield Build(f"statistics_kernel.{logits}", rows.statistics_kernel, dtypes, masks, warps)
        place = {"IN_PLACE": True, "HAS_TEMPERATURE": True, **block}
        yield Build(f"gradient_kernel.{logits}", rows.gradient_kernel, dtypes, place, warps)
        yield Build(f"scale_kernel.{logits}", rows.scale_kernel, dtypes, block, warps)
    for scale in ("group", "batch"):
        constants = {
            "SCALE": scale,
            "BASELINE": "leave_one_out",
            "EPS_INSIDE": False,
            "HAS_WEIGHTS": True,
            "BLOCK": triton_advantage.GROUP_BLOCK,
            "BATCH": triton_advantage.BATCH_BLOCK,
        }
        yield Build(f"group_advantage_kernel.{scale}", triton_advantage.group_advantage_kernel, {}, constants, 1)


def _type(build: Build, argument: str) -> str:
    if argument in build.constants:
        return "constexpr"
    if argument in INTEGERS:
        return "i32"
    if argument.endswith("_ptr"):
        return build.dtypes.get(argument, POINTERS.get(argument, "*fp32"))
    return "fp32"


def resources(build: Build, capability: int) -> dict[str, int]:
    """{registers, spilled, shared} of one kernel: registers per thread, bytes spilled, bytes of shared
    memory."""
    # In the interpreter's process the kernel is wrapped; its Python function compiles all the same.
    function = build.function if isinstance(build.function, JITFunction) else JITFunction(build.function.fn)
    signature = {name: _type(build, name) for name in function.arg_names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in STRIDES
    }
    source = ASTSource(fn=function, signature=signature, constexprs=build.constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": build.warps})
    found = re.search(r"\.target (\w+)", compiled.asm["ptx"])
    assert found
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(compiled.asm["ptx"])
        report = subprocess.run(
            [
                tools / ("ptxas-blackwell" if capability >= 100 else "ptxas"),
                "-v",
                f"--gpu-name={found.group(1)}",
                ptx,
                "-o",
                Path(folder, "kernel.cubin"),
            ],
            capture_output=True,
            text=True,
            check=True,
        ).stderr

    def number(pattern: str) -> int:
        match = re.search(pattern, report)
        assert match, report
        return int(match.group(1))

    spilled = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
    return {
        "registers": number(r"Used (\d+) registers"),
        "spilled": spilled,
        "shared": int(compiled.metadata.shared),
    }


def main() -> None:
    """Measure everything and write the table."""
    table = {b.name: {f"sm_{c}": resources(b, c) for c in CAPABILITIES} for b in builds()}
    TABLE.write_text(json.dumps({"triton": triton.__version__, "kernels": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
