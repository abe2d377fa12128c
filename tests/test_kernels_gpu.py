"""The kernels on a GPU, in bfloat16: what the interpreter and the compiler alone cannot show. ``pytest -m gpu``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rewardmap_kernels import (
    PolicyObjective,
    group_advantage,
    last_path,
    linear_logprobs,
    linear_policy_loss,
    logits_policy_loss,
    loss_normalizer,
    reference,
    selective_log_softmax,
)

sys.path.append(str(Path(__file__).parent))
import kernels_cases as cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DAPO = PolicyObjective("dapo", clip_eps_high=0.28, kl_coef=0.05, entropy_coef=0.02)
PLAIN = PolicyObjective("dapo")


def problem(n: int, v: int, h: int) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """bfloat16 hidden and weight, targets, and rows near the policy's own log-probabilities, on the GPU."""
    g = torch.Generator().manual_seed(11)
    weight = torch.randn(v, h, generator=g) / h**0.5
    targets = torch.randint(0, v, (n,), generator=g)
    hidden = torch.randn(n, h, generator=g) + 5 * weight[targets]
    narrow = [t.bfloat16().cuda().requires_grad_() for t in (hidden, weight)]
    rows = {k: t.cuda() for k, t in cases.row_inputs(n, dtype=torch.float32).items()}
    current = reference.linear_logprobs(narrow[0].detach().float(), narrow[1].detach().float(), targets.cuda())[0]
    # The engine's nearer: a ratio over whole sequences would else leave none of them to train on.
    for name, far in (("old_logprobs", 0.3), ("ref_logprobs", 0.3), ("rollout_logprobs", 0.06)):
        rows[name] = current + far * (rows[name] + 1.5)
    return narrow[0], narrow[1], targets.cuda(), rows


def exact(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: dict[str, Any], objective: PolicyObjective
) -> tuple[Tensor, ...]:
    """loss and both gradients in float64."""
    h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    wide = {k: v.double() if v is not None and v.is_floating_point() else v for k, v in rows.items()}
    logprobs, entropy = reference.linear_logprobs(h, w, targets)
    loss = reference.policy_row_loss(logprobs, entropy=entropy, objective=objective, **wide).sum()
    return loss.detach(), *torch.autograd.grad(loss, (h, w))


