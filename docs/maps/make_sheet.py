"""Draws docs/maps/contact_sheet.png: maps of each level in each house style, and a row of tiny ones.

Run from the repository root: python docs/maps/make_sheet.py
"""

from __future__ import annotations

from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image

from rewardmap.transit.draw import draw_map
from rewardmap.transit.generate import TINY_LEVELS, generate_network
from rewardmap.transit.styles import STYLES

WIDTH, HEIGHT, GAP = 560, 500, 14
LINES = {"easy": (2, 3), "middle": (4, 6), "hard": (6, 11)}
"""Fewest and most lines of the maps shown; more would not be seen so small."""
HARD_MAP = 4
"""Which of the hard maps is shown at full size as well."""


def main() -> None:
    """Writes the sheet beside this file, and one hard map at full size."""
    rows: list[list[Image.Image]] = []
    tiny = [generate_network(TINY_LEVELS[i % 3], np.random.default_rng([1, i]), f"tiny/{i}") for i in range(9)]
    for level, (fewest, most) in LINES.items():
        wanted: dict[str, Image.Image] = {}
        for seed in count():
            network = generate_network(level, np.random.default_rng([4, seed]), f"sheet/{level}")
            if network.style not in wanted and fewest <= len(network.lines) <= most:
                wanted[network.style] = draw_map(network)
            if len(wanted) == len(STYLES):
                break
        rows.append([wanted[style] for style in STYLES])
    rows[2][HARD_MAP].save(Path(__file__).with_name("hard_map.png"), optimize=True)
    side = (len(STYLES) * (WIDTH + GAP) - GAP) // len(tiny) - GAP
    sheet = Image.new("RGB", (len(STYLES) * (WIDTH + GAP) + GAP, 3 * (HEIGHT + GAP) + side + 2 * GAP), "#8a9097")
    for y, pictures in enumerate(rows):
        for x, picture in enumerate(pictures):
            scale = min(WIDTH / picture.width, HEIGHT / picture.height)
            small = picture.resize(
                (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS
            )
            frame = Image.new("RGB", (WIDTH, HEIGHT), picture.getpixel((2, 2)))
            frame.paste(small, ((WIDTH - small.width) // 2, (HEIGHT - small.height) // 2))
            sheet.paste(frame, (GAP + x * (WIDTH + GAP), GAP + y * (HEIGHT + GAP)))
    for x, network in enumerate(tiny):
        small = draw_map(network).resize((side, side), Image.Resampling.BICUBIC)
        sheet.paste(small, (GAP + x * (side + GAP), GAP + 3 * (HEIGHT + GAP)))
    # 256 colours look the same at this size, in a third of the bytes.
    sheet.quantize(256, kmeans=2).save(Path(__file__).with_name("contact_sheet.png"), optimize=True)


if __name__ == "__main__":
    main()
