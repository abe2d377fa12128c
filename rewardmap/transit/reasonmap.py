"""Data sets in ReasonMap-Train's form: generate them, write rows into them, load them (the real ones too).

A data folder holds ``maps/<country>/<city>.png``, ``stations/<country>/<city>.json`` (the flat networks) and
``data/ReasonMap-Train`` as ``datasets.save_to_disk`` writes it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rewardmap.transit.draw import draw_map, encode_png
from rewardmap.transit.generate import TINY_LEVELS, generate_network
from rewardmap.transit.questions import QUESTION_COUNTS, Balance, make_questions
from rewardmap.types import KINDS, LEVELS, DataError, MetroData, Problem

DATA_FOLDER = "data/ReasonMap-Train"
PRESET_LEVELS = {"tiny": TINY_LEVELS}
"""Map levels of a preset; maps take them in turn, so that each level has a third of the maps."""

Progress = Callable[[int, int], None]
"""Called with (maps done, maps in all)."""


@dataclass(frozen=True, slots=True)
class MapData:
    """A loaded data set. ``networks`` maps ``Problem.network_id`` to the flat network that rewards are computed on."""

    problems: list[Problem]
    networks: dict[str, MetroData]
    root: Path


def write_dataset(
    folder: str | Path,
    *,
    maps: Mapping[str, int],
    preset: str = "tiny",
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Generates a data set with ``maps[split]`` maps per split and writes it to the new folder ``folder``.

    Same preset, maps and seed: same bytes. The folder appears at once, when it is complete. Raises ValueError for an
    unknown preset, an empty or negative number of maps, or a folder that exists already.
    """
    folder = Path(folder)
    if preset not in PRESET_LEVELS:
        raise ValueError(f"unknown preset {preset!r}; known presets: {', '.join(PRESET_LEVELS)}")
    if not maps or min(maps.values()) < 1:
        raise ValueError(f"maps={dict(maps)!r} must give at least one map for each split")
    if folder.exists():
        raise ValueError(f"{folder} exists already; remove it or choose another folder")
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        rows: dict[str, list[dict[str, Any]]] = {}
        pictures: set[str] = set()
        done = 0
        for split, count in maps.items():
            balance = Balance()
            rows[split] = []
            for index in range(count):
                rows[split] += _write_map(partial, split, index, preset, seed, balance, pictures)
                done += 1
                if progress is not None:
                    progress(done, sum(maps.values()))
        _save_rows(partial, rows)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_map(
    root: Path, split: str, index: int, preset: str, seed: int, balance: Balance, pictures: set[str]
) -> list[dict[str, Any]]:
    levels = PRESET_LEVELS[preset]
    level = levels[index % len(levels)]
    country, city = f"{preset}_{split}", f"{level.replace('-', '_')}_{index:05d}"
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
    for path in (figure, stations):
        path.parent.mkdir(parents=True, exist_ok=True)
    figure.write_bytes(png)
    stations.write_text(
        json.dumps(network.metro_data(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
    )
    return make_questions(network, QUESTION_COUNTS[preset], rng, balance)


def _save_rows(root: Path, rows: Mapping[str, list[dict[str, Any]]]) -> None:
    from datasets import Dataset, DatasetDict, disable_progress_bars, enable_progress_bars

    disable_progress_bars()
    try:
        splits = {split: Dataset.from_list(content) for split, content in rows.items()}
        DatasetDict(splits).save_to_disk(str(root / DATA_FOLDER))
    finally:
        enable_progress_bars()


def load_dataset(folder: str | Path, split: str = "train") -> MapData:
    """Loads a split of a data folder; a folder saved without splits is taken whole, whatever ``split`` says.

    Raises DataError naming file, row and field for anything that is missing or malformed.
    """
    root = Path(folder).absolute()
    table, source = _read_table(root, split)
    networks: dict[str, MetroData] = {}
    problems = []
    for index, row in enumerate(table.to_pylist()):
        problems.append(_problem(root, row, f"{source}, row {index}", f"{split}-{index:06d}", networks))
    return MapData(problems, networks, root)


def _read_table(root: Path, split: str) -> tuple[pa.Table, Path]:
    data = root / DATA_FOLDER
    if (data / "dataset_dict.json").is_file():
        splits = json.loads((data / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        if split not in splits:
            raise DataError(f"{data}: no split {split!r}; it has {', '.join(splits)}")
        data = data / split
    if not (data / "state.json").is_file():
        raise DataError(f"{data}: no state.json; expected a data set as datasets.save_to_disk writes it")
    state = json.loads((data / "state.json").read_text(encoding="utf-8"))
    tables = []
    for entry in state["_data_files"]:
        with pa.memory_map(str(data / entry["filename"])) as source:
            tables.append(pa.ipc.open_stream(source).read_all())
    return pa.concat_tables(tables), data


def _problem(
    root: Path, row: Mapping[str, Any], where: str, default_uid: str, networks: dict[str, MetroData]
) -> Problem:
    def text(name: str) -> str:
        if not isinstance(row.get(name), str):
            raise DataError(f"{where}: field {name!r} must be text, got {row.get(name)!r}")
        return row[name]

    kind, difficulty = text("type"), text("difficulty_city")
    for name, value, known in (("type", kind, KINDS), ("difficulty_city", difficulty, LEVELS)):
        if value not in known:
            raise DataError(f"{where}: field {name!r} is {value!r}; it must be one of {', '.join(known)}")
    network_id = f"{text('country')}/{text('city')}"
    if network_id not in networks:
        networks[network_id] = json.loads((root / text("json")).read_text(encoding="utf-8"))
    details = row.get("fine_grained_answer")
    return Problem(
        uid=row.get("uid") or default_uid,
        image=str(root / text("figure").removeprefix("./")),
        question=text("question"),
        kind=kind,
        answer=int(row["answer"]),
        station_1=row.get("station_1") or "",
        station_2=row.get("station_2") or "",
        network_id=network_id,
        map_difficulty=difficulty,
        transfers_required=int(row.get("question_transfer_count") or 0),
        question_difficulty=row.get("difficulty_question"),
        fine_grained_answer=json.loads(details) if details else None,
    )
