"""The tree-attention kernels as compiled for sm_80 and sm_90, with the plans that ship, run by ``ptx_machine.py``: in
bfloat16, which the interpreter gets wrong, on the products and the asynchronous copies of a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from rewardmap_kernels import dispatch, last_path, tree_kernels, tree_op, use_implementation
from rewardmap_kernels.tree_attention import tree_attention, tree_mask

sys.path.append(str(Path(__file__).parent))
import tree_cases as cases
from ptx_memory import PtxError
from ptx_traffic import Traffic
from ptx_triton import ptx_gpu

KERNELS = ("tree_forward_kernel", "tree_dq_kernel", "tree_dkv_kernel")
TREE = [(128, [(20, [(13, []), (5, [])]), (10, [])])]
FOREST, LONE = cases.pack([(9, [(7, []), (1, [])]), *TREE]), cases.pack(TREE)
"""193 and 176 tokens: tiles that are wholly visible, others that are in part, ends beyond the row; the lone tree has
both in every pass."""


@pytest.fixture(autouse=True)
def triton_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dispatch, "_why_not_triton", lambda tensor: None)
    torch.use_deterministic_algorithms(True)  # also fills new tensors with NaN
    with use_implementation("triton"):
        yield
    torch.use_deterministic_algorithms(False)


def rounded(ends: list[int], heads: tuple[int, int], dim: int, dtype: torch.dtype = torch.bfloat16) -> cases.Inputs:
    case = cases.inputs(ends, *heads, dim)
    return cases.Inputs(case.ends, *(x.to(dtype) for x in case[1:]))


def among_others(x: Tensor) -> Tensor:
    """Equal to x, heads inside tokens as a model has them, with NaN between the heads and beyond the row."""
    wide = torch.full((1, x.shape[2] + 64, x.shape[1], x.shape[3] + 16), float("nan"), dtype=x.dtype)
    view = wide[:, : x.shape[2], :, : x.shape[3]].transpose(1, 2)
    return view.copy_(x)


def run(
    monkeypatch: pytest.MonkeyPatch, case: cases.Inputs, capability: int, seed: int | None = None,
    edit: Callable[[str], str] = str, traffic: Traffic | None = None,
) -> list[Tensor]:  # fmt: skip
    """out, dq, dk and dv."""
    monkeypatch.setattr(tree_op, "plan_of", lambda q: tree_op.plan(q.dtype, q.shape[-1], capability // 10))
    q, k, v, dout = (among_others(x) for x in case[1:])
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with ptx_gpu(capability, seed, edit, traffic) as runs:
        out = tree_attention(*leaves, tree_mask(case.ends))
        found = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
    assert last_path("tree_attention") == ("triton", KERNELS) and dict(runs) == dict.fromkeys(KERNELS, 1)
    return found


def check(found: list[Tensor], case: cases.Inputs) -> None:
    """The error is at most eager attention's in the same dtype, but for what float32 leaves where the definition is
    zero: a lone token's dq and dk are differences of equal sums."""
    exact = cases.definition(cases.Inputs(case.ends, *(x.double() for x in case[1:])))
    for name, got, eager, wanted in zip(("out", "dq", "dk", "dv"), found, cases.definition(case), exact, strict=True):
        assert got.dtype == case.q.dtype
        floor = 1e-6 * case.dout.double().norm()
        assert (got.double() - wanted).norm() <= (eager.double() - wanted).norm() + floor, name


