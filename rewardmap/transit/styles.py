"""House styles of full-size maps: colours, strokes, markers, lettering, and how lines are called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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
    "Silver": "#7c868c",
    "Yellow": "#f3c200",
    "Teal": "#00877b",
    "Lime": "#9bc832",
    "Magenta": "#d6007f",
    "Wine": "#8c1735",
    "Violet": "#6a5acd",
    "Mint": "#5cc4a0",
    "Coral": "#f4755e",
    "Sand": "#c9a86a",
    "Indigo": "#3d2f8f",
    "Lavender": "#b79ad6",
    "Sky": "#8cc2ee",
    "Slate": "#4a5f78",
    "Forest": "#2f5d34",
    "Gold": "#b8860b",
    "Rose": "#f2a7a0",
}
"""Colours by the names that colour-named lines take; the first two letters tell them apart, as badges show."""

COLOUR_GAP = {"easy": 40.0, "middle": 36.0, "hard": 28.0}
"""Least distance of two lines' colours on a map of a level, in CIELAB (2 is just visible)."""
CROWDED_GAP, CROWDED = 20.0, 12
"""The same on maps with more lines than ``CROWDED``, whose colours cannot all lie so far apart."""
PAPER_GAP, PAPER_LIGHTNESS_GAP = 30.0, 14.0
"""Least distance of a line's colour from the background, and of its lightness alone."""


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
    rail: str
    """Lines of other railways, which are no lines of the network: pale."""
    marker: str
    """Ordinary stops: "tick", "dot" (in the line), "ring" (outlined), "pip" (small dark dot), "bar" (across the line)
    or "pearl" (white, rimmed in the line's colour)."""
    hub: str
    """Interchanges: "ring", "double" (ring with a dot), "disc" (solid rim) or "target" (two rings)."""
    link: str
    """Stations across shared track: "capsule" or "dumb-bell" (two rings and a neck)."""
    stroke: float
    family: str
    font_px: int
    bold_hubs: bool
    slanted: bool
    """Names along flat track stand at 45 degrees."""
    badge: str
    """Line badges: "square", "disc" or "pill" (with the line's whole name)."""
    legend: str
    """Where the lines are listed: at the "foot" or at the "side"."""
    line_names: str
    """How lines are called: by "number", "letter", "colour" or "code" (M1)."""


STYLES = {
    style.name: style
    for style in (
        Style("harbour", "#ffffff", "#14202e", "#cfe6f5", "#e3f1dc", None, "#f3f5f7", "#c9ced4",
              "tick", "ring", "dumb-bell", 9.0, "inter", 15, True, False, "square", "foot", "colour"),
        Style("fjord", "#fbf8f0", "#22262b", "#d3e7ea", "#e4efd6", "#f3eddd", "#f2ebdb", "#d2ccbd",
              "dot", "double", "capsule", 10.0, "noto", 16, True, False, "square", "foot", "number"),
        Style("night", "#1d232b", "#f2f4f6", "#26384a", "#26352d", None, "#2a323d", "#46505c",
              "ring", "ring", "capsule", 9.0, "inter", 15, True, False, "disc", "side", "number"),
        Style("alpine", "#f4f6f4", "#1c1c1c", "#c9def0", "#dcebcf", "#e9eeea", "#ffffff", "#c8cdca",
              "pip", "disc", "capsule", 8.0, "noto", 16, False, False, "disc", "foot", "letter"),
        Style("delta", "#ffffff", "#1a1a2e", "#d9ecf7", "#e6f2da", "#f6f6f1", "#f5f5f8", "#ccced4",
              "pearl", "target", "dumb-bell", 11.0, "inter", 15, True, True, "pill", "side", "code"),
        Style("mosaic", "#eef2f5", "#20262e", "#c6dcec", "#d9e8d2", None, "#ffffff", "#c2cad1",
              "bar", "ring", "capsule", 7.0, "inter", 15, True, True, "disc", "foot", "letter"),
    )
}  # fmt: skip


def lab(colour: str) -> np.ndarray:
    """[3] CIELAB of ``#rrggbb`` (sRGB, D65)."""
    srgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(srgb > 0.04045, ((srgb + 0.055) / 1.055) ** 2.4, srgb / 12.92)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ linear / np.array([0.9505, 1.0, 1.089])
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def colour_gap(level: str, lines: int) -> float:
    """Least distance in CIELAB between the colours of a map with so many lines."""
    return CROWDED_GAP if lines > CROWDED else COLOUR_GAP[level]


def line_tints(style: Style, level: str, lines: int, rng: np.random.Generator) -> list[str]:
    """Names in ``PALETTE`` of a map's line colours, far enough from each other and from the paper."""
    paper = lab(style.background)
    colours = {name: lab(value) for name, value in PALETTE.items()}
    fit = [
        name
        for name, value in colours.items()
        if np.linalg.norm(value - paper) >= PAPER_GAP and abs(value[0] - paper[0]) >= PAPER_LIGHTNESS_GAP
    ]
    while True:
        chosen: list[str] = []
        for index in rng.permutation(len(fit)):
            if all(np.linalg.norm(colours[fit[index]] - colours[c]) >= colour_gap(level, lines) for c in chosen):
                chosen.append(fit[index])
        if len(chosen) >= lines:
            return chosen[:lines]


def line_name(style: Style, index: int, colour: str) -> str:
    """The name of a map's line number ``index`` (from 0) in the colour called ``colour``."""
    return {
        "number": f"Line {index + 1}",
        "letter": f"Line {chr(65 + index)}",
        "colour": f"{colour} Line",
        "code": f"M{index + 1}",
    }[style.line_names]


def badge_texts(names: Sequence[str]) -> dict[str, str]:
    """What the lines' small badges show: number, letter or code, or the letters of a colour that tell it apart."""
    words = {name: name.removeprefix("Line ").removesuffix(" Line") for name in names}
    texts = {}
    for name, word in words.items():
        alone = sum(other[0] == word[0] for other in words.values()) == 1
        texts[name] = word if not name.endswith(" Line") else word[0] if alone else word[:2]
    return texts
