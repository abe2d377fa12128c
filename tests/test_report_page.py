"""The HTML page: nothing is requested, nothing that a model writes becomes markup, and routes lie where the map has
them."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image
from rich.console import Console

from rewardmap.config_file import load_config
from rewardmap.evaluate import Answer, Evaluation
from rewardmap.evaluate.reading import StatedLeg
from rewardmap.report.page import _picture as embedded
from rewardmap.report.page import right_and_wrong
from rewardmap.report.routes import closest, draw_legs, gold_legs, named_stops
from rewardmap.report.samples import MAP, _fit
from rewardmap.report.table import write_report
from rewardmap.train.examine import Examiner, make_examiner
from rewardmap.transit.graph import Line, Network
from rewardmap.transit.questions import gold_response
from rewardmap.transit.reasonmap import load_dataset, write_dataset
from rewardmap.types import Problem

NASTY = (
    "<script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>'\"&lt; </pre></article><svg onload=x>"
    "\u202e\x00\x1b[31m https://evil.example javascript:alert(3) <!-- ]]> \ud800 {}"
)


class Reader(HTMLParser):
    """Every tag with its attributes, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


@pytest.fixture(scope="module")
def examiner(tmp_path_factory: pytest.TempPathFactory) -> Examiner:
    folder = tmp_path_factory.mktemp("data") / "maps"
    write_dataset(folder, maps={"train": 1, "test": 6}, preset="tiny", seed=3)
    config = load_config("tiny", ["eval.samples=40"])
    return make_examiner(config, load_dataset(folder, "test"), None, Console(quiet=True))


def page_of(examiner: Examiner, evaluation: Evaluation, out: Path) -> str:
    facts = {"seconds": 1.0, "tokens_per_second": None, "phases": {}, "peak_rss_bytes": 1, "seed": None, "steps": None}
    report = write_report(out, after=evaluation, **facts)  # type: ignore[arg-type]
    examiner.write_page(out, f"run {NASTY}", report, evaluation, before=evaluation)
    return (out / "report.html").read_text(encoding="utf-8")


def judged(examiner: Examiner, texts: list[str]) -> Evaluation:
    return examiner.judge.evaluation(examiner.problems, [Answer(text, 3) for text in texts], examiner.networks)


