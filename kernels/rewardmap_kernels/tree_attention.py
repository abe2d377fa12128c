"""Attention over a packed prefix forest: the mask, the definition in plain torch, and the choice of the kernels.

Tokens of a forest lie in depth-first order; ``subtree_end[j]`` is the packed index where the subtree of key j's node
ends. Query i sees key j exactly when ``j <= i < subtree_end[j]``: one integer per key is the whole mask.

Shapes: T packed tokens, Hq query heads, Hkv key heads (Hq a multiple of Hkv), D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

from . import tree_blocks, tree_op, tree_routes, tree_tiles, tree_varlen
from .dispatch import choose, launched

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class TreeMask:
    """The mask of one packed row. What a path needs of it is made on first use and shared by every layer."""

    subtree_end: Tensor
    """[T] int64, on the CPU, validated."""
    trees: tuple[tuple[int, int], ...]
    """Half-open token ranges of the trees; together they are 0..T. No pair of tokens of different trees is seen."""
    device: torch.device
    """Where the row lies."""
    _made: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def visible(self) -> tuple[Tensor, ...]:
        """Per tree [t, t] bool: query (row) sees key (column). For float64 on a GPU."""
        if "visible" not in self._made:
            with torch.inference_mode(False):  # made under inference, they could not serve training
                ends = self.subtree_end.to(self.device)
                self._made["visible"] = tuple(_visible(ends[start:end], start) for start, end in self.trees)
        return self._made["visible"]

    @property
    def blocks(self) -> tree_blocks.Blocks:
        """Blocks of queries with the keys they see. For the CPU."""
        if "blocks" not in self._made:
            with torch.inference_mode(False):
                self._made["blocks"] = tree_blocks.build_blocks(self.subtree_end, self.trees)
        return self._made["blocks"]

    def tiles(self, forward: tuple[int, int], backward: tuple[int, int], device: torch.device) -> tree_tiles.Tiles:
        """Tile lists of the kernels for (query, key) block sizes of their passes, on ``device``."""
        key = (forward, backward, device)
        if key not in self._made:
            with torch.inference_mode(False):
                tiles = tree_tiles.build_tiles(self.subtree_end, forward, backward)
                self._made[key] = tree_tiles.to_device(tiles, device)
        return self._made[key]

    @property
    def calls(self) -> tree_varlen.Calls:
        """The calls of flash attention over variable lengths, on the row's device."""
        if "calls" not in self._made:
            with torch.inference_mode(False):
                self._made["calls"] = tree_varlen.to_device(tree_varlen.build_calls(self.subtree_end), self.device)
        return self._made["calls"]

    def route(self, dtype: torch.dtype, head_dim: int) -> str:
        """What computes attention on a GPU for such tensors: see ``tree_routes``."""
        key = (dtype, head_dim)
        if key not in self._made:
            calls = len(tree_varlen.build_calls(self.subtree_end).sizes)
            self._made[key] = tree_routes.route_of(self.device, dtype, head_dim, calls)
        return self._made[key]

    def prepare(self, dtype: torch.dtype, head_dim: int) -> TreeMask:
        """Make now what ``tree_attention`` will look up for tensors of this dtype and head dimension on the row's
        device: compiled code then neither makes it nor depends on how many trees there are. Returns the mask."""
        like = torch.empty(1, 1, 0, head_dim, dtype=dtype, device=self.device)
        chosen, route = _path(like, self, None)
        if route is not None:
            _ = self.calls
        elif chosen != "torch":
            _tiles(like, self)
        else:
            _ = self.blocks if self.device.type == "cpu" else self.visible
        return self


def _visible(ends: Tensor, start: int) -> Tensor:
    at = torch.arange(start, start + ends.shape[0], device=ends.device)
    return (at[None, :] <= at[:, None]) & (at[:, None] < ends[None, :])


def tree_mask(subtree_end: Tensor, device: torch.device | None = None) -> TreeMask:
    """Build the mask of a packed row once; every layer shares it.

    Args:
        subtree_end: [T] int64. On the CPU nothing waits for a device.
        device: where the row lies; None: where ``subtree_end`` does.

    Raises:
        ValueError: an entry that does not lie in (its own index, T], or trees that overlap.
    """
    local = subtree_end.cpu()
    total = local.shape[0]
    trees, start = [], 0
    while start < total:
        end = int(local[start])
        if not start < end <= total:
            raise ValueError(f"subtree_end[{start}]={end} must lie in {start + 1}..{total}")
        inside = local[start:end]
        if bool((inside > end).any()) or bool((inside <= torch.arange(start, end)).any()):
            raise ValueError(f"subtree_end of tokens {start}..{end} leaves their tree")
        trees.append((start, end))
        start = end
    return TreeMask(local, tuple(trees), device or subtree_end.device)


