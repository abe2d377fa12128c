"""Sample answers beside their maps, as contact sheets."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rewardmap.evaluate import GROUPS, Evaluation, Record
from rewardmap.files import as_rgb, open_picture, replacing
from rewardmap.transit.fonts import map_font, wrapped
from rewardmap.types import Problem

Queue = TypeVar("Queue", bound=Hashable)
INK, MUTED, PAPER, CARD, RULE = "#1c2430", "#6b7482", "#eceff3", "#ffffff", "#d9dee5"
RIGHT, WRONG = "#12804a", "#c8252c"
COLUMNS, ROWS = 2, 4
WIDTH, MAP, PAD, GAP = 800, 272, 20, 18
SMALL, BODY = 18, 21
INDENT = 104
MAX_LINES = 5
LONGEST_ANSWER = 3_000
"""Characters of an answer that are shown or laid out."""
CJK_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Source Han Sans SC",
    "WenQuanYi Zen Hei",
    "PingFang SC",
    "SimHei",
)


def draw_samples(
    after: Evaluation,
    problems: Sequence[Problem],
    out_dir: Path,
    n: int,
    before: Evaluation | None = None,
    seed: int = 0,
) -> list[Path]:
    """Draw ``n`` answers, drawn at random and evenly over the kinds, with those of before the training.

    Args:
        problems: those that ``after`` answered; records find theirs by uid.

    Returns:
        The PNG sheets written, ``samples-1.png`` and so on, eight answers each.

    Raises:
        OSError: a map that cannot be read, or a sheet that cannot be written; its path is named.
    """
    by_uid = {problem.uid: problem for problem in problems}
    earlier = {record.uid: record for record in before.records} if before else {}
    chosen = choose(after, n, seed)
    paths: list[Path] = []
    for start in range(0, len(chosen), COLUMNS * ROWS):
        records = chosen[start : start + COLUMNS * ROWS]
        cards = [_Card(by_uid[record.uid], record, earlier.get(record.uid)) for record in records]
        path = out_dir / f"samples-{len(paths) + 1}.png"
        with replacing(path) as temporary:
            _sheet(cards).save(temporary)
        paths.append(path)
    return paths


def choose(evaluation: Evaluation, n: int, seed: int) -> list[Record]:
    """At most ``n`` records, in turn from each kind (planning: direct, with transfer), random within one."""
    return in_turn(evaluation, n, seed, GROUPS, lambda record: record.group)


def in_turn(
    evaluation: Evaluation, n: int, seed: int, queues: Sequence[Queue], queue_of: Callable[[Record], Queue]
) -> list[Record]:
    """At most ``n`` records, one of each queue in turn, random within a queue; sorted by queue."""
    waiting: dict[Queue, list[Record]] = {queue: [] for queue in queues}
    for index in np.random.default_rng(seed).permutation(len(evaluation.records)):
        record = evaluation.records[index]
        waiting[queue_of(record)].append(record)
    turns = [record for turn in zip_longest(*waiting.values()) for record in turn if record is not None]
    return sorted(turns[:n], key=lambda record: queues.index(queue_of(record)))


@dataclass(frozen=True, slots=True)
class _Line:
    """One line of a card's text; ``label`` stands in the margin of an indented one."""

    text: str
    colour: str
    size: int
    indent: int = 0
    label: str = ""

    @property
    def leading(self) -> int:
        return round(self.size * 1.42)


class _Card:
    """One map, its question, the right answer and the model's."""

    def __init__(self, problem: Problem, after: Record, before: Record | None) -> None:
        self._image = problem.image
        self._lines = [_Line(f"{after.group}  ·  {after.map_difficulty} map", MUTED, SMALL)]
        self._lines += _wrap(short_question(problem.question), INK, BODY)
        self._lines += [_Line("", INK, 6), *_wrap(gold_text(problem), MUTED, SMALL, "gold")]
        for name, record in (("before", before), ("after", after)):
            if record is not None:
                mark, colour = ("✓", RIGHT) if record.correct else ("✗", WRONG)
                self._lines += _wrap(short_answer(record.response), colour, SMALL, f"{name} {mark}")

    @property
    def height(self) -> int:
        return 2 * PAD + max(MAP, sum(line.leading for line in self._lines))

    def draw(self, sheet: Image.Image, x: int, y: int, height: int) -> None:
        pen = ImageDraw.Draw(sheet)
        pen.rounded_rectangle((x, y, x + WIDTH, y + height), 10, fill=CARD, outline=RULE)
        picture = _fit(self._image)
        left, top = x + PAD + (MAP - picture.width) // 2, y + PAD
        sheet.paste(picture, (left, top))
        pen.rectangle((left - 1, top - 1, left + picture.width, top + picture.height), outline=RULE)
        column, at = x + MAP + 2 * PAD, y + PAD - 3
        for line in self._lines:
            pen.text((column, at), line.label, line.colour, _font(line.size, bold=True))
            pen.text((column + line.indent, at), line.text, line.colour, _font(line.size, cjk=_is_cjk(line.text)))
            at += line.leading


