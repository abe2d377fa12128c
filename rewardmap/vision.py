"""Pictures on the host, and what the vision tower made of them: each decoded once, each seen by the tower once.

Both stores are bounded and give up what was used longest ago. Nothing stale is ever served: a picture is known by its
file's identity (or its bytes), a tower's output by the pixels the processor made of it, which every processor setting
shows in, and by a checksum over all of the tower's weights.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image

from rewardmap.config import ConfigError
from rewardmap.files import as_rgb, open_picture
from rewardmap.types import DataError

Tensor = torch.Tensor
Value = TypeVar("Value")
DECODERS = 2
"""Threads that decode and resize pictures ahead of need."""


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """A picture in patches, resized, in bytes: an eighth of the memory of what the processor makes of them."""

    pixels: Tensor
    """[patches, channels, patch · patch] uint8, in pinned memory where there is a GPU and no rank shares them."""
    grid_thw: tuple[int, int, int]
    digest: bytes
    """Of pixels, grid and what the processor makes of them."""


class Patches:
    """An image processor's work, split in two: resizing and cutting, in bytes, once a picture, and the numbers made of
    them, on the device. The numbers are the processor's, bit for bit."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def cut(self, picture: Image.Image) -> tuple[Tensor, tuple[int, int, int]]:
        """(``EncodedImage.pixels``, grid) of an RGB picture. Raises as ``grid``."""
        own, grid = self._processor, self.grid(*picture.size)
        size = (grid[2] * own.patch_size, grid[1] * own.patch_size)
        return self._cut(picture.resize(size, own.resample)), grid

    def grid(self, width: int, height: int) -> tuple[int, int, int]:
        """Of a picture of that size. Raises ValueError for one that the processor refuses."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        own = self._processor
        limits = own.size["shortest_edge"], own.size["longest_edge"]
        rows, columns = smart_resize(height, width, own.patch_size * own.merge_size, *limits)
        return 1, rows // own.patch_size, columns // own.patch_size

    @cached_property
    def levels(self) -> Tensor:
        """[channels, 256] float32: what the processor makes of each byte.

        Raises:
            ConfigError: it makes anything else of a picture than ``values`` does.
        """
        side = self._processor.patch_size * self._processor.merge_size * 16
        # Every byte in every channel, no two patches alike.
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8))
        pixels = self._cut(picture)
        expected = self._processor(images=[picture], return_tensors="pt", do_resize=False)["pixel_values"]
        made = expected.view(len(pixels), pixels.shape[1], self._processor.temporal_patch_size, -1)[:, :, 0]
        levels = torch.empty(pixels.shape[1], 256)
        for channel, row in enumerate(levels):
            row[pixels[:, channel].long()] = made[:, channel]
        if not torch.equal(_look_up(levels, pixels, self._processor.temporal_patch_size), expected):
            raise ConfigError(f"the image processor {type(self._processor).__name__} is of a kind not known here")
        return levels

    def values(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        """The processor's numbers, ``pixel_values``, in ``dtype``: [patches, channels · frames · patch · patch], where
        ``pixels`` [patches, channels, patch · patch] are."""
        levels = to_device(self.levels.to(dtype), pixels.device)
        return _look_up(levels, pixels, self._processor.temporal_patch_size)

    def _cut(self, picture: Image.Image) -> Tensor:
        patch, merge = self._processor.patch_size, self._processor.merge_size
        rows, columns = picture.height // patch, picture.width // patch
        split = np.asarray(picture).reshape(rows // merge, merge, patch, columns // merge, merge, patch, -1)
        return torch.from_numpy(split.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns, -1, patch**2))


def _look_up(levels: Tensor, pixels: Tensor, frames: int) -> Tensor:
    first = torch.arange(0, levels.numel(), 256, device=pixels.device, dtype=torch.int32)
    places = pixels.int() + first[:, None]
    frame = levels.view(-1).index_select(0, places.view(-1)).view(*pixels.shape[:2], 1, -1)
    return frame.expand(-1, -1, frames, -1).reshape(len(pixels), -1)


class ImageInfo(NamedTuple):
    """What is remembered of a picture when its pixels have made room for others."""

    grid_thw: tuple[int, int, int]
    digest: bytes

    @property
    def patches(self) -> int:
        return math.prod(self.grid_thw)


Keep = Callable[[object, Callable[[], EncodedImage]], EncodedImage]


class ImageFeatures(NamedTuple):
    """What the tower says about one picture: H is the decoder's width."""

    merged: Tensor
    """[image tokens, H], in place of the placeholders' embeddings."""
    deep: tuple[Tensor, ...] = ()
    """Qwen3-VL's DeepStack: [image tokens, H] each, added after the decoder's first layers."""


