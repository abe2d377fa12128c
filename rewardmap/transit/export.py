"""Writes generated data sets: pictures, flat networks, true networks, and rows in one of three released forms.

A data folder holds ``maps/<country>/<city>.png``, ``stations/<country>/<city>.json``, ``geometry/`` and the rows: under
``data/ReasonMap-Train`` as ``datasets`` saves them, or as ``data/<split>-*.parquet`` (ReasonMap, ReasonMap-Plus).
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rewardmap.transit.compose import FULL_LEVELS
from rewardmap.transit.draw import draw_map, encode_png
from rewardmap.transit.forms import FORMS, Form, write_parquet
from rewardmap.transit.generate import TINY_LEVELS, generate_network
from rewardmap.transit.grid import TINY_GRID_LEVELS
from rewardmap.transit.grid_floor import FLOOR_LEVELS
from rewardmap.transit.questions import Balance, make_questions
from rewardmap.transit.topology import network_as_json
from rewardmap.types import KINDS

DATA_FOLDER = "data/ReasonMap-Train"
GENERATOR_VERSION = "2.1"
"""Changes whenever a seed gives other bytes than before."""
PRESET_LEVELS = {"tiny": TINY_LEVELS, "full": FULL_LEVELS, "grid-tiny": TINY_GRID_LEVELS, "grid": FLOOR_LEVELS}
"""Map levels of a preset; maps take them in turn, so that each level has a third of the maps."""

_LOCKED = ".locked"
"""In an incomplete folder: locked while a process writes there."""

Progress = Callable[[int, int], None]
"""Called with (maps done, maps in all)."""


def write_dataset(
    folder: str | Path,
    *,
    maps: Mapping[str, int],
    preset: str = "tiny",
    seed: int = 0,
    form: Form = "ReasonMap-Train",
    progress: Progress | None = None,
) -> None:
    """Generates a data set with ``maps[split]`` maps per split and writes it to the new folder ``folder``.

    Same preset, maps and seed: same maps and questions, in each form the same bytes. ReasonMap takes the planning
    questions, short and long, ReasonMap-Plus the others, ReasonMap-Train all. The folder appears at once, when it is
    complete; what a killed call left of it is removed. Raises ValueError for an unknown preset or form, a split without
    maps, or a folder that exists already; OSError, which names a file or the folder.
    """
    folder = Path(folder)
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}; known forms: {', '.join(FORMS)}")
    if preset not in PRESET_LEVELS:
        raise ValueError(f"unknown preset {preset!r}; known presets: {', '.join(PRESET_LEVELS)}")
    if not maps or min(maps.values()) < 1:
        raise ValueError(f"maps={dict(maps)!r} must give at least one map for each split")
    if folder.exists():
        raise ValueError(f"{folder} exists already; remove it or choose another folder")
    try:
        with _becoming(folder) as partial:
            pictures: set[str] = set()
            counts: dict[str, Counter[str]] = {}
            done = 0
            for split, count in maps.items():
                balance = Balance()
                rows: list[dict[str, Any]] = []
                for index in range(count):
                    rows += _write_map(partial, split, index, preset, seed, balance, pictures)
                    done += 1
                    if progress is not None:
                        progress(done, sum(maps.values()))
                if form == "ReasonMap-Train":
                    write_rows(partial, rows, split)
                else:
                    write_parquet(partial, rows, split, form)
                    rows = [row for row in rows if (row["type"] == "planning") == (form == "ReasonMap")]
                counts[split] = Counter(str(row["type"]) for row in rows)
            (partial / "README.md").write_text(_card(preset, seed, form, maps, counts), encoding="utf-8")
    except OSError as error:
        if error.filename is None:  # of what failed in a file that was open already, as on a full disk
            raise OSError(error.errno, error.strerror, str(folder)) from error
        raise


@contextmanager
def _becoming(folder: Path) -> Iterator[Path]:
    """Yields a new folder beside ``folder`` that becomes it if the block ends well.

    It holds a file that is locked while it is written, of which a kill lets go: such a folder is removed by the next
    call. Where the file system has no locks there is no such file, and nothing is removed.
    """
    for left in filter(_is_dead, _partials(folder)):
        shutil.rmtree(left, ignore_errors=True)
    partial = folder.with_name(f"{_partial(folder)}{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        with (partial / ".unlocked").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                os.rename(file.name, partial / _LOCKED)  # nobody finds it there without its lock
            except OSError:
                os.unlink(file.name)
            yield partial
            (partial / _LOCKED).unlink(missing_ok=True)
            os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_dead(partial: Path) -> bool:
    """Whether a call that is no more has left the folder."""
    try:
        with (partial / _LOCKED).open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # no such file, or not ours, or locked
        return False
    return True


def remove_partial(folder: Path) -> None:
    """Removes what killed processes left of ``folder``; the caller knows that none is writing it."""
    for partial in _partials(folder):
        shutil.rmtree(partial)


def _partials(folder: Path) -> list[Path]:
    return list(folder.parent.glob(f"{glob.escape(_partial(folder))}*"))


def _partial(folder: Path) -> str:
    """What the name of an incomplete folder begins with; the number of its process follows."""
    return f".{folder.name}.partial-"


_ROWS = {
    "ReasonMap-Train": """\
