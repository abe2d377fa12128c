"""What each stage of ``bench/gpu.py`` runs: items, each a command of its own, and how their output is read."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))
from records import ROOT, Row

_children: set[subprocess.Popen[bytes]] = set()


class CannotRunError(Exception):
    """The stage has nothing to do, or lacks what it needs."""


@dataclass(frozen=True)
class Item:
    """One measurement: a command whose last line on stdout is a JSON object, or pytest's summary."""

    name: str
    command: tuple[str, ...]
    read: Callable[[str, int | None], Row]
    """(stdout, exit code, None of one whose time was up) -> the row's own fields, ``ok`` among them."""


@dataclass(frozen=True)
class Part:
    """Of stage ``first``: the items of another stage that ``items`` finds, and the seconds one may take."""

    stage: str
    items: str
    limit: float
    together: bool = False
    """All at once: what is not timed."""


FIRST = (
    Part("tests", "kernels_gpu|tree_attention|tree_varlen", 150, together=True),
    Part("step", r"^6000\+500: ours$", 100),
    Part("step", r"^6000\+500: TRL$", 140),
    Part("kernels", r"^linear\.7b\.8192$", 145),
    Part("kernels", r"^routes\.answers\.3b\.6000$", 90),
    Part("kernels", r"^linear\.3b\.8192$", 110),
    Part("kernels", r"^tune\.tree$", 90),
    Part("kernels", r"^logits\.7b\.8192$", 70),
    Part("kernels", r"^routes\.tower\.whole$", 40),
    Part("step", "^tiny-bfloat16$", 60),
)
"""What says most first: is it right, is a step faster than TRL's and where does its time go, the head and attention
beside their peers, the launches to choose."""


def test_items(device: str) -> list[Item]:
    """The files with tests marked ``gpu``, one item each."""
    need("pytest")
    files = [
        file
        for file in sorted((ROOT / "tests").glob("test_*.py"))
        if re.search(r"\bmark\.gpu\b", file.read_text(encoding="utf-8"))
    ]
    if not files:
        raise CannotRunError("no test is marked 'gpu' yet")
    command = (sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider")
    return [Item(file.stem, (*command, f"tests/{file.name}"), read_pytest) for file in files]


def read_pytest(output: str, code: int | None) -> Row:
    """Counts from pytest's last line, or of the tests that it had named until its time was up. A file whose tests all
    skipped has shown nothing: not passed."""
    lines = [line for line in output.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    counts = {
        word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", last)
    }
    if code is None:
        counts = Counter(word.lower() for word in re.findall(r"::.* (PASSED|FAILED|SKIPPED)\b", output))
    row: Row = {name: counts.get(name, 0) for name in ("passed", "failed", "skipped")}
    row["ok"] = code == 0 and row["passed"] > 0
    if not row["ok"]:
        row["tail"] = lines[-40:]
    return row


def step_items(device: str) -> list[Item]:
    """One training step of the tiny model, by dtype; on a GPU also the 3B shape beside TRL, arm by arm."""
    need("transformers", "pydantic", "tomli_w", "numba", "PIL", "pyarrow", "safetensors")
    script = str(ROOT / "bench" / "step_tiny.py")
    dtypes = ("float32", "bfloat16") if device == "cuda" else ("float32",)
    items = [
        Item(f"tiny-{dtype}", (sys.executable, script, "--device", device, "--dtype", dtype), read_json)
        for dtype in dtypes
    ]
    if device == "cuda":
        lacking = missing("trl", "accelerate", "datasets")
        if lacking:
            print(f"  {', '.join(lacking)}: not installed; TRL's arms are left out, so nothing is compared", flush=True)
        sys.path[:0] = [str(ROOT / folder) for folder in ("bench", ".", "kernels")]
        from step_cases import CASES, arms_of

        run = (sys.executable, str(ROOT / "bench" / "step_run.py"), "--device", "cuda", "--threads", "8")
        items += [
            Item(f"{case}: {arm}", (*run, "--case", case, "--arm", arm), read_json)
            for case in CASES["cuda"]
            for arm in arms_of("cuda", case)
            if arm != "TRL" or not lacking
        ]
    return items


def kernel_items(device: str) -> list[Item]:
    """Each case of the kernel bench beside its peers, then attention by each of its routes, then its launches."""
    sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "kernels")]
    import kernel_cases
    import routes

    script, attention, tree = (str(ROOT / "bench" / name) for name in ("kernel_run.py", "routes.py", "tune_tree.py"))
    return [
        Item(name, (sys.executable, script, name, "--device", device), read_json)
        for name in kernel_cases.cases(device)
    ] + [
        Item(f"routes.{name}", (sys.executable, attention, "--case", name, "--device", device), read_json)
        for name in routes.CASES[device]
    ] + [Item("tune.tree", (sys.executable, tree), read_json)] * (device == "cuda")


