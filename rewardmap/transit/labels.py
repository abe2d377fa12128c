"""Places station labels: none over another, over track or over a marker, each nearest to its own station."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from rewardmap.transit.fonts import map_font

_CELL = 2
"""Pixels of the picture per cell of the occupancy raster."""
_GAP_PX = 5.0
_MARGIN_PX = 8
_LEAD_PX = 2.5
"""By how much a label lies closer to its own station's marker than to any other."""
LINE_HEIGHT = 1.18
"""Distance of two text lines, in the size of their type."""


@dataclass(frozen=True, slots=True)
class Lettering:
    """How a map is lettered: family, type sizes [px] of names and of their second script, slant on flat track."""

    family: str
    px: int
    small_px: int
    slanted: bool = False


@dataclass(frozen=True, slots=True)
class Label:
    """A placed label. ``angle``: degrees counter-clockwise; ``centre`` and ``size`` of its box before rotation."""

    lines: tuple[str, ...]
    px: tuple[int, ...]
    """Type size of each text line."""
    centre: tuple[float, float]
    size: tuple[float, float]
    angle: float
    align: str
    bold: bool

    def corners(self) -> np.ndarray:
        """[4, 2] corners of the rotated box in picture pixels."""
        w, h = self.size[0] / 2, self.size[1] / 2
        return np.array(self.centre) + np.array([[-w, -h], [w, -h], [w, h], [-w, h]]) @ _rotation(self.angle)


@dataclass(frozen=True, slots=True)
class Spot:
    """A station that wants a label. ``radius`` of its marker [px], ``room`` with its stroke."""

    name: str
    position: np.ndarray
    tangent: np.ndarray
    radius: float
    room: float
    hub: bool
    bold: bool
    needed: bool
    second: str = ""
    """The name in Latin letters, written below it in small type; empty where there is none."""


