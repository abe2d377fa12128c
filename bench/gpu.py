r"""Everything that needs a GPU, in stages: ``python bench/gpu.py --stage tests|kernels|step|csrc|rollout``.

Runs from a bare checkout: nothing of ours installed, no network; ``PYTHONPATH`` is kept, so that missing
packages can be brought along in a folder. Each item of a stage runs in a process of its own and becomes one
JSON row with its provenance in ``bench/results/<stage>-<gpu>.jsonl`` as soon as it is done, what it
printed in the ``.log`` beside it. A stage called again skips the items that already passed with the same sources
on the same GPU. An item that hangs costs ``--limit`` seconds, not the stage. ``REWARDMAP_COMMIT`` names the commit
where the checkout came without git.

Where there is a GPU for a quarter of an hour only, what says most first (``--out FOLDER`` with each, where only that
folder comes back; TRL needs trl, datasets, dill and multiprocess along, the step stage pydantic, pydantic-core,
annotated-types, typing-inspection and tomli-w):

    python bench/gpu.py --stage tests --items "kernels_gpu|tree_attention|tree_varlen" --limit 120 --deadline 150
    python bench/gpu.py --stage step --items "^6000\+500: (ours|TRL)$" --limit 180 --deadline 240
    python bench/gpu.py --stage kernels --limit 150 --deadline 190 \
        --items "^(linear\.7b\.8192|logits\.7b\.8192|routes\.answers\.3b\.6000|routes\.tower\.whole)$"
    python bench/gpu.py --stage step --items "^tiny" --limit 100 --deadline 120
    python bench/gpu.py --stage csrc --items "^(results|time-152064)$" --limit 60 --deadline 90

Exit codes: 0 all items passed, 1 some failed, 2 the stage cannot run here,
3 the deadline came first (call again).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
SOURCES = ("rewardmap", "kernels", "csrc", "bench", "tests")
STAGES = ("tests", "kernels", "step", "csrc", "rollout")
DEADLINE = 530
"""Seconds a stage may take: under nine minutes."""
LIMIT = 300
"""Seconds an item may take."""
PASSED, FAILED, IMPOSSIBLE, UNFINISHED = 0, 1, 2, 3

PROBE = """
import importlib.util, json, platform, torch
here = torch.cuda.is_available()
triton = importlib.util.find_spec("triton") and __import__("triton").__version__
print(json.dumps({
    "gpu": torch.cuda.get_device_name() if here else None, "gpus": torch.cuda.device_count() if here else 0,
    "capability": list(torch.cuda.get_device_capability()) if here else None, "torch": torch.__version__,
    "cuda": torch.version.cuda, "triton": triton, "python": platform.python_version(),
}))
"""

Row = dict[str, Any]


class CannotRunError(Exception):
    """The stage has nothing to do, or lacks what it needs."""


@dataclass(frozen=True)
class Item:
    """One measurement: a command whose last line on stdout is a JSON object, or pytest's summary."""

    name: str
    command: tuple[str, ...]
    read: Callable[[str, int], Row]
    """(stdout, exit code) -> the row's own fields, ``ok`` among them."""


def main() -> int:
    arguments = _arguments()
    deadline = time.monotonic() + arguments.deadline
    try:
        machine = probe(arguments.device)
        items = STAGE_ITEMS[arguments.stage](arguments.device)
        items = [item for item in items if re.search(arguments.items, item.name)]
        if not items:
            raise CannotRunError(f"it has no item that matches {arguments.items!r}")
    except CannotRunError as reason:
        print(f"stage {arguments.stage}: {reason}", file=sys.stderr)
        return IMPOSSIBLE
    out = arguments.out or (Path(tempfile.mkdtemp(prefix="bench-")) if arguments.device == "cpu" else RESULTS)
    path = out / f"{arguments.stage}-{slug(machine['gpu'] or 'cpu')}.jsonl"
    provenance = {"stage": arguments.stage, "device": arguments.device, **machine, **source()}
    print(f"{arguments.stage} on {machine['gpu'] or 'CPU (dry run)'} -> {path}", flush=True)
    return run(items, path, provenance, deadline, arguments.limit)


def run(
    items: Sequence[Item], path: Path, provenance: Row, deadline: float, limit: float = LIMIT
) -> int:
    """Run what has not passed yet and append a row for each. Returns the exit code."""
    done = passed(path, provenance)
    failed = 0
    for item in items:
        if item.name in done:
            print(f"  {item.name}: passed before, skipped", flush=True)
            continue
        left = deadline - time.monotonic()
        if left <= 0:
            print("  the deadline came first; call again to go on", flush=True)
            return UNFINISHED
        start = time.monotonic()
        output, code, said = logged_child(item, path.with_suffix(".log"), min(left, limit))
        if code is None and left <= limit:
            print(f"  {item.name}: not done within the deadline; call again to go on", flush=True)
            return UNFINISHED
        read = {"ok": False, "timed_out": True} if code is None else item.read(output, code)
        row = {"item": item.name, **read, "wall_seconds": round(time.monotonic() - start, 2)}
        if not row["ok"] and said:
            row["stderr"] = said
            print("\n".join(said), file=sys.stderr, flush=True)
        append(path, row | provenance | {"date": datetime.now(UTC).isoformat(timespec="seconds")})
        failed += not row["ok"]
        print(f"  {item.name}: {'ok' if row['ok'] else 'FAILED'} {json.dumps(row)}", flush=True)
    return FAILED if failed else PASSED


