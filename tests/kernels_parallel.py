"""One rank of ``test_kernels_parallel.py``: its slice of the head, compared with the whole head in float64."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from rewardmap_kernels import linear_policy_loss

sys.path.append(str(Path(__file__).parent))
import kernels_cases as cases

N, V, H = 21, 30, 8


def main(rank: int, size: int, store: str) -> None:
    """Raise where a slice's result is not the whole head's."""
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=g, dtype=torch.float64).requires_grad_()
    weight = torch.randn(V, H, generator=g, dtype=torch.float64).requires_grad_()
    mine = weight.detach().chunk(size)[rank].clone().requires_grad_()
    targets = torch.randint(0, V, (N,), generator=g)
    rows = cases.row_inputs(N)
    for objective in cases.OBJECTIVES:
        for chunk_rows in (None, 8):
            whole = linear_policy_loss(hidden, weight, targets, objective=objective, temperature=0.7, **rows)
            part = linear_policy_loss(
                hidden, mine, targets, objective=objective, temperature=0.7, chunk_rows=chunk_rows,
                group=dist.group.WORLD, **rows,
            )  # fmt: skip
            expected = torch.autograd.grad(whole.loss, (hidden, weight))
            got = torch.autograd.grad(part.loss, (hidden, mine))
            for a, b in zip(part[:3], whole[:3], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(got[0], expected[0], rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(got[1], expected[1].chunk(size)[rank], rtol=1e-9, atol=1e-11)
    targets[3] = V
    try:
        linear_policy_loss(hidden, mine, targets, objective=objective, group=dist.group.WORLD, **rows)
    except ValueError as error:
        assert f"targets[3] = {V} is outside [0, {V})" in str(error)
    else:
        raise AssertionError("a target beyond the whole vocabulary passed")
    dist.destroy_process_group()
    print("equal")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
