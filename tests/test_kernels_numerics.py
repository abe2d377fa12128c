"""Error budgets, extreme shapes and the contracts with autograd: what the fused operations promise beyond the
definition."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from rewardmap_kernels import (
    PolicyObjective,
    contributing_rows,
    last_path,
    linear_logprob,
    linear_logprobs,
    linear_loss,
    linear_policy_loss,
    logits_policy_loss,
    loss_normalizer,
    native,
    policy_loss,
    reference,
    selective_log_softmax,
    use_implementation,
)

sys.path.append(str(Path(__file__).parent))
import kernels_cases as cases

DAPO = PolicyObjective("dapo", clip_eps_high=0.28, kl_coef=0.05, entropy_coef=0.02)


def problem(
    n: int, v: int, h: int, dtype: torch.dtype = torch.float32, kind: str = "random", seed: int = 11
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """hidden, weight, targets and rows whose old, reference and rollout log-probabilities are near the
    policy's."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(n, h, generator=g), torch.randn(v, h, generator=g) / h**0.5
    targets = torch.randint(0, v, (n,), generator=g)
    if kind == "peaked":
        hidden = hidden + 30 * weight[targets] / weight[targets].norm(dim=1, keepdim=True)
    elif kind == "flat":
        hidden = hidden * 1e-3
    elif kind == "high":
        hidden[:, 0], weight[:, 0] = 8.0, 10.0
    elif kind == "low":
        hidden[:, 0], weight[:, 0] = -8.0, 10.0
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    rows = cases.row_inputs(n, dtype=torch.float32)
    current = reference.linear_logprobs(hidden.float(), weight.float(), targets)[0]
    for name in ("old_logprobs", "ref_logprobs", "rollout_logprobs"):
        rows[name] = current + 0.3 * (rows[name] + 1.5)
    return hidden.requires_grad_(), weight.requires_grad_(), targets, rows


def exact(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: dict[str, Any], objective: PolicyObjective
) -> tuple[Tensor, ...]:
    """loss, logprobs, entropy and both gradients in float64."""
    h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    wide = {k: v.double() if v is not None and v.is_floating_point() else v for k, v in rows.items()}
    logprobs, entropy = reference.linear_logprobs(h, w, targets)
    loss = reference.policy_row_loss(logprobs, entropy=entropy, objective=objective, **wide).sum()
    return loss.detach(), logprobs.detach(), entropy.detach(), *torch.autograd.grad(loss, (h, w))


def error(got: Tensor, wanted: Tensor) -> tuple[float, float]:
    """(largest absolute error, relative Frobenius error)"""
    wanted = wanted.detach()
    gap = got.detach().double() - wanted
    return float(gap.abs().max()), float(gap.norm() / wanted.norm())


@pytest.mark.parametrize("kind", ["random", "peaked", "flat", "high", "low"])
def test_bfloat16_error_is_at_most_twice_eager_s(kind: str) -> None:
    hidden, weight, targets, rows = problem(96, 513, 64, torch.bfloat16, kind)
    wanted = exact(hidden, weight, targets, rows, DAPO)
    logprobs, entropy = reference.selective_log_softmax((hidden @ weight.t()).float(), targets)
    eager = reference.policy_row_loss(logprobs, entropy=entropy, objective=DAPO, **rows).sum()
    theirs = (eager, logprobs, entropy, *torch.autograd.grad(eager, (hidden, weight)))
    got = linear_policy_loss(hidden, weight, targets, objective=DAPO, chunk_rows=32, **rows)
    mine = (*got[:3], *torch.autograd.grad(got.loss, (hidden, weight)))
    on = rows["loss_mask"]
    for name, a, b, c in zip(
        ("loss", "logprobs", "entropy", "d_hidden", "d_weight"), mine, theirs, wanted, strict=True
    ):
        keep = on if name in ("logprobs", "entropy") else slice(None) if a.dim() else ...
        for measured, allowed in zip(error(a[keep], c[keep]), error(b[keep], c[keep]), strict=True):
            assert measured <= 2 * allowed + 1e-6, (name, measured, allowed)


