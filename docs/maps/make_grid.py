"""Draws docs/maps/grid.png: warehouse floors of each level, two of each, and a row of tiny ones.

Run from the repository root: python docs/maps/make_grid.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from rewardmap.transit.draw import draw_map
from rewardmap.transit.generate import generate_network
from rewardmap.transit.grid import TINY_GRID_LEVELS
from rewardmap.transit.grid_floor import FLOOR_LEVELS

WIDTH, HEIGHT, GAP, TINY = 760, 500, 14, 9


def main() -> None:
    """Writes the sheet beside this file, and one hard floor at full size."""
    side = (3 * WIDTH + 4 * GAP) // TINY - GAP - 1
    sheet = Image.new("RGB", (3 * WIDTH + 4 * GAP, 2 * HEIGHT + side + 4 * GAP), "#8a9097")
    for x, level in enumerate(FLOOR_LEVELS):
        for y in range(2):
            picture = draw_map(generate_network(level, np.random.default_rng([2, y]), f"sheet/{level}"))
            if y == 0 and level == "grid-hard":
                picture.save(Path(__file__).with_name("grid_hard.png"), optimize=True)
            scale = min(WIDTH / picture.width, HEIGHT / picture.height)
            small = picture.resize(
                (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS
            )
            frame = Image.new("RGB", (WIDTH, HEIGHT), picture.getpixel((2, 2)))
            frame.paste(small, ((WIDTH - small.width) // 2, (HEIGHT - small.height) // 2))
            sheet.paste(frame, (GAP + x * (WIDTH + GAP), GAP + y * (HEIGHT + GAP)))
    for x in range(TINY):
        network = generate_network(TINY_GRID_LEVELS[x % 3], np.random.default_rng([1, x]), f"tiny/{x}")
        small = draw_map(network).resize((side, side), Image.Resampling.BICUBIC)
        sheet.paste(small, (GAP + x * (side + GAP), GAP + 2 * (HEIGHT + GAP)))
    # 256 colours look the same at this size, in a third of the bytes.
    sheet.quantize(256, kmeans=2).save(Path(__file__).with_name("grid.png"), optimize=True)


if __name__ == "__main__":
    main()
