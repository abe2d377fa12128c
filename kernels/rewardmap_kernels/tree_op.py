"""Launches the tree-attention kernels, as torch operators: ``torch.ops.rewardmap_kernels.tree_attention_forward`` and
``..._backward``.

Operators, so that ``torch.compile`` takes them whole and selective activation checkpointing can name them. Tiles
travel as tensors (``tree_tiles.Tiles``), so every layer shares one set.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dispatch import last_path, launched, on_device_of
from .tree_flop import register_attention_flop

HEAD_DIMS = (16, 128)
"""Smallest and largest head dimension the kernels take."""
PROGRAMS = 1024
"""The pass over key blocks divides its query heads until it has about this many programs: several per
multiprocessor, so that the heavy ones do not end alone."""


class Blocks(NamedTuple):
    """Launch of one pass: query rows and key columns of a tile, warps, and loads kept in flight."""

    m: int
    n: int
    warps: int
    stages: int


class Plan(NamedTuple):
    """The three passes. ``forward`` and ``dq`` share their tiles, so their m and n agree."""

    forward: Blocks
    dq: Blocks
    dkv: Blocks


PLANS: dict[tuple[bool, int], Plan] = {
    # (16-bit tensors, padded head dimension): chosen so that nothing spills on sm_80, sm_90a, sm_100a and sm_120a, that
    # Hopper's products need not wait for each other, and that each warpgroup has 64 rows of its own. docs/forest.md.
    (True, 16): Plan(Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 3), Blocks(64, 128, 8, 2)),
    (True, 32): Plan(Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 3), Blocks(64, 128, 8, 2)),
    (True, 64): Plan(Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 3), Blocks(64, 128, 8, 2)),
    (True, 128): Plan(Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 3), Blocks(32, 128, 8, 2)),
    (False, 16): Plan(Blocks(32, 32, 4, 2), Blocks(32, 32, 4, 2), Blocks(32, 32, 4, 2)),
    (False, 32): Plan(Blocks(32, 32, 4, 2), Blocks(32, 32, 4, 2), Blocks(32, 32, 4, 2)),
    (False, 64): Plan(Blocks(32, 32, 4, 2), Blocks(32, 32, 4, 2), Blocks(32, 32, 8, 2)),
    (False, 128): Plan(Blocks(32, 32, 8, 2), Blocks(32, 32, 8, 2), Blocks(32, 32, 8, 1)),
}
WITHOUT_WARPGROUPS = Plan(Blocks(64, 64, 8, 2), Blocks(64, 64, 8, 2), Blocks(64, 64, 8, 2))
"""In place of PLANS[True, 128] on GPUs whose products read registers, not shared memory, of which some of them have
99 KiB: all but those of compute capability 9 and 10."""


def padded(head_dim: int) -> int:
    """The power of two, at least 16, that a head dimension is padded to."""
    return max(16, 1 << (head_dim - 1).bit_length())


def plan(dtype: torch.dtype, head_dim: int, capability: int) -> Plan:
    """Block sizes for tensors of this dtype and head dimension on a GPU of this major compute capability."""
    key = dtype.itemsize == 2, padded(head_dim)
    return WITHOUT_WARPGROUPS if capability not in (9, 10) and key == (True, 128) else PLANS[key]


def plan_of(q: Tensor) -> Plan:
    """The plan for tensors like q [1, Hq, T, D] where they are; in the interpreter, that of the newest GPUs."""
    capability = torch.cuda.get_device_capability(q.device)[0] if q.device.type == "cuda" else 9
    return plan(q.dtype, q.shape[-1], capability)


def _note(kernel: str) -> None:
    # Under torch.compile the choice is written down only after the graph has run.
    if last_path("tree_attention") is not None:
        launched("tree_attention", kernel)


def _heads_inside(like: Tensor) -> Tensor:
    """Empty [1, H, T, D] whose memory is [1, T, H, D]: the model's next reshape costs no copy."""
    _, heads, tokens, dim = like.shape
    return like.new_empty(1, tokens, heads, dim).transpose(1, 2)


def _last_dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    return [tensor.stride(dim) for tensor in tensors for dim in (1, 2)]


