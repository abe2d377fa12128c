"""How results are named and kept: the processor, the commit, file names, rows, and tables between the marks of a page.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
Row = dict[str, Any]


def said(*command: str) -> str:
    """What a program prints; nothing where there is no such program, or it takes half a minute."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30).stdout
    except subprocess.TimeoutExpired:
        return ""


def commit() -> str | None:
    """Of the checkout, "-dirty" behind it where files are changed; ``REWARDMAP_COMMIT`` where git knows none."""
    known = said("git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*").strip()
    return known or os.environ.get("REWARDMAP_COMMIT")


def processor() -> str:
    """The processor's name, as the system gives it."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text(encoding="utf-8")) if info.is_file() else None
    return found.group(1) if found else platform.processor() or platform.machine()


def why(reason: Exception) -> str:
    """An exception in one line."""
    text = str(reason).strip().splitlines()
    return f"{type(reason).__name__}: {text[0][:160] if text else ''}"


def slug(name: str) -> str:
    """A device's name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def read_rows(path: Path) -> list[Row]:
    """The rows of a ``.jsonl``; a last line that a kill cut off is left out."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def between(text: str, start: str, end: str, new: str) -> str:
    """``text`` with ``new`` in the place of the lines between two marks. Raises ValueError where it lacks one."""
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"no {start} … {end} to write between")
    return f"{before}{start}\n{new}\n{end}{after}"


def write_between(page: Path, start: str, end: str, new: str) -> None:
    """``between`` for a page. Raises ValueError, which names it."""
    from rewardmap.files import write_text  # not above: where a GPU is lent, only the kernels may be there

    try:
        text = between(page.read_text(encoding="utf-8"), start, end, new)
    except ValueError as error:
        raise ValueError(f"{page}: {error}") from None
    write_text(page, text)
