"""One rank of ``test_kernels_parallel.py``: its slice of the head, compared with the whole head in float64."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from rewardmap_kernels import PolicyObjective, linear_policy_loss

sys.path.append(str(Path(__file__).parent))
import kernels_cases as cases

N, V, H = 21, 30, 8


def one_collective(hidden: Tensor, mine: Tensor, targets: Tensor, rows: dict[str, Any]) -> None:
    """A chunk costs one gather of three numbers a row; the hidden gradient one sum."""
    calls: list[str] = []
    gather, reduce = dist.all_gather_into_tensor, dist.all_reduce
    dist.all_gather_into_tensor = lambda out, part, **k: (calls.append(f"{part.numel()}"), gather(out, part, **k))[1]
    dist.all_reduce = lambda value, **k: (calls.append("sum"), reduce(value, **k))[1]
    try:
        options = {"objective": PolicyObjective("dapo"), "chunk_rows": 8, "group": dist.group.WORLD}
        linear_policy_loss(hidden, mine, targets, **options, **rows).loss.backward()
    finally:
        dist.all_gather_into_tensor, dist.all_reduce = gather, reduce
    assert calls == ["24", "24", "15", "sum"], calls


def batches(size: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """A head, and hidden rows with their targets for each rank."""
    g = torch.Generator().manual_seed(1)
    head = torch.randn(V, H, generator=g, dtype=torch.float64)
    made = [torch.randn(N, H, generator=g, dtype=torch.float64) for _ in range(size)]
    return head, [(x, torch.randint(0, V, (N,), generator=g)) for x in made]


def loss_of(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    ones = torch.ones(len(targets), dtype=torch.float64)
    return linear_policy_loss(
        hidden, weight, targets, advantages=ones, normalizer=float(N), objective=PolicyObjective("dapo"), chunk_rows=8
    ).loss


def mean_gradient(size: int) -> Tensor:
    """What data parallelism owes the head: the mean over ranks of each rank's own gradient."""
    head, parts = batches(size)
    head.requires_grad_()
    return torch.autograd.grad(sum(loss_of(x, head, y) for x, y in parts) / size, head)[0]


def sharded_head(rank: int, size: int) -> None:
    """A DTensor head, each rank with rows of its own."""
    head, parts = batches(size)
    sharded = distribute_tensor(head, init_device_mesh("cpu", (size,)), [Shard(0)]).requires_grad_()
    loss_of(parts[rank][0], sharded, parts[rank][1]).backward()
    assert sharded.grad is not None
    torch.testing.assert_close(sharded.grad.full_tensor(), mean_gradient(size), rtol=1e-9, atol=1e-12)


class Headed(torch.nn.Module):
    """A body and a head whose weight the loss takes inside forward, as a model with a fused loss does."""

    def __init__(self, head: Tensor) -> None:
        super().__init__()
        self.body = torch.nn.Linear(H, H, bias=False, dtype=torch.float64)
        torch.nn.init.eye_(self.body.weight)
        self.lm_head = torch.nn.Linear(H, V, bias=False, dtype=torch.float64)
        self.lm_head.weight = torch.nn.Parameter(head)

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return loss_of(self.body(hidden), self.lm_head.weight, targets)


def fully_sharded_module(rank: int, size: int) -> None:
    """FSDP2 gathers the head and averages its gradient; ours must reach it."""
    head, parts = batches(size)
    model = Headed(head)
    fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    model(*parts[rank]).backward()
    grad = model.lm_head.weight.grad
    torch.testing.assert_close(grad.full_tensor(), mean_gradient(size), rtol=1e-9, atol=1e-12)  # type: ignore[union-attr]


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
    one_collective(hidden, mine, targets, rows)
    sharded_head(rank, size)
    fully_sharded_module(rank, size)
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
