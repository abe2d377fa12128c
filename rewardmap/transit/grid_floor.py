"""Full-size warehouse floors: picking aisles between shelf blocks, cross aisles, bays, and where all of it is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from rewardmap.transit.graph import Line, Network

FLOOR_LEVELS = ("grid-easy", "grid-middle", "grid-hard")
LANE_PX = 42
"""Width of an aisle."""
BAY_PX = (42, 25)
"""Width and height of a bay's plate."""
STUB_PX = 48
"""How far an aisle goes on behind its last crossing, up to its badge."""
_WALL_PX = 92
"""From the outermost aisles' middles to the wall."""
_PALETTE = (
    *("#d61f2c", "#1a5fd0", "#1e9e3e", "#e07b00", "#8a2bb5", "#00899b", "#b3186d", "#7a5a1e"),
    *("#4b4fb0", "#6b8e00", "#c2491d", "#3d6b8c", "#a3395b", "#2f7a5c", "#5c4033", "#555f6b"),
)
_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"

Edges = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class _Plan:
    columns: tuple[int, int]
    rows: tuple[int, int]
    aisle_gap: tuple[int, int]
    """Pixels between neighbouring picking aisles, least and most."""
    slots: tuple[int, int]
    """Bays that fit on a picking aisle between two cross aisles, least and most."""
    slot_px: int
    one_way: float
    """Share of the aisles that are one-way."""


_PLANS = {
    "grid-easy": _Plan((3, 4), (2, 2), (150, 210), (5, 7), 58, 0.35),
    "grid-middle": _Plan((4, 5), (3, 3), (140, 180), (2, 4), 54, 0.45),
    "grid-hard": _Plan((6, 8), (4, 4), (128, 144), (2, 3), 50, 0.55),
}


@dataclass(frozen=True, slots=True)
class _Aisle:
    """One aisle on the lattice of columns and rows: where it runs and the crossings it has, in lattice order."""

    upright: bool
    lane: int
    first: int
    last: int


def floor_network(level: str, rng: np.random.Generator, network_id: str) -> Network:
    """A random floor of one of ``FLOOR_LEVELS``, on which every bay can be reached from every other.

    ``extras["geometry"]`` holds what is drawn, in pixels.
    """
    plan = _PLANS[level]
    columns, rows = (int(rng.integers(low, high + 1)) for low, high in (plan.columns, plan.rows))
    xs = np.cumsum([0, *rng.integers(plan.aisle_gap[0], plan.aisle_gap[1] + 1, columns - 1)])
    slots = rng.integers(plan.slots[0], plan.slots[1] + 1, rows - 1)
    ys = np.cumsum([0, *((slots + 1) * plan.slot_px)])
    while True:
        aisles = _aisles(columns, rows, rng)
        if aisles is None:
            continue
        bays = [_bays(aisle, aisles, xs, ys, slots, rng) for aisle in aisles]
        spots = sorted({spot for spots in bays for spot in spots})
        for _ in range(20):
            one_way = rng.random(len(aisles)) < plan.one_way
            turned = rng.random(len(aisles)) < 0.5
            names = rng.permutation(list(_LETTERS))[: len(aisles)]
            colours = rng.permutation(list(_PALETTE))[: len(aisles)]
            numbers = rng.choice(np.arange(100, 1000), len(spots), replace=False)
            name_of = {spot: f"Bay {number}" for spot, number in zip(spots, numbers, strict=True)}
            lines = tuple(
                Line(
                    f"Aisle {names[i]}",
                    str(colours[i]),
                    tuple(name_of[spot] for spot in (reversed(bays[i]) if turned[i] else bays[i])),
                    one_way=bool(one_way[i]),
                )
                for i in np.argsort(names)
            )
            network = Network(network_id, level, lines, {})
            if one_way.any() and network.fewest_transfers().min() >= 0:
                floor = _geometry(aisles, lines, np.argsort(names), xs, ys, rng)
                left, top = floor["origin"]
                positions = {name: (left + x, top + y) for (x, y), name in name_of.items()}
                floor["labels"] = [{"station": name, "corners": _plate(*at)} for name, at in positions.items()]
                size = (int(floor["size"][0]), int(floor["size"][1]))
                return Network(network_id, level, lines, positions, size, "grid", {"geometry": floor})


def _aisles(columns: int, rows: int, rng: np.random.Generator) -> list[_Aisle] | None:
    """Aisles of which each begins and ends at a crossing; None where the draw leaves a dead end or has too many."""
    aisles = []
    for row in range(rows):
        first, last = 0, columns - 1
        if 0 < row < rows - 1 and columns > 3 and rng.random() < 0.5:
            first, last = (first + 1, last) if rng.random() < 0.5 else (first, last - 1)
        aisles.append(_Aisle(False, row, first, last))
    for column in range(columns):
        runs = [(0, rows - 1)]
        if 0 < column < columns - 1 and rows > 2 and rng.random() < 0.45:
            cut = int(rng.integers(1, rows - 1))
            runs = [run for run in ((0, cut), (cut + 1, rows - 1)) if run[1] > run[0]]
            if len(runs) < 2 and rng.random() < 0.5:
                runs = [(rows - 1 - last, rows - 1 - first) for first, last in runs]
        aisles += [_Aisle(True, column, first, last) for first, last in runs]
    if len(aisles) > len(_PALETTE):
        return None
    for aisle in aisles:
        meets = _crossed(aisle, aisles)
        if meets[:1] != [aisle.first] or meets[-1:] != [aisle.last]:
            return None
    return aisles


