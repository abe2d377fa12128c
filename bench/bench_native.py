"""The C++ kernels on a CPU beside torch eager and torch.compile, in one run of a few minutes.

``python bench/bench_native.py`` measures on two threads, providers taking turns, prints a line per case and writes
``bench/results/native-<device>-<instructions>.json``: seconds (medians), the ratio to torch eager, the error beside it,
for the head the memory that a step adds at its peak (at N = 4,096, each provider in a process of its own), and
"products", the three bare ``torch.mm`` of the head into memory that is there. Where torch has no vector instructions
for bfloat16 products, only the narrowest head is measured in it: the others take eager minutes a call.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parent))
import kernel_problem
import kernel_run
from records import RESULTS, commit, processor, slug

from rewardmap_kernels import linear_policy_loss, logits_policy_loss, native, use_implementation
from rewardmap_kernels.dispatch import Implementation

VOCAB, THREADS, ROUNDS = 32768, 2, 5
ROWS, HEAD_ROWS, PEAK_ROWS = 256, 1024, 4096
HEADS = (64, 256, 1024)
Run = Callable[[], tuple[Tensor, ...]]


def by(implementation: Implementation, run: Run) -> Run:
    def forced() -> tuple[Tensor, ...]:
        with use_implementation(implementation):
            return run()

    return forced


class _Made(torch.autograd.Function):
    """Logits that were made from ``source`` and may be written over, in memory that holds them already."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, memory: Tensor) -> Tensor:
        return memory.view_as(memory)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def row_providers(dtype: torch.dtype) -> tuple[dict[str, Run], dict[str, Callable[[], Any]]]:
    """The loss of given logits and its gradient; and what is done before each call: "in place" writes over logits that
    are put there first, as a product would."""
    of = kernel_problem.problem(ROWS, VOCAB, 16, "cpu", dtype)
    hidden, weight, targets, rows = of.hidden, of.weight, of.targets, of.rows
    logits = (hidden @ weight.t()).detach().requires_grad_()
    memory = torch.empty_like(logits)
    compiled = torch.compile(kernel_problem.eager_loss)

    def ours(inplace: bool) -> tuple[Tensor, ...]:
        given = _Made.apply(logits, memory) if inplace else logits
        loss = logits_policy_loss(given, targets, objective=kernel_problem.OBJECTIVE, inplace=inplace, **rows).loss
        return torch.autograd.grad(loss, logits)

    providers = {
        "torch eager": lambda: torch.autograd.grad(kernel_problem.eager_loss(logits, targets, rows), logits),
        "torch.compile": lambda: torch.autograd.grad(compiled(logits, targets, rows), logits),
        "plain torch": by("torch", lambda: ours(False)),
        "C++": by("native", lambda: ours(False)),
        "C++ in place": by("native", lambda: ours(True)),
    }
    return providers, {"C++ in place": lambda: memory.copy_(logits.detach())}


def head_providers(dtype: torch.dtype, width: int, n: int = HEAD_ROWS) -> dict[str, Run]:
    """The loss of hidden states through a trainable head, and both gradients."""
    of = kernel_problem.problem(n, VOCAB, width, "cpu", dtype)
    hidden, weight, targets, rows = of.hidden, of.weight, of.targets, of.rows

    def eager(loss: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(hidden @ weight.t(), targets, rows), (hidden, weight))

    def ours() -> tuple[Tensor, ...]:
        out = linear_policy_loss(hidden, weight, targets, objective=kernel_problem.OBJECTIVE, **rows)
        return torch.autograd.grad(out.loss, (hidden, weight))

    compiled = torch.compile(kernel_problem.eager_loss)
    x, w = hidden.detach(), weight.detach()
    logits, d_x, d_w = torch.empty(n, VOCAB, dtype=dtype), torch.empty_like(x), torch.empty_like(w)

    def products() -> tuple[Tensor, ...]:
        torch.mm(x, w.t(), out=logits)
        return torch.mm(logits, w, out=d_x), torch.mm(logits.t(), x, out=d_w)

    return {
        "torch eager": lambda: eager(kernel_problem.eager_loss),
        "torch.compile": lambda: eager(compiled),
        "C++": by("native", ours),
        "products": products,
    }


