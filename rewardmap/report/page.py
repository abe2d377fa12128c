"""The report as one HTML page: tables, curves, and answers with their routes drawn over the maps.

The page holds everything it shows: no script, and a policy that forbids every request. Whatever a model or a data set
wrote is escaped and isolated from the text around it.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import ExifTags

from rewardmap.evaluate import GROUPS, Evaluation, Record, TextPrior
from rewardmap.evaluate.reading import form_of, stated_legs, without_thinking
from rewardmap.files import as_rgb, open_picture, write_text
from rewardmap.report.parts import HEAD as PARTS_HEAD
from rewardmap.report.parts import NOTE, parts_rows
from rewardmap.report.routes import Drawn, closest, draw_legs, gold_legs, named_stops
from rewardmap.report.samples import gold_text, in_turn, short_question, shortened
from rewardmap.report.table import HEAD, closing_rows, footer_lines
from rewardmap.rewards import Networks
from rewardmap.transit.graph import Network
from rewardmap.types import Problem

LARGEST_PICTURE = 1_100
"""Pixels of a map's longer side in the page."""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
STYLE = Path(__file__).with_name("page.css")
_UNSHOWABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def write_page(
    path: Path,
    *,
    title: str,
    report: Mapping[str, Any],
    after: Evaluation,
    before: Evaluation | None = None,
    text_only: Evaluation | None = None,
    prior: TextPrior | None = None,
    problems: Sequence[Problem],
    topologies: Networks,
    pictures: Mapping[str, Path],
    samples: int,
) -> None:
    """Write the page.

    Args:
        report: what ``write_report`` returned for the same evaluations.
        problems: those that were answered; records find theirs by uid.
        topologies: true networks; a route is drawn where they know the picture's coordinates.
        pictures: caption -> PNG file, shown below the table in this order.
        samples: answers shown, as many right as wrong ones where there are enough of both.

    Raises:
        OSError: a picture that cannot be read, or the page that cannot be written; its path is named.
    """
    by_uid = {problem.uid: problem for problem in problems}
    earlier = {record.uid: record for record in before.records} if before else {}
    chosen = right_and_wrong(after, samples)
    parts = [
        f"<h1>{_text(title)}</h1>",
        f"<p class=facts>{_text(footer_lines(report)[0])}</p>",
        "<h2>Held-out accuracy</h2>",
        _table(HEAD, closing_rows(after, before, text_only, prior), "closing"),
        *(f"<p class=note>{_text(line)}</p>" for line in footer_lines(report)[1:]),
        *(
            f"<h2>{_text(caption)}</h2>\n<img class=curves alt='{_text(caption)}' src='{_data_uri(file.read_bytes())}'>"
            for caption, file in pictures.items()
        ),
        *(_samples(chosen, by_uid, earlier, topologies) if chosen else ()),
        "<h2>In parts</h2>",
        *_parts(after),
    ]
    write_text(path, _page(title, parts))


def right_and_wrong(evaluation: Evaluation, count: int, seed: int = 0) -> list[Record]:
    """At most ``count`` records, right and wrong ones in turn from each kind, random within; sorted by kind."""
    queues = [(group, right) for group in GROUPS for right in (True, False)]
    return in_turn(evaluation, count, seed, queues, lambda record: (record.group, record.correct))


