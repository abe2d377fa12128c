"""From tracks on a grid to stations and smooth curves in pixels: spacing, rounded bends, lanes on shared track."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from rewardmap.transit.sketch import Edge, Node, Track, edge

SAMPLE_PX = 5.0
"""Distance between the points of a curve."""
CLEAR_PX = 19.0
"""No stop lies closer than this to track of another stretch, so that it is plain which line it belongs to."""


@dataclass(slots=True)
class Stop:
    """A station before it has a name. ``tangent`` is the track's unit direction; ``lanes`` the offsets it spans."""

    position: np.ndarray
    tangent: np.ndarray
    lanes: tuple[float, ...] = (0.0,)
    tracks: set[int] = field(default_factory=set)
    fixed: bool = False
    """At a node: interchange, terminal or junction; it cannot be left out."""
    terminal: bool = False


@dataclass(slots=True)
class Stretch:
    """Track between two fixed nodes. ``points`` [P, 2] run along ``nodes``; ``stops`` in that order."""

    nodes: tuple[Node, ...]
    points: np.ndarray
    tracks: tuple[int, ...]
    stops: list[Stop]


@dataclass(slots=True)
class Layout:
    """Everything about a map's geometry but labels. ``curves[t]``: drawn polylines of track t, trunk first."""

    stops: list[Stop]
    sequences: list[list[list[Stop]]]
    """Per track: the trunk's stops in order, then each branch's, its junction first."""
    curves: list[list[np.ndarray]]

    def shift(self, by: np.ndarray) -> None:
        """Moves everything by [2] pixels."""
        for stop in self.stops:
            stop.position = stop.position + by
        self.curves = [[curve + by for curve in curves] for curves in self.curves]


def lay_out(tracks: list[Track], unit: float, spacing: float, lane_px: float) -> Layout | None:
    """Stops and curves in pixels; None if a line keeps fewer than four stops.

    ``unit``: pixels between nodes; ``spacing``: wished pixels between stops; ``lane_px``: pixels between
    lines that share track.
    """
    users = _users(tracks)
    fixed = _fixed_nodes(tracks, users)
    at = {node: np.array([node[0] * unit, node[1] * unit]) for node in _nodes(users)}
    stretches: dict[tuple[Node, Node, Node], Stretch] = {}
    nodes: dict[Node, Stop] = {}
    junctions = fixed - {end for track in tracks for path in track.paths() for end in (path[0], path[-1])}
    walks: list[list[list[tuple[Stretch, bool]]]] = []
    for track in tracks:
        walks.append([])
        for path in track.paths():
            walks[-1].append([])
            for piece in _pieces(path, fixed):
                key, back = (piece[0], piece[1], piece[-1]), (piece[-1], piece[-2], piece[0])
                if back in stretches:
                    walks[-1][-1].append((stretches[back], True))
                    continue
                if key not in stretches:
                    points = _resample(_rounded([at[node] for node in piece], 1.1 * unit))
                    stretches[key] = Stretch(tuple(piece), points, users[edge(piece[0], piece[1])], [])
                walks[-1][-1].append((stretches[key], False))
    for stretch in stretches.values():
        for node, index, other in ((stretch.nodes[0], 0, 1), (stretch.nodes[-1], -1, -2)):
            direction = stretch.points[other] - stretch.points[index]
            stop = nodes.setdefault(node, Stop(at[node], direction / np.linalg.norm(direction), fixed=True))
            stop.tracks.update(stretch.tracks)
        # The name of an interchange needs the room beside it.
        _place_stops(
            stretch,
            spacing,
            lane_px,
            [20.0 * (node in junctions) for node in stretch.nodes[:: len(stretch.nodes) - 1]],
        )
    for track in tracks:
        if not track.loop:
            for end in (track.trunk[0], track.trunk[-1], *(path[-1] for path, _ in track.branches)):
                nodes[end].terminal = True
    _clear(list(stretches.values()))
    sequences = [[_stops_of(walk, nodes) for walk in walks_of] for walks_of in walks]
    for track, sequence in zip(tracks, sequences, strict=True):
        if track.loop:
            sequence[0].pop()
        if len(sequence[0]) < 4 or any(len(branch) < 2 for branch in sequence[1:]):
            return None
    curves = [[_curve(walk, number, lane_px) for walk in walks_of] for number, walks_of in enumerate(walks)]
    stops = list({id(stop): stop for sequence in sequences for part in sequence for stop in part}.values())
    return Layout(stops, sequences, curves)


def _users(tracks: list[Track]) -> dict[Edge, tuple[int, ...]]:
    users: dict[Edge, list[int]] = {}
    for number, track in enumerate(tracks):
        for path in track.paths():
            for a, b in pairwise(path):
                users.setdefault(edge(a, b), []).append(number)
    return {key: tuple(numbers) for key, numbers in users.items()}


def _nodes(users: dict[Edge, tuple[int, ...]]) -> set[Node]:
    return {node for pair in users for node in pair}


def _fixed_nodes(tracks: list[Track], users: dict[Edge, tuple[int, ...]]) -> set[Node]:
    """Terminals, and nodes where track meets or parts."""
    degree: dict[Node, int] = {}
    for a, b in users:
        degree[a] = degree.get(a, 0) + 1
        degree[b] = degree.get(b, 0) + 1
    ends = {end for track in tracks if not track.loop for path in track.paths() for end in (path[0], path[-1])}
    return {node for node, count in degree.items() if count != 2} | ends


