"""What questions and ideal answers look like: the templates of ReasonMap and ReasonMap-Plus, word for
word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rewardmap.transit.graph import Route
from rewardmap.types import Problem

_BOXED = 'Please solve the problem and put your answer in one "\\boxed{}". According to the subway map, '
_YES_NO = (
    'Please solve the problem and put your answer (only answer yes or no) in one "\\boxed{}". '
    "According to the subway map, "
)
_CHOICE = (
    'Please solve the multiple choice problem and put your answer (one of ABCD) in one "\\boxed{}". '
    "According to the subway map, "
)
_BLOCK = "Route Name: Line x\nDeparture Stop: xx Station\nArrival Stop: xx Station"


def question_text(kind: str, station_1: str = "", station_2: str = "", choices: Sequence[int] = ()) -> str:
    """The text of a question; ``choices`` are the four counts of Counting1, ``station_2`` the line of TorF2.

    Raises ValueError for an unknown kind.
    """
    if kind == "TorF1":
        return f"{_YES_NO}is it true that {station_1} is the same line as {station_2}?"
    if kind == "TorF2":
        return f"{_YES_NO}is it true that {station_1} is on the line {station_2}?"
    if kind == "Counting1":
        options = "".join(f"{letter}) {count} \n" for letter, count in zip("ABCD", choices, strict=True))
        return (
            f"{_CHOICE}how many intermediate stops are there between {station_1} and {station_2} "
            f"(except for this two stops)? \n{options}"
        )
    if kind == "Counting2":
        return f"{_BOXED}how many lines pass through {station_1}?"
    if kind == "Counting3":
        return f"{_BOXED}how many subway (metro) lines are there in total?"
    if kind == "planning":
        return (
            f"According to the subway map, how do I get from {station_1} to {station_2}? Provide only one "
            "optimal route, with only the line name and the departure and arrival stations. "
            f"The format should be strictly followed:\n{_BLOCK}\n--\n{_BLOCK}"
        )
    raise ValueError(f"unknown question kind {kind!r}")


def gold_response(problem: Problem) -> str:
    """An ideal answer in exactly the form that the question asks for.

    Raises ValueError for a planning problem that does not carry its optimal routes.
    """
    if problem.kind in ("TorF1", "TorF2"):
        return f"\\boxed{{{'yes' if problem.answer == 1 else 'no'}}}"
    if problem.kind == "Counting1":
        return f"\\boxed{{{'ABCD'[problem.answer]}}}"
    if problem.kind in ("Counting2", "Counting3"):
        return f"\\boxed{{{problem.answer}}}"
    if not problem.fine_grained_answer:
        raise ValueError(f"{problem.uid}: fine_grained_answer holds no route, so there is no gold response")
    return "\n--\n".join(
        f"Route Name: {leg['route_name']}\nDeparture Stop: {leg['departure_stop']}\nArrival Stop: {leg['arrival_stop']}"
        for leg in problem.fine_grained_answer[0]
    )


def routes_as_plans(routes: Sequence[Route]) -> list[list[dict[str, Any]]]:
    """Routes in the form of ReasonMap's ``routes``: per plan, per leg, names, via stops and their number."""
    return [
        [
            {
                "route_name": leg.line,
                "departure_stop": leg.departure,
                "arrival_stop": leg.arrival,
                "via_stops": list(leg.via),
                "num_via_stops": len(leg.via),
            }
            for leg in route
        ]
        for route in routes
    ]
