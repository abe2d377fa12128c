"""Full-size maps of the levels easy, middle and hard: sketch, stops, names, colours and labels in one network."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from rewardmap.transit.fonts import map_font
from rewardmap.transit.graph import Branch, Line, Network
from rewardmap.transit.labels import Canvas, Label, Lettering, Spot, place_labels
from rewardmap.transit.layout import Layout, Stop, lay_out
from rewardmap.transit.names import HAN_SCRIPTS, SCRIPTS, city_name, make_names, romanised, station_name
from rewardmap.transit.scenery import areas, corner_pieces, rounded, signs
from rewardmap.transit.sketch import Plan, Track, sketch_lines
from rewardmap.transit.styles import PALETTE, STYLES, Style, badge_texts, line_name, line_tints

_UNIT_PX, _CROWDED_UNIT_PX, _CROWDED = 50, 60, 12
"""Pixels between neighbouring nodes of the sketch; more on maps of more lines than ``_CROWDED``."""
_TRIES = 4
"""A sketch costs more than all that follows: so often its names and spacing are drawn before another is made."""
_SIDE_PX, _TOP_PX = 125, 140
_LEGEND_ROW_PX, _LEGEND_ENTRY_PX, _LEGEND_SIDE_PX, _LEGEND_PILLS_PX = 38, 170, 200, 140
_SCRIPT_SHARES = (0.2, 0.16, 0.16, 0.16, 0.1, 0.11, 0.11)
_SUBTITLES = ("Rapid transit network", "Metro map", "Lines and stations", "Network map", "Urban railways")


@dataclass(frozen=True, slots=True)
class _Level:
    columns: int
    rows: int
    lines: tuple[int, ...]
    """Numbers of lines, each as likely as the others."""
    loop: float
    branch: float
    shared: float
    through: float
    stations: tuple[int, int]
    interchanges: int
    """Fewest of them."""

    def plan(self, lines: int) -> Plan:
        """What is asked of the sketch; beyond nine lines the map grows with them."""
        more = max(0, lines - 9)
        columns, rows = self.columns + round(1.7 * more), self.rows + round(1.4 * more)
        fewest = max(min(self.lines), lines - lines // 5)
        return Plan(columns, rows, lines, fewest, self.loop, self.branch, self.shared, self.through)


FULL_LEVELS = ("easy", "middle", "hard")
_LEVELS = {
    "easy": _Level(21, 15, (1, 2, 2, 3, 3), 0.25, 0.3, 0.2, 0.3, (21, 82), 0),
    "middle": _Level(29, 23, (4, 5, 6), 0.35, 0.25, 0.25, 0.35, (38, 171), 3),
    "hard": _Level(36, 32, (6, 7, 7, 8, 8, 9, 9, 10, 11, 12, 14, 18, 22), 0.5, 0.2, 0.3, 0.4, (103, 403), 10),
}


def compose(level: str, rng: np.random.Generator, network_id: str) -> Network:
    """A random full-size network with its geometry in ``extras``; ``draw_map`` draws it.

    Draws again until every interchange and terminal has room for its label and the size fits the level. The wished
    number of lines, the style and the script are drawn once, for not all succeed as often.
    """
    shape = _LEVELS[level]
    plan = shape.plan(int(rng.choice(shape.lines)))
    style = STYLES[str(rng.choice(sorted(STYLES)))]
    script = str(rng.choice(SCRIPTS, p=_SCRIPT_SHARES))
    while True:
        tracks = sketch_lines(plan, rng)
        for _ in range(_TRIES if tracks is not None else 0):
            network = _attempt(level, tracks or [], style, script, rng, network_id)
            if network is not None:
                return network


def _attempt(
    level: str, tracks: list[Track], style: Style, script: str, rng: np.random.Generator, network_id: str
) -> Network | None:
    shape = _LEVELS[level]
    fewest, most = shape.stations
    unit = _CROWDED_UNIT_PX if len(tracks) > _CROWDED else _UNIT_PX
    length = unit * sum(len(path) for track in tracks for path in track.paths())
    spacing = max(rng.uniform(54, 70), length / (0.95 * most))
    layout = lay_out(tracks, unit, spacing, style.stroke + 2)
    if layout is None or not fewest <= len(layout.stops) <= most:
        return None
    if sum(len(stop.tracks) > 1 for stop in layout.stops) < shape.interchanges:
        return None
    city, *names = make_names(rng, len(layout.stops) + 1, script)
    city = city_name(city, script)
    tints = line_tints(style, level, len(tracks), rng)
    titles = [line_name(style, index, tint) for index, tint in enumerate(tints)]
    return _Composer(level, network_id, style, script, tracks, layout, rng).network(city, names, titles, tints)


class _Composer:
    """Puts one map together; holds what its steps share."""

    def __init__(
        self,
        level: str,
        network_id: str,
        style: Style,
        script: str,
        tracks: list[Track],
        layout: Layout,
        rng: np.random.Generator,
    ) -> None:
        self.level, self.network_id, self.style, self.script = level, network_id, style, script
        self.tracks, self.layout, self.rng = tracks, layout, rng
        han = script in HAN_SCRIPTS
        self.family = "han" if han else style.family
        px = 16 if han else style.font_px
        self.lettering = Lettering(self.family, px, px - 3, style.slanted)
        points = np.concatenate([curve for curves in layout.curves for curve in curves])
        low, high = points.min(axis=0), points.max(axis=0)
        width, tall = (math.ceil(value) for value in high - low)
        left = _SIDE_PX + max(0, 700 - 2 * _SIDE_PX - width) // 2
        layout.shift(np.array([left, _TOP_PX]) - low)
        self.map_size = (max(2 * _SIDE_PX + width, 700), _TOP_PX + tall + 75)
        width, bottom = self.map_size
        if style.legend == "side":
            self.per_row = 1
            pills = style.badge == "pill"  # which say the whole name, so that only a heading stands with them
            self.legend_head = 40 if pills else 0
            side = _LEGEND_PILLS_PX if pills else _LEGEND_SIDE_PX
            self.legend = (
                width, 34, width + side - 30, 34 + self.legend_head + len(tracks) * _LEGEND_ROW_PX + 22
            )  # fmt: skip
            self.size = (width + side, max(bottom, self.legend[3]) + 30)
        else:
            self.per_row, self.legend_head = (width - 80) // _LEGEND_ENTRY_PX, 0
            rows = -(-len(tracks) // self.per_row)
            self.legend = (30, bottom, width - 30, bottom + rows * _LEGEND_ROW_PX + 22)
            self.size = (width, self.legend[3] + 30)

    def network(self, city: str, names: list[str], titles: list[str], tints: list[str]) -> Network | None:
        name_of = {id(stop): name for stop, name in zip(self.layout.stops, names, strict=True)}
        colours = [PALETTE[tint] for tint in tints]
        canvas = Canvas(self.size)
        self._block(canvas)
        badges = self._badges(canvas, titles, colours)
        pieces = corner_pieces(canvas, self.map_size[1], self.map_size[0], self.rng)
        spots = [self._spot(stop, name_of[id(stop)]) for stop in self.layout.stops]
        labels = place_labels(spots, canvas, self.lettering)
        if labels is None:
            return None
        kept = [(stop, label) for stop in self.layout.stops if (label := labels[name_of[id(stop)]]) is not None]
        full = {id(stop): station_name(name_of[id(stop)], self.script) for stop, _ in kept}
        lines = self._lines(titles, colours, full)
        if lines is None or len(kept) < _LEVELS[self.level].stations[0]:
            return None
        places = np.array([stop.position for stop, _ in kept])
        geometry = {
            "style": self.style.name,
            "family": self.family,
            "size": list(self.size),
            "areas": areas(self.style, (self.size[0], self.map_size[1]), self.rng),
            "lines": [
                {"name": title, "colour": colour, "polylines": [rounded(curve) for curve in curves]}
                for title, colour, curves in zip(titles, colours, self.layout.curves, strict=True)
            ],
            "stations": [self._station(stop, full[id(stop)], label, colours) for stop, label in kept],
            "labels": [_label(full[id(stop)], label) for stop, label in kept],
            "panels": [list(self.legend)],
            "badges": badges + self._legend_badges(titles, colours),
            "distractors": pieces + signs(canvas, places, self.rng),
        }
        geometry["texts"] = self._texts(city, titles, any(area["kind"] == "rail" for area in geometry["areas"]))
        positions = {
            full[id(stop)]: (round(float(stop.position[0]), 1), round(float(stop.position[1]), 1)) for stop, _ in kept
        }
        return Network(
            self.network_id, self.level, lines, positions, self.size, self.style.name, {"geometry": geometry}
        )

    def _spot(self, stop: Stop, name: str) -> Spot:
        lane = max(abs(lane) for lane in stop.lanes)
        return Spot(
            name,
            stop.position,
            stop.tangent,
            self._radius(stop) + lane,
            self._radius(stop, clear=True) + lane,
            len(stop.tracks) > 1,
            self.style.bold_hubs and len(stop.tracks) > 1,
            stop.fixed,
            romanised(name) if self.script == "bilingual" else "",
        )

    def _radius(self, stop: Stop, clear: bool = False) -> float:
        """Radius of the marker; ``clear``: of the room that marker and stroke take."""
        if len(stop.tracks) > 1:
            radius = 11.5 if len(stop.tracks) > 2 else 9.5
            return radius if stop.fixed else 7.5
        if stop.terminal:
            return 7.5
        radius = {"tick": 3.0, "dot": 3.2, "ring": 6.2, "pip": 5.4, "bar": 3.0, "pearl": 6.6}[self.style.marker]
        if not clear:
            return radius
        return max(radius, self.style.stroke / 2 + {"tick": 6, "bar": 4}.get(self.style.marker, 1))

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
                badge = self._badge(titles, titles[number], colours[number], 11)
                half = np.array(badge["half"])
                # Along a slope a corner of the box would come close to the terminal first.
                reach = min(half / np.maximum(np.abs(outward), 1e-6)) + (14 if abs(outward).max() > 0.9 else 19)
                centre = tip + outward * reach
                if canvas.free(centre - half, centre + half):
                    canvas.polygon(centre + half * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]))
                    badges.append(badge | {"x": round(float(centre[0]), 1), "y": round(float(centre[1]), 1)})
        return badges

    def _badge(self, titles: list[str], line: str, colour: str, radius: int) -> dict[str, Any]:
        """A line's badge without its place: text, colours, half its width and height."""
        red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        ink = "#101418" if 0.299 * red + 0.587 * green + 0.114 * blue > 150 else "#ffffff"
        pill = self.style.badge == "pill"
        text = line if pill else badge_texts(titles)[line]
        px = round(radius * (1.25 if len(text) == 1 else 1.2 if pill else 1.05))
        wide = map_font(px, True, self.family).getlength(text) / 2 + 7 if pill else radius
        return {
            "line": line, "text": text, "px": px, "colour": colour, "ink": ink, "half": [round(wide, 1), radius],
            "shape": self.style.badge,
        }  # fmt: skip

    def _legend_badges(self, titles: list[str], colours: list[str]) -> list[dict[str, Any]]:
        badges = []
        for index, (title, colour) in enumerate(zip(titles, colours, strict=True)):
            badge = self._badge(titles, title, colour, 12)
            x, y = self._entry(index)
            badges.append(badge | {"x": round(x - 12 + badge["half"][0], 1), "y": y})
        return badges

    def _entry(self, index: int) -> tuple[float, float]:
        row, column = divmod(index, self.per_row)
        x, y = self.legend[0] + 34, self.legend[1] + self.legend_head + 30
        return x + column * _LEGEND_ENTRY_PX, y + row * _LEGEND_ROW_PX

    def _texts(self, city: str, titles: list[str], rail: bool) -> list[dict[str, Any]]:
        """Title, names of the lines, and what the pale strokes of another railway are."""
        han = self.script in HAN_SCRIPTS
        subtitle = _SUBTITLES[int(self.rng.integers(len(_SUBTITLES)))]
        if han:
            subtitle = "轨道交通线网示意图" if self.script == "chinese" else f"{romanised(city)} · {subtitle}"
        texts = [
            {"text": city, "x": 40, "y": 46, "px": 38, "bold": True, "anchor": "lm"},
            {"text": subtitle, "x": 42, "y": 82, "px": 17, "bold": False, "anchor": "lm"},
        ]
        for index, title in enumerate(titles):
            x, y = self._entry(index)
            if self.style.badge != "pill":
                texts.append({"text": title, "x": x + 22, "y": y, "px": 17, "bold": False, "anchor": "lm"})
        if self.legend_head:
            x, y = self.legend[0] + 22, self.legend[1] + 30
            head = "线路" if self.script == "chinese" else "Lines"
            texts.append({"text": head, "x": x, "y": y, "px": 19, "bold": True, "anchor": "lm"})
        if rail:
            note = "Pale dashes: railways of other operators"
            texts.append({"text": note, "x": 40, "y": self.size[1] - 15, "px": 14, "bold": False, "anchor": "lm"})
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


def _label(name: str, label: Label) -> dict[str, Any]:
    return {
        "station": name,
        "lines": list(label.lines),
        "px": list(label.px),
        "centre": [round(value, 1) for value in label.centre],
        "box": [round(value, 1) for value in label.size],
        "angle": label.angle,
        "align": label.align,
        "bold": label.bold,
        "corners": rounded(label.corners()),
    }
