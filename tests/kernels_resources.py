"""Compiles every Triton kernel for GPUs that need not be there and reads registers, spills and shared memory.

``python tests/kernels_resources.py`` rewrites ``kernels_resources.json``, the table that the test holds them
to.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Collection, Iterator
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
INTEGERS = STRIDES | {"normalizer_stride", "total", "groups", "tokens_total", "ddof"}
POINTERS = dict.fromkeys(("targets_ptr", "offsets_ptr", "token_offsets_ptr"), "*i64")
POINTERS |= {"mask_ptr": "*u8", "degenerate_ptr": "*i1"}


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
    rows, launch = triton_rows, triton_launch
    for logits in ("fp32", "bf16"):
        dtypes = {"logits_ptr": f"*{logits}", "out_ptr": "*bf16", "values_ptr": f"*{logits}"}
        # The policy row writes over logits of its own dtype.
        same = {**dtypes, "out_ptr": f"*{logits}"}
        for suffix, options in ("", objective), (".sapo", sapo):
            name = f"policy_row_kernel.{logits}{suffix}"
            yield _build(name, rows.policy_row_kernel, same, options, launch.POLICY_ROW)
        masks = {"HAS_MASK": True, "HAS_TEMPERATURE": True}
        yield _build(f"statistics_kernel.{logits}", rows.statistics_kernel, dtypes, masks, launch.STATISTICS)
        place = {**masks, "IN_PLACE": True}
        yield _build(f"exponentials_kernel.{logits}", rows.exponentials_kernel, dtypes, place, launch.EXPONENTIALS)
        place = {"HAS_TEMPERATURE": True, "BARRIER": logits == "fp32"}
        yield _build(f"gradient_kernel.{logits}", rows.gradient_kernel, dtypes, place, launch.GRADIENT)
        yield _build(f"scale_kernel.{logits}", rows.scale_kernel, dtypes, {}, launch.SCALE)
    for scale in ("group", "batch", "mad"):
        constants = {
            "SCALE": scale,
            "BASELINE": "leave_one_out",
            "EPS_INSIDE": False,
            "HAS_WEIGHTS": True,
            "BLOCK": triton_advantage.GROUP_BLOCK,
            "BATCH": triton_advantage.BATCH_BLOCK,
            "TOKENS": triton_advantage.TOKEN_BLOCK,
            "COMPONENTS": 2 if scale == "mad" else 0,
            "EACH": scale == "mad",
            "DROP": False,
            "HAS_TOKENS": True,
        }
        yield Build(f"group_advantage_kernel.{scale}", triton_advantage.group_advantage_kernel, {}, constants, 1)


def variants() -> Iterator[Build]:
    """Builds that take the branches the table's do not: what the interpreter accepts, the compiler may not."""
    of = {build.name: build for build in builds()}

    def other(name: str, **constants: Any) -> Build:
        return of[name]._replace(constants={**of[name].constants, **constants})

    row = "policy_row_kernel.bf16"
    plain: dict[str, Any] = {name: False for name, value in of[row].constants.items() if value is True}
    plain |= {"KL": "none", "IMPORTANCE": "none"}
    yield other(row, **plain)
    yield other(
        row, **{**plain, "OBJECTIVE": "cispo", "KL": "k1", "KL_BIAS": True, "IMPORTANCE": "mask", "HAS_OLD": True}
    )
    yield other(row, **{**plain, "OBJECTIVE": "reinforce", "KL": "k2", "ENTROPY": True})
    for name in ("statistics_kernel.bf16", "exponentials_kernel.fp32", "gradient_kernel.bf16"):
        yield other(name, **{switch: False for switch, value in of[name].constants.items() if value is True})
    groups = "group_advantage_kernel.group"
    yield other(groups, SCALE="none", BASELINE="none", DROP=True, HAS_WEIGHTS=False, HAS_TOKENS=False)
    yield other(groups, SCALE="max_min", BASELINE="batch_mean", COMPONENTS=3)
    yield other(groups, SCALE="batch", BASELINE="batch_mean", COMPONENTS=2, EACH=True)
    yield other(groups, SCALE="mad", BASELINE="mean", COMPONENTS=1, EACH=True, DROP=True)
    yield other(groups, SCALE="group", BASELINE="mean", EPS_INSIDE=True, COMPONENTS=2, DROP=True)


def _build(name: str, function: Any, dtypes: dict[str, str], options: dict[str, Any], config: tuple[int, int]) -> Build:
    return Build(name, function, dtypes, {**options, "BLOCK": config[0]}, config[1])


def _type(build: Build, argument: str) -> str:
    if argument in build.constants:
        return "constexpr"
    if argument in INTEGERS:
        return "i32"
    if argument.endswith("_ptr"):
        return build.dtypes.get(argument, POINTERS.get(argument, "*fp32"))
    return "fp32"


def compiled(build: Build, capability: int, multiples_of_16: Collection[str] = STRIDES) -> Any:
    """Triton's compiled kernel of one build, for values of these integers that are multiples of 16."""
    # In the interpreter's process the kernel is wrapped; its Python function compiles all the same.
    function = build.function
    if not isinstance(function, JITFunction):
        function = JITFunction(function.fn, **function.kwargs)
    signature = {name: _type(build, name) for name in function.arg_names}
    anywhere = {parameter.name for parameter in function.params if parameter.do_not_specialize_on_alignment}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if (kind.startswith("*") and name not in anywhere) or name in multiples_of_16
    }
    source = ASTSource(fn=function, signature=signature, constexprs=build.constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": build.warps})


def resources(build: Build, capability: int) -> dict[str, int]:
    """{registers, spilled, shared} of one kernel: registers per thread, bytes spilled, bytes of shared
    memory."""
    kernel = compiled(build, capability)
    found = re.search(r"\.target (\w+)", kernel.asm["ptx"])
    assert found
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(kernel.asm["ptx"])
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
        "shared": int(kernel.metadata.shared),
    }


def main() -> None:
    """Measure everything and write the table."""
    table = {b.name: {f"sm_{c}": resources(b, c) for c in CAPABILITIES} for b in builds()}
    TABLE.write_text(json.dumps({"triton": triton.__version__, "kernels": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
