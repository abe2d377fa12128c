"""The Triton kernels on the CPU: run by ``test_kernels_interpreted.py`` in a process with TRITON_INTERPRET=1.

float32 and float16 only: the interpreter is silently wrong in bfloat16. Blocks are made tiny so that rows
span several.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from rewardmap_kernels import (
    PolicyObjective,
    group_advantage,
    last_path,
    linear_logprobs,
    linear_policy_loss,
    logits_policy_loss,
    policy_loss,
    reference,
    selective_log_softmax,
    torch_rows,
    triton_launch,
    use_implementation,
)
from rewardmap_kernels.dispatch import choose

sys.path.append(str(Path(__file__).parent))
import kernels_cases as cases

N, V, H = 9, 77, 16
TOKEN_LEVEL = [o for o in cases.OBJECTIVES if not o.needs_sequence]
DAPO = next(o for o in TOKEN_LEVEL if o.name == "dapo")
SEQUENCE_LEVEL = [o for o in cases.OBJECTIVES if o.needs_sequence]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("STATISTICS", "EXPONENTIALS", "GRADIENT", "SCALE", "POLICY_ROW"):
        monkeypatch.setattr(triton_launch, name, (32, 4))
    with use_implementation("triton"):
        yield


def float64(rows: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in rows.items()}


def around(current: Tensor, rows: dict[str, Any]) -> dict[str, Any]:
    """The same rows with log-ratios of about 0.15 to the policy's own log-probabilities."""
    names = ("old_logprobs", "ref_logprobs", "rollout_logprobs")
    return {**rows, **{name: current.detach() + 0.3 * (rows[name] + 1.5) for name in names}}


def tensors(dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    hidden = (torch.randn(N, H, generator=g) * scale).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=g).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, V, (N,), generator=g)


def kernels_of(objective: PolicyObjective) -> tuple[str, ...]:
    """What the head launches for several chunks: one pass over a row where its coefficient needs no other row."""
    two = objective.needs_sequence or objective.entropy_coef
    return ("statistics_kernel", "gradient_kernel") if two else ("exponentials_kernel",)


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.detach().double() - exact).norm() / exact.norm().clamp(min=1e-30))


def exact_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: Any,
    objective: PolicyObjective,
    rows: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    divisor = temperature.double() if isinstance(temperature, Tensor) else temperature
    logprobs, entropy = reference.linear_logprobs(h, w, targets, divisor)
    loss = reference.policy_row_loss(logprobs, entropy=entropy, objective=objective, **float64(rows)).sum()
    return loss.detach(), *torch.autograd.grad(loss, (h, w))


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("objective", cases.OBJECTIVES, ids=cases.objective_id)
def test_linear_policy_loss(objective: PolicyObjective, on_policy: bool) -> None:
    hidden, weight, targets = tensors(torch.float32)
    rows = cases.row_inputs(N, dtype=torch.float32)
    temperature: Any = torch.linspace(0.6, 1.5, N) if on_policy else 0.8
    rows = around(reference.linear_logprobs(hidden, weight, targets, temperature)[0], rows)
    if on_policy:
        rows["old_logprobs"] = None
    loss, d_hidden, d_weight = exact_loss(hidden, weight, targets, temperature, objective, rows)
    got = linear_policy_loss(
        hidden, weight, targets, objective=objective, temperature=temperature, chunk_rows=5, **rows
    )
    assert last_path("linear_policy_loss") == ("triton", kernels_of(objective))
    grads = torch.autograd.grad(got.loss, (hidden, weight))
    torch.testing.assert_close(got.loss.double(), loss, rtol=2e-5, atol=1e-6)
    assert error(grads[0], d_hidden) < 3e-6 and error(grads[1], d_weight) < 3e-6