@pytest.mark.parametrize("kind", ["random", "peaked", "flat", "high", "low"])
def test_bfloat16_logits_error_is_at_most_twice_eager_s(kind: str) -> None:
    hidden, weight, targets, rows = problem(96, 513, 64, torch.bfloat16, kind)
    logits = (hidden @ weight.t()).detach().requires_grad_()
    z = logits.detach().double().requires_grad_()
    wide = {k: v.double() if v.is_floating_point() else v for k, v in rows.items()}

    def of(logprobs: Tensor, entropy: Tensor, inputs: dict[str, Any], leaf: Tensor) -> tuple[Tensor, ...]:
        loss = reference.policy_row_loss(logprobs, entropy=entropy, objective=DAPO, **inputs).sum()
        return loss, logprobs, entropy, torch.autograd.grad(loss, leaf)[0]

    wanted = of(*reference.selective_log_softmax(z, targets), wide, z)
    theirs = of(*reference.selective_log_softmax(logits.float(), targets), rows, logits)
    pair = of(*selective_log_softmax(logits, targets), rows, logits)
    got = logits_policy_loss(logits, targets, objective=DAPO, **rows)
    mine = (*got[:3], torch.autograd.grad(got.loss, logits)[0])
    on = rows["loss_mask"]
    for result in (pair, mine):
        for name, a, b, c in zip(("loss", "logprobs", "entropy", "gradient"), result, theirs, wanted, strict=True):
            keep = on if name in ("logprobs", "entropy") else slice(None) if a.dim() else ...
            for measured, allowed in zip(error(a[keep], c[keep]), error(b[keep], c[keep]), strict=True):
                assert measured <= 2 * allowed + 1e-6, (name, measured, allowed)


@pytest.mark.parametrize("objective", cases.OBJECTIVES, ids=cases.objective_id)
def test_a_batch_without_a_live_row_is_exactly_zero(objective: PolicyObjective) -> None:
    hidden, weight, targets, rows = problem(20, 31, 8)
    rows["loss_mask"] = torch.zeros(20, dtype=torch.bool)
    rows["normalizer"] = loss_normalizer(PolicyObjective("dapo"), rows["loss_mask"])
    spoilt = torch.full_like(hidden, float("nan")).requires_grad_()
    out = linear_policy_loss(spoilt, weight, targets, objective=objective, chunk_rows=7, **rows)
    gradients = torch.autograd.grad(out.loss, (spoilt, weight))
    logits = (spoilt @ weight.t()).detach().requires_grad_()
    direct = logits_policy_loss(logits, targets, objective=objective, **rows)
    gradients += torch.autograd.grad(direct.loss, logits)
    assert out.loss == 0 and direct.loss == 0 and all((g == 0).all() for g in gradients)
    assert (out.logprobs == 0).all() and (out.entropy == 0).all()
    assert all(value.isfinite() for value in out.metrics.values())
    none = torch.zeros(0, dtype=torch.int64)
    left_out = linear_policy_loss(hidden, weight, targets, objective=objective, rows=none, **rows)
    assert left_out.loss == 0 and all((g == 0).all() for g in torch.autograd.grad(left_out.loss, (hidden, weight)))


