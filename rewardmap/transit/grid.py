"""A second world with the same records: warehouse floors, whose aisles are lines and whose bays are stations.

An aisle runs straight, in the tiny world with one corner at most; where two aisles cross, one may turn from one into
the other. One-way aisles may be travelled in the order of ``Line.stations`` only. Names tell nothing: bays are
numbered (tiny: lettered) at random, so that no number gives away an aisle.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from rewardmap.transit.graph import Line, Network
from rewardmap.transit.grid_floor import FLOOR_LEVELS, floor_network

TINY_GRID_LEVELS = ("grid-tiny-easy", "grid-tiny-middle", "grid-tiny-hard")
GRID_LEVELS = (*TINY_GRID_LEVELS, *FLOOR_LEVELS)
CELLS = 5
"""A tiny floor has 5 x 5 cells."""
CELL_PX = 28
"""One cell is one visual token of Qwen2.5-VL (patch 14, merged 2 x 2)."""
COLOURS = {"Red Line": "#d61f2c", "Blue Line": "#1a5fd0", "Green Line": "#1e9e3e"}

Cell = tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Shape:
    aisles: tuple[int, ...]
    one_way: tuple[int, ...]
    """How many of the aisles are one-way."""
    crossings: tuple[int, int]


_TINY = {
    "grid-tiny-easy": _Shape((2,), (0, 1), (1, 2)),
    "grid-tiny-middle": _Shape((2, 3), (1,), (1, 3)),
    "grid-tiny-hard": _Shape((3,), (1, 2), (2, 5)),
}


def grid_network(level: str, rng: np.random.Generator, network_id: str) -> Network:
    """A random floor of ``level``, one of ``GRID_LEVELS``. Deterministic in the state of ``rng``."""
    if level in FLOOR_LEVELS:
        return floor_network(level, rng, network_id)
    shape = _TINY[level]
    count = int(rng.choice(shape.aisles))
    while True:
        paths = [_aisle(rng) for _ in range(count)]
        if _acceptable(paths, shape):
            network = _tiny_network(level, network_id, paths, shape, rng)
            if _enough_to_ask(network):
                return network


def _tiny_network(
    level: str, network_id: str, paths: list[list[Cell]], shape: _Shape, rng: np.random.Generator
) -> Network:
    """Names the places of the aisles. A cell that is neither end, corner nor crossing may hold none."""
    stops = []
    for path in paths:
        shared = {cell for other in paths if other is not path for cell in other}
        kept = [
            cell
            for at, cell in enumerate(path)
            if at in (0, len(path) - 1) or cell in shared or _corner(path, at) or rng.random() < 0.8
        ]
        stops.append(kept if len(kept) > 2 else path)
    cells = sorted({cell for path in stops for cell in path})
    letters = rng.permutation(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))[: len(cells)]
    names = {cell: f"{letter} Station" for cell, letter in zip(cells, letters, strict=True)}
    aisles = [str(name) for name in rng.permutation(list(COLOURS))[: len(paths)]]
    one_way = set(rng.permutation(aisles)[: int(rng.choice(shape.one_way))].tolist())
    lines = tuple(
        Line(name, COLOURS[name], tuple(names[cell] for cell in path), one_way=name in one_way)
        for name, path in zip(aisles, stops, strict=True)
    )
    positions = {names[x, y]: ((x + 0.5) * CELL_PX, (y + 0.5) * CELL_PX) for x, y in cells}
    return Network(network_id, level, lines, positions, (CELLS * CELL_PX, CELLS * CELL_PX), "grid-tiny")


def _aisle(rng: np.random.Generator) -> list[Cell]:
    """Cells along an aisle in a random direction: 3 to 5 straight ahead, or two arms and the corner between them."""
    if rng.random() < 0.6:
        length = int(rng.choice((3, 4, 5), p=(0.15, 0.25, 0.6)))
        lane, first = int(rng.integers(CELLS)), int(rng.integers(CELLS - length + 1))
        path = [(along, lane) for along in range(first, first + length)]
    else:
        x, y = (int(value) for value in rng.integers(0, CELLS, 2))
        across = [(at, y) for at in (range(x) if rng.random() < 0.5 else range(CELLS - 1, x, -1))]
        along = [(x, at) for at in (range(y - 1, -1, -1) if rng.random() < 0.5 else range(y + 1, CELLS))]
        path = [*across[-int(rng.integers(1, 4)) :], (x, y), *along[: int(rng.integers(1, 4))]]
    if rng.random() < 0.5:
        path = [(y, x) for x, y in path]
    return path if rng.random() < 0.5 else path[::-1]


def _corner(path: list[Cell], at: int) -> bool:
    if not 0 < at < len(path) - 1:
        return False
    (x, y), (u, v) = path[at - 1], path[at + 1]
    return x != u and y != v


def _acceptable(paths: list[list[Cell]], shape: _Shape) -> bool:
    used: dict[Cell, int] = {}
    for path in paths:
        for cell in path:
            used[cell] = used.get(cell, 0) + 1
    crossings = {cell for cell, times in used.items() if times > 1}
    low, high = shape.crossings
    if not 6 <= len(used) <= 12 or not low <= len(crossings) <= high or max(used.values()) > 2:
        return False
    for path in paths:
        straight_on = [cell not in crossings or not _corner(path, at) for at, cell in enumerate(path)]
        if not 3 <= len(path) <= 6 or not all(straight_on) or crossings.issuperset(path):
            return False
    for i, a in enumerate(paths):
        for b in paths[:i]:
            if any((c in b) and (d in b) for c, d in pairwise(a)):  # side by side in one lane
                return False
            if {a[0], a[-1]} & {b[0], b[-1]}:  # end to end: where one stops would not be seen
                return False
    return True


def _enough_to_ask(network: Network) -> bool:
    """Whether all is connected, and two pairs each can be asked about without and with one change."""
    linked = [set(line.stations) for line in network.lines]
    joined = linked[0].union(*(stops for stops in linked[1:] if stops & linked[0]))
    if any(not stops & joined for stops in linked):
        return False
    fewest = network.fewest_transfers()
    return all(np.triu((fewest == changes) | (changes == fewest.T), 1).sum() >= 2 for changes in (0, 1))