@pytest.mark.parametrize("spread", [0.3, 15.0])
@pytest.mark.parametrize("objective", TOKEN_LEVEL, ids=cases.objective_id)
def test_the_coefficient_is_policy_loss_s_in_float64(objective: PolicyObjective, spread: float) -> None:
    """Near the policy, and beyond every bound and clamp."""
    n = 40
    g = torch.Generator().manual_seed(2)
    logits, targets = torch.randn(n, 9, generator=g) * 2, torch.randint(0, 9, (n,), generator=g)
    rows = cases.row_inputs(n, dtype=torch.float32)
    current = reference.selective_log_softmax(logits, targets)[0]
    for name in ("old_logprobs", "ref_logprobs", "rollout_logprobs"):
        rows[name] = current + spread * torch.randn(n, generator=g)
    mask = rows.pop("loss_mask")
    inputs = {"objective": objective, "num_sequences": None, **rows}
    choose("logits_policy_loss", logits)
    for old in (rows["old_logprobs"], None):
        inputs["old_logprobs"] = old
        done = triton_launch.fused("logits_policy_loss", logits, targets, 1.0, mask, inputs, None, False)
        wanted = policy_loss(done.logprobs.double(), entropy=done.entropy.double(), loss_mask=mask, **float64(inputs))
        # 1 - e^gap of a small gap keeps what 1 holds; sapo: as in test_kernels_policy_loss.py.
        absolute = 4e-6 if objective.name == "sapo" else 3e-8 * (objective.kl_coef + 0.1)
        torch.testing.assert_close(done.d_logprob.double(), wanted.d_logprob, rtol=5e-6, atol=absolute)


@pytest.fixture
def minima_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's minimum and maximum of NaN and a number are NaN, a GPU's the number."""
    for name, of_a_gpu in (("create_minnumf", np.fmin), ("create_maxnumf", np.fmax)):
        monkeypatch.setattr(InterpreterBuilder, name, partialmethod(InterpreterBuilder.binary_op, op=of_a_gpu))


@pytest.mark.usefixtures("minima_of_a_gpu")
def test_nan_that_a_row_reads_reaches_its_coefficient() -> None:
    n = 8
    logits, targets = torch.randn(n, 9, generator=torch.Generator().manual_seed(2)), torch.arange(n)
    choose("logits_policy_loss", logits)
    for objective in TOKEN_LEVEL:
        for name in cases.read_by_derivative(objective):
            rows = cases.row_inputs(n, dtype=torch.float32)
            rows[name][5], mask = float("nan"), rows.pop("loss_mask") | True
            inputs = {"objective": objective, "num_sequences": None, **rows}
            done = triton_launch.fused("logits_policy_loss", logits, targets, 1.0, mask, inputs, None, False)
            assert done.d_logprob.isnan().nonzero().tolist() == [[5]], (objective, name)


@pytest.mark.parametrize("objective", [DAPO, SEQUENCE_LEVEL[0]], ids=cases.objective_id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_logits_policy_loss_in_place_and_not(objective: PolicyObjective, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(1)
    wide = (torch.randn(N, V + 5, generator=g) * 3).to(dtype)
    logits, targets = wide[:, 2 : V + 2], torch.randint(0, V, (N,), generator=g)
    z = logits.double().requires_grad_()
    logprobs, entropy = reference.selective_log_softmax(z, targets, 0.9)
    rows = around(logprobs.float(), cases.row_inputs(N, dtype=torch.float32))
    loss = reference.policy_row_loss(logprobs, entropy=entropy, objective=objective, **float64(rows)).sum()
    (exact,) = torch.autograd.grad(loss, z)
    off = ~rows["loss_mask"]
    for inplace in (False, True):
        leaf = logits.detach().clone().requires_grad_() if not inplace else wide.clone().requires_grad_()
        source = leaf * 1.0 if inplace else leaf
        view = source[:, 2 : V + 2] if inplace else source
        got = logits_policy_loss(view, targets, objective=objective, temperature=0.9, inplace=inplace, **rows)
        (grad,) = torch.autograd.grad(got.loss * 0.5, leaf)
        grad = grad[:, 2 : V + 2] if inplace else grad
        assert last_path("scale") == ("triton", ("scale_kernel",))
        torch.testing.assert_close(got.loss.double(), loss.detach(), rtol=1e-4, atol=1e-6)
        assert error(grad, 0.5 * exact) < (2e-3 if dtype == torch.float16 else 2e-6)
        assert (grad[off] == 0).all()


def test_float16_heads_write_the_gradient_over_the_logits() -> None:
    """No worse than twice torch eager's own float16 error, for every tensor."""
    hidden, weight, targets = tensors(torch.float16)
    rows = cases.row_inputs(N, dtype=torch.float32)
    rows["normalizer"] = 20000.0  # without scaling, float16 gradients would underflow
    objective = PolicyObjective("dapo", entropy_coef=0.05)
    loss, d_hidden, d_weight = exact_loss(hidden, weight, targets, 1.0, objective, rows)
    logits = hidden @ weight.t()
    logprobs, entropy = reference.selective_log_softmax(logits.float(), targets)
    eager = reference.policy_row_loss(
        logprobs, entropy=entropy, objective=objective, **{**rows, "normalizer": 1.0}
    ).sum()
    eager_grads = torch.autograd.grad(eager, (hidden, weight))
    got = linear_policy_loss(hidden, weight, targets, objective=objective, chunk_rows=6, **rows)
    grads = torch.autograd.grad(got.loss * 20000, (hidden, weight))
    assert last_path("linear_policy_loss") == ("triton", ("statistics_kernel", "gradient_kernel"))
    assert error(got.loss, loss) <= 2 * error(eager / 20000, loss) + 1e-6
    for mine, theirs, exact in zip(grads, eager_grads, (d_hidden * 20000, d_weight * 20000), strict=True):
        assert mine.dtype == torch.float16
        assert error(mine, exact) <= 2 * error(theirs, exact) + 1e-6


