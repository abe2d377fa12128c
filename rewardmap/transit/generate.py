"""Random transit networks of a difficulty level: same state of the random generator, same network."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from rewardmap.transit.compose import FULL_LEVELS, compose
from rewardmap.transit.graph import Line, Network
from rewardmap.transit.grid import GRID_LEVELS, grid_network

TINY_LEVELS = ("tiny-easy", "tiny-middle", "tiny-hard")
TINY_CELLS = 5
"""A tiny map has 5 x 5 cells, at most one station in each."""
TINY_CELL_PX = 28
"""One cell is one visual token of Qwen2.5-VL (patch 14, merged 2 x 2)."""
TINY_COLOURS = {"Red Line": "#d61f2c", "Blue Line": "#1a5fd0", "Green Line": "#1e9e3e"}

Cell = tuple[int, int]
_STEPS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))


@dataclass(frozen=True, slots=True)
class _TinyShape:
    line_counts: tuple[int, ...]
    lines_per_stop: int
    interchanges: tuple[int, int]


_TINY = {
    "tiny-easy": _TinyShape((2,), 2, (1, 2)),
    "tiny-middle": _TinyShape((2, 3), 2, (1, 3)),
    "tiny-hard": _TinyShape((3,), 3, (2, 5)),
}


def generate_network(level: str, rng: np.random.Generator, network_id: str) -> Network:
    """A random network of ``level``. Deterministic in the state of ``rng``.

    Raises ValueError for a level that this generator does not know.
    """
    if level in _TINY:
        return _tiny_network(level, rng, network_id)
    if level in FULL_LEVELS:
        return compose(level, rng, network_id)
    if level in GRID_LEVELS:
        return grid_network(level, rng, network_id)
    known = ", ".join((*TINY_LEVELS, *FULL_LEVELS, *GRID_LEVELS))
    raise ValueError(f"unknown map level {level!r}; known levels: {known}")


def _tiny_network(level: str, rng: np.random.Generator, network_id: str) -> Network:
    """5 to 11 stations in cells of 28 px; neighbours on a line lie in 8-neighbouring cells."""
    shape = _TINY[level]
    count = int(rng.choice(shape.line_counts))
    while True:
        # Half of the lines have five stops, so that each count of stops between two (0 to 3) can be asked.
        paths = [_walk(rng, int(rng.choice((3, 4, 5), p=(0.2, 0.3, 0.5)))) for _ in range(count)]
        if all(paths) and _acceptable(paths, shape):
            break
    cells = sorted({cell for path in paths for cell in path})
    letters = rng.permutation(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))[: len(cells)]
    names = {cell: f"{letter} Station" for cell, letter in zip(cells, letters, strict=True)}
    colours = [str(name) for name in rng.permutation(list(TINY_COLOURS))[:count]]
    lines = tuple(
        Line(name, TINY_COLOURS[name], tuple(names[cell] for cell in path))
        for name, path in zip(colours, paths, strict=True)
    )
    half = TINY_CELL_PX / 2
    positions = {names[x, y]: (x * TINY_CELL_PX + half, y * TINY_CELL_PX + half) for x, y in cells}
    side = TINY_CELLS * TINY_CELL_PX
    return Network(network_id, level, lines, positions, (side, side))


def _walk(rng: np.random.Generator, length: int) -> list[Cell]:
    """A self-avoiding walk that never turns by more than 90 degrees; empty when it gets stuck."""
    x, y = (int(value) for value in rng.integers(0, TINY_CELLS, 2))
    path, heading = [(x, y)], (0, 0)
    while len(path) < length:
        ahead = [
            (dx, dy)
            for dx, dy in _STEPS
            if dx * heading[0] + dy * heading[1] >= 0
            and 0 <= x + dx < TINY_CELLS
            and 0 <= y + dy < TINY_CELLS
            and (x + dx, y + dy) not in path
        ]
        if not ahead:
            return []
        weights = np.array([2.0 if step == heading else 1.0 for step in ahead])
        heading = ahead[int(rng.choice(len(ahead), p=weights / weights.sum()))]
        x, y = x + heading[0], y + heading[1]
        path.append((x, y))
    return path


def _acceptable(paths: list[list[Cell]], shape: _TinyShape) -> bool:
    used: dict[Cell, int] = {}
    for path in paths:
        for cell in path:
            used[cell] = used.get(cell, 0) + 1
    shared = sum(times > 1 for times in used.values())
    low, high = shape.interchanges
    if not 5 <= len(used) <= 11 or not low <= shared <= high or max(used.values()) > shape.lines_per_stop:
        return False
    if any(sum(used[cell] == 1 for cell in path) < 1 for path in paths):
        return False
    if any(len(set(a) & set(b)) > 2 for i, a in enumerate(paths) for b in paths[:i]):
        return False
    edges = [frozenset(pair) for path in paths for pair in pairwise(path)]
    if len(set(edges)) < len(edges):
        return False
    middles = [tuple(map(sum, zip(*edge, strict=True))) for edge in edges]
    if len(set(middles)) < len(middles):  # equal midpoints: two diagonals of one block cross
        return False
    joined, rest = set(paths[0]), paths[1:]
    while rest:
        reached = [path for path in rest if joined & set(path)]
        if not reached:
            return False
        joined.update(*reached)
        rest = [path for path in rest if path not in reached]
    return True
