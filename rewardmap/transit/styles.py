"""House styles of full-size maps: colours, strokes, markers, and how lines are called."""

from __future__ import annotations

from dataclasses import dataclass

PALETTE = {
    "Red": "#dc241f",
    "Blue": "#0a53b4",
    "Green": "#0a8f3c",
    "Orange": "#ee7d11",
    "Purple": "#8f3f97",
    "Brown": "#94592a",
    "Cyan": "#1aa7d8",
    "Pink": "#ee6ea8",
    "Olive": "#8f9a1c",
    "Grey": "#7c868c",
    "Yellow": "#f3c200",
    "Teal": "#00877b",
}
"""Colours far enough apart to be told from each other, by the names that colour-named lines take."""


@dataclass(frozen=True, slots=True)
class Style:
    """One house style. Lengths are pixels of the finished picture."""

    name: str
    background: str
    ink: str
    water: str
    park: str
    zone: str | None
    panel: str
    marker: str
    """Ordinary stops: "tick", "dot" (in the line), "ring" (outlined) or "pip" (small dark dot)."""
    hub: str
    """Interchanges: "ring", "double" (ring with a dot) or "disc" (solid)."""
    stroke: float
    font_px: int
    bold_hubs: bool
    line_names: str
    """How lines are called: by "number", "letter" or "colour"."""


STYLES = {
    style.name: style
    for style in (
        Style("harbour", "#ffffff", "#14202e", "#cfe6f5", "#e3f1dc", None, "#f3f5f7",
              "tick", "ring", 9.0, 15, True, "colour"),
        Style("fjord", "#fbf8f0", "#22262b", "#d3e7ea", "#e4efd6", "#f3eddd", "#f2ebdb",
              "dot", "double", 10.0, 15, True, "number"),
        Style("night", "#1d232b", "#f2f4f6", "#26384a", "#26352d", None, "#2a323d",
              "ring", "ring", 9.0, 15, True, "number"),
        Style("alpine", "#f4f6f4", "#1c1c1c", "#c9def0", "#dcebcf", "#e9eeea", "#ffffff",
              "pip", "disc", 8.0, 15, False, "letter"),
    )
}  # fmt: skip


def line_name(style: Style, index: int, colour: str) -> str:
    """The name of a map's line number ``index`` (from 0) in the colour called ``colour``."""
    return {"number": f"Line {index + 1}", "letter": f"Line {chr(65 + index)}", "colour": f"{colour} Line"}[
        style.line_names
    ]


def badge_text(name: str) -> str:
    """What a line's badge shows: its number or letter, or the first letter of its colour."""
    return name.removeprefix("Line ") if name.startswith("Line ") else name[0]