@pytest.mark.parametrize("kind", ["flat", "peaked", "high", "low", "ties", "missing columns"])
def test_extreme_logits(kind: str) -> None:
    g = torch.Generator().manual_seed(7)
    logits = torch.randn(N, V, generator=g)
    targets = torch.randint(0, V, (N,), generator=g)
    if kind == "flat":
        logits = logits * 1e-4
    elif kind == "peaked":
        logits[torch.arange(N), targets] = 80.0
    elif kind == "high":
        logits = logits + 80.0
    elif kind == "low":
        logits = logits - 50.0
    elif kind == "ties":
        logits = torch.zeros(N, V)
    else:
        logits[:, 40:] = float("-inf")  # a whole block of columns outside the vocabulary
        logits[:, :32] = float("-inf")
        targets = targets % 8 + 32
    z = logits.double().requires_grad_()
    exact = reference.selective_log_softmax(z, targets, 0.7)
    a, b = torch.randn(N, generator=g), torch.randn(N, generator=g)
    (wanted,) = torch.autograd.grad((a * exact[0] + b * exact[1]).sum(), z)
    logits.requires_grad_()
    got = selective_log_softmax(logits, targets, 0.7)
    assert last_path("selective_log_softmax") == ("triton", ("statistics_kernel",))
    (grad,) = torch.autograd.grad((a * got[0] + b * got[1]).sum(), logits)
    for mine, theirs in zip(got, exact, strict=True):
        torch.testing.assert_close(mine.double(), theirs.detach(), rtol=1e-5, atol=2e-6)
    wanted = torch.nan_to_num(wanted)  # autograd of the definition is 0 * inf where a column is -inf
    torch.testing.assert_close(grad.double(), wanted, rtol=1e-4, atol=2e-6)


def test_a_target_of_another_rank_has_no_column() -> None:
    g = torch.Generator().manual_seed(1)
    logits, targets = torch.randn(N, V, generator=g), torch.randint(0, V, (N,), generator=g)
    choose("linear_policy_loss", logits)
    rows = triton_launch.statistics("linear_policy_loss", logits, targets, 1.0, None)
    torch.testing.assert_close(rows.lse * triton_launch.NATS_PER_UNIT, torch.logsumexp(logits, 1))
    c, e = torch.randn(2, N, generator=g)
    arguments = ("linear_policy_loss", logits, torch.full_like(targets, -1), 1.0)
    got = triton_launch.gradient(*arguments, rows, c, e, None, torch.float32, False)
    rows = torch_rows.statistics("linear_policy_loss", logits, targets, 1.0, None)
    wanted = torch_rows.gradient(*arguments, rows, c, e, None, torch.float32, False)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["random", "growing", "falling", "peaked", "closed columns"])