def exact_gradients(dtype: torch.dtype, width: int | None) -> tuple[Tensor, ...]:
    """In float64, from the same narrow values."""
    of = kernel_problem.problem(ROWS if width is None else HEAD_ROWS, VOCAB, width or 16, "cpu", dtype)
    hidden, weight, targets, rows = of.hidden, of.weight, of.targets, of.rows
    if width is None:
        inputs: tuple[Tensor, ...] = ((hidden @ weight.t()).detach().double().requires_grad_(),)
        logits = inputs[0]
    else:
        inputs = (hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_())
        logits = inputs[0] @ inputs[1].t()
    wide = {name: value.double() for name, value in rows.items()}
    logprobs = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
    ratio, adv = (logprobs - wide["old_logprobs"]).exp(), wide["advantages"]
    bounds = (1 - kernel_problem.OBJECTIVE.clip_eps_low, 1 + kernel_problem.OBJECTIVE.clip_eps_high)
    loss = -torch.minimum(ratio * adv, ratio.clamp(*bounds) * adv).sum() / wide["normalizer"]
    return torch.autograd.grad(loss, inputs)


def peak(provider: str, dtype: str, width: int) -> int:
    """Bytes that one call of the provider adds to this process's largest resident size."""
    run = head_providers(getattr(torch, dtype), width, PEAK_ROWS)[provider]
    # What the inputs' own making used must not hide the call: its high-water mark is forgotten.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident()
    run()
    return resident("VmHWM") - before


def resident(field: str = "VmRSS") -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(
    name: str, providers: dict[str, Run], exact: tuple[Tensor, ...], before: dict[str, Callable[[], Any]] | None = None
) -> dict[str, Any]:
    error = {}
    for provider, run in providers.items():
        if before and provider in before:
            before[provider]()
        if provider != "products":  # which have no result to compare
            error[provider] = kernel_problem.relative_error(run(), exact)
    times = kernel_run.take_turns(providers, "cpu", ROUNDS, before)
    seconds = {provider: statistics.median(each) for provider, each in times.items()}
    faster = {provider: seconds["torch eager"] / each for provider, each in seconds.items()}
    print(name, ", ".join(f"{p} {1e3 * s:.0f} ms ({faster[p]:.2f} x)" for p, s in seconds.items()), flush=True)
    return {"seconds": seconds, "times_faster_than_eager": faster, "relative_error": error}


def main() -> None:
    if sys.argv[1:2] == ["--peak"]:
        torch.set_num_threads(THREADS)
        print(peak(sys.argv[2], sys.argv[3], int(sys.argv[4])))
        return
    reason = native.unavailable_reason()
    if reason is not None:
        sys.exit(f"the C++ kernels are not there: {reason}")
    torch.set_num_threads(THREADS)
    device = processor()
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        label = str(dtype).removeprefix("torch.")
        name = f"rows N{ROWS} V{VOCAB} {label}"
        providers, before = row_providers(dtype)
        found[name] = measure(name, providers, exact_gradients(dtype, None), before)
        slow = dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
        for width in HEADS[:1] if slow else HEADS:
            name = f"head N{HEAD_ROWS} V{VOCAB} H{width} {label}"
            found[name] = measure(name, head_providers(dtype, width), exact_gradients(dtype, width))
            added = {}
            for provider in ("torch eager", "C++"):
                command = [sys.executable, __file__, "--peak", provider, label, str(width)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                added[provider] = int(done.stdout.split()[-1])
            found[name]["peak"] = {"rows": PEAK_ROWS, "bytes_added": added}
            print(f"peak at N{PEAK_ROWS}", {p: f"{b / 2**20:.0f} MiB" for p, b in added.items()}, flush=True)
    about = {
        "device": device, "threads": THREADS, "torch": torch.__version__, "rounds": ROUNDS,
        "instructions": native.capability(),
        "own_products": [torch.ops.rewardmap.products(bfloat16) for bfloat16 in (False, True)],
        "compiler": native.compiler_version("cpu"), "commit": commit(),
    }  # fmt: skip
    path = RESULTS / f"native-{slug(device)}-{native.capability()}.json"
    path.write_text(json.dumps({**about, "rows": found}, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
