"""A Python environment that runs the real SGLang server on a CPU: ``python tests/sglang_env.py VERSION``.

Prints the path of its interpreter. Built once a version, in about two minutes, under ``$XDG_CACHE_HOME/rewardmap``
(default ``~/.cache/rewardmap``), and built anew when this file or ``sglang_pins.txt`` changes.

SGLang publishes no CPU build. It falls back to torch's own operations where a CPU lacks AMX, so what it needs besides
its own dependencies without CUDA's is a stand-in for the kernel package, whose functions all say that they are missing,
and two operator names that torchvision's CUDA wheel registers only where CUDA is.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

TORCH, TORCHVISION = "2.13.0", "0.28.0"
PINS = Path(__file__).with_name("sglang_pins.txt")
GPU_ONLY = re.compile(
    r"cuda-|nvidia-|nvshmem|flash-attn|flashinfer|humming|quack|sgl-|sglang-kernel|tilelang|tokenspeed|helion|"
    r"torch|nvidia_|triton"
)
UNUSED = {
    "anthropic", "av", "blobfile", "build", "datasets", "decord2", "deepseek-recipe", "modelscope", "ninja",
    "openai-harmony", "outlines", "py-spy", "smg-grpc-servicer", "timm", "tml-renderers",
}  # fmt: skip

STAND_INS = {
    "sgl_kernel/__init__.py": '''
        """Stand-in for the CUDA kernels of SGLang: every name exists and says that it is missing when called."""
        import torch


        class _Operators:
            """``torch.ops.sgl_kernel``: models look up CPU kernels on import; all else asks whether they exist."""

            def __getattr__(self, name):
                if name.endswith("_cpu") and not name.startswith("fused_qk_norm"):  # those it asks for first
                    return _missing(name)
                raise AttributeError(name)


        def _missing(name):
            def function(*args, **kwargs):
                raise NotImplementedError(f"sgl_kernel.{name}: not on this CPU")

            return function


        def __getattr__(name):
            if name.startswith("__"):
                raise AttributeError(name)
            return _missing(name)


        __version__ = "99.0.0"  # newer than any version the server asks for
        torch.ops.sgl_kernel = _Operators()
    ''',
    "cpu_stand_ins.py": '''
        """Imported at start: registers torchvision's operator names just before torchvision asks for them, and lets
        pinned memory be plain memory, which SGLang's adapters (LoRA) ask for where no GPU is."""
        import functools
        import sys


        class _BeforeTorchvision:
            def find_spec(self, name, path=None, target=None):
                if name == "torchvision":
                    sys.meta_path.remove(self)
                    import torch

                    self.names = torch.library.Library("torchvision", "FRAGMENT")
                    for name in ("nms", "qnms"):
                        self.names.define(f"{name}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
                    sys.modules[__name__].names = self.names
                    torch.Tensor.pin_memory = lambda tensor, device=None: tensor
                    for name in ("empty", "tensor", "zeros"):
                        setattr(torch, name, _unpinned(getattr(torch, name)))
                return None


        def _unpinned(make):
            @functools.wraps(make)
            def plain(*values, pin_memory=False, **named):
                return make(*values, **named)

            return plain


        sys.meta_path.insert(0, _BeforeTorchvision())
    ''',
    "cpu_stand_ins.pth": "import cpu_stand_ins\n",
}


def environment(version: str) -> Path:
    """Interpreter of the environment with this SGLang; builds it first where there is none.

    Raises:
        RuntimeError: it cannot be installed here.
    """
    made_of = Path(__file__).read_bytes() + PINS.read_bytes() + sys.version.encode()
    digest = hashlib.sha256(made_of).hexdigest()[:10]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rewardmap"
    folder = cache / f"sglang-{version}-{digest}"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"sglang-{version}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            try:
                _build(version, folder)
            except (OSError, subprocess.CalledProcessError) as error:
                raise RuntimeError(
                    f"SGLang {version} cannot be installed in {folder}: {error}; see above what pip said"
                ) from None
            (folder / "complete").touch()
    return folder / "bin" / "python"


def other_models(python: Path) -> str:
    """For ``SGLANG_DISABLED_MODEL_ARCHS``: all but those of ours, so that a server starts without importing them."""
    [models] = python.parent.parent.glob("lib/*/site-packages/sglang/srt/models")
    return ",".join(sorted({file.stem for file in models.glob("*.py")} - {"qwen2_5_vl", "qwen3_vl"}))


def _build(version: str, folder: Path) -> None:
    subprocess.run((sys.executable, "-m", "venv", str(folder)), check=True, stdout=sys.stderr)
    python = str(folder / "bin" / "python")
    _pip(python, f"torch=={TORCH}", "setuptools<82")
    _pip(python, "--no-deps", f"sglang=={version}", f"torchvision=={TORCHVISION}", "triton==3.7.1")
    _pip(python, *_dependencies(python))
    site = Path(_output(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"))
    for name, text in STAND_INS.items():
        (site / name).parent.mkdir(exist_ok=True)
        (site / name).write_text(textwrap.dedent(text).lstrip("\n"), encoding="utf-8")


def _dependencies(python: str) -> list[str]:
    """What this SGLang itself asks for, without what only a GPU or an unused endpoint needs."""
    listed = _output(python, "-c", "import importlib.metadata as m; print(*m.requires('sglang'), sep='\\n')")
    wanted = []
    for line in listed.splitlines():
        requirement, _, marker = line.partition(";")
        name = re.split(r"[^\w.-]", requirement.strip())[0].lower().replace("_", "-")
        if "extra" not in marker and not GPU_ONLY.match(name) and name not in UNUSED:
            wanted.append(line)
    return [*wanted, "dill", "sglang-router==0.3.2"]


def _pip(python: str, *arguments: str) -> None:
    options = ("--quiet", "--no-compile", "--no-warn-conflicts", "--constraint", str(PINS))
    subprocess.run((python, "-m", "pip", "install", *options, *arguments), check=True, stdout=sys.stderr)


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


if __name__ == "__main__":
    try:
        print(environment(sys.argv[1]))
    except RuntimeError as error:
        sys.exit(str(error))
