"""The typefaces of full-size maps: subsets that the package carries, so that a seed looks the same on every machine.

``rewardmap/assets/fonts/README.md`` says where they come from; ``docs/maps/make_fonts.py`` made them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from PIL import ImageFont

_FOLDER = Path(__file__).parents[1] / "assets" / "fonts"


@lru_cache(maxsize=128)
def map_font(size: int, bold: bool = False, family: str = "inter") -> ImageFont.FreeTypeFont:
    """The face of a family at ``size`` pixels per em. Raises OSError for an unknown family.

    "inter" and "noto", Inter and Noto Sans: Latin with diacritics and Cyrillic. "han": Noto Sans CJK with the Chinese
    of names.
    """
    path = _FOLDER / f"{family}-{'bold' if bold else 'regular'}.otf"
    # Basic layout: the other engine is used only where the machine has FriBiDi, and spaces letters differently.
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def wrapped(text: str, width: Callable[[str], float], room: float) -> list[str]:
    """The lines of a text, broken at blanks to at most ``room`` pixels each; a word that is longer is broken anywhere,
    such as Chinese, which has no blanks. ``width`` gives a line's pixels."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in re.findall(r"\S+\s*", paragraph):
            for piece in [word] if width(word.rstrip()) <= room else word:
                if line and width((line + piece).rstrip()) > room:
                    lines.append(line.rstrip())
                    line = ""
                line += piece
        lines.append(line.rstrip())
    return lines
