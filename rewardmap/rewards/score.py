"""The published reward in plain Python: one answer in, one outcome out, as the reference gives it.

Source: RewardMap, arXiv 2510.02240, as its released code computes it. What that code does differently from
the paper is kept on purpose and listed in docs/rewards.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rewardmap.rewards.parse import Leg, extract_answer, is_boxed, split_legs

FAILURES = (
    "none",
    "no_answer",
    "bad_format",
    "wrong",
    "endpoint",
    "unknown_line",
    "stop_not_on_line",
    "broken_transfer",
    "wrong_branch",
    "repeated_stop",
    "not_optimal",
)
"""What first went wrong, by code (the index). ``none``: correct. ``no_answer``: blank. ``bad_format``:
nothing of the asked sort could be read. ``wrong``: a readable but wrong yes/no, letter or count. The rest are
about routes, in the order in which they are looked for; the last three exist in ``graph`` mode only."""

FAILURE_CODE = {name: code for code, name in enumerate(FAILURES)}

CHOICES = {"a": 0, "b": 1, "c": 2, "d": 3}
DETAIL_CAP = 10.0

CleanLines = Mapping[str, frozenset[str]]
"""Line key -> its stops, cleaned once: what ``parse.clean_network`` gives."""


class Outcome(NamedTuple):
    """One scored answer before weights; ``failure`` indexes ``FAILURES``."""

    correct: bool
    detail: float
    format_valid: bool
    failure: int


def score_reference(
    kind: str,
    response: str,
    answer: object,
    station_1: str,
    station_2: str,
    transfers_required: int,
    lines: CleanLines,
) -> Outcome:
    """Correctness and detail of one answer as the published code gives them.

    Args:
        kind: one of ``types.KINDS``.
        response: the model's text.
        answer: the gold answer; anything but an integer is wrong whatever the response says, as published.
        station_1: cleaned once, where the route must start; unused for other kinds.
        station_2: cleaned once, where it must end; unused for other kinds.
        transfers_required: fewest transfers of any route.
        lines: the network.
    """
    if kind == "planning":
        return _score_route(response, station_1, station_2, transfers_required, lines)
    return _score_short(kind, response, answer)


def _score_short(kind: str, response: str, answer: object) -> Outcome:
    text = extract_answer(response)
    if kind in ("TorF1", "TorF2"):
        # The reference turns the gold into a word, so that everything but 1 means no.
        readable = text in ("yes", "no")
        correct = text == ("yes" if answer == 1 else "no")
    else:
        value = CHOICES.get(text) if kind == "Counting1" else to_int(text)
        readable = value is not None
        correct = readable and value == answer
    unreadable = "bad_format" if response.strip() else "no_answer"
    failure = "none" if correct else "wrong" if readable else unreadable
    return Outcome(correct, 0.0, readable and is_boxed(response), FAILURE_CODE[failure])


def to_int(text: str) -> int | None:
    """Python's own reading: signs, underscores, surrounding blanks and any script's digits are fine."""
    try:
        return int(text)
    except ValueError:
        return None


def _score_route(response: str, start: str, goal: str, required: int, lines: CleanLines) -> Outcome:
    legs, torn = split_legs(response)
    readable = [leg for leg in legs if leg.exact_labels]
    failure = check_route(readable, start, goal, lines)
    if not readable and not response.strip():
        failure = "no_answer"
    valid = bool(legs) and not torn and all(leg.complete for leg in legs)
    detail = route_detail(legs, start, goal, required, lines)
    return Outcome(failure == "none", detail, valid, FAILURE_CODE[failure])


def check_route(legs: Sequence[Leg], start: str, goal: str, lines: CleanLines) -> str:
    """Name of the first failure of a route, "none" when the reference accepts it."""
    if not legs:
        return "bad_format"
    if legs[0].departure != start or legs[-1].arrival != goal:
        return "endpoint"
    for i, leg in enumerate(legs):
        stops = lines.get(line_key(leg.line))
        if stops is None:
            return "unknown_line"
        if leg.departure not in stops or leg.arrival not in stops:
            return "stop_not_on_line"
        if i + 1 < len(legs) and leg.arrival != legs[i + 1].departure:
            return "broken_transfer"
    return "none"


def route_detail(legs: Sequence[Leg], start: str, goal: str, required: int, lines: CleanLines) -> float:
    """The published detail reward of a route; at most 10, no floor.

    Leg number i+1 > ``required`` costs 5 (so that the last leg of every shortest route is charged), and a
    known line earns 3 unverified where a transfer is required.
    """
    if not legs or legs[0].departure != start or legs[-1].arrival != goal:
        return 0.0
    score = 2.0
    for i, leg in enumerate(legs):
        excess = i + 1 > required
        if excess:
            score -= 5.0
        stops = lines.get(line_key(leg.line))
        if stops is None:
            continue
        if required > 0:
            score += 3.0
        elif start in stops and goal in stops:
            score += 4.0
        joined = i + 1 < len(legs) and leg.arrival == legs[i + 1].departure
        if joined and not excess and leg.departure in stops and leg.arrival in stops:
            score += 1.0
    return min(score, DETAIL_CAP)


def line_key(line: str) -> str:
    """The reference's two aliases, meant for Beijing and applied everywhere."""
    if "八通" in line:
        return "Line 1"
    return "Line 4" if "大兴" in line else line


def score_paper(
    kind: str,
    response: str,
    answer: object,
    station_1: str,
    station_2: str,
    transfers_required: int,
    lines: CleanLines,
) -> Outcome:
    """As ``score_reference``, but with detail as Algorithm 1 of arXiv 2510.02240 prints it."""
    outcome = score_reference(kind, response, answer, station_1, station_2, transfers_required, lines)
    if kind != "planning":
        return outcome
    legs = [leg for leg in split_legs(response)[0] if leg.exact_labels]
    return outcome._replace(detail=paper_detail(legs, station_1, station_2, transfers_required, lines))


def paper_detail(legs: Sequence[Leg], start: str, goal: str, required: int, lines: CleanLines) -> float:
    """Algorithm 1, literally; at most 10, no floor.

    2 for either right endpoint; 4 for the first leg's line ("name correct" read as: it is on the map); 1 for
    each leg that holds its stops and joins the next; 5 off for each leg entered after more transfers than
    required.
    """
    if not legs:
        return 0.0
    score = 2.0 if legs[0].departure == start or legs[-1].arrival == goal else 0.0
    for i, leg in enumerate(legs):
        if i > required:
            score -= 5.0
        stops = lines.get(line_key(leg.line))
        if stops is None:
            continue
        if i == 0:
            score += 4.0
        joined = i + 1 < len(legs) and leg.arrival == legs[i + 1].departure
        if joined and leg.departure in stops and leg.arrival in stops:
            score += 1.0
    return min(score, DETAIL_CAP)
