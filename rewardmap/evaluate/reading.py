"""How the benchmarks read answers: ReasonMap's evaluation of routes, and VLMEvalKit's lenient reading of short answers.

The training reward reads answers in ``rewardmap.rewards.parse``; ReasonMap's evaluation keeps an older normaliser,
which leaves "Station", 站 and apostrophes standing, and takes thinking away first. Source: arXiv 2505.18675, its code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rewardmap.rewards.parse import MISSING, PHRASES, SPACE_OR_HYPHEN, clean, line_after, strip_markers, unbracketed
from rewardmap.rewards.score import CHOICES, line_key
from rewardmap.types import MetroData, Problem

Form = Literal["short", "count", "list"]
"""What a planning question asks for: ends of the legs, and their number of via stops, or the via stops by name."""
Normaliser = Literal["training", "evaluation"]

THINKING_ENDS = ("</think>", "◁/think▷")
_LABELS = ("Route Name:", "Departure Stop:", "Arrival Stop:")
_COUNT = re.compile(r"Number of Via Stops: *(\d+)")
_LIST = re.compile(r"(?<!Number of )Via Stops: *(.*)")


@dataclass(frozen=True, slots=True)
class StatedLeg:
    """One ride as an answer states it, uncleaned; ``MISSING`` where a label's value cannot be read."""

    line: str
    departure: str
    arrival: str
    via_count: int | None
    via_stops: str | None
    """The text behind ``Via Stops:``."""


def form_of(problem: Problem) -> Form:
    """Which of ReasonMap's templates a planning question uses."""
    if "Number of Via Stops:" in problem.question:
        return "count"
    return "list" if "Via Stops:" in problem.question else "short"


def without_thinking(response: str) -> str:
    """What follows the last end-of-thinking tag."""
    for tag in THINKING_ENDS:
        response = response.rsplit(tag, 1)[-1]
    return response


def stated_legs(response: str, form: Form) -> list[StatedLeg]:
    """The legs of an answer: pieces between ``--`` with the three labels in their exact case.

    In the short form the arrival is all that follows its label, in the long ones only its line, which must end.
    """
    legs = []
    for piece in response.split("--"):
        if not all(label in piece for label in _LABELS):
            continue
        arrival = _found("Arrival Stop: ", piece) if form != "short" else piece.split("Arrival Stop:")[-1].strip()
        count, stops = _COUNT.search(piece), _LIST.search(piece)
        legs.append(
            StatedLeg(
                line=_found("Route Name: ", piece),
                departure=_found("Departure Stop: ", piece),
                arrival=arrival,
                via_count=_whole(count.group(1)) if count else None,
                via_stops=stops.group(1) if stops else None,
            )
        )
    return legs


def _whole(digits: str) -> int | None:
    """None for more digits than a count has: models repeat them until neither ``float`` nor ``int`` can follow."""
    return int(digits) if len(digits) <= 18 else None


def _found(label: str, piece: str) -> str:
    value = line_after(label, piece)
    return MISSING if value is None else value.strip()


def strict(name: str) -> str:
    """The evaluation's normaliser: a stop's name must keep its "Station", 站 and apostrophes."""
    for gone in ("Metro", "metro", ",", "*", "\n"):
        name = name.replace(gone, "")
    return SPACE_OR_HYPHEN.sub("", unbracketed(name)).lower()


def route_is_right(problem: Problem, legs: Sequence[StatedLeg], network: MetroData, normaliser: Normaliser) -> bool:
    """Algorithm 1 of ReasonMap: the ends, the lines, the stops on their lines, and legs that join.

    ``training`` cleans as the training reward does, the answer twice and the network once; ``evaluation`` as the
    benchmark's scripts do.
    """
    kept: Callable[[str], str] = clean if normaliser == "training" else strict
    said: Callable[[str], str] = (lambda name: clean(clean(name))) if normaliser == "training" else strict
    if not legs:
        return False
    if said(legs[0].departure) != kept(problem.station_1) or said(legs[-1].arrival) != kept(problem.station_2):
        return False
    for leg, following in zip(legs, (*legs[1:], None), strict=True):
        listed = network.get(line_key(leg.line))
        if listed is None:
            return False
        stops = {kept(strip_markers(stop)) for stop in listed}
        if said(leg.departure) not in stops or said(leg.arrival) not in stops:
            return False
        if following is not None and said(leg.arrival) != said(following.departure):
            return False
    return True


_WORDS: Mapping[str, int] = {
    **dict.fromkeys(("yes", "y", "true", "t", "1"), 1),
    **dict.fromkeys(("no", "n", "false", "f", "0"), 0),
}
_BOX = re.compile(r"\\?boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mbox)\{([^{}]*)\}")


def lenient_answer(kind: str, response: str) -> int | None:
    """A yes/no, choice or count as VLMEvalKit's scorer finds it; None where there is nothing of the sort.

    The last box with ``\\text{}`` unwrapped, else what follows a common answer phrase, else everything; in it yes, y,
    true, t, 1 and their opposites, the first stand-alone letter A to D, or the first whole number.
    """
    boxes = _BOX.findall(response)
    if boxes:
        text = _TEXT.sub(r"\1", boxes[-1])
    else:
        text = response
        for phrase in PHRASES:
            text = text.rsplit(phrase, 1)[-1]
    text = text.strip()
    if kind in ("TorF1", "TorF2"):
        word = re.sub(r"[^a-z0-9]", "", text.lower())
        if word in _WORDS:
            return _WORDS[word]
        found = re.search(r"\b(yes|true|no|false)\b", text.lower())
        return _WORDS[found.group(1)] if found else None
    if kind == "Counting1":
        letter = re.search(r"(?<![A-Za-z])([A-Da-d])(?![A-Za-z])", text)
        return CHOICES[letter.group(1).lower()] if letter else None
    number = re.search(r"-?\d+", text)
    return _whole(number.group()) if number else None
