"""Generated rows in the forms of ReasonMap and ReasonMap-Plus: parquet files, as their repositories hold them.

ReasonMap: planning questions, short and long, with the picture as base64 text and the network as a dictionary inside
each row. ReasonMap-Plus: the other five kinds, with paths. Both have ``uid`` besides; Plus has ``fine_grained_answer``.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from rewardmap.transit.wording import planning_text

Form = Literal["ReasonMap-Train", "ReasonMap", "ReasonMap-Plus"]
FORMS: tuple[Form, ...] = get_args(Form)

_SHARED = ("uid", "country", "city", "station_1", "station_2")
_ABOUT = ("difficulty_city", "city_line_count", "city_transfer_count")
PLUS_COLUMNS = (*_SHARED, "figure", "json", "question", "answer", "type", *_ABOUT, "fine_grained_answer")
REASONMAP_COLUMNS = (
    *_SHARED,
    "figure",
    "json",
    "question_short",
    "question_long",
    "routes",
    "difficulty_question",
    *_ABOUT,
    "question_transfer_count",
)


def write_parquet(folder: Path, rows: Sequence[Mapping[str, Any]], split: str, form: Form) -> int:
    """Writes ``data/<split>-00000-of-00001.parquet`` and returns its number of rows.

    ``rows``: of ReasonMap-Train, those of one map together, their pictures and stations files already in ``folder``.
    A row group is one map, so that its picture is stored once. Raises ValueError where no row fits the form.
    """
    planning = form == "ReasonMap"
    chosen = [row for row in rows if (row["type"] == "planning") == planning]
    if not chosen:
        raise ValueError(f"split {split!r} has no questions for {form}; make more maps")
    made = [_reasonmap_row(row) if planning else {name: row[name] for name in PLUS_COLUMNS} for row in chosen]
    if planning:
        networks = {row["json"]: json.loads((folder / row["json"]).read_text(encoding="utf-8")) for row in chosen}
        for row in made:
            row["json"] = networks[row["json"]]
    target = folder / "data" / f"{split}-00000-of-00001.parquet"
    target.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.Table.from_pylist(made).schema  # the fields of all maps' lines, and of all plans
    with pq.ParquetWriter(target, schema, compression="zstd", dictionary_pagesize_limit=1 << 30) as writer:
        for figure, group in groupby(made, key=lambda row: str(row["figure"])):
            shown = base64.b64encode((folder / figure).read_bytes()).decode() if planning else figure
            writer.write_table(pa.Table.from_pylist([{**row, "figure": shown} for row in group], schema=schema))
    return len(made)


def _reasonmap_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """The planning row with both questions; half of the long ones ask for counts of via stops, half for lists."""
    detail: Literal["count", "list"] = "count" if zlib.crc32(row["uid"].encode()) % 2 else "list"
    plans = json.loads(row["fine_grained_answer"])
    made = {
        **row,
        "question_short": row["question"],
        "question_long": planning_text(row["station_1"], row["station_2"], detail),
        "routes": {f"plan_{number}": plan for number, plan in enumerate(plans, start=1)},
    }
    return {name: made[name] for name in REASONMAP_COLUMNS}
