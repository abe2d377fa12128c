"""What a run leaves behind: logs that survive a kill, pictures, and the closing table."""

from __future__ import annotations

import json
import re
import string
import time
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from rewardmap.evaluate import TRANSFER, Evaluation, Record, TextPrior
from rewardmap.files import replacing
from rewardmap.report import MetricsLog, draw_curves, draw_samples, read_metrics, write_report
from rewardmap.report.curves import smooth, stage_spans
from rewardmap.report.samples import _font, choose, gold_text, short_answer, short_question
from rewardmap.report.table import NAMES, _rich
from rewardmap.transit.names import make_names, station_name
from rewardmap.transit.questions import question_text
from rewardmap.types import KINDS, Problem


def row(step: int, stage: str = "planning", **values: Any) -> dict[str, Any]:
    base = {"step": step, "stage": stage, "reward": 0.1 * step, "accuracy": 0.5, "seconds": {"rollout": 0.25}}
    return base | values


def record(city: int, kind: str, correct: bool, transfers: int = 0) -> Record:
    response = "Route Name: Red Line\nDeparture Stop: A Station\nArrival Stop: B Station\n--\nRoute Name: x"
    name = f"{city}-{kind}-{transfers}"
    return Record(name, kind, f"land/{city}", "hard", transfers, 2.0, correct, True, response, 4)


def evaluation(seed: int, share: float, cities: int = 12) -> Evaluation:
    rng = np.random.default_rng(seed)
    asked = [(kind, transfers) for kind in KINDS for transfers in ((0, 1) if kind == "planning" else (0,))]
    return Evaluation(tuple(record(c, kind, bool(rng.random() < share), t) for c in range(cities) for kind, t in asked))


def problems(evaluation: Evaluation, image: str | bytes) -> list[Problem]:
    return [
        Problem(
            uid=r.uid,
            image=image,
            question=question_text(r.kind, "Tøyen Station", "济南站", (1, 2, 3, 4)),
            kind=r.kind,
            answer=1,
            station_1="Tøyen Station",
            station_2="济南站",
            network_id=r.network_id,
            map_difficulty=r.map_difficulty,
            transfers_required=r.transfers_required,
        )
        for r in evaluation.records
    ]


