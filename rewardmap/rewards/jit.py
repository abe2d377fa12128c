"""How the compiled scorers are compiled and where their machine code is kept between processes."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba


@cache
def cache_folder() -> Path:
    """Where the machine code is kept: ``$NUMBA_CACHE_DIR``, else the user's cache folder, never the package.

    Its last part names the sources and Numba's version, for Numba itself notices a change only in the file of the
    stored function.
    """
    base = os.environ.get("NUMBA_CACHE_DIR")
    if not base:
        base = str(Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "rewardmap" / "numba")
    digest = hashlib.sha256(numba.__version__.encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return Path(base) / digest.hexdigest()[:16]


@cache
def _unkept() -> str | None:
    """Why machine code cannot be kept, if so. Numba would go on to look for room in the package's own folder."""
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache_folder()).close()
    except RuntimeError:
        return "there is no home directory"
    except OSError:
        return f"{cache_folder().parent} cannot be written"
    return None


def entry(function: Callable[..., Any], *, nogil: bool = True) -> Any:
    """Compile a function that Python calls on its first call; without a writable cache, in every process.

    It allocates nothing: without the runtime (``_nrt``) its arrays are not reference-counted, which would cost more
    than the work done on a name.
    """
    options: dict[str, Any] = {"nogil": nogil, "_nrt": False}
    if _unkept():
        return numba.njit(**options)(function)
    config: Any = numba.config
    before = config.CACHE_DIR
    config.CACHE_DIR = str(cache_folder())
    try:
        return numba.njit(cache=True, **options)(function)
    finally:
        config.CACHE_DIR = before


def locked_entry(function: Callable[..., Any]) -> Any:
    """As ``entry``, for a function that counts references and so keeps the interpreter's lock."""
    return entry(function, nogil=False)


def helper(function: Callable[..., Any]) -> Any:
    """Compile a function that only compiled code calls and that allocates nothing either."""
    return _helper(function, forceinline=False)


def inlined(function: Callable[..., Any]) -> Any:
    """As ``helper``, for what runs per name: a call would copy seven words for each array it is given."""
    return _helper(function, forceinline=True)


def merged(function: Callable[..., Any]) -> Any:
    """A function that is called in one place, and becomes part of its caller before anything is compiled.

    LLVM sees each ``helper`` once more in every function above it, so that deep calls take long to compile.
    """
    return numba.njit(nogil=True, inline="always")(function)


def _helper(function: Callable[..., Any], *, forceinline: bool) -> Any:
    njit: Any = numba.njit
    options = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "_nrt": False, "forceinline": forceinline}
    return njit(nogil=True, **options)(function)


@cache
def announce(name: str) -> None:
    """Say once per process, on stderr, when the first call of an ``entry`` has to compile it."""
    if why := _unkept():
        often = f"in every process, for {why}; set NUMBA_CACHE_DIR"
    elif not any(cache_folder().rglob(f"*.{name}-*.nbi")):
        often = "once"
    else:
        return
    print(f"rewardmap: compiling {name} (a few seconds; {often})", file=sys.stderr, flush=True)
