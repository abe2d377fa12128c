r"""Everything that needs a GPU, in stages: ``python bench/gpu.py --stage first|tests|kernels|step|csrc|rollout``.

Runs from a bare checkout: nothing of ours installed, no network; ``PYTHONPATH`` is kept, so that missing
packages can be brought along in a folder. Each item of a stage runs in a process of its own and becomes one
JSON row with its provenance and what nvidia-smi read meanwhile in ``bench/results/<stage>-<gpu>.jsonl`` as soon as it
is done, what it printed in the ``.log`` beside it. A stage called again skips the items that already passed with the
same sources on the same GPU. An item that hangs costs ``--limit`` seconds, not the stage; of one that is killed or dies
the last row that it had printed stays, with ``cut_short``, and a call again measures it anew. ``REWARDMAP_COMMIT``
names the commit where the checkout came without git.

Where there is a GPU for a quarter of an hour only, ``first`` runs what says most of the other stages, in the order of
``gpu_stages.FIRST``, each row in the file of its own stage: about eight minutes, of which TRL's step and the 7B head
take the most. The rest is for as long as the machine stays: the step once more with attention by the table that
``first`` has measured, the Hopper kernel, the launches of the row kernels.

    python bench/gpu.py --stage first --deadline 560 --out first
    python bench/routes.py --table first/kernels-nvidia-h200.jsonl
    python bench/gpu.py --stage step --items "^6000\+500: ours$" --limit 60 --deadline 70 --out second
    python bench/gpu.py --stage csrc --items "^(results|time-152064)$" --limit 60 --deadline 70 --out second
    python bench/gpu.py --stage kernels --items "^tune\.(exponentials|policy_row)$" --deadline 60 --out second

``first`` and ``second`` are the folders to bring back. TRL needs trl, datasets, dill and multiprocess along, Liger
liger_kernel, the step stage pydantic, pydantic-core, annotated-types, typing-inspection and tomli-w.

Exit codes, the highest where a stage has several: 0 all items passed, 1 some failed, 2 something cannot run here,
3 the deadline came first (call again).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import signal
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
from gpu_stages import FIRST, STAGE_ITEMS, CannotRunError, Item, Part, end_children, run_child
from records import RESULTS, ROOT, Row, commit, read_rows, said, slug

SOURCES = ("rewardmap", "kernels", "csrc", "bench", "tests")
DEADLINE = 530
"""Seconds a stage may take: under nine minutes."""
LIMIT = 300
"""Seconds an item may take."""
IMPORT = 240
"""Seconds that the first import of torch may take: from a cold disk it is a matter of minutes."""
PASSED, FAILED, IMPOSSIBLE, UNFINISHED = 0, 1, 2, 3
MASK = "clocks_event_reasons.active"
SENSORS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "memory.used", MASK)
"""What nvidia-smi is asked for while an item runs: MHz, MHz, W, °C, MiB, and a mask of what held the clocks down."""
CSV = "--format=csv,noheader,nounits"

PACKAGES = ("transformers", "accelerate", "trl", "liger-kernel", "quack-kernels", "flash-attn", "sglang")
"""What peers come from, and what a step runs through: their versions stand in each row."""

PROBE = """
import importlib.metadata, importlib.util, json, platform, sys, torch
here = torch.cuda.is_available()
triton = importlib.util.find_spec("triton") and __import__("triton").__version__
packages = {}
for name in sys.argv[1:]:
    try:
        packages[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps({
    "gpu": torch.cuda.get_device_name() if here else None, "gpus": torch.cuda.device_count() if here else 0,
    "capability": list(torch.cuda.get_device_capability()) if here else None, "torch": torch.__version__,
    "cuda": torch.version.cuda, "triton": triton, "python": platform.python_version(), "packages": packages,
}))
"""

_writing = threading.Lock()


def main() -> int:
    arguments = _arguments()
    deadline = time.monotonic() + arguments.deadline
    try:
        machine = probe(arguments.device)
    except CannotRunError as reason:
        print(f"stage {arguments.stage}: {reason}", file=sys.stderr)
        return IMPOSSIBLE
    out = arguments.out or (Path(tempfile.mkdtemp(prefix="bench-")) if arguments.device == "cpu" else RESULTS)
    sources, code = source(), PASSED
    for part in FIRST if arguments.stage == "first" else (Part(arguments.stage, arguments.items, arguments.limit),):
        path = out / f"{part.stage}-{slug(machine['gpu'] or 'cpu')}.jsonl"
        provenance = {"stage": part.stage, "device": arguments.device, **machine, **sources}
        try:
            items = [item for item in STAGE_ITEMS[part.stage](arguments.device) if re.search(part.items, item.name)]
            if not items:
                raise CannotRunError(f"it has no item that matches {part.items!r}")
        except Exception as reason:  # what one stage cannot import must not cost the others their rows
            if not isinstance(reason, CannotRunError):
                traceback.print_exc()
            print(f"stage {part.stage}: {reason}", file=sys.stderr)
            code = max(code, IMPOSSIBLE)
            continue
        print(f"{part.stage} on {machine['gpu'] or 'CPU (dry run)'} -> {path}", flush=True)
        code = max(code, run(items, path, provenance, deadline, part.limit, part.together))
    return code


def run(
    items: Sequence[Item], path: Path, provenance: Row, deadline: float, limit: float = LIMIT, together: bool = False
) -> int:
    """Run what has not passed yet, one by one or all ``together``, and append a row for each. Returns the exit code."""
    done = passed(path, provenance)

    def measured(item: Item) -> int:
        if item.name in done:
            print(f"  {item.name}: passed before, skipped", flush=True)
            return PASSED
        left = deadline - time.monotonic()
        if left <= 0:
            print(f"  {item.name}: the deadline came first; call again to go on", flush=True)
            return UNFINISHED
        start = time.monotonic()
        readings: Row = {}
        with watched(readings):
            output, code, errors = logged_child(item, path.with_suffix(".log"), min(left, limit))
        read = item.read(output, code)
        if code is None and left <= limit and not read["ok"]:
            print(f"  {item.name}: not done within the deadline; call again to go on", flush=True)
            return UNFINISHED
        row = {"item": item.name, **read, "wall_seconds": round(time.monotonic() - start, 2), "readings": readings}
        if code is None:
            row["timed_out"] = True
        if errors and (not row["ok"] or code != 0):
            row["stderr"] = errors
        with _writing:
            append(path, row | provenance | {"date": datetime.now(UTC).isoformat(timespec="seconds")})
            for line in row.get("stderr", ()):
                print(line, file=sys.stderr, flush=True)
            print(f"  {item.name}: {'ok' if row['ok'] else 'FAILED'} {json.dumps(row)[:400]}", flush=True)
        if code is None and left <= limit:
            return UNFINISHED
        return PASSED if row["ok"] and "cut_short" not in row else FAILED

    with ThreadPoolExecutor(len(items) if together and items else 1) as pool:
        try:
            return max(pool.map(measured, items), default=PASSED)
        except KeyboardInterrupt:
            end_children()
            raise


@contextlib.contextmanager
def watched(readings: Row) -> Iterator[None]:
    """Put into ``readings`` what nvidia-smi reads each second while the block runs: see ``readings_of``. Nothing where
    there is no nvidia-smi."""
    lines: list[str] = []
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            lines.append(said("nvidia-smi", f"--query-gpu={','.join(SENSORS)}", CSV, "--id=0"))
            over.wait(1.0)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(5.0)
        readings |= readings_of(lines)


def readings_of(lines: Sequence[str]) -> Row:
    """By sensor [least, median, most] of nvidia-smi's lines, the masks as they came; what the GPU lacks is left out."""
    found: Row = {}
    columns = zip(*(line.strip().split(", ") for line in lines if line.count(",") == len(SENSORS) - 1), strict=True)
    for sensor, values in zip(SENSORS, columns, strict=False):
        numbers = [float(value) for value in values if re.fullmatch(r"[\d.]+", value)]
        if sensor == MASK:
            found[sensor] = sorted(set(values))
        elif numbers:
            found[sensor] = [min(numbers), statistics.median(numbers), max(numbers)]
    return found


