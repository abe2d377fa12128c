"""linear_policy_loss, linear_logprobs, logits_policy_loss and selective_log_softmax against float64 autograd
of the definition."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from rewardmap_kernels import (
    PolicyObjective,
    _head,
    contributing_rows,
    linear_logprobs,
    linear_policy_loss,
    logits_policy_loss,
    policy_loss,
    reference,
    selective_log_softmax,
    use_implementation,
)

sys.path.append(str(Path(__file__).parent))
import kernels_cases as cases

N, V, H = 37, 53, 24


def tensors(n: int = N, v: int = V, h: int = H, scale: float = 0.5, seed: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=g, dtype=torch.float64) * scale
    weight = torch.randn(v, h, generator=g, dtype=torch.float64) * scale
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(0, v, (n,), generator=g)


def definition(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: Any,
    objective: PolicyObjective,
    rows: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    logprobs, entropy = reference.linear_logprobs(hidden, weight, targets, temperature)
    loss = reference.policy_row_loss(logprobs, entropy=entropy, objective=objective, **rows).sum()
    return loss, logprobs, entropy


def temperatures(n: int) -> list[Any]:
    return [1.0, 0.7, torch.linspace(0.5, 2.0, n, dtype=torch.float64)]


@pytest.mark.parametrize("chunk_rows", [None, 8])
@pytest.mark.parametrize("objective", cases.OBJECTIVES, ids=cases.objective_id)
def test_linear_policy_loss_matches_the_definition(objective: PolicyObjective, chunk_rows: int | None) -> None:
    hidden, weight, targets = tensors()
    rows = cases.row_inputs(N)
    for temperature in temperatures(N)[1:]:
        loss, logprobs, entropy = definition(hidden, weight, targets, temperature, objective, rows)
        expected = torch.autograd.grad(loss, (hidden, weight))
        got = linear_policy_loss(
            hidden,
            weight,
            targets,
            objective=objective,
            temperature=temperature,
            chunk_rows=chunk_rows,
            **rows,
        )
        grads = torch.autograd.grad(got.loss * 2, (hidden, weight))
        torch.testing.assert_close(got.loss, loss, rtol=1e-9, atol=1e-12)
        mask = rows["loss_mask"]
        torch.testing.assert_close(got.logprobs, torch.where(mask, logprobs, 0.0), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(got.entropy, torch.where(mask, entropy, 0.0), rtol=1e-9, atol=1e-12)
        for mine, theirs in zip(grads, expected, strict=True):
            torch.testing.assert_close(mine, 2 * theirs, rtol=1e-9, atol=1e-12)
        assert not got.logprobs.requires_grad and not got.entropy.requires_grad
        metrics = policy_loss(logprobs, entropy=entropy, objective=objective, **rows).metrics
        assert got.metrics.keys() == metrics.keys()
        for name, value in metrics.items():
            torch.testing.assert_close(got.metrics[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("objective", [PolicyObjective(), PolicyObjective("gspo")], ids=cases.objective_id)
def test_metrics_are_made_once_whatever_the_chunks(
    objective: PolicyObjective, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["rewardmap_kernels.policy_loss"]
    made, make = [], module._metrics
    monkeypatch.setattr(module, "_metrics", lambda *args: made.append(args) or make(*args))
    for chunk_rows in (8, N):
        linear_policy_loss(*tensors(), objective=objective, chunk_rows=chunk_rows, **cases.row_inputs(N))
        assert len(made) == 1
        made.clear()
    logits_policy_loss(
        torch.randn(N, V, requires_grad=True), tensors()[2], objective=objective,
        **cases.row_inputs(N, dtype=torch.float32),
    )  # fmt: skip
    assert len(made) == 1


@pytest.mark.parametrize("objective", cases.OBJECTIVES, ids=cases.objective_id)
def test_logits_policy_loss_matches_the_definition(objective: PolicyObjective) -> None:
    hidden, weight, targets = tensors()
    logits = (hidden @ weight.t()).detach().requires_grad_()
    rows = cases.row_inputs(N)
    for temperature in temperatures(N):
        logprobs, entropy = reference.selective_log_softmax(logits, targets, temperature)
        loss = reference.policy_row_loss(logprobs, entropy=entropy, objective=objective, **rows).sum()
        (expected,) = torch.autograd.grad(loss, logits)
        got = logits_policy_loss(logits, targets, objective=objective, temperature=temperature, **rows)
        (grad,) = torch.autograd.grad(got.loss * 2, logits)
        torch.testing.assert_close(got.loss, loss, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(grad, 2 * expected, rtol=1e-9, atol=1e-12)


def test_log_probabilities_are_differentiable_through_both_outputs() -> None:
    hidden, weight, targets = tensors()
    g = torch.Generator().manual_seed(9)
    a, b = (torch.randn(N, generator=g, dtype=torch.float64) for _ in range(2))
    for temperature in temperatures(N):
        logprobs, entropy = reference.linear_logprobs(hidden, weight, targets, temperature)
        expected = torch.autograd.grad((a * logprobs + b * entropy).sum(), (hidden, weight))
        for chunk_rows in (None, 10):
            got = linear_logprobs(hidden, weight, targets, temperature=temperature, chunk_rows=chunk_rows)
            torch.testing.assert_close(got[0], logprobs, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(got[1], entropy, rtol=1e-9, atol=1e-12)
            grads = torch.autograd.grad((a * got[0] + b * got[1]).sum(), (hidden, weight))
            torch.testing.assert_close(grads, expected, rtol=1e-9, atol=1e-12)
        logits = (hidden @ weight.t()).detach().requires_grad_()
        reference_out = reference.selective_log_softmax(logits, targets, temperature)
        (wanted,) = torch.autograd.grad((a * reference_out[0] + b * reference_out[1]).sum(), logits)
        out = selective_log_softmax(logits, targets, temperature)
        torch.testing.assert_close(out, reference_out, rtol=1e-9, atol=1e-12)
        (grad,) = torch.autograd.grad((a * out[0] + b * out[1]).sum(), logits)
        torch.testing.assert_close(grad, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_a_frozen_side_gets_no_gradient_and_changes_nothing_else(frozen: str) -> None:
    hidden, weight, targets = tensors()
    rows = cases.row_inputs(N)
    objective = PolicyObjective("dapo", entropy_coef=0.1)
    loss, _, _ = definition(hidden, weight, targets, 1.0, objective, rows)
    expected = torch.autograd.grad(loss, (hidden, weight))
    h = hidden.detach() if frozen in ("hidden", "both") else hidden
    w = weight.detach() if frozen in ("weight", "both") else weight
    got = linear_policy_loss(h, w, targets, objective=objective, chunk_rows=16, **rows)
    torch.testing.assert_close(got.loss, loss, rtol=1e-9, atol=1e-12)
    if frozen == "both":
        assert not got.loss.requires_grad
        return
    live, wanted = (weight, expected[1]) if frozen == "hidden" else (hidden, expected[0])
    torch.testing.assert_close(torch.autograd.grad(got.loss, live)[0], wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("n", [0, 1, 127])
def test_row_counts(n: int) -> None:
    hidden, weight, targets = tensors(n)
    rows = cases.row_inputs(n)
    rows["normalizer"] = 10.0
    objective = PolicyObjective("gspo")
    loss, _, _ = definition(hidden, weight, targets, 1.0, objective, rows)
    got = linear_policy_loss(hidden, weight, targets, objective=objective, num_sequences=3, chunk_rows=50, **rows)
    torch.testing.assert_close(got.loss, loss, rtol=1e-9, atol=1e-12)
    d_hidden, d_weight = torch.autograd.grad(got.loss, (hidden, weight))
    assert d_hidden.shape == (n, H) and d_weight.shape == (V, H)
    if n == 0:
        assert (d_weight == 0).all()


def test_masked_rows_are_exactly_zero_whatever_they_hold() -> None:
    hidden, weight, targets = tensors()
    rows = cases.row_inputs(N)
    off = ~rows["loss_mask"]
    poisoned_rows = {
        k: torch.where(off, float("nan"), v) if k not in ("sequence", "loss_mask") else v for k, v in rows.items()
    }
    poisoned = torch.where(off[:, None], float("nan"), hidden.detach()).requires_grad_()
    for objective in cases.OBJECTIVES:
        clean = linear_policy_loss(hidden, weight, targets, objective=objective, chunk_rows=8, **rows)
        got = linear_policy_loss(poisoned, weight, targets, objective=objective, chunk_rows=8, **poisoned_rows)
        assert torch.equal(got.loss, clean.loss) and torch.equal(got.logprobs, clean.logprobs)
        mine = torch.autograd.grad(got.loss, (poisoned, weight))
        theirs = torch.autograd.grad(clean.loss, (hidden, weight))
        assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1])
        assert (mine[0][off] == 0).all()
        logits = (poisoned.detach() @ weight.t()).detach().requires_grad_()
        out = logits_policy_loss(logits, targets, objective=objective, **poisoned_rows)
        (grad,) = torch.autograd.grad(out.loss, logits)
        assert grad.isfinite().all() and (grad[off] == 0).all() and out.logprobs.isfinite().all()


def test_bad_input_raises_before_any_work() -> None:
    hidden, weight, targets = tensors()
    good: dict[str, Any] = {"advantages": torch.ones(N), "normalizer": 1.0, "objective": PolicyObjective()}
    bad_targets = targets.clone()
    bad_targets[5] = V
    for arguments, change, message in (
        ((hidden, weight, bad_targets), {}, r"targets\[5\] = 53 is outside \[0, 53\)"),
        ((hidden, weight, targets.double()), {}, "targets must be int32 or int64, got torch.float64"),
        ((hidden, weight, targets[:-1]), {}, r"targets must have shape \(37,\), got \(36,\)"),
        ((hidden, weight[:, :-1], targets), {}, "hidden has width 24 and weight has width 23"),
        ((hidden[0], weight, targets), {}, r"hidden must have 2 dimension\(s\)"),
        ((hidden.long(), weight, targets), {}, "hidden must be floating point"),
        ((hidden.float(), weight, targets), {}, "float64 does not mix"),
        ((hidden, weight, targets), {"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ((hidden, weight, targets), {"temperature": float("inf")}, "temperature must be positive and finite, got inf"),
        ((hidden, weight, targets), {"temperature": torch.ones(3)}, r"temperature must have shape \(37,\)"),
        ((hidden, weight, targets), {"chunk_rows": 0}, "chunk_rows must be >= 1, got 0"),
        ((hidden, weight, targets), {"old_logprobs": torch.ones(2)}, "old_logprobs must have shape"),
        ((hidden, weight, targets), {"objective": PolicyObjective(kl_coef=1.0)}, "needs ref_logprobs"),
        ((hidden, weight, targets), {"objective": PolicyObjective("gspo")}, "gspo needs sequence"),
        ((hidden.to("meta"), weight, targets), {}, "weight is on cpu, expected meta"),
        ((hidden, weight, None), {}, "targets must be an integer"),
        ((hidden, weight, targets), {"objective": "grpo"}, "objective must be a PolicyObjective, got 'grpo'"),
        ((hidden, weight, targets), {"normalizer": None}, "normalizer must be positive, got None"),
        ((hidden, weight, targets), {"normalizer": "6"}, "normalizer must be positive, got '6'"),
        ((hidden, weight, targets), {"temperature": "0.7"}, "temperature must be positive and finite, got '0.7'"),
        ((hidden, weight, targets), {"temperature": [0.7]}, r"temperature must be positive and finite, got \[0.7\]"),
        ((hidden, weight, targets), {"chunk_rows": 2.5}, "chunk_rows must be an integer, got 2.5"),
        ((hidden, weight, targets), {"num_sequences": "2"}, "num_sequences must be an integer, got '2'"),
        ((hidden, weight, targets), {"temperature": torch.ones(N, requires_grad=True)}, "temperature gets no gradient"),
        ((hidden, weight, targets), {"temperature": torch.arange(N) - 5.0}, "positive and finite, got -5.0 in row 0"),
        ((hidden, weight, targets), {"temperature": 1 / torch.arange(N)}, "positive and finite, got inf in row 0"),
        ((hidden, weight, targets), {"normalizer": torch.tensor(0)}, "normalizer must be positive, got 0.0"),
        ((hidden, weight, targets), {"normalizer": 3.0 - torch.arange(N)}, "must be positive, got 0.0 in row 3"),
        ((hidden, weight, targets), {"normalizer": torch.tensor(float("nan"))}, "must be positive, got nan"),
        ((hidden, weight, targets), {"rows": [0, 1]}, "rows must be a torch.Tensor, got list"),
        ((hidden, weight, targets), {"rows": torch.arange(3).to("meta")}, r"int64 \[M\] on cpu, got .* on meta"),
        ((hidden, weight, targets), {"rows": torch.tensor([4, 2, 4])}, "rows must be distinct, got 4 2 times"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_policy_loss(*arguments, **{**good, **change})
    frozen = (hidden.float(), weight.detach().float(), targets)
    with pytest.raises(ValueError, match="weight_grad would stay as it is"):
        linear_policy_loss(*frozen, weight_grad=torch.zeros(V, H), **good)
    with pytest.raises(ValueError, match="outside"):
        linear_logprobs(hidden, weight, bad_targets)
    with pytest.raises(ValueError, match="outside"):
        selective_log_softmax(hidden @ weight.t(), bad_targets)
    with pytest.raises(ValueError, match="logits must have 2"):
        logits_policy_loss(hidden[0], targets, **good)
    cold = torch.ones(N).index_fill(0, torch.tensor([7]), float("nan"))
    for run in (
        lambda: linear_logprobs(hidden, weight, targets, temperature=cold),
        lambda: selective_log_softmax(hidden @ weight.t(), targets, cold),
        lambda: logits_policy_loss(hidden @ weight.t(), targets, **{**good, "temperature": cold}),
    ):
        with pytest.raises(ValueError, match="temperature must be positive and finite, got nan in row 7"):
            run()


def test_divisors_of_rows_that_do_not_count_are_anything() -> None:
    hidden, weight, targets = tensors()
    rows: dict[str, Any] = {"advantages": torch.ones(N), "objective": PolicyObjective()}
    on, sequence = torch.arange(N) % 3 != 0, torch.arange(N) // 4
    gspo = {**rows, "objective": PolicyObjective("gspo"), "sequence": sequence, "chunk_rows": 8}
    for bad in (0.0, -1.0, float("nan")):
        spoilt = torch.where(on, 2.0, bad)
        divisors = {"normalizer": spoilt, "temperature": spoilt, "loss_mask": on}
        got = linear_policy_loss(hidden, weight, targets, **divisors, **rows)
        kept = {"rows": on.nonzero()[:, 0], "normalizer": spoilt, "temperature": spoilt}
        same = linear_policy_loss(hidden, weight, targets, **kept, **rows)
        for out in (got, same):
            assert all(grad.isfinite().all() for grad in (out.loss, *torch.autograd.grad(out.loss, (hidden, weight))))
        torch.testing.assert_close(got.loss, same.loss)
        late = linear_policy_loss(hidden, weight.detach(), targets, **divisors, **gspo)
        assert torch.autograd.grad(late.loss, hidden)[0].isfinite().all()
        logits = (hidden @ weight.t()).detach().half().requires_grad_()
        out = logits_policy_loss(logits, targets, **divisors, **rows)
        assert torch.autograd.grad(out.loss, logits)[0].isfinite().all()
    nothing = linear_policy_loss(hidden, weight, targets, normalizer=on.sum() * 0, loss_mask=on * 0, **rows)
    assert nothing.loss == 0  # the count of a micro-batch without a token
    compiled = torch.compile(linear_logprobs, backend="aot_eager")
    with pytest.raises(RuntimeError, match="temperature must be positive and finite"):
        compiled(hidden.detach(), weight.detach(), targets, temperature=torch.zeros(N))


def test_rows_that_contribute_are_found_among_all_rows() -> None:
    """Of a mask that is too short, the rows beyond its end would be missing."""
    objective = PolicyObjective(kl_coef=0.1)
    for mask in (torch.ones(3), torch.ones(5), torch.ones(4, 1)):
        with pytest.raises(ValueError, match=r"loss_mask must have shape \(4,\), got "):
            contributing_rows(objective, torch.ones(4), mask)
    with pytest.raises(ValueError, match=r"advantages must be a torch\.Tensor, got list"):
        contributing_rows(objective, [1.0])  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_tensors_without_values_are_taken(device: str) -> None:
    """On the meta device, and fake ones on the CPU."""
    with contextlib.nullcontext() if device == "meta" else FakeTensorMode():
        hidden, weight, logits = (
            torch.empty(shape, device=device, requires_grad=True) for shape in ((N, H), (V, H), (N, V))
        )
        index, ones = torch.arange(N, device=device), torch.ones(N, device=device)
        rows: dict[str, Any] = {"advantages": ones, "normalizer": ones, "objective": PolicyObjective("gspo")}
        rows["sequence"] = index
        for value in (
            linear_policy_loss(hidden, weight, index, rows=index, **rows).loss,
            sum(linear_logprobs(hidden, weight, index)).sum(),
            linear_logprobs(hidden, weight, index, entropy_gradient=False)[0].sum(),
            logits_policy_loss(logits, index, **rows).loss,
            selective_log_softmax(logits, index)[0].sum(),
        ):
            value.backward()
        for tensor in (hidden, weight, logits):
            assert tensor.grad is not None and tensor.grad.device.type == device


def test_second_derivatives_are_refused() -> None:
    hidden, weight, targets = tensors()
    rows: dict[str, Any] = {"advantages": torch.ones(N), "normalizer": 1.0, "objective": PolicyObjective()}
    logits = hidden @ weight.t()
    logprobs = reference.linear_logprobs(hidden, weight, targets, 1.0)[0]
    for value in (
        linear_policy_loss(hidden, weight, targets, **rows).loss,
        linear_logprobs(hidden, weight.detach(), targets)[0].sum(),
        logits_policy_loss(logits, targets, **rows).loss,
        selective_log_softmax(logits, targets)[0].sum(),
        policy_loss(logprobs, **rows).row_loss.sum(),
    ):
        with pytest.raises(RuntimeError, match="first-order gradients only"):
            torch.autograd.grad(value, hidden, create_graph=True)


def test_gradients_in_batches_are_refused_where_they_are_handed_over() -> None:
    hidden, weight, targets = tensors()
    rows: dict[str, Any] = {"advantages": torch.ones(N), "normalizer": 1.0, "objective": PolicyObjective()}
    for run in (
        lambda: linear_policy_loss(hidden, weight, targets, **rows).loss,
        lambda: logits_policy_loss(hidden @ weight.t(), targets, **rows).loss,
    ):
        loss = run()
        with pytest.raises(RuntimeError, match=r"no batches \(is_grads_batched, torch\.vmap\)"):
            torch.autograd.grad(loss, hidden, torch.ones(2), is_grads_batched=True)
        with pytest.raises(RuntimeError, match=r"no batches \(is_grads_batched, torch\.vmap\)"):
            torch.vmap(lambda g, loss=loss: torch.autograd.grad(loss, hidden, g)[0])(torch.ones(2))
        assert torch.autograd.grad(loss, hidden)[0].isfinite().all()  # which nothing took
    logprobs = linear_logprobs(hidden, weight, targets)[0]
    (some,) = torch.autograd.grad(logprobs, hidden, torch.eye(N)[:2].double(), is_grads_batched=True, retain_graph=True)
    (one,) = torch.autograd.grad(logprobs[1], hidden)
    torch.testing.assert_close(some[1], one)


@pytest.mark.parametrize(
    ("shape", "strides", "apart"),
    [
        ((V, H), (0, 1), False),
        ((V, H), (1, 0), False),
        ((V, H), (H // 2, 1), False),
        ((V, H), (1, V // 2), False),
        ((V, H), (H - 1, 1), False),
        ((V, H), (H, 1), True),
        ((V, H), (2 * H, 2), True),
        ((V, H), (1, V), True),
        ((V, 1), (1, 0), True),
        ((1, H), (0, 1), True),
    ],
)
def test_a_weight_s_gradient_needs_memory_of_its_own(
    shape: tuple[int, int], strides: tuple[int, int], apart: bool
) -> None:
    hidden, weight, _ = tensors(v=shape[0], h=shape[1])
    hidden, weight = hidden.detach().float(), weight.detach().float().requires_grad_()
    inputs = (hidden, weight, torch.zeros(N, dtype=torch.long))
    rows: dict[str, Any] = {"advantages": torch.ones(N), "normalizer": 1.0, "objective": PolicyObjective()}
    given = torch.zeros(2 * V * H).as_strided(shape, strides)
    if not apart:
        with pytest.raises(ValueError, match=rf"elements overlap: shape \({shape[0]}, {shape[1]}\), strides"):
            linear_policy_loss(*inputs, weight_grad=given, **rows)
        return
    linear_policy_loss(*inputs, weight_grad=given, **rows).loss.backward()
    (expected,) = torch.autograd.grad(linear_policy_loss(*inputs, **rows).loss, weight)
    torch.testing.assert_close(given, expected)


def test_in_place_needs_memory_of_its_own() -> None:
    hidden, weight, targets = tensors()
    rows: dict[str, Any] = {"advantages": torch.ones(N), "normalizer": 1.0, "objective": PolicyObjective()}
    leaf = (hidden @ weight.t()).detach().requires_grad_()
    with pytest.raises(ValueError, match="overwrite a leaf"):
        logits_policy_loss(leaf[:, :], targets, inplace=True, **rows)
    with pytest.raises(ValueError, match=r"do not overlap, got strides \(0, 1\)"):
        logits_policy_loss((leaf * 1)[:1].expand(N, V), targets, inplace=True, **rows)


def test_a_target_of_probability_zero() -> None:
    """Its gradient is that of any other target; torch's own is the reference."""
    for dtype in (torch.float32, torch.float64):
        logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(0), dtype=dtype)
        logits[0, 2] = -torch.inf
        logits.requires_grad_()
        targets = torch.tensor([2, 0, 4])
        expected = torch.log_softmax(logits, 1).gather(1, targets[:, None])[:, 0]
        got = selective_log_softmax(logits, targets)[0]
        assert got[0] == -torch.inf
        torch.testing.assert_close(got, expected)
        mine, theirs = (torch.autograd.grad(each.sum(), logits)[0] for each in (got, expected))
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_closed_columns_add_nothing_to_a_large_entropy_gradient(dtype: torch.dtype) -> None:
    """A row with one open column too."""
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(0), dtype=dtype)
    logits[:, 3:], logits[0, 1:] = -torch.inf, -torch.inf
    logits.requires_grad_()
    targets, upstream = torch.tensor([0, 1, 2, 0]), torch.tensor([1e6, -7.0, 3.0, 2.0], dtype=dtype)
    expected = reference.selective_log_softmax(logits[:, :3], targets)[1][1:] @ upstream[1:]
    wanted = torch.autograd.grad(expected, logits)[0]
    with use_implementation("torch"):
        got = torch.autograd.grad(selective_log_softmax(logits, targets)[1] @ upstream, logits)[0]
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("first", [True, False], ids=["first chunk", "later chunk"])
def test_a_wide_gradient_on_a_gpu_is_multiplied_where_it_lies(first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No second float32 matrix of a head's size; fake tensors stand for those of a GPU."""
    with FakeTensorMode():
        total = torch.empty(6, 4, device="cuda:0")
        a, b = (torch.empty(shape, dtype=torch.bfloat16, device="cuda:0") for shape in ((6, 8), (8, 4)))
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "mm" if first else "addmm", lambda *_, **options: calls.append(options))
    (_head.product_into if first else _head.accumulate_product)(total, a, b)
    assert len(calls) == 1 and calls[0]["out"] is total and calls[0]["out_dtype"] == torch.float32
