"""torch.compile, fullgraph: every operation is a custom operator that the compiler sees as one node."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from rewardmap_kernels import (
    PolicyObjective,
    last_path,
    linear_logprob,
    linear_logprobs,
    linear_loss,
    linear_policy_loss,
    logits_loss,
    logits_policy_loss,
    policy_loss,
    selective_log_softmax,
)

sys.path.append(str(Path(__file__).parent))
import kernels_cases as cases

V, H = 31, 8
DAPO = PolicyObjective("dapo", clip_eps_high=0.28, kl_coef=0.05)
GSPO = PolicyObjective("gspo")


def problem(n: int) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    g = torch.Generator().manual_seed(n)
    hidden, weight = torch.randn(n, H, generator=g).requires_grad_(), torch.randn(V, H, generator=g).requires_grad_()
    return hidden, weight, torch.randint(0, V, (n,), generator=g), cases.row_inputs(n, dtype=torch.float32)


def everything(hidden: Tensor, weight: Tensor, targets: Tensor, rows: dict[str, Any]) -> Tensor:
    """All operations on one graph, with ordinary ones between; metrics are part of it."""
    head = linear_policy_loss(hidden * 2, weight, targets, objective=DAPO, chunk_rows=7, **rows)
    both = linear_logprobs(hidden, weight, targets, temperature=0.7)
    kept = linear_logprobs(hidden, weight, targets, entropy_gradient=False)
    logits = hidden @ weight.t()
    direct = logits_policy_loss(logits, targets, objective=GSPO, **rows)
    picked, entropy = selective_log_softmax(logits, targets)
    return head.loss + head.metrics["kl_ref"] + both[0].sum() + both[1].sum() + kept[0].mean() + direct.loss + (
        picked * entropy
    ).sum()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_one_graph_for_every_operation_and_every_length(backend: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # they count what other tests compiled, too
    compiled: Callable[..., Tensor] = torch.compile(everything, backend=backend, fullgraph=True, dynamic=True)
    for n in (20, 33, 47):
        hidden, weight, targets, rows = problem(n)
        expected = everything(hidden, weight, targets, rows)
        got = compiled(hidden, weight, targets, rows)
        assert last_path("linear_policy_loss") is not None
        torch.testing.assert_close(got, expected)
        wanted = torch.autograd.grad(expected, (hidden, weight))
        torch.testing.assert_close(torch.autograd.grad(got, (hidden, weight)), wanted)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # not one per length


def test_a_normalizer_or_a_tensor_s_temperature_that_changes_is_not_compiled_anew() -> None:
    hidden, weight, targets, rows = problem(20)
    del rows["normalizer"]

    def both(normalizer: float, temperature: Tensor) -> Tensor:
        given = {**rows, "objective": DAPO, "normalizer": normalizer, "temperature": temperature}
        head = linear_policy_loss(hidden, weight, targets, **given)
        return head.loss + logits_policy_loss(hidden @ weight.t(), targets, **given).loss

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    for step in range(4):
        inputs = (1.5 + step, torch.full((20,), 0.7 + 0.1 * step))
        torch.testing.assert_close(compiled(*inputs), both(*inputs))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # torch takes the first number for a constant


@pytest.mark.parametrize("trainable", [False, True])
def test_the_shapes_told_to_the_compiler_are_the_real_ones(trainable: bool) -> None:
    hidden, weight, targets, rows = problem(20)
    hidden, weight = hidden.detach(), weight.detach()
    check: dict[str, Any] = {"test_utils": ("test_schema", "test_faketensor")}
    policy = (
        rows["advantages"], rows["normalizer"], rows["old_logprobs"], rows["ref_logprobs"], rows["rollout_logprobs"],
        rows["sequence"], 20, rows["loss_mask"],
    )  # fmt: skip
    for chunk_rows in (7, 20):
        head = (None, DAPO.key, chunk_rows, torch.float32, "", True, trainable)
        torch.library.opcheck(linear_loss._forward, (hidden, weight, targets, None, 1.0, *policy, *head), **check)
        for bonus, keep_bytes in ((False, 0), (False, 1 << 20), (True, 0)):
            arguments = (hidden, weight, targets, None, 1.0, chunk_rows, bonus, keep_bytes, True, trainable)
            torch.library.opcheck(linear_logprob._forward, arguments, **check)
    logits = hidden @ weight.t()
    torch.library.opcheck(logits_loss._statistics, (logits, targets, None, 1.0), **check)
    torch.library.opcheck(
        logits_loss._policy_forward, (logits, None, targets, None, 1.0, *policy, DAPO.key, trainable), **check
    )


def test_checkpointing_recomputes_the_same() -> None:
    hidden, weight, targets, rows = problem(20)
    expected = torch.autograd.grad(everything(hidden, weight, targets, rows), (hidden, weight))
    for reentrant in (False, True):
        loss = checkpoint(everything, hidden, weight, targets, rows, use_reentrant=reentrant)
        if reentrant:
            loss.backward()
            got = (hidden.grad, weight.grad)
        else:
            got = torch.autograd.grad(loss, (hidden, weight))
        torch.testing.assert_close(got, expected)


def test_a_gradient_added_by_the_forward_is_not_added_twice_by_checkpointing() -> None:
    hidden, weight, targets, rows = problem(20)

    def head(x: Tensor, into: Tensor) -> Tensor:
        return linear_policy_loss(x, weight, targets, objective=DAPO, weight_grad=into, **rows).loss

    plain, buffer = torch.zeros(V, H), torch.zeros(V, H)
    head(hidden, plain).backward()
    with pytest.raises(ValueError, match=r"weight_grad.*twice.*call the head outside"):
        checkpoint(lambda x: head(x, buffer), hidden, use_reentrant=False)
    assert not buffer.any()
    checkpoint(lambda x: head(x, buffer), hidden, use_reentrant=True).backward()  # its first pass makes no gradients
    torch.testing.assert_close(buffer, plain)


def test_gradients_are_handed_over_once_whatever_saves_them() -> None:
    hidden, weight, targets, rows = problem(20)
    with torch.autograd.graph.save_on_cpu():
        loss = linear_policy_loss(hidden, weight, targets, objective=DAPO, **rows).loss
    torch.autograd.grad(2 * loss, hidden, retain_graph=True)
    with pytest.raises(RuntimeError, match="linear_policy_loss was handed over by an earlier backward"):
        torch.autograd.grad(2 * loss, hidden)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_transforms_of_torch_func_are_refused(compiled: bool) -> None:
    """Compiled, they would give derivatives of 0; so would forward mode under no_grad."""
    hidden, weight, targets, rows = problem(20)
    hidden, weight = hidden.detach(), weight.detach()
    operations: dict[str, Callable[[Tensor], Tensor]] = {
        "linear_policy_loss": lambda x: linear_policy_loss(x, weight, targets, objective=DAPO, **rows).loss,
        "linear_logprobs": lambda x: linear_logprobs(x, weight, targets)[0].sum(),
        "logits_policy_loss": lambda x: logits_policy_loss(x @ weight.t(), targets, objective=DAPO, **rows).loss,
        "selective_log_softmax": lambda x: selective_log_softmax(x @ weight.t(), targets)[0].sum(),
        "policy_loss": lambda x: policy_loss(x[:, 0], objective=DAPO, **rows).row_loss.sum(),
    }
    for name, run in operations.items():

        def tangent(x: Tensor, run: Callable[[Tensor], Tensor] = run) -> Any:
            return torch.func.jvp(run, (x,), (x,))[1]

        for transformed, x, message in (
            (torch.func.grad(run), hidden, "does not take torch.func's transforms"),
            (torch.func.vmap(run), hidden[None], "does not take torch.func's transforms"),
            (tangent, hidden, "has no forward-mode derivative"),
        ):
            torch._dynamo.reset()
            call = torch.compile(transformed, backend="aot_eager") if compiled else transformed
            with pytest.raises(RuntimeError, match=f"{name} {message}"):
                call(x)
        with torch.no_grad(), forward_ad.dual_level(), pytest.raises(RuntimeError, match=f"{name} has no forward-mode"):
            run(forward_ad.make_dual(hidden, hidden))


@pytest.mark.parametrize("strict", [False, True])
def test_a_count_of_rows_that_is_not_known_yet_is_a_normalizer(strict: bool) -> None:
    class Loss(torch.nn.Module):
        def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            rows = {"advantages": torch.ones_like(hidden[:, 0]), "normalizer": hidden.shape[0]}
            return linear_policy_loss(hidden, weight, targets, objective=PolicyObjective(), **rows).loss

    hidden, weight, targets, _ = problem(20)
    operands = hidden.detach(), weight.detach(), targets
    length = torch.export.Dim("length", min=2, max=64)
    exported = torch.export.export(Loss(), operands, dynamic_shapes=({0: length}, None, {0: length}), strict=strict)
    shorter = operands[0][:7], operands[1], targets[:7]
    torch.testing.assert_close(exported.module()(*shorter), Loss()(*shorter))
