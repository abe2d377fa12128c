"""The ``graph`` reward: legs verified on the network, credit only for verified progress, nothing below 0.

A right answer is a route that can be ridden from the first stop to the last: each leg on one train, each
change at the stop where the leg before ended, no stop visited twice. Its detail is how close it is to the
shortest route. A wrong answer's detail is potential-based (Ng, Harada and Russell, 1999): how much nearer to
the goal its verified legs, counted from the start, have come at best. Gains telescope, so detours and returns
earn nothing, and what follows the first leg that fails is not read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rewardmap.rewards.score import CHOICES, FAILURE_CODE, Outcome
from rewardmap.rewards.topology import LONGEST_NAME, Topology, fold, line_key, station_key
from rewardmap.types import Problem

DETAIL = 10.0
PARTIAL = 0.8
"""Share of ``DETAIL`` that a wrong route can reach at most."""

_FLAGS = re.IGNORECASE | re.ASCII
_LABEL = re.compile(r"(route[ \t]*name|departure[ \t]*stop|arrival[ \t]*stop)[*_ \t]*[:：][*_ \t]*", _FLAGS)
_LISTED = re.compile(r"\b(?:stops|lines)[*_ \t]*[:：][*_ \t]*\[([^\[\]]*)\]", _FLAGS)
_ORDER = ("r", "d", "a")
_NUMBER = re.compile(r"[+-]?[0-9]{1,9}")
_WRAPPING = re.compile(r"\\(?:textbf|mathrm|mbox|text)\s*|[\s{}()*$]")


_Costs = dict[int, tuple[int, int]]


class _Leg(NamedTuple):
    line: str
    departure: str
    arrival: str


def score_graph(problem: Problem, response: str, topology: Topology) -> Outcome:
    """Score one answer; detail is 0 to 10, and a right answer's is above 0."""
    answer = response.rsplit("</think>", 1)[-1]
    outcome = _score_route(problem, answer, topology) if problem.kind == "planning" else _score_short(problem, answer)
    if outcome.failure == FAILURE_CODE["bad_format"] and not response.strip():
        return outcome._replace(failure=FAILURE_CODE["no_answer"])
    return outcome


def _score_route(problem: Problem, answer: str, topology: Topology) -> Outcome:
    legs = read_legs(answer)
    if not legs:
        return Outcome(False, 0.0, False, FAILURE_CODE["bad_format"])
    starts, goals = topology.ends(problem.station_1), topology.ends(problem.station_2)
    costs = topology.costs(goals)
    ridden = _ride(legs, starts, costs, topology)
    arrived = [state.travelled for state in ridden.ends if state.stop in goals]
    if ridden.failure == "none" and arrived:
        least_legs, least_stops = min(costs[stop] for stop in starts if stop in costs)
        excess = (len(legs) - least_legs) + (min(arrived) - least_stops) / max(least_stops, 1)
        failure = "not_optimal" if excess > 0 else "none"
        return Outcome(True, DETAIL / (1.0 + max(excess, 0.0)), True, FAILURE_CODE[failure])
    failure = "endpoint" if ridden.failure == "none" else ridden.failure
    before = min(_distance(costs, stop) for stop in starts)
    progress = max(0.0, 1.0 - ridden.nearest / before) if before else 0.0
    return Outcome(False, PARTIAL * DETAIL * progress, True, FAILURE_CODE[failure])


def _distance(costs: _Costs, stop: int) -> float:
    """Legs to the goal and, below one leg in all, stops; a stop without a way there is farthest."""
    legs, stops = costs.get(stop, (len(costs), 0))
    return legs + stops / (1.0 + 2 * len(costs))


class _State(NamedTuple):
    """Where a traveller may be. Stops that share a name, and equally long ways, are all followed at once."""

    stop: int
    travelled: int
    """Stops ridden so far."""
    visited: frozenset[int]


class _Ridden(NamedTuple):
    """How far the legs could be ridden."""

    ends: set[_State]
    """After the last verified leg; empty if there is none."""
    nearest: float
    """The least distance to the goal after any verified leg; infinite if there is none."""
    failure: str


def _ride(legs: Sequence[_Leg], starts: Sequence[int], costs: _Costs, topology: Topology) -> _Ridden:
    named = topology.stops_named(legs[0].departure)
    here = {_State(stop, 0, frozenset((stop,))) for stop in starts if stop in named}
    if not here:
        return _Ridden(set(), math.inf, "endpoint")
    ends: set[_State] = set()
    nearest = math.inf
    for leg in legs:
        named = topology.stops_named(leg.departure)
        moved: set[_State] = set()
        failures = [_move(leg, state, topology, moved) for state in here if state.stop in named]
        if not moved:
            return _Ridden(ends, nearest, _furthest(failures) if failures else "broken_transfer")
        here = ends = moved
        nearest = min(nearest, *(_distance(costs, state.stop) for state in moved))
    return _Ridden(ends, nearest, "none")


