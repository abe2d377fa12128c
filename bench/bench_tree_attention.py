"""Tree attention on a prompt with eight answers, beside causal attention on the eight unshared sequences.

``pytest bench/bench_tree_attention.py``. Arithmetic is that of visible pairs only: 4·D FLOP per pair and head
forward, 10·D backward. The time ratio stands beside the ideal one, which is the ratio of that arithmetic. On a GPU
FlexAttention runs on the same forest, its mask building counted as ours is. Error against float64 is on the same row.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from rewardmap_kernels import last_path
from rewardmap_kernels.tree_attention import tree_attention, tree_mask

Tensor = torch.Tensor
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
HEADS, KV_HEADS, DIM = (16, 2, 128) if CUDA else (4, 2, 64)
GROUP, RATIO = 8, 12
RESPONSE = 500 if CUDA else 40
PROMPT = RATIO * RESPONSE
ROUNDS = 15 if CUDA else 5


def forest() -> Tensor:
    """subtree_end of one prompt with GROUP answers."""
    total = PROMPT + GROUP * RESPONSE
    ends = PROMPT + RESPONSE * (1 + torch.arange(GROUP))
    return torch.cat([torch.full((PROMPT,), total), ends.repeat_interleave(RESPONSE)])


def visible_pairs(ends: Tensor) -> int:
    return int((ends - torch.arange(len(ends))).sum())


def seconds(providers: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median of ROUNDS, providers taking turns after a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in providers}
    for round_ in range(ROUNDS + 1):
        for name, call in providers.items():
            synchronize()
            start = time.perf_counter()
            call()
            synchronize()
            if round_:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def flex(q: Tensor, k: Tensor, v: Tensor, ends: Tensor) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention)
    total = len(ends)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i < ends[j])

    def run() -> Tensor:
        block_mask = create_block_mask(visible, None, None, total, total, device=DEVICE)
        out: Tensor = compiled(q, k, v, block_mask=block_mask, enable_gqa=True)
        return out

    return run


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_against_the_unshared_sequences(benchmark: Any, backward: bool) -> None:
    g = torch.Generator().manual_seed(0)
    ends = forest()
    total = len(ends)

    def leaf(heads: int) -> Tensor:
        return torch.randn(1, heads, total, DIM, generator=g).to(DEVICE, DTYPE).requires_grad_(backward)

    q, k, v = leaf(HEADS), leaf(KV_HEADS), leaf(KV_HEADS)
    weight = torch.randn(1, HEADS, total, DIM, generator=g).to(DEVICE, DTYPE)
    rows = torch.arange(PROMPT).repeat(GROUP, 1), PROMPT + torch.arange(GROUP * RESPONSE).view(GROUP, RESPONSE)
    index = torch.cat(rows, 1).to(DEVICE)

    def unshared_leaf(x: Tensor) -> Tensor:
        return x.detach()[0][:, index].transpose(0, 1).contiguous().requires_grad_(backward)

    wide = [unshared_leaf(x) for x in (q, k, v)]
    wide_weight = unshared_leaf(weight).detach()

    def step(call: Callable[[], Tensor], leaves: list[Tensor], dout: Tensor) -> Tensor:
        out = call()
        if backward:
            torch.autograd.grad(out, leaves, dout)
        return out.detach()

    def ours() -> Tensor:
        return step(lambda: tree_attention(q, k, v, tree_mask(ends, q.device)), [q, k, v], weight)

    def unshared() -> Tensor:
        # One sequence at a time on a CPU; on a GPU one call for all, flash attention's best case.
        parts = range(1) if CUDA else range(GROUP)
        for n in parts:
            x = wide if CUDA else [t[n : n + 1] for t in wide]
            dout = wide_weight if CUDA else wide_weight[n : n + 1]
            out = step(
                lambda x=x: functional.scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True), x, dout
            )
        return out

    providers: dict[str, Callable[[], Any]] = {"ours": ours, "unshared causal SDPA": unshared}
    if CUDA:
        on_device = ends.to(DEVICE)
        run = flex(q, k, v, on_device)
        providers["FlexAttention"] = lambda: step(run, [q, k, v], weight)
    taken = seconds(providers)
    pairs = visible_pairs(ends)
    length = PROMPT + RESPONSE
    flop = pairs * HEADS * DIM * (14 if backward else 4)
    # The last answer of the unshared run is the last one of the forest.
    answers = unshared()[-1, :, PROMPT:].double()
    expected = exact(q, k, v, ends)[:, -RESPONSE:]
    row = {
        "path": list(last_path("tree_attention") or ()),
        "times_faster_than": {name: s / taken["ours"] for name, s in taken.items() if name != "ours"},
        "ideal_over_unshared": GROUP * length * (length + 1) / 2 / pairs,
        "useful_gflop_per_s": flop / taken["ours"] / 1e9,
        "error": float((ours()[0, :, -RESPONSE:].double() - expected).norm() / expected.norm()),
        "error_unshared": float((answers - expected).norm() / expected.norm()),
    }
    benchmark.extra_info.update(row)
    print(row)
    benchmark.pedantic(lambda: (ours(), synchronize()), rounds=3, warmup_rounds=1)
    assert row["error"] <= 2 * row["error_unshared"] + 1e-6


def exact(q: Tensor, k: Tensor, v: Tensor, ends: Tensor) -> Tensor:
    """[Hq, T, D] float64, one head at a time in plain torch."""
    mask = tree_mask(ends.to(DEVICE))
    heads = []
    for head in range(HEADS):
        shared = head // (HEADS // KV_HEADS)
        one = (q[:, [head]], k[:, [shared]], v[:, [shared]])
        heads.append(tree_attention(*(x.detach().double() for x in one), mask)[0, 0])
    return torch.stack(heads)
