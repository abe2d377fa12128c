"""Which launches of the tree-attention kernels are fastest on this GPU: ``python bench/tune_tree.py``, a JSON row.

A child of ``bench/gpu.py --stage kernels``. Blocks, warps and stages of the three passes are tried on a prompt with
eight answers, a candidate of each pass in one run, timed kernel by kernel. ``tree_op.PLANS`` is what runs otherwise,
what results are held to, and where the best belong. Processes side by side compile the candidates into Triton's cache
first: one alone would take minutes. A row is printed after each candidate; the last one counts.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parent))
import kernel_times
import routes
from kernel_problem import relative_error
from records import Row, why
from routes import PASSES
from torch import Tensor

from rewardmap_kernels import tree_op
from rewardmap_kernels.tree_attention import tree_attention, tree_mask
from rewardmap_kernels.tree_op import Blocks, Plan
from rewardmap_kernels.tree_routes import KERNELS

# (query rows, key columns, warps): what spills nothing, or next to nothing, on sm_90a under Triton 3.6.
ROWS = ((128, 64, 8), (128, 32, 8), (64, 64, 4), (64, 32, 4))
COLUMNS = ((32, 128, 8), (64, 128, 8), (32, 64, 8), (32, 64, 4), (64, 64, 8))
STAGES = (2, 3, 4)
ROUNDS = 5
COMPILING = 45.0
"""Seconds that the processes side by side may take."""
Events = Callable[[Callable[[], Any]], list[tuple[str, float, float]]]


def candidates() -> list[Plan]:
    """Every candidate of every pass, in as few plans as there are of the pass that has most."""
    rows, columns = ([Blocks(*tile, stages) for tile in tiles for stages in STAGES] for tiles in (ROWS, COLUMNS))
    pairs = zip(itertools.cycle(rows), itertools.cycle(columns), strict=False)
    return [Plan(row, row, column) for row, column in itertools.islice(pairs, max(len(rows), len(columns)))]


def runner(case: routes.Case, device: str, dtype: torch.dtype) -> tuple[Plan, Callable[[Plan], tuple[Tensor, ...]]]:
    """The plan that runs otherwise, and what runs forward and backward by a plan: out, dq, dk, dv."""
    q, k, v, dout = routes.inputs(case, device, dtype)
    mask = tree_mask(case.ends, torch.device(device))
    key = dtype.itemsize == 2, tree_op.padded(case.head_dim)
    usual = tree_op.PLANS[key]

    def run(plan: Plan) -> tuple[Tensor, ...]:
        tree_op.PLANS[key] = plan
        try:
            a, b, c = leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            out = tree_attention(a, b, c, mask, case.head_dim**-0.5, KERNELS)
            return out.detach(), *torch.autograd.grad(out, leaves, dout)
        finally:
            tree_op.PLANS[key] = usual

    return usual, run


def measure(
    case: routes.Case, plans: Sequence[Plan], device: str, dtype: torch.dtype, events: Events,
    early: Callable[[Row], None] = lambda row: None,
) -> Row:  # fmt: skip
    """Median seconds of each pass by its blocks, and the fastest plan: its forward and dq share their tiles. Where the
    usual plan has no time, why not. ``early`` gets the row of what was tried so far, after each plan."""
    usual, run = runner(case, device, dtype)
    wanted = run(usual)
    seconds: dict[str, dict[Blocks, float]] = {name: {} for name in PASSES}
    failed: dict[str, str] = {}
    for plan in (usual, *plans):
        try:
            off = relative_error(run(plan), wanted)
            if not off <= 2**-7:
                raise ArithmeticError(f"{off:.1e} from the usual plan's results")
            kernels = kernel_times.summary(events(lambda plan=plan: [run(plan) for _ in range(ROUNDS)]), 20)["kernels"]
            for name, blocks in zip(PASSES, plan, strict=True):
                seconds[name][blocks] = next(each[2] for kernel, each in kernels.items() if f"tree_{name}_" in kernel)
        except Exception as reason:  # more shared memory than there is, or what the compiler refuses
            failed[", ".join(map(told, plan))] = why(reason)
        early(row_of(case, usual, seconds, failed))
    return row_of(case, usual, seconds, failed)


def row_of(case: routes.Case, usual: Plan, seconds: dict[str, dict[Blocks, float]], failed: dict[str, str]) -> Row:
    if any(blocks not in seconds[name] for name, blocks in zip(PASSES, usual, strict=True)):
        return {"ok": False, "failed": failed}
    pairs = [(row, dq) for row in seconds["forward"] for dq in seconds["dq"] if row[:2] == dq[:2]]
    best = Plan(
        *min(pairs, key=lambda pair: seconds["forward"][pair[0]] + seconds["dq"][pair[1]]),
        min(seconds["dkv"], key=seconds["dkv"].__getitem__),
    )

    def whole(plan: Plan) -> float:
        return sum(seconds[name][blocks] for name, blocks in zip(PASSES, plan, strict=True))

    return {
        "ok": True,
        "tokens": len(case.ends), "heads": case.heads, "head_dim": case.head_dim,
        "usual": dict(zip(PASSES, map(told, usual), strict=True)),
        "best": dict(zip(PASSES, map(told, best), strict=True)),
        "best_times_faster": whole(usual) / whole(best),
        "seconds": {name: {told(blocks): value for blocks, value in each.items()} for name, each in seconds.items()},
        "failed": failed,
    }  # fmt: skip


def told(blocks: Blocks) -> str:
    """As the row names it."""
    return f"{blocks.m} x {blocks.n}, {blocks.warps} warps, {blocks.stages} stages"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=int, nargs=2, metavar=("I", "N"), help="run every N-th candidate, once")
    share = parser.parse_args().share
    case, plans = routes.CASES["cuda"]["answers.3b.6000"], candidates()
    if share:
        _, run = runner(case, "cuda", torch.bfloat16)
        for plan in plans[share[0] :: share[1]]:
            with contextlib.suppress(Exception):  # the parent says why
                run(plan)
        return
    count = min(len(plans), os.cpu_count() or 1)
    compilers = [
        subprocess.Popen([sys.executable, __file__, "--share", str(i), str(count)], stdout=subprocess.DEVNULL)
        for i in range(count)
    ]
    until = time.monotonic() + COMPILING
    for compiler in compilers:
        with contextlib.suppress(subprocess.TimeoutExpired):
            compiler.wait(max(0.0, until - time.monotonic()))
        compiler.kill()  # one that is not done by now would take turns with what is timed
    kernel_times.kernel_events(lambda: torch.zeros(1, device="cuda"))  # starts the profiler
    ceilings = kernel_times.ceilings()

    def tell(row: Row) -> None:
        print(json.dumps(row | {"ceilings": ceilings}), flush=True)

    tell(measure(case, plans, "cuda", torch.bfloat16, kernel_times.kernel_events, tell))


if __name__ == "__main__":
    main()
