"""The tree-attention kernels on the CPU: run by ``test_tree_attention.py`` in a process with TRITON_INTERPRET=1.

float32 and float16 only: the interpreter is silently wrong in bfloat16. Blocks are made tiny so that small forests
span several.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.utils import checkpoint

from rewardmap_kernels import last_path, tree_op, use_implementation
from rewardmap_kernels.tree_attention import tree_attention, tree_mask

sys.path.append(str(Path(__file__).parent))
import tree_cases as cases

Tensor = torch.Tensor


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    plan = tree_op.Plan(*(tree_op.Blocks(m, n, 4, 1) for m, n in ((64, 32), (64, 32), (32, 64))))
    monkeypatch.setattr(tree_op, "plan_of", lambda q: plan)
    yield


def run(case: cases.Inputs, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """(out, dq, dk, dv) of the kernels."""
    q, k, v = (x.to(dtype).requires_grad_() for x in (case.q, case.k, case.v))
    with use_implementation("triton"):
        out = tree_attention(q, k, v, tree_mask(case.ends))
    return out, *torch.autograd.grad(out, (q, k, v), case.dout.to(dtype))


def check(case: cases.Inputs, dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3}[dtype]
    rounded = cases.Inputs(case.ends, *(x.to(dtype).double() for x in case[1:]))
    for name, got, wanted in zip(("out", "dq", "dk", "dv"), run(case, dtype), cases.definition(rounded), strict=True):
        # A lone token's dq and dk are zero, as differences of equal sums: what rounding leaves is of dout's size.
        dout = rounded.dout.norm()
        size = dout if wanted.norm() < 1e-9 * dout else max(wanted.norm(), 0.1 * dout)
        error = float((got.detach().double() - wanted).norm() / size)
        assert error <= tolerance, f"{name}: {error:.2e} on {case.ends.tolist()}"


@settings(max_examples=6, deadline=None, database=None, derandomize=True, phases=[Phase.generate])
@given(cases.forests(), st.sampled_from([(1, 1), (4, 2), (3, 1)]), st.sampled_from([16, 24]))
def test_random_forests(ends: list[int], heads: tuple[int, int], dim: int) -> None:
    check(cases.inputs(ends, *heads, dim), torch.float32)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((s, torch.float32) for s in cases.SHAPES), ("answers", torch.float16), ("chain", torch.float16)],
)
def test_every_shape_of_forest(shape: str, dtype: torch.dtype) -> None:
    check(cases.inputs(cases.SHAPES[shape], 2, 1, 20), dtype)
    assert last_path("tree_attention") == ("triton", ("tree_forward_kernel", "tree_dq_kernel", "tree_dkv_kernel"))


@pytest.mark.parametrize("dim", [64, 80, 128])
def test_head_dimensions_of_real_models(dim: int) -> None:
    check(cases.inputs(cases.pack([(37, [(7, []), (13, [])])]), 2, 1, dim), torch.float32)


@pytest.mark.parametrize("parts", [2, 4])
def test_divided_heads_sum_to_the_same(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_op, "head_parts", lambda group, programs: parts)
    check(cases.inputs(cases.SHAPES["answers"], 4, 1, 16), torch.float32)


def test_the_same_bits_every_run() -> None:
    case = cases.inputs(cases.SHAPES["two trees"], 4, 2, 16)
    first, second = run(case, torch.float16), run(case, torch.float16)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_views_as_a_model_makes_them() -> None:
    """Heads inside tokens, and a gradient that is broadcast: no stride is assumed."""
    case = cases.inputs(cases.SHAPES["answers"], 4, 2, 16)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2).float() for x in case[1:4])
    out = run(cases.Inputs(case.ends, q, k, v, torch.ones(()).expand(q.shape)), torch.float32)
    plain = cases.definition(cases.Inputs(case.ends, *(x.double() for x in (q, k, v, torch.ones_like(q)))))
    for got, wanted in zip(out, plain, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)
    assert out[0].transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_token_reaches_only_those_that_see_it(value: float) -> None:
    """Exactly: the finite entries are those of the definition, and in the same places."""
    ends = cases.SHAPES["padded"]
    case = cases.inputs(ends, 2, 1, 16)
    alone = len(ends) - 2
    clean = run(case, torch.float32)
    for tensor in case[1:4]:
        tensor[:, :, alone] = value
    for got, wanted in zip(run(case, torch.float32), clean, strict=True):
        others = [i for i in range(len(ends)) if i != alone]
        assert torch.equal(got[:, :, others], wanted[:, :, others])
        assert not got[:, :, alone].isfinite().any()


@pytest.mark.parametrize("which", [1, 2, 3])
def test_a_bad_token_is_never_hidden(which: int) -> None:
    """A NaN in the query, key or value of a prompt token shows in the outputs of all that use it, in no other."""
    ends = cases.SHAPES["answers"]
    case = cases.inputs(ends, 1, 1, 16)
    token = 41  # in the first answer
    case[which][0, 0, token, 3] = float("nan")
    bad = run(case, torch.float32)[0].isnan().any(-1)[0, 0]
    users = {token} if which == 1 else set(range(token, ends[token]))
    assert set(bad.nonzero().flatten().tolist()) == users


# An infinite key may score -inf, which is no fault.
@pytest.mark.parametrize(
    ("which", "value"), [*((which, float("nan")) for which in (1, 2, 3, 4)), (1, float("inf")), (4, float("inf"))]
)
def test_gradients_are_bad_only_where_a_bad_token_is_seen(which: int, value: float) -> None:
    """A bad query, key, value or gradient of an output: dq of those that use it, dk of all that these see, no other."""
    ends = cases.SHAPES["answers"]
    case = cases.inputs(ends, 2, 1, 16)
    clean = run(case, torch.float32)
    token = 41  # in the first answer
    case[which][0, :, token, 3] = value
    users = torch.zeros(len(ends), dtype=torch.bool)
    users[slice(token, token + 1) if which in (1, 4) else slice(token, ends[token])] = True
    used = cases.visible(case.ends)[users].any(0)
    _, dq, dk, dv = run(case, torch.float32)
    for got, wanted, bad in ((dq, clean[1], users), (dk, clean[2], used), (dv, clean[3], used)):
        assert torch.equal(got[:, :, ~bad], wanted[:, :, ~bad])
    assert not dq[:, :, users].isfinite().any() and not dk[:, :, used].isfinite().any()


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    case = cases.inputs(cases.SHAPES["two trees"], 2, 1, 16)
    mask = tree_mask(case.ends)

    def layer(*x: Tensor) -> Tensor:
        return tree_attention(*x, mask)

    def gradients(call: Callable[..., Any]) -> tuple[Tensor, ...]:
        leaves = [x.float().requires_grad_() for x in case[1:4]]
        call(*leaves).backward(case.dout.float())
        return tuple(x.grad for x in leaves if x.grad is not None)

    got = gradients(lambda *x: checkpoint.checkpoint(layer, *x, use_reentrant=reentrant))
    assert len(got) == 3
    assert all(torch.equal(a, b) for a, b in zip(got, gradients(layer), strict=True))


def test_selective_checkpointing_keeps_attention() -> None:
    """The operator can be named in a policy: the forward kernel then runs once."""
    case = cases.inputs(cases.SHAPES["chain"], 1, 1, 16)
    mask, calls = tree_mask(case.ends), []
    kept = [torch.ops.rewardmap_kernels.tree_attention_forward.default]
    leaves = [x.float().requires_grad_() for x in case[1:4]]
    original = tree_op._note
    try:
        tree_op._note = calls.append
        out = checkpoint.checkpoint(
            lambda *x: tree_attention(*x, mask) * 2,
            *leaves,
            use_reentrant=False,
            context_fn=lambda: checkpoint.create_selective_checkpoint_contexts(kept),
        )
        out.sum().backward()
    finally:
        tree_op._note = original
    assert calls == ["tree_forward_kernel", "tree_dq_kernel", "tree_dkv_kernel"]


def test_operators_obey_torch_s_rules() -> None:
    case = cases.inputs(cases.SHAPES["answers"], 2, 1, 16)
    q, k, v = (x.float().requires_grad_() for x in case[1:4])
    plan = tree_op.plan_of(q)
    blocks = (plan.forward.m, plan.forward.n), (plan.dkv.m, plan.dkv.n)
    tiles = tree_mask(case.ends).tiles(*blocks, q.device)
    kinds = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(tree_op.tree_attention_forward, (q, k, v, *tiles, 0.25), test_utils=kinds)


def test_refusals() -> None:
    case = cases.inputs([3, 3, 3], 1, 1, 16)
    mask = tree_mask(case.ends)
    q = case.q.float()
    with pytest.raises(ValueError, match=r"head dimension 8 has no kernel \(16 to 128 have\)"):
        tree_attention(*[q[..., :8]] * 3, mask)
    wide = torch.zeros(1, 1, 3, 160)
    with pytest.raises(ValueError, match="head dimension 160 has no kernel"):
        tree_attention(wide, wide, wide, mask)
    with pytest.raises(ValueError, match=r"scale=-1.0 must be positive"):
        tree_attention(q, q, q, mask, -1.0)
    with use_implementation("triton"), pytest.raises(ValueError, match="float64 has no Triton kernel"):
        tree_attention(case.q, case.k, case.v, mask)