def tree_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: TreeMask, scale: float | None = None, route: str | None = None
) -> Tensor:
    """softmax(q kᵀ · scale) v over visible pairs only.

    CUDA tensors run by Triton kernels, which visit only tiles with a visible pair, accumulate in float32 and give the
    same bits every run, or by flash attention over variable lengths (``tree_varlen``) where a measured table says that
    it is faster (``tree_routes``). On the CPU torch's own flash attention runs block by block of queries, on the keys
    they see (``tree_blocks``); float64 on a GPU runs by the mask as written. ``use_implementation`` overrides.

    Args:
        q: [1, Hq, T, D]. k, v: [1, Hkv, T, D]. One dtype: float32, float16 or bfloat16 (float64: plain torch).
        mask: ``tree_mask(subtree_end)`` of the row.
        scale: positive; default D**-0.5.
        route: one of ``tree_varlen.ROUTES``, or "tree_attention" for the kernels; None: the table's choice.

    Returns:
        [1, Hq, T, D], differentiable in q, k and v.

    Raises:
        ValueError: shapes, dtypes or devices that do not agree, a mask of another length, a head dimension outside
            16..128 for the kernels, or a route that cannot run here.
    """
    _check(q, k, v, mask)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen, route = _path(q, mask, route)
    if route is not None:
        return _varlen(q, k, v, mask, scale, route)
    if chosen == "torch":
        if q.device.type == "cpu":
            return tree_blocks.tree_blocks_forward(q, k, v, *mask.blocks, scale)[0]
        return _plain(q, k, v, mask, scale)
    low, high = tree_op.HEAD_DIMS
    if not low <= q.shape[-1] <= high:
        raise ValueError(
            f"tree_attention: head dimension {q.shape[-1]} has no kernel ({low} to {high} have); "
            'run it inside use_implementation("torch")'
        )
    if not scale > 0:
        raise ValueError(f"tree_attention: scale={scale} must be positive")
    return tree_op.tree_attention_forward(q, k, v, *_tiles(q, mask), scale)[0]


def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float, route: str | None = None
) -> Tensor:
    """softmax(q kᵀ · scale) v inside each segment of a row, every pair of it visible: a vision tower's attention.

    One call of flash attention over variable lengths for 16-bit CUDA tensors (``tree_routes`` says whose), else torch's
    attention, segment by segment.

    Args:
        q: [1, Hq, T, D]. k, v: [1, Hkv, T, D].
        bounds: [segments + 1] int, from 0 to T. longest: tokens of the longest segment.
        route: one of ``tree_varlen.ROUTES`` or "sdpa"; None: the table's choice.

    Returns:
        [1, Hq, T, D], differentiable in q, k and v.
    """
    if route is None:
        here = q.device.type == "cuda" and q.dtype.itemsize == 2
        route = tree_routes.route_of(q.device, q.dtype, q.shape[-1], tree_routes.SEGMENTS) if here else "sdpa"
    if route != "sdpa":
        calls = tree_varlen.build_segments(bounds, q.shape[2], longest)
        return tree_varlen.tree_varlen_forward(q, k, v, *calls, False, scale, route)[0]
    lengths = bounds.diff().tolist()
    grouped = q.shape[1] != k.shape[1]
    parts = [
        functional.scaled_dot_product_attention(a, b, c, scale=scale, enable_gqa=grouped)
        for a, b, c in zip(*(x.split(lengths, 2) for x in (q, k, v)), strict=True)
    ]
    return torch.cat(parts, 2)


def _path(q: Tensor, mask: TreeMask, route: str | None) -> tuple[str, str | None]:
    """The implementation; and what runs in its place, one of ``tree_varlen.ROUTES``, asked for or measured faster."""
    chosen = choose("tree_attention", q)
    if route is None and chosen == "triton" and q.device.type == "cuda":
        route = mask.route(q.dtype, q.shape[-1])
    return chosen, None if route == tree_routes.KERNELS else route


def _tiles(q: Tensor, mask: TreeMask) -> tree_tiles.Tiles:
    blocks = tree_op.plan_of(q)
    return mask.tiles((blocks.forward.m, blocks.forward.n), (blocks.dkv.m, blocks.dkv.n), q.device)


def _varlen(q: Tensor, k: Tensor, v: Tensor, mask: TreeMask, scale: float, route: str) -> Tensor:
    refusal = tree_varlen.why_not(route, q.dtype, q.shape[-1])
    if refusal:
        raise ValueError(f"tree_attention cannot run by {route}: {refusal}")
    if not torch.compiler.is_compiling():
        launched("tree_attention", route)
    return tree_varlen.tree_varlen_forward(q, k, v, *mask.calls, True, scale, route)[0]


def _check(q: Tensor, k: Tensor, v: Tensor, mask: TreeMask) -> None:
    if (
        q.ndim != 4
        or q.shape[0] != 1
        or k.shape != v.shape
        or k.shape[::3] != q.shape[::3]
        or q.shape[2] != k.shape[2]
        or q.shape[1] % k.shape[1]
    ):
        raise ValueError(
            f"expected q [1, Hq, T, D] and k, v [1, Hkv, T, D]; got {[*q.shape]}, {[*k.shape]}, {[*v.shape]}"
        )
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v must be of one floating dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k, v must be on one device; got {q.device}, {k.device}, {v.device}")
    if q.shape[2] != mask.subtree_end.shape[0]:
        raise ValueError(f"q holds {q.shape[2]} tokens, the mask {mask.subtree_end.shape[0]}; pass the row's own mask")


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: TreeMask, scale: float) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    out = [
        functional.scaled_dot_product_attention(
            q[:, :, start:end],
            k[:, :, start:end],
            v[:, :, start:end],
            attn_mask=visible,
            scale=scale,
            enable_gqa=grouped,
        )
        for (start, end), visible in zip(mask.trees, mask.visible, strict=True)
    ]
    return torch.cat(out, dim=2)
