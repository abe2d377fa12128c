"""Answer text to values, exactly as the published reward reads it (bugs included).

Everything here is plain Python and serves two masters: it scores the few answers that the compiled path
hands back, and it is the definition that the compiled path is tested against. Source: the reference
implementation of arXiv 2510.02240 (normaliser, answer extraction, leg parsing); the quirks are deliberate.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from rewardmap.types import DataError, MetroData

MARKERS = (" (Transfer Station)", " (Branch-starting Station)", "（换乘站）", "（支线起始站）")
"""What the data appends to transfer and branch stations; only these exact strings are stripped."""

MISSING = "Wrong"
"""Stands for a line or a departure whose label is there but whose value cannot be read."""

# Order matters: "Univ." grows to "University", whose "Univ" then grows again ("Universityersity").
_REWRITES = (
    *((gone, "") for gone in ("Metro", "metro", ",", "*", "\n", "'")),
    ("Univ.", "University"),
    ("Univ", "University"),
    ("Tech.", "Technology"),
    ("Tech", "Technology"),
    ("road", "lu"),
    ("Road", "lu"),
    ("Station", ""),
    ("station", ""),
    ("Asian Games Village", "yayuncun"),
)
_BRACKETED = re.compile(r"[(（][^)）]*[)）]")
SPACE_OR_HYPHEN = re.compile(r"[\s\-]+")
_LABELS = ("Route Name:", "Departure Stop:", "Arrival Stop:")
_LOWER_LABELS = tuple(label.lower() for label in _LABELS)
PHRASES = tuple(
    spelling
    for phrase in ("the final answer is", "the answer is", "the correct answer is", "the answer should be")
    for spelling in (phrase, phrase.replace("the", "The"))
)
"""What announces an answer outside a box, in the order in which they are looked for."""

# The reference's LaTeX tidy, in its order. Rewrites to \frac, \sqrt, \infty and pmatrix are left out: what
# they produce or keep can never equal an accepted answer (yes, no, a letter, an integer), and no later step
# removes it.
LATEX_REWRITES = (
    (" ", ""),
    ("\\,", ""),
    ("\\\\", "\\"),
    ("\n", ""),
    *((gone, "") for gone in ("\\text", "\\mbox", "\\left", "\\right", "^{\\circ}", "^\\circ")),
    *((gone, "") for gone in ("{m}^3", "m^3", "{units}", "units", "{km}", "km")),
    ("\\!", ""),
    ("\\\\", "\\"),
    *((gone, "") for gone in ("\\left", "\\right", "^{\\circ}", "^\\circ", "\\$", "$", "\\%", "\\%")),
)


class Leg(NamedTuple):
    """One ride as the answer states it."""

    line: str
    """As written, trimmed; ``MISSING`` when unreadable."""
    departure: str
    """Cleaned twice."""
    arrival: str
    """Cleaned twice; everything behind the last ``Arrival Stop:`` of its piece."""
    exact_labels: bool
    """All three labels in their exact case. Correctness reads only such legs, detail reads the others too."""
    complete: bool
    """Exact labels, and each of the three with a readable value: what the asked format demands."""


def strip_markers(name: str) -> str:
    """The station's name without the data's transfer and branch markers."""
    for marker in MARKERS:
        name = name.replace(marker, "")
    return name


def unbracketed(name: str) -> str:
    """The name without bracketed text, ASCII or full-width."""
    # Behind the last closing bracket each opening one would be followed to the end: thousands take minutes.
    end = max(name.rfind(")"), name.rfind("）")) + 1
    return _BRACKETED.sub("", name[:end]) + name[end:]


def clean(name: str) -> str:
    """One pass of the reference's normaliser; not idempotent. Answers get two, gold names and lists one."""
    for old, new in _REWRITES:
        name = name.replace(old, new)
    name = name.removesuffix("站")
    return SPACE_OR_HYPHEN.sub("", unbracketed(name)).lower()


def clean_network(network_id: str, metro: MetroData) -> dict[str, frozenset[str]]:
    """Line key -> its cleaned stops. Raises DataError where the network is not ``{line: [station, ...]}``."""
    if not isinstance(metro, Mapping):
        raise DataError(f"network {network_id!r}: {type(metro).__name__} is not an object of line -> stations")
    lines = {}
    for line, stations in metro.items():
        if isinstance(stations, str) or not all(isinstance(station, str) for station in stations):
            raise DataError(f"network {network_id!r}, line {line!r}: {stations!r} is not a list of names")
        lines[line] = frozenset(clean(strip_markers(station)) for station in stations)
    return lines


def split_legs(response: str) -> tuple[list[Leg], bool]:
    """The legs an answer states, in order, and whether any of them is torn.

    A leg is a piece between ``--`` that holds the three labels in any case; a torn one holds only some of
    them and is not listed.
    """
    legs: list[Leg] = []
    torn = False
    for piece in response.split("--"):
        lowered = piece.lower()
        found = sum(label in lowered for label in _LOWER_LABELS)
        if found < len(_LABELS):
            torn |= found > 0
            continue
        exact = all(label in piece for label in _LABELS)
        line, departure = line_after("Route Name: ", piece), line_after("Departure Stop: ", piece)
        arrival = clean(clean(piece.split("Arrival Stop:")[-1].strip()))
        legs.append(
            Leg(
                line=MISSING if line is None else line.strip(),
                departure=clean(clean(MISSING if departure is None else departure)),
                arrival=arrival,
                exact_labels=exact,
                complete=exact and line is not None and departure is not None and arrival != "",
            )
        )
    return legs, torn


def line_after(label: str, piece: str) -> str | None:
    """What follows the first such label up to the end of its line; None where either is missing."""
    # Not a pattern: that would try each of many labels in a line that never ends, which takes minutes.
    start = piece.find(label)
    end = piece.find("\n", start) if start >= 0 else -1
    return piece[start + len(label) : end] if end >= 0 else None


def extract_answer(response: str) -> str:
    """The short answer of a TorF or Counting response, lower-cased and stripped of LaTeX."""
    if "oxed{" not in response:
        for phrase in PHRASES:
            if phrase in response:
                response = response.rsplit(phrase, 1)[1].strip().split("\n", 1)[0].split(". ", 1)[0]
            else:
                response = response.strip()
    elif response.count("oxed{") > 1:
        response = "\\boxed{" + response.rsplit("oxed{", 1)[1]
    return _tidy(response).rstrip(".").lstrip(":").strip()


def _tidy(text: str) -> str:
    text = text.lower().replace("{}", "")
    start, end = text.find("oxed{"), text.rfind("}")
    if start >= 0 and start + 5 <= end:
        text = text[start + 5 : end]
    closing, opening = text.find("}"), text.find("{")
    if closing != -1 and (opening == -1 or closing < opening):
        text = text[:closing]
    text = text.rsplit("=", 1)[-1].rsplit("\\approx", 1)[-1]
    for old, new in LATEX_REWRITES:
        text = text.replace(old, new)
    if text.startswith("."):
        text = "0" + text
    if text.count("\\approx") == 1:
        text = text.split("\\approx")[1]
    return text


def is_boxed(response: str) -> bool:
    r"""Whether the response holds a closed ``\boxed{...}``, which the Plus questions ask for."""
    start = response.rfind("\\boxed{")
    return start != -1 and "}" in response[start:]
