"""Other people's heads and losses for the kernel bench, each at its documented setting. None of them is needed: one
that is not installed, or fails to be set up, is named with its reason."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from kernel_problem import LENGTH, OBJECTIVE, Run, Tensors, eager_loss
from records import why
from torch import Tensor

from rewardmap_kernels import policy_loss

Rows = dict[str, Any]
HeadLoss = Callable[[Tensor, Tensor, Tensor, Rows], Tensor]
"""hidden [N, H], weight [V, H], targets [N], policy_loss's rows -> loss."""


def from_logprobs(logprobs: Tensor, rows: Rows) -> Tensor:
    """The loss that a trainer makes of log-probabilities."""
    return policy_loss(logprobs, objective=OBJECTIVE, **rows).row_loss.sum()


def with_tf32(run: Run) -> Run:
    """The whole call, backward included, with float32 products rounded to TF32, as some containers set it."""

    def rounded() -> Tensors:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return run()
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    return rounded


def _trl() -> HeadLoss:
    head = importlib.import_module("trl.kernels").ChunkedLogProbFunction

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor, rows: Rows) -> Tensor:
        return from_logprobs(head.apply(hidden, weight, None, targets, 1.0, 32768, None, 1.0, ())[0], rows)

    return loss


def _liger(cuda: bool, responses: Callable[[int], int], chunk_size: int = 1) -> HeadLoss:
    """``chunk_size``: responses; 1 is Liger's default."""
    chunked = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, loss_type="dapo", epsilon_low=OBJECTIVE.clip_eps_low,
        epsilon_high=OBJECTIVE.clip_eps_high, compiled=cuda, chunk_size=chunk_size,
    )  # fmt: skip

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor, rows: Rows) -> Tensor:
        shape = (responses(len(hidden)), len(hidden) // responses(len(hidden)))
        out = chunked(
            hidden.view(*shape, -1), weight, targets.view(shape), torch.ones(shape, device=hidden.device),
            rows["advantages"].view(shape)[:, 0].contiguous(), old_per_token_logps=rows["old_logprobs"].view(shape),
        )  # fmt: skip
        made: Tensor = out[0]
        return made

    return loss


def _hopper() -> HeadLoss:
    module = importlib.import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    head = module.LigerFusedLinearScaledCrossEntropyFunction
    return lambda hidden, weight, targets, rows: from_logprobs(-head.apply(hidden, weight, targets, 1.0), rows)


def _quack() -> HeadLoss:
    head = importlib.import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
    return lambda hidden, weight, targets, rows: head(hidden, weight, targets, reduction="sum")


def _compiled() -> HeadLoss:
    compiled = torch.compile(eager_loss)
    return lambda hidden, weight, targets, rows: compiled(hidden @ weight.t(), targets, rows)


LIGER = "Liger chunked GRPO"
LIGER_WHOLE = f"{LIGER}, one chunk"
"""Its chunks cut their logits once more by themselves, and each fills and adds up a float32 gradient of the head:
beside the default, the setting with the fewest of these."""
QUACK = "QuACK cross-entropy"
"""No policy term: its loss is the sum of -logprob, and its error is against that."""


def head_losses(device: str, responses: Callable[[int], int]) -> tuple[dict[str, HeadLoss], dict[str, str]]:
    """Peers of linear_policy_loss by name, and why the others are not there. ``responses``: number of rows -> number of
    responses, for the one that takes [B, L]."""
    cuda = device == "cuda"
    builders: dict[str, Callable[[], HeadLoss]] = {
        "TRL head": _trl,
        LIGER: lambda: _liger(cuda, responses),
        LIGER_WHOLE: lambda: _liger(cuda, responses, 1 << 20),
    }
    if cuda:
        builders |= {"torch.compile": _compiled, "Liger SM90 head": _hopper, QUACK: _quack}
    found: dict[str, HeadLoss] = {}
    missing: dict[str, str] = {}
    for name, build in builders.items():
        try:
            found[name] = build()
        except Exception as reason:
            missing[name] = why(reason)
    return found, missing


def logits_peers(logits: Tensor, targets: Tensor, rows: Rows) -> tuple[dict[str, Run], dict[str, str]]:
    """Peers of logits_policy_loss, on a GPU."""
    n, v = logits.shape
    shape = (n // LENGTH, LENGTH)

    def compiled() -> Run:
        loss = torch.compile(eager_loss)
        return lambda: torch.autograd.grad(loss(logits, targets, rows), logits)

    def liger() -> Run:
        loss_of = importlib.import_module("liger_kernel.transformers.grpo_loss").triton_grpo_loss
        # It wants a row more per response and drops it; the copy is made outside the clock.
        padded = torch.zeros(shape[0], LENGTH + 1, v, dtype=logits.dtype, device=logits.device)
        padded[:, :-1] = logits.detach().view(*shape, v)
        padded.requires_grad_()
        advantages = rows["advantages"].view(shape)[:, 0].contiguous()

        def run() -> Tensors:
            loss, _ = loss_of(
                padded, rows["old_logprobs"].view(shape), None, targets.view(shape), advantages, temperature=1.0,
                beta=0.0, eps_low=OBJECTIVE.clip_eps_low, eps_high=OBJECTIVE.clip_eps_high, inplace=False, reduce=True,
            )  # fmt: skip
            (gradient,) = torch.autograd.grad(loss, padded)
            return tuple(part[:-1] for part in gradient)  # views, one per response: no copy on the clock

        return run

    def trl() -> Run:
        pair = importlib.import_module("trl.kernels").selective_log_softmax_and_entropy
        return lambda: torch.autograd.grad(from_logprobs(pair(logits, targets)[0], rows), logits)

    found: dict[str, Run] = {}
    missing: dict[str, str] = {}
    for name, build in {"torch.compile": compiled, "Liger GRPO": liger, "TRL log-softmax": trl}.items():
        try:
            found[name] = build()
        except Exception as reason:
            missing[name] = why(reason)
    return found, missing
