"""Writing files so that a kill or a full disk leaves the old file or none, never half of a new one. Pictures."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# Pillow's own limit (178 million pixels) is below the largest released map. A data set's pictures are held to that of
# its loader. Pillow's is one for all threads, so that it cannot be lifted for one picture.
Image.MAX_IMAGE_PIXELS = None


def open_picture(source: str | Path | bytes) -> Image.Image:
    """A path's or encoded bytes' picture, of any size; not decoded yet. Raises OSError."""
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def as_rgb(picture: Image.Image) -> Image.Image:
    """The picture as viewers show it: upright where EXIF says it lies, on white where it is transparent, 16 bits of
    grey as 8. Raises OSError."""
    ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode.startswith("I"):
        return _eight_bits(picture).convert("RGB")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    shown, paper = picture.convert("RGBA"), Image.new("RGB", picture.size, "white")
    paper.paste(shown, mask=shown)
    return paper


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Each grey's upper byte, as Pillow reads 16 bits of a colour; its own conversion makes all above 255 white."""
    values = np.asarray(picture)
    grey = np.clip(values >> 8, 0, 255).astype(np.uint8)
    if "transparency" in picture.info:  # the one value that is transparent
        grey[values == picture.info["transparency"]] = 255
    return Image.fromarray(grey)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path beside ``path``; the file written there becomes ``path`` if the block ends well.

    Raises:
        OSError: naming ``path``, e.g. when the disk is full. The temporary file is gone then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: writers choose a format by it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text through ``replacing``."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