def logged_child(item: Item, log: Path, seconds: float) -> tuple[str, int | None, list[str]]:
    """As ``run_child``, and the last lines of its stderr; that and then its output go to the end of ``log``."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as file:
        output, code = run_child(item.command, seconds, file)
        file.seek(0)
        errors = file.read()
    with _writing, log.open("a", encoding="utf-8") as whole:
        whole.write(f"--- {item.name}\n{errors}{output}")
    return output, code, [line for line in errors.splitlines() if line.strip()][-12:]


def probe(device: str) -> Row:
    """GPU, driver and versions. Raises CannotRunError where ``device`` is missing."""
    output, code = run_child((sys.executable, "-c", PROBE, *PACKAGES), IMPORT)
    if code is None:
        raise CannotRunError(f"{sys.executable} had not imported torch after {IMPORT} seconds; call again")
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
    driver = said("nvidia-smi", "--query-gpu=driver_version", CSV).splitlines()
    return machine | {"driver": driver[0] if driver else None}


def source() -> Row:
    """The commit where git knows it, and a digest of the sources, which decides what is the same code."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for file in sorted((ROOT / folder).rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts and RESULTS not in file.parents:
                digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return {"commit": commit(), "sources": digest.hexdigest()[:16]}


def passed(path: Path, provenance: Row) -> set[str]:
    """Items of ``path`` that passed, to their end, with these sources, on this machine's kind of GPU."""
    if not path.exists():
        return set()
    rows = read_rows(path)
    same = ("sources", "gpu", "torch", "triton", "driver")
    whole = (row for row in rows if row["ok"] and "cut_short" not in row)
    return {row["item"] for row in whole if all(row[key] == provenance[key] for key in same)}


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


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", choices=("first", *STAGE_ITEMS), required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run")
    parser.add_argument("--items", default="", help="a regular expression: only the items it finds (default all)")
    parser.add_argument("--deadline", type=float, default=DEADLINE, help=f"seconds (default {DEADLINE})")
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"seconds for an item (default {LIMIT})")
    parser.add_argument(
        "--out", type=Path, help="folder of the results (default bench/results; a new one for cpu)"
    )
    arguments = parser.parse_args()
    if arguments.stage == "first" and (arguments.items or arguments.limit != LIMIT or arguments.device == "cpu"):
        parser.error("--stage first has its own items and limits, and no dry run: name the stage of the items instead")
    return arguments


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ``timeout`` ends a stage as Ctrl-C does
    sys.exit(main())
