"""Tree attention by flash attention over variable lengths: its calls, its definition in plain torch against the mask as
written, what the flash libraries are handed, and how a route is chosen."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from rewardmap_kernels import last_path, tree_routes, tree_varlen
from rewardmap_kernels.tree_attention import segment_attention, tree_attention, tree_mask

sys.path.append(str(Path(__file__).parent))
import tree_cases as cases

Tensor = torch.Tensor
FORESTS = cases.forests() | st.sampled_from(list(cases.SHAPES.values()))
DEEP = cases.pack([(150, [(40, [(33, [(5, []), (9, [])]), (20, [])]), (30, [])]), (29, [(7, []), (1, [])])])


def by(route: str, case: cases.Inputs) -> tuple[Tensor, ...]:
    """(out, dq, dk, dv)."""
    q, k, v = (x.clone().requires_grad_() for x in case[1:4])
    out = tree_attention(q, k, v, tree_mask(case.ends), route=route)
    assert last_path("tree_attention")[1][-1] == route
    return out, *torch.autograd.grad(out, (q, k, v), case.dout)


@settings(max_examples=40, deadline=None, database=None, derandomize=True)
@given(FORESTS, st.sampled_from([(1, 1), (4, 2), (3, 1)]))
def test_merged_calls_equal_the_definition(ends: list[int], heads: tuple[int, int]) -> None:
    case = cases.inputs(ends, *heads, 8)
    for got, wanted in zip(by("plain", case), cases.definition(case), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None, database=None, derandomize=True)
@given(FORESTS)
def test_calls_hold_every_visible_pair_once_and_no_other(ends: list[int]) -> None:
    calls = tree_varlen.build_calls(torch.tensor(ends))
    seen = torch.zeros(len(ends), len(ends), dtype=torch.int64)
    everything = torch.arange(len(ends))
    for number, call in enumerate(tree_varlen._each(*calls)):
        queries, keys = (everything if x is None else x for x in (call.queries, call.keys))
        assert len(queries.unique()) == len(queries) and len(keys.unique()) == len(keys)
        for q, k in tree_varlen._segments(call):
            pairs = torch.ones(len(queries[q]), len(keys[k]), dtype=torch.int64)
            assert len(pairs) <= call.longest_q and pairs.shape[1] <= call.longest_k
            seen[queries[q][:, None], keys[k]] += pairs.tril() if number == 0 else pairs
    assert torch.equal(seen, cases.visible(torch.tensor(ends)).long())


def test_a_prompt_with_answers_takes_two_calls() -> None:
    two = [len(tree_mask(torch.tensor(cases.SHAPES[name])).calls.sizes) for name in ("answers", "two trees", "chain")]
    assert two == [2, 3, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3)])
def test_half_precision(dtype: torch.dtype, heads: tuple[int, int]) -> None:
    """At most twice eager's error, output and gradients, over four levels."""
    rounded = cases.Inputs(torch.tensor(DEEP), *(x.to(dtype) for x in cases.inputs(DEEP, *heads, 40)[1:]))
    exact = cases.definition(cases.Inputs(rounded.ends, *(x.double() for x in rounded[1:])))
    found, eager = by("plain", rounded), cases.definition(rounded)
    for name, got, theirs, wanted in zip(("out", "dq", "dk", "dv"), found, eager, exact, strict=True):
        assert got.dtype == dtype
        assert (got.double() - wanted).norm() <= 2 * (theirs.double() - wanted).norm(), name


def test_segments_see_themselves_alone() -> None:
    case = cases.inputs([50] * 50, 4, 2, 8)
    bounds = torch.tensor([0, 7, 8, 31, 50])
    found = []
    for route in ("plain", "sdpa", None):
        q, k, v = (x.clone().requires_grad_() for x in case[1:4])
        out = segment_attention(q, k, v, bounds, 23, 0.3, route)
        found.append((out, *torch.autograd.grad(out, (q, k, v), case.dout)))
    for got, wanted, default in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
        assert torch.equal(wanted, default)