@pytest.mark.parametrize(
    ("capability", "ends", "dim", "heads", "parts"),
    [
        (80, FOREST, 64, (2, 1), 1),
        (90, FOREST, 64, (2, 1), 1),
        (90, LONE, 128, (1, 1), 1),
        (90, cases.SHAPES["two trees"], 80, (2, 1), 2),
    ],
    ids=["80-64", "90-64", "90-128", "90-80"],
)
def test_no_pass_errs_more_than_eager(
    capability: int, ends: list[int], dim: int, heads: tuple[int, int], parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warps in the order of a seed. ``parts``: one program sums the heads that share keys, or one for each."""
    monkeypatch.setattr(tree_op, "head_parts", lambda group, programs: parts)
    case = rounded(ends, heads, dim)
    check(run(monkeypatch, case, capability, seed=dim), case)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dim", [16, 32, 64, 80, 128])
def test_long_loops_in_any_order(capability: int, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    long = cases.pack([(500, [(9, []), (20, [])]), (70, [])]), cases.pack([(320, [])])
    for seed, ends in enumerate((*long, *cases.SHAPES.values())):
        case = rounded(ends, (2, 1), dim)
        check(run(monkeypatch, case, capability, seed), case)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("dim", "dtype"), [(64, torch.float32), (128, torch.float32), (64, torch.float16)])
def test_other_formats(capability: int, dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = rounded(FOREST, (2, 1), dim, dtype)
    check(run(monkeypatch, case, capability, 1), case)


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_a_bad_token_reaches_only_those_that_see_it(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's maximum drops a NaN that the interpreter's keeps. What does not see the token keeps its bits."""
    clean = rounded(LONE, (1, 1), 64)
    before = run(monkeypatch, clean, capability)
    seen = cases.visible(clean.ends)
    # In a query, a key, a value or a gradient of an output; of the first branch, or of the prompt.
    for which, token in ((1, 140), (2, 100), (3, 140), (4, 140)):
        bad = cases.Inputs(clean.ends, *(x.clone() for x in clean[1:]))
        bad[which][0, :, token, 3] = float("nan")
        users = seen[:, token] if which in (2, 3) else torch.arange(len(LONE)) == token
        used = seen[users].any(0)
        out = users if which < 4 else torch.zeros_like(users)
        for got, wanted, there in zip(run(monkeypatch, bad, capability), before, (out, users, used, used), strict=True):
            assert torch.equal(got[:, :, ~there], wanted[:, :, ~there])
            assert not got[:, :, there].isfinite().all(-1).any()


@pytest.mark.parametrize(
    ("capability", "word", "error"),
    [
        (80, "bar.sync", "thread 1 reads what thread 0 has just written"),
        (80, "cp.async.wait_group", "a copy to these bytes is still under way"),
        (90, "bar.sync", "thread 1 reads what thread 0 has just written"),
        (90, "cp.async.wait_group", "a copy to these bytes is still under way"),
        (90, "wgmma.wait_group", "belongs to a product that is under way"),
        (90, "wgmma.fence", "no wgmma.fence before"),
        (90, "fence.proxy.async", "a product reads what was written without a fence to its proxy"),
    ],
)
def test_a_kernel_without_what_orders_it_is_refused(
    capability: int, word: str, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(text: str) -> str:
        return "\n".join(line for line in text.split("\n") if word not in line)

    with pytest.raises(PtxError, match=error):
        run(monkeypatch, rounded(FOREST, (2, 1), 64), capability, edit=without)


def test_rows_of_any_length_run_by_one_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_op, "plan_of", lambda q: tree_op.plan(q.dtype, q.shape[-1], 8))
    kernels = [getattr(tree_kernels, name) for name in KERNELS]
    counts = []
    with ptx_gpu(80):
        for tokens, parts in ((17, 2), (16, 2), (1, 2), (32, 3)):
            monkeypatch.setattr(tree_op, "head_parts", lambda group, programs, parts=parts: parts)
            q, k = (torch.randn(1, heads, tokens, 16).bfloat16().requires_grad_() for heads in (6, 1))
            tree_attention(q, k, k, tree_mask(torch.full((tokens,), tokens))).sum().backward()
            counts.append([len(kernel.device_caches[80][0]) for kernel in kernels])
    assert all(count == counts[0] for count in counts)


def test_no_pass_wastes_transactions(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Hopper: every sector is asked for once by each warp that reads it, and no two words come from one bank."""
    case, traffic = rounded(cases.pack([(160, [(48, []), (40, [])])]), (2, 1), 64), Traffic()
    run(monkeypatch, case, 90, None, traffic=traffic)
    assert traffic.bytes["global read"] and traffic.bytes["shared write"]
    assert all(traffic.ratio(kind) == 1 for kind in traffic.bytes), dict(traffic.passes)
