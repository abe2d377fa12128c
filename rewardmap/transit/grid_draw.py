"""Draws warehouse floors: shelves, lanes in their aisle's colour, arrowheads on one-way aisles, numbered bays."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rewardmap.transit.fonts import map_font
from rewardmap.transit.graph import Network
from rewardmap.transit.grid_floor import BAY_PX, LANE_PX

_SCALE = 4
_INK = "#16181d"
_CONCRETE = "#f3efe6"
_SHELF, _SHELF_EDGE = "#b4b9c1", "#878d97"
_CRATES = (
    *(("#c8a878", "#9c8053"), ("#d7bd92", "#a98f62"), ("#b59264", "#8a6c43")),
    *(("#d3d8de", "#98a0a9"), ("#c9ced6", "#969da7"), ("#a3b8c9", "#7d92a4")),
)
"""Fill and edge of what lies on the shelves."""

Point = tuple[float, float]


def draw_grid(network: Network) -> Image.Image:
    """The floor's picture, RGB, ``network.size`` pixels."""
    return _draw_tiny(network) if network.style == "grid-tiny" else _draw_floor(network)


def _draw_tiny(network: Network) -> Image.Image:
    s, cell = _SCALE, 28
    picture = Image.new("RGB", (network.size[0] * s, network.size[1] * s), _CONCRETE)
    pen = ImageDraw.Draw(picture)
    at = {stop: (x * s, y * s) for stop, (x, y) in network.positions.items()}
    lanes = {
        (round(x / s), round(y / s))
        for line in network.lines
        for a, b in pairwise(line.stations)
        for x, y in np.linspace(at[a], at[b], 1 + round(_length(at[a], at[b]) / (cell * s)))
    }
    for column in range(cell // 2, network.size[0], cell):
        for row in range(cell // 2, network.size[1], cell):
            if (column, row) not in lanes:
                _rack(pen, column * s, row * s, 12 * s)
    shared = {stop for stop in network.stations if len(network.lines_through(stop)) > 1}
    for line in network.lines:
        points = [at[stop] for stop in line.stations]
        if line.stations[0] not in shared:
            points[0] = _beyond(points[1], points[0], 13 * s)
        if line.stations[-1] not in shared:
            points[-1] = _beyond(points[-2], points[-1], 13 * s)
        pen.line(points, fill=line.colour, width=17 * s, joint="curve")
    for line in network.lines:
        for a, b in pairwise(line.stations if line.one_way else ()):
            _arrow(pen, at[a], at[b], 4.2 * s, 5.6 * s, "#ffffff")
    for stop, (x, y) in at.items():
        half = 9.5 * s
        pen.rounded_rectangle(
            (x - half, y - half, x + half, y + half), 3 * s, "#ffffff", _INK, 10 if stop in shared else 5
        )
        letter = stop.removesuffix(" Station")
        font = ImageFont.load_default(size=14 * s)
        pen.text((x, y), letter, fill="black", font=font, anchor="mm", stroke_width=1, stroke_fill="black")
    return picture.resize(network.size, Image.Resampling.LANCZOS)


def _rack(pen: ImageDraw.ImageDraw, x: float, y: float, half: float) -> None:
    """One cell of shelves, seen from above: two boards back to back."""
    pen.rectangle((x - half, y - half, x + half, y + half), _SHELF, _SHELF_EDGE, _SCALE)
    pen.line(((x - half, y), (x + half, y)), _SHELF_EDGE, _SCALE)
    pen.line(((x, y - half), (x, y + half)), _SHELF_EDGE, _SCALE)


def _draw_floor(network: Network) -> Image.Image:
    s = 2
    floor = cast(dict[str, Any], network.extras["geometry"])
    picture = Image.new("RGB", (network.size[0] * s, network.size[1] * s), "#dfe3e6")
    pen = ImageDraw.Draw(picture)
    rng = np.random.default_rng(floor["crates"])
    x0, y0, x1, y1 = (value * s for value in floor["wall"])
    pen.rectangle((x0, y0, x1, y1), _CONCRETE, "#3b4048", 7 * s)
    for x in floor["docks"]:
        _dock(pen, x * s, y1, s)
    for box in floor["shelves"]:
        _block(pen, tuple(value * s for value in box), s, rng)
    tracks = [(line, [(x * s, y * s) for x, y in line["polylines"][0]]) for line in floor["lines"]]
    for _, points in tracks:
        pad = LANE_PX * s / 2 + 7 * s
        (ax, ay), (bx, by) = sorted(points)
        pen.rounded_rectangle((ax - pad, ay - pad, bx + pad, by + pad), 8 * s, _CONCRETE)
    for line, points in tracks:
        pen.line(points, _tint(line["colour"], 0.74), LANE_PX * s)
    for line, points in tracks:
        pen.line(points, line["colour"], 7 * s)
    for line in floor["lines"]:
        stops = [(network.positions[stop][0] * s, network.positions[stop][1] * s) for stop in line["stops"]]
        for a, b in pairwise(stops if line["one_way"] else ()):
            _arrow(pen, a, b, 10 * s, 14 * s, line["colour"])
    shared = {stop for stop in network.stations if len(network.lines_through(stop)) > 1}
    colour = {stop: line["colour"] for line in floor["lines"] for stop in line["stops"]}
    for stop, (x, y) in network.positions.items():
        w, h = BAY_PX[0] * s / 2, BAY_PX[1] * s / 2
        box = (x * s - w, y * s - h, x * s + w, y * s + h)
        edge = (_INK, 3 * s) if stop in shared else (colour[stop], 2 * s)
        pen.rounded_rectangle(box, 6 * s, "#ffffff", *edge)
    for badge in floor["badges"]:
        _sign(pen, badge["x"] * s, badge["y"] * s, badge["colour"], s)
    _legend_shapes(pen, floor, s)
    picture = picture.reduce(s)
    _texts(picture, network, floor)
    return picture


def _block(pen: ImageDraw.ImageDraw, box: tuple[float, ...], s: int, rng: np.random.Generator) -> None:
    """Racks back to back, upright, with goods on some of their shelves."""
    x0, y0, x1, y1 = box
    pen.rectangle((x0, y0, x1, y1), _SHELF, _SHELF_EDGE, s)
    columns = max(2, 2 * round((x1 - x0) / (64 * s)))
    rows = max(1, round((y1 - y0) / (27 * s)))
    xs, ys = np.linspace(x0, x1, columns + 1), np.linspace(y0, y1, rows + 1)
    for i, (a, c) in enumerate(pairwise(xs)):
        for b, d in pairwise(ys):
            if rng.random() < 0.55:
                w, h = (c - a) * rng.uniform(0.5, 0.72) / 2, (d - b) * rng.uniform(0.5, 0.72) / 2
                x, y = (a + c) / 2, (b + d) / 2
                fill, edge = _CRATES[int(rng.integers(len(_CRATES)))]
                pen.rectangle((x - w, y - h, x + w, y + h), fill, edge, s)
            pen.line(((a, b), (c, b)), _SHELF_EDGE, s)
        pen.line(((a, y0), (a, y1)), _SHELF_EDGE, 3 * s if i and i % 2 == 0 else s)


def _dock(pen: ImageDraw.ImageDraw, x: float, wall: float, s: int) -> None:
    """A gate in the lower wall and hazard stripes before it."""
    half, deep = 34 * s, 9 * s
    pen.rectangle((x - half, wall - 7 * s, x + half, wall), "#ffffff", "#3b4048", s)
    for k in range(1, 4):
        pen.line(((x - half, wall - 7 * s * k / 4), (x + half, wall - 7 * s * k / 4)), "#9aa1aa", s)
    for at in np.arange(x - half, x + half - deep / 2, 2 * deep):
        foot, head = wall - 8 * s, wall - 8 * s - deep
        end = min(at + deep, x + half)
        pen.polygon(((at, foot), (end, foot), (min(end + deep / 2, x + half), head), (at + deep / 2, head)), "#f0b429")
    pen.rectangle((x - half, wall - 8 * s - deep, x + half, wall - 8 * s), None, "#f0b429", s)


def _sign(pen: ImageDraw.ImageDraw, x: float, y: float, colour: str, s: int) -> None:
    half = 15 * s
    pen.rounded_rectangle((x - half, y - half, x + half, y + half), 5 * s, colour, "#ffffff", 2 * s)


def _legend_shapes(pen: ImageDraw.ImageDraw, floor: dict[str, Any], s: int) -> None:
    x0, y0, x1, y1 = (value * s for value in floor["legend"])
    pen.rounded_rectangle((x0, y0, x1, y1), 10 * s, "#ffffff", "#b9bfc6", s)
    for at, line in enumerate(floor["lines"]):
        y = y0 + (74 + 40 * at) * s
        _sign(pen, x0 + 34 * s, y, line["colour"], s)
        ends = ((x1 - 62 * s, y), (x1 - 24 * s, y))
        pen.line(ends, line["colour"], 5 * s)
        heads = [ends[1]] if line["one_way"] else [*ends]
        for x, _ in heads:
            way = 1 if x == ends[1][0] else -1
            pen.polygon(
                ((x - way * 6 * s, y - 8 * s), (x - way * 6 * s, y + 8 * s), (x + way * 7 * s, y)),
                line["colour"],
            )
    y = y1 - 92 * s
    pen.line(((x0 + 18 * s, y), (x1 - 18 * s, y)), "#d4d8dc", s)
    for at, edge in enumerate((("#7d848e", 2 * s), (_INK, 3 * s))):
        x, y = x0 + 40 * s, y1 - (62 - 36 * at) * s
        w, h = BAY_PX[0] * s / 2, BAY_PX[1] * s / 2
        pen.rounded_rectangle((x - w, y - h, x + w, y + h), 6 * s, "#ffffff", *edge)


def _texts(picture: Image.Image, network: Network, floor: dict[str, Any]) -> None:
    pen = ImageDraw.Draw(picture)
    number = map_font(15, True)
    for stop, place in network.positions.items():
        pen.text(place, stop.removeprefix("Bay "), _INK, number, "mm")
    for badge in floor["badges"]:
        pen.text((badge["x"], badge["y"]), badge["text"], "#ffffff", map_font(18, True), "mm")
    x0, y0, _, y1 = floor["wall"]
    pen.text((x0, y0 - 14), floor["title"], _INK, map_font(26, True), "ls")
    for at, x in enumerate(floor["docks"], start=1):
        pen.text((x, y1 + 18), f"Dock {at}", "#4a505a", map_font(15), "mm")
    a, b, _, d = floor["legend"]
    pen.text((a + 18, b + 30), "Aisles", _INK, map_font(19, True), "lm")
    for at, line in enumerate(floor["lines"]):
        y = b + 74 + 40 * at
        pen.text((a + 34, y), line["name"].split()[-1], "#ffffff", map_font(18, True), "mm")
        pen.text((a + 60, y), line["name"], _INK, map_font(16), "lm")
    for at, text in enumerate(("Bay", "Crossing")):
        y = d - 62 + 36 * at
        pen.text((a + 40, y), "000", "#7d848e", number, "mm")
        pen.text((a + 74, y), text, _INK, map_font(16), "lm")


def _length(a: Point, b: Point) -> float:
    return float(np.hypot(b[0] - a[0], b[1] - a[1]))


def _beyond(a: Point, b: Point, by: float) -> Point:
    """``b`` moved on, away from ``a``."""
    way = by / _length(a, b)
    return b[0] + (b[0] - a[0]) * way, b[1] + (b[1] - a[1]) * way


def _arrow(pen: ImageDraw.ImageDraw, a: Point, b: Point, half: float, length: float, fill: str) -> None:
    """An arrowhead in the middle between two places."""
    (x, y), long = ((a[0] + b[0]) / 2, (a[1] + b[1]) / 2), _length(a, b)
    ux, uy = (b[0] - a[0]) / long, (b[1] - a[1]) / long
    tail = (x - ux * length / 2, y - uy * length / 2)
    tip = (x + ux * length / 2, y + uy * length / 2)
    pen.polygon(((tail[0] - uy * half, tail[1] + ux * half), (tail[0] + uy * half, tail[1] - ux * half), tip), fill)


def _tint(colour: str, white: float) -> tuple[int, int, int]:
    red, green, blue = (round(int(colour[i : i + 2], 16) * (1 - white) + 255 * white) for i in (1, 3, 5))
    return red, green, blue