class Canvas:
    """What is occupied in a picture of ``size`` pixels."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        self.taken = np.zeros((size[1] // _CELL + 1, size[0] // _CELL + 1), dtype=bool)
        """[rows, columns], one per ``_CELL`` pixels."""

    def line(self, points: np.ndarray, width: float) -> None:
        """Blocks a stroke."""
        shapes = points / _CELL
        wide = max(1, round(width / _CELL))
        self._block(shapes, wide, lambda pen, at: pen.line(at, fill=255, width=wide, joint="curve"))

    def disc(self, centre: np.ndarray, radius: float) -> None:
        """Blocks a marker."""
        box = np.array([centre - radius, centre + radius]) / _CELL
        self._block(box, 1, lambda pen, at: pen.ellipse(at, fill=255))

    def polygon(self, corners: np.ndarray) -> None:
        """Blocks a box."""
        self._block(corners / _CELL, 1, lambda pen, at: pen.polygon(at, fill=255))

    def free(self, low: np.ndarray, high: np.ndarray) -> bool:
        """Is the box between two corners [2] inside the picture and empty?"""
        if min(low) < 0 or high[0] >= self.size[0] or high[1] >= self.size[1]:
            return False
        (x0, y0), (x1, y1) = (low / _CELL).astype(int), (high / _CELL).astype(int)
        return not bool(self.taken[y0 : y1 + 1, x0 : x1 + 1].any())

    def _block(self, shape: np.ndarray, room: int, draw: Callable[[ImageDraw.ImageDraw, list[Any]], None]) -> None:
        low = np.maximum(np.floor(shape.min(axis=0)).astype(int) - room, 0)
        high = np.minimum(np.ceil(shape.max(axis=0)).astype(int) + room + 1, self.taken.shape[::-1])
        if (high <= low).any():
            return
        patch = Image.new("L", (int(high[0] - low[0]), int(high[1] - low[1])))
        draw(ImageDraw.Draw(patch), [(float(x), float(y)) for x, y in shape - low])
        self.taken[low[1] : high[1], low[0] : high[0]] |= np.asarray(patch) > 0


def place_labels(spots: list[Spot], canvas: Canvas, lettering: Lettering) -> dict[str, Label | None] | None:
    """A label for each spot, or None where none fits; ``canvas`` then holds the labels too.

    Spots that need a label come first, if need be further out than others; ordinary ones that would lie as close to
    such a label as its own station go without. Then the ordinary ones with least room. None in all where a needed
    label does not fit.
    """
    placed: dict[str, Label | None] = {}
    alive = [spot for spot in spots if spot.needed]
    for needed in (True, False):
        wanting = [spot for spot in alive if spot.needed == needed]
        options = [[label for label in _candidates(spot, lettering) if _fits(label, canvas)] for spot in wanting]
        for i in sorted(range(len(wanting)), key=lambda i: len(options[i])):
            spot = wanting[i]
            further_out = _outlying(spot, lettering) if needed else ()
            chosen = next(
                (
                    label
                    for label in itertools.chain(options[i], further_out)
                    if _fits(label, canvas) and not _rivals(label, spot, alive)
                ),
                None,
            )
            if needed and chosen is None:
                return None
            placed[spot.name] = chosen
            if chosen is not None:
                size = (chosen.size[0] + 12, chosen.size[1] + 4)
                canvas.polygon(Label((), (), chosen.centre, size, chosen.angle, "", False).corners())
        if needed:
            ordinary = [spot for spot in spots if not spot.needed]
            crowded = {
                rival.name
                for spot in alive
                if (label := placed[spot.name]) is not None
                for rival in _rivals(label, spot, ordinary)
            }
            placed.update(dict.fromkeys(crowded))
            alive += [spot for spot in ordinary if spot.name not in crowded]
    return placed


def _rotation(angle: float) -> np.ndarray:
    """Row vectors times this turn counter-clockwise as seen, with y pointing down."""
    c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    return np.array([[c, -s], [s, c]])


@lru_cache(maxsize=8192)
def _text_size(lines: tuple[str, ...], px: tuple[int, ...], bold: bool, family: str) -> tuple[float, float]:
    wide = max(map_font(size, bold, family).getlength(line) for line, size in zip(lines, px, strict=True))
    return wide, sum(px) * LINE_HEIGHT - 0.12 * px[-1]


def _wordings(spot: Spot, lettering: Lettering) -> list[tuple[tuple[str, ...], tuple[int, ...]]]:
    """Text lines and their sizes: the name in one line, in two where it has a space; always two in two scripts."""
    if spot.second:
        return [((spot.name, spot.second), (lettering.px, lettering.small_px))]
    words = spot.name.split()
    one = ((spot.name,), (lettering.px,))
    if len(words) == 1:
        return [one]
    cut = min(range(1, len(words)), key=lambda i: abs(len(" ".join(words[:i])) - len(" ".join(words[i:]))))
    return [one, ((" ".join(words[:cut]), " ".join(words[cut:])), (lettering.px,) * 2)]


def _candidates(spot: Spot, lettering: Lettering) -> list[Label]:
    """Possible labels, best first: beside steep track, above or below flat track, slanted where it is crowded."""
    gap = spot.room + _GAP_PX
    x, y = float(spot.position[0]), float(spot.position[1])
    flat = abs(spot.tangent[0]) > 0.85
    slanted = lettering.slanted and flat and not spot.hub
    found: list[tuple[float, Label]] = []
    for text, px in _wordings(spot, lettering):
        w, h = size = _text_size(text, px, spot.bold, lettering.family)

        def offer(
            cost: float, dx: float, dy: float, angle: float, align: str,
            text: tuple[str, ...] = text, px: tuple[int, ...] = px, size: tuple[float, float] = size,
        ) -> None:  # fmt: skip
            found.append((cost, Label(text, px, (x + dx, y + dy), size, angle, align, spot.bold)))

        broken = len(text) > 1 and not spot.second
        two = 0.6 * broken
        side, corner = (2.0, 1.2) if flat else (0.0, 1.0)
        offer(side + two, gap + w / 2, 0, 0, "left")
        offer(side + 0.3 + two, -gap - w / 2, 0, 0, "right")
        near = 0.72 * gap
        for sx, align in ((1, "left"), (-1, "right")):
            for sy in (-1, 1):
                offer(corner + two + 0.1 * (sx < 0), sx * (near + w / 2), sy * (near + h / 2), 0, align)
        for sy, cost in ((-1, 0.0), (1, 0.1)):
            offer(cost + (0.0 if flat else 1.5) + 0.3 * two, 0, sy * (gap + h / 2), 0, "centre")
            for sx, align in ((1, "left"), (-1, "right")):
                slide = 0.5 if flat else 2.0
                offer(cost + slide + two, sx * (w / 2 - 8), sy * (gap + h / 2), 0, align)
        if spot.needed:  # between two lines that cross at 45 degrees there is room only a little further out
            for sx, align in ((1, "left"), (-1, "right")):
                for sy in (-1, 1):
                    offer(3 + two, sx * (gap + 22 + w / 2), sy * (10 + h / 2), 0, align)
        if broken:
            continue
        reach = gap + w / 2
        for angle, cost in ((45.0, 1.6), (-45.0, 2.4), (90.0, 4.0)):
            along = np.array([1.0, 0.0]) @ _rotation(angle)
            offer(cost, float(along[0]) * reach, float(along[1]) * reach, angle, "left")
            offer(cost + 0.2, -float(along[0]) * reach, -float(along[1]) * reach, angle, "right")
        if flat and abs(spot.tangent[1]) < 0.1:  # a corner of the text, not the middle of its side, stands at the stop
            dx, dy = 0.7071 * (w - h) / 2, -0.7071 * (w + h) / 2 - gap
            offer(-1.0 if slanted else 1.6, dx, dy, 45.0, "left")
            offer(-0.5 if slanted else 1.8, -dx, -dy, 45.0, "right")
    return [label for _, label in sorted(found, key=lambda pair: pair[0])]


_OUTLYING = ((8, 0, 0), (16, 0, 0), (0, 0, 45), (0, 0, -45), (26, 0, 0), (34, 10, 0), (46, 10, 0))
"""Pixels further out, pixels up or down, and angle of the places of ``_outlying``, best first."""


def _outlying(spot: Spot, lettering: Lettering) -> Iterator[Label]:
    """Where an interchange's name may stand when no place of ``_candidates`` is free: further out between the lines
    that cross there, or slanted in a corner of two diagonals."""
    x, y = float(spot.position[0]), float(spot.position[1])
    gap = spot.room + _GAP_PX
    for (reach, rise, angle), (text, px) in itertools.product(_OUTLYING, _wordings(spot, lettering)):
        w, h = _text_size(text, px, spot.bold, lettering.family)
        along, across = gap + reach + w / 2, rise + h / 2 if rise else 0.0
        if angle:
            along, across = 0.72 * gap + w / 2, 0.72 * gap + h / 2
        for sx, align in ((1, "left"), (-1, "right")):
            for sy in (-1, 1) if across else (0,):
                dx, dy = np.array([sx * along, sy * across]) @ _rotation(angle)
                yield Label(text, px, (x + float(dx), y + float(dy)), (w, h), float(angle), align, spot.bold)


@lru_cache(maxsize=4096)
def _grid(size: tuple[float, float], angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Points over the rotated box about its centre, in cells [K, 2], and half its extent in pixels [2]."""
    columns = np.linspace(-0.5, 0.5, max(2, int(size[0] / 4) + 1)) * size[0]
    rows = np.linspace(-0.5, 0.5, max(2, int(size[1] / 4) + 1)) * size[1]
    points = np.stack(np.meshgrid(columns, rows), axis=-1).reshape(-1, 2) @ _rotation(angle)
    return points / _CELL, points.max(axis=0)


