"""Draws full-size maps from their geometry: areas, track, markers, labels, badges, legend."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from rewardmap.transit.labels import map_font
from rewardmap.transit.styles import STYLES, Style, badge_text

_SCALE = 2
"""Strokes and markers are drawn this much larger and averaged down; text is drawn at its own size."""


def render(geometry: dict[str, Any]) -> Image.Image:
    """The picture of a map, RGB. ``geometry`` is what ``compose`` made, or the same read back from JSON."""
    style = STYLES[geometry["style"]]
    width, height = geometry["size"]
    picture = Image.new("RGB", (width * _SCALE, height * _SCALE), style.background)
    pen = ImageDraw.Draw(picture)
    for area in geometry["areas"]:
        points = [(x * _SCALE, y * _SCALE) for x, y in area["points"]]
        colour = {"water": style.water, "park": style.park, "zone": style.zone}[area["kind"]]
        if area["width"]:
            _stroke(pen, points, colour, area["width"] * _SCALE)
        else:
            pen.polygon(points, fill=colour)
    for track in geometry["lines"]:
        curves = [[(x * _SCALE, y * _SCALE) for x, y in curve] for curve in track["polylines"]]
        for points in curves:
            _stroke(pen, points, style.background, (style.stroke + 5) * _SCALE, caps=False)
        for points in curves:
            _stroke(pen, points, track["colour"], style.stroke * _SCALE)
    _join_at_interchanges(pen, style, geometry)
    for station in geometry["stations"]:
        _marker(pen, style, station)
    for box in geometry["panels"]:
        x0, y0, x1, y1 = (value * _SCALE for value in box)
        pen.rounded_rectangle((x0, y0, x1, y1), 10 * _SCALE, fill=style.panel)
    for badge in geometry["badges"]:
        x, y, r = badge["x"] * _SCALE, badge["y"] * _SCALE, badge["radius"] * _SCALE
        pen.rounded_rectangle((x - r, y - r, x + r, y + r), r * 0.45, fill=badge["colour"])
    picture = picture.reduce(_SCALE)
    _texts(picture, style, geometry)
    return picture


def _join_at_interchanges(pen: ImageDraw.ImageDraw, style: Style, geometry: dict[str, Any]) -> None:
    """Draws the track next to interchanges again without its edge, which there would cut the lines that it meets."""
    hubs = [station for station in geometry["stations"] if station["kind"] == "interchange"]
    for track in geometry["lines"]:
        for curve in track["polylines"]:
            points = np.array(curve)
            for hub in hubs:
                gaps = np.abs(points - (hub["x"], hub["y"])).max(axis=1)
                if gaps.min() < style.stroke:
                    near = np.flatnonzero(gaps < hub["radius"] + 10)
                    for run in np.split(near, np.flatnonzero(np.diff(near) > 1) + 1):
                        if len(run) > 1:
                            piece = [(float(x) * _SCALE, float(y) * _SCALE) for x, y in points[run]]
                            pen.line(piece, fill=track["colour"], width=round(style.stroke * _SCALE), joint="curve")


def _stroke(
    pen: ImageDraw.ImageDraw, points: list[tuple[float, float]], colour: Any, width: float, caps: bool = True
) -> None:
    pen.line(points, fill=colour, width=round(width), joint="curve")
    r = width / 2
    for x, y in (points[0], points[-1]) if caps else ():
        pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)


def _disc(pen: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: str) -> None:
    pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)


def _capsule(pen: ImageDraw.ImageDraw, ends: list[tuple[float, float]], r: float, fill: str) -> None:
    pen.line(ends, fill=fill, width=round(2 * r))
    for x, y in ends:
        _disc(pen, x, y, r, fill)


def _marker(pen: ImageDraw.ImageDraw, style: Style, station: dict[str, Any]) -> None:
    s = _SCALE
    x, y, r = station["x"] * s, station["y"] * s, station["radius"] * s
    tx, ty = station["tangent"]
    low, high = station["lanes"][0] * s, station["lanes"][-1] * s
    ends = [(x - ty * low, y + tx * low), (x - ty * high, y + tx * high)]
    paper = "#ffffff"
    dark = "#14181d"
    if station["kind"] == "interchange":
        rim = 2.6 * s
        if style.hub == "disc":
            _capsule(pen, ends, r, paper)
            _capsule(pen, ends, r - rim * 0.7, dark)
            _capsule(pen, ends, r - rim * 2, paper)
        else:
            _capsule(pen, ends, r, dark)
            _capsule(pen, ends, r - rim, paper)
            if style.hub == "double":
                _capsule(pen, ends, r * 0.32, dark)
        return
    if station["kind"] == "terminal" or style.marker == "ring":
        _capsule(pen, ends, r, dark)
        _capsule(pen, ends, r - 1.8 * s, paper)
    elif style.marker == "dot":
        _capsule(pen, ends, r, paper)
    elif style.marker == "pip":
        _capsule(pen, ends, r, dark)
        _capsule(pen, ends, r - 1.4 * s, paper)
    else:
        half = (style.stroke / 2 + 6) * s
        colour = station["colour"]
        side = station["side"]
        stub = [(x - ty * (low if side < 0 else high), y + tx * (low if side < 0 else high))]
        stub.append((stub[0][0] - ty * half * side, stub[0][1] + tx * half * side))
        pen.line(stub, fill=colour, width=round(6 * s))


def _texts(picture: Image.Image, style: Style, geometry: dict[str, Any]) -> None:
    pen = ImageDraw.Draw(picture)
    for label in geometry["labels"]:
        font = map_font(style.font_px, label["bold"])
        text = "\n".join(label["lines"])
        anchor = {"left": "lm", "right": "rm", "centre": "mm"}[label["align"]]
        w, h = label["box"]
        x, y = label["centre"]
        shift = {"left": -w / 2, "right": w / 2, "centre": 0.0}[label["align"]]
        align = label["align"].replace("centre", "center")
        if not label["angle"]:
            pen.multiline_text((x + shift, y), text, style.ink, font, anchor, spacing=style.font_px * 0.02, align=align)
            continue
        pad = 4
        mask = Image.new("L", (round(w) + 2 * pad, round(h) + 2 * pad))
        ImageDraw.Draw(mask).text((mask.width / 2, mask.height / 2), text, 255, font, "mm")
        mask = mask.rotate(label["angle"], Image.Resampling.BICUBIC, expand=True)
        picture.paste(style.ink, (round(x - mask.width / 2), round(y - mask.height / 2)), mask)
    for badge in geometry["badges"]:
        font = map_font(round(badge["radius"] * 1.25), True)
        pen.text((badge["x"], badge["y"]), badge_text(badge["line"]), badge["ink"], font, "mm")
    for text in geometry["texts"]:
        colour = style.ink
        pen.text((text["x"], text["y"]), text["text"], colour, map_font(text["px"], text["bold"]), text["anchor"])