@pytest.mark.parametrize("vocab", [151_936, 152_064, 50_257])
def test_real_vocabularies(vocab: int) -> None:
    hidden, weight, targets, rows = problem(3, vocab, 4)
    targets[0], targets[1] = 0, vocab - 1
    rows["loss_mask"] = None
    wanted = exact(hidden, weight, targets, rows, DAPO)
    got = linear_policy_loss(hidden, weight, targets, objective=DAPO, chunk_rows=2, **rows)
    for a, b in zip((*got[:3], *torch.autograd.grad(got.loss, (hidden, weight))), wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-4, atol=2e-6)
    for frozen in (True, False):
        live = weight.detach() if frozen else weight
        logprobs, entropy = linear_logprobs(hidden, live, targets)
        torch.testing.assert_close(logprobs.double(), wanted[1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(entropy.double(), wanted[2], rtol=1e-5, atol=1e-5)


def test_chunking_changes_only_roundings_and_they_do_not_grow() -> None:
    hidden, weight, targets, rows = problem(256, 129, 32)
    wanted = exact(hidden, weight, targets, rows, DAPO)
    errors = []
    for chunk_rows in (256, 128, 32, 7, 1):
        got = linear_policy_loss(hidden, weight, targets, objective=DAPO, chunk_rows=chunk_rows, **rows)
        grads = torch.autograd.grad(got.loss, (hidden, weight))
        torch.testing.assert_close(got.loss.double(), wanted[0], rtol=1e-5, atol=1e-7)
        errors.append(error(grads[1], wanted[4])[1])
    assert max(errors) < 2e-6


def test_runs_are_bitwise_equal_and_rows_do_not_see_their_neighbours() -> None:
    hidden, weight, targets, rows = problem(64, 77, 16)
    outs = [linear_policy_loss(hidden, weight, targets, objective=DAPO, chunk_rows=32, **rows) for _ in range(2)]
    grads = [torch.autograd.grad(out.loss, (hidden, weight)) for out in outs]
    assert torch.equal(outs[0].loss, outs[1].loss)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    changed = torch.where((torch.arange(64) % 2 == 0)[:, None], hidden.detach(), -hidden.detach()).requires_grad_()
    other = linear_policy_loss(changed, weight, targets, objective=DAPO, chunk_rows=32, **rows)
    assert torch.equal(other.logprobs[::2], outs[0].logprobs[::2])
    assert torch.equal(torch.autograd.grad(other.loss, changed)[0][::2], grads[0][0][::2])


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation inside the block returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.untyped_storage().nbytes() // 4)
        return out


@pytest.fixture
def transparent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The custom operators as plain functions, so that dispatch modes see what is done inside."""
    monkeypatch.setattr(linear_loss, "_forward", linear_loss._forward._init_fn)
    for name in ("_forward", "_recompute", "_weight_from_kept"):
        monkeypatch.setattr(linear_logprob, name, getattr(linear_logprob, name)._init_fn)


@pytest.mark.parametrize("objective", [DAPO, PolicyObjective("gspo"), PolicyObjective("dapo")], ids=cases.objective_id)
def test_the_logits_of_all_rows_never_exist(objective: PolicyObjective, transparent: None) -> None:
    n, v, h, chunk = 96, 400, 8, 16
    hidden, weight, targets, rows = problem(n, v, h)
    with _Largest() as seen:
        out = linear_policy_loss(hidden, weight, targets, objective=objective, chunk_rows=chunk, **rows)
        out.loss.backward()
        logprobs, entropy = linear_logprobs(hidden, weight, targets, chunk_rows=chunk, keep_bytes=0)
        (logprobs.sum() + entropy.sum()).backward()
    assert chunk * v <= seen.numel <= max(chunk * v, v * h, n * h) * 1.05


class _Products(TorchDispatchMode):
    """Logits' memory: how many chunks of it are alive whenever one is multiplied into."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.alive, self.most = elements, [], 0  # type: ignore[var-annotated]

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("mm", "product_"):
            buffers = {t.untyped_storage().data_ptr() for ref in self.alive if (t := ref()) is not None}
            self.most = max(self.most, len(buffers))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor) and value.numel() >= self.elements:
                self.alive.append(weakref.ref(value))
        return out


def test_one_chunk_s_logits_are_alive_at_a_time(transparent: None) -> None:
    hidden, weight, targets, rows = problem(96, 400, 8)
    for objective in (PolicyObjective("dapo"), DAPO, PolicyObjective("gspo")):
        with _Products(16 * 400) as seen:
            linear_policy_loss(hidden, weight, targets, objective=objective, chunk_rows=16, **rows)
        # The buffer, and plain torch's own copy of the chunk that is multiplied back.
        assert 1 <= seen.most <= 2


def flop(run: Callable[[], Any], n: int, v: int, h: int) -> float:
    """Arithmetic of the matrix products in units of NVH."""
    with FlopCounterMode(display=False) as counted:
        run()
    return counted.get_total_flops() / (n * v * h)


@pytest.mark.parametrize("chunk_rows", [64, 16])
@pytest.mark.parametrize("objective", [DAPO, PolicyObjective("dapo"), PolicyObjective("gspo")], ids=cases.objective_id)
def test_the_head_s_arithmetic(objective: PolicyObjective, chunk_rows: int, transparent: None) -> None:
    n, v, h = 64, 50, 16
    hidden, weight, targets, rows = problem(n, v, h)

    def loss(x: Tensor, w: Tensor, **more: Any) -> Tensor:
        return linear_policy_loss(x, w, targets, objective=objective, chunk_rows=chunk_rows, **rows, **more).loss

    again = 2 if objective.needs_sequence and chunk_rows < n else 0
    assert flop(lambda: loss(hidden, weight).backward(), n, v, h) == 6 + again
    assert flop(lambda: loss(hidden.detach(), weight).backward(), n, v, h) == 4 + again
    assert flop(lambda: loss(hidden, weight.detach()).backward(), n, v, h) == 4  # no second pass even then
    with torch.no_grad():
        assert flop(lambda: loss(hidden, weight), n, v, h) == 2
    some = torch.arange(0, n, 4)
    assert flop(lambda: loss(hidden, weight, rows=some).backward(), n, v, h) == 6 / 4


def test_log_probabilities_arithmetic(transparent: None) -> None:
    n, v, h = 64, 50, 16
    hidden, weight, targets, _ = problem(n, v, h)

    def run(x: Tensor, w: Tensor, bonus: bool, keep_bytes: int = 1 << 30) -> None:
        out = linear_logprobs(x, w, targets, entropy_gradient=bonus, chunk_rows=16, keep_bytes=keep_bytes)
        (out[0].sum() + (out[1].sum() if bonus else 0)).backward()

    frozen = weight.detach()
    assert [flop(lambda b=b: run(hidden, frozen, b), n, v, h) for b in (False, True)] == [4, 6]
    assert [flop(lambda b=b: run(hidden, weight, b), n, v, h) for b in (False, True)] == [6, 8]
    assert flop(lambda: run(hidden, weight, False, 0), n, v, h) == 8
    assert flop(lambda: run(hidden.detach(), weight, False), n, v, h) == 4


def test_rows_that_cannot_contribute_leave_the_products() -> None:
    hidden, weight, targets, rows = problem(40, 31, 8)
    rows["advantages"][5:20] = 0.0
    rows["advantages"][rows["sequence"] == 0] = 0.0
    for objective in (PolicyObjective("dapo"), PolicyObjective("gspo"), DAPO):
        live = rows["loss_mask"] & ((rows["advantages"] != 0) | (objective == DAPO))
        if objective.name == "gspo":  # a ratio of a sequence is over all its rows: they stay or leave together
            live = rows["loss_mask"] & torch.isin(rows["sequence"], rows["sequence"][live])
            with pytest.raises(ValueError, match="at sequence level needs sequence"):
                contributing_rows(objective, rows["advantages"], rows["loss_mask"])
        index = contributing_rows(objective, rows["advantages"], rows["loss_mask"], rows["sequence"])
        assert index.tolist() == live.nonzero()[:, 0].tolist() and len(index) < 40
        everything = linear_policy_loss(hidden, weight, targets, objective=objective, **rows)
        some = linear_policy_loss(hidden, weight, targets, objective=objective, rows=index, **rows)
        a, b = (torch.autograd.grad(out.loss, (hidden, weight)) for out in (everything, some))
        torch.testing.assert_close(everything.loss, some.loss, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
        left_out = torch.ones(40, dtype=torch.bool).index_fill_(0, index, False)
        assert (b[0][left_out] == 0).all() and (some.logprobs[left_out] == 0).all()
        torch.testing.assert_close(some.logprobs[index], everything.logprobs[index], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"rows\[0\] = 40 is outside"):
        linear_policy_loss(hidden, weight, targets, objective=DAPO, rows=torch.tensor([40]), **rows)


def test_weight_gradients_add_to_an_existing_float32_buffer() -> None:
    hidden, weight, targets, rows = problem(40, 31, 8, torch.bfloat16)
    loss = linear_policy_loss(hidden, weight, targets, objective=DAPO, **rows).loss
    d_hidden, d_weight = torch.autograd.grad(loss, (hidden, weight))
    buffer = torch.ones(31, 8)
    for times in (1, 2):
        out = linear_policy_loss(hidden, weight, targets, objective=DAPO, weight_grad=buffer, chunk_rows=16, **rows)
        hidden.grad = weight.grad = None
        out.loss.backward()
        assert weight.grad is None
        torch.testing.assert_close(hidden.grad, d_hidden)
        torch.testing.assert_close(buffer, 1 + times * d_weight.float(), rtol=1e-2, atol=1e-3)
    out = linear_policy_loss(hidden, weight, targets, objective=DAPO, weight_grad=buffer, **rows)
    with pytest.raises(ValueError, match=r"gradient 1, got 2\.0"):
        (out.loss * 2).backward()
    before = buffer.clone()
    with torch.no_grad():
        linear_policy_loss(hidden, weight, targets, objective=DAPO, weight_grad=buffer, **rows)
    assert torch.equal(before, buffer)
    with pytest.raises(ValueError, match=r"weight_grad must be torch.float32 \(31, 8\)"):
        linear_policy_loss(hidden, weight, targets, objective=DAPO, weight_grad=buffer.double(), **rows)


def test_rounded_logits_are_those_of_an_engine_that_rounds() -> None:
    hidden, weight, targets, rows = problem(40, 31, 8, torch.bfloat16)
    got = linear_policy_loss(hidden, weight, targets, objective=DAPO, logits_dtype=torch.bfloat16, **rows)
    engine = (hidden.float() @ weight.float().t()).bfloat16()
    wanted = reference.selective_log_softmax(engine.float(), targets)[0]
    on = rows["loss_mask"]
    torch.testing.assert_close(got.logprobs[on], wanted[on].detach(), rtol=1e-6, atol=1e-6)
    plain = linear_policy_loss(hidden, weight, targets, objective=DAPO, **rows)
    assert not torch.equal(plain.logprobs, got.logprobs)


@pytest.mark.parametrize("mixed", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_mixed_dtypes_give_each_side_its_own(mixed: tuple[torch.dtype, torch.dtype]) -> None:
    hidden, weight, targets, rows = problem(20, 31, 8, torch.bfloat16)
    hidden, weight = (t.detach().to(d).requires_grad_() for t, d in zip((hidden, weight), mixed, strict=True))
    wanted = exact(hidden, weight, targets, rows, DAPO)
    got = linear_policy_loss(hidden, weight, targets, objective=DAPO, **rows)
    for grad, dtype, gold in zip(torch.autograd.grad(got.loss, (hidden, weight)), mixed, wanted[3:], strict=True):
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.double(), gold, rtol=1e-2, atol=1e-5)


def test_operands_of_any_strides() -> None:
    hidden, weight, targets, rows = problem(40, 31, 8)
    out = linear_policy_loss(hidden, weight, targets, objective=DAPO, **rows)
    wanted = torch.autograd.grad(out.loss, (hidden, weight))
    apart = torch.empty(40, 16)[:, ::2].copy_(hidden.detach()).requires_grad_()
    turned = weight.detach().t().contiguous().t().requires_grad_()
    for x, w in ((apart, weight), (hidden, turned), (apart, turned)):
        for chunk_rows in (None, 16):
            buffer = torch.zeros(8, 31).t()
            for into in (None, buffer):
                got = linear_policy_loss(
                    x, w, targets, objective=DAPO, chunk_rows=chunk_rows, weight_grad=into, **rows
                )
                made = torch.autograd.grad(got.loss, (x, w), allow_unused=True)
                torch.testing.assert_close(got.logprobs, out.logprobs, rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(made[0], wanted[0], rtol=1e-4, atol=1e-7)
                torch.testing.assert_close(made[1] if into is None else buffer, wanted[1], rtol=1e-4, atol=1e-7)


def test_autocast_narrows_the_operands_and_nothing_inside() -> None:
    hidden, weight, targets, rows = problem(20, 31, 8)
    narrow = [t.detach().bfloat16().requires_grad_() for t in (hidden, weight)]
    expected = linear_policy_loss(*narrow, targets, objective=DAPO, **rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear_policy_loss(hidden, weight, targets, objective=DAPO, **rows)
        pair = linear_logprobs(hidden, weight, targets)
    assert torch.equal(got.loss, expected.loss) and got.logprobs.dtype == torch.float32
    torch.testing.assert_close(pair, linear_logprobs(*narrow, targets))
    grads = torch.autograd.grad(got.loss, (hidden, weight))
    wanted = torch.autograd.grad(expected.loss, narrow)
    for mine, theirs in zip(grads, wanted, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs.float())


def test_checkpointing_compiling_and_a_tied_head() -> None:
    hidden, weight, targets, rows = problem(20, 31, 8)

    def loss_of(h: Tensor, w: Tensor) -> Tensor:
        # The head is tied: the embedding uses the same matrix.
        return linear_policy_loss(h + w[targets], w, targets, objective=DAPO, chunk_rows=7, **rows).loss

    logprobs, entropy = reference.linear_logprobs(hidden + weight[targets], weight, targets)
    wanted = reference.policy_row_loss(logprobs, entropy=entropy, objective=DAPO, **rows).sum()
    expected = torch.autograd.grad(wanted, (hidden, weight))
    compiled = torch.compile(loss_of, backend="eager", fullgraph=True)
    for run in (loss_of, lambda h, w: checkpoint(loss_of, h, w, use_reentrant=False), compiled):
        grads = torch.autograd.grad(run(hidden, weight), (hidden, weight))
        torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-7)


def test_a_sharded_head_is_gathered_once() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    hidden, weight, targets, rows = problem(20, 31, 8)
    wanted = torch.autograd.grad(
        linear_policy_loss(hidden, weight, targets, objective=DAPO, **rows).loss, (hidden, weight)
    )
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = distribute_tensor(weight.detach(), init_device_mesh("cpu", (1,)), [Shard(0)]).requires_grad_()
        out = linear_policy_loss(hidden, sharded, targets, objective=DAPO, **rows)
        grads = torch.autograd.grad(out.loss, (hidden, sharded))
        assert torch.equal(grads[0], wanted[0]) and torch.equal(grads[1].full_tensor(), wanted[1])
    finally:
        dist.destroy_process_group()


def test_micro_batches_add_up_to_the_batch() -> None:
    hidden, weight, targets, rows = problem(48, 31, 8)
    rows["sequence"] = torch.arange(48) // 8
    for objective in (PolicyObjective("dapo"), PolicyObjective("gspo"), PolicyObjective("dr_grpo")):
        options: dict[str, Any] = {}
        if objective.name == "gspo":
            options = {"sequence": rows["sequence"], "num_sequences": 6}
        elif objective.name == "dr_grpo":
            options = {"num_sequences": 6, "max_length": 8}
        rows["normalizer"] = loss_normalizer(objective, rows["loss_mask"], **options)
        whole = linear_policy_loss(hidden, weight, targets, objective=objective, **rows).loss
        parts = []
        for part in (slice(0, 16), slice(16, 48)):
            piece = {k: v[part] if v.dim() else v for k, v in rows.items()}
            parts.append(linear_policy_loss(hidden[part], weight, targets[part], objective=objective, **piece).loss)
        a, b = (torch.autograd.grad(loss, (hidden, weight)) for loss in (whole, sum(parts)))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_logits_gradients_are_handed_over_once_and_overwritten_logits_are_noticed() -> None:
    hidden, weight, targets, rows = problem(20, 31, 8)
    logits = hidden @ weight.t()
    expected = torch.autograd.grad(
        logits_policy_loss(logits, targets, objective=DAPO, **rows).loss * 0.5, logits, retain_graph=True
    )[0]
    doubled = logits * 1.0
    squares = doubled.square().sum()  # needs the values of the logits in its backward
    out = logits_policy_loss(doubled, targets, objective=DAPO, inplace=True, **rows)
    (grad,) = torch.autograd.grad(out.loss * 0.5, logits, retain_graph=True)
    torch.testing.assert_close(grad, expected)
    with pytest.raises(RuntimeError, match="handed over"):
        torch.autograd.grad(out.loss, logits, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()
    leaf = logits.detach().requires_grad_()
    with pytest.raises(ValueError, match="leaf"):
        logits_policy_loss(leaf, targets, objective=DAPO, inplace=True, **rows)


def test_every_operation_says_what_it_runs_by() -> None:
    hidden, weight, targets, rows = problem(5, 31, 8)
    operations = ("linear_policy_loss", "selective_log_softmax", "linear_logprobs")

    def run() -> list[str]:
        linear_policy_loss(hidden, weight, targets, objective=DAPO, **rows)
        selective_log_softmax(hidden @ weight.t(), targets)
        linear_logprobs(hidden, weight, targets)
        return [last_path(operation)[0] for operation in operations]

    assert run() == ["torch" if native.unavailable_reason() else "native"] * 3
    with use_implementation("torch"):
        assert run() == ["torch"] * 3
        assert last_path("linear_policy_loss") == ("torch", ())


def test_policy_loss_alone_accepts_narrow_advantages() -> None:
    logprobs = torch.randn(9)
    advantages = torch.randn(9).bfloat16()
    got = policy_loss(logprobs, advantages=advantages, normalizer=9.0, objective=PolicyObjective())
    wide = policy_loss(logprobs, advantages=advantages.float(), normalizer=9.0, objective=replace(PolicyObjective()))
    assert torch.equal(got.row_loss, wide.row_loss) and got.row_loss.dtype == torch.float32