def test_what_a_model_writes_stays_text(examiner: Examiner, tmp_path: Path) -> None:
    route = f"Route Name: {NASTY}\nDeparture Stop: {NASTY}\nArrival Stop: {NASTY}"
    texts = [route if problem.kind == "planning" else NASTY for problem in examiner.problems]
    nasty = [dataclasses.replace(problem, question=problem.question + NASTY) for problem in examiner.problems]
    examiner = dataclasses.replace(examiner, problems=nasty)
    plain = page_of(examiner, judged(examiner, ["x"] * len(texts)), tmp_path / "plain")
    page = page_of(examiner, judged(examiner, texts), tmp_path / "nasty")
    counts = [sum(tag == "article" for tag, _ in Reader(text).tags) for text in (plain, page)]
    assert counts[0] == counts[1] > 10
    known = {"html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "h3", "p", "table", "thead", "tbody"}
    known |= {"tr", "th", "td", "small", "bdi", "span", "section", "article", "div", "pre", "img", "svg", "image"}
    known |= {"polyline", "polygon", "circle"}
    reader = Reader(page)
    assert {tag for tag, _ in reader.tags} <= known
    assert not reader.open
    assert "<script>alert(1)</script>" in reader.text
    for tag, attributes in reader.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:image/").startswith("data:image/"), tag


def test_nothing_is_requested(examiner: Examiner, tmp_path: Path) -> None:
    page = page_of(examiner, judged(examiner, [gold_response(p) for p in examiner.problems]), tmp_path)
    reader = Reader(page)
    [policy] = [a["content"] or "" for tag, a in reader.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:;") and "script" not in policy
    style = page.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style
    assert not re.search(r"<(script|link|iframe|object|embed|base|form|a)\b", page)
    assert "@media print" in style


def test_true_and_answered_routes_lie_over_the_map(examiner: Examiner, tmp_path: Path) -> None:
    right = [gold_response(problem) for problem in examiner.problems]
    wrong = [text.replace("Route Name: ", "Route Name: un") for text in right]
    for texts, kind in ((right, "right"), (wrong, "wrong")):
        page = page_of(examiner, judged(examiner, texts), tmp_path / kind)
        lines = [attributes for tag, attributes in Reader(page).tags if tag == "polyline"]
        kinds = [attributes["class"] for attributes in lines]
        assert kinds.count("true") == kinds.count(kind) > 3
        dashed = ["stroke-dasharray" in attributes for attributes in lines if attributes["class"] == kind]
        assert all(dashed) == any(dashed) == (kind == "wrong")
        assert ("not on this map: " in page) == (kind == "wrong")


def test_a_lying_or_transparent_map_is_shown_as_the_model_sees_it(tmp_path: Path) -> None:
    lying = Image.Exif()
    lying[ExifTags.Base.Orientation] = 6  # shown after a quarter turn to the right
    picture = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    picture.paste((255, 0, 0, 255), (0, 0, 20, 20))
    picture.save(tmp_path / "map.png", exif=lying)
    uri, size = embedded(str(tmp_path / "map.png"))
    assert size == (20, 40)
    with Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2]))) as shown:
        assert shown.size == size
        for y, colour in ((5, (255, 0, 0)), (35, (255, 255, 255))):
            assert np.abs(np.subtract(shown.getpixel((10, y)), colour)).max() <= 4  # JPEG
    sheet = _fit(str(tmp_path / "map.png"))
    assert sheet.size == (MAP // 2, MAP) and sheet.getpixel((9, MAP - 9)) == (255, 255, 255)


def test_legs_follow_the_track_and_dashes_mean_no_train() -> None:
    places = {name: (30.0 * i, 10.0 * (i % 2)) for i, name in enumerate("ABCDE")}
    ring = Line("Ring", "#ff0000", ("A", "B", "C", "D", "E"), loop=True)
    oneway = Line("Oneway", "#00ff00", ("A", "B", "C"), one_way=True)
    network = Network("x/y", "tiny-easy", (ring, oneway), places, (150, 40))

    def drawn(line: str, a: str, b: str) -> tuple[list[str], bool]:
        [leg], unknown = draw_legs(network, [StatedLeg(line, a, b, None, None)])
        assert not unknown or line == "Nowhere"
        stops = [next(name for name, place in places.items() if place == point) for point in leg.points]
        return list(dict.fromkeys(stops)), leg.ridable

    assert drawn("ring line", "B Station", "D") == (["B", "C", "D"], True)
    assert drawn("Ring", "B", "E") == (["B", "A", "E"], True)  # the shorter way around
    assert drawn("Ring", "D", "B") == (["D", "C", "B"], True)
    assert drawn("Oneway", "A", "C") == (["A", "B", "C"], True)
    assert drawn("Oneway", "C", "A") == (["C", "A"], False)
    assert drawn("Oneway", "A", "E") == (["A", "E"], False)
    assert drawn("Nowhere", "A", "E") == (["A", "E"], False)
    assert draw_legs(network, [StatedLeg("Ring", "A", "Z", None, None)]) == ([], ["Z"])
    assert closest(network) == pytest.approx(np.hypot(30, 10))
    asked = Problem("u", b"", "", "TorF2", 1, "B Station", "Ring", "x/y", "easy")
    assert named_stops(network, asked) == [places["B"]]
    assert gold_legs(dataclasses.replace(asked, kind="planning", fine_grained_answer=[[{"route_name": "x"}]])) == []


def test_right_and_wrong_answers_are_shown_evenly(examiner: Examiner) -> None:
    texts = [gold_response(problem) if i % 5 else "?" for i, problem in enumerate(examiner.problems)]
    evaluation = judged(examiner, texts)
    chosen = right_and_wrong(evaluation, 16)
    assert sum(record.correct for record in chosen) in range(7, 12)
    assert len({record.group for record in chosen}) >= 6
    assert len(right_and_wrong(evaluation, 10**6)) == len(evaluation.records)
