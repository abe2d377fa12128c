"""What questions and ideal answers look like: the templates of ReasonMap and ReasonMap-Plus, word for word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from rewardmap.transit.graph import Route
from rewardmap.types import DataError, Problem

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
_COUNT_LABEL, _LIST_LABEL = "Number of Via Stops: ", "Via Stops: "
_DETAIL = {
    "short": ("with only the line name and the departure and arrival stations", ""),
    "count": (
        "and include the number of via stops for each route section (excluding the departure and arrival stops)",
        f"\n{_COUNT_LABEL}x",
    ),
    "list": ("including all the via stops", f"\n{_LIST_LABEL}xx Station, xx Station"),
}


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
        return planning_text(station_1, station_2)
    raise ValueError(f"unknown question kind {kind!r}")


def planning_text(station_1: str, station_2: str, detail: Literal["short", "count", "list"] = "short") -> str:
    """A planning question: the short template, or the long ones that ask for the number or the list of via stops.

    The labels and the wishes are the papers'; how the long templates join them is not published.
    """
    wish, line = _DETAIL[detail]
    return (
        f"According to the subway map, how do I get from {station_1} to {station_2}? Provide only one "
        f"optimal route, {wish}. The format should be strictly followed:\n{_BLOCK}{line}\n--\n{_BLOCK}{line}"
    )


def gold_response(problem: Problem) -> str:
    """An ideal answer in exactly the form that the question asks for.

    Raises ValueError for a planning problem that does not carry its optimal routes, or not what its question asks of
    them.
    """
    if problem.kind in ("TorF1", "TorF2"):
        return f"\\boxed{{{'yes' if problem.answer == 1 else 'no'}}}"
    if problem.kind == "Counting1":
        return f"\\boxed{{{'ABCD'[problem.answer]}}}"
    if problem.kind in ("Counting2", "Counting3"):
        return f"\\boxed{{{problem.answer}}}"
    if not problem.fine_grained_answer:
        raise ValueError(f"{problem.uid}: fine_grained_answer holds no route, so there is no gold response")
    try:
        return "\n--\n".join(_block(leg, problem.question) for leg in problem.fine_grained_answer[0])
    except (KeyError, TypeError):
        lacking = "lacks the stops between (num_via_stops, via_stops), which the question asks for"
        raise DataError(f"{problem.uid}: a leg of fine_grained_answer {lacking}") from None


def _block(leg: dict[str, Any], question: str) -> str:
    lines = [
        f"Route Name: {leg['route_name']}",
        f"Departure Stop: {leg['departure_stop']}",
        f"Arrival Stop: {leg['arrival_stop']}",
    ]
    if f"\n{_COUNT_LABEL}" in question:
        lines.append(f"{_COUNT_LABEL}{leg['num_via_stops']}")
    elif f"\n{_LIST_LABEL}" in question:
        lines.append(f"{_LIST_LABEL}{', '.join(leg['via_stops']) or 'None'}")
    return "\n".join(lines)


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
