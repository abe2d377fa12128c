"""Pictures of networks. All is drawn large and shrunk once: edges are smooth and bytes reproducible."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any, cast

from PIL import Image, ImageDraw, ImageFont

from rewardmap.transit.graph import Network

_SCALE = 4
_BACKGROUND = "#fbfaf6"
_INK = "#16181d"


@lru_cache(maxsize=64)
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The TrueType font that Pillow ships, ``size`` pixels per em: the same on every machine."""
    return ImageFont.load_default(size=size)


def draw_map(network: Network) -> Image.Image:
    """The map's picture, RGB, ``network.size`` pixels. Raises ValueError for a network without geometry."""
    if network.style == "tiny":
        return _draw_tiny(network)
    if network.style in ("grid-tiny", "grid"):
        from rewardmap.transit.grid_draw import draw_grid

        return draw_grid(network)
    if "geometry" not in network.extras:
        raise ValueError(f"network {network.network_id!r} has no geometry, so it cannot be drawn")
    from rewardmap.transit.render import render

    return render(cast(dict[str, Any], network.extras["geometry"]))


def encode_png(image: Image.Image) -> bytes:
    """PNG bytes; equal pictures give equal bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=False, compress_level=6)
    return buffer.getvalue()


def _draw_tiny(network: Network) -> Image.Image:
    s = _SCALE
    picture = Image.new("RGB", (network.size[0] * s, network.size[1] * s), _BACKGROUND)
    pen = ImageDraw.Draw(picture)
    at = {stop: (x * s, y * s) for stop, (x, y) in network.positions.items()}
    for line in network.lines:
        points = [at[stop] for stop in line.stations]
        pen.line(points, fill=line.colour, width=7 * s, joint="curve")
    for stop, (x, y) in at.items():
        shared = len(network.lines_through(stop)) > 1
        radius, ring = (10.5 * s, 10) if shared else (9 * s, 5)
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill="white", outline=_INK, width=ring)
        letter = stop.removesuffix(" Station")
        pen.text((x, y), letter, fill="black", font=font(14 * s), anchor="mm", stroke_width=1, stroke_fill="black")
    return picture.resize(network.size, Image.Resampling.LANCZOS)