def test_operators_obey_torch_s_rules() -> None:
    case = cases.inputs(cases.SHAPES["two trees"], 4, 2, 8)
    q, k, v = (x.requires_grad_() for x in case[1:4])
    kinds = ("test_schema", "test_autograd_registration", "test_faketensor")
    for calls in (tree_mask(case.ends).calls, tree_mask(torch.tensor([81] * 81)).calls):
        torch.library.opcheck(tree_varlen.tree_varlen_forward, (q, k, v, *calls, True, 0.3, "plain"), test_utils=kinds)


# What each library is handed, held to the names of its own parameters.


class Aten(TorchDispatchMode):
    """Computes torch's flash attention in plain torch, its arguments by the names in its schema."""

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::_flash_attention_")
        if name not in ("forward", "backward"):
            return func(*args, **(kwargs or {}))
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | (kwargs or {})
        call = tree_varlen._Call(given["cum_seq_q"], given["cum_seq_k"], given["max_q"], given["max_k"], None, None)
        assert given["dropout_p"] == 0.0 and call.cu_q.dtype == call.cu_k.dtype == torch.int32
        rest = call, given["is_causal"], given["scale"]
        inputs = [given[name] for name in ("query", "key", "value")]
        if name == "forward":
            assert not given["return_debug_mask"]
            out, lse = tree_varlen._plain_forward(*inputs, *rest)
            return out, lse, torch.zeros(2), torch.zeros(2), torch.zeros(0)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        more = given["out"], given["logsumexp"]
        assert more[1].is_contiguous()
        return tree_varlen._plain_backward(given["grad_out"], *inputs, *more, *rest)


def test_torch_s_flash_attention_is_called_by_its_schema() -> None:
    case = cases.inputs([30] * 30, 4, 2, 8)
    q, k, v, dout = (x[0].transpose(0, 1) for x in case[1:])
    (call,) = tree_varlen._each(*tree_varlen.build_segments(torch.tensor([0, 9, 30]), 30, 21))
    forward, backward = tree_varlen.ROUTES["torch-flash"]
    with Aten():
        out, lse = forward(q, k, v, call, True, 0.3)
        grads = backward(dout, q, k, v, out, lse, call, True, 0.3)
    assert not torch.are_deterministic_algorithms_enabled()
    wanted = tree_varlen._plain_forward(q, k, v, call, True, 0.3)
    assert torch.equal(out, wanted[0]) and torch.equal(lse, wanted[1])
    expected = tree_varlen._plain_backward(dout, q, k, v, out, lse, call, True, 0.3)
    assert all(map(torch.equal, grads, expected))


