"""Where the lines of a full-size map run: octilinear paths on a grid of nodes, found one line after the
other.

Lines may only meet at nodes where both run straight (these become interchanges), run along an earlier line
(shared track), leave their own trunk (branches), or cross between four nodes, far from any station.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

Node = tuple[int, int]
Edge = tuple[Node, Node]
STEPS: tuple[Node, ...] = ((1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1))
"""The eight directions, by 45 degrees."""
_HASTE = 1.3
"""The search overrates the distance left by this much: less than half the steps, and ways about as short."""
_MOST_STEPS, _RADIAL_STEPS = 6000, 1500
"""A way that is not found in so many steps would wind all over the map; shorter for lines that only reach another."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a level asks of the sketch; probabilities are per map (loop) or per line (the others)."""

    columns: int
    rows: int
    lines: int
    fewest_lines: int
    """As many will do where there is no room for more."""
    loop: float
    branch: float
    shared: float
    through: float
    """Chance that a line is sent through an existing interchange, so that three or four lines meet."""


@dataclass(slots=True)
class Track:
    """One line's paths over nodes. ``branches`` begin at a trunk node; ``towards`` is the end they run through to."""

    trunk: list[Node]
    loop: bool = False
    branches: list[tuple[list[Node], str]] = field(default_factory=list)

    def paths(self) -> Iterable[list[Node]]:
        yield [*self.trunk, self.trunk[0]] if self.loop else self.trunk
        for path, _ in self.branches:
            yield path


def edge(a: Node, b: Node) -> Edge:
    """The edge between two nodes, the same in both directions."""
    return (a, b) if a < b else (b, a)


def sketch_lines(plan: Plan, rng: np.random.Generator) -> list[Track] | None:
    """Tracks of one map, or None where a line found no way (the caller draws again)."""
    board = _Board(plan)
    tracks: list[Track] = []
    count = plan.lines
    if count >= 3 and rng.random() < plan.loop:
        tracks.append(Track(_ring(plan, rng), loop=True))
        board.add(tracks[-1])
    turn = rng.random() * np.pi
    while len(tracks) < count:
        angle = turn + np.pi * len(tracks) / count + rng.normal(0, 0.12)
        for attempt in range(30):
            # After some failures there is no room for a line right across: one that ends at another line will do.
            if attempt < 8:
                track = _line(board, tracks, angle + rng.normal(0, 0.15), rng)
            else:
                track = _radial(board, rng.uniform(0, 2 * np.pi), rng)
            if track is not None:
                break
        if track is None:
            if len(tracks) < plan.fewest_lines:
                return None
            break
        tracks.append(track)
        board.add(track)
    for track in tracks:
        if not track.loop and rng.random() < plan.branch:
            _branch(board, track, rng)
    return tracks if _connected(tracks) else None