def test_exponentials_in_one_pass(kind: str) -> None:
    g = torch.Generator().manual_seed(7)
    logits, targets = torch.randn(N, V, generator=g) * 3, torch.randint(0, V, (N,), generator=g)
    if kind in ("growing", "falling"):  # far beyond the first block's maximum, several times: the pivot moves
        logits += torch.linspace(-80, 80, V) * (1 if kind == "growing" else -1)
        targets[:4] = torch.tensor([0, 20, 40, V - 1])
    elif kind == "peaked":
        logits[torch.arange(N), targets] += 25.0
    elif kind == "closed columns":
        logits[:, :40] = float("-inf")
        targets = targets.clamp(min=40)
    temperature, keep = torch.linspace(0.5, 1.5, N), torch.arange(N) != 3
    logprobs, entropy = reference.selective_log_softmax(logits.double(), targets, temperature.double())
    p = torch.softmax(logits.double() / temperature.double()[:, None], 1)
    wanted = p - torch.nn.functional.one_hot(targets, V)
    choose("linear_policy_loss", logits)
    for dtype in (torch.float32, torch.float16) if kind == "random" else (torch.float32,):
        wide = torch.full((N, V + 3), 7.0)  # row strides other than V, as the head's padded buffer has
        wide[:, :V] = logits
        got = triton_launch.exponentials("linear_policy_loss", wide[:, :V], targets, temperature, keep, dtype, None)
        assert got.values.untyped_storage().data_ptr() == wide.untyped_storage().data_ptr()
        direction = got.values.double() / got.total.double()[:, None]
        assert (got.values[3] == 0).all() and got.total[3] == 1 and got.rows.logprobs[3] == 0
        assert error(direction[keep], wanted[keep]) < (2e-6 if dtype == torch.float32 else 1e-3)
        torch.testing.assert_close(got.rows.logprobs[keep].double(), logprobs[keep], rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(got.rows.entropy[keep].double(), entropy[keep], rtol=1e-5, atol=2e-5)
    if kind == "peaked":  # p - 1 keeps its relative accuracy where p is near 1
        ours = direction[torch.arange(N), targets]
        exact = -(wanted * (wanted > 0)).sum(1)
        torch.testing.assert_close(ours[keep], exact[keep], rtol=1e-5, atol=0)
    out = torch.empty(N, V)
    apart = triton_launch.exponentials("linear_policy_loss", logits, targets, temperature, keep, torch.float32, out)
    assert apart.values is out and error(out[keep] / apart.total[keep, None], wanted[keep]) < 2e-6


def test_masked_rows_are_exactly_zero_and_others_do_not_see_them() -> None:
    hidden, weight, targets = tensors(torch.float32)
    rows = cases.row_inputs(N, dtype=torch.float32)
    off = ~rows["loss_mask"]
    bad = {k: torch.where(off, float("nan"), v) if k not in ("sequence", "loss_mask") else v for k, v in rows.items()}
    poisoned = torch.where(off[:, None], float("inf"), hidden.detach()).requires_grad_()
    for objective in (DAPO, SEQUENCE_LEVEL[0]):
        clean = linear_policy_loss(hidden, weight, targets, objective=objective, chunk_rows=5, **rows)
        got = linear_policy_loss(poisoned, weight, targets, objective=objective, chunk_rows=5, **bad)
        assert torch.equal(clean.loss, got.loss) and torch.equal(clean.logprobs, got.logprobs)
        mine, theirs = (torch.autograd.grad(out.loss, (h, weight)) for out, h in ((got, poisoned), (clean, hidden)))
        assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1]) and (mine[0][off] == 0).all()


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_linear_logprobs(entropy_gradient: bool, trainable: bool) -> None:
    hidden, weight, targets = tensors(torch.float32)
    weight.requires_grad_(trainable)
    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = reference.linear_logprobs(h, w, targets, 0.8)
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(N, generator=g), torch.randn(N, generator=g) * entropy_gradient
    wanted = torch.autograd.grad((a * exact[0] + b * exact[1]).sum(), (h, w))
    live = (hidden, weight) if trainable else (hidden,)
    for keep_bytes in (1 << 30, 0):
        got = linear_logprobs(
            hidden, weight, targets, temperature=0.8, entropy_gradient=entropy_gradient, chunk_rows=4,
            keep_bytes=keep_bytes,
        )  # fmt: skip
        assert last_path("linear_logprobs")[0] == "triton"  # type: ignore[index]
        assert got[1].requires_grad == entropy_gradient
        grads = torch.autograd.grad((a * got[0] + b * got[1]).sum(), live)
        for mine, theirs in zip((*got, *grads), (*exact, *wanted), strict=False):
            assert error(mine.detach(), theirs.detach()) < 3e-6


def test_runs_are_bitwise_equal_and_no_rows_is_fine() -> None:
    hidden, weight, targets = tensors(torch.float32)
    rows = cases.row_inputs(N, dtype=torch.float32)
    outs = [linear_policy_loss(hidden, weight, targets, objective=DAPO, **rows) for _ in range(2)]
    grads = [torch.autograd.grad(out.loss, (hidden, weight)) for out in outs]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    empty = {k: v[:0] if isinstance(v, Tensor) else v for k, v in rows.items()}
    out = linear_policy_loss(hidden[:0], weight, targets[:0], objective=DAPO, **empty)
    assert out.loss == 0 and (torch.autograd.grad(out.loss, weight)[0] == 0).all()


