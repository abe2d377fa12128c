"""ReasonMap's map score of a route: how much of a reference plan it states, at most 20 for short answers, 40 for long.

``released`` counts as the published scripts do, bugs included; ``paper`` as arXiv 2505.18675 defines it. Both share the
frame: 1 for the ends, then leg by leg 2 for the line, 1 for each end; long answers also say how many stops lie between
(at most 4 a leg, 10 in all) or which (count and overlap, at most 10). What is stated right is capped at 10 (short) or
20 (long); a route that is right as a whole earns as much again. The best of the reference plans counts.

Where the sources leave a reading open, this is ours: the ends are those the question names; without both there is
nothing; the cap of long answers is on the sum; overlap is taken over the stops of all legs whose lines agree.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rewardmap.evaluate.reading import Form, StatedLeg, form_of, strict
from rewardmap.rewards.parse import unbracketed
from rewardmap.rewards.topology import line_key, station_key
from rewardmap.types import DataError, Problem

Behaviour = Literal["released", "paper"]
STATED_CAP = {"short": 10.0, "count": 20.0, "list": 20.0}
"""Most that a route can earn for what it states; it earns as much again when it is right."""


@dataclass(frozen=True, slots=True)
class PlanLeg:
    """One leg of a reference plan, as the data has it."""

    line: str
    departure: str
    arrival: str
    via_stops: tuple[str, ...]
    via_count: int


def most(form: Form) -> float:
    """The best map score: 20 for short answers, 40 for long ones."""
    return 2 * STATED_CAP[form]


def reference_plans(problem: Problem) -> list[list[PlanLeg]]:
    """The reference plans of a planning question. Raises DataError where it has none, or a leg lacks a field."""
    plans = problem.fine_grained_answer
    if not plans or not isinstance(plans, list):
        raise DataError(f"{problem.uid}: no reference routes")
    if not all(isinstance(plan, list) and plan for plan in plans):
        raise DataError(f"{problem.uid}: a reference route is no list of legs")
    return [[_plan_leg(problem, leg) for leg in plan] for plan in plans]


def _plan_leg(problem: Problem, leg: Mapping[str, Any]) -> PlanLeg:
    form = form_of(problem)
    via_field = {"short": [], "count": ["num_via_stops"], "list": ["via_stops"]}[form]
    needed = ["route_name", "departure_stop", "arrival_stop", *via_field]
    missing = [name for name in needed if not isinstance(leg, Mapping) or leg.get(name) is None]
    if missing:
        raise DataError(f"{problem.uid}: a leg of a reference route lacks {', '.join(map(repr, missing))}")
    via, count = ((), 0) if form == "short" else (leg.get("via_stops") or (), leg.get("num_via_stops"))
    try:
        stops = tuple(stop.strip() for stop in via.split(",")) if isinstance(via, str) else tuple(map(str, via))
        via_count = len(stops) if count is None else int(count)
        if via_count not in range(10_000):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        wrong = f"via_stops {via!r:.80} and num_via_stops {count!r:.80}"
        raise DataError(f"{problem.uid}: a leg of a reference route has {wrong}, not names and their number") from None
    return PlanLeg(
        line=str(leg["route_name"]),
        departure=str(leg["departure_stop"]),
        arrival=str(leg["arrival_stop"]),
        via_stops=stops,
        via_count=via_count,
    )


def map_score(problem: Problem, legs: Sequence[StatedLeg], right: bool, behaviour: Behaviour) -> float:
    """Map score of a route with the given legs, 0 .. ``most``. ``right``: whether the route is right as a whole."""
    if not legs:
        return 0.0
    form = form_of(problem)
    cap = STATED_CAP[form]
    stated = max(_stated(problem, legs, plan, form, behaviour) for plan in reference_plans(problem))
    return min(stated, cap) + cap * right


def _stated(
    problem: Problem, legs: Sequence[StatedLeg], plan: Sequence[PlanLeg], form: Form, behaviour: Behaviour
) -> float:
    key = strict if behaviour == "released" else station_key
    if key(legs[0].departure) != key(problem.station_1) or key(legs[-1].arrival) != key(problem.station_2):
        return 0.0
    if behaviour == "released":
        plan = [_converted(leg, _is_chinese(problem), form) for leg in plan]
    pairs = list(zip(legs, plan, strict=False))
    agree = [_lines_agree(said.line, leg.line, behaviour) for said, leg in pairs]
    score = 1.0
    for (said, leg), same_line in zip(pairs, agree, strict=True):
        score += 2.0 * same_line
        score += (key(said.departure) == key(leg.departure)) + (key(said.arrival) == key(leg.arrival))
    if form == "count":
        score += min(10.0, sum(_count_credit(said.via_count, leg.via_count, behaviour) for said, leg in pairs))
    elif form == "list":
        score += _list_credit(pairs, agree, behaviour)
    return score


def _count_credit(said: int | None, true: int, behaviour: Behaviour) -> float:
    if said is None:
        return 0.0
    if said == true:
        return 4.0
    scale = true if behaviour == "released" else max(said, true)
    return max(0.0, 4.0 - 4.0 * abs(said - true) / scale) if scale else 0.0


def _list_credit(pairs: Sequence[tuple[StatedLeg, PlanLeg]], agree: Sequence[bool], behaviour: Behaviour) -> float:
    """(10 overlap + number of stops named) / 2, at most 10. ``released`` gives nothing outside China."""
    if behaviour == "released" and not any("站" in (said.via_stops or "") for said, _ in pairs):
        return 0.0
    named, hit_all, union = 0, 0, 0
    for (said, leg), same_line in zip(pairs, agree, strict=True):
        answered, true = _via(said.via_stops or "", behaviour), _reference_via(leg, behaviour)
        named += len(answered & true)
        if same_line:
            hit_all += len(answered & true)
            union += len(answered | true)
    # Nothing between the ends, and nothing said to be: full overlap in the paper's sense, none in the scripts'.
    overlap = hit_all / union if union else float(behaviour == "paper" and any(agree))
    return (10.0 * overlap + min(named, 10)) / 2


def _via(text: str, behaviour: Behaviour) -> set[str]:
    pieces = text.split(",")
    if behaviour == "released":
        return {piece for piece in pieces if piece}  # uncleaned: a space behind the comma breaks the match
    return {station_key(piece) for piece in pieces if piece.strip() and piece.strip().lower() != "none"}


def _reference_via(leg: PlanLeg, behaviour: Behaviour) -> set[str]:
    return set(leg.via_stops) if behaviour == "released" else {station_key(stop) for stop in leg.via_stops}


def _lines_agree(said: str, true: str, behaviour: Behaviour) -> bool:
    return said == true != "" if behaviour == "released" else line_key(said) == line_key(true)


def _is_chinese(problem: Problem) -> bool:
    return problem.network_id.split("/")[0] == "china"


def _converted(leg: PlanLeg, chinese: bool, form: Form) -> PlanLeg:
    """The scripts' view of a reference leg: names of the map service turned into names of the map.

    Outside China they derive the line's name from the model's own answer, and no line ever scores; where the departure
    carries its suffix already, the arrival becomes the departure (but not for long answers in China).
    """
    suffix = "站" if chinese else " Station"
    departure, arrival = (name if name.endswith(suffix) else name + suffix for name in (leg.departure, leg.arrival))
    if leg.departure.endswith(suffix) and not (chinese and form != "short"):
        arrival = leg.departure
    line = ""
    if chinese:
        number = re.search(r"\d+", leg.line)
        line = f"Line {number.group()}" if number else unbracketed(leg.line).replace("地铁", "")
    via = tuple(stop if stop.endswith(suffix) else stop + suffix for stop in leg.via_stops)
    return PlanLeg(line, departure, arrival, via, leg.via_count)
