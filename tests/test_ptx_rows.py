"""The row kernels as compiled for sm_80 to sm_120, run by ``ptx_machine.py``: in bfloat16, which the interpreter gets
wrong, and with what it cannot see: races between threads, and memory outside of the tensors."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from rewardmap_kernels import (
    PolicyObjective,
    dispatch,
    group_advantage,
    last_path,
    linear_logprobs,
    linear_policy_loss,
    logits_policy_loss,
    reference,
    selective_log_softmax,
    triton_advantage,
    triton_launch,
    triton_rows,
    use_implementation,
)

sys.path.append(str(Path(__file__).parent))
import kernels_cases as cases
from ptx_memory import PtxError
from ptx_traffic import Traffic
from ptx_triton import ptx_gpu

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def triton_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dispatch, "_why_not_triton", lambda tensor: None)
    with use_implementation("triton"):
        yield


def error(got: Tensor, exact: Tensor) -> float:
    """Relative Frobenius error."""
    return float((got.detach().double() - exact).norm() / exact.norm())


def float64(rows: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in rows.items()}


def head(n: int, vocab: int, hidden: int) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """bfloat16 hidden and weight, targets, and rows near the policy's own log-probabilities."""
    g = torch.Generator().manual_seed(11)
    weight = torch.randn(vocab, hidden, generator=g) / hidden**0.5
    targets = torch.randint(0, vocab, (n,), generator=g)
    states = torch.randn(n, hidden, generator=g) + 5 * weight[targets]
    rows = cases.row_inputs(n, dtype=FLOAT32)
    narrow = [t.to(BFLOAT16).requires_grad_() for t in (states, weight)]
    current = reference.linear_logprobs(narrow[0].detach().float(), narrow[1].detach().float(), targets)[0]
    for name, far in (("old_logprobs", 0.3), ("ref_logprobs", 0.3), ("rollout_logprobs", 0.06)):
        rows[name] = current + far * (rows[name] + 1.5)
    return narrow[0], narrow[1], targets, rows


@pytest.mark.parametrize("objective", cases.OBJECTIVES, ids=cases.objective_id)
def test_the_head_s_error_is_at_most_twice_eager_s(objective: PolicyObjective) -> None:
    hidden, weight, targets, rows = head(9, 1031, 32)
    h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    logprobs, entropy = reference.linear_logprobs(h, w, targets)
    loss = reference.policy_row_loss(logprobs, entropy=entropy, objective=objective, **float64(rows)).sum()
    wanted = (loss.detach(), *torch.autograd.grad(loss, (h, w)))
    logprobs, entropy = reference.selective_log_softmax((hidden @ weight.t()).float(), targets)
    eager = reference.policy_row_loss(logprobs, entropy=entropy, objective=objective, **rows).sum()
    theirs = (eager, *torch.autograd.grad(eager, (hidden, weight)))
    with ptx_gpu(90, seed=1) as runs:
        got = linear_policy_loss(hidden, weight, targets, objective=objective, chunk_rows=4, **rows)
        mine = (got.loss, *torch.autograd.grad(got.loss, (hidden, weight)))
    two = objective.needs_sequence or objective.entropy_coef
    kernels = ("statistics_kernel", "gradient_kernel") if two else ("exponentials_kernel",)
    assert last_path("linear_policy_loss") == ("triton", kernels) and set(runs) == {*kernels, "scale_kernel"}
    for a, b, c in zip(mine, theirs, wanted, strict=True):
        assert error(a, c) <= 2 * error(b, c) + 1e-5


@pytest.mark.parametrize(("capability", "inplace"), [(80, False), (90, True)])
@pytest.mark.parametrize("objective", [cases.OBJECTIVES[i] for i in (1, 5, 6, 7, 8, 9, 12)], ids=cases.objective_id)
def test_the_error_from_logits_is_at_most_twice_eager_s(
    objective: PolicyObjective, inplace: bool, capability: int
) -> None:
    hidden, weight, targets, rows = head(6, 8_209, 32)  # more columns than a program holds
    logits = (hidden @ weight.t()).detach().requires_grad_()
    z, results = logits.detach().double().requires_grad_(), []
    for leaf, source, inputs in ((z, z, float64(rows)), (logits, logits.float(), rows)):
        logprobs, entropy = reference.selective_log_softmax(source, targets)
        loss = reference.policy_row_loss(logprobs, entropy=entropy, objective=objective, **inputs).sum()
        results.append((loss.detach(), logprobs.detach(), torch.autograd.grad(loss, leaf)[0]))
    wanted, theirs = results
    off = ~rows["loss_mask"]
    values = logits.detach().clone()
    if not objective.needs_sequence:
        values[off] = float("nan")
    with ptx_gpu(capability, seed=2):
        leaf = values.requires_grad_()
        got = logits_policy_loss(leaf * 1.0, targets, objective=objective, inplace=inplace, **rows)
        (gradient,) = torch.autograd.grad(got.loss, leaf)
    assert error(got.loss, wanted[0]) <= 2 * error(theirs[0], wanted[0]) + 1e-5
    assert error(got.logprobs[~off], wanted[1][~off]) <= 2 * error(theirs[1][~off], wanted[1][~off]) + 1e-5
    assert error(gradient, wanted[2]) <= 2 * error(theirs[2], wanted[2]) + 1e-5
    assert (gradient[off] == 0).all()


