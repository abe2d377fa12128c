"""Attention over a packed prefix forest, in plain torch.

Tokens of a forest lie in depth-first order; ``subtree_end[j]`` is the packed index where the subtree of key j's node
ends. Query i sees key j exactly when ``j <= i < subtree_end[j]``: one integer per key is the whole mask.

Shapes: T packed tokens, Hq query heads, Hkv key heads (Hq a multiple of Hkv), D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

Tensor = torch.Tensor


@dataclass(frozen=True)
class TreeMask:
    """The mask of one packed row, cut into its trees so that no pair of tokens of different trees is ever formed."""

    trees: tuple[tuple[int, int], ...]
    """Half-open token ranges of the trees; together they are 0..T."""
    visible: tuple[Tensor, ...]
    """Per tree [t, t] bool: query (row) sees key (column)."""


def tree_mask(subtree_end: Tensor) -> TreeMask:
    """Build the mask of a packed row once; every layer shares it.

    Args:
        subtree_end: [T] int64, on any device.

    Raises:
        ValueError: an entry that does not lie in (its own index, T], or trees that overlap.
    """
    ends = subtree_end.tolist()
    total = len(ends)
    trees, visible, start = [], [], 0
    while start < total:
        end = ends[start]
        if not start < end <= total:
            raise ValueError(f"subtree_end[{start}]={end} must lie in {start + 1}..{total}")
        local = subtree_end[start:end]
        query = torch.arange(start, end, device=subtree_end.device)
        if bool((local > end).any()) or bool((local <= query).any()):
            raise ValueError(f"subtree_end of tokens {start}..{end} leaves their tree")
        visible.append((query[None, :] <= query[:, None]) & (query[:, None] < local[None, :]))
        trees.append((start, end))
        start = end
    return TreeMask(tuple(trees), tuple(visible))


def tree_attention(q: Tensor, k: Tensor, v: Tensor, mask: TreeMask, scale: float | None = None) -> Tensor:
    """softmax(q kᵀ · scale) v over visible pairs only.

    Args:
        q: [1, Hq, T, D]. k, v: [1, Hkv, T, D].
        mask: ``tree_mask(subtree_end)`` of the row.
        scale: default D**-0.5.

    Returns:
        [1, Hq, T, D], differentiable in q, k and v.
    """
    if q.shape[0] != 1 or k.shape != v.shape or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"expected q [1, Hq, T, D] and k, v [1, Hkv, T, D]; got {[*q.shape]}, {[*k.shape]}, {[*v.shape]}"
        )
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