class _Board:
    """What is taken: nodes with the tracks through them, edges, and diagonals between four nodes."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.edges: set[Edge] = set()
        self.straight: dict[Node, set[int]] = {}
        """Node -> the axes (direction modulo 4) in which tracks run straight through it; empty set: a bend."""
        self.degree: dict[Node, int] = {}
        self.near: dict[Node, int] = {}
        self.moves: dict[int, list[tuple[int, float, bool]]] = {}
        """What ``_moves_from`` found, but where track was added since."""

    def add(self, track: Track) -> None:
        for path in track.paths():
            closed = path[0] == path[-1]
            for a, b in pairwise(path):
                if edge(a, b) not in self.edges:
                    self.edges.add(edge(a, b))
                    for node in (a, b):
                        self.degree[node] = self.degree.get(node, 0) + 1
            ends = path[-2:-1] + path + path[1:2] if closed else [path[0], *path, path[-1]]
            for before, node, after in zip(ends, ends[1:], ends[2:], strict=False):
                axes = self.straight.setdefault(node, set())
                inward, outward = _heading(before, node), _heading(node, after)
                if inward is None or outward is None or inward == outward:
                    heading = inward if inward is not None else outward
                    if heading is not None:
                        axes.add(heading % 4)
                else:
                    axes.add(-1)
        rows = self.plan.rows
        # ``_moves_from`` looks three nodes around.
        for x, y in {(x + dx, y) for path in track.paths() for x, y in path for dx in range(-3, 4)}:
            for state in range(8 * (x * rows + max(0, y - 3)), 8 * (x * rows + min(rows - 1, y + 3)) + 8):
                self.moves.pop(state, None)
        self.near = {}
        for x, y in self.straight:
            for dx in (-1, 0, 1):
                for dy in (-1, 0, 1):
                    self.near[x + dx, y + dy] = self.near.get((x + dx, y + dy), 0) + 1

    def inside(self, node: Node) -> bool:
        return 0 <= node[0] < self.plan.columns and 0 <= node[1] < self.plan.rows

    def crossable(self, node: Node, heading: int) -> bool:
        """May a new track run straight through ``node``? Never through a bend, nor along a track that is there."""
        axes = self.straight.get(node)
        if axes is None:
            return True
        if -1 in axes or heading % 4 in axes or self.degree[node] > 4:
            return False
        # Other track or a bend right beside the crossing, or another interchange near it, leaves no room
        # for a label.
        around = [self.straight.get((node[0] + dx, node[1] + dy)) for dx, dy in STEPS]
        if sum(beside is not None for beside in around) > self.degree[node]:
            return False
        if any(beside is not None and -1 in beside for beside in around):
            return False
        return self.degree[node] > 2 or not any(
            self.degree.get((node[0] + dx * k, node[1] + dy * k), 0) > 2 for dx, dy in STEPS for k in (1, 2)
        )

    def way(
        self, start: Node, goal: Node, first: int | None, banned: set[Node], most_steps: int = _MOST_STEPS
    ) -> list[Node] | None:
        """Cheapest path by length, bends and closeness to other tracks; turns by at most 45 degrees per node."""
        # A state is 8 * node + heading, and nodes are numbered in order, so that equal costs are taken in order.
        columns, rows = self.plan.columns, self.plan.rows
        source, target = 8 * (start[0] * rows + start[1]), 8 * (goal[0] * rows + goal[1])
        shut = {8 * (x * rows + y) for x, y in banned}
        dx, dy = abs(np.arange(columns)[:, None] - goal[0]), abs(np.arange(rows)[None, :] - goal[1])
        left = (_HASTE * (np.maximum(dx, dy) + 0.4142 * np.minimum(dx, dy))).ravel().tolist()
        cost = [math.inf] * (8 * columns * rows)
        came: dict[int, int] = {}
        heap = [(left[source >> 3], 0.0, source + heading) for heading in (range(8) if first is None else (first,))]
        for _, spent, state in heap:
            cost[state] = spent
        for _ in range(most_steps):
            if not heap:
                return None
            _, spent, state = heapq.heappop(heap)
            if spent > cost[state]:
                continue
            node = state & -8
            if node == target and node != source:
                path = [state]
                while path[-1] in came:
                    path.append(came[path[-1]])
                return [divmod(state >> 3, rows) for state in reversed(path)]
            if state not in self.moves:
                self.moves[state] = self._moves_from(state)
            for other, step, enters in self.moves[state]:
                place = other & -8
                if place in shut or not (enters or place == target) or (node == source and (state ^ other) & 7):
                    continue
                total = spent + step
                if total < cost[other]:
                    cost[other] = total
                    came[other] = state
                    heapq.heappush(heap, (total + left[other >> 3], total, other))
        return None

    def _moves_from(self, state: int) -> list[tuple[int, float, bool]]:
        """Where a new track can go on from ``state``: next state, cost, and whether it may do so but to end there."""
        rows = self.plan.rows
        heading = state & 7
        node: Node = divmod(state >> 3, rows)
        back = STEPS[heading]
        # Straight through a node with track and one node further; elsewhere it may turn.
        crossing = node in self.straight or (node[0] - back[0], node[1] - back[1]) in self.straight
        moves = []
        for turn in (0,) if crossing else (0, -1, 1):
            ahead = (heading + turn) % 8
            dx, dy = STEPS[ahead]
            other = (node[0] + dx, node[1] + dy)
            if not self.inside(other) or edge(node, other) in self.edges or (turn and other in self.straight):
                continue
            step = 1.0
            if dx and dy:
                step = 1.4142
                block = ((node[0] + dx, node[1]), (node[0], node[1] + dy))
                if edge(*block) in self.edges:
                    if turn or any(self.degree.get(beside, 0) > 2 or -1 in self.straight[beside] for beside in block):
                        continue
                    step += 5.0
            step += 1.4 * abs(turn) + 0.55 * min(self.near.get(other, 0), 3)
            if other in self.straight:
                step += 1.0
            moves.append((8 * (other[0] * rows + other[1]) + ahead, step, self.crossable(other, ahead)))
        return moves


def _heading(a: Node, b: Node) -> int | None:
    return None if a == b else STEPS.index((b[0] - a[0], b[1] - a[1]))


def _octile(a: Node, b: Node) -> float:
    dx, dy = abs(a[0] - b[0]), abs(a[1] - b[1])
    return max(dx, dy) + 0.4142 * min(dx, dy)


def _rim(plan: Plan, angle: float, reach: float) -> Node:
    """The node at ``reach`` (0 centre, 1 border) in direction ``angle`` on a superellipse, which fills corners."""
    c, s = np.cos(angle), np.sin(angle)
    scale = reach / (abs(c) ** 3 + abs(s) ** 3) ** (1 / 3)
    x = (plan.columns - 1) / 2 * (1 + scale * c)
    y = (plan.rows - 1) / 2 * (1 + scale * s)
    return round(float(x)), round(float(y))


def _ring(plan: Plan, rng: np.random.Generator) -> list[Node]:
    """An octagon around the middle."""
    cx, cy = plan.columns // 2 + int(rng.integers(-1, 2)), plan.rows // 2 + int(rng.integers(-1, 2))
    a = max(4, round(plan.columns * rng.uniform(0.17, 0.26)))
    b = max(4, round(plan.rows * rng.uniform(0.17, 0.26)))
    cut = int(rng.integers(2, min(a, b) - 1))
    corners = [(cx - a + cut, cy - b), (cx + a - cut, cy - b), (cx + a, cy - b + cut), (cx + a, cy + b - cut)]
    corners += [
        (cx + a - cut, cy + b),
        (cx - a + cut, cy + b),
        (cx - a, cy + b - cut),
        (cx - a, cy - b + cut),
    ]
    nodes: list[Node] = []
    for (x, y), (u, v) in zip(corners, corners[1:] + corners[:1], strict=True):
        steps = max(abs(u - x), abs(v - y))
        nodes += [(x + (u - x) * k // steps, y + (v - y) * k // steps) for k in range(steps)] if steps else []
    return nodes


def _line(board: _Board, tracks: list[Track], angle: float, rng: np.random.Generator) -> Track | None:
    """A line across the map: rim, a point near the middle (sometimes an interchange), rim."""
    plan = board.plan
    start = _rim(plan, angle, rng.uniform(0.72, 1.0))
    goal = _rim(plan, angle + np.pi + rng.normal(0, 0.45), rng.uniform(0.72, 1.0))
    if start in board.straight or goal in board.straight or _octile(start, goal) < 6:
        return None
    run = _shared_run(board, tracks, start, rng) if rng.random() < plan.shared else None
    if run is not None:
        first = board.way(start, run[0], None, {goal})
        if first is None or len(first) < 4:
            return None
        joint = abs(_turn(first[-2], first[-1], run[1]))
        second = board.way(run[-1], goal, _heading(run[-2], run[-1]), set(first)) or board.way(
            run[-1], goal, _side(run, rng), set(first)
        )
        if joint > 1 or second is None or len(second) < 4 or set(second) & set(run[:-1]):
            return None
        return _clean(first[:-1] + run + second[1:])
    hubs = sorted(node for node, degree in board.degree.items() if degree in (4, 6))
    if hubs and rng.random() < plan.through:
        middle = hubs[int(rng.integers(len(hubs)))]
    else:
        middle = _rim(plan, rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.35))
    if middle in (start, goal) or -1 in board.straight.get(middle, ()):
        return None
    first = board.way(start, middle, None, {goal})
    if first is None:
        return None
    heading = _heading(first[-2], first[-1])
    if heading is None or not board.crossable(middle, heading):
        return None
    second = board.way(middle, goal, heading, set(first[:-1]))
    return _clean(first[:-1] + second) if second is not None else None


def _radial(board: _Board, angle: float, rng: np.random.Generator) -> Track | None:
    """A line from the rim to a terminal on an earlier line, which becomes an interchange."""
    start = _rim(board.plan, angle, rng.uniform(0.6, 1.0))
    ends = sorted(
        node
        for node, axes in board.straight.items()
        if board.degree[node] == 2 and -1 not in axes and 7 <= _octile(start, node) <= 22
    )
    if start in board.straight or not ends:
        return None
    path = board.way(start, ends[int(rng.integers(len(ends)))], None, set(), _RADIAL_STEPS)
    if path is None or any(_turn(*path[at - 1 : at + 2]) for at in range(len(path) - 4, len(path) - 1)):
        return None
    bends = [at for at in range(1, 4) if _turn(*path[at - 1 : at + 2])]
    path = path[bends[-1] if bends else 0 :]
    return Track(path) if len(path) >= 7 and _simple(path) else None


def _clean(path: list[Node]) -> Track | None:
    """The track without short stubs after a bend at its ends, unless it touches or crosses itself."""
    for _ in range(2):
        bends = [at for at in range(1, min(4, len(path) - 1)) if _turn(*path[at - 1 : at + 2])]
        path = path[bends[-1] if bends else 0 :][::-1]
    return Track(path) if len(path) >= 7 and _simple(path) else None


def _simple(path: list[Node]) -> bool:
    """Does the path neither visit a node twice nor cross itself between nodes?"""
    blocks = [(min(a[0], b[0]), min(a[1], b[1])) for a, b in pairwise(path) if a[0] != b[0] and a[1] != b[1]]
    return len(set(path)) == len(path) and len(set(blocks)) == len(blocks)


def _turn(a: Node, b: Node, c: Node) -> int:
    """Turn at ``b`` in units of 45 degrees, from -4 to 3."""
    return (STEPS.index((c[0] - b[0], c[1] - b[1])) - STEPS.index((b[0] - a[0], b[1] - a[1])) + 4) % 8 - 4


def _side(run: list[Node], rng: np.random.Generator) -> int:
    heading = _heading(run[-2], run[-1])
    return ((heading or 0) + (1 if rng.random() < 0.5 else -1)) % 8


def _shared_run(board: _Board, tracks: list[Track], start: Node, rng: np.random.Generator) -> list[Node] | None:
    """A stretch of an earlier line, ends straight and free of interchanges, in the direction away from ``start``."""
    hosts = [track for track in tracks if not track.loop and len(track.trunk) > 14]
    if not hosts:
        return None
    trunk = hosts[int(rng.integers(len(hosts)))].trunk
    length = int(rng.integers(4, max(5, min(10, len(trunk) // 2))))
    at = int(rng.integers(3, len(trunk) - length - 3)) if len(trunk) - length > 7 else 3
    run = trunk[at : at + length]
    if len(run) < 4 or any(board.degree[node] != 2 for node in (run[0], run[-1])):
        return None
    if -1 in board.straight[run[0]] or -1 in board.straight[run[-1]]:
        return None
    if any(board.degree.get((n[0] + dx, n[1] + dy), 0) > 2 for n in (run[0], run[-1]) for dx, dy in STEPS):
        return None
    return run if _octile(start, run[0]) < _octile(start, run[-1]) else run[::-1]


def _branch(board: _Board, track: Track, rng: np.random.Generator) -> None:
    """Adds a branch that leaves the trunk at 45 degrees near one end, if there is room."""
    trunk = track.trunk
    for _ in range(8):
        at = int(rng.integers(len(trunk) // 3, 2 * len(trunk) // 3))
        joint, towards = trunk[at], "start" if rng.random() < 0.5 else "end"
        if board.degree[joint] != 2 or -1 in board.straight[joint]:
            continue
        if any(board.degree.get((joint[0] + dx, joint[1] + dy), 0) > 2 for dx, dy in STEPS):
            continue
        before = trunk[at - 1] if towards == "start" else trunk[at + 1]
        heading = (_heading(before, joint) or 0) + (1 if rng.random() < 0.5 else -1)
        tip = _rim(board.plan, rng.uniform(0, 2 * np.pi), rng.uniform(0.6, 1.0))
        if tip in board.straight or not 4 <= _octile(joint, tip) <= 14:
            continue
        path = board.way(joint, tip, heading % 8, set(trunk))
        if path is not None and 7 <= len(path) <= 16 and _simple(path):
            track.branches.append((path, towards))
            board.add(track)
            return


def _connected(tracks: list[Track]) -> bool:
    groups = [{node for path in track.paths() for node in path} for track in tracks]
    joined, rest = groups[0], groups[1:]
    while rest:
        reached = [group for group in rest if group & joined]
        if not reached:
            return False
        rest = [group for group in rest if not group & joined]
        joined = joined.union(*reached)
    return True
