"""What computes attention fastest on this GPU: our kernels or flash attention over variable lengths, case by case.

A child of ``bench/gpu.py --stage kernels`` measures one case and prints one JSON row. From the rows

    python bench/routes.py --table bench/results/kernels-<gpu>.jsonl

writes ``kernels/rewardmap_kernels/attention_routes.json``, by which runs on that GPU choose. A route whose error is
over twice that of eager bfloat16 fails its row. Routes take turns; times are medians of forward and backward together.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.append(str(Path(__file__).parent))
import kernel_times
from kernel_problem import relative_error
from records import Row, read_rows, why

from rewardmap_kernels import tree_op
from rewardmap_kernels.tree_attention import segment_attention, tree_attention, tree_mask
from rewardmap_kernels.tree_routes import KERNELS, TABLE
from rewardmap_kernels.tree_varlen import why_not

Tensor = torch.Tensor
ROUNDS = {"cuda": 15, "cpu": 1}
PASSES = ("forward", "dq", "dkv")
FLEX, UNSHARED = "FlexAttention", "unshared causal flash"
"""Beside the routes, of trees that branch."""


@dataclass(frozen=True)
class Case:
    """A tree by the tokens of its nodes level by level, and how many children each node has; or segments."""

    sizes: tuple[int, ...]
    children: tuple[int, ...] = ()
    trees: int = 1
    heads: tuple[int, int] = (16, 2)
    head_dim: int = 128
    segments: bool = False

    @property
    def ends(self) -> Tensor:
        """``subtree_end`` [T]; of segments, one after another."""
        ends: list[Tensor] = []
        total = 0

        def visit(level: int) -> None:
            nonlocal total
            place, size = len(ends), self.sizes[level]
            ends.append(torch.empty(size, dtype=torch.int64))
            total += size
            for _ in range(self.children[level] if level < len(self.children) else 0):
                visit(level + 1)
            ends[place].fill_(total)

        for _ in range(self.trees):
            visit(0)
        return torch.cat(ends)


CASES = {
    "cuda": {
        # 3B: 16 heads over 2; 7B: 28 over 4.
        "unshared.3b": Case((2_500,), trees=8),
        "answers.3b.6000": Case((6_000, 500), (8,)),
        "answers.3b.2000": Case((2_000, 500), (8,), trees=3),
        "answers.3b.16000": Case((16_000, 500), (8,)),
        "questions.3b": Case((6_000, 60, 500), (4, 8)),
        "six-levels.3b": Case((6_000, 60, 4, 4, 4, 500), (2, 2, 2, 2, 2)),
        "answers.7b.6000": Case((6_000, 500), (8,), heads=(28, 4)),
        "tower.windows": Case((64,), trees=375, heads=(16, 16), head_dim=80, segments=True),
        "tower.whole": Case((24_000,), heads=(16, 16), head_dim=80, segments=True),
    },
    "cpu": {"answers": Case((40, 7), (3,), head_dim=16), "tower": Case((9,), trees=3, segments=True, head_dim=16)},
}


def inputs(case: Case, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random q, k, v and gradient of the output, their memory [1, T, H, D] as a model's is."""
    (heads, kv_heads), tokens = case.heads, len(case.ends)
    g = torch.Generator(device).manual_seed(0)

    def draw(count: int) -> Tensor:
        x = torch.randn(1, tokens, count, case.head_dim, generator=g, device=device)
        return x.to(dtype).transpose(1, 2)

    return draw(heads), draw(kv_heads), draw(kv_heads), draw(heads)


def measure(case: Case, device: str, early: Callable[[Row], None] = lambda row: None) -> Row:
    """``early`` gets the row of a GPU as soon as it has its times and errors."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    ends = case.ends
    q, k, v, dout = inputs(case, device, dtype)
    mask = tree_mask(ends, torch.device(device))
    bounds = torch.cat([ends.new_zeros(1), ends.unique()]).to(device)
    longest, scale = int(bounds.diff().max()), case.head_dim**-0.5

    def run(route: str) -> tuple[Tensor, ...]:
        a, b, c = leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        if case.segments:
            out = segment_attention(a, b, c, bounds, longest, scale, route)
        else:
            out = tree_attention(a, b, c, mask, scale, route)
        return out.detach(), *torch.autograd.grad(out, leaves, dout)

    names = ("sdpa" if case.segments else KERNELS, *(("torch-flash", "flash-attn") if device == "cuda" else ("plain",)))
    absent = {name: why_not(name, dtype, case.head_dim) for name in names[1:]}
    calls: dict[str, Callable[[], Any]] = {name: partial(run, name) for name in names if not absent.get(name)}
    if case.children and device == "cuda":
        calls |= {FLEX: flex(case, q, k, v, dout), UNSHARED: unshared(case, q)}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(ROUNDS[device] + 2):
        for name, call in list(calls.items()):
            start = _now(device)
            try:
                call()
            except Exception as reason:
                if name == names[0]:
                    raise
                absent[name] = why(reason)
                del calls[name], taken[name]
                continue
            if round_ > 1:
                taken[name].append(_now(device) - start)
    here = [name for name in names if name in calls]
    error, allowed = errors(case, {name: run(name) for name in here}, q, k, v, dout)
    seconds = {name: statistics.median(times) for name, times in taken.items()}
    flop = useful_flop(case)
    row = {
        "ok": all(value <= allowed for value in error.values()),
        "calls": 0 if case.segments else len(mask.calls.sizes),
        "dtype": str(dtype).removeprefix("torch."),
        "head_dim": case.head_dim,
        "heads": case.heads,
        "tokens": len(ends),
        "seconds": {name: seconds[name] for name in here},
        "peer_seconds": {name: seconds[name] for name in seconds if name not in here},
        "useful_tflop_per_s": {name: flop / value / 1e12 for name, value in seconds.items() if name != UNSHARED},
        "errors": error,
        "error": max(error.values()),
        "allowed_error": allowed,
        "absent": {name: reason for name, reason in absent.items() if reason},
    }
    if device == "cuda":
        row["launched"] = {} if case.segments else launched(q)
        early(row)
        row["ceilings"] = kernel_times.ceilings()
        row["on_device"] = {name: kernel_times.looked_at(call, 8) for name, call in calls.items()}
    return row


def launched(q: Tensor) -> dict[str, Any]:
    """By pass [query rows, key columns, warps, stages] of our kernels."""
    return dict(zip(PASSES, tree_op.plan_of(q), strict=True))


def useful_flop(case: Case) -> float:
    """Of the visible pairs, forward and backward: 14 per pair, head and dimension."""
    ends = case.ends
    lengths = ends.unique(return_counts=True)[1]
    pairs = lengths.square() if case.segments else ends - torch.arange(len(ends))
    return 14.0 * int(pairs.sum()) * case.heads[0] * case.head_dim


def flex(case: Case, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Callable[[], Any]:
    """FlexAttention forward and backward under the tree's mask, which is made once, as a model's layers share it."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    ends = case.ends.to(q.device)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i < ends[j])

    masks: list[Any] = []
    compiled = torch.compile(flex_attention)

    def run() -> None:
        if not masks:
            masks.append(create_block_mask(visible, None, None, len(ends), len(ends), device=q.device.type))
        a, b, c = leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        torch.autograd.grad(compiled(a, b, c, block_mask=masks[0], enable_gqa=True), leaves, dout)

    return run


