"""Tree attention: which tiles are visited, the plain path, refusals, and the kernels in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewardmap_kernels import last_path, use_implementation
from rewardmap_kernels.tree_attention import tree_attention, tree_mask
from rewardmap_kernels.tree_blocks import build_blocks
from rewardmap_kernels.tree_routes import KERNELS
from rewardmap_kernels.tree_tiles import build_tiles

sys.path.append(str(Path(__file__).parent))
import tree_cases as cases

TRITON = importlib.util.find_spec("triton") is not None


@pytest.mark.skipif(not TRITON, reason="triton is not installed")
def test_the_kernels_in_the_interpreter() -> None:
    file = Path(__file__).with_name("tree_interpreted.py")
    options = ["--import-mode=importlib", "-p", "no:cacheprovider", "-q", "-W", "ignore::RuntimeWarning"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(file)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed.group(1)) >= 24, done.stdout[-500:]


def brute_force(ends: list[int], m: int, n: int) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """(tiles with a visible pair, tiles whose every pair is visible), as (query block, key block)."""
    seen = cases.visible(torch.tensor(ends))
    total = len(ends)
    some, every = set(), set()
    for a in range(-(-total // m)):
        for b in range(-(-total // n)):
            tile = seen[a * m : (a + 1) * m, b * n : (b + 1) * n]
            if tile.any():
                some.add((a, b))
            if tile.all() and (b + 1) * n <= total:
                every.add((a, b))
    return some, every


BLOCK = st.sampled_from([(4, 4), (16, 8), (8, 16), (3, 5), (64, 64)])


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(cases.forests() | st.sampled_from(list(cases.SHAPES.values())), BLOCK, BLOCK)
def test_tiles_visited_are_those_with_a_visible_pair(
    ends: list[int], forward: tuple[int, int], backward: tuple[int, int]
) -> None:
    tiles = build_tiles(torch.tensor(ends), forward, backward)
    some, every = brute_force(ends, *forward)
    keys = tiles.keys.tolist()
    visited = [(block, key) for block, first, _, last in tiles.rows.tolist() for key in keys[first:last]]
    unmasked = [(block, key) for block, first, full, _ in tiles.rows.tolist() for key in keys[first:full]]
    assert len(visited) == len(keys) == len(some) and set(visited) == some
    assert set(unmasked) == every
    some, every = brute_force(ends, *backward)
    columns = tiles.columns.tolist()
    visited = [(query, block) for block, first, _, _, last in columns for query in range(first, last)]
    unmasked = [(query, block) for block, _, first, last, _ in columns for query in range(first, last)]
    assert len(visited) == len(some) and set(visited) == some
    assert set(unmasked) == every
    assert all(first <= a <= b <= last for _, first, a, b, last in columns)
    work = [last - first for _, first, _, last in tiles.rows.tolist()]
    assert work == sorted(work, reverse=True)


@settings(max_examples=20, deadline=None, database=None, derandomize=True)
@given(cases.forests(), st.sampled_from([(1, 1), (4, 2)]))
def test_plain_torch_equals_the_definition(ends: list[int], heads: tuple[int, int]) -> None:
    case = cases.inputs(ends, *heads, 8)
    q, k, v = (x.clone().requires_grad_() for x in case[1:4])
    out = tree_attention(q, k, v, tree_mask(case.ends))
    if os.environ.get("TRITON_INTERPRET") != "1":
        assert last_path("tree_attention") == ("torch", ())
    found = (out, *torch.autograd.grad(out, (q, k, v), case.dout))
    for got, wanted in zip(found, cases.definition(case), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None, database=None, derandomize=True)
@given(cases.forests() | st.sampled_from(list(cases.SHAPES.values())), st.sampled_from([1, 5, 16, 64]))
def test_a_block_meets_the_keys_that_one_of_its_queries_sees(ends: list[int], size: int) -> None:
    mask = tree_mask(torch.tensor(ends))
    blocks = build_blocks(mask.subtree_end, mask.trees, size)
    seen = cases.visible(mask.subtree_end)
    queries, at = [], 0
    for first, last, begin, end in blocks.bounds.tolist():
        queries += range(first, last)
        assert last - first <= size
        keys = blocks.keys[begin:end]
        assert keys.tolist() == seen[first:last].any(0).nonzero().squeeze(1).tolist()
        pairs = (last - first) * (end - begin)
        assert torch.equal(blocks.visible[at : at + pairs].view(last - first, -1), seen[first:last][:, keys])
        at += pairs
    assert queries == list(range(len(ends))) and at == len(blocks.visible) and end == len(blocks.keys)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3)])
def test_half_precision_on_the_cpu(dtype: torch.dtype, heads: tuple[int, int]) -> None:
    """At most twice eager's error, output and gradients."""
    ends = cases.pack([(150, [(40, [(33, []), (20, [])]), (30, [])]), (29, [(7, []), (1, [])])])
    rounded = cases.Inputs(torch.tensor(ends), *(x.to(dtype) for x in cases.inputs(ends, *heads, 40)[1:]))
    exact = cases.definition(cases.Inputs(rounded.ends, *(x.double() for x in rounded[1:])))
    q, k, v = (x.clone().requires_grad_() for x in rounded[1:4])
    with use_implementation("torch"):
        out = tree_attention(q, k, v, tree_mask(rounded.ends))
    found = (out, *torch.autograd.grad(out, (q, k, v), rounded.dout))
    for name, got, eager, wanted in zip(
        ("out", "dq", "dk", "dv"), found, cases.definition(rounded), exact, strict=True
    ):
        assert got.dtype == dtype
        assert (got.double() - wanted).norm() <= 2 * (eager.double() - wanted).norm(), name


