"""Scores a file of answers: JSON lines in, the same lines with their scores out, and a summary."""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rewardmap.files import replacing
from rewardmap.rewards.rubric import Mode, RewardBatch, Rubric
from rewardmap.rewards.score import FAILURES
from rewardmap.rewards.scorer import AnyNetwork
from rewardmap.rewards.stations import Stations
from rewardmap.transit.assets import composed, parse_metro_data
from rewardmap.transit.graph import Network
from rewardmap.transit.topology import read_network
from rewardmap.types import ANSWERS, KINDS, LEVELS, TRANSFERS, DataError, MetroData, Problem

ADDED = ("score", "correct", "detail", "weight", "format_valid", "failure")
"""Fields that each row gains."""
_CHUNK = 8192


@dataclass
class KindTotals:
    """Sums over the rows of one kind."""

    rows: int = 0
    correct: int = 0
    format_failures: int = 0
    score: float = 0.0


@dataclass
class ScoreSummary:
    """What a scored file holds."""

    mode: str
    kinds: dict[str, KindTotals] = field(default_factory=dict)
    """By kind, in the order of ``types.KINDS``; kinds without rows are left out."""
    groups: int = 0
    """Groups of two or more rows that share a ``group`` value."""
    zero_variance_groups: int = 0
    """Groups whose scores are all equal: they teach nothing."""
    seconds: float = 0.0

    @property
    def rows(self) -> int:
        """Rows scored."""
        return sum(totals.rows for totals in self.kinds.values())

    def table(self) -> str:
        """The summary as text, one line per kind."""
        lines = [f"{'kind':<10} {'rows':>8} {'correct':>8} {'bad format':>10} {'mean score':>10}"]
        for kind, totals in self.kinds.items():
            lines.append(
                f"{kind:<10} {totals.rows:>8} {totals.correct / totals.rows:>8.1%} "
                f"{totals.format_failures / totals.rows:>10.1%} {totals.score / totals.rows:>10.3f}"
            )
        if self.groups:
            lines.append(f"groups with equal scores: {self.zero_variance_groups} of {self.groups}")
        rate = self.rows / self.seconds if self.seconds else 0.0
        lines.append(f"{self.rows} rows in {self.seconds:.2f} s ({rate:,.0f} rows/s), mode {self.mode}")
        return "\n".join(lines)


def score_file(
    in_path: str | Path,
    out_path: str | Path | None = None,
    mode: Mode = "reference",
    stations_root: str | Path | None = None,
) -> ScoreSummary:
    """Score every row of a JSON-lines file; rows keep their order and fields and gain ``ADDED``.

    A row needs ``type``, ``answer``, ``difficulty_city``, ``json`` (path of its stations file) and
    ``response``, and for planning ``station_1``, ``station_2`` and ``question_transfer_count``. A relative
    ``json`` is looked for under ``stations_root`` if given, then beside the input file, then in the current
    folder. The output is complete or absent: it is moved into place after the last row. Raises DataError
    naming file, row (from 1) and field of the first bad row, or where there is no row at all, or no file can be put
    at ``out_path``.
    """
    in_path = Path(in_path)
    if out_path is not None and os.path.exists(out_path) and not os.path.isfile(out_path):
        raise DataError(f"{out_path}: not a file, which the scored rows need; name one, such as scored.jsonl")
    began = time.perf_counter()
    rubric = Rubric(mode=mode)
    stations = _Stations(in_path, Path(stations_root) if stations_root is not None else None, exact=mode == "graph")
    totals: dict[str, KindTotals] = defaultdict(KindTotals)
    groups: dict[Any, tuple[int, float, float]] = {}
    with nullcontext() if out_path is None else replacing(Path(out_path)) as partial:
        with nullcontext() if partial is None else partial.open("wb") as out:
            for rows, problems in _chunks(in_path, stations):
                batch = rubric.score(problems, [composed(row["response"]) for row in rows], stations.networks)
                _add(rows, batch, totals, groups)
                if out is not None:
                    out.writelines(map(_line, rows, problems))
        if not totals:
            raise DataError(f"{in_path}: no rows, so that nothing was scored; give one JSON object a line")
    shared = [(low, high) for count, low, high in groups.values() if count > 1]
    return ScoreSummary(
        mode=mode,
        kinds={kind: totals[kind] for kind in KINDS if kind in totals},
        groups=len(shared),
        zero_variance_groups=sum(low == high for low, high in shared),
        seconds=time.perf_counter() - began,
    )


def _line(row: dict[str, Any], problem: Problem) -> bytes:
    """UTF-8; a lone surrogate, which has none, makes the row all ASCII escapes."""
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(row).encode() + b"\n"
    except RecursionError as error:  # a few levels less are written than read
        raise DataError(f"{problem.uid}: nested too deeply ({error})") from error


def _add(
    rows: list[dict[str, Any]],
    batch: RewardBatch,
    totals: dict[str, KindTotals],
    groups: dict[Any, tuple[int, float, float]],
) -> None:
    """Write the scores into the rows and the totals."""
    for i, row in enumerate(rows):
        score = float(batch.score[i])
        values = (batch.correct[i], batch.detail[i], batch.weight[i], batch.format_valid[i])
        row.update(zip(ADDED, (score, *(value.item() for value in values), FAILURES[batch.failure[i]]), strict=True))
        kind = totals[row["type"]]
        kind.rows += 1
        kind.correct += row["correct"]
        kind.format_failures += not row["format_valid"]
        kind.score += score
        if row.get("group") is not None:
            key = json.dumps(row["group"], sort_keys=True)
            count, low, high = groups.get(key, (0, score, score))
            groups[key] = (count + 1, min(low, score), max(high, score))