def short_question(question: str) -> str:
    """The question without the instructions around it."""
    asked = question.split("According to the subway map, ")[-1]
    head, mark, choices = asked.partition("?")
    offered = "   ".join(re.findall(r"[ABCD]\) *-?\d+", choices))
    return f"{head[:1].upper()}{head[1:]}{mark}" + (f"\n{offered}" if offered else "")


def short_answer(response: str) -> str:
    """The answer with each complete leg on one line."""
    leg = r"Route Name: *(.*)\n\s*Departure Stop: *(.*)\n\s*Arrival Stop: *(.*)"
    text = re.sub(r"\s*\n--+\s*\n", "\n", re.sub(leg, r"\1: \2 → \3", shortened(response.strip())))
    return text or "(nothing)"


def shortened(text: str) -> str:
    """The text, or of one longer than ``LONGEST_ANSWER`` the beginning and the end."""
    if len(text) <= LONGEST_ANSWER:
        return text
    half = LONGEST_ANSWER // 2
    return f"{text[:half]}\n… {len(text) - 2 * half} characters left out …\n{text[-half:]}"


def gold_text(problem: Problem) -> str:
    """The right answer in words; of several optimal routes the first, and how many there are."""
    if problem.kind in ("TorF1", "TorF2"):
        return "yes" if problem.answer == 1 else "no"
    if problem.kind == "Counting1":
        return "ABCD"[problem.answer]
    if problem.kind != "planning":
        return str(problem.answer)
    if not problem.fine_grained_answer:
        return f"any valid route; {problem.transfers_required} transfers at best"
    legs = [
        f"{leg['route_name']}: {leg['departure_stop']} → {leg['arrival_stop']}"
        for leg in problem.fine_grained_answer[0]
    ]
    routes = len(problem.fine_grained_answer)
    return "\n".join(legs) + (f"\n(one of {routes} optimal routes)" if routes > 1 else "")


def _sheet(cards: Sequence[_Card]) -> Image.Image:
    rows = [cards[start : start + COLUMNS] for start in range(0, len(cards), COLUMNS)]
    heights = [max(card.height for card in row) for row in rows]
    columns = min(COLUMNS, len(cards))
    size = (columns * (WIDTH + GAP) + GAP, sum(heights) + GAP * (len(rows) + 1))
    sheet = Image.new("RGB", size, PAPER)
    y = GAP
    for row, height in zip(rows, heights, strict=True):
        for column, card in enumerate(row):
            card.draw(sheet, GAP + column * (WIDTH + GAP), y, height)
        y += height + GAP
    return sheet


def _fit(source: str | bytes) -> Image.Image:
    """The map within MAP x MAP pixels."""
    with open_picture(source) as opened:
        picture = as_rgb(opened)
    scale = MAP / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _wrap(text: str, colour: str, size: int, label: str = "") -> Iterator[_Line]:
    """Break to the card's width; of more than MAX_LINES lines the middle is left out, the answer's end is kept."""
    indent = INDENT if label else 0
    lines = wrapped(text, lambda line: _font(size, cjk=_is_cjk(line)).getlength(line), WIDTH - MAP - 3 * PAD - indent)
    if len(lines) > MAX_LINES:
        lines = [*lines[:2], "…", *lines[3 - MAX_LINES :]]
    for number, line in enumerate(lines):
        yield _Line(line, colour, size, indent, "" if number else label)


def _is_cjk(text: str) -> bool:
    return any(character >= "\u2e80" for character in text)


@lru_cache(maxsize=32)
def _font(size: int, bold: bool = False, cjk: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib; for Chinese text a system font, else that of the generated maps."""
    from matplotlib.font_manager import FontProperties, findfont, fontManager

    installed = {font.name for font in fontManager.ttflist}
    family = next((name for name in CJK_FONTS if name in installed), None) if cjk else "DejaVu Sans"
    if family is None:
        return map_font(size, bold, "han")
    path = findfont(FontProperties(family=[family], weight="bold" if bold else "normal"))
    return ImageFont.truetype(path, size)
