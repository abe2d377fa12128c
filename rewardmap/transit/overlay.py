"""Lays a route or some stations over a map: the rest fades, what is meant stays in colour, numbered pins mark stops."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import numpy as np
from PIL import Image, ImageDraw

from rewardmap.transit.draw import draw_map, font
from rewardmap.transit.fonts import map_font
from rewardmap.transit.graph import Leg, Network
from rewardmap.transit.grid_floor import LANE_PX
from rewardmap.transit.styles import STYLES

_FADE = 0.72
_ON_TRACK_PX = 16.0


def draw_route(network: Network, legs: Sequence[Leg]) -> Image.Image:
    """The map with a route laid over it, RGB, ``network.size`` pixels.

    Legs are drawn as given, right or wrong: over stops that are not neighbours on the line a leg runs straight,
    dashed in red. Raises ValueError for a network without a picture, and for an unknown line or station.
    """
    for leg in legs:
        known = {line.name for line in network.lines}
        if leg.line not in known:
            raise ValueError(f"{network.network_id}: no line {leg.line!r}; the map has {', '.join(sorted(known))}")
    pins = [leg.departure for leg in legs] + [leg.arrival for leg in legs[-1:]]
    return _laid_over(network, [(leg.line, (leg.departure, *leg.via, leg.arrival)) for leg in legs], pins)


def draw_stops(network: Network, stops: Sequence[str], lines: Sequence[str] = ()) -> Image.Image:
    """The map with stations marked by numbered pins, and whole lines left in colour; else as ``draw_route``."""
    tracks = [(name, service) for name in lines for service in network.line(name).services()]
    return _laid_over(network, [*tracks, *(("", (stop,)) for stop in stops)], stops)


def with_caption(picture: Image.Image, text: str) -> Image.Image:
    """The picture with lines of text on a strip below it, broken to the picture's width."""
    size = 12 if picture.width < 600 else 22
    family = "han" if any(character > "\u2e80" for character in text) else "inter"
    face, gap = map_font(size, family=family), size // 2
    rows: list[str] = []
    for paragraph in text.split("\n"):
        row = ""
        for word in paragraph.split(" "):
            longer = f"{row} {word}".strip()
            if row and face.getlength(longer) > picture.width - 4 * gap:
                rows.append(row)
                longer = word
            row = longer
        rows.append(row)
    height = len(rows) * (size + gap) + 3 * gap
    framed = Image.new("RGB", (picture.width, picture.height + height), "#ffffff")
    framed.paste(picture)
    pen = ImageDraw.Draw(framed)
    for number, row in enumerate(rows):
        pen.text((2 * gap, picture.height + 2 * gap + number * (size + gap)), row, fill="#111111", font=face)
    return framed


def _laid_over(network: Network, tracks: Sequence[tuple[str, Sequence[str]]], pins: Sequence[str]) -> Image.Image:
    """The faded map with (line, stops) tracks in colour, their stations and names, and pins numbered from 1."""
    if not network.positions:
        raise ValueError(f"network {network.network_id!r} has no picture to draw on")
    for stop in (*(stop for _, stops in tracks for stop in stops), *pins):
        if stop not in network.positions:
            raise ValueError(f"{network.network_id}: no station {stop!r}")
    picture = draw_map(network)
    veil = Image.new("RGB", picture.size, cast(tuple[int, int, int], picture.getpixel((1, 1))))
    faded = Image.blend(picture, veil, _FADE)
    tiny = not _geometry(network)
    width = 10.0 if tiny else LANE_PX if network.style == "grid" else STYLES[network.style].stroke + 5.0
    wrong: list[tuple[np.ndarray, float]] = []
    shown = Image.new("L", picture.size)
    pen = ImageDraw.Draw(shown)
    for line, stops in tracks:
        for a, b in pairwise(stops):
            if not _neighbours(network, line, a, b):
                wrong.append((np.array([network.positions[a], network.positions[b]]), max(3.0, width / 3)))
                continue
            pen.line([tuple(point) for point in track(network, line, a, b)], fill=255, width=round(width))
        for stop in stops:
            x, y = network.positions[stop]
            r = 11.5 if tiny else 13.0
            pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
        for label in _labels(network):
            if label["station"] in stops:
                pen.polygon([tuple(corner) for corner in label["corners"]], fill=255)
    faded.paste(picture, (0, 0), shown)
    pen = ImageDraw.Draw(faded)
    for ends, thickness in wrong:
        _dashed(pen, ends, thickness)
    for number, stop in enumerate(pins, start=1):
        x, y = network.positions[stop]
        if tiny:  # a small number in the corner of the station's cell
            pen.ellipse((x - 14, y - 14, x - 5, y - 5), fill="#111111")
            pen.text((x - 9.5, y - 9.5), str(number), fill="#ffffff", font=font(8), anchor="mm")
        else:
            _pin(pen, (x, y), str(number), 15.0)
    return faded


def _neighbours(network: Network, line: str, a: str, b: str) -> bool:
    """Whether a train of the line runs from a to b without a stop between."""
    leg = network.ride(line, a, b)
    return leg is not None and not leg.via


def _dashed(pen: ImageDraw.ImageDraw, ends: np.ndarray, thickness: float) -> None:
    length = float(np.hypot(*(ends[1] - ends[0])))
    step = (ends[1] - ends[0]) / max(length, 1e-9)
    for start in np.arange(0.0, length, 6 * thickness):
        dash = [ends[0] + step * start, ends[0] + step * min(length, start + 3.5 * thickness)]
        pen.line([(float(x), float(y)) for x, y in dash], fill="#d4001a", width=round(thickness))


def _geometry(network: Network) -> dict[str, Any]:
    return cast(dict[str, Any], network.extras.get("geometry", {}))


def _labels(network: Network) -> list[dict[str, Any]]:
    return cast(list[dict[str, Any]], _geometry(network).get("labels", []))


def track(network: Network, line: str, a: str, b: str) -> np.ndarray:
    """[P, 2] pixels along the line's drawn track from one stop to another; straight where no track joins them."""
    ends = np.array([network.positions[a], network.positions[b]])
    best = ends
    shortest = np.inf
    for drawn in _geometry(network).get("lines", []):
        for points in map(np.array, drawn["polylines"] if drawn["name"] == line else []):
            gaps = np.hypot(*(points[:, None] - ends[None]).transpose(2, 0, 1))
            i, j = (int(index) for index in gaps.argmin(axis=0))
            if gaps[i, 0] > _ON_TRACK_PX or gaps[j, 1] > _ON_TRACK_PX:
                continue
            ways = [points[min(i, j) : max(i, j) + 1]]
            if np.allclose(points[0], points[-1], atol=1.0):
                ways.append(np.concatenate([points[max(i, j) :], points[: min(i, j) + 1]]))
            for way in ways:
                length = float(np.hypot(*np.diff(way, axis=0).T).sum())
                if len(way) > 1 and length < shortest:
                    best, shortest = way, length
    return best


def _pin(pen: ImageDraw.ImageDraw, at: tuple[float, float], text: str, r: float) -> None:
    x, y = at[0], at[1] - 2.6 * r
    pen.polygon([(x - 0.75 * r, y + 0.5 * r), (x + 0.75 * r, y + 0.5 * r), at], fill="#111111")
    pen.ellipse((x - r, y - r, x + r, y + r), fill="#111111")
    pen.text((x, y), text, fill="#ffffff", font=font(round(1.25 * r)), anchor="mm")