def test_torch_s_flash_attention_gives_what_is_expected_of_it() -> None:
    """Shapes and dtypes as torch's own meta functions give them."""
    q, k = torch.empty(30, 4, 64, dtype=torch.bfloat16, device="meta"), torch.empty(30, 2, 64, dtype=torch.bfloat16)
    k = k.to("meta")
    (call,) = tree_varlen._each(*tree_varlen.build_segments(torch.tensor([0, 9, 30]), 30, 21))
    call = call._replace(cu_q=call.cu_q.to("meta"), cu_k=call.cu_k.to("meta"))
    forward, backward = tree_varlen.ROUTES["torch-flash"]
    out, lse = forward(q, k, k, call, True, 0.3)
    assert out.shape == q.shape and lse.shape == (4, 30) and lse.dtype == torch.float32
    assert [x.shape for x in backward(out, q, k, k, out, lse, call, True, 0.3)] == [q.shape, k.shape, k.shape]


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """In the place of flash-attn 2.8: its two functions with its parameters, computed in plain torch."""
    called: list[str] = []

    def _flash_attn_varlen_forward(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int = -1,
        window_size_right: int = -1, softcap: float = 0.0, alibi_slopes: Any = None, return_softmax: bool = False,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        assert (dropout_p, window_size_left, window_size_right, softcap) == (0.0, -1, -1, 0.0)
        assert alibi_slopes is None and not return_softmax and cu_seqlens_q.dtype == torch.int32
        called.append("forward")
        call = tree_varlen._Call(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, None, None)
        out, lse = tree_varlen._plain_forward(q, k, v, call, causal, softmax_scale)
        return out, lse, torch.zeros(0), torch.zeros(2)

    def _flash_attn_varlen_backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor, dk: Tensor,
        dv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
        dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int, window_size_right: int,
        softcap: float, alibi_slopes: Any, deterministic: bool, rng_state: Any = None, zero_tensors: bool = False,
    ) -> Tensor:  # fmt: skip
        assert (dropout_p, window_size_left, window_size_right, softcap) == (0.0, -1, -1, 0.0)
        assert alibi_slopes is None and deterministic and softmax_lse.is_contiguous()
        called.append("backward")
        call = tree_varlen._Call(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, None, None)
        grads = tree_varlen._plain_backward(dout, q, k, v, out, softmax_lse, call, causal, softmax_scale)
        for into, grad in zip((dq, dk, dv), grads, strict=True):
            into.copy_(grad)
        return softmax_lse

    name = "flash_attn.flash_attn_interface"
    module: Any = types.ModuleType(name)
    module._flash_attn_varlen_forward = _flash_attn_varlen_forward
    module._flash_attn_varlen_backward = _flash_attn_varlen_backward
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(tree_varlen, "_why_not_here", lambda route: None)
    yield called


def test_the_flash_attn_package_is_called_by_its_parameters(package: list[str]) -> None:
    case = cases.inputs(cases.SHAPES["two trees"], 4, 2, 8)
    rounded = cases.Inputs(case.ends, *(x.half() for x in case[1:]))
    assert all(map(torch.equal, by("flash-attn", rounded), by("plain", rounded)))
    assert package == ["forward"] * 3 + ["backward"] * 3


def test_what_cannot_run_is_refused() -> None:
    case = cases.inputs([3, 3, 3], 2, 1, 8)
    mask = tree_mask(case.ends)
    half = [x.half() for x in case[1:4]]
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="cannot run by torch-flash: there is no CUDA device"):
            tree_attention(*half, mask, route="torch-flash")
    with pytest.raises(ValueError, match=r"flash-attn: torch\.float64 has no flash attention"):
        tree_attention(*case[1:4], mask, route="flash-attn")
    with pytest.raises(ValueError, match="multiples of 8 up to 256, not 6"):
        tree_attention(*(x[..., :6] for x in half), mask, route="torch-flash")
    with pytest.raises(ValueError, match="no route 'fa3'; there are flash-attn, torch-flash, plain"):
        tree_attention(*half, mask, route="fa3")