class Bounded(Generic[Value]):
    """A dictionary that holds at most ``limit`` bytes and drops what was used longest ago. One value always fits."""

    def __init__(self, limit: int, size: Callable[[Value], int]) -> None:
        self.limit = limit
        self.bytes = 0
        self._size = size
        self._items: OrderedDict[Any, Value] = OrderedDict()

    def get(self, key: object) -> Value | None:
        if key not in self._items:
            return None
        self._items.move_to_end(key)
        return self._items[key]

    def put(self, key: object, value: Value) -> None:
        if key not in self._items:
            self._items[key] = value
            self.bytes += self._size(value)
        while self.bytes > self.limit and len(self._items) > 1:
            self.bytes -= self._size(self._items.popitem(last=False)[1])

    def clear(self) -> None:
        self._items.clear()
        self.bytes = 0

    def __contains__(self, key: object) -> bool:
        return key in self._items

    def __len__(self) -> int:
        return len(self._items)


class ImageStore:
    """Decoded and resized pictures. Threads may ask at once; each picture is worked on by one of them."""

    def __init__(self, processor: Any, limit: int) -> None:
        self.patches = Patches(processor)
        self._done: Bounded[EncodedImage] = Bounded(limit, lambda image: image.pixels.nbytes)
        self._infos: dict[object, ImageInfo] = {}
        self._running: dict[object, Future[EncodedImage]] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._keep: Keep = lambda key, decode: _pinned(decode())
        self._begin = 0.0

    def share(self, keep: Keep, begin: float) -> None:
        """Keep pictures where other processes find them.

        Args:
            keep: gives the picture known by a key, decoding it where nobody has.
            begin: which part of what is decoded ahead has gone by where this process begins, in [0, 1), so that each
                begins elsewhere.
        """
        self._keep, self._begin = keep, begin

    def get(self, source: str | bytes) -> EncodedImage:
        """Raises DataError, with the path, for a picture that cannot be read."""
        found = self._start(source)
        return found.result() if isinstance(found, Future) else found

    def info(self, source: str | bytes) -> ImageInfo:
        """Of a picture, which is decoded the first time only. Raises as ``get``."""
        found = self.known(source)
        if found is None:
            image = self.get(source)
            found = ImageInfo(image.grid_thw, image.digest)
        return found

    def count(self, source: str | bytes) -> int:
        """Patches of a picture, from its header: a picture that lies has as many as upright. Raises as ``get``."""
        known = self.known(source)
        if known is not None:
            return known.patches
        try:
            with open_picture(source) as picture:
                _, rows, columns = self.patches.grid(*picture.size)
        except (OSError, ValueError):
            return self.info(source).patches  # which says what is wrong with it
        return rows * columns

    def known(self, source: str | bytes) -> ImageInfo | None:
        """Of a picture that was decoded before; None for another."""
        return self._infos.get(_identity(source))

    def prefetch(self, sources: Sequence[str | bytes]) -> None:
        """Begin to decode pictures that will be asked for; an unreadable one raises when it is."""
        different = list(dict.fromkeys(sources))
        begin = int(self._begin * len(different))
        for source in (*different[begin:], *different[:begin]):
            self._start(source)

    def _start(self, source: str | bytes) -> EncodedImage | Future[EncodedImage]:
        key = _identity(source)
        with self._lock:
            done = self._done.get(key)
            if done is not None:
                return done
            if key not in self._running:
                self._pool = self._pool or ThreadPoolExecutor(DECODERS, "pictures")
                self._running[key] = self._pool.submit(self._decode, key, source)
            return self._running[key]

    def _decode(self, key: object, source: str | bytes) -> EncodedImage:
        try:
            image = self._keep(key, lambda: self._read(source))
        except BaseException:
            with self._lock:
                del self._running[key]
            raise
        with self._lock:
            self._done.put(key, image)
            self._infos[key] = ImageInfo(image.grid_thw, image.digest)
            del self._running[key]
        return image

    def _read(self, source: str | bytes) -> EncodedImage:
        picture = read_image(source)
        try:
            pixels, grid = self.patches.cut(picture)
        except ValueError as error:  # such as sides more than 200 to 1
            size = f"{picture.width} x {picture.height} pixels"
            raise DataError(f"{_name(source)}: the image processor refuses {size} ({error})") from None
        digest = hashlib.blake2b(pixels.numpy().data, digest_size=16, key=repr((grid, pixels.shape)).encode()[:64])
        digest.update(self.patches.levels.numpy().data)
        return EncodedImage(pixels, grid, digest.digest())