def _crossed(aisle: _Aisle, aisles: list[_Aisle]) -> list[int]:
    """Lanes of the aisles that it crosses, in order."""
    return sorted(
        {
            other.lane
            for other in aisles
            if other.upright != aisle.upright
            and aisle.first <= other.lane <= aisle.last
            and other.first <= aisle.lane <= other.last
        }
    )


def _bays(
    aisle: _Aisle,
    aisles: list[_Aisle],
    xs: np.ndarray,
    ys: np.ndarray,
    slots: np.ndarray,
    rng: np.random.Generator,
) -> list[tuple[int, int]]:
    """(x, y) of the crossings and bays along an aisle, in lattice order, relative to the first crossing of the map."""
    spots: list[tuple[int, int]] = []
    meets = _crossed(aisle, aisles)
    for start, end in pairwise(meets):
        if not aisle.upright:
            spots.append((int(xs[start]), int(ys[aisle.lane])))
            if end - start > 1 or rng.random() < 0.3:
                spots.append((int(xs[start] + xs[end]) // 2, int(ys[aisle.lane])))
            continue
        x = int(xs[aisle.lane])
        spots.append((x, int(ys[start])))
        for gap in range(start, end):
            count = int(slots[gap])
            kept = int(rng.integers(max(1, count - 2), count + 1))
            pitch = (ys[gap + 1] - ys[gap]) / (count + 1)
            spots += [
                (x, round(float(ys[gap] + (slot + 1) * pitch)))
                for slot in sorted(rng.choice(count, kept, replace=False))
            ]
    spots.append(
        (int(xs[aisle.lane]), int(ys[aisle.last])) if aisle.upright else (int(xs[aisle.last]), int(ys[aisle.lane]))
    )
    return spots


def _geometry(
    aisles: list[_Aisle],
    lines: tuple[Line, ...],
    order: np.ndarray,
    xs: np.ndarray,
    ys: np.ndarray,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Everything that is drawn, in pixels: JSON values. ``order`` gives the aisle of each line."""
    entries = len(lines)
    inner = float(xs[-1]) + 2 * _WALL_PX, float(ys[-1]) + 2 * _WALL_PX
    legend = (216.0, 56.0 + 40 * entries + 118)
    width = max(800.0, inner[0] + legend[0] + 84)
    height = max(max(inner[1] + 130, legend[1] + 100), 620.0)
    left = 30 + (width - legend[0] - 84 - inner[0]) / 2
    top = 62 + (height - 130 - inner[1]) / 2
    ox, oy = round(left + _WALL_PX), round(top + _WALL_PX)
    drawn, badges = [], []
    for line, index in zip(lines, order, strict=True):
        aisle = aisles[int(index)]
        along, lane = (ys, xs) if aisle.upright else (xs, ys)
        ends = [float(along[aisle.first]) - STUB_PX, float(along[aisle.last]) + STUB_PX]
        fixed = float(lane[aisle.lane])
        points = [[ox + fixed, oy + at] if aisle.upright else [ox + at, oy + fixed] for at in ends]
        stops = list(line.stations)
        badges += [{"x": x, "y": y, "text": line.name.split()[-1], "colour": line.colour} for x, y in points]
        drawn.append(
            {
                "name": line.name,
                "colour": line.colour,
                "one_way": line.one_way,
                "polylines": [points],
                "stops": stops,
            }
        )
    room = inner[0] - 2 * _WALL_PX + 80
    doors = max(2, int(room // 130))
    step = room / doors
    return {
        "size": [round(width), round(height)],
        "origin": [ox, oy],
        "wall": [left, top, left + inner[0], top + inner[1]],
        "title": f"Warehouse {int(rng.integers(2, 60))}",
        "lines": drawn,
        "badges": badges,
        "shelves": [[ox + a, oy + b, ox + c, oy + d] for a, b, c, d in _shelves(aisles, xs, ys)],
        "docks": [left + _WALL_PX - 40 + step * (i + 0.5) for i in range(doors)],
        "legend": [width - legend[0] - 30, top, width - 30, top + legend[1]],
        "crates": int(rng.integers(1 << 30)),
    }


def _plate(x: float, y: float) -> list[list[float]]:
    """Corners of the plate that carries a bay's number."""
    w, h = BAY_PX[0] / 2, BAY_PX[1] / 2
    return [[x - w, y - h], [x + w, y - h], [x + w, y + h], [x - w, y + h]]


def _shelves(aisles: list[_Aisle], xs: np.ndarray, ys: np.ndarray) -> list[Edges]:
    """A shelf block in every field between lanes; where a lane is missing, it reaches to the middle of it."""
    margin = LANE_PX / 2 + 7

    def lane(upright: bool, at: int, gap: int) -> bool:
        return any(a.upright == upright and a.lane == at and a.first <= gap and gap + 1 <= a.last for a in aisles)

    blocks = []
    for i in range(len(xs) - 1):
        for j in range(len(ys) - 1):
            blocks.append(
                (
                    float(xs[i]) + margin * lane(True, i, j),
                    float(ys[j]) + margin * lane(False, j, i),
                    float(xs[i + 1]) - margin * lane(True, i + 1, j),
                    float(ys[j + 1]) - margin * lane(False, j + 1, i),
                )
            )
    return blocks