def unshared(case: Case, like: Tensor) -> Callable[[], Any]:
    """torch's flash attention of every path from a root to a leaf by itself, all in one call: nothing shared."""
    count, length = case.trees * prod(case.children), sum(case.sizes)
    heads, kv_heads = case.heads
    q, dout, k, v = (
        torch.randn(count, length, each, case.head_dim, dtype=like.dtype, device=like.device).transpose(1, 2)
        for each in (heads, heads, kv_heads, kv_heads)
    )

    def run() -> None:
        a, b, c = leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = functional.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=True)
        torch.autograd.grad(out, leaves, dout)

    return run


def errors(
    case: Case, found: dict[str, tuple[Tensor, ...]], q: Tensor, k: Tensor, v: Tensor, dout: Tensor
) -> tuple[dict[str, float], float]:
    """Relative error of (out, dq, dk, dv) by route, in the first group of heads, and twice eager's own: one group, so
    that float64's scores fit."""
    group = q.shape[1] // k.shape[1]
    one = q[:, :group], k[:, :1], v[:, :1]
    exact, eager = (
        definition(case, *(x.to(dtype) for x in (*one, dout[:, :group]))) for dtype in (torch.float64, q.dtype)
    )
    heads = (group, group, 1, 1)
    return {
        name: relative_error((x[:, :count] for x, count in zip(parts, heads, strict=True)), exact)
        for name, parts in found.items()
    }, 2 * relative_error(eager, exact)


def definition(case: Case, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
    """Attention by its definition, of one group of heads: (out, dq, dk, dv). The mask as written, one head at a time;
    gradients of k and v summed over heads in float64."""
    ends = case.ends.to(q.device)
    at = torch.arange(len(ends), device=q.device)
    hidden = (at[None] >= ends[:, None]).T | (at[None] > at[:, None])
    if case.segments:
        hidden = ends[None] != ends[:, None]
    outs, dqs, sums = [], [], [torch.zeros_like(x[0, 0], dtype=torch.float64) for x in (k, v)]
    for head in range(q.shape[1]):
        leaves = [x.detach().requires_grad_() for x in (q[0, head], k[0, 0], v[0, 0])]
        scores = (leaves[0] @ leaves[1].T * q.shape[-1] ** -0.5).masked_fill(hidden, float("-inf"))
        out = scores.softmax(-1) @ leaves[2]
        dq, *rest = torch.autograd.grad(out, leaves, dout[0, head])
        outs.append(out.detach())
        dqs.append(dq)
        sums = [total + part.double() for total, part in zip(sums, rest, strict=True)]
    return torch.stack(outs)[None], torch.stack(dqs)[None], sums[0][None, None], sums[1][None, None]


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def write_table(path: Path) -> None:
    """Take the newest passed row of every case over into the table that runs choose by."""
    found: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.is_file() else {}
    rows: dict[str, dict[str, Any]] = {}
    for row in read_rows(path):
        if row["item"].startswith("routes.") and row["ok"] and row["gpu"]:
            rows[row["item"]] = row
    if not rows:
        sys.exit(f"{path} holds no passed row of routes on a GPU")
    kept = ("item", "calls", "dtype", "head_dim", "heads", "tokens", "seconds", "error", "allowed_error")
    last = list(rows.values())[-1]
    provenance = {key: last[key] for key in ("torch", "triton", "driver", "commit", "date")}
    found[last["gpu"]] = provenance | {"rows": [{key: row[key] for key in kept} for row in rows.values()]}
    TABLE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=tuple(CASES), default="cuda")
    parser.add_argument("--case", help="one of " + ", ".join((*CASES["cuda"], *CASES["cpu"])))
    parser.add_argument("--table", type=Path, help="write the table from the rows of this file")
    chosen = parser.parse_args()
    if chosen.table:
        write_table(chosen.table)
    else:

        def tell(row: Row) -> None:
            print(json.dumps(row), flush=True)

        tell(measure(CASES[chosen.device][chosen.case], chosen.device, tell))


if __name__ == "__main__":
    main()