def _fits(label: Label, canvas: Canvas) -> bool:
    points, (half_w, half_h) = _grid(label.size, label.angle)
    x, y = label.centre
    if x - half_w < _MARGIN_PX or x + half_w > canvas.size[0] - _MARGIN_PX:
        return False
    if y - half_h < _MARGIN_PX or y + half_h > canvas.size[1] - _MARGIN_PX:
        return False
    cells = (points + np.array([x, y]) / _CELL).astype(np.intp)
    return not bool(canvas.taken[cells[:, 1], cells[:, 0]].any())


def _rivals(label: Label, spot: Spot, others: list[Spot]) -> list[Spot]:
    """Spots whose marker is about as close to the label as its own station's marker."""
    if not others:
        return []
    distances = box_distance(label, np.array([other.position for other in others]))
    distances -= np.array([other.radius for other in others])
    own = float(box_distance(label, spot.position[None])[0]) - spot.radius
    return [other for other, gap in zip(others, distances, strict=True) if gap < own + _LEAD_PX and other is not spot]


def box_distance(label: Label, positions: np.ndarray) -> np.ndarray:
    """[N] pixels from positions [N, 2] to the label's box; 0 inside."""
    local = (positions - label.centre) @ _rotation(label.angle).T
    outside = np.maximum(np.abs(local) - np.array(label.size) / 2, 0)
    return np.hypot(outside[:, 0], outside[:, 1])