def error(got: Tensor, wanted: Tensor) -> float:
    """Relative Frobenius error."""
    return float((got.detach().double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("objective", cases.OBJECTIVES, ids=cases.objective_id)
def test_the_head_s_error_is_at_most_twice_eager_s(objective: PolicyObjective) -> None:
    hidden, weight, targets, rows = problem(384, 1031, 128)
    wanted = exact(hidden, weight, targets, rows, objective)
    logprobs, entropy = reference.selective_log_softmax((hidden @ weight.t()).float(), targets)
    eager = reference.policy_row_loss(logprobs, entropy=entropy, objective=objective, **rows).sum()
    theirs = (eager, *torch.autograd.grad(eager, (hidden, weight)))
    got = linear_policy_loss(hidden, weight, targets, objective=objective, chunk_rows=128, **rows)
    two = objective.needs_sequence or objective.entropy_coef
    kernels = ("statistics_kernel", "gradient_kernel") if two else ("exponentials_kernel",)
    assert last_path("linear_policy_loss") == ("triton", kernels)
    mine = (got.loss, *torch.autograd.grad(got.loss, (hidden, weight)))
    for a, b, c in zip(mine, theirs, wanted, strict=True):
        assert error(a, c) <= 2 * error(b, c) + 1e-5


@pytest.mark.parametrize("objective", [PLAIN, DAPO, PolicyObjective("gspo")], ids=cases.objective_id)
def test_the_error_from_logits_is_at_most_twice_eager_s(objective: PolicyObjective) -> None:
    hidden, weight, targets, rows = problem(200, 1031, 128)
    logits = (hidden @ weight.t()).detach().requires_grad_()
    z = logits.detach().double().requires_grad_()
    wide = {k: v.double() if v.is_floating_point() else v for k, v in rows.items()}
    results = []
    for leaf, inputs in ((z, wide), (logits, rows)):
        source = leaf if leaf is z else leaf.float()
        logprobs, entropy = reference.selective_log_softmax(source, targets)
        loss = reference.policy_row_loss(logprobs, entropy=entropy, objective=objective, **inputs).sum()
        results.append((loss.detach(), logprobs.detach(), torch.autograd.grad(loss, leaf)[0]))
    wanted, theirs = results
    on = rows["loss_mask"]
    for inplace in (False, True):
        source = logits * 1.0
        got = logits_policy_loss(source, targets, objective=objective, inplace=inplace, **rows)
        two = objective.needs_sequence
        kernels = ("statistics_kernel", "gradient_kernel") if two else ("policy_row_kernel",)
        assert last_path("logits_policy_loss") == ("triton", kernels)
        (gradient,) = torch.autograd.grad(got.loss, logits)
        assert error(got.loss, wanted[0]) <= 2 * error(theirs[0], wanted[0]) + 1e-5
        assert error(got.logprobs[on], wanted[1][on]) <= 2 * error(theirs[1][on], wanted[1][on]) + 1e-5
        assert error(gradient, wanted[2]) <= 2 * error(theirs[2], wanted[2]) + 1e-5
        assert (gradient[~on] == 0).all()


@pytest.mark.parametrize("frozen", [False, True])
def test_log_probabilities_for_trainers_with_their_own_loss(frozen: bool) -> None:
    hidden, weight, targets, _ = problem(256, 1031, 128)
    weight.requires_grad_(not frozen)
    a, b = torch.randn(2, 256, device="cuda")
    h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    for bonus in (False, True):
        logprobs, entropy = reference.linear_logprobs(h, w, targets)
        wanted = torch.autograd.grad((a * logprobs + bonus * b * entropy).sum(), (h, w))
        eager = reference.selective_log_softmax((hidden @ weight.t()).float(), targets)
        live = (hidden,) if frozen else (hidden, weight)
        theirs = torch.autograd.grad((a * eager[0] + bonus * b * eager[1]).sum(), live)
        for keep_bytes in (0, 1 << 30):
            got = linear_logprobs(hidden, weight, targets, entropy_gradient=bonus, keep_bytes=keep_bytes)
            mine = torch.autograd.grad((a * got[0] + bonus * b * got[1]).sum(), live)
            for x, y, z in zip(mine, theirs, wanted, strict=False):
                assert error(x, z) <= 2 * error(y, z) + 1e-5


def test_nothing_waits_for_the_gpu() -> None:
    hidden, weight, targets, rows = problem(256, 1031, 128)
    logits = (hidden @ weight.t()).detach().requires_grad_()
    offsets, rewards = torch.tensor([0, 8, 16], device="cuda"), torch.rand(16, device="cuda")

    def step() -> None:
        divisor = loss_normalizer(DAPO, rows["loss_mask"])
        inputs = {**rows, "normalizer": divisor}
        linear_policy_loss(hidden, weight, targets, objective=DAPO, **inputs).loss.backward()
        logits_policy_loss(logits, targets, objective=DAPO, **inputs).loss.backward()
        logprobs, entropy = linear_logprobs(hidden, weight, targets)
        (logprobs + entropy).sum().backward()
        selective_log_softmax(logits, targets)
        group_advantage(rewards, offsets)

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_is_a_chunk_of_logits_and_the_gradients() -> None:
    n, v, h, chunk = 4096, 32_003, 512, 512  # odd: a product that copied its padded output would show
    hidden, weight, targets, rows = problem(n, v, h)
    linear_policy_loss(hidden, weight, targets, objective=DAPO, chunk_rows=chunk, **rows)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = linear_policy_loss(hidden, weight, targets, objective=DAPO, chunk_rows=chunk, **rows)
    peak = torch.cuda.max_memory_allocated() - before
    # The formula, 5 %, and the masked copy of a chunk's hidden rows with the vectors of N.
    assert peak <= 1.05 * (4 * chunk * v + 4 * v * h + 2 * n * h) + 4 * chunk * h + 256 * n
    assert out.loss.isfinite()


def test_offsets_beyond_two_billion_elements() -> None:
    v = 152_064
    n = (1 << 31) // v + 64
    logits = torch.zeros(n, v, dtype=torch.bfloat16, device="cuda")
    targets = torch.full((n,), v - 1, device="cuda")
    logits[:, -1] = 4.0
    source = logits.requires_grad_() * 1.0
    out = logits_policy_loss(
        source, targets, advantages=torch.ones(n, device="cuda"), normalizer=float(n), objective=PLAIN, inplace=True
    )
    assert (out.logprobs == out.logprobs[0]).all()
    (gradient,) = torch.autograd.grad(out.loss, source)
    assert torch.equal(gradient[-1], gradient[0]) and gradient[0, -1] < 0


def test_runs_are_bitwise_equal() -> None:
    hidden, weight, targets, rows = problem(300, 1031, 128)
    grads = []
    for _ in range(2):
        out = linear_policy_loss(hidden, weight, targets, objective=DAPO, chunk_rows=128, **rows)
        grads.append(torch.autograd.grad(out.loss, (hidden, weight)))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_group_advantage_is_one_launch_and_bad_offsets_show() -> None:
    g = torch.Generator().manual_seed(0)
    rewards = torch.rand(1024 * 8, generator=g)
    offsets = torch.arange(0, 8193, 8)
    got = group_advantage(rewards.cuda(), offsets.cuda())
    assert last_path("group_advantage") == ("triton", ("group_advantage_kernel",))
    wanted = reference.group_advantage(rewards.double(), offsets.tolist())
    torch.testing.assert_close(got.advantages.cpu().double(), wanted[0], rtol=1e-4, atol=1e-5)
    spoilt = offsets.clone()
    spoilt[-1] = 9000
    assert group_advantage(rewards.cuda(), spoilt.cuda()).advantages[-8:].isnan().all()


@pytest.mark.parametrize("objective", [PLAIN, DAPO, PolicyObjective("gspo")], ids=cases.objective_id)
def test_a_cuda_graph_replays_the_whole_step(objective: PolicyObjective) -> None:
    hidden, weight, targets, rows = problem(256, 1031, 128)
    other = problem(256, 1031, 128)[0].detach().flip(0)
    logits = (hidden @ weight.t()).detach().requires_grad_()
    rewards, offsets = torch.rand(64, device="cuda"), torch.arange(0, 65, 8, device="cuda")
    outputs: list[Tensor] = []

    def step() -> None:
        made = group_advantage(rewards, offsets).advantages[:, None].expand(-1, 4).reshape(-1)
        inputs = {**rows, "advantages": made, "normalizer": loss_normalizer(PLAIN, rows["loss_mask"])}
        head = linear_policy_loss(hidden, weight, targets, objective=objective, chunk_rows=128, **inputs)
        direct = logits_policy_loss(logits, targets, objective=objective, **inputs)
        pair = linear_logprobs(hidden, weight, targets)
        gradients = torch.autograd.grad(head.loss + pair[0].sum() + pair[1].mean(), (hidden, weight))
        outputs[:] = [head.loss, head.metrics["ratio_max"], direct.loss, *gradients, made]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    captured = list(outputs)
    for values in (hidden.detach().clone(), other):
        with torch.no_grad():
            hidden.copy_(values)
            rewards.copy_(torch.rand_like(rewards))
        graph.replay()
        replayed = [t.clone() for t in captured]
        step()
        for mine, theirs in zip(replayed, outputs, strict=True):
            assert error(mine, theirs.double()) < 1e-3
    assert last_path("linear_policy_loss") is not None


def test_other_streams_and_lengths_never_compile_again() -> None:
    from rewardmap_kernels import triton_rows

    def entries() -> int:
        return sum(len(cache[0]) for cache in triton_rows.exponentials_kernel.device_caches.values())

    hidden, weight, targets, rows = problem(300, 1031, 128)
    counts = []
    for n in (300, 299, 128, 17, 1):
        part = {k: t[:n] for k, t in rows.items()}
        with torch.cuda.stream(torch.cuda.Stream()):
            linear_policy_loss(hidden[:n], weight, targets[:n], objective=PLAIN, **part)
        torch.cuda.synchronize()
        counts.append(entries())
    assert counts[0] >= 1 and counts == counts[:1] * len(counts)


def test_group_advantage_compiles_to_one_graph() -> None:
    rewards, offsets = torch.rand(64, device="cuda"), torch.arange(0, 65, 8, device="cuda")
    compiled = torch.compile(lambda r, o: group_advantage(r, o).advantages * 2, fullgraph=True)
    assert torch.equal(compiled(rewards, offsets), group_advantage(rewards, offsets).advantages * 2)


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_kernels_run_where_their_tensors_are() -> None:
    """Triton launches on the current device, which is the first one here."""
    hidden, weight, targets, rows = problem(300, 1031, 128)
    results = []
    for device in ("cuda:0", "cuda:1"):
        h, w = (t.detach().to(device).requires_grad_() for t in (hidden, weight))
        there = {k: t.to(device) for k, t in rows.items()}
        head = linear_policy_loss(h, w, targets.to(device), objective=DAPO, **there)
        gradients = torch.autograd.grad(head.loss, (h, w))
        pair = linear_logprobs(h.detach(), w.detach(), targets.to(device))
        made = group_advantage(torch.arange(16.0, device=device), torch.arange(0, 17, 8, device=device)).advantages
        results.append([t.detach().cpu() for t in (head.loss, *gradients, *pair, made)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