@dataclass
class FeatureCache:
    """Outputs of a frozen tower, on the host (pinned where there is a GPU), so that they never crowd the weights."""

    limit: int
    _kept: Bounded[ImageFeatures] = field(init=False)
    _tower: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self._kept = Bounded(self.limit, lambda features: sum(x.nbytes for x in (features.merged, *features.deep)))

    def open(self, tower: torch.nn.Module) -> None:
        """Forget everything if any weight of the tower is other than it was."""
        found = checksum(tower)
        if found != self._tower:
            self._kept.clear()
            self._tower = found

    def get(self, digest: bytes, device: torch.device) -> ImageFeatures | None:
        """Of the picture with that digest, on ``device``."""
        kept = self._kept.get(digest)
        return None if kept is None else _moved(kept, device)

    def put(self, digest: bytes, features: ImageFeatures) -> None:
        self._kept.put(digest, _to_host(features))

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._kept

    def __len__(self) -> int:
        return len(self._kept)


@torch.no_grad()
def checksum(module: torch.nn.Module) -> tuple[int, ...]:
    """One integer per parameter and buffer, of its bits and their places; any single change shows. One host sync."""
    sums = []
    for tensor in (*module.parameters(), *module.buffers()):
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # a shard stands for its rank's part
        if local.dtype.itemsize not in (1, 2, 4, 8) or local.is_complex():
            raise TypeError(f"no checksum of {local.dtype}")
        words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[local.dtype.itemsize]
        bits = local.detach().contiguous().view(-1).view(words).long()
        # Odd factors modulo 2**64: a change of one word cannot vanish, nor can two words trade places unseen.
        factors = torch.arange(bits.numel(), device=bits.device) * 0x1E3779B97F4A7C14 + 0x632BE59BD9B4E019
        sums.append((bits * factors).sum())
    return tuple(torch.stack(sums).tolist()) if sums else ()


def read_image(source: str | bytes) -> Image.Image:
    """A picture from a path or encoded bytes, ``as_rgb``. Raises DataError."""
    try:
        with open_picture(source) as picture:
            return as_rgb(picture)
    except OSError as error:
        raise DataError(f"{_name(source)}: cannot be read as an image ({error})") from None


def _name(source: str | bytes) -> str:
    return "picture given as bytes" if isinstance(source, bytes) else source


def _identity(source: str | bytes) -> object:
    """Bytes are their own identity; a file that is written anew is another picture."""
    if isinstance(source, bytes):
        return source
    try:
        status = os.stat(source)
    except OSError:
        return source  # reading it will say what is wrong
    return source, status.st_mtime_ns, status.st_size, status.st_ino


def _pinned(image: EncodedImage) -> EncodedImage:
    return replace(image, pixels=image.pixels.pin_memory()) if torch.cuda.is_available() else image


def _to_host(features: ImageFeatures) -> ImageFeatures:
    def keep(value: Tensor) -> Tensor:
        host = value.detach().cpu()
        return host.pin_memory() if value.device.type == "cuda" else host

    return ImageFeatures(keep(features.merged), tuple(map(keep, features.deep)))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on ``device``, without waiting for what a GPU is still busy with, as ``Tensor.to`` would."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _moved(features: ImageFeatures, device: torch.device) -> ImageFeatures:
    if device.type == "cpu":
        return features
    merged, *deep = (value.to(device, non_blocking=True) for value in (features.merged, *features.deep))
    return ImageFeatures(merged, tuple(deep))
