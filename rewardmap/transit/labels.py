"""Places station labels: none over another, over track or over a marker, each nearest to its own station."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_CELL = 2
"""Pixels of the picture per cell of the occupancy raster."""
_GAP_PX = 5.0
_MARGIN_PX = 8
_LEAD_PX = 2.5
"""By how much a label lies closer to its own station's marker than to any other."""


@lru_cache(maxsize=32)
def map_font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as matplotlib ships it: Latin, Greek and Cyrillic, the same on every machine."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf" / name), size)


@dataclass(frozen=True, slots=True)
class Label:
    """A placed label. ``angle``: degrees counter-clockwise; ``centre`` and ``size`` of its box before rotation."""

    lines: tuple[str, ...]
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
    bold: bool
    needed: bool


class Canvas:
    """What is occupied in a picture of ``size`` pixels."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        self._image = Image.new("L", (size[0] // _CELL + 1, size[1] // _CELL + 1))
        self._pen = ImageDraw.Draw(self._image)

    def line(self, points: np.ndarray, width: float) -> None:
        """Blocks a stroke."""
        flat = [(float(x) / _CELL, float(y) / _CELL) for x, y in points]
        self._pen.line(flat, fill=255, width=max(1, round(width / _CELL)), joint="curve")

    def disc(self, centre: np.ndarray, radius: float) -> None:
        """Blocks a marker."""
        x, y, r = float(centre[0]) / _CELL, float(centre[1]) / _CELL, radius / _CELL
        self._pen.ellipse((x - r, y - r, x + r, y + r), fill=255)

    def polygon(self, corners: np.ndarray) -> None:
        """Blocks a box."""
        self._pen.polygon([(float(x) / _CELL, float(y) / _CELL) for x, y in corners], fill=255)

    def occupied(self) -> np.ndarray:
        """[rows, columns] bool; a view that later drawing changes only after the next call."""
        return np.asarray(self._image) > 0


def place_labels(spots: list[Spot], canvas: Canvas, font_px: int) -> dict[str, Label | None] | None:
    """A label for each spot, or None where none fits; ``canvas`` then holds the labels too.

    Spots that need a label come first; ordinary ones that would lie as close to such a label as its own
    station go without. Then the ordinary ones with least room. None in all where a needed label does not fit.
    """
    taken = canvas.occupied()
    placed: dict[str, Label | None] = {}
    alive = [spot for spot in spots if spot.needed]
    for needed in (True, False):
        wanting = [spot for spot in alive if spot.needed == needed]
        options = [
            [label for label in _candidates(spot, font_px) if _fits(label, taken, canvas.size)] for spot in wanting
        ]
        for i in sorted(range(len(wanting)), key=lambda i: len(options[i])):
            spot = wanting[i]
            chosen = next(
                (label for label in options[i] if _fits(label, taken, canvas.size) and not _rivals(label, spot, alive)),
                None,
            )
            if needed and chosen is None:
                return None
            placed[spot.name] = chosen
            if chosen is not None:
                size = (chosen.size[0] + 12, chosen.size[1] + 4)
                canvas.polygon(Label((), chosen.centre, size, chosen.angle, "", False).corners())
                taken = canvas.occupied()
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


@lru_cache(maxsize=4096)
def _text_size(lines: tuple[str, ...], font_px: int, bold: bool) -> tuple[float, float]:
    font = map_font(font_px, bold)
    return max(font.getlength(line) for line in lines), font_px * (1.18 * len(lines) - 0.12)


def _splits(name: str) -> list[tuple[str, ...]]:
    """The name in one line, and in two where it has a space."""
    words = name.split()
    if len(words) == 1:
        return [(name,)]
    cut = min(range(1, len(words)), key=lambda i: abs(len(" ".join(words[:i])) - len(" ".join(words[i:]))))
    return [(name,), (" ".join(words[:cut]), " ".join(words[cut:]))]


def _candidates(spot: Spot, font_px: int) -> list[Label]:
    """Possible labels, best first: beside steep track, above or below flat track, slanted where it is crowded."""
    gap = spot.room + _GAP_PX
    x, y = float(spot.position[0]), float(spot.position[1])
    flat = abs(spot.tangent[0]) > 0.85
    found: list[tuple[float, Label]] = []

    def offer(cost: float, lines: tuple[str, ...], dx: float, dy: float, angle: float, align: str) -> None:
        size = _text_size(lines, font_px, spot.bold)
        found.append((cost, Label(lines, (x + dx, y + dy), size, angle, align, spot.bold)))

    for lines in _splits(spot.name):
        w, h = _text_size(lines, font_px, spot.bold)
        two = 0.6 * (len(lines) - 1)
        side, corner = (2.0, 1.2) if flat else (0.0, 1.0)
        offer(side + two, lines, gap + w / 2, 0, 0, "left")
        offer(side + 0.3 + two, lines, -gap - w / 2, 0, 0, "right")
        near = 0.72 * gap
        for sx, align in ((1, "left"), (-1, "right")):
            for sy in (-1, 1):
                offer(corner + two + 0.1 * (sx < 0), lines, sx * (near + w / 2), sy * (near + h / 2), 0, align)
        for sy, cost in ((-1, 0.0), (1, 0.1)):
            offer(cost + (0.0 if flat else 1.5) + 0.3 * two, lines, 0, sy * (gap + h / 2), 0, "centre")
            for sx in (1, -1):
                slide = 0.5 if flat else 2.0
                offer(
                    cost + slide + two,
                    lines,
                    sx * (w / 2 - 8),
                    sy * (gap + h / 2),
                    0,
                    "left" if sx > 0 else "right",
                )
        if spot.needed:  # between two lines that cross at 45 degrees there is room only a little further out
            for sx, align in ((1, "left"), (-1, "right")):
                for sy in (-1, 1):
                    offer(3 + two, lines, sx * (gap + 22 + w / 2), sy * (10 + h / 2), 0, align)
        if len(lines) > 1:
            continue
        reach = gap + w / 2
        for angle, cost in ((45.0, 1.6), (-45.0, 2.4), (90.0, 4.0)):
            along = np.array([1.0, 0.0]) @ _rotation(angle)
            offer(cost, lines, float(along[0]) * reach, float(along[1]) * reach, angle, "left")
            offer(cost + 0.2, lines, -float(along[0]) * reach, -float(along[1]) * reach, angle, "right")
    return [label for _, label in sorted(found, key=lambda pair: pair[0])]


@lru_cache(maxsize=4096)
def _grid(size: tuple[float, float], angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Points over the rotated box about its centre, in cells [K, 2], and half its extent in pixels [2]."""
    columns = np.linspace(-0.5, 0.5, max(2, int(size[0] / 4) + 1)) * size[0]
    rows = np.linspace(-0.5, 0.5, max(2, int(size[1] / 4) + 1)) * size[1]
    points = np.stack(np.meshgrid(columns, rows), axis=-1).reshape(-1, 2) @ _rotation(angle)
    return points / _CELL, points.max(axis=0)


def _fits(label: Label, taken: np.ndarray, size: tuple[int, int]) -> bool:
    points, (half_w, half_h) = _grid(label.size, label.angle)
    x, y = label.centre
    if x - half_w < _MARGIN_PX or x + half_w > size[0] - _MARGIN_PX:
        return False
    if y - half_h < _MARGIN_PX or y + half_h > size[1] - _MARGIN_PX:
        return False
    cells = (points + np.array([x, y]) / _CELL).astype(np.intp)
    return not bool(taken[cells[:, 1], cells[:, 0]].any())


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