def test_one_mask_serves_every_layer() -> None:
    mask = tree_mask(torch.tensor(cases.SHAPES["answers"]))
    assert mask.visible is mask.visible and mask.blocks is mask.blocks
    cpu = torch.device("cpu")
    assert mask.tiles((16, 16), (16, 16), cpu) is mask.tiles((16, 16), (16, 16), cpu)


def test_a_mask_made_for_inference_serves_training() -> None:
    mask = tree_mask(torch.tensor(cases.SHAPES["answers"]))
    case = cases.inputs(cases.SHAPES["answers"], 1, 1, 8)
    with torch.inference_mode():
        expected = tree_attention(case.q, case.k, case.v, mask)
    q = case.q.requires_grad_()
    out = tree_attention(q, case.k, case.v, mask)
    out.sum().backward()
    assert torch.equal(out, expected) and q.grad is not None


def test_refusals() -> None:
    case = cases.inputs([3, 3, 3], 2, 1, 8)
    mask = tree_mask(case.ends)
    with pytest.raises(ValueError, match=r"one floating dtype; got torch.float64, torch.float32"):
        tree_attention(case.q, case.k.float(), case.v, mask)
    with pytest.raises(ValueError, match=r"expected q \[1, Hq, T, D\]"):
        tree_attention(case.q, case.k[..., :4], case.v[..., :4], mask)
    with pytest.raises(ValueError, match="q holds 3 tokens, the mask 4"):
        tree_attention(case.q, case.k, case.v, tree_mask(torch.tensor([4, 4, 4, 4])))
    with use_implementation("triton"), pytest.raises(ValueError, match="tree_attention cannot run by triton"):
        tree_attention(case.q, case.k, case.v, mask)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_bfloat16_on_a_gpu(dim: int) -> None:
    """At most twice the error of eager bfloat16, output and gradients, and the same bits twice."""
    ends = cases.pack([(700, [(90, [(33, []), (250, [])]), (300, [])]), (129, [(77, []), (1, [])])])
    case = cases.Inputs(*(x.cuda() for x in cases.inputs(ends, 8, 2, dim)))
    rounded = cases.Inputs(case.ends, *(x.bfloat16() for x in case[1:]))
    exact = cases.definition(cases.Inputs(case.ends, *(x.double() for x in rounded[1:])))

    def run() -> tuple[torch.Tensor, ...]:
        q, k, v = (x.clone().requires_grad_() for x in rounded[1:4])
        out = tree_attention(q, k, v, tree_mask(case.ends), route=KERNELS)
        return out, *torch.autograd.grad(out, (q, k, v), rounded.dout)

    first = run()
    assert last_path("tree_attention") == ("triton", ("tree_forward_kernel", "tree_dq_kernel", "tree_dkv_kernel"))
    for name, got, eager, wanted in zip(
        ("out", "dq", "dk", "dv"), first, cases.definition(rounded), exact, strict=True
    ):
        budget = 2 * (eager.double() - wanted).norm()
        assert (got.double() - wanted).norm() <= budget, name
    assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