@torch.library.custom_op("rewardmap_kernels::tree_attention_forward", mutates_args=())
def tree_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, rows: Tensor, keys: Tensor, columns: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """q [1, Hq, T, D], k and v [1, Hkv, T, D] and ``Tiles`` -> (out [1, Hq, T, D], lse [Hq, T] float32, base 2)."""
    from . import tree_kernels  # needs triton, which the operator's name does not

    q, k, v = map(_last_dense, (q, k, v))
    _, heads, total, dim = q.shape
    out, lse = _heads_inside(q), q.new_empty(heads, total, dtype=torch.float32)
    blocks = plan_of(q).forward
    _note("tree_forward_kernel")
    with on_device_of(q):
        tree_kernels.tree_forward_kernel[heads, rows.shape[0]](
            q, k, v, out, lse, ends, rows, keys, *_strides(q, k, v, out), total, heads // k.shape[1],
            scale * math.log2(math.e), HEAD_DIM=dim, BLOCK_D=padded(dim), BLOCK_M=blocks.m, BLOCK_N=blocks.n,
            num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
    return out, lse


@tree_attention_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, rows: Tensor, keys: Tensor, columns: Tensor, scale: float) -> Any:
    return _heads_inside(q), q.new_empty(q.shape[1], q.shape[2], dtype=torch.float32)


@torch.library.custom_op("rewardmap_kernels::tree_attention_backward", mutates_args=())
def tree_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, ends: Tensor, rows: Tensor, keys: Tensor,
    columns: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, in their dtype, each summed in float32 and rounded once."""
    from . import tree_kernels

    dout, q, k, v = map(_last_dense, (dout, q, k, v))
    _, heads, total, dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    passes = plan_of(q)
    constants = {"HEAD_DIM": dim, "BLOCK_D": padded(dim)}
    delta, dq = torch.empty_like(lse), _heads_inside(q)
    _note("tree_dq_kernel")
    with on_device_of(q):
        tree_kernels.tree_dq_kernel[heads, rows.shape[0]](
            q, k, v, out, dout, lse, delta, dq, ends, rows, keys, *_strides(q, k, v, out, dout, dq), total, group,
            scale * math.log2(math.e), scale, **constants, BLOCK_M=passes.dq.m, BLOCK_N=passes.dq.n,
            num_warps=passes.dq.warps, num_stages=passes.dq.stages,
        )  # fmt: skip
    parts = head_parts(group, kv_heads * columns.shape[0])
    dtype = k.dtype if parts == 1 else torch.float32
    shape = (parts, total, kv_heads, dim)
    dk, dv = (torch.empty(shape, dtype=dtype, device=k.device).transpose(1, 2) for _ in range(2))
    _note("tree_dkv_kernel")
    with on_device_of(q):
        tree_kernels.tree_dkv_kernel[kv_heads * parts, columns.shape[0]](
            q, k, v, dout, lse, delta, dk, dv, ends, columns, *_strides(q, k, v, dout), dk.stride(0), *_strides(dk),
            total, group, parts, scale * math.log2(math.e), scale, **constants, BLOCK_M=passes.dkv.m,
            BLOCK_N=passes.dkv.n, num_warps=passes.dkv.warps, num_stages=passes.dkv.stages,
        )  # fmt: skip
    if parts > 1:
        dk, dv = (sums.sum(0, keepdim=True).to(k.dtype) for sums in (dk, dv))
    return dq, dk, dv


@tree_attention_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, ends: Tensor, rows: Tensor, keys: Tensor,
    columns: Tensor, scale: float,
) -> Any:  # fmt: skip
    return _heads_inside(q), _heads_inside(k), _heads_inside(v)


def head_parts(group: int, programs: int) -> int:
    """Into how many parts the heads of a group are divided, a divisor of ``group``: the fewest that give PROGRAMS
    programs, all of them when none does."""
    return next((n for n in range(1, group + 1) if group % n == 0 and n * programs >= PROGRAMS), group)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])


def _backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dv = tree_attention_backward(dout, *ctx.saved_tensors, ctx.scale)
    return dq, dk, dv, None, None, None, None, None


tree_attention_forward.register_autograd(_backward, setup_context=_setup)


def _pairs(ends: Tensor, *rest: Any) -> int:
    return int((ends - torch.arange(len(ends), device=ends.device)).sum())  # on a GPU this waits for it


register_attention_flop("tree_attention", _pairs)
