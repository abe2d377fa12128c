"""The Hopper kernel of logits_policy_loss beside the Triton one and a copy, on one GPU, one launch each: a JSON line.

``python bench/hopper.py VOCAB``: medians of CUDA events, providers taking turns; the share of the bandwidth that a copy
of as many bytes reaches (4NV: one read and one write); the error beside it.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rewardmap_kernels import PolicyObjective, last_path, native, native_cuda, triton_launch
from rewardmap_kernels.dispatch import choose

ROWS, ROUNDS = 4096, 30


def measure(vocab: int) -> dict[str, Any]:
    reason = native.unavailable_reason("cuda")
    if reason is not None:
        return {"ok": False, "reason": reason}
    g = torch.Generator("cuda").manual_seed(0)
    given = torch.empty(ROWS, vocab, dtype=torch.bfloat16, device="cuda").normal_(0, 3, generator=g)
    logits, copy = given.clone(), torch.empty_like(given)
    targets = torch.randint(0, vocab, (ROWS,), generator=g, device="cuda")
    inputs: dict[str, Any] = {
        "advantages": torch.randn(ROWS, generator=g, device="cuda"),
        "normalizer": torch.tensor(float(ROWS), device="cuda"),
        "old_logprobs": torch.full((ROWS,), -8.0, device="cuda"), "ref_logprobs": None, "rollout_logprobs": None,
        "objective": PolicyObjective("dapo"),
    }  # fmt: skip
    operation = "logits_policy_loss"
    choose(operation, logits)

    def ours(hopper: bool) -> Callable[[], Any]:
        def run() -> Any:
            with native_cuda.experimental_hopper(hopper):
                return triton_launch.fused(operation, logits, targets, 1.0, None, inputs, None, True)

        return run

    providers = {"hopper": ours(True), "triton": ours(False), "copy": lambda: copy.copy_(given)}
    made: dict[str, Tensor] = {}
    milliseconds: dict[str, list[float]] = {name: [] for name in providers}
    for round_ in range(ROUNDS + 1):
        for name, run in providers.items():
            logits.copy_(given)
            torch.cuda._sleep(2_000_000)  # a millisecond in which the host gets ahead: launches are not on the clock
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            if round_:
                milliseconds[name].append(start.elapsed_time(end))
            elif name != "copy":
                made[name] = logits.clone()
    kernels = last_path(operation)
    if kernels is None or set(kernels[1]) != {"hopper", "policy_row_kernel"}:
        return {"ok": False, "reason": f"what ran was {kernels}"}
    median = {name: statistics.median(each) for name, each in milliseconds.items()}
    gap = (made["hopper"].float() - made["triton"].float()).norm() / made["triton"].float().norm()
    return {
        "ok": bool(gap < 2**-8), "rows": ROWS, "vocab": vocab, "cluster": native_cuda.cluster_size(vocab),
        "milliseconds": median, "share_of_copy": {name: median["copy"] / each for name, each in median.items()},
        "relative_gap_to_triton": float(gap),
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
