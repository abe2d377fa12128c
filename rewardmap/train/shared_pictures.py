"""Decoded pictures in shared memory: each decoded once on a node, one copy of it for all ranks there.

A file per picture in a folder of ``/dev/shm``, which its ranks map. A folder lives as long as one of them holds its
lock, which a killed process cannot keep: what a job left behind, the next one on the machine removes.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import mmap
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rewardmap.train.ranks import Ranks
from rewardmap.vision import EncodedImage

SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "rewardmap-pictures-"
_HEADER = 4096
"""Bytes before the pixels, JSON: a page, so that pixels begin on one."""
_YOUNG_S = 60.0
"""A folder that nobody holds may be about to be held."""


@dataclass
class SharedPictures:
    """The pictures of one node's ranks, at most ``limit`` bytes of them; what was opened longest ago goes first.

    A rank keeps what it has mapped also after another removed the file.
    """

    folder: Path
    limit: int
    place: int = 0
    """Of this rank among the node's."""
    ranks: int = 1
    """Of the node."""
    _told: bool = field(default=False, init=False)

    def keep(self, key: object, decode: Callable[[], EncodedImage]) -> EncodedImage:
        """The picture known as ``key`` on this node: mapped, or made by ``decode()`` while others that want it wait.

        Raises:
            What ``decode`` raises.
        """
        name = hashlib.blake2b(key if isinstance(key, bytes) else repr(key).encode(), digest_size=16).hexdigest()
        path = self.folder / f"{name}.pixels"
        if (found := _map(path)) is not None:
            return found
        with ExitStack() as stack:
            try:
                stack.enter_context(_locked(self.folder / f"{name[:2]}.lock"))
            except OSError as error:  # the folder went, as with the login session that it belonged to
                self._say(error)
                return decode()
            if (found := _map(path)) is not None:
                return found
            image = decode()
            return self._write(path, image) or image

    def _write(self, path: Path, image: EncodedImage) -> EncodedImage | None:
        """None where it does not fit."""
        size = _HEADER + image.pixels.nbytes
        if size > self.limit:
            self._say(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
            return None
        described = {
            "shape": list(image.pixels.shape),
            "dtype": str(image.pixels.dtype).removeprefix("torch."),
            "grid_thw": image.grid_thw,
            "digest": image.digest.hex(),
        }
        begun = path.with_suffix(f".{os.getpid()}")
        try:
            with _locked(self.folder / "space.lock"):
                self._make_room(size)
                with begun.open("wb") as file:
                    file.write(json.dumps(described).encode().ljust(_HEADER))
                    file.write(image.pixels.numpy().data)
                begun.rename(path)
            return _map(path)
        except OSError as error:  # others need shared memory too
            begun.unlink(missing_ok=True)
            self._say(error)
            return None

    def _say(self, error: OSError) -> None:
        if not self._told:
            self._told = True
            warnings.warn(
                f"{self.folder}: {error.strerror}; each rank keeps pictures for itself that find no place there, which "
                "takes more memory. If it is full, give the machine or container more shared memory (docker: "
                "--shm-size)",
                stacklevel=3,
            )

    def _make_room(self, size: int) -> None:
        files = [(path.stat(), path) for path in self.folder.iterdir() if path.suffix != ".lock"]
        used = sum(status.st_size for status, _ in files)
        for status, path in sorted(files, key=lambda file: file[0].st_mtime_ns):
            if used + size <= self.limit:
                return
            used -= status.st_size
            path.unlink()


@contextmanager
def share_pictures(ranks: Ranks, limit: int) -> Iterator[SharedPictures | None]:
    """The store of this node, while the block runs; None where this rank is alone on its node or the node has no
    shared memory to give. Every rank makes this call.

    Args:
        limit: bytes of the whole node; at most half of the shared memory that is free is taken.
    """
    if ranks.size == 1:
        yield None
        return
    begun = _begin() if ranks.local_rank == 0 else None
    seen = ranks.gather([str(begun) if begun else None, ranks.local_rank])
    leaders = [rank - local for rank, (_, local) in enumerate(seen)]  # a launcher numbers a node's ranks in one run
    mates = [rank for rank, leader in enumerate(leaders) if leader == leaders[ranks.rank]]
    named = seen[leaders[ranks.rank]][0] if leaders[ranks.rank] >= 0 else None
    folder = Path(named) if named and len(mates) > 1 else None
    held = None
    if folder is not None:
        with suppress(OSError):  # ranks in containers of their own do not see it
            held = _hold(folder)
    ranks.wait()  # nobody leaves before all hold it
    try:
        if folder is None or held is None:
            yield None
        else:
            free = os.statvfs(folder)
            most = min(limit, free.f_bavail * free.f_frsize // 2)
            yield SharedPictures(folder, most, mates.index(ranks.rank), len(mates))
    finally:
        if held is not None:
            os.close(held)
        for made in {begun, folder}:
            if made is not None:
                _remove_unless_held(made)


def _begin() -> Path | None:
    """A new folder, and none of earlier jobs."""
    try:
        for old in SHARED_MEMORY.glob(f"{_PREFIX}*"):
            with suppress(OSError):
                if time.time() - old.stat().st_mtime > _YOUNG_S:
                    _remove_unless_held(old)
        return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=SHARED_MEMORY))
    except OSError:
        return None


def _hold(folder: Path) -> int:
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor


def _remove_unless_held(folder: Path) -> None:
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _map(path: Path) -> EncodedImage | None:
    """None where it cannot be had."""
    try:
        with path.open("r+b") as file:
            os.utime(file.fileno())
            memory = mmap.mmap(file.fileno(), 0)
    except OSError:  # not there, most often
        return None
    described: dict[str, Any] = json.loads(memory[:_HEADER])
    pixels = torch.frombuffer(memory, dtype=getattr(torch, described["dtype"]), offset=_HEADER)
    grid: tuple[int, int, int] = tuple(described["grid_thw"])
    return EncodedImage(pixels.view(described["shape"]), grid, bytes.fromhex(described["digest"]))
