"""Tree attention on the CPU: one call of torch's flash attention per block of queries, on the keys it sees.

A block's keys are its ancestors', which lie before it, and its own: ``j < first`` with ``subtree_end[j] > first``, and
the block itself. So arithmetic is that of the visible pairs and of what a block of BLOCK queries straddles. Operators,
so that ``torch.compile`` takes them whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .tree_flop import register_attention_flop

BLOCK = 64
"""Queries of a block at most; blocks end where trees end."""


class Blocks(NamedTuple):
    """The blocks of one packed row, on the CPU."""

    bounds: Tensor
    """[blocks, 4] int64: queries first..last and the block's place in ``keys``, half-open."""
    keys: Tensor
    """[K] int64: the keys of every block, in order."""
    visible: Tensor
    """[pairs] bool: per block [queries, keys], row by row."""


def build_blocks(subtree_end: Tensor, trees: Sequence[tuple[int, int]], block: int = BLOCK) -> Blocks:
    """``subtree_end`` [T] int64, valid; ``trees`` its token ranges."""
    bounds, keys, visible = [], [], []
    size = 0
    for start, end in trees:
        for first in range(start, end, block):
            last = min(first + block, end)
            before = start + (subtree_end[start:first] > first).nonzero().squeeze(1)
            seen = torch.cat([before, torch.arange(first, last)])
            query = torch.arange(first, last)[:, None]
            visible.append(((seen <= query) & (query < subtree_end[seen])).view(-1))
            keys.append(seen)
            bounds.append((first, last, size, size + len(seen)))
            size += len(seen)
    return Blocks(torch.tensor(bounds), torch.cat(keys), torch.cat(visible))


def _walk(bounds: Tensor, keys: Tensor, visible: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Any, Tensor]]:
    """Per block: its queries, its keys (a slice where they are neighbours), and 0 or -inf per pair, in ``dtype``."""
    at = 0
    for first, last, begin, end in bounds.tolist():
        pairs = (last - first) * (end - begin)
        hidden = ~visible[at : at + pairs].view(last - first, end - begin)
        at += pairs
        seen: Any = keys[begin:end]
        if last - int(seen[0]) == len(seen):
            seen = slice(int(seen[0]), last)
        yield slice(first, last), seen, torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))


def _of(x: Tensor, keys: Any) -> Tensor:
    return x[:, :, keys] if isinstance(keys, slice) else x.index_select(2, keys)


@torch.library.custom_op("rewardmap_kernels::tree_blocks_forward", mutates_args=())
def tree_blocks_forward(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, keys: Tensor, visible: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """q [1, Hq, T, D], k and v [1, Hkv, T, D] and ``Blocks`` -> (out [1, Hq, T, D], lse [1, Hq, T], base e)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    out, lse = _heads_inside(q, q.dtype), q.new_empty(q.shape[:3], dtype=wide)
    for at, seen, mask in _walk(bounds, keys, visible, q.dtype):
        out[:, :, at], lse[:, :, at] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[:, :, at], _of(k, seen), _of(v, seen), attn_mask=mask, scale=scale
        )
    return out, lse


@torch.library.custom_op("rewardmap_kernels::tree_blocks_backward", mutates_args=())
def tree_blocks_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds: Tensor, keys: Tensor,
    visible: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v; those of k and v are summed in float32 (float64 for float64) and rounded once."""
    wide = torch.promote_types(q.dtype, torch.float32)
    dq = _heads_inside(q, q.dtype)
    dk, dv = (_heads_inside(x, wide).zero_() for x in (k, v))
    for at, seen, mask in _walk(bounds, keys, visible, q.dtype):
        dq[:, :, at], *grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout[:, :, at], q[:, :, at], _of(k, seen), _of(v, seen), out[:, :, at], lse[:, :, at], 0.0, False,
            attn_mask=mask, scale=scale,
        )  # fmt: skip
        for total, grad in zip((dk, dv), grads, strict=True):
            if isinstance(seen, slice):
                total[:, :, seen] += grad
            else:
                total.index_add_(2, seen, grad.to(wide))
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _heads_inside(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Empty [1, H, T, D] whose memory is [1, T, H, D]: the model's next reshape costs no copy."""
    _, heads, tokens, dim = like.shape
    return like.new_empty(1, tokens, heads, dim, dtype=dtype).transpose(1, 2)


@tree_blocks_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, keys: Tensor, visible: Tensor, scale: float) -> Any:
    return _heads_inside(q, q.dtype), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@tree_blocks_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds: Tensor, keys: Tensor,
    visible: Tensor, scale: float,
) -> Any:  # fmt: skip
    return _heads_inside(q, q.dtype), _heads_inside(k, k.dtype), _heads_inside(v, v.dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])


def _backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dv = tree_blocks_backward(dout, *ctx.saved_tensors, ctx.scale)
    return dq, dk, dv, None, None, None, None


tree_blocks_forward.register_autograd(_backward, setup_context=_setup)
register_attention_flop("tree_blocks", lambda bounds, keys, visible, scale: int(visible.sum()))