def _page(title: str, parts: Sequence[str]) -> str:
    body = "\n".join(parts)
    return (
        "<!doctype html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n"
        f'<meta http-equiv=Content-Security-Policy content="{POLICY}">\n'
        "<meta name=viewport content='width=device-width'>\n"
        f"<title>{_text(title)}</title>\n<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _text(text: str) -> str:
    """Escaped, on one level with the page's own text."""
    return escape(_UNSHOWABLE.sub("\ufffd", text), quote=True)


def _foreign(text: str) -> str:
    """Escaped text that a model or a data set wrote; its writing direction ends with it."""
    return f"<bdi>{_text(text)}</bdi>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str) -> str:
    cells = "".join(f"<th>{_text(cell)}</th>" for cell in head)
    lines = [f"<table class={kind}>", f"<thead><tr>{cells}</tr></thead>", "<tbody>"]
    for row in rows:
        first, *rest = row
        lines.append(f"<tr><th>{_foreign(first)}</th>{''.join(f'<td>{_number(cell)}</td>' for cell in rest)}</tr>")
    return "\n".join([*lines, "</tbody></table>"])


def _number(cell: str) -> str:
    """A cell with its interval in smaller print."""
    value, bracket, interval = cell.partition(" [")
    return f"{_text(value)} <small>[{_text(interval)}</small>" if bracket else _text(value)


def _parts(evaluation: Evaluation) -> Iterator[str]:
    for cut, rows, left_out in parts_rows(evaluation):
        yield _table((cut, *PARTS_HEAD), rows, "parts")
        if left_out:
            yield f"<p class=note>{_text(left_out)}</p>"
    yield f"<p class=note>{_text(NOTE)}</p>"


def _samples(
    chosen: Sequence[Record],
    problems: Mapping[str, Problem],
    earlier: Mapping[str, Record],
    topologies: Networks,
) -> Iterator[str]:
    yield "<h2>Right and wrong answers</h2>"
    yield (
        "<p class=note>Drawn at random, right and wrong ones in turn from each kind: their share here is not the "
        "accuracy. <span class='key true'></span> a true route &ensp; <span class='key right'></span> the answered "
        "route, right &ensp; <span class='key wrong'></span> wrong &ensp; <span class='key straight'></span> dashed: "
        "no train rides this leg. Rings mark the stops that the question names.</p>"
    )
    yield "<section class=cards>"
    for record in chosen:
        yield _card(record, problems[record.uid], earlier.get(record.uid), topologies.get(record.network_id))
    yield "</section>"


def _card(record: Record, problem: Problem, before: Record | None, network: Any) -> str:
    legs = stated_legs(without_thinking(record.response), form_of(problem)) if problem.kind == "planning" else []
    figure, notes = _figure(problem, record, network if isinstance(network, Network) else None, legs)
    mark = "right" if record.correct else "wrong"
    answers = [(f"answer: {mark}", mark, record.response or "(nothing)")]
    if before is not None and before.response != record.response:
        answers.append(("before the training", "right" if before.correct else "wrong", before.response or "(nothing)"))
    lines = [
        f"<article class='card {mark}'>",
        figure,
        "<div>",
        f"<p class=kind>{_text(record.group)} · {_text(record.map_difficulty)} map · {_foreign(record.uid)}</p>",
        f"<p class=question>{_foreign(short_question(problem.question))}</p>",
        f"<h3>gold</h3><pre>{_foreign(gold_text(problem))}</pre>",
        *(f"<h3 class={kind}>{name}</h3><pre>{_foreign(shortened(text))}</pre>" for name, kind, text in answers),
        *(f"<p class=note>{note}</p>" for note in notes),
        "</div>",
        "</article>",
    ]
    return "\n".join(lines)


def _figure(problem: Problem, record: Record, network: Network | None, legs: Sequence[Any]) -> tuple[str, list[str]]:
    """The map with rings and routes over it, and what could not be drawn."""
    picture, (width, height) = _picture(problem.image)
    shapes: list[str] = []
    notes: list[str] = []
    unit = max(width, height) / 100
    if network is not None and network.positions:
        radius = 0.45 * closest(network)
        true, _ = draw_legs(network, gold_legs(problem))
        answered, unknown = draw_legs(network, legs)
        shapes += [_line(leg, "true", 3.4 * unit) for leg in true]
        shapes += [_line(leg, "right" if record.correct else "wrong", 1.2 * unit) for leg in answered]
        shapes += [_arrow(leg, "right" if record.correct else "wrong", unit) for leg in answered]
        shapes += [
            f"<circle class=ring cx={x:.1f} cy={y:.1f} r={radius:.1f} stroke-width={0.2 * radius:.2f} />"
            for x, y in named_stops(network, problem)
        ]
        if unknown:
            notes.append("not on this map: " + ", ".join(_foreign(name[:80]) for name in unknown[:6]))
    elif problem.kind == "planning":
        notes.append("no coordinates are stored for this map, so its routes are not drawn")
    faded = " class=faded" if problem.kind == "planning" and shapes else ""
    return (
        f"<svg class=map viewBox='0 0 {width} {height}' role=img aria-label='map'>"
        f"<image{faded} href='{picture}' width={width} height={height} />{''.join(shapes)}</svg>",
        notes,
    )


def _line(leg: Drawn, kind: str, width: float) -> str:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in leg.points)
    dash = "" if leg.ridable else f" stroke-dasharray='{1.6 * width:.2f} {1.6 * width:.2f}'"
    return f"<polyline class={kind} points='{points}' stroke-width={width:.2f}{dash} />"


def _arrow(leg: Drawn, kind: str, unit: float) -> str:
    """A head at the end of a leg, pointing where its last piece of track goes."""
    (x, y) = leg.points[-1]
    back = next((point for point in reversed(leg.points) if math.dist(point, (x, y)) > unit), None)
    if back is None:
        return ""
    angle = math.degrees(math.atan2(y - back[1], x - back[0]))
    size = 2.6 * unit
    head = f"{-size:.2f},{-0.7 * size:.2f} 0,0 {-size:.2f},{0.7 * size:.2f}"
    return f"<polygon class={kind} points='{head}' transform='translate({x:.1f} {y:.1f}) rotate({angle:.1f})' />"


def _picture(source: str | bytes) -> tuple[str, tuple[int, int]]:
    """A map as a data URI, made smaller where it is large, and its size in its own pixels."""
    content = source if isinstance(source, bytes) else Path(source).read_bytes()
    with open_picture(content) as opened:
        plain = opened.getexif().get(ExifTags.Base.Orientation, 1) == 1 and not opened.has_transparency_data
        if plain and max(opened.size) <= LARGEST_PICTURE and opened.format in ("PNG", "JPEG"):
            return _data_uri(content, f"image/{opened.format.lower()}"), opened.size
        shrunk = as_rgb(opened)
    size = shrunk.size
    shrunk.thumbnail((LARGEST_PICTURE, LARGEST_PICTURE))
    buffer = io.BytesIO()
    shrunk.save(buffer, "JPEG", quality=85)
    return _data_uri(buffer.getvalue(), "image/jpeg"), size


def _data_uri(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