def _move(leg: _Leg, state: _State, topology: Topology, moved: set[_State]) -> str:
    """Ride one leg; enters where it may end into ``moved``. Returns the failure if it ends nowhere."""
    lines = topology.lines_named(leg.line)
    if not lines:
        return "unknown_line"
    failures = ["stop_not_on_line"]
    for line in lines:
        for end in topology.stops_named(leg.arrival):
            if not (topology.on_line(state.stop, line) and topology.on_line(end, line)):
                continue
            rides = topology.rides(line, state.stop, end)
            failures.append("repeated_stop" if rides else "wrong_branch")
            for stops, passed in rides:
                if end not in state.visited and not passed & state.visited:
                    moved.add(_State(end, state.travelled + stops, state.visited | passed | {end}))
    return _furthest(failures)


def _furthest(failures: Sequence[str]) -> str:
    """Of several ways to read a leg, the one that came furthest tells what is wrong."""
    return max(failures, key=FAILURE_CODE.__getitem__)


def read_legs(answer: str) -> list[_Leg]:
    """The legs that an answer states; empty unless each has its three labels, once and in order.

    Labels in any case and bold, several on one line and text around the legs are all fine.
    """
    values: list[str] = []
    begin = labels = 0
    for label in _LABEL.finditer(answer):
        if label.group(1)[0].casefold() != _ORDER[labels % 3]:
            return []
        if labels:
            values.append(_value_of(answer[begin : label.start()]))
        begin = label.end()
        labels += 1
    if not labels or labels % 3:
        return []
    values.append(_value_of(answer[begin:]))
    if not all(values):
        return []
    return [_Leg(*values[i : i + 3]) for i in range(0, len(values), 3)]


def _value_of(text: str) -> str:
    # A tag, such as </answer>, ends a value too.
    return text.split("\n", 1)[0].split("--", 1)[0].split("<", 1)[0].strip().strip(",;*_ \t")


def _score_short(problem: Problem, answer: str) -> Outcome:
    said, boxed = _said(problem.kind, answer)
    closeness = 0.0
    failure = "bad_format"
    if said is not None:
        error = abs(said - problem.answer)
        failure = "wrong" if error else "none"
        dense = problem.kind in ("Counting2", "Counting3")
        closeness = 0.5 ** min(error, 64) if dense else float(error == 0)
    correct = failure == "none"
    detail = DETAIL * max(closeness, _listing(problem, answer))
    return Outcome(correct, detail, boxed and said is not None, FAILURE_CODE[failure])


def _said(kind: str, answer: str) -> tuple[int | None, bool]:
    """(the one answer given, or None if there is none or several differ; whether it is boxed)."""
    boxes = re.findall(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}", answer)
    texts = boxes or [answer]
    said = {_value(kind, text) for text in texts}
    return (said.pop() if len(said) == 1 else None), bool(boxes)


def _value(kind: str, text: str) -> int | None:
    """What a short text says: bare or wrapped in \\text{}, $, brackets or bold, perhaps with a full stop.

    Letters and digits of any script that mean an ASCII one (full-width, superscript, circled) are read as it.
    """
    bare = "".join(map(_plain_letter, _WRAPPING.sub("", text))).rstrip(".,")
    if kind in ("TorF1", "TorF2"):
        return {"yes": 1, "no": 0}.get(bare)
    if kind == "Counting1":
        return CHOICES.get(bare)
    return int(bare) if _NUMBER.fullmatch(bare) else None


def _plain_letter(letter: str) -> str:
    folded = fold(letter)
    return folded if len(folded) == 1 and folded.isascii() else letter


def _listing(problem: Problem, answer: str) -> float:
    """F1 of the ``Stops: [...]`` or ``Lines: [...]`` of an answer against the problem's own steps; 0 without
    either.

    Repeats count as wrong entries; of several lists the last counts.
    """
    lists = _LISTED.findall(answer)
    want = gold_keys(problem)
    if not lists or not want:
        return 0.0
    key = list_key(problem.kind)
    listed = [entry.strip() for entry in lists[-1].split(",") if entry.strip()]
    have = {key(entry) for entry in listed if len(entry) <= LONGEST_NAME}
    return 2 * len(want & have) / (len(want) + len(listed)) if listed else 0.0


def list_key(kind: str) -> Callable[[str], str]:
    """How the entries of a list in an answer of that kind are compared."""
    return station_key if kind == "Counting1" else line_key


def gold_keys(problem: Problem) -> frozenset[str]:
    """Keys of the stops or lines that a full answer lists; empty where the problem does not carry them."""
    gold = problem.fine_grained_answer
    if isinstance(gold, dict):
        gold = [entry for named in gold.values() for entry in (named if isinstance(named, list) else [named])]
    if not isinstance(gold, list) or not all(isinstance(entry, str) for entry in gold):
        return frozenset()
    return frozenset(map(list_key(problem.kind), gold)) - {""}