- `data/ReasonMap-Train/`: the questions; `datasets.load_from_disk` reads them.
- `answer`: TorF 1 yes, 0 no; Counting1 the index of the right choice; Counting2 and Counting3 the number; planning -1.
- `fine_grained_answer` (JSON): the stops between, the lines of a stop, or every optimal route (fewest transfers,
  then fewest stops) with its via stops.""",
    "ReasonMap-Plus": """\
- `data/*.parquet`: the questions, one file a split; `figure` and `json` are paths inside this folder.
- `answer`: TorF 1 yes, 0 no; Counting1 the index of the right choice; Counting2 and Counting3 the number.
- `fine_grained_answer` (JSON): the stops between, or the lines of a stop.""",
    "ReasonMap": """\
- `data/*.parquet`: the questions, one file a split; `figure` is the picture as base64 text, `json` the stations lists.
- `question_short` asks for the legs alone, `question_long` also for the number of via stops (half) or their names.
- `routes`: every optimal route (fewest transfers, then fewest stops) with its via stops.""",
}


def _card(preset: str, seed: int, form: Form, maps: Mapping[str, int], counts: Mapping[str, Counter[str]]) -> str:
    """The data card: what is inside, how it was made, and how to make it again."""
    levels = ", ".join(PRESET_LEVELS[preset])
    cells = {
        split: [split, maps[split], *(counts[split][kind] for kind in KINDS), counts[split].total()] for split in maps
    }
    table = "\n".join(f"| {' | '.join(map(str, row))} |" for row in cells.values())
    splits = ", ".join(f'"{split}": {count}' for split, count in maps.items())
    chosen = "" if form == "ReasonMap-Train" else f', form="{form}"'
    maps_of, world = "transit maps", "transit networks"
    if preset.startswith("grid"):
        maps_of, world = "floor maps", "warehouse floors with one-way aisles"
    return f"""---
license: apache-2.0
task_categories: [visual-question-answering]
tags: [synthetic, maps, spatial-reasoning]
---
# Generated {maps_of}, preset {preset}, seed {seed}

Invented {world} with drawn maps and questions in the schema of {form}. Nothing in it is real:
networks, names and pictures come from a random generator. Levels, in turn: {levels}. No map is in two splits.

| split | maps | {" | ".join(KINDS)} | questions |
| --- | --- | {" | ".join("---" for _ in KINDS)} | --- |
{table}

- `maps/`: pictures. `stations/`: the flat station lists that the published reward reads.
- `geometry/`: the true networks (loops, branches) with coordinates, drawn polylines and label boxes in pixels.
{_ROWS[form]}

Made by generator version {GENERATOR_VERSION}; the same version gives the same bytes again:

```python
from rewardmap.transit import write_dataset

write_dataset("FOLDER", maps={{{splits}}}, preset="{preset}", seed={seed}{chosen})
```
"""


def _write_map(
    root: Path, split: str, index: int, preset: str, seed: int, balance: Balance, pictures: set[str]
) -> list[dict[str, Any]]:
    levels = PRESET_LEVELS[preset]
    level = levels[index % len(levels)]
    country, city = f"{preset.replace('-', '_')}_{split}", f"{level.replace('-', '_')}_{index:05d}"
    for attempt in range(100):
        rng = np.random.default_rng([seed, zlib.crc32(split.encode()), index, attempt])
        network = generate_network(level, rng, f"{country}/{city}")
        png = encode_png(draw_map(network))
        digest = hashlib.sha256(png).hexdigest()
        if digest not in pictures:
            break
    else:
        raise ValueError(f"preset {preset!r} has too few different maps for {index} of them; ask for fewer")
    pictures.add(digest)
    figure = root / "maps" / country / f"{city}.png"
    stations = root / "stations" / country / f"{city}.json"
    geometry = root / "geometry" / country / f"{city}.json"
    for path in (figure, stations, geometry):
        path.parent.mkdir(parents=True, exist_ok=True)
    truth = json.dumps(network_as_json(network), ensure_ascii=False, separators=(",", ":"))
    geometry.write_text(truth + "\n", encoding="utf-8")
    figure.write_bytes(png)
    text = json.dumps(network.metro_data(), ensure_ascii=False, indent=1)
    stations.write_text(text + "\n", encoding="utf-8")
    return make_questions(network, preset, rng, balance)


def write_rows(folder: str | Path, rows: Sequence[Mapping[str, Any]], split: str | None = "train") -> None:
    """Adds rows to a data folder as one split; ``split=None`` saves them without splits, as the released data
    is.

    Pictures and stations files are the caller's. Raises ValueError if that split is there already, or no
    rows.
    """
    from datasets import Dataset, disable_progress_bars, enable_progress_bars

    data = Path(folder) / DATA_FOLDER
    target = data if split is None else data / split
    if not rows:
        raise ValueError(f"no rows to write to {target}")
    if target.exists():
        raise ValueError(f"{target} exists already; remove it or choose another split")
    disable_progress_bars()
    try:
        Dataset.from_list([dict(row) for row in rows]).save_to_disk(str(target))
    finally:
        enable_progress_bars()
    if split is not None:
        index = data / "dataset_dict.json"
        splits = json.loads(index.read_text(encoding="utf-8"))["splits"] if index.exists() else []
        index.write_text(json.dumps({"splits": [*splits, split]}), encoding="utf-8")