@pytest.mark.parametrize("frozen", [False, True])
def test_log_probabilities_for_trainers_with_their_own_loss(frozen: bool) -> None:
    hidden, weight, targets, _ = head(8, 1031, 32)
    weight.requires_grad_(not frozen)
    a, b = torch.randn(2, 8, generator=torch.Generator().manual_seed(3))
    h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    live = (hidden,) if frozen else (hidden, weight)
    for bonus in (False, True):
        logprobs, entropy = reference.linear_logprobs(h, w, targets)
        wanted = torch.autograd.grad((a * logprobs + bonus * b * entropy).sum(), (h, w))
        eager = reference.selective_log_softmax((hidden @ weight.t()).float(), targets)
        theirs = torch.autograd.grad((a * eager[0] + bonus * b * eager[1]).sum(), live)
        for keep_bytes in (0, 1 << 30):
            with ptx_gpu(90, seed=4):
                got = linear_logprobs(hidden, weight, targets, entropy_gradient=bonus, keep_bytes=keep_bytes)
                mine = torch.autograd.grad((a * got[0] + bonus * b * got[1]).sum(), live)
            for x, y, z in zip(mine, theirs, wanted, strict=False):
                assert error(x, z) <= 2 * error(y, z) + 1e-5


ROWS = 4


