"""What the kernel bench runs: each operation beside its peers, with its declared arithmetic and traffic.

A provider is a call that leaves a loss's gradients (or an operation's outputs) behind. ``error`` of a case
compares every provider's gradients with float64 of the definition on the same inputs: no time without it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewardmap_kernels import (
    PolicyObjective,
    group_advantage,
    linear_logprobs,
    linear_policy_loss,
    logits_policy_loss,
    policy_loss,
    reference,
    selective_log_softmax,
)

OBJECTIVE = PolicyObjective("dapo", clip_eps_high=0.28)
Run = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """``providers``: "ours" first, then the peers; "floor" is the bare arithmetic and has no result to
    compare."""

    name: str
    providers: dict[str, Run]
    exact: tuple[Tensor, ...]
    flop: float
    bytes: float


def errors(case: Case, provider: str) -> float:
    """Largest relative Frobenius error of a provider's tensors against float64."""
    pairs = zip(case.providers[provider](), case.exact, strict=True)
    return max(float((a.double() - b).norm() / b.norm().clamp(min=1e-300)) for a, b in pairs)


def _inputs(n: int, v: int, h: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """Random hidden states whose targets are likely, as a trained policy's are, and log-ratios of about
    0.1."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(v, h, generator=g) / h**0.5
    targets = torch.randint(0, v, (n,), generator=g)
    hidden = torch.randn(n, h, generator=g) + 6.0 * weight[targets]
    moved = [t.clone().to(device=device, dtype=dtype).requires_grad_() for t in (hidden, weight)]
    current = reference.linear_logprobs(hidden, weight, targets)[0] if n * v < 1 << 26 else -torch.ones(n)
    rows = {
        "advantages": torch.randn(n, generator=g), "old_logprobs": current + 0.1 * torch.randn(n, generator=g),
        "normalizer": torch.tensor(float(n)),
    }  # fmt: skip
    return moved[0], moved[1], targets.to(device), {k: t.to(device) for k, t in rows.items()}


def _gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


def _eager_loss(logits: Tensor, targets: Tensor, rows: dict[str, Any]) -> Tensor:
    """What a trainer without fused kernels does."""
    logprobs = torch.log_softmax(logits.float(), -1).gather(1, targets[:, None])[:, 0]
    ratio = (logprobs - rows["old_logprobs"]).exp()
    adv = rows["advantages"]
    low, high = 1 - OBJECTIVE.clip_eps_low, 1 + OBJECTIVE.clip_eps_high
    return (-torch.minimum(ratio * adv, ratio.clamp(low, high) * adv)).sum() / rows["normalizer"]


def _exact(hidden: Tensor, weight: Tensor, targets: Tensor, rows: dict[str, Any]) -> tuple[Tensor, Tensor]:
    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    wide = {k: v.double() for k, v in rows.items()}
    loss = reference.policy_row_loss(reference.linear_logprobs(h, w, targets)[0], objective=OBJECTIVE, **wide).sum()
    return torch.autograd.grad(loss, (h, w))


def linear_case(n: int, v: int, h: int, device: str, dtype: torch.dtype, frozen: bool) -> Case:
    """The head with its policy loss, forward and backward."""
    hidden, weight, targets, rows = _inputs(n, v, h, device, dtype)
    exact = _exact(hidden, weight, targets, rows)
    if frozen:
        weight, exact = weight.detach(), exact[:1]
    live = (hidden,) if frozen else (hidden, weight)

    def ours() -> tuple[Tensor, ...]:
        return _gradients(linear_policy_loss(hidden, weight, targets, objective=OBJECTIVE, **rows).loss, *live)

    def own_loss() -> tuple[Tensor, ...]:
        logprobs, _ = linear_logprobs(hidden, weight, targets, entropy_gradient=False)
        return _gradients(policy_loss(logprobs, objective=OBJECTIVE, **rows).row_loss.sum(), *live)

    def eager() -> tuple[Tensor, ...]:
        return _gradients(_eager_loss(hidden @ weight.t(), targets, rows), *live)

    def floor() -> tuple[Tensor, ...]:
        with torch.no_grad():
            logits = hidden @ weight.t()
            products = (logits @ weight, logits.t() @ hidden)
        return products[: len(live)]

    providers: dict[str, Run] = {"ours": ours, "linear_logprobs": own_loss, "torch eager": eager, "floor": floor}
    if device == "cuda":
        compiled = torch.compile(_eager_loss)
        providers["torch.compile"] = lambda: _gradients(compiled(hidden @ weight.t(), targets, rows), *live)
    if importlib.util.find_spec("trl"):
        from trl.kernels import ChunkedLogProbFunction

        def trl_head() -> tuple[Tensor, ...]:
            logprobs = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32768, None, 1.0, ())[0]
            return _gradients(policy_loss(logprobs, objective=OBJECTIVE, **rows).row_loss.sum(), *live)

        providers["TRL head"] = trl_head
    products = 4 if frozen else 6
    size = dtype.itemsize
    traffic = products / 2 * size * (n * v + v * h + n * h)
    name = f"linear_policy_loss{'.frozen' if frozen else ''}"
    return Case(name, providers, exact, products * float(n) * v * h, traffic)


def logits_case(n: int, v: int, device: str, dtype: torch.dtype) -> Case:
    """Policy loss from logits that are there, gradient included: one read and one write."""
    hidden, weight, targets, rows = _inputs(n, v, 16, device, dtype)
    logits = (hidden @ weight.t()).detach().requires_grad_()
    z = logits.detach().double().requires_grad_()
    wide = {k: t.double() for k, t in rows.items()}
    logprobs = reference.selective_log_softmax(z, targets)[0]
    exact = torch.autograd.grad(reference.policy_row_loss(logprobs, objective=OBJECTIVE, **wide).sum(), z)

    def ours() -> tuple[Tensor, ...]:
        return _gradients(logits_policy_loss(logits, targets, objective=OBJECTIVE, **rows).loss, logits)

    def eager() -> tuple[Tensor, ...]:
        return _gradients(_eager_loss(logits, targets, rows), logits)

    def floor() -> tuple[Tensor, ...]:
        return (logits.detach().clone(),)

    providers: dict[str, Run] = {"ours": ours, "torch eager": eager, "floor": floor}
    return Case("logits_policy_loss", providers, exact, 10.0 * n * v, 2.0 * dtype.itemsize * n * v)


def log_softmax_case(n: int, v: int, device: str, dtype: torch.dtype) -> Case:
    """Log-probability and entropy of given logits, forward."""
    hidden, weight, targets, _ = _inputs(n, v, 16, device, dtype)
    logits = (hidden @ weight.t()).detach()
    exact = reference.selective_log_softmax(logits.double(), targets)

    def eager() -> tuple[Tensor, ...]:
        return reference.selective_log_softmax(logits.float(), targets)

    providers: dict[str, Run] = {
        "ours": lambda: selective_log_softmax(logits, targets), "torch eager": eager,
        "floor": lambda: (logits.sum(),),
    }  # fmt: skip
    return Case("selective_log_softmax", providers, exact, 6.0 * n * v, 1.0 * dtype.itemsize * n * v)


def advantage_case(groups: int, size: int, device: str) -> Case:
    """Group advantage, beside vectorised torch and a loop per prompt."""
    g = torch.Generator().manual_seed(0)
    rewards = torch.rand(groups * size, generator=g).to(device)
    offsets = torch.arange(0, groups * size + 1, size, device=device)
    exact = (reference.group_advantage(rewards.double().cpu(), offsets.tolist())[0].to(device),)

    def eager() -> tuple[Tensor, ...]:
        r = rewards.view(groups, size)
        return (((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-6)).view(-1),)

    def loop() -> tuple[Tensor, ...]:
        parts = [rewards[i * size : (i + 1) * size] for i in range(groups)]
        return (torch.cat([(r - r.mean()) / (r.std() + 1e-6) for r in parts]),)

    providers: dict[str, Run] = {
        "ours": lambda: (group_advantage(rewards, offsets).advantages,), "torch eager": eager, "loop per prompt": loop,
        "floor": lambda: (rewards.clone(),),
    }  # fmt: skip
    return Case("group_advantage", providers, exact, 8.0 * groups * size, 8.0 * groups * size)


def cases(device: str) -> list[Callable[[], Case]]:
    """The bench's cases: small on the CPU; on CUDA the head of a 3B and of a 7B model in bfloat16."""
    if device == "cpu":
        return [
            lambda: linear_case(512, 8192, 128, device, torch.float32, False),
            lambda: linear_case(512, 8192, 128, device, torch.float32, True),
            lambda: logits_case(512, 8192, device, torch.float32),
            lambda: log_softmax_case(512, 8192, device, torch.float32),
            lambda: advantage_case(1024, 8, device),
        ]
    wide = torch.bfloat16
    return [
        lambda: linear_case(4096, 151_936, 2048, device, wide, False),
        lambda: linear_case(4096, 152_064, 3584, device, wide, False),
        lambda: linear_case(4096, 152_064, 3584, device, wide, True),
        lambda: logits_case(4096, 152_064, device, wide),
        lambda: log_softmax_case(4096, 152_064, device, wide),
        lambda: advantage_case(1024, 8, device),
    ]
