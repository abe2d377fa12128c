"""Which tiles of a packed forest hold a visible pair, from ``subtree_end`` alone.

Query i sees key j when ``j <= i < subtree_end[j]``. With query blocks of M rows and key blocks of N columns, a tile
(m, n) holds a visible pair exactly when the key block starts before the query block ends and the largest
``subtree_end`` of the key block lies beyond the query block's start: every token sees itself, so a key block that
overlaps the query block always qualifies, and one that lies before it qualifies by its furthest-reaching key. So the
query blocks that a key block meets are one contiguous range, and so are those it is wholly visible to.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tiles(NamedTuple):
    """The tiles of one packed row of T tokens for one choice of block sizes; int32, all on one device.

    Work is listed heaviest block first, so that a GPU ends evenly.
    """

    ends: Tensor
    """[T]: ``subtree_end``."""
    rows: Tensor
    """[query blocks, 4]: the block, then where its key blocks begin in ``keys``, where the wholly visible ones end,
    and where all end."""
    keys: Tensor
    """[tiles]: key blocks of each query block, the wholly visible ones first."""
    columns: Tensor
    """[key blocks, 5]: the block, then its query blocks first..last and, inside them, the wholly visible range:
    first, full_first, full_last, last, half-open."""


def key_ranges(ends: Tensor, block_m: int, block_n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per key block: (first, full_first, full_last, last), each [key blocks] int64, ranges of query blocks.

    ``ends`` is ``subtree_end`` [T] int64 on the CPU.
    """
    total = ends.shape[0]
    blocks = -(-total // block_n)
    start = torch.arange(blocks) * block_n
    padded = torch.full((2, blocks * block_n), total)
    padded[0, total:] = 0
    padded[:, :total] = ends
    furthest = padded[0].view(blocks, block_n).amax(1)
    nearest = padded[1].view(blocks, block_n).amin(1)
    first, last = start // block_m, -(-furthest // block_m)
    full_first = -(-(start + block_n - 1) // block_m)
    # The last query block may be cut short by the end of the row: what is beyond it sees nothing.
    full_last = torch.where(nearest == total, -(-total // block_m), nearest // block_m)
    full_first = torch.minimum(torch.maximum(full_first, first), last)
    return first, full_first, torch.maximum(torch.minimum(full_last, last), full_first), last


def build_tiles(subtree_end: Tensor, forward: tuple[int, int], backward: tuple[int, int]) -> Tiles:
    """Tiles on the CPU. ``forward``: (query, key) block of the passes over query blocks; ``backward``: of the pass
    over key blocks. ``subtree_end`` [T] int64 on the CPU, valid."""
    first, full_first, full_last, last = key_ranges(subtree_end, *forward)
    query = torch.arange(-(-subtree_end.shape[0] // forward[0]))[:, None]
    full = (full_first <= query) & (query < full_last)
    visible = (first <= query) & (query < last)
    # Wholly visible key blocks sort before the others, and both in order.
    keys = torch.stack([full, visible & ~full], 1).nonzero()[:, 2]
    count, wholly = visible.sum(1), full.sum(1)
    end = count.cumsum(0)
    rows = torch.stack([query[:, 0], end - count, end - count + wholly, end], 1)
    rows = rows[torch.argsort(count, descending=True, stable=True)]
    ranges = key_ranges(subtree_end, *backward)
    columns = torch.stack([torch.arange(ranges[0].shape[0]), *ranges], 1)
    columns = columns[torch.argsort(ranges[3] - ranges[0], descending=True, stable=True)]
    return Tiles(subtree_end.int(), rows.int(), keys.int(), columns.int())


def to_device(tiles: Tiles, device: torch.device) -> Tiles:
    """The same tiles on another device, in one copy."""
    if device.type == "cpu":
        return tiles
    flat = torch.cat([part.reshape(-1) for part in tiles])
    moved = flat.pin_memory().to(device, non_blocking=True).split([part.numel() for part in tiles])
    return Tiles(*(piece.view(part.shape) for piece, part in zip(moved, tiles, strict=True)))