# The choice.


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    def row(calls: int, **seconds: float) -> dict[str, Any]:
        names = {name.replace("_", "-") if name != "tree_attention" else name: s for name, s in seconds.items()}
        return {"calls": calls, "dtype": "bfloat16", "head_dim": 128, "seconds": names}

    rows = [
        row(0, sdpa=3.0, torch_flash=1.0, flash_attn=0.5),
        row(1, tree_attention=2.0, torch_flash=1.9, flash_attn=1.0),
        row(2, tree_attention=2.0, torch_flash=1.5, flash_attn=1.0),
        row(2, tree_attention=2.0, torch_flash=2.6, flash_attn=1.0),
        row(5, tree_attention=2.0, torch_flash=1.0),
    ]
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"Some GPU": {"rows": rows}}))
    monkeypatch.setattr(tree_routes, "TABLE", path)
    caches = (tree_routes.table, tree_routes.choose_route, tree_routes.route_of)
    for cached in caches:
        cached.cache_clear()
    yield
    monkeypatch.undo()
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize(
    ("package", "calls", "route"),
    [
        (True, 0, "flash-attn"), (True, 1, "flash-attn"), (True, 2, "flash-attn"), (True, 3, "torch-flash"),
        (True, 6, "tree_attention"), (False, 0, "torch-flash"), (False, 1, "torch-flash"), (False, 2, "tree_attention"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("measured")
def test_the_fastest_measured_route_that_runs_here(
    package: bool, calls: int, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = None if package else "not installed"
    monkeypatch.setattr(tree_varlen, "_why_not_here", lambda name: absent if name == "flash-attn" else None)
    assert tree_routes.choose_route("Some GPU", torch.bfloat16, 128, calls)[0] == route


@pytest.mark.usefixtures("measured")
def test_nothing_is_guessed_from_other_measurements() -> None:
    for gpu, dtype, dim in (("Other", torch.bfloat16, 128), ("Some GPU", torch.float16, 128),
                            ("Some GPU", torch.bfloat16, 64)):  # fmt: skip
        route, why = tree_routes.choose_route(gpu, dtype, dim, 2)
        assert route == "tree_attention" and why.startswith(f"nothing measured on {gpu}")


def test_without_a_table_our_kernels_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tree_routes, "TABLE", tmp_path / "none.json")
    tree_routes.table.cache_clear()
    try:
        assert tree_routes.choose_route.__wrapped__("Any GPU", torch.bfloat16, 128, 2)[0] == "tree_attention"
    finally:
        tree_routes.table.cache_clear()


def test_the_shipped_table_names_known_routes_only() -> None:
    known = {*tree_varlen.ROUTES, "tree_attention", "sdpa"}
    for gpu, entry in tree_routes.table().items():
        for row in entry["rows"]:
            assert set(row["seconds"]) <= known and row["error"] <= row["allowed_error"], (gpu, row)


@pytest.mark.usefixtures("measured")
def test_the_choice_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_varlen, "_why_not_here", lambda name: None if name == "torch-flash" else "not installed")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    line = tree_routes.describe(torch.device("cuda"), torch.bfloat16, 128, 128)
    assert line.startswith("attention: torch-flash for rows without sharing, maps with questions; tree_attention for ")
    assert line.endswith("vision tower: torch-flash") and "\n" not in line
    assert tree_routes.describe(torch.device("cpu"), torch.bfloat16, 128).endswith("block by block")


@pytest.mark.gpu
@pytest.mark.parametrize("route", ["torch-flash", "flash-attn"])
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_on_a_gpu(route: str, dim: int) -> None:
    """At most twice the error of eager bfloat16, and the same bits twice."""
    refusal = tree_varlen.why_not(route, torch.bfloat16, dim)
    if refusal:
        pytest.skip(refusal)
    ends = cases.pack([(700, [(90, [(33, []), (250, [])]), (300, [])]), (129, [(77, []), (1, [])])])
    case = cases.inputs(ends, 8, 2, dim)
    rounded = cases.Inputs(*(x.cuda().bfloat16() if x.is_floating_point() else x.cuda() for x in case))
    exact = cases.definition(cases.Inputs(rounded.ends, *(x.double() for x in rounded[1:])))
    first, again, eager = by(route, rounded), by(route, rounded), cases.definition(rounded)
    for name, got, theirs, wanted in zip(("out", "dq", "dk", "dv"), first, eager, exact, strict=True):
        assert (got.double() - wanted).norm() <= 2 * (theirs.double() - wanted).norm(), name
    assert all(map(torch.equal, first, again))
    bounds = torch.tensor([0, 64, 70, len(ends)], device="cuda")
    q, k, v = rounded[1:4]
    got = segment_attention(q, k, v, bounds, len(ends) - 70, 0.1, route)
    wanted, theirs = (
        segment_attention(*(x.to(dtype) for x in (q, k, v)), bounds, len(ends) - 70, 0.1, "sdpa").double()
        for dtype in (torch.float64, torch.bfloat16)
    )
    assert (got.double() - wanted).norm() <= 2 * (theirs - wanted).norm()