def _chunks(in_path: Path, stations: _Stations) -> Iterator[tuple[list[dict[str, Any]], list[Problem]]]:
    rows: list[dict[str, Any]] = []
    problems: list[Problem] = []
    try:
        file = in_path.open("rb")
    except OSError as error:
        raise DataError(f"{in_path}: cannot be read ({error.strerror}); give a file of JSON lines") from error
    with file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{in_path}, row {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not a line of UTF-8 JSON ({error})") from error
            if not isinstance(row, dict):
                raise DataError(f"{where}: {type(row).__name__}, not an object with fields")
            problems.append(_problem(row, where, stations))
            rows.append(row)
            if len(rows) == _CHUNK:
                yield rows, problems
                rows, problems = [], []
    if rows:
        yield rows, problems


def _problem(row: dict[str, Any], where: str, stations: _Stations) -> Problem:
    kind = _choice(row, "type", KINDS, where)
    planning = kind == "planning"
    network_id = stations.read(_text(row, "json", where), where)
    ends = []
    for name in ("station_1", "station_2"):
        station = _text(row, name, where) if planning else row.get(name)
        ends.append(composed(station) if isinstance(station, str) else "")
    if planning and (wrong := stations.names[network_id].complaint(*ends)):
        raise DataError(f"{where}, {wrong}")
    _text(row, "response", where)
    return Problem(
        uid=where,
        image=b"",
        question="",
        kind=kind,
        answer=_integer(row, "answer", where, ANSWERS.get(kind)),
        station_1=ends[0],
        station_2=ends[1],
        network_id=network_id,
        map_difficulty=_choice(row, "difficulty_city", LEVELS, where),
        transfers_required=_integer(row, "question_transfer_count", where, TRANSFERS) if planning else 0,
        fine_grained_answer=_steps(row, where),
    )


def _steps(row: dict[str, Any], where: str) -> Any:
    """The steps to the answer; data sets keep them as JSON text. Other text is none."""
    fine = row.get("fine_grained_answer", row.get("fine-grained answer"))
    if not isinstance(fine, str):
        return fine
    try:
        return json.loads(fine)
    except ValueError:
        return None
    except RecursionError as error:
        raise DataError(f"{where}, field 'fine_grained_answer': nested too deeply ({error})") from error


def _field(row: dict[str, Any], name: str, where: str) -> Any:
    if name not in row:
        raise DataError(f"{where}, field {name!r}: missing; the row has {', '.join(row) or 'no fields'}")
    return row[name]


def _text(row: dict[str, Any], name: str, where: str) -> str:
    value = _field(row, name, where)
    if not isinstance(value, str):
        raise DataError(f"{where}, field {name!r}: {value!r} is not text")
    return value


def _choice(row: dict[str, Any], name: str, known: tuple[str, ...], where: str) -> str:
    value = _text(row, name, where)
    if value not in known:
        raise DataError(f"{where}, field {name!r}: {value!r} is not one of {', '.join(known)}")
    return value


def _integer(row: dict[str, Any], name: str, where: str, allowed: range | None = None) -> int:
    value = _field(row, name, where)
    if isinstance(value, bool) or not isinstance(value, int) or (allowed is not None and value not in allowed):
        kind = "an integer" if allowed is None else f"an integer from {allowed[0]} to {allowed[-1]}"
        raise DataError(f"{where}, field {name!r}: {value!r:.80} is not {kind}")
    return value


class _Stations:
    """The stations files that rows name, each read once."""

    def __init__(self, in_path: Path, root: Path | None, exact: bool) -> None:
        self._folders = [folder for folder in (root, in_path.parent, Path()) if folder is not None]
        self._exact = exact
        self.networks: dict[str, AnyNetwork] = {}
        """As published or, if ``exact``, with branches and rings, which training takes for ``graph`` too."""
        self.names: dict[str, Stations] = {}

    def read(self, path: str, where: str) -> str:
        """The network's id, which is the path as the row gives it."""
        if path not in self.networks:
            # Not Path.is_file, which raises for a name that is too long.
            found = next((folder / path for folder in self._folders if os.path.isfile(folder / path)), None)
            if found is None:
                looked = ", ".join(dict.fromkeys(str(folder.resolve()) for folder in self._folders))
                remedy = "name its folder (--stations, stations_root)"
                raise DataError(f"{where}, field 'json': no file {path!r} under {looked}; {remedy}")
            name = f"{where}, field 'json': {found}"
            try:
                metro = parse_metro_data(found.read_bytes(), name)
            except OSError as error:
                raise DataError(f"{name} cannot be read ({error.strerror})") from error
            self.networks[path] = _exact(found, metro, where) if self._exact else metro
            self.names[path] = Stations(path, self.networks[path], graph=self._exact)
        return path


def _exact(path: Path, metro: MetroData, where: str) -> Network:
    path = path.absolute()
    try:
        return read_network(path.parents[min(2, len(path.parents) - 1)], f"{path.parent.name}/{path.stem}", metro)
    except DataError as error:
        raise DataError(f"{where}, field 'json': {error}") from error