def logged_child(item: Item, log: Path, seconds: float) -> tuple[str, int | None, list[str]]:
    """As ``run_child``, and the last lines of its stderr; that and then its output go to the end of ``log``."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a+", encoding="utf-8", errors="replace") as file:
        file.write(f"--- {item.name}\n")
        file.flush()
        begin = file.tell()
        output, code = run_child(item.command, seconds, file)
        file.seek(begin)
        lines = [line for line in file.read().splitlines() if line.strip()]
        file.write(output)
        return output, code, lines[-12:]


def run_child(command: Sequence[str], seconds: float, stderr: Any = None) -> tuple[str, int | None]:
    """Output and exit code; None when the time was up, and then the whole process group is gone."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT), str(ROOT / "kernels"), str(ROOT / "bench"), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
        "PYTHONSAFEPATH": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    child = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True
    )
    try:
        output, _ = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        return "", None
    return output, child.returncode


def probe(device: str) -> Row:
    """GPU, driver and versions. Raises CannotRunError where ``device`` is missing."""
    output, code = run_child((sys.executable, "-c", PROBE), 120)
    if code != 0:
        raise CannotRunError(f"{sys.executable} cannot import torch; start this with an interpreter that can")
    machine: Row = json.loads(output.splitlines()[-1])
    if device == "cpu":
        return machine | {"gpu": None, "gpus": 0, "capability": None, "driver": None}
    if machine["gpu"] is None:
        raise CannotRunError(
            f"no GPU here: torch {machine['torch']} finds no CUDA device. Use a machine with one, or "
            "--device cpu for a dry run that writes its rows into a temporary folder"
        )
    driver = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    return machine | {"driver": driver[0] if driver else None}


def said(*command: str) -> str:
    """What a program prints; nothing where there is no such program."""
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def source() -> Row:
    """The commit where git knows it, and a digest of the sources, which decides what is the same code."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for file in sorted((ROOT / folder).rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts and RESULTS not in file.parents:
                digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    commit = said("git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*").strip()
    return {"commit": commit or os.environ.get("REWARDMAP_COMMIT"), "sources": digest.hexdigest()[:16]}


def passed(path: Path, provenance: Row) -> set[str]:
    """Items of ``path`` that passed with these sources, on this machine's kind of GPU."""
    if not path.exists():
        return set()
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    same = ("sources", "gpu", "torch", "triton", "driver")
    return {row["item"] for row in rows if row["ok"] and all(row[key] == provenance[key] for key in same)}


def append(path: Path, row: Row) -> None:
    """One more line; a line cut off by a kill before is ended first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cut = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size
    if cut:
        whole = path.read_text(encoding="utf-8").split("\n")[:-1]
        path.write_text("".join(f"{line}\n" for line in whole), encoding="utf-8")
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


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
    command = (sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider")
    return [Item(file.stem, (*command, f"tests/{file.name}"), read_pytest) for file in files]


def read_pytest(output: str, code: int) -> Row:
    """Counts from pytest's last line. A file whose tests all skipped has shown nothing: not passed."""
    lines = [line for line in output.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    counts = {
        word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", last)
    }
    row: Row = {name: counts.get(name, 0) for name in ("passed", "failed", "skipped")}
    row["ok"] = code == 0 and row["passed"] > 0
    if not row["ok"]:
        row["tail"] = lines[-12:]
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
    """Each case of the kernel bench beside its peers, then attention by each of its routes."""
    sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "kernels")]
    import kernel_cases
    import routes

    script, attention = (str(ROOT / "bench" / name) for name in ("kernel_run.py", "routes.py"))
    return [
        Item(name, (sys.executable, script, name, "--device", device), read_json)
        for name in kernel_cases.cases(device)
    ] + [
        Item(f"routes.{name}", (sys.executable, attention, "--case", name, "--device", device), read_json)
        for name in routes.CASES[device]
    ]


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


def read_sanitizer(output: str, code: int) -> Row:
    """pytest's counts, from among the sanitizer's own lines; any finding is a failure."""
    lines = [line for line in output.splitlines() if not line.startswith("=========")]
    return read_pytest("\n".join(lines), code)


def read_json(output: str, code: int) -> Row:
    """The last line that is a JSON object: a library may have the last word on stdout."""
    lines = output.splitlines()
    for line in reversed(lines if code == 0 else []):
        if line.startswith("{"):
            with contextlib.suppress(ValueError):
                row: Row = json.loads(line)
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


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", choices=STAGES, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run")
    parser.add_argument("--items", default="", help="a regular expression: only the items it finds (default all)")
    parser.add_argument("--deadline", type=float, default=DEADLINE, help=f"seconds (default {DEADLINE})")
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"seconds for an item (default {LIMIT})")
    parser.add_argument(
        "--out", type=Path, help="folder of the results (default bench/results; a new one for cpu)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
