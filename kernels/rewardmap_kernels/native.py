"""Builds the C++ and CUDA sources at first use, caches the library, loads it, and says in words why it cannot.

``python -m rewardmap_kernels.native`` builds ahead of time (``cuda`` after it: the experimental Hopper kernel).

The cache lies in ``$XDG_CACHE_HOME/rewardmap`` (``~/.cache/rewardmap``), one library per source, compiler, torch and
architecture. torch's stable ABI is all the libraries use. Concurrent builds are safe: one process builds under a file
lock, the others wait, and the library appears by an atomic rename.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

Part = Literal["cpu", "cuda"]

_LOGGER = logging.getLogger("rewardmap_kernels")
_FIRST_USE = threading.Lock()  # torch refuses an operator that two threads register
_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # 2.11, the oldest torch that the libraries load into
_CXX_FLAGS = ("-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", _ABI)
_NVCC_FLAGS = (
    "-std=c++20", "-O3", "-Xcompiler", "-fPIC", "-gencode", "arch=compute_90a,code=sm_90a",
)  # fmt: skip


class NativeUnavailableError(RuntimeError):
    """Why a library cannot be built or loaded, in one line."""


@dataclass(frozen=True)
class Unit:
    """One source file below csrc and what it is compiled with beside the common flags."""

    source: str
    flags: tuple[str, ...] = ("-O3",)


def sources() -> Path:
    """The folder csrc: inside the package in a wheel, at the top of a checkout."""
    inside = Path(__file__).parent / "csrc"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "csrc"


def cpu_units() -> list[Unit]:
    """The files of the CPU library for this machine's architecture."""
    units = [Unit(f"cpu/{name}.cpp", ("-O1",)) for name in ("operators", "product_operators", "decode_operators")]
    units += [Unit("cpu/rows_scalar.cpp"), Unit("cpu/advantage.cpp")]
    if platform.machine() in ("x86_64", "AMD64"):
        units.append(Unit("cpu/rows_avx2.cpp", ("-O3", "-mavx2", "-mfma")))
        units.append(Unit("cpu/rows_avx512.cpp", ("-O3", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")))
        units.append(Unit("cpu/product_bfloat16.cpp", ("-O3", "-mavx512f", "-mavx512bf16")))
        units.append(Unit("cpu/product_amx.cpp", ("-O3", "-mavx2", "-mamx-tile", "-mamx-bf16")))
    return units


def cache_folder() -> Path:
    """Where libraries are kept. Raises NativeUnavailableError where there is no home directory either."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "rewardmap" / "native"
    except RuntimeError as error:
        raise NativeUnavailableError("there is no home directory; name a folder in XDG_CACHE_HOME") from error


def compiler(part: Part) -> str:
    """Path of the compiler. Raises NativeUnavailableError where there is none."""
    if part == "cpu":
        for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
            found = shutil.which(name) if name else None
            if found:
                return found
        raise NativeUnavailableError("no C++ compiler (c++, g++ or clang++) is on PATH")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if not found:
        raise NativeUnavailableError(f"no nvcc is on PATH or in {home}/bin")
    return found


def compiler_version(part: Part) -> str:
    """The compiler's own words, first line. Raises NativeUnavailableError where there is none."""
    done = subprocess.run([compiler(part), "--version"], capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[0] if done.stdout else ""


def _include() -> str:
    return str(Path(torch.__file__).parent / "include")


def _link() -> list[str]:
    return [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"]


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.splitlines()
        first = next((line for line in lines if "error" in line), lines[0] if lines else "no output")
        raise NativeUnavailableError(f"{Path(command[0]).name} failed: {first}")


def build_cpu(out: Path, extra: Iterable[str] = ()) -> None:
    """Compile the CPU library into the file ``out``; ``extra`` flags go to every compilation and to the link."""
    cxx, folder, more = compiler("cpu"), sources(), list(extra)

    def compile_unit(unit: Unit) -> str:
        made = str(out.parent / f"{Path(unit.source).stem}.o")
        include = ["-isystem", _include()]
        _run([cxx, *_CXX_FLAGS, *unit.flags, *more, *include, "-c", str(folder / unit.source), "-o", made])
        return made

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        objects = list(pool.map(compile_unit, cpu_units()))
    _run([cxx, "-shared", *more, *objects, "-o", str(out), *_link()])


def build_cuda(out: Path, extra: Iterable[str] = ()) -> None:
    """Compile the Hopper library into the file ``out``."""
    source = str(sources() / "cuda/logits_policy_loss.cu")
    _run([compiler("cuda"), *_NVCC_FLAGS, *extra, "-shared", source, "-o", str(out)])


def _key(part: Part) -> str:
    """Names a library by everything that its bytes follow from."""
    path = compiler(part)
    version = compiler_version(part)
    digest = hashlib.sha256()
    folder = sources()
    for file in sorted(folder.rglob("*")):
        if file.suffix in (".h", ".cpp", ".cu"):
            digest.update(f"{file.relative_to(folder)}\0".encode() + file.read_bytes())
    flags = (_CXX_FLAGS, cpu_units()) if part == "cpu" else _NVCC_FLAGS
    digest.update(repr((part, path, version, torch.__version__, platform.machine(), flags)).encode())
    return digest.hexdigest()[:20]


@contextmanager
def _locked(path: Path):  # type: ignore[no-untyped-def]
    """One process at a time; released when the process ends, however it ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def library(part: Part = "cpu") -> Path:
    """The library's file, built if it is not in the cache. Raises NativeUnavailableError."""
    folder = sources()
    if not folder.is_dir():
        raise NativeUnavailableError(f"the sources are not at {folder}")
    cache = cache_folder()
    file = cache / f"{part}-{_key(part)}.so"
    if file.exists():
        return file
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(file.with_suffix(".lock")):
            if not file.exists():
                start = time.monotonic()
                _LOGGER.warning("building the %s kernels, once: %s", part, file)
                with tempfile.TemporaryDirectory(dir=cache, prefix=f"{part}-") as work:
                    made = Path(work) / file.name
                    (build_cpu if part == "cpu" else build_cuda)(made)
                    made.replace(file)
                _LOGGER.info("built in %.1f s", time.monotonic() - start)
    except OSError as error:
        raise NativeUnavailableError(f"cannot write {cache}: {error}") from error
    return file


def _device_refusal() -> str | None:
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    return None if (major, minor) == (9, 0) else f"the GPU is sm_{major}{minor}; the kernel is for sm_90"


@torch.compiler.assume_constant_result
def unavailable_reason(part: Part = "cpu") -> str | None:
    """None when the library is there (built and loaded by this call, once per process); else why not, in a line.

    ``part``: "cpu", or "cuda", the experimental Hopper kernel. The reason is logged once.
    """
    with _FIRST_USE:
        return _reason(part)


@functools.cache
def _reason(part: Part) -> str | None:
    try:
        refusal = _device_refusal() if part == "cuda" else None
        if refusal is not None:
            raise NativeUnavailableError(refusal)
        if part == "cpu":
            load(library(part))
        else:
            load_cuda(library(part))
    except NativeUnavailableError as error:
        instead = "plain torch" if part == "cpu" else "Triton"
        _LOGGER.warning("%s kernels run by %s instead of C++: %s", "CPU" if part == "cpu" else "Hopper", instead, error)
        return str(error)
    return None


def load(path: Path) -> None:
    """Load a built CPU library and register its operators with torch. Raises NativeUnavailableError."""
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise NativeUnavailableError(f"the library does not load: {error}") from error
    from . import native_registration

    native_registration.register()


def load_cuda(path: Path) -> ctypes.CDLL:
    """Load a built Hopper library. Raises NativeUnavailableError where it does not load or its kernel cannot run."""
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailableError(f"the library does not load: {error}") from error
    loaded.rewardmap_cuda_error.restype = ctypes.c_char_p
    failed = loaded.rewardmap_cuda_check()
    if failed:
        raise NativeUnavailableError(f"CUDA says: {loaded.rewardmap_cuda_error(failed).decode()}")
    return loaded


@functools.cache
def capability() -> str:
    """The instruction set that the CPU kernels run with: scalar, avx2 or avx512."""
    return str(torch.ops.rewardmap.capability())


def main(arguments: Sequence[str] = ()) -> int:
    """Build what is named (default: cpu) and print where it is, or why it is not there."""
    failed = 0
    for part in arguments or ("cpu",):
        if part not in ("cpu", "cuda"):
            print(f"{part} is not one of cpu, cuda", file=sys.stderr)
            return 2
        try:
            print(library(part))  # type: ignore[arg-type]
        except NativeUnavailableError as error:
            print(f"{part}: {error}", file=sys.stderr)
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
