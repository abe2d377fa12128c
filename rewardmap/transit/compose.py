"""Full-size maps of the levels easy, middle and hard: sketch, stops, names, colours and labels in one network."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from rewardmap.transit.graph import Branch, Line, Network
from rewardmap.transit.labels import Canvas, Label, Spot, place_labels
from rewardmap.transit.layout import Layout, Stop, lay_out
from rewardmap.transit.names import SCRIPTS, make_names
from rewardmap.transit.sketch import Plan, Track, sketch_lines
from rewardmap.transit.styles import PALETTE, STYLES, Style, line_name

UNIT_PX = 50
_SIDE_PX, _TOP_PX = 125, 140
_LEGEND_ROW_PX, _LEGEND_ENTRY_PX = 38, 170


@dataclass(frozen=True, slots=True)
class _Level:
    plan: Plan
    stations: tuple[int, int]


FULL_LEVELS = ("easy", "middle", "hard")
_LEVELS = {
    "easy": _Level(Plan(21, 15, (1, 2, 2, 3, 3), 0.25, 0.3, 0.2, 0.3), (21, 82)),
    "middle": _Level(Plan(29, 23, (4, 5, 6), 0.35, 0.25, 0.25, 0.35), (38, 171)),
    "hard": _Level(Plan(36, 32, (6, 7, 8, 9), 0.5, 0.2, 0.25, 0.4), (103, 403)),
}


def compose(level: str, rng: np.random.Generator, network_id: str) -> Network:
    """A random full-size network with its geometry in ``extras``; ``draw_map`` draws it.

    Draws again until every interchange and terminal has room for its label and the size fits the level.
    """
    while True:
        network = _attempt(level, rng, network_id)
        if network is not None:
            return network


def _attempt(level: str, rng: np.random.Generator, network_id: str) -> Network | None:
    plan, (fewest, most) = _LEVELS[level].plan, _LEVELS[level].stations
    style = STYLES[str(rng.choice(sorted(STYLES)))]
    tracks = sketch_lines(plan, rng)
    if tracks is None:
        return None
    layout = lay_out(tracks, UNIT_PX, rng.uniform(54, 70), style.stroke + 2)
    if layout is None or not fewest <= len(layout.stops) <= most:
        return None
    script = str(rng.choice(SCRIPTS, p=(0.28, 0.2, 0.2, 0.2, 0.12)))
    city, *names = make_names(rng, len(layout.stops) + 1, script)
    tints = _tints(style, len(tracks), rng)
    titles = [line_name(style, index, tint) for index, tint in enumerate(tints)]
    return _Composer(level, network_id, style, tracks, layout, rng).network(city, names, titles, tints)


def _tints(style: Style, count: int, rng: np.random.Generator) -> list[str]:
    """Colours of the lines; where lines are called by colour, different initials come first, for the badges."""
    tints = [str(name) for name in rng.permutation(sorted(PALETTE))]
    if style.line_names == "colour":
        first = {tint[0]: tint for tint in reversed(tints)}
        tints.sort(key=lambda tint: first[tint[0]] != tint)
    return tints[:count]


class _Composer:
    """Puts one map together; holds what its steps share."""

    def __init__(
        self,
        level: str,
        network_id: str,
        style: Style,
        tracks: list[Track],
        layout: Layout,
        rng: np.random.Generator,
    ) -> None:
        self.level, self.network_id, self.style = level, network_id, style
        self.tracks, self.layout, self.rng = tracks, layout, rng
        points = np.concatenate([curve for curves in layout.curves for curve in curves])
        low, high = points.min(axis=0), points.max(axis=0)
        layout.shift(np.array([_SIDE_PX, _TOP_PX]) - low)
        width, tall = (math.ceil(value) for value in high - low)
        width = max(2 * _SIDE_PX + width, 700)
        self.per_row = (width - 80) // _LEGEND_ENTRY_PX
        rows = -(-len(tracks) // self.per_row)
        map_bottom = _TOP_PX + tall + 75
        self.legend = (30, map_bottom, width - 30, map_bottom + rows * _LEGEND_ROW_PX + 22)
        self.size = (width, self.legend[3] + 30)

    def network(self, city: str, names: list[str], titles: list[str], tints: list[str]) -> Network | None:
        name_of = {id(stop): name for stop, name in zip(self.layout.stops, names, strict=True)}
        colours = [PALETTE[tint] for tint in tints]
        canvas = Canvas(self.size)
        self._block(canvas)
        badges = self._badges(canvas, titles, colours)
        spots = [
            Spot(
                name_of[id(stop)],
                stop.position,
                stop.tangent,
                self._radius(stop) + max(abs(lane) for lane in stop.lanes),
                self._radius(stop, clear=True) + max(abs(lane) for lane in stop.lanes),
                self.style.bold_hubs and len(stop.tracks) > 1,
                stop.fixed,
            )
            for stop in self.layout.stops
        ]
        labels = place_labels(spots, canvas, self.style.font_px)
        if labels is None:
            return None
        kept = [stop for stop in self.layout.stops if labels[name_of[id(stop)]] is not None]
        lines = self._lines(titles, colours, {id(stop): f"{name_of[id(stop)]} Station" for stop in kept})
        if lines is None or len(kept) < _LEVELS[self.level].stations[0]:
            return None
        placed = [labels[name_of[id(stop)]] for stop in kept]
        geometry = {
            "style": self.style.name,
            "size": list(self.size),
            "areas": self._areas(),
            "lines": [
                {"name": title, "colour": colour, "polylines": [_rounded(curve) for curve in curves]}
                for title, colour, curves in zip(titles, colours, self.layout.curves, strict=True)
            ],
            "stations": [
                self._station(stop, f"{name_of[id(stop)]} Station", label, colours)
                for stop, label in zip(kept, placed, strict=True)
                if label is not None
            ],
            "labels": [
                _label(f"{name_of[id(stop)]} Station", label)
                for stop, label in zip(kept, placed, strict=True)
                if label is not None
            ],
            "panels": [list(self.legend)],
            "badges": badges + self._legend_badges(titles, colours),
            "texts": self._texts(city, titles),
        }
        positions = {
            f"{name_of[id(stop)]} Station": (
                round(float(stop.position[0]), 1),
                round(float(stop.position[1]), 1),
            )
            for stop in kept
        }
        return Network(
            self.network_id, self.level, lines, positions, self.size, self.style.name, {"geometry": geometry}
        )

    def _radius(self, stop: Stop, clear: bool = False) -> float:
        """Radius of the marker; ``clear``: of the room that marker and stroke take."""
        if len(stop.tracks) > 1:
            radius = 11.5 if len(stop.tracks) > 2 else 9.5
            return radius if stop.fixed else 7.5
        if stop.terminal:
            return 7.5
        radius = {"tick": 3.0, "dot": 3.2, "ring": 6.2, "pip": 5.4}[self.style.marker]
        if not clear:
            return radius
        return max(radius, self.style.stroke / 2 + (6 if self.style.marker == "tick" else 1))

    def _block(self, canvas: Canvas) -> None:
        for curves in self.layout.curves:
            for curve in curves:
                canvas.line(curve, self.style.stroke + 5)
        for stop in self.layout.stops:
            across = np.array([-stop.tangent[1], stop.tangent[0]])
            for lane in stop.lanes:
                canvas.disc(stop.position + across * lane, self._radius(stop) + 2)
        x0, y0, x1, y1 = self.legend
        canvas.polygon(np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]]))
        canvas.polygon(np.array([[0, 0], [560, 0], [560, 96], [0, 96]]))

    def _badges(self, canvas: Canvas, titles: list[str], colours: list[str]) -> list[dict[str, Any]]:
        """A badge beyond each terminal, where there is room."""
        badges = []
        for number, curves in enumerate(self.layout.curves):
            if self.tracks[number].loop:
                continue
            ends = [(curves[0][0], curves[0][4]), *((curve[-1], curve[-5]) for curve in curves)]
            for tip, inner in ends:
                outward = (tip - inner) / np.linalg.norm(tip - inner)
                centre = tip + outward * (25 if abs(outward).max() > 0.9 else 30)
                box = centre + np.array([[-11, -11], [11, -11], [11, 11], [-11, 11]])
                occupied = canvas.occupied()
                low, high = box.min(axis=0) / 2, box.max(axis=0) / 2
                room = occupied[int(low[1]) : int(high[1]) + 1, int(low[0]) : int(high[0]) + 1]
                if room.any():
                    continue
                canvas.polygon(box)
                badges.append(_badge(titles[number], colours[number], centre, 11))
        return badges

    def _legend_badges(self, titles: list[str], colours: list[str]) -> list[dict[str, Any]]:
        return [
            _badge(title, colour, np.array(self._entry(index)), 12)
            for index, (title, colour) in enumerate(zip(titles, colours, strict=True))
        ]

    def _entry(self, index: int) -> tuple[float, float]:
        row, column = divmod(index, self.per_row)
        return 64 + column * _LEGEND_ENTRY_PX, self.legend[1] + 30 + row * _LEGEND_ROW_PX

    def _texts(self, city: str, titles: list[str]) -> list[dict[str, Any]]:
        texts = [
            {"text": city, "x": 40, "y": 46, "px": 38, "bold": True, "anchor": "lm"},
            {"text": "Rapid transit network", "x": 42, "y": 82, "px": 17, "bold": False, "anchor": "lm"},
        ]
        for index, title in enumerate(titles):
            x, y = self._entry(index)
            texts.append({"text": title, "x": x + 22, "y": y, "px": 17, "bold": False, "anchor": "lm"})
        return texts

    def _lines(self, titles: list[str], colours: list[str], names: dict[int, str]) -> tuple[Line, ...] | None:
        lines = []
        for number, sequence in enumerate(self.layout.sequences):
            parts = [tuple(names[id(stop)] for stop in part if id(stop) in names) for part in sequence]
            if len(parts[0]) < 4 or any(len(part) < 2 for part in parts[1:]):
                return None
            towards = [side for _, side in self.tracks[number].branches]
            branches = tuple(Branch(part, side) for part, side in zip(parts[1:], towards, strict=True))
            lines.append(Line(titles[number], colours[number], parts[0], self.tracks[number].loop, branches))
        return tuple(lines)

    def _station(self, stop: Stop, name: str, label: Label, colours: list[str]) -> dict[str, Any]:
        across = np.array([-stop.tangent[1], stop.tangent[0]])
        kind = "interchange" if len(stop.tracks) > 1 else "terminal" if stop.terminal else "stop"
        return {
            "name": name,
            "x": round(float(stop.position[0]), 1),
            "y": round(float(stop.position[1]), 1),
            "tangent": [round(float(value), 4) for value in stop.tangent],
            "lanes": [round(lane, 1) for lane in (stop.lanes[0], stop.lanes[-1])],
            "radius": self._radius(stop),
            "kind": kind,
            "colour": colours[min(stop.tracks)],
            "side": 1 if float((np.array(label.centre) - stop.position) @ across) > 0 else -1,
        }

    def _areas(self) -> list[dict[str, Any]]:
        """Zone, parks and a river, all beneath the track."""
        rng, (width, height) = self.rng, (self.size[0], self.legend[1])
        turn = np.linspace(0, 2 * np.pi, 60)
        areas: list[dict[str, Any]] = []
        if self.style.zone:
            reach = np.array([width, height]) * rng.uniform(0.26, 0.34)
            c, s = np.cos(turn), np.sin(turn)
            ring = np.stack([np.sign(c) * abs(c) ** 0.6, np.sign(s) * abs(s) ** 0.6], axis=1)
            areas.append(_area("zone", ring * reach + np.array([width, height]) / 2, 0))
        for _ in range(int(rng.integers(1, 4))):
            radius = rng.uniform(50, 110) * (1 + 0.2 * np.sin(turn * 3 + rng.uniform(0, 6)))
            centre = np.array([rng.uniform(0.12, 0.88) * width, rng.uniform(0.2, 0.9) * height])
            blob = np.stack([np.cos(turn) * 1.3, np.sin(turn)], axis=1) * radius[:, None]
            areas.append(_area("park", centre + blob, 0))
        if rng.random() < 0.75:
            t = np.linspace(-0.05, 1.05, 80)
            sway = 0.10 * np.sin(2 * np.pi * (t * rng.uniform(0.6, 1.3) + rng.random()))
            sway += 0.03 * np.sin(2 * np.pi * (t * 2.3 + rng.random()))
            level = rng.uniform(0.3, 0.75)
            if rng.random() < 0.5:
                course = np.stack([t * width, (level + sway) * height], axis=1)
            else:
                course = np.stack([(level + sway) * width, t * (height + 200)], axis=1)
            areas.append(_area("water", course, round(rng.uniform(34, 64))))
        return areas


def _area(kind: str, points: np.ndarray, width: int) -> dict[str, Any]:
    return {"kind": kind, "points": _rounded(points), "width": width}


def _rounded(points: np.ndarray) -> list[list[float]]:
    return [[round(float(x), 1), round(float(y), 1)] for x, y in points]


def _badge(line: str, colour: str, centre: np.ndarray, radius: float) -> dict[str, Any]:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    ink = "#101418" if 0.299 * red + 0.587 * green + 0.114 * blue > 150 else "#ffffff"
    x, y = round(float(centre[0]), 1), round(float(centre[1]), 1)
    return {"line": line, "colour": colour, "ink": ink, "x": x, "y": y, "radius": radius}


def _label(name: str, label: Label) -> dict[str, Any]:
    return {
        "station": name,
        "lines": list(label.lines),
        "centre": [round(value, 1) for value in label.centre],
        "box": [round(value, 1) for value in label.size],
        "angle": label.angle,
        "align": label.align,
        "bold": label.bold,
        "corners": _rounded(label.corners()),
    }
