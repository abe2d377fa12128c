"""The inputs of the kernel bench, the loss that a trainer without fused kernels makes of them, and float64 gold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rewardmap_kernels import PolicyObjective, reference

OBJECTIVE = PolicyObjective("dapo", clip_eps_high=0.28)
LENGTH = 512
"""Rows of a response: peers that take [B, L] get them so."""
Tensors = tuple[Tensor, ...]
Run = Callable[[], Tensors]


@dataclass(frozen=True)
class Case:
    """``providers``: "ours" first, then the peers; "floor" is the bare arithmetic and has no result to compare.

    ``flop`` is what each provider executes, ``useful`` what the gradients need. ``own`` is the gold of a provider whose
    result is another than ``exact``. ``missing``: peers that could not be set up, with the reason. ``required``: peers
    without which the row does not count. ``ratios`` are of each provider's "fastest" round, or of its "median" where
    every round is different work.
    """

    name: str
    providers: dict[str, Run]
    exact: Tensors
    useful: float
    bytes: float
    flop: dict[str, float] = field(default_factory=dict)
    own: dict[str, Tensors] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    ratios: str = "fastest"
    about: dict[str, Any] = field(default_factory=dict)


def errors(case: Case, provider: str) -> float:
    """Largest relative Frobenius error of a provider's tensors against float64; of the rows that it worked on."""
    exact = case.own.get(provider, case.exact)
    pairs = [(a, b[: len(a)]) for a, b in zip(case.providers[provider](), exact, strict=True)]
    return relative_error(*zip(*pairs, strict=True))


def relative_error(found: Iterable[Tensor], exact: Iterable[Tensor]) -> float:
    """The largest relative Frobenius error of ``found``'s tensors; NaN where any of them holds one, which ``max`` would
    lose behind a number."""
    each = [
        (a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-300)
        for a, b in zip(found, exact, strict=True)
    ]
    return float(torch.stack(each).max())


@dataclass(frozen=True)
class Problem:
    """hidden [N, H], weight [V, H], targets [N], and ``rows``, policy_loss's inputs. ``scored`` [M]: the rows that
    belong to responses, None for all; the others are prompts."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    rows: dict[str, Any]
    scored: Tensor | None

    @property
    def live(self) -> Tensors:
        """What gradients are taken of."""
        return tuple(t for t in (self.hidden, self.weight) if t.requires_grad)

    def responses(self) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """hidden, targets and rows of the scored positions: a trainer gathers them before its head."""
        if self.scored is None:
            return self.hidden, self.targets, self.rows
        rows = {k: v.index_select(0, self.scored) if v.dim() else v for k, v in self.rows.items() if k != "loss_mask"}
        return self.hidden.index_select(0, self.scored), self.targets.index_select(0, self.scored), rows

    def gradients(self, loss: Tensor) -> Tensors:
        return torch.autograd.grad(loss, self.live)


def chunks(*tensors: Tensor) -> Iterator[Tensors]:
    for first in range(0, len(tensors[0]), 1024):
        yield tuple(t[first : first + 1024] for t in tensors)


def problem(
    n: int, v: int, h: int, device: str, dtype: torch.dtype, *, frozen: bool = False, response: float = 1.0,
    zero: float = 0.0,
) -> Problem:  # fmt: skip
    """Random hidden states whose targets are likely, as a trained policy's are, log-ratios of about 0.1, and one
    advantage per response of LENGTH rows. Of the blocks of LENGTH rows, ``response`` are responses, the others prompts;
    of the responses, ``zero`` have advantage 0."""
    g = torch.Generator(device).manual_seed(0)
    weight = torch.randn(v, h, generator=g, device=device) / h**0.5
    targets = torch.randint(0, v, (n,), generator=g, device=device)
    hidden = torch.randn(n, h, generator=g, device=device) + 6.0 * weight[targets]
    current = torch.cat([reference.linear_logprobs(x, weight, y)[0] for x, y in chunks(hidden, targets)])
    blocks = -(-n // LENGTH)
    is_response, is_zero = _share(blocks, response), torch.zeros(blocks, dtype=torch.bool)
    is_zero[is_response] = _share(int(is_response.sum()), zero)
    per_block = torch.randn(blocks, generator=g, device=device).masked_fill(is_zero.to(device), 0.0)
    mask = is_response.repeat_interleave(LENGTH)[:n].to(device)
    rows: dict[str, Any] = {
        "advantages": per_block.repeat_interleave(LENGTH)[:n],
        "old_logprobs": current + 0.1 * torch.randn(n, generator=g, device=device),
        "normalizer": mask.sum().float(),
    }
    if response < 1:
        rows["loss_mask"] = mask
    return Problem(
        hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(not frozen), targets, rows,
        mask.nonzero()[:, 0] if response < 1 else None,
    )  # fmt: skip


def _share(count: int, fraction: float) -> Tensor:
    """bool [count]: evenly spread, the given fraction true."""
    steps = (torch.arange(count + 1, dtype=torch.float64) * fraction + 1e-9).floor()
    return steps[1:] > steps[:-1]


def eager_loss(logits: Tensor, targets: Tensor, rows: dict[str, Any]) -> Tensor:
    """What a trainer without fused kernels does."""
    logprobs = torch.log_softmax(logits.float(), -1).gather(1, targets[:, None])[:, 0]
    ratio = (logprobs - rows["old_logprobs"]).exp()
    adv = rows["advantages"]
    low, high = 1 - OBJECTIVE.clip_eps_low, 1 + OBJECTIVE.clip_eps_high
    return (-torch.minimum(ratio * adv, ratio.clamp(low, high) * adv)).sum() / rows["normalizer"]


def exact_gradients(of: Problem, loss: Callable[[Tensor, dict[str, Any]], Tensor] | None = None) -> Tensors:
    """Gradients of hidden and weight in float64, a thousand rows at a time; ``loss`` of log-probabilities and rows."""
    w = of.weight.detach().double().requires_grad_()
    d_hidden, d_weight, first = [], torch.zeros_like(w), 0
    for x, y in chunks(of.hidden.detach(), of.targets):
        x = x.double().requires_grad_()
        part = {k: v[first : first + len(x)] if v.dim() else v for k, v in of.rows.items()}
        part = {k: v.double() if v.is_floating_point() else v for k, v in part.items()}
        logprobs = reference.linear_logprobs(x, w, y)[0]
        if loss is None:
            made = reference.policy_row_loss(logprobs, objective=OBJECTIVE, **part).sum()
        else:
            made = loss(logprobs, part)
        dx, dw = torch.autograd.grad(made, (x, w))
        d_hidden.append(dx)
        d_weight += dw
        first += len(x)
    return (torch.cat(d_hidden), d_weight) if of.weight.requires_grad else (torch.cat(d_hidden),)