def tags(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_every_row_is_on_disk_at_once(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.append(row(1))
        assert read_metrics(tmp_path) == [row(1)]
        log.append(row(2, loss=float("nan"), accuracy_by_kind={"TorF1": float("inf")}))
    assert read_metrics(tmp_path)[1]["loss"] is None
    assert read_metrics(tmp_path)[1]["accuracy_by_kind"] == {"TorF1": None}
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")


def test_tensorboard_holds_the_same_numbers(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        for step in (1, 2, 3):
            log.append(row(step))
    found = tags(tmp_path)
    assert found["seconds/rollout"] == [(1, 0.25), (2, 0.25), (3, 0.25)]
    assert [step for step, _ in found["reward"]] == [1, 2, 3]
    np.testing.assert_allclose([value for _, value in found["reward"]], [0.1, 0.2, 0.3], rtol=1e-6)


def test_resuming_cuts_back_to_the_checkpoint(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        for step in range(1, 6):
            log.append(row(step))
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 6, "rew')  # killed while writing
    with MetricsLog(tmp_path, last_step=3) as log:
        log.append(row(4, reward=9.0))
    assert [(r["step"], r["reward"]) for r in read_metrics(tmp_path)][2:] == [
        (3, pytest.approx(0.3)),
        (4, 9.0),
    ]
    assert [(step, round(value, 3)) for step, value in tags(tmp_path)["reward"]][2:] == [(3, 0.3), (4, 9.0)]


def test_a_new_run_starts_empty(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    with MetricsLog(tmp_path) as log:
        log.append(row(1))
    with MetricsLog(tmp_path):
        assert read_metrics(tmp_path) == []


def test_smoothing_keeps_a_constant_and_the_mean_of_a_window() -> None:
    np.testing.assert_allclose(smooth(np.full(7, 2.5), 5), 2.5)
    np.testing.assert_allclose(smooth(np.array([0.0, 3.0, 6.0, 0.0]), 3), [1.5, 3.0, 3.0, 3.0])


def test_stage_spans() -> None:
    rows = [row(1, "a"), row(2, "a"), row(3, "b"), row(4, "a")]
    assert list(stage_spans(rows)) == [("a", 1, 2), ("b", 3, 3), ("a", 4, 4)]
    assert list(stage_spans([])) == []


def test_curves_show_what_they_are_given(tmp_path: Path) -> None:
    """The same run drawn twice is the same picture, another run another one; supervised rows come first."""
    rows = [{"step": 1, "stage": "warm start", "loss": 2.0}, *(row(step) for step in range(2, 60))]
    evaluations = {"before": evaluation(0, 0.4), "after": evaluation(1, 0.9)}
    pictures = {}
    for name, drawn in (("a", rows), ("same", rows), ("other", rows[:30])):
        draw_curves(drawn, evaluations, tmp_path / f"{name}.png")
        pictures[name] = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB"))
    assert pictures["a"].shape[0] > 600 and pictures["a"].shape[1] > 1200
    assert (pictures["a"] == pictures["same"]).all()
    assert (pictures["a"] != pictures["other"]).any()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.png", "other.png", "same.png"]


@pytest.mark.parametrize("rows", [[], [row(1)], [{"step": 1, "stage": "warm start", "loss": 2.0}]])
def test_curves_of_hardly_anything(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    draw_curves(rows, {"after": evaluation(1, 0.9, cities=1)}, tmp_path / "curves.png")
    draw_curves(rows, {}, tmp_path / "curves.png")


def test_samples_are_spread_over_the_kinds_and_not_chosen_by_success() -> None:
    some = evaluation(0, 0.3, cities=40)
    chosen = choose(some, 14, seed=0)
    assert [r.group for r in chosen] == [g for g in dict.fromkeys(r.group for r in chosen) for _ in range(2)]
    assert len({r.uid for r in chosen}) == 14
    assert chosen == choose(some, 14, seed=0) != choose(some, 14, seed=1)
    assert len(choose(some, 10_000, seed=0)) == len(some.records)
    flipped = Evaluation(
        tuple(record(int(r.network_id[5:]), r.kind, not r.correct, r.transfers_required) for r in some.records)
    )
    assert [r.uid for r in choose(flipped, 14, seed=0)] == [r.uid for r in chosen]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_sample_sheets_hold_the_map(mode: str, tmp_path: Path) -> None:
    """A picture of one odd colour is found again on each card, whatever its shape; no map is cut off."""
    picture = Image.new("RGB", (90, 30), (10, 200, 190))
    (picture.quantize(2) if mode == "P" else picture.convert(mode)).save(tmp_path / "map.png")
    some = evaluation(0, 0.5, cities=2)
    asked = problems(some, str(tmp_path / "map.png"))
    paths = draw_samples(some, asked, tmp_path / "samples", 10, before=evaluation(1, 0.5, cities=2))
    assert [path.name for path in paths] == ["samples-1.png", "samples-2.png"]
    for path, cards in zip(paths, (8, 2), strict=True):
        sheet = np.asarray(Image.open(path).convert("RGB")).astype(int)
        found = (np.abs(sheet - (10, 200, 190)).max(-1) <= 2).sum()
        assert found == pytest.approx(cards * 272 * 91, rel=0.03)


def test_sample_pictures_may_be_bytes(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "map.png")
    some = evaluation(0, 0.5, cities=1)
    assert draw_samples(some, problems(some, (tmp_path / "map.png").read_bytes()), tmp_path, 1)


def test_names_of_generated_maps_need_no_font_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewardmap.report.samples.CJK_FONTS", ())
    _font.cache_clear()
    face = _font(18, cjk=True)
    absent = bytes(face.getmask("\U000f0000"))  # the box that stands for what a typeface lacks
    names = [station_name(name, "chinese") for name in make_names(np.random.default_rng(1), 200, "chinese")]
    for character in sorted({*"".join(names), *string.printable.split()[0], "→"}):
        assert bytes(face.getmask(character)) != absent, character
    _font.cache_clear()


def test_a_missing_map_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    some = evaluation(0, 0.5, cities=1)
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        draw_samples(some, problems(some, str(tmp_path / "gone.png")), tmp_path / "samples", 4)
    assert not list((tmp_path / "samples").iterdir())


def test_texts_on_cards() -> None:
    question = question_text("Counting1", "A Station", "B Station", (4, 0, 2, 9))
    expected = "How many intermediate stops are there between A Station and B Station (except for this two stops)?"
    assert short_question(question) == f"{expected}\nA) 4   B) 0   C) 2   D) 9"
    assert short_question(question_text("planning", "A", "B")) == "How do I get from A to B?"
    assert short_answer(record(0, "planning", True).response) == "Red Line: A Station → B Station\nRoute Name: x"
    assert short_answer(" \n") == "(nothing)"
    asked = problems(evaluation(0, 1.0, cities=1), "")
    assert [gold_text(p) for p in asked[:5]] == ["yes", "yes", "B", "1", "1"]


def report(run_dir: Path, **changes: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "after": evaluation(1, 0.8),
        "before": evaluation(0, 0.4),
        "text_only": evaluation(2, 0.3),
        "prior": TextPrior(0.35, {"TorF1": 0.5}, {"TorF1": "always 1"}),
        "seconds": 12.5,
        "tokens_per_second": 99.0,
        "phases": {"rollout": 3.0, "train": 9.0},
        "peak_rss_bytes": 2**30,
        "seed": 7,
        "steps": 11,
    }
    return write_report(run_dir, **facts | changes)


def test_report_json_has_the_promised_form(tmp_path: Path) -> None:
    returned = report(tmp_path)
    saved = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert saved == returned
    before, after, text_only = evaluation(0, 0.4), evaluation(1, 0.8), evaluation(2, 0.3)
    accuracy = saved["weighted_accuracy"]
    assert accuracy["before"] == before.weighted_accuracy
    assert accuracy["after"] == after.weighted_accuracy
    assert accuracy["text_only"] == text_only.weighted_accuracy
    assert list(saved["kinds"]) == list(KINDS)
    assert saved["kinds"]["planning"] == {
        "before": before.estimate("planning").value,
        "after": after.estimate("planning").value,
        "n": 24,
    }
    assert saved["planning_routes"]["transfer"]["after"] == after.estimate("planning/transfer").value
    assert saved["format_valid"] == {"before": 1.0, "after": 1.0}
    assert (saved["seconds"], saved["tokens_per_second"], saved["seed"], saved["steps"]) == (
        12.5,
        99.0,
        7,
        11,
    )
    gain = saved["gain"]["weighted_accuracy"]
    assert gain["value"] == pytest.approx(accuracy["after"] - accuracy["before"])
    assert gain["interval"][0] < gain["value"] < gain["interval"][1]
    low, high = saved["intervals"]["after"]["planning"]
    assert low <= saved["kinds"]["planning"]["after"] <= high
    assert saved["text_prior"]["policies"] == {"TorF1": "always 1"}
    assert saved["gain_above_floor"] == accuracy["after"] - max(accuracy["before"], 0.35)
    strong = TextPrior(0.7, {}, {})
    assert report(tmp_path, prior=strong)["gain_above_floor"] == accuracy["after"] - 0.7
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.json", "report.md"]


def test_what_was_not_measured_is_null(tmp_path: Path) -> None:
    one_map = evaluation(1, 0.5, cities=1)
    saved = report(tmp_path, before=None, text_only=None, prior=None, tokens_per_second=None, after=one_map)
    assert saved["weighted_accuracy"]["before"] is saved["weighted_accuracy"]["text_only"] is None
    assert saved["gain_above_floor"] is saved["gain"] is saved["text_prior"] is saved["tokens_per_second"] is None
    assert saved["intervals"]["after"]["planning"] is None
    assert "nan" not in (tmp_path / "report.json").read_text(encoding="utf-8").lower()
    assert "nan" not in (tmp_path / "report.md").read_text(encoding="utf-8").lower()


def test_the_table_fits_a_narrow_screen_and_agrees_with_the_file(tmp_path: Path) -> None:
    screen = Console(width=80, file=StringIO(), color_system=None)
    saved = report(tmp_path, console=screen)
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, shown.splitlines())) <= 80
    for text in (shown, (tmp_path / "report.md").read_text(encoding="utf-8")):
        for name, numbers in (
            ("weighted", saved["weighted_accuracy"]),
            ("Counting2", saved["kinds"]["Counting2"]),
        ):
            line = next(line for line in text.splitlines() if name in line)
            found = [float(value) for value in re.findall(r"[-+]?\d+\.\d(?= \[)", line)]
            assert found[:2] == [round(100 * numbers["before"], 1), round(100 * numbers["after"], 1)]
        assert "99 sampled tokens/s" in text and "train 9.0 s" in text


def test_no_number_of_the_table_is_cut() -> None:
    widest = ("100.0 [100…100]", "100.0 [100…100]", "-100.0 [-100…-100]", "100.0", "100.0", "1950")
    for width in (80, 60):
        screen = Console(width=width, file=StringIO(), color_system=None)
        screen.print(_rich([(NAMES[TRANSFER], *widest)] * 3))
        lines = screen.file.getvalue().splitlines()  # type: ignore[attr-defined]
        assert max(map(len, lines)) <= width
        cells = " ".join(widest) if width == 80 else "1950"
        assert sum(cells in " ".join(line.split()) for line in lines) == 3
        assert "".join("".join(lines).split()).count("…") == 9  # those of the intervals alone


def test_a_full_disk_leaves_the_old_file_and_names_it(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(OSError, match=r"report\.json") as caught, replacing(path) as temporary:
        temporary.write_text("half", encoding="utf-8")
        raise OSError(28, "No space left on device")
    assert caught.value.errno == 28
    assert path.read_text(encoding="utf-8") == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_the_metrics_is_named(tmp_path: Path) -> None:
    full = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115 (the log closes it)
    with pytest.raises(OSError, match=r"metrics\.jsonl") as caught, MetricsLog(tmp_path) as log:
        log._file.close()
        log._file = full
        log.append(row(1))
    assert full.closed
    assert caught.value.errno == 28


def test_a_long_answer_keeps_its_end() -> None:
    from rewardmap.report.samples import MAX_LINES, _wrap

    lines = [line.text for line in _wrap("let me think " * 90 + r"so \boxed{yes}", "black", 18, "after")]
    assert len(lines) == MAX_LINES and "…" in lines
    assert lines[0].startswith("let me think") and lines[-1].endswith(r"\boxed{yes}")


@pytest.mark.parametrize("text", ["W" * 5_000, "从北京站到上海站请看地图" * 30, "go to " + "Z" * 99 + " now"])
def test_no_line_of_a_card_is_wider_than_the_card(text: str) -> None:
    from rewardmap.report.samples import INDENT, MAP, PAD, SMALL, WIDTH, _is_cjk, _wrap

    lines = [line.text for line in _wrap(text, "black", SMALL, "after")]
    assert len(lines) > 1
    assert all(_font(SMALL, cjk=_is_cjk(line)).getlength(line) <= WIDTH - MAP - 3 * PAD - INDENT for line in lines)


def test_labels_over_and_over_on_one_line_take_no_time() -> None:
    answer = "Route Name: x Departure Stop: y " * 200 + "Departure Stop: " * 200
    began = time.perf_counter()
    assert short_answer(answer).startswith("Route Name: x")
    assert time.perf_counter() - began < 1
