"""What the kernel bench runs: each operation beside its peers, with its declared arithmetic and traffic.

A provider is a call that leaves a loss's gradients (or an operation's outputs) behind. ``errors`` of a case
compares every provider's gradients with float64 of the definition on the same inputs: no time without it.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import routes
import torch
from kernel_peers import (
    LIGER,
    LIGER_WHOLE,
    QUACK,
    HeadLoss,
    Rows,
    from_logprobs,
    head_losses,
    logits_peers,
    with_tf32,
)
from kernel_problem import LENGTH, OBJECTIVE, Case, Run, Tensors, eager_loss, exact_gradients, problem
from records import why
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rewardmap_kernels import (
    contributing_rows,
    group_advantage,
    linear_logprobs,
    linear_policy_loss,
    logits_policy_loss,
    reference,
    selective_log_softmax,
)
from rewardmap_kernels.dispatch import choose
from rewardmap_kernels.tree_attention import tree_attention, tree_mask

HEAD_PEERS = ("torch.compile", "TRL head", LIGER)
AGAIN = {"TRL head": 1, LIGER: 1, LIGER_WHOLE: 1, "Liger SM90 head": 1}
"""Products that a provider spends on making the logits a second time."""
HEADS = {"3b": (151_936, 2048), "7b": (152_064, 3584)}
ROW_KERNELS = ("EXPONENTIALS", "GRADIENT", "STATISTICS", "POLICY_ROW")
CONFIGS = ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (4096, 16), (8192, 16), (8192, 32))
"""(values of a row that a program holds, warps) that "tune" tries."""


def _eager(hidden: Tensor, weight: Tensor, targets: Tensor, rows: Rows) -> Tensor:
    return eager_loss(hidden @ weight.t(), targets, rows)


def _own_loss(hidden: Tensor, weight: Tensor, targets: Tensor, rows: Rows) -> Tensor:
    return from_logprobs(linear_logprobs(hidden, weight, targets, entropy_gradient=False)[0], rows)


def linear_case(
    n: int, v: int, h: int, device: str, dtype: torch.dtype, *, frozen: bool = False, response: float = 1.0,
    zero: float = 0.0,
) -> Case:  # fmt: skip
    """The head with its policy loss, forward and backward. In the sweeps ours is told which rows contribute, and making
    that index and sending it to the GPU is on the clock; peers gather the responses before their heads, as trainers
    do."""
    of = problem(n, v, h, device, dtype, frozen=frozen, response=response, zero=zero)
    weight, advantages = of.weight, of.rows["advantages"].cpu()
    mask = of.rows["loss_mask"].cpu() if "loss_mask" in of.rows else None
    count = len(contributing_rows(OBJECTIVE, advantages, mask))
    scored = n if of.scored is None else len(of.scored)

    def ours() -> Tensors:
        some: dict[str, Any] = {}
        if response < 1 or zero > 0:
            index = contributing_rows(OBJECTIVE, advantages, mask)
            some["rows"] = (index.pin_memory() if device == "cuda" else index).to(device, non_blocking=True)
        return of.gradients(
            linear_policy_loss(of.hidden, weight, of.targets, objective=OBJECTIVE, **of.rows, **some).loss
        )

    def floor() -> Tensors:
        with torch.no_grad():
            x = of.hidden[:count]
            logits = x @ weight.t()
            return (logits @ weight,) if frozen else (logits @ weight, logits.t() @ x)

    def gathered(loss: HeadLoss) -> Run:
        def run() -> Tensors:
            hidden, targets, rows = of.responses()
            return of.gradients(loss(hidden, weight, targets, rows))

        return run

    losses, missing = head_losses(device, lambda rows: rows // LENGTH)
    own = {}
    if QUACK in losses and not frozen and of.scored is None:
        own[QUACK] = exact_gradients(of, lambda logprobs, rows: -logprobs.sum())
    else:
        losses.pop(QUACK, None)  # it has no rows to leave out and no frozen head
    peers = {name: gathered(loss) for name, loss in losses.items()}
    if device == "cuda":
        wide = [name for name in ("TRL head", LIGER, LIGER_WHOLE) if name in peers]
        peers |= {f"{name}, TF32": with_tf32(peers[name]) for name in wide}
    providers = {"ours": ours, "linear_logprobs": gathered(_own_loss), "torch eager": gathered(_eager), "floor": floor}
    product, products, size = 2.0 * v * h, 2 if frozen else 3, dtype.itemsize
    flop = {
        name: count * products * product if name in ("ours", "floor")
        else scored * (products + AGAIN.get(name.removesuffix(", TF32"), 0)) * product
        for name in (*providers, *peers)
    }  # fmt: skip
    return Case(
        f"linear_policy_loss{'.frozen' if frozen else ''}", providers | peers, exact_gradients(of),
        count * products * product, products * size * (count * v + v * h + count * h), flop, own, missing,
        HEAD_PEERS if device == "cuda" else (),
        about={"rows": n, "scored_rows": scored, "contributing_rows": count, "vocabulary": v, "hidden": h},
    )  # fmt: skip


def varying_case(n: int, v: int, h: int, device: str, dtype: torch.dtype) -> Case:
    """The head with responses of another length at every call: what compiles anew for a length shows. Median times."""
    of = problem(n, v, h, device, dtype)
    of.rows["advantages"] = torch.ones_like(of.rows["advantages"])
    responses = n // LENGTH

    def lengths(loss: HeadLoss) -> Run:
        shorter = itertools.count(1)

        def run() -> Tensors:
            m = responses * (LENGTH - next(shorter))
            hidden = of.hidden[:m].detach().requires_grad_()
            part = {k: t[:m] if t.dim() else t for k, t in of.rows.items()}
            return torch.autograd.grad(loss(hidden, of.weight, of.targets[:m], part), (hidden, of.weight))[:1]

        return run

    losses, missing = head_losses(device, lambda rows: responses)
    losses.pop(QUACK, None)
    losses = {
        "ours": lambda x, w, y, rows: linear_policy_loss(x, w, y, objective=OBJECTIVE, **rows).loss,
        "torch eager": _eager, **losses,
    }  # fmt: skip
    return Case(
        "linear_policy_loss", {name: lengths(loss) for name, loss in losses.items()}, exact_gradients(of)[:1],
        6.0 * n * v * h, 0.0, missing=missing, required=HEAD_PEERS if device == "cuda" else (), ratios="median",
        about={"rows": f"{n} and fewer, other at every call", "vocabulary": v, "hidden": h},
    )  # fmt: skip


def chunks_case(n: int, v: int, h: int, device: str, dtype: torch.dtype) -> Case:
    """The head by chunks of so many rows."""
    of = problem(n, v, h, device, dtype)

    def by(rows: int | None) -> Run:
        return lambda: of.gradients(
            linear_policy_loss(
                of.hidden, of.weight, of.targets, objective=OBJECTIVE, chunk_rows=rows, **of.rows
            ).loss
        )

    sizes = {f"{rows} rows": by(rows) for rows in (n // 8, n // 4, n // 2, n)}
    eager = {"torch eager": lambda: of.gradients(_eager(of.hidden, of.weight, of.targets, of.rows))}
    return Case(
        "linear_policy_loss", {"ours": by(None)} | sizes | eager, exact_gradients(of), 6.0 * n * v * h, 0.0,
        about={"rows": n, "vocabulary": v, "hidden": h},
    )  # fmt: skip


def logits_case(n: int, v: int, device: str, dtype: torch.dtype) -> Case:
    """Policy loss from logits that are there, gradient included: one read and one write."""
    of = problem(n, v, 16, device, dtype)
    targets, rows = of.targets, of.rows
    logits = (of.hidden @ of.weight.t()).detach().requires_grad_()
    z = logits.detach().double().requires_grad_()
    wide = {k: t.double() for k, t in rows.items()}
    logprobs = reference.selective_log_softmax(z, targets)[0]
    exact = torch.autograd.grad(reference.policy_row_loss(logprobs, objective=OBJECTIVE, **wide).sum(), z)
    providers: dict[str, Run] = {
        "ours": lambda: torch.autograd.grad(
            logits_policy_loss(logits, targets, objective=OBJECTIVE, **rows).loss, logits
        ),
        "torch eager": lambda: torch.autograd.grad(eager_loss(logits, targets, rows), logits),
        "floor": lambda: (logits.detach().clone(),),
    }
    peers, missing = logits_peers(logits, targets, rows) if device == "cuda" else ({}, {})
    own = {"Liger GRPO": tuple(exact[0].view(-1, LENGTH, v))} if "Liger GRPO" in peers else {}
    return Case(
        "logits_policy_loss", providers | peers, exact, 10.0 * n * v, 2.0 * dtype.itemsize * n * v, own=own,
        missing=missing, required=("torch.compile", "Liger GRPO") if device == "cuda" else (),
        about={"rows": n, "vocabulary": v},
    )  # fmt: skip


def log_softmax_case(n: int, v: int, device: str, dtype: torch.dtype) -> Case:
    """Log-probability and entropy of given logits, forward."""
    of = problem(n, v, 16, device, dtype)
    logits, targets = (of.hidden @ of.weight.t()).detach(), of.targets

    def eager() -> Tensors:
        return reference.selective_log_softmax(logits.float(), targets)

    providers: dict[str, Run] = {
        "ours": lambda: selective_log_softmax(logits, targets), "torch eager": eager, "floor": lambda: (logits.sum(),),
    }  # fmt: skip
    missing: dict[str, str] = {}
    if device == "cuda":
        compiled = torch.compile(lambda z, y: reference.selective_log_softmax(z.float(), y))
        providers["torch.compile"] = lambda: compiled(logits, targets)
        try:
            pair = importlib.import_module("trl.kernels").selective_log_softmax_and_entropy
            providers["TRL log-softmax"] = lambda: pair(logits, targets)
        except Exception as reason:
            missing["TRL log-softmax"] = why(reason)
    return Case(
        "selective_log_softmax", providers, reference.selective_log_softmax(logits.double(), targets), 6.0 * n * v,
        1.0 * dtype.itemsize * n * v, missing=missing,
        required=("torch.compile", "TRL log-softmax") if device == "cuda" else (), about={"rows": n, "vocabulary": v},
    )  # fmt: skip


def advantage_case(groups: int, size: int, device: str) -> Case:
    """Group advantage, beside vectorised torch and a loop per prompt."""
    g = torch.Generator().manual_seed(0)
    rewards = torch.rand(groups * size, generator=g).to(device)
    offsets = torch.arange(0, groups * size + 1, size, device=device)
    exact = (reference.group_advantage(rewards.double().cpu(), offsets.tolist())[0].to(device),)

    def eager() -> Tensors:
        r = rewards.view(groups, size)
        return (((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-6)).view(-1),)

    def loop() -> Tensors:
        parts = [rewards[i * size : (i + 1) * size] for i in range(groups)]
        return (torch.cat([(r - r.mean()) / (r.std() + 1e-6) for r in parts]),)

    providers: dict[str, Run] = {
        "ours": lambda: (group_advantage(rewards, offsets).advantages,), "torch eager": eager, "loop per prompt": loop,
        "floor": lambda: (rewards.clone(),),
    }  # fmt: skip
    return Case(
        "group_advantage", providers, exact, 8.0 * groups * size, 8.0 * groups * size,
        about={"groups": groups, "size": size},
    )  # fmt: skip


def attention_case(case: routes.Case, device: str, dtype: torch.dtype) -> Case:
    """Attention of a prompt with answers, forward and backward; beside it causal attention of every answer with a
    prompt of its own, which is compared by the last answer's output."""
    inputs = routes.inputs(case, device, dtype)
    ends, (prompt, answer), (count,) = case.ends, case.sizes, case.children
    group = case.heads[0] // case.heads[1]
    at = torch.arange(len(ends))
    hidden = ((at[:, None] < at) | (at[:, None] >= ends)).to(device)
    own = prompt + torch.arange(count * answer).view(count, answer)
    alone = torch.cat([torch.arange(prompt).expand(count, -1), own], 1).to(device)
    wide = [x[0][:, alone].transpose(0, 1).contiguous() for x in inputs]

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        return (q @ k.mT * case.head_dim**-0.5).masked_fill(hidden, float("-inf")).softmax(-1) @ v

    def both(attention: Callable[..., Tensor], tensors: Sequence[Tensor]) -> Tensors:
        leaves = [x.detach().requires_grad_() for x in tensors[:3]]
        out = attention(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, tensors[3])

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return tree_attention(q, k, v, tree_mask(ends, q.device))

    causal = partial(scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    unshared = "unshared causal SDPA"
    q, k, v, dout = (x.double() for x in inputs)
    parts = [
        routes.definition(case, q[:, i * group : (i + 1) * group], k[:, [i]], v[:, [i]],
                          dout[:, i * group : (i + 1) * group])
        for i in range(case.heads[1])
    ]  # fmt: skip
    exact = tuple(torch.cat(each, 1) for each in zip(*parts, strict=True))
    return Case(
        "tree_attention",
        {
            "ours": lambda: both(ours, inputs), "torch eager": lambda: both(eager, inputs),
            unshared: lambda: (both(causal, wide)[0][-1:, :, prompt:],),
        },
        exact, routes.useful_flop(case), 0.0, own={unshared: (exact[0][:, :, -answer:],)},
        about={"prompt": prompt, "answer": answer, "answers": count, "heads": case.heads, "head_dim": case.head_dim},
    )  # fmt: skip


def tune_case(kernel: str, n: int, v: int, device: str, dtype: torch.dtype) -> Case:
    """One row kernel by blocks and warps; "ours" is what is launched otherwise, and what the results are held to."""
    from rewardmap_kernels import triton_launch

    of = problem(n, v, 16, device, dtype)
    narrow = (of.hidden @ of.weight.t()).detach()
    wide = narrow.float()
    choose("tune", wide)  # launches are noted under an operation that has been chosen
    found = triton_launch.statistics("tune", wide, of.targets, 1.0, None)
    one = torch.ones(n, device=device)
    inputs = {
        **of.rows, "objective": OBJECTIVE, "ref_logprobs": None, "rollout_logprobs": None, "sequence": None,
        "num_sequences": n,
    }  # fmt: skip
    calls: dict[str, Run] = {
        "STATISTICS": lambda: triton_launch.statistics("tune", wide, of.targets, 1.0, None),
        "EXPONENTIALS": lambda: triton_launch.exponentials(
            "tune", wide, of.targets, 1.0, None, dtype, narrow
        )[0],
        "GRADIENT": lambda: (
            triton_launch.gradient(
                "tune", wide, of.targets, 1.0, found, one, 0 * one, None, dtype, in_place=False
            ),
        ),
        "POLICY_ROW": lambda: triton_launch.fused(  # of a model's own logits, whose rows are half as long in memory
            "tune", narrow, of.targets, 1.0, None, inputs, None, in_place=False
        )[:2],
    }

    def by(config: tuple[int, int]) -> Run:
        def run() -> Tensors:
            before = getattr(triton_launch, kernel)
            setattr(triton_launch, kernel, config)
            try:
                return calls[kernel]()
            finally:
                setattr(triton_launch, kernel, before)

        return run

    size = dtype.itemsize
    moved = {"STATISTICS": 4, "EXPONENTIALS": 4 + size, "GRADIENT": 4 + size, "POLICY_ROW": 2 * size}
    exact = tuple(t.double() for t in calls[kernel]())
    configs = {f"{block} x {warps}": by((block, warps)) for block, warps in CONFIGS}
    return Case(
        "tune", {"ours": calls[kernel]} | configs, exact, 0.0, 1.0 * moved[kernel] * n * v,
        about={"kernel": kernel, "rows": n, "vocabulary": v},
    )  # fmt: skip


def launched() -> dict[str, list[int]]:
    """[values of a row that a program holds, warps] of each row kernel."""
    from rewardmap_kernels import triton_launch

    return {kernel: list(getattr(triton_launch, kernel)) for kernel in ROW_KERNELS}


def cases(device: str) -> dict[str, Callable[[], Case]]:
    """The bench's cases by name, the most telling first: small on the CPU; on CUDA the heads of a 3B and of a 7B model
    in bfloat16."""
    if device == "cpu":
        small = (512, 8192, 128, device, torch.float32)
        return {
            "linear": partial(linear_case, *small),
            "linear.frozen": partial(linear_case, *small, frozen=True),
            "linear.response-50": partial(linear_case, 1024, 4096, 64, device, torch.float32, response=0.5),
            "linear.zero-50": partial(linear_case, 1024, 4096, 64, device, torch.float32, zero=0.5),
            "logits": partial(logits_case, 512, 8192, device, torch.float32),
            "log_softmax": partial(log_softmax_case, 512, 8192, device, torch.float32),
            "advantage": partial(advantage_case, 1024, 8, device),
            "attention": partial(
                attention_case, routes.Case((480, 40), (8,), heads=(4, 2), head_dim=64), device, torch.float32
            ),
        }
    wide, (v, h) = torch.bfloat16, HEADS["7b"]
    found: dict[str, Callable[[], Case]] = {"advantage": partial(advantage_case, 1024, 8, device)}
    for size in ("7b", "3b"):
        found[f"linear.{size}.8192"] = partial(linear_case, 8192, *HEADS[size], device, wide)
        found[f"linear.{size}.8192.frozen"] = partial(linear_case, 8192, *HEADS[size], device, wide, frozen=True)
    for n in (8192, 4096):
        found[f"logits.7b.{n}"] = partial(logits_case, n, v, device, wide)
    found["log_softmax.7b.8192"] = partial(log_softmax_case, 8192, v, device, wide)
    for percent in (50, 25):
        found[f"linear.7b.16384.response-{percent}"] = partial(
            linear_case, 16_384, v, h, device, wide, response=percent / 100
        )
    for percent in (30, 60):
        found[f"linear.7b.8192.zero-{percent}"] = partial(linear_case, 8192, v, h, device, wide, zero=percent / 100)
    found["linear.7b.8192.varying"] = partial(varying_case, 8192, v, h, device, wide)
    for n in (4096, 32_768):
        for size in ("7b", "3b"):
            found[f"linear.{size}.{n}"] = partial(linear_case, n, *HEADS[size], device, wide)
    found["attention.3b"] = partial(attention_case, routes.CASES["cuda"]["answers.3b.6000"], device, wide)
    found["chunks.7b.8192"] = partial(chunks_case, 8192, v, h, device, wide)
    for kernel in ROW_KERNELS:
        found[f"tune.{kernel.lower()}"] = partial(tune_case, kernel, 4096, v, device, wide)
    return found