@pytest.mark.parametrize("vocab", [1, 31, 4_096, 9_007])
@pytest.mark.parametrize(("dtype", "narrow"), [(FLOAT32, FLOAT32), (FLOAT32, BFLOAT16), (BFLOAT16, BFLOAT16)])
def test_gradients_over_the_logits_reach_no_value_too_early(
    dtype: torch.dtype, narrow: torch.dtype, vocab: int
) -> None:
    """The head's two ways through a chunk, both of which may write a narrower gradient into a row still being read."""
    g = torch.Generator().manual_seed(vocab)
    values, targets = torch.randn(ROWS, vocab, generator=g) * 3, torch.randint(0, vocab, (ROWS,), generator=g)
    padded = torch.full((ROWS, -(-vocab // 8) * 8 + 8), 7.0).to(dtype)  # as the head's buffer: rows of 16 bytes
    logits, temperature = padded[:, :vocab], torch.linspace(0.5, 1.5, ROWS)
    c, e = torch.randn(2, ROWS, generator=g)
    logits.copy_(values)
    z = logits.double().requires_grad_()
    logprobs, entropy = reference.selective_log_softmax(z, targets, temperature.double())
    (wanted,) = torch.autograd.grad((c * logprobs + e * entropy).sum(), z, retain_graph=True)
    (direction,) = torch.autograd.grad(-logprobs.sum(), z)
    dispatch.choose("linear_policy_loss", logits)
    arguments = ("linear_policy_loss", logits, targets, temperature)
    unit = torch.finfo(narrow).eps + (2e-6 if narrow == FLOAT32 else 0)
    with ptx_gpu(90, seed=5):
        rows = triton_launch.statistics(*arguments, None)
        torch.testing.assert_close(rows.logprobs.double(), logprobs.detach(), rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(rows.entropy.double(), entropy.detach(), rtol=2e-5, atol=2e-5)
        made = triton_launch.gradient(*arguments, rows, c, e, None, narrow, True)
        assert made.untyped_storage().data_ptr() == padded.untyped_storage().data_ptr()
        assert vocab == 1 or error(made, wanted) <= unit
        logits.copy_(values)
        keep = torch.arange(ROWS) != 2
        done = triton_launch.exponentials(*arguments, keep, narrow, None)
    got = done.values.double() * (temperature * done.total)[:, None].reciprocal()
    assert vocab == 1 or error(got[keep], direction[keep]) <= unit
    assert (done.values[2] == 0).all()


@pytest.mark.parametrize("kind", ["flat", "peaked", "growing", "falling", "high", "ties", "closed columns"])
def test_extreme_logits(kind: str) -> None:
    vocab, g = 5_003, torch.Generator().manual_seed(7)
    logits, targets = torch.randn(ROWS, vocab, generator=g), torch.randint(0, vocab, (ROWS,), generator=g)
    if kind == "flat":
        logits = logits * 1e-4
    elif kind == "peaked":
        logits[torch.arange(ROWS), targets] = 80.0
    elif kind in ("growing", "falling"):
        logits += torch.linspace(-80, 80, vocab) * (1 if kind == "growing" else -1)
    elif kind == "high":
        logits = logits + 80.0
    elif kind == "ties":
        logits = torch.zeros(ROWS, vocab)
    else:
        logits[:, 4_500:] = float("-inf")
        logits[:, :2_100] = float("-inf")
        targets = targets % 2_000 + 2_200
    logits = logits.to(BFLOAT16)
    z = logits.double().requires_grad_()
    exact = reference.selective_log_softmax(z, targets, 0.7)
    a, b = torch.randn(2, ROWS, generator=g)
    (wanted,) = torch.autograd.grad((a * exact[0] + b * exact[1]).sum(), z)
    leaf = logits.requires_grad_()
    with ptx_gpu(100):
        got = selective_log_softmax(leaf, targets, 0.7)
        (gradient,) = torch.autograd.grad((a * got[0] + b * got[1]).sum(), leaf)
        dispatch.choose("linear_policy_loss", logits)
        made = triton_launch.exponentials(
            "linear_policy_loss", logits.detach().clone(), targets, 0.7, None, BFLOAT16, None
        )
    for mine, theirs in zip(got, exact, strict=True):
        torch.testing.assert_close(mine.double(), theirs.detach(), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(made.rows.logprobs.double(), exact[0].detach(), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(made.rows.entropy.double(), exact[1].detach(), rtol=1e-4, atol=2e-5)
    wanted = torch.nan_to_num(wanted)  # autograd of the definition is 0 * inf where a column is -inf
    # log2 p is a difference of numbers of up to 165, of which one was rounded.
    torch.testing.assert_close(gradient.double(), wanted, rtol=2**-7, atol=6e-6)


@pytest.mark.parametrize(
    ("capability", "sizes"), [(80, [1]), (120, [8] * 5), (90, [3, 1, 70, 2, 1, 8]), (80, [40, 270])]
)
def test_group_advantage(capability: int, sizes: list[int]) -> None:
    g = torch.Generator().manual_seed(len(sizes))
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    rewards = torch.randn(int(offsets[-1]), generator=g).round(decimals=1)
    for options in (
        {},
        {"scale": "batch", "baseline": "leave_one_out"},
        {"scale": "none", "baseline": "batch_mean"},
        {"scale": "max_min"},
        {"scale": "mad", "ddof": 0},
    ):
        with ptx_gpu(capability, seed=6) as runs:
            got = group_advantage(rewards, offsets, **options)  # type: ignore[arg-type]
        assert runs == {"group_advantage_kernel": 1}
        wanted = reference.group_advantage(rewards.double(), offsets.tolist(), **options)  # type: ignore[arg-type]
        torch.testing.assert_close(got.advantages.double(), wanted[0], rtol=1e-4, atol=1e-5)


def test_slices_at_any_place_run_by_one_compilation() -> None:
    """Micro-batches are slices of a step's rows: each place modulo 16 bytes would be a compilation of its own."""
    n, vocab = 4, 32
    names = ("policy_row", "statistics", "gradient", "exponentials")
    kernels = [*(getattr(triton_rows, f"{name}_kernel") for name in names), triton_advantage.group_advantage_kernel]
    logits, hidden, weight = (torch.randn(shape, requires_grad=True) for shape in ((n, vocab), (n, 16), (vocab, 16)))
    advantages, old, temperature = torch.randn(3, n + 16).exp().unbind()
    mask, targets = torch.ones(n + 16, dtype=torch.bool), torch.randint(0, vocab, (n + 16,))

    def run(at: int) -> list[int]:
        part = slice(at, at + n)
        rows: dict[str, Any] = {
            "advantages": advantages[part], "normalizer": old[part], "old_logprobs": old[part], "loss_mask": mask[part],
            "temperature": temperature[part],
        }  # fmt: skip
        logits_policy_loss(logits, targets[part], objective=PolicyObjective("dapo"), **rows)
        selective_log_softmax(logits.detach(), targets[part], temperature[part])
        for objective in (PolicyObjective("dapo"), PolicyObjective("gspo")):
            rows["sequence"] = torch.arange(n) // 2
            linear_policy_loss(hidden, weight, targets[part], objective=objective, chunk_rows=3, **rows)
        group_advantage(advantages[part], torch.tensor([0, 2, 4]))
        return [len(kernel.device_caches[90][0]) for kernel in kernels]

    with ptx_gpu(90):
        assert run(0) == run(1) == run(2) == run(4) == run(16)


def test_runs_do_not_depend_on_the_order_of_warps() -> None:
    hidden, weight, targets, rows = head(6, 9_007, 16)
    logits = (hidden @ weight.t()).detach()
    results = []
    for seed in (None, 1, 2, 3):
        source = logits.clone().requires_grad_()
        with ptx_gpu(90, seed):
            out = logits_policy_loss(source * 1, targets, objective=cases.OBJECTIVES[5], inplace=True, **rows)
            results.append((out.logprobs.detach(), *torch.autograd.grad(out.loss, source)))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_a_missing_barrier_shows() -> None:
    logits, targets, zeros = torch.randn(2, 9_007), torch.tensor([3, 9_000]), torch.zeros(2)
    dispatch.choose("linear_policy_loss", logits)
    arguments = ("linear_policy_loss", logits, targets, 1.0)
    with ptx_gpu(90):
        rows = triton_launch.statistics(*arguments, None)
    with (
        ptx_gpu(90, edit=lambda text: text.replace("bar.sync", "// bar.sync")),
        pytest.raises(PtxError, match=r"gradient_kernel, line \d+, 'st\.global.*may not have been yet"),
    ):
        triton_launch.gradient(*arguments, rows, torch.ones(2), zeros, None, BFLOAT16, True)


def test_memory_outside_of_the_tensors_shows() -> None:
    logits, targets, out = torch.randn(3, 40), torch.tensor([1, 2]), torch.empty(3, 3)
    with ptx_gpu(80), pytest.raises(PtxError, match=r"ld\.global\.b64.*neither shared memory nor of a tensor passed"):
        triton_rows.statistics_kernel[(3,)](
            logits, 40, targets, out, out, *out, 40, 1.0, HAS_MASK=False, HAS_TEMPERATURE=False, BLOCK=64, num_warps=1
        )
    with ptx_gpu(80), pytest.raises(PtxError, match="between the elements of the tensors passed"):
        triton_rows.statistics_kernel[(3,)](
            logits[:, :39], 40, torch.zeros(3, dtype=torch.long), out, out, *out, 40, 1.0,
            HAS_MASK=False, HAS_TEMPERATURE=False, BLOCK=64, num_warps=1,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("kernel", "dtype", "read", "written"),
    [
        ("statistics", FLOAT32, 4, 0),
        ("statistics", BFLOAT16, 2, 0),
        ("exponentials", FLOAT32, 4, 2),
        ("exponentials", BFLOAT16, 2, 2),
        ("gradient", FLOAT32, 4, 2),
        ("gradient", BFLOAT16, 2, 2),
        ("fused", BFLOAT16, 4, 2),  # the second reading from a cache
    ],
)
def test_what_a_logit_costs_in_bytes_and_transactions(kernel: str, dtype: torch.dtype, read: int, written: int) -> None:
    """As the docs count it: bytes read and written per logit, in the fewest sectors that they fit."""
    n, vocab = 2, 32_784
    logits, targets, ones = torch.randn(n, vocab).to(dtype), torch.tensor([3, 30_000]), torch.ones(n)
    dispatch.choose("logits_policy_loss", logits)
    arguments = ("logits_policy_loss", logits, targets, 1.0)
    with ptx_gpu(90):
        rows = triton_launch.statistics(*arguments, None)
    inputs = dict.fromkeys(("advantages", "old_logprobs", "ref_logprobs", "rollout_logprobs", "normalizer"), ones)
    traffic = Traffic()
    with ptx_gpu(90, traffic=traffic):
        if kernel == "statistics":
            triton_launch.statistics(*arguments, None)
        elif kernel == "exponentials":
            triton_launch.exponentials(*arguments, None, BFLOAT16, None)
        elif kernel == "gradient":
            triton_launch.gradient(*arguments, rows, ones, ones, None, BFLOAT16, True)
        else:
            plain = {**inputs, "objective": PolicyObjective("dapo")}
            triton_launch.fused("logits_policy_loss", logits, targets, 1.0, None, plain, None, True)
    bytes_read, bytes_written = (traffic.bytes[f"global {way}"] / (n * vocab) for way in ("read", "write"))
    # With a dozen numbers of the row, which every thread asks for.
    assert read <= bytes_read <= 1.25 * read and written <= bytes_written <= 1.01 * written + 0.01
    # Beside a narrower result a thread takes 32 bytes in two halves: every sector is asked for twice.
    halves = dtype == FLOAT32 and written > 0
    assert traffic.ratio("global read") <= (2 if halves else 1.01) and traffic.ratio("global write") <= 1.01
    assert traffic.ratio("shared read") == traffic.ratio("shared write") == 1  # no bank conflict
