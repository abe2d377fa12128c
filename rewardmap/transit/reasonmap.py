"""Loads ReasonMap, ReasonMap-Plus and ReasonMap-Train, the released files and generated ones alike.

A data folder holds the rows in one of these places, the first that exists:

* ``data/ReasonMap-Train`` or the folder itself, as ``datasets.save_to_disk`` writes it, with splits or without;
* ``data/*.parquet`` or ``*.parquet``, as a hub repository stores them: the files whose names begin with the split's,
  all where no name begins with that of a split.

``hf://datasets/OWNER/NAME`` instead of a folder fetches that repository from the Hugging Face hub.

Pictures are paths inside the folder, base64 text, bytes, or the ``Image`` feature's ``{bytes, path}``; networks are
paths of stations files inside the folder, JSON text, or the dictionary itself. Names are read ``assets.composed``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from rewardmap.transit.assets import Assets, composed
from rewardmap.transit.export import DATA_FOLDER, write_dataset, write_rows
from rewardmap.transit.graph import Network
from rewardmap.transit.topology import read_network
from rewardmap.types import ANSWERS, KINDS, LEVELS, TRANSFERS, DataError, MetroData, Problem

__all__ = ["MapData", "load_dataset", "write_dataset", "write_rows"]

_LEG = ("route_name", "departure_stop", "arrival_stop")
_SPLIT_NAMES = ("train", "test", "validation")
_BATCH_ROWS = 64
_HUB = "hf://datasets/"


@dataclass(frozen=True, slots=True)
class MapData:
    """A loaded data set. ``networks``: ``Problem.network_id`` -> the flat network that rewards are computed on."""

    problems: list[Problem]
    networks: dict[str, MetroData]
    root: Path
    skipped: tuple[str, ...] = ()
    """What was wrong with each row left out (``on_bad_row="skip"``), in order."""

    def topology(self, network_id: str) -> Network:
        """The true network of a map, with loops and branches: stored with generated maps, else reconstructed.

        Raises DataError for a broken geometry file, KeyError for an unknown map.
        """
        return read_network(self.root, network_id, self.networks[network_id])


def load_dataset(
    folder: str | Path,
    split: str = "train",
    *,
    planning_question: Literal["short", "long"] = "short",
    on_bad_row: Literal["raise", "skip"] = "raise",
    max_image_pixels: int = 300_000_000,
) -> MapData:
    """Loads one split of a data folder or repository; rows without splits are taken whole, whatever ``split`` says.

    ``planning_question`` chooses between ``question_short`` and ``question_long`` of ReasonMap. The largest
    released map has 278 million pixels; larger pictures than ``max_image_pixels`` are refused.
    Raises DataError that names file, row and field; with ``on_bad_row="skip"`` a bad row is left out and
    described in ``MapData.skipped`` instead, but a broken file, or no good row at all, still raises.
    """
    if on_bad_row not in ("raise", "skip"):
        raise ValueError(f"on_bad_row must be 'raise' or 'skip', got {on_bad_row!r}")
    if planning_question not in ("short", "long"):
        raise ValueError(f"planning_question must be 'short' or 'long', got {planning_question!r}")
    root = data_root(folder).absolute()
    assets = Assets(root, _store(root), max_image_pixels)
    problems: list[Problem] = []
    skipped: list[str] = []
    uids: set[str] = set()
    for number, (source, index, row) in enumerate(_rows(root, split)):
        try:
            reader = _Row(row, f"{source}, row {index}")
            problem = _problem(reader, assets, planning_question, f"{split}-{number:06d}")
            if problem.uid in uids:
                raise DataError(f"{reader.where}: field 'uid' repeats {problem.uid!r}; make it unique")
        except DataError as error:
            if on_bad_row == "raise":
                raise
            skipped.append(str(error))
        else:
            uids.add(problem.uid)
            problems.append(problem)
    if not problems:
        reason = f"all {len(skipped)} rows are bad; the first: {skipped[0]}" if skipped else "it has no rows"
        raise DataError(f"{root}: nothing to load: {reason}")
    return MapData(problems, assets.networks, root, tuple(skipped))


def data_root(source: str | Path) -> Path:
    """The data folder that ``source`` is, or the hub's cached copy of the repository that it names.

    Raises DataError for a repository that cannot be fetched.
    """
    if not str(source).startswith(_HUB):
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name = str(source)
    try:
        return Path(snapshot_download(name.removeprefix(_HUB), repo_type="dataset"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise DataError(
            f"{name}: cannot be fetched ({error}); check the name and the network, or download it"
        ) from error


def _store(root: Path) -> Path:
    """The folder that holds a data folder's files: itself, but in the hub's cache, where they are links beside it."""
    cached = root.parent.name == "snapshots" and (root.parents[1] / "blobs").is_dir()
    return root.parents[1] if cached else root


def _rows(root: Path, split: str) -> Iterator[tuple[Path, int, dict[str, Any]]]:
    """(source, row number, row) for each row; a few rows in memory at a time, for pictures may be inside."""
    for source, table in _tables(root, split):
        index = 0
        for batch in table.to_batches(max_chunksize=_BATCH_ROWS):
            for row in batch.to_pylist():
                yield source, index, row
                index += 1


def _tables(root: Path, split: str) -> Iterator[tuple[Path, pa.Table]]:
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give the folder that holds maps/, stations/ and {DATA_FOLDER}")
    for data in (root / DATA_FOLDER, root):
        if (data / "dataset_dict.json").is_file():
            splits = _saved_json(data / "dataset_dict.json").get("splits", [])
            if split not in splits:
                raise DataError(f"{data}: no split {split!r}; it has {', '.join(map(str, splits)) or 'none'}")
            yield _arrow_table(data / split)
            return
        if (data / "state.json").is_file():
            yield _arrow_table(data)
            return
    for data in (root / "data", root):
        files = sorted(data.glob("*.parquet"))
        named = any(path.name.startswith((split, *_SPLIT_NAMES)) for path in files)
        chosen = [path for path in files if path.name.startswith(split) or not named]
        if files and not chosen:
            raise DataError(
                f"{data}: no parquet file for split {split!r} among {', '.join(path.name for path in files)}; begin "
                "the name of one with it, or choose another split"
            )
        if chosen:
            for path in chosen:
                try:
                    table = pq.read_table(path, memory_map=True)
                except (pa.ArrowException, OSError) as error:
                    raise DataError(f"{path}: not a readable parquet file ({error}); fetch it again") from error
                yield path, table
            return
    raise DataError(
        f"{root}: no data found; expected {DATA_FOLDER} as datasets.save_to_disk writes it, or parquet files "
        "(docs/data.md)"
    )


def _arrow_table(data: Path) -> tuple[Path, pa.Table]:
    state = _saved_json(data / "state.json")
    if state.get("_indices_data_files"):
        raise DataError(f"{data}: saved with an index mapping; call flatten_indices() before save_to_disk")
    files = state.get("_data_files")
    if not isinstance(files, list) or not all(isinstance(f, dict) and "filename" in f for f in files):
        raise DataError(f"{data / 'state.json'}: field '_data_files' does not list files; save the data set again")
    tables = []
    for entry in files:
        name = str(entry["filename"])
        if Path(name).name != name:
            raise DataError(f"{data / 'state.json'}: {name!r} is no file of this folder; save the data set again")
        path = data / name
        try:
            with pa.memory_map(str(path)) as source:
                tables.append(pa.ipc.open_stream(source).read_all())
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a readable arrow file ({error}); fetch or save it again") from error
    if not tables:
        raise DataError(f"{data}: the data set has no rows")
    return data, pa.concat_tables(tables, promote_options="permissive")


def _saved_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON ({error}); save the data set again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(content).__name__}; save the data set again")
    return content


class _Row:
    """One row; every refusal names the file, the row, the field and the value."""

    def __init__(self, row: Mapping[str, Any], where: str) -> None:
        self.row = row
        self.where = where

    def __contains__(self, name: str) -> bool:
        return self.row.get(name) is not None

    def value(self, name: str) -> Any:
        if name not in self.row:
            raise DataError(f"{self.where}: field {name!r} is missing; the row has {', '.join(self.row)}")
        if self.row[name] is None:
            raise DataError(f"{self.where}: field {name!r} is empty")
        return self.row[name]

    def text(self, name: str) -> str:
        value = self.value(name)
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{self.where}: field {name!r} must be text, got {value!r}")
        return value

    def optional_text(self, name: str) -> str:
        value = self.row.get(name)
        if value is not None and not isinstance(value, str):
            raise DataError(f"{self.where}: field {name!r} must be text, got {value!r}")
        return value or ""

    def choice(self, name: str, known: tuple[str, ...]) -> str:
        value = self.text(name)
        if value not in known:
            raise DataError(f"{self.where}: field {name!r} is {value!r}; it must be one of {', '.join(known)}")
        return value

    def integer(self, name: str, allowed: range) -> int:
        value = self.value(name)
        if isinstance(value, bool) or not isinstance(value, int):
            # Such as a column of pandas, which floats become where a row of it is empty.
            stored = f"{value!r}; store the column as integers"
            raise DataError(f"{self.where}: field {name!r} must be a whole number, got {stored}")
        if value not in allowed:
            raise DataError(f"{self.where}: field {name!r} is {value}; it must be from {allowed[0]} to {allowed[-1]}")
        return value


def _problem(row: _Row, assets: Assets, planning_question: str, default_uid: str) -> Problem:
    released_planning = "question_short" in row
    kind = "planning" if released_planning else row.choice("type", KINDS)
    question = row.text(f"question_{planning_question}" if released_planning else "question")
    network_id = f"{row.text('country')}/{row.text('city')}"
    planning = kind == "planning"
    return Problem(
        uid=row.optional_text("uid") or default_uid,
        image=assets.image(row.value("figure"), f"{row.where}: field 'figure'"),
        question=question,
        kind=kind,
        answer=-1 if planning else row.integer("answer", ANSWERS[kind]),
        station_1=composed(row.text("station_1") if planning else row.optional_text("station_1")),
        station_2=composed(row.text("station_2") if planning else row.optional_text("station_2")),
        network_id=assets.network(network_id, row.value("json"), f"{row.where}: field 'json'"),
        map_difficulty=row.choice("difficulty_city", LEVELS),
        transfers_required=row.integer("question_transfer_count", TRANSFERS) if planning else 0,
        question_difficulty=row.choice("difficulty_question", LEVELS) if "difficulty_question" in row else None,
        fine_grained_answer=_details(row, planning, released_planning),
    )


def _details(row: _Row, planning: bool, released_planning: bool) -> Any:
    """The steps to the answer; ReasonMap's ``routes`` (a dictionary of plans) become the list of its plans."""
    name = "routes" if released_planning else "fine_grained_answer"
    value = row.row.get(name)
    if isinstance(value, str) and value:
        try:
            value = composed(json.loads(value))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{row.where}: field {name!r} is not JSON ({error}): {value[:80]!r}") from error
    if released_planning and isinstance(value, dict):
        value = [composed(plan) for plan in value.values() if plan]
    if planning and value and not (isinstance(value, list) and all(map(_is_plan, value))):
        # Reports and controls read the routes when a run is over: they must not fail then.
        want = f"routes, each a list of legs with {', '.join(_LEG)}"
        raise DataError(f"{row.where}: field {name!r} must hold {want}, got {value!r:.80}")
    return None if value == "" else value


def _is_plan(plan: Any) -> bool:
    return bool(plan) and isinstance(plan, list) and all(isinstance(leg, dict) and _is_leg(leg) for leg in plan)


def _is_leg(leg: Mapping[str, Any]) -> bool:
    return all(isinstance(leg.get(name), str) for name in _LEG)
