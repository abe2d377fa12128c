"""Draws what is no part of a network: another operator's railway, compass, square code, timetable and small signs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import ImageDraw

from rewardmap.transit.styles import Style

_DASH_PX = 16.0
_SIGN_COLOUR = {"plane": "#5b6f86", "tree": "#5f8a5a", "cross": "#a85a5a", "parking": "#5a78a8", "boat": "#4f8799"}


def draw_rail(pen: ImageDraw.ImageDraw, points: Sequence[tuple[float, float]], style: Style, width: float) -> None:
    """A railway that is no line of the network: a pale stroke with gaps in the colour of the paper."""
    along = np.array(points)
    steps = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(along, axis=0).T))])
    dash = _DASH_PX * width / 4
    for start in np.arange(0.0, steps[-1], 2 * dash):
        at = np.linspace(start, min(start + dash, steps[-1]), 6)
        piece = np.stack([np.interp(at, steps, along[:, axis]) for axis in (0, 1)], axis=1)
        pen.line([(float(x), float(y)) for x, y in piece], fill=style.rail, width=round(width))


def draw_distractor(pen: ImageDraw.ImageDraw, piece: dict[str, Any], style: Style, scale: int) -> None:
    """One piece of ``scenery.corner_pieces`` or ``scenery.signs``, at ``scale`` pixels per pixel of the picture."""
    x, y = piece["x"] * scale, piece["y"] * scale
    if piece["kind"] == "qr":
        _square_code(pen, piece["cells"], x, y, piece["width"] * scale)
    elif piece["kind"] == "compass":
        _compass(pen, style, x, y, piece["width"] * scale, piece["height"] * scale)
    elif piece["kind"] == "timetable":
        box = (x, y, x + piece["width"] * scale, y + piece["height"] * scale)
        pen.rounded_rectangle(box, 8 * scale, fill=style.panel, outline=style.rail, width=2 * scale)
        rule = (x + 12 * scale, y + 33 * scale, box[2] - 12 * scale, y + 33 * scale)
        pen.line(rule, fill=style.rail, width=2 * scale)
    else:
        _sign(pen, piece["kind"], x, y, piece["radius"] * scale)


def _square_code(pen: ImageDraw.ImageDraw, cells: Sequence[str], x: float, y: float, side: float) -> None:
    cell = side / len(cells)
    pad = 2 * cell
    pen.rectangle((x - pad, y - pad, x + side + pad, y + side + pad), fill="#ffffff")
    for row, line in enumerate(cells):
        for column, mark in enumerate(line):
            if mark == "#":
                left, top = x + column * cell, y + row * cell
                pen.rectangle((left, top, left + cell - 1, top + cell - 1), fill="#111111")
    for column, row in ((0, 0), (len(cells) - 7, 0), (0, len(cells) - 7)):
        for inset, colour in ((-1, "#ffffff"), (0, "#111111"), (1, "#ffffff"), (2, "#111111")):
            left, top = x + (column + inset) * cell, y + (row + inset) * cell
            wide = (7 - 2 * inset) * cell - 1
            if inset >= 0:
                pen.rectangle((left, top, left + wide, top + wide), fill=colour)
            else:  # the quiet zone, only where it lies inside
                inner = (max(left, x), max(top, y), min(left + wide, x + side - 1), min(top + wide, y + side - 1))
                pen.rectangle(inner, fill=colour)


def _compass(pen: ImageDraw.ImageDraw, style: Style, x: float, y: float, wide: float, high: float) -> None:
    middle, centre, reach = x + wide / 2, y + high * 0.6, high * 0.36
    thin = reach * 0.26
    for (u, v), fill in (((0, -1), style.ink), ((1, 0), style.rail), ((0, 1), style.rail), ((-1, 0), style.rail)):
        tip = (middle + u * reach, centre + v * reach)
        sides = [(middle + (u + v) * thin, centre + (v - u) * thin), (middle + (u - v) * thin, centre + (v + u) * thin)]
        pen.polygon([tip, sides[0], (middle, centre), sides[1]], fill=fill)
    w, top, tall = wide * 0.075, y, high * 0.17
    stem = max(2, round(w * 0.8))
    north = [(middle - w, top + tall), (middle - w, top), (middle + w, top + tall), (middle + w, top)]
    pen.line(north, fill=style.ink, width=stem, joint="curve")


def _sign(pen: ImageDraw.ImageDraw, kind: str, x: float, y: float, r: float) -> None:
    pen.rounded_rectangle((x - r, y - r, x + r, y + r), r * 0.3, fill=_SIGN_COLOUR[kind])
    white = "#ffffff"
    u = r / 9

    def shape(*points: tuple[float, float]) -> None:
        pen.polygon([(x + a * u, y + b * u) for a, b in points], fill=white)

    if kind == "plane":
        shape((0, -7), (1.4, -4), (1.4, 5), (0, 7), (-1.4, 5), (-1.4, -4))
        shape((0, -2.5), (7, 2.5), (7, 4), (0, 1.5), (-7, 4), (-7, 2.5))
        shape((0, 4), (3, 6.4), (3, 7.2), (0, 6.2), (-3, 7.2), (-3, 6.4))
    elif kind == "tree":
        shape((0, -7), (5, 2.5), (-5, 2.5))
        shape((-1, 2), (1, 2), (1, 6.5), (-1, 6.5))
    elif kind == "cross":
        shape((-1.9, -6), (1.9, -6), (1.9, 6), (-1.9, 6))
        shape((-6, -1.9), (6, -1.9), (6, 1.9), (-6, 1.9))
    elif kind == "parking":
        shape((-4, -6.5), (-1.6, -6.5), (-1.6, 6.5), (-4, 6.5))
        pen.ellipse((x - 2.5 * u, y - 6.5 * u, x + 5.2 * u, y + 1.6 * u), fill=white)
        pen.ellipse((x - 1.6 * u, y - 4.2 * u, x + 2.7 * u, y - 0.7 * u), fill=_SIGN_COLOUR[kind])
    else:
        shape((-7, 2), (7, 2), (4, 6), (-4, 6))
        shape((-0.8, -6.5), (0.6, -6.5), (0.6, 1), (-0.8, 1))
        shape((1.2, -5.5), (5.5, 0.6), (1.2, 0.6))
