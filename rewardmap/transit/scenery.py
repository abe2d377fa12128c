"""What a map shows beside its network: water, parks, zones, and distractors that are no part of any answer.

Distractors are pale or stand where nothing else is: another operator's railway beneath the map, a compass, a square
code, a timetable, and small signs beside stations. The legend says which strokes are lines.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rewardmap.transit.labels import Canvas
from rewardmap.transit.styles import Style

SIGNS = ("plane", "tree", "cross", "parking", "boat")
_SIGN_PX = 9.0
_QR_CELLS, _QR_CELL_PX = 21, 4


def rounded(points: np.ndarray) -> list[list[float]]:
    """Points as JSON, tenths of a pixel."""
    return [[round(float(x), 1), round(float(y), 1)] for x, y in points]


def areas(style: Style, size: tuple[int, int], rng: np.random.Generator) -> list[dict[str, Any]]:
    """Zone, parks, a river and sometimes a railway, all beneath the track; ``size``: of the map without its legend."""
    width, height = size
    turn = np.linspace(0, 2 * np.pi, 60)
    found: list[dict[str, Any]] = []
    if style.zone:
        reach = np.array([width, height]) * rng.uniform(0.26, 0.34)
        c, s = np.cos(turn), np.sin(turn)
        ring = np.stack([np.sign(c) * abs(c) ** 0.6, np.sign(s) * abs(s) ** 0.6], axis=1)
        found.append(_area("zone", ring * reach + np.array([width, height]) / 2, 0))
    for _ in range(int(rng.integers(1, 4))):
        radius = rng.uniform(50, 110) * (1 + 0.2 * np.sin(turn * 3 + rng.uniform(0, 6)))
        centre = np.array([rng.uniform(0.12, 0.88) * width, rng.uniform(0.2, 0.9) * height])
        blob = np.stack([np.cos(turn) * 1.3, np.sin(turn)], axis=1) * radius[:, None]
        found.append(_area("park", centre + blob, 0))
    if rng.random() < 0.75:
        course = _course(rng, 0.10)
        found.append(_area("water", _laid(course, width, height, rng), round(rng.uniform(34, 64))))
    if rng.random() < 0.45:
        found.append(_area("rail", _laid(_course(rng, 0.05), width, height, rng), 4))
    return found


def _area(kind: str, points: np.ndarray, width: int) -> dict[str, Any]:
    return {"kind": kind, "points": rounded(points), "width": width}


def _course(rng: np.random.Generator, swing: float) -> np.ndarray:
    """[80, 2] a winding way across the unit square."""
    t = np.linspace(-0.05, 1.05, 80)
    sway = swing * np.sin(2 * np.pi * (t * rng.uniform(0.6, 1.3) + rng.random()))
    sway += 0.3 * swing * np.sin(2 * np.pi * (t * 2.3 + rng.random()))
    return np.stack([t, rng.uniform(0.3, 0.75) + sway], axis=1)


def _laid(course: np.ndarray, width: float, height: float, rng: np.random.Generator) -> np.ndarray:
    if rng.random() < 0.5:
        return course * (width, height)
    return course[:, ::-1] * (width, height + 200)


def corner_pieces(canvas: Canvas, bottom: float, right: float, rng: np.random.Generator) -> list[dict[str, Any]]:
    """A compass, a square code or a timetable in free corners of the map, which ends at ``right`` and ``bottom``."""
    pieces: list[dict[str, Any]] = []
    wished = [kind for kind, chance in (("qr", 0.45), ("compass", 0.6), ("timetable", 0.35)) if rng.random() < chance]
    sizes = {"qr": (84, 84), "compass": (60, 76), "timetable": (196, 112)}
    for kind in wished:
        w, h = sizes[kind]
        spots = [(right - w - 34, 34), (34, bottom - h - 34), (right - w - 34, bottom - h - 34)]
        for x, y in (spots[index] for index in rng.permutation(3)):
            low, high = np.array([x - 12.0, y - 12.0]), np.array([x + w + 12.0, y + h + 12.0])
            if canvas.free(low, high):
                canvas.polygon(np.array([low, [high[0], low[1]], high, [low[0], high[1]]]))
                piece: dict[str, Any] = {"kind": kind, "x": x, "y": y, "width": w, "height": h}
                if kind == "qr":
                    cells = rng.random((_QR_CELLS, _QR_CELLS)) < 0.5
                    piece["cells"] = ["".join("#" if cell else "." for cell in row) for row in cells]
                if kind == "timetable":
                    first, last = rng.integers(4, 7), rng.integers(0, 60, 6)
                    piece["rows"] = [
                        [day, f"{first}:{last[i]:02d}", f"23:{last[i + 3]:02d}"]
                        for i, day in enumerate(("Mon – Fri", "Saturday", "Sunday"))
                    ]
                pieces.append(piece)
                break
    return pieces


def signs(canvas: Canvas, places: np.ndarray, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Small signs (airport, park, hospital, parking, landing stage) in free places beside some of ``places`` [N, 2]."""
    found: list[dict[str, Any]] = []
    for index in rng.permutation(len(places))[: int(rng.integers(0, 3 + len(places) // 12))]:
        for angle in rng.uniform(0, 2 * np.pi, 6):
            centre = places[index] + 40 * np.array([np.cos(angle), np.sin(angle)])
            reach = np.full(2, _SIGN_PX + 4)
            if canvas.free(centre - reach, centre + reach):
                x, y = centre
                box = np.array([[x - 9, y - 9], [x + 9, y - 9], [x + 9, y + 9], [x - 9, y + 9]])
                canvas.polygon(box)
                kind = SIGNS[int(rng.integers(len(SIGNS)))]
                found.append({"kind": kind, "x": round(float(x), 1), "y": round(float(y), 1), "radius": _SIGN_PX})
                break
    return found