def rollout_items(device: str) -> list[Item]:
    """The local engine beside transformers; with ``REWARDMAP_SGLANG_PYTHON``, the interpreter of an environment that
    holds SGLang, its servers too."""
    need("transformers", "pydantic", "tomli_w", "numba", "PIL", "pyarrow", "safetensors")
    python = os.environ.get("REWARDMAP_SGLANG_PYTHON")
    if python:
        need("aiohttp")
    command = (sys.executable, str(ROOT / "bench" / "bench_rollout.py"), "--device", device, "--print")
    size = ("--problems", "2", "--tokens", "8") if device == "cpu" else ()  # a dry run
    if python:
        return [Item("tiny-local-sglang", (*command, *size, "--python", python), read_json)]
    return [Item("tiny-local", (*command, *size), read_json)]


def csrc_items(device: str) -> list[Item]:
    """The Hopper kernel: its results, its time, then the results under compute-sanitizer (small rows, every cluster),
    which takes longest."""
    if device != "cuda":
        raise CannotRunError("the Hopper kernel needs a GPU")
    need("pytest")
    tests = (sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests/test_native_cuda.py")
    script = str(ROOT / "bench" / "hopper.py")
    vocabularies = (152_064, 32_768, 65_536, 151_936, 262_144)
    items = [Item("results", tests, read_pytest)]
    items += [Item(f"time-{v}", (sys.executable, script, str(v)), read_json) for v in vocabularies]
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        print("  compute-sanitizer is not on PATH: memcheck and racecheck are left out", flush=True)
    else:
        for tool in ("memcheck", "racecheck"):
            command = (sanitizer, "--tool", tool, "--error-exitcode", "9", *tests)
            items.append(Item(tool, (*command, "-k", "dapo-64 or grpo-64 or every_cluster"), read_sanitizer))
    return items


def read_sanitizer(output: str, code: int | None) -> Row:
    """pytest's counts, from among the sanitizer's own lines; any finding is a failure."""
    lines = [line for line in output.splitlines() if not line.startswith("=========")]
    return read_pytest("\n".join(lines), code)


def read_json(output: str, code: int | None) -> Row:
    """The last line that is a JSON object with ``ok``: a library may have the last word on stdout, and what says its
    times before it looks closer has said them, however it ends."""
    lines = output.splitlines()
    for line in reversed(lines):
        if line.startswith("{"):
            with contextlib.suppress(ValueError):
                row: Row = json.loads(line)
                if "ok" in row and code != 0:
                    row["cut_short"] = "its time was up" if code is None else f"exit code {code}"
                if "ok" in row:
                    return row
    return {"ok": False, "exit_code": code, "tail": lines[-12:]}


def need(*modules: str) -> None:
    """Raises CannotRunError naming the modules that a child would not find."""
    lacking = missing(*modules)
    if lacking:
        raise CannotRunError(f"{sys.executable} lacks {', '.join(lacking)}; put them in a folder named in PYTHONPATH")


def missing(*modules: str) -> list[str]:
    """Those of the modules that a child would not find."""
    code = f"import importlib.util as u; print(*(m for m in {modules!r} if u.find_spec(m) is None))"
    return run_child((sys.executable, "-c", code), 60)[0].split()


STAGE_ITEMS: dict[str, Callable[[str], list[Item]]] = {
    "tests": test_items,
    "kernels": kernel_items,
    "step": step_items,
    "rollout": rollout_items,
    "csrc": csrc_items,
}


def run_child(command: Sequence[str], seconds: float, stderr: Any = None) -> tuple[str, int | None]:
    """Output and exit code; None when the time was up, and then the whole process group is gone and the output is what
    there was until then."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT), str(ROOT / "kernels"), str(ROOT / "bench"), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
        "PYTHONSAFEPATH": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
    }
    # A file, no pipe: a grandchild that lives on would keep a pipe open, and the wait for its end would not end.
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        child = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=stderr, start_new_session=True
        )
        _children.add(child)
        code: int | None = None
        try:
            code = child.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        finally:
            _children.discard(child)
        output.seek(0)
        return output.read(), code


def end_children() -> None:
    """Kill what ``run_child`` has started in other threads: in sessions of their own, children outlive a Ctrl-C."""
    for child in tuple(_children):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
