"""Draws full-size maps from their geometry: areas, track, markers, labels, badges, legend."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from rewardmap.transit.fonts import map_font
from rewardmap.transit.labels import LINE_HEIGHT
from rewardmap.transit.ornaments import draw_distractor, draw_rail
from rewardmap.transit.styles import STYLES, Style

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
        if area["kind"] == "rail":
            draw_rail(pen, points, style, area["width"] * _SCALE)
            continue
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
        x, y = badge["x"] * _SCALE, badge["y"] * _SCALE
        w, h = (half * _SCALE for half in badge["half"])
        corner = h * {"square": 0.45, "disc": 1.0, "pill": 0.6}[badge["shape"]]
        pen.rounded_rectangle((x - w, y - h, x + w, y + h), corner, fill=badge["colour"])
    for piece in geometry["distractors"]:
        draw_distractor(pen, piece, style, _SCALE)
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


def _dumb_bell(
    pen: ImageDraw.ImageDraw, ends: list[tuple[float, float]], r: float, rim: float, dark: str, paper: str
) -> None:
    """A ring at each end and a neck between them, open inside."""
    for radius, neck, fill in ((r, 0.62 * r, dark), (r - rim, 0.62 * r - 0.7 * rim, paper)):
        pen.line(ends, fill=fill, width=round(2 * neck))
        for x, y in ends:
            _disc(pen, x, y, radius, fill)


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
        if style.link == "dumb-bell" and high - low > r:
            _dumb_bell(pen, ends, 0.72 * r, 0.8 * rim, dark, paper)
            return
        if style.hub == "disc":
            _capsule(pen, ends, r, paper)
            _capsule(pen, ends, r - rim * 0.7, dark)
            _capsule(pen, ends, r - rim * 2, paper)
        else:
            _capsule(pen, ends, r, dark)
            _capsule(pen, ends, r - rim, paper)
            if style.hub == "double":
                _capsule(pen, ends, r * 0.32, dark)
            elif style.hub == "target":
                _capsule(pen, ends, r * 0.56, dark)
                _capsule(pen, ends, r * 0.3, paper)
        return
    if station["kind"] == "terminal" or style.marker == "ring":
        _capsule(pen, ends, r, dark)
        _capsule(pen, ends, r - 1.8 * s, paper)
    elif style.marker == "pearl":
        _capsule(pen, ends, r, dark if len(set(station["lanes"])) > 1 else station["colour"])
        _capsule(pen, ends, r - 2.2 * s, paper)
    elif style.marker == "dot":
        _capsule(pen, ends, r, paper)
    elif style.marker == "pip":
        _capsule(pen, ends, r, dark)
        _capsule(pen, ends, r - 1.4 * s, paper)
    elif style.marker == "bar":
        reach = (style.stroke / 2 + 4) * s
        tips = [(x - ty * (low - reach), y + tx * (low - reach)), (x - ty * (high + reach), y + tx * (high + reach))]
        pen.line(tips, fill=style.ink, width=round(5 * s))
    else:
        half = (style.stroke / 2 + 6) * s
        colour = station["colour"]
        side = station["side"]
        stub = [(x - ty * (low if side < 0 else high), y + tx * (low if side < 0 else high))]
        stub.append((stub[0][0] - ty * half * side, stub[0][1] + tx * half * side))
        pen.line(stub, fill=colour, width=round(6 * s))


def _texts(picture: Image.Image, style: Style, geometry: dict[str, Any]) -> None:
    pen, family = ImageDraw.Draw(picture), geometry["family"]
    for label in geometry["labels"]:
        x, y = label["centre"]
        w, h = label["box"]
        if not label["angle"]:
            _label(pen, label, (x, y), style.ink, family)
            continue
        pad = 4
        mask = Image.new("L", (round(w) + 2 * pad, round(h) + 2 * pad))
        _label(ImageDraw.Draw(mask), label, (mask.width / 2, mask.height / 2), 255, family)
        mask = mask.rotate(label["angle"], Image.Resampling.BICUBIC, expand=True)
        picture.paste(style.ink, (round(x - mask.width / 2), round(y - mask.height / 2)), mask)
    for badge in geometry["badges"]:
        pen.text((badge["x"], badge["y"]), badge["text"], badge["ink"], map_font(badge["px"], True, family), "mm")
    for text in geometry["texts"]:
        face = map_font(text["px"], text["bold"], family)
        pen.text((text["x"], text["y"]), text["text"], style.ink, face, text["anchor"])
    for piece in geometry["distractors"]:
        for row, cells in enumerate(piece.get("rows", [])):
            for x, cell in zip((12, 92, 144), cells, strict=True):
                at = (piece["x"] + x, piece["y"] + 46 + 24 * row)
                pen.text(at, cell, style.ink, map_font(14, False, family), "lm")
        if "rows" in piece:
            for x, head in ((92, "First"), (144, "Last")):
                pen.text((piece["x"] + x, piece["y"] + 20), head, style.ink, map_font(14, True, family), "lm")


def _label(pen: ImageDraw.ImageDraw, label: dict[str, Any], at: tuple[float, float], ink: Any, family: str) -> None:
    """A label's text lines about ``at``, each at its own size."""
    w, h = label["box"]
    x = at[0] + {"left": -w / 2, "right": w / 2, "centre": 0.0}[label["align"]]
    anchor = {"left": "lm", "right": "rm", "centre": "mm"}[label["align"]]
    y = at[1] - h / 2
    for text, px in zip(label["lines"], label["px"], strict=True):
        pen.text((x, y + px * (LINE_HEIGHT - 0.12) / 2), text, ink, map_font(px, label["bold"], family), anchor)
        y += px * LINE_HEIGHT
