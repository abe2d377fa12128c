"""What torch's FLOP counter finds of ours: the matrix products that run, each once, and visible pairs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from rewardmap_kernels import PolicyObjective, linear_logprobs, linear_policy_loss, use_implementation
from rewardmap_kernels.dispatch import Implementation
from rewardmap_kernels.tree_attention import segment_attention, tree_attention, tree_mask

sys.path.append(str(Path(__file__).parent))
import kernels_cases as cases
import tree_cases

N, V, H = 64, 50, 16
DAPO, GSPO = PolicyObjective("dapo"), PolicyObjective("gspo")
ENTROPY = PolicyObjective("gspo", entropy_coef=0.01)


def counted(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def tensors(hidden: bool = True, weight: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(N, H, requires_grad=hidden), torch.randn(V, H, requires_grad=weight), torch.randint(0, V, (N,))


@pytest.mark.parametrize("implementation", ["native", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_with_its_loss(implementation: Implementation, dtype: torch.dtype) -> None:
    rows = cases.row_inputs(N, dtype=torch.float32)

    def products(objective: PolicyObjective, hidden: bool, weight: bool, **more: Any) -> float:
        x, w, targets = tensors(hidden, weight)
        x, w = x.to(dtype), w.to(dtype)

        def run() -> None:
            loss = linear_policy_loss(x, w, targets, objective=objective, **rows, **more).loss
            if hidden or weight:
                loss.backward()

        return counted(run) / (2 * N * V * H)

    with use_implementation(implementation):
        for chunk in (N, 16):
            late = chunk < N
            assert products(DAPO, True, True, chunk_rows=chunk) == 3
            assert products(DAPO, False, True, chunk_rows=chunk) == products(DAPO, True, False, chunk_rows=chunk) == 2
            assert products(DAPO, False, False, chunk_rows=chunk) == products(GSPO, False, False, chunk_rows=chunk) == 1
            assert products(GSPO, True, True, chunk_rows=chunk) == 3 + late
            assert products(GSPO, True, False, chunk_rows=chunk) == 2
            assert products(ENTROPY, True, False, chunk_rows=chunk) == 2 + late
        assert products(DAPO, True, True, weight_grad=torch.zeros(V, H)) == 3
        assert products(DAPO, True, True, rows=torch.arange(0, N, 4)) == 3 / 4


def test_log_probabilities() -> None:
    def products(hidden: bool, weight: bool, entropy_gradient: bool, keep_bytes: int = 1 << 20) -> float:
        x, w, targets = tensors(hidden, weight)

        def run() -> None:
            options = {"entropy_gradient": entropy_gradient, "keep_bytes": keep_bytes}
            out = linear_logprobs(x, w, targets, chunk_rows=16, **options)[0]
            if hidden or weight:
                out.sum().backward()

        return counted(run) / (2 * N * V * H)

    assert products(False, False, True) == 1
    assert products(True, False, False) == 2 and products(True, False, True) == 3
    assert products(True, True, False) == 3 and products(True, True, True) == 4
    assert products(True, True, False, keep_bytes=0) == 4 and products(False, True, False, keep_bytes=0) == 3


def test_compiled_the_same_and_nothing_twice() -> None:
    rows = cases.row_inputs(N, dtype=torch.float32)

    def step(x: torch.Tensor, w: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = linear_policy_loss(x @ w.T @ w, w, targets, objective=DAPO, **rows).loss
        return loss + linear_logprobs(x, w, targets, entropy_gradient=False)[0].sum()

    compiled = torch.compile(step, backend="inductor")
    given = tensors()
    compiled(*given).backward()
    # Two products of this function's own and their gradients: x's are two, w's two.
    assert counted(lambda: compiled(*given).backward()) == counted(lambda: step(*given).backward()) == 24 * N * V * H
    loss = compiled(*given)
    assert counted(loss.backward) == 2 * N * V * H * (4 + 1)  # the loss's gradients were made before, log-probs' kept


def test_nothing_needs_values() -> None:
    with FakeTensorMode():
        x, w, targets = tensors()
        assert counted(lambda: linear_logprobs(x, w, targets)[0].sum().backward()) == 8 * N * V * H


@pytest.mark.parametrize("trees", [[(7, [(3, []), (5, [(2, []), (4, [])])]), (6, [])], [(90, [(40, []), (30, [])])]])
def test_tree_attention_counts_visible_pairs(trees: list[tree_cases.Node]) -> None:
    ends = tree_cases.pack(trees)
    pairs, heads, dim = int(tree_cases.visible(torch.tensor(ends)).sum()), 4, 8
    given = tree_cases.inputs(ends, heads, 2, dim)
    q, k, v = (x.float().requires_grad_() for x in (given.q, given.k, given.v))
    for route in (None, "plain"):
        with FlopCounterMode(display=False) as counter:
            out = tree_attention(q, k, v, tree_mask(given.ends), route=route)
        assert counter.get_total_flops() == 4 * pairs * heads * dim
        assert counted(out.sum().backward) == 10 * pairs * heads * dim


def test_tree_attention_s_kernels_count_visible_pairs() -> None:
    ends = tree_cases.pack([(90, [(40, []), (30, [])])])
    forest = torch.tensor(ends)
    pairs = int(tree_cases.visible(forest).sum())
    q, k = torch.empty(1, 4, len(ends), 16), torch.empty(1, 2, len(ends), 16)
    tiles = tree_mask(forest).tiles((64, 32), (32, 64), torch.device("cpu"))
    registry = FlopCounterMode(display=False).flop_registry
    operators = torch.ops.rewardmap_kernels
    forward = registry[operators.tree_attention_forward](q, k, k, *tiles, 0.25, out_val=None)
    backward = registry[operators.tree_attention_backward](q, q, k, k, q, q[..., 0], *tiles, 0.25, out_val=None)
    assert (forward, backward) == (4 * pairs * 4 * 16, 10 * pairs * 4 * 16)
    # No values: as one sequence.
    meta = (x.to("meta") for x in (q, k, k, *tiles))
    assert registry[operators.tree_attention_forward](*meta, 0.25, out_val=None) == 4 * 160 * 161 // 2 * 4 * 16


def test_segments_see_themselves_wholly() -> None:
    q = torch.randn(1, 2, 10, 8, requires_grad=True)
    bounds = torch.tensor([0, 4, 10])
    out = []
    work = counted(lambda: out.append(segment_attention(q, q, q, bounds, 6, 0.3, route="plain")))
    assert work == 4 * (4 * 4 + 6 * 6) * 2 * 8
    assert counted(out[0].sum().backward) == work * 10 // 4
