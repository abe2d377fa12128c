"""Lays a route or some stations over a map: the rest fades, what is meant stays in colour, numbered pins mark stops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, cast

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from rewardmap.transit.draw import draw_map, font
from rewardmap.transit.fonts import map_font, wrapped
from rewardmap.transit.graph import Leg, Network
from rewardmap.transit.grid_floor import LANE_PX
from rewardmap.transit.styles import STYLES

TINY_ZOOM = 3
"""A tiny map is laid over enlarged, or its numbers could not be read."""
_FADE = 0.72
_PIN_PX = 15.0
_TINY_STATION_PX = 10.5 * TINY_ZOOM
_ON_TRACK_PX = 16.0


def draw_route(network: Network, legs: Sequence[Leg]) -> Image.Image:
    """The map with a route laid over it, RGB, ``network.size`` pixels; tiny maps ``TINY_ZOOM`` times as large.

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


def draw_ride(network: Network, stops: Sequence[str]) -> Image.Image:
    """The map with neighbouring stops of one line marked by numbered pins, and the track between them left in colour;
    else as ``draw_route``. Without such a line the stops alone."""
    for line in network.lines:
        if all(_neighbours(network, line.name, a, b) for a, b in pairwise(stops)):
            return _laid_over(network, [(line.name, stops)], stops)
    return draw_stops(network, stops)


def with_caption(picture: Image.Image, text: str) -> Image.Image:
    """The picture with lines of text on a strip below it, broken to the picture's width."""
    size = 15 if picture.width < 600 else 22
    family = "han" if any(character > "\u2e80" for character in text) else "inter"
    face, gap = map_font(size, family=family), size // 2
    rows = wrapped(text, face.getlength, picture.width - 4 * gap)
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
    tiny = not _geometry(network)
    if tiny:
        picture = picture.resize((TINY_ZOOM * picture.width, TINY_ZOOM * picture.height), Image.Resampling.LANCZOS)
        places = {stop: (TINY_ZOOM * x, TINY_ZOOM * y) for stop, (x, y) in network.positions.items()}
        network = replace(network, positions=places)
    width = 10.0 * TINY_ZOOM if tiny else LANE_PX if network.style == "grid" else STYLES[network.style].stroke + 5.0
    radius = 11.5 * TINY_ZOOM if tiny else 13.0
    wrong: list[tuple[np.ndarray, float]] = []
    shown, names = Image.new("L", picture.size), Image.new("L", picture.size)
    pen, name_pen = ImageDraw.Draw(shown), ImageDraw.Draw(names)
    for label in _labels(network):
        name_pen.polygon([tuple(corner) for corner in label["corners"]], fill=255)
    for place in network.positions.values():
        name_pen.ellipse(_around(place, _TINY_STATION_PX if tiny else 8.0), fill=255)
    for line, stops in tracks:
        for a, b in pairwise(stops):
            if not _neighbours(network, line, a, b):
                wrong.append((np.array([network.positions[a], network.positions[b]]), max(3.0, width / 3)))
                continue
            pen.line([tuple(point) for point in track(network, line, a, b)], fill=255, width=round(width))
        for stop in stops:
            pen.ellipse(_around(network.positions[stop], radius), fill=255)
        for label in _labels(network):
            if label["station"] in stops:
                corners = [tuple(corner) for corner in label["corners"]]
                pen.polygon(corners, fill=255)
                pen.line([*corners, corners[0]], fill=255, width=5)  # g and y reach below
    veil = Image.new("RGB", picture.size, cast(tuple[int, int, int], picture.getpixel((1, 1))))
    marked = Image.composite(picture, Image.blend(picture, veil, _FADE), shown)
    pen = ImageDraw.Draw(marked)
    for ends, thickness in wrong:
        _dashed(pen, ends, thickness)
    taken = ImageChops.lighter(names, shown.point(lambda value: value // 8))  # a name is worse hidden than a track
    # Names stand in the stations of tiny maps and floors: there a pin ends beside its station.
    short = _TINY_STATION_PX if tiny else 20.0 if network.style == "grid" else 0.0
    for number, stop in enumerate(pins, start=1):
        at = np.array(network.positions[stop])
        head = _free_place(taken, at, short + 2.4 * _PIN_PX)
        tip = at + (head - at) * short / (short + 2.4 * _PIN_PX)
        ImageDraw.Draw(taken).ellipse(_around(head, _PIN_PX), fill=255)
        _pin(pen, head, tip, "#ffffff", 1.5)  # a rim, for maps at night
        _pin(pen, head, tip, "#111111", 0.0)
        pen.text(tuple(head), str(number), fill="#ffffff", font=font(19), anchor="mm")
    return marked


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


def _free_place(taken: Image.Image, at: np.ndarray, distance: float) -> np.ndarray:
    """Where a pin's head hides least of what is shown and of any name: above its station if it can be."""

    def hidden(head: np.ndarray) -> float:
        boxes = [_around(head, _PIN_PX), _around((head + at) / 2, _PIN_PX / 2)]
        if min(boxes[0][:2]) < 0 or boxes[0][2] > taken.width or boxes[0][3] > taken.height:
            return np.inf
        return sum(float(np.asarray(taken.crop(box)).sum(dtype=float)) for box in boxes)

    turns = np.arange(8) * np.pi / 4
    return min((at + distance * np.array([np.sin(turn), -np.cos(turn)]) for turn in turns), key=hidden)


def _pin(pen: ImageDraw.ImageDraw, head: np.ndarray, tip: np.ndarray, colour: str, rim: float) -> None:
    along = (tip - head) / np.hypot(*(tip - head))
    across = (0.8 * _PIN_PX + rim) * np.array([-along[1], along[0]])
    pen.polygon([tuple(head + across), tuple(head - across), tuple(tip)], fill=colour)
    pen.ellipse(_around(head, _PIN_PX + rim), fill=colour)


def _around(at: Sequence[float] | np.ndarray, r: float) -> tuple[int, int, int, int]:
    """The box of a disc, in whole pixels."""
    x, y = at
    return round(x - r), round(y - r), round(x + r), round(y + r)