@pytest.mark.usefixtures("minima_of_a_gpu")
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "batch_mean", "none"])
@pytest.mark.parametrize("scale", ["group", "batch", "none", "max_min", "mad"])
def test_group_advantage(scale: str, baseline: str) -> None:
    g = torch.Generator().manual_seed(3)
    offsets = [0, 5, 6, 6, 46, 49]
    rewards, weights = torch.rand(49, generator=g), torch.rand(49, generator=g)
    rewards[46:] = 0.1
    options: dict[str, Any] = {"scale": scale, "baseline": baseline, "eps": 1e-4}
    for ddof, w, inside in ((0, weights, False), (1, None, scale in ("group", "batch"))):
        exact = reference.group_advantage(
            rewards.double(),
            offsets,
            ddof=ddof,
            weights=None if w is None else w.double(),
            eps_inside=inside,
            **options,
        )
        got = group_advantage(rewards, torch.tensor(offsets), ddof=ddof, weights=w, eps_inside=inside, **options)
        assert last_path("group_advantage") == ("triton", ("group_advantage_kernel",))
        for mine, theirs in zip(got[:3], exact[:3], strict=True):
            torch.testing.assert_close(mine.double(), theirs, rtol=2e-5, atol=2e-6)
        assert got.degenerate.tolist() == [False, True, True, False, True]
        if baseline in ("mean", "leave_one_out"):
            assert (got.advantages[46:] == 0).all() and got.advantages[5] == 0
    rewards[2] = float("nan")
    got = group_advantage(rewards, torch.tensor(offsets), **options)
    assert not got.degenerate[0] and got.advantages[2].isnan()
    assert got.advantages[:5].isnan().all() or (scale, baseline) == ("none", "none")


def test_group_advantage_is_one_node_of_a_compiled_graph() -> None:
    from rewardmap_kernels import triton_advantage

    rewards, offsets, tokens = torch.rand(12), torch.tensor([0, 8, 12]), torch.arange(13) * 3
    inputs = (rewards, offsets, "group", 1, 1e-6, False, "mean", torch.rand(12), None, False, False, tokens, 36)
    expected = triton_advantage._evaluate(*inputs)
    compiled = torch.compile(lambda *given: triton_advantage.evaluate(*given), backend="aot_eager", fullgraph=True)
    for given, wanted in ((inputs, expected), ((*inputs[:-2], None, 0), (*expected[:-1], None))):
        got = compiled(*given)
        assert all(torch.equal(a, b) for a, b in zip(got[:-1], wanted[:-1], strict=True))
        assert got[-1] is None if wanted[-1] is None else torch.equal(got[-1], wanted[-1])
        torch.library.opcheck(torch.ops.rewardmap_kernels.group_advantage, given)
    assert last_path("group_advantage") == ("triton", ("group_advantage_kernel",))


@pytest.mark.parametrize("combine", ["sum_then_normalize", "normalize_then_sum"])
def test_group_advantage_of_components_dropped_groups_and_tokens(combine: str) -> None:
    g = torch.Generator().manual_seed(3)
    rewards, offsets, parts = torch.rand(49, 3, generator=g), [0, 5, 6, 6, 46, 49], torch.tensor([1.0, 0.5, 2.0])
    rewards[46:, :2] = 0.1
    rewards[7, 1] = float("nan")
    lengths = torch.randint(0, 300, (49,), generator=g)
    tokens = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    options: dict[str, Any] = {
        "component_weights": parts, "combine": combine, "non_finite": "drop_group", "token_offsets": tokens,
        "weights": torch.rand(49, generator=g),
    }  # fmt: skip
    got = group_advantage(rewards, torch.tensor(offsets), **options)
    assert last_path("group_advantage") == ("triton", ("group_advantage_kernel",))
    with use_implementation("torch"):
        wanted = group_advantage(rewards, torch.tensor(offsets), **options)
    assert (got.advantages[6:46] == 0).all() and got.degenerate[3]
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine is not None and theirs is not None
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-6, equal_nan=True)


def test_float64_refuses_rather_than_falls_back() -> None:
    logits = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"selective_log_softmax cannot run by triton: torch.float64"):
        selective_log_softmax(logits, torch.zeros(2, dtype=torch.long))
