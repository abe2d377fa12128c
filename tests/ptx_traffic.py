"""What the accesses of a launch cost in memory transactions, counted as a GPU's profiler counts them.

Global memory moves sectors of 32 bytes: a warp that asks for fewer bytes of a sector than it holds wastes the rest.
Shared memory has 32 banks of 4 bytes: words of one bank beyond the first cost a pass each.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

WARP, SECTOR, BANKS, WORD = 32, 32, 32, 4


class Traffic:
    """Of all launches that were given it. Keys: ``global`` or ``shared``, ``read`` or ``write``: ``global read``."""

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        """That threads asked for."""
        self.passes: Counter[str] = Counter()
        """Sectors, or passes over the banks."""
        self.least: Counter[str] = Counter()
        """The fewest that as many different bytes allow."""

    def add(self, threads: NDArray[np.int64], addresses: NDArray[np.int64], size: int, kind: str) -> None:
        """One instruction of these threads of a block, ``size`` bytes each."""
        self.bytes[kind] += size * len(threads)
        if kind.startswith("global"):
            warp = threads // WARP << 48
            self.passes[kind] += len(np.unique(warp + addresses // SECTOR))
            self.least[kind] += sum(-(-size * n // SECTOR) for n in _each(np.unique(warp + addresses // size) >> 48))
            return
        # 8 bytes a thread go by half warps, 16 by quarters.
        together = max(size // WORD, 1)
        group = threads // WARP * together + threads % WARP * together // WARP
        word = addresses[:, None] // WORD + np.arange(together)
        asked = np.unique((np.broadcast_to(group[:, None], word.shape) << 40) + word)
        group, word = asked >> 40, asked & ((1 << 40) - 1)
        banks = np.unique(group * BANKS + word % BANKS, return_counts=True)
        worst = np.zeros(int(group.max()) + 1, np.int64)
        np.maximum.at(worst, banks[0] // BANKS, banks[1])
        self.passes[kind] += int(worst.sum())
        self.least[kind] += sum(-(-n // BANKS) for n in _each(group))

    def ratio(self, kind: str) -> float:
        """Passes made over the fewest possible; 1 where there were none."""
        return self.passes[kind] / self.least[kind] if self.least[kind] else 1.0


def _each(groups: NDArray[np.int64]) -> list[int]:
    return np.unique(groups, return_counts=True)[1].tolist()