def _pieces(path: list[Node], fixed: set[Node]) -> list[list[Node]]:
    """The path cut at fixed nodes; a closed path is turned so that it begins at one."""
    if path[0] == path[-1]:
        start = next((i for i, node in enumerate(path) if node in fixed), 0)
        fixed = fixed | {path[start]}
        path = path[start:-1] + path[: start + 1]
    cuts = [i for i, node in enumerate(path) if node in fixed]
    return [path[a : b + 1] for a, b in pairwise(cuts)]


def _rounded(corners: list[np.ndarray], radius: float) -> np.ndarray:
    """The polyline with each 45-degree bend replaced by a smooth curve."""
    points = [corners[0]]
    for before, corner, after in zip(corners, corners[1:], corners[2:], strict=False):
        inward, outward = corner - before, after - corner
        a, b = float(np.linalg.norm(inward)), float(np.linalg.norm(outward))
        inward, outward = inward / a, outward / b
        if abs(inward[0] * outward[1] - inward[1] * outward[0]) < 1e-6:
            continue
        reach = min(radius * 0.4142, 0.48 * a, 0.48 * b)
        first, last = corner - inward * reach, corner + outward * reach
        for t in np.linspace(0, 1, 9):
            points.append((1 - t) ** 2 * first + 2 * t * (1 - t) * corner + t**2 * last)
    points.append(corners[-1])
    return np.array(points)


def _resample(points: np.ndarray) -> np.ndarray:
    """[P, 2] points at equal distances of about ``SAMPLE_PX``, ends kept."""
    steps = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
    grid = np.linspace(0, steps[-1], max(3, round(float(steps[-1]) / SAMPLE_PX) + 1))
    return np.stack([np.interp(grid, steps, points[:, axis]) for axis in (0, 1)], axis=1)


def _tangents(points: np.ndarray) -> np.ndarray:
    direction = np.gradient(points, axis=0)
    return direction / np.linalg.norm(direction, axis=1, keepdims=True)


def lane_offsets(tracks: tuple[int, ...], lane_px: float) -> dict[int, float]:
    """Sideways offset in pixels of each line on shared track."""
    middle = (len(tracks) - 1) / 2
    return {number: (rank - middle) * lane_px for rank, number in enumerate(sorted(set(tracks)))}


def _place_stops(stretch: Stretch, spacing: float, lane_px: float, rooms: list[float]) -> None:
    """Stops at equal distances; ``rooms`` are extra pixels left free at both ends."""
    last = len(stretch.points) - 1
    rooms = [room / SAMPLE_PX for room in rooms]
    count = round((last - sum(rooms)) * SAMPLE_PX / spacing) - 1
    tangents = _tangents(stretch.points)
    lanes = tuple(sorted(lane_offsets(stretch.tracks, lane_px).values()))
    for k in range(1, count + 1):
        index = round(rooms[0] + k * (last - sum(rooms)) / (count + 1))
        stop = Stop(stretch.points[index], tangents[index], lanes, set(stretch.tracks))
        stretch.stops.append(stop)


def _clear(stretches: list[Stretch]) -> None:
    """Takes out stops that lie too close to track of another stretch (flyovers, sharp junctions)."""
    for stretch in stretches:
        others = [other.points for other in stretches if other is not stretch]
        if not others or not stretch.stops:
            continue
        points = np.concatenate(others)
        stretch.stops = [
            stop for stop in stretch.stops if np.min(np.abs(points - stop.position).max(axis=1)) > CLEAR_PX
        ]


def _stops_of(walk: list[tuple[Stretch, bool]], nodes: dict[Node, Stop]) -> list[Stop]:
    stops: list[Stop] = []
    for stretch, backwards in walk:
        ends = (nodes[stretch.nodes[0]], nodes[stretch.nodes[-1]])
        first, last = ends[::-1] if backwards else ends
        stops += [first] if not stops else []
        stops += stretch.stops[::-1] if backwards else stretch.stops
        stops.append(last)
    return stops


def _curve(walk: list[tuple[Stretch, bool]], number: int, lane_px: float) -> np.ndarray:
    """The drawn polyline of one path: on shared track it keeps its lane, and swings back before other junctions."""
    parts = []
    offsets = [lane_offsets(stretch.tracks, lane_px)[number] * (-1 if back else 1) for stretch, back in walk]
    for i, (stretch, backwards) in enumerate(walk):
        points = stretch.points[::-1] if backwards else stretch.points
        shift = np.full(len(points), offsets[i])
        ramp = min(9, len(points) // 2)
        # Steep where the interchange's marker hides it: lines of a bundle part soon, and no sliver stays between them.
        ease = np.sin(np.linspace(0, np.pi / 2, ramp))
        if offsets[i]:
            if i == 0 or offsets[i - 1] != offsets[i]:
                shift[:ramp] *= ease
            if i + 1 == len(walk) or offsets[i + 1] != offsets[i]:
                shift[-ramp:] *= ease[::-1]
        tangents = _tangents(points)
        normals = np.stack([-tangents[:, 1], tangents[:, 0]], axis=1)
        parts.append(points + normals * shift[:, None])
    return np.concatenate(parts)
