"""Files of responses made from the data itself, every metric against a computation that shares no code with ours."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
import pytest
from datasets import load_from_disk
from rich.console import Console

from rewardmap.config import ConfigError
from rewardmap.evaluate import Evaluation
from rewardmap.evaluate.answers import read_responses
from rewardmap.rollout.local import LocalEngine
from rewardmap.tiny import WARM_START
from rewardmap.train.examine import EvalRequest, evaluate_target
from rewardmap.transit.reasonmap import load_dataset, write_dataset, write_rows
from rewardmap.types import DataError, Problem, RolloutGroup

QUIET = Console(quiet=True)
WEIGHT = {"ee": 1, "me": 1.5, "em": 1.5, "he": 2, "mm": 2, "eh": 2, "mh": 2.5, "hm": 2.5, "hh": 3}
"""The published table, by first letters of the question's and of the map's difficulty."""
Legs = list[dict[str, str]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "maps"
    write_dataset(folder, maps={"train": 1, "test": 12}, preset="tiny", seed=5)
    return folder


@pytest.fixture(scope="module")
def rows(data: Path) -> list[dict[str, Any]]:
    return [dict(row) for row in load_from_disk(str(data / "data" / "ReasonMap-Train"))["test"]]


def legs_of(row: dict[str, Any]) -> Legs:
    [plan, *_] = json.loads(row["fine_grained_answer"])
    return [{name: leg[name] for name in ("route_name", "departure_stop", "arrival_stop")} for leg in plan]


def text_of(legs: Legs) -> str:
    blocks = [
        f"Route Name: {leg['route_name']}\nDeparture Stop: {leg['departure_stop']}\nArrival Stop: {leg['arrival_stop']}"
        for leg in legs
    ]
    return "\n--\n".join(blocks)


def short_answer(row: dict[str, Any], right: bool) -> str:
    answer = row["answer"] if right else (1 - row["answer"] if row["type"].startswith("TorF") else row["answer"] ^ 1)
    if row["type"].startswith("TorF"):
        return "\\boxed{yes}" if answer else "\\boxed{no}"
    return f"\\boxed{{{'ABCD'[answer]}}}" if row["type"] == "Counting1" else f"\\boxed{{{answer}}}"


def spoil(legs: Legs, how: int) -> Legs:
    """A route that is wrong for certain, in one of four ways."""
    broken = [dict(leg) for leg in legs]
    if how == 0:
        broken[-1]["route_name"] = "Nowhere Line"
    elif how == 1:
        broken[0]["departure_stop"], broken[-1]["arrival_stop"] = legs[-1]["arrival_stop"], legs[0]["departure_stop"]
    elif how == 2:
        broken[0]["arrival_stop"] = "Nowhere Station"
    else:
        broken[-1]["arrival_stop"] = legs[0]["departure_stop"]
    return broken


def answers(rows: Sequence[dict[str, Any]], right: Callable[[int], bool]) -> tuple[list[dict[str, Any]], list[Any]]:
    """Lines of a response file, and for each what was said: legs, or None."""
    lines, said = [], []
    for number, row in enumerate(rows):
        legs = None
        if row["type"] == "planning":
            legs = legs_of(row) if right(number) else spoil(legs_of(row), number % 4)
        text = short_answer(row, right(number)) if legs is None else text_of(legs)
        lines.append({"uid": row["uid"], "response": text, "num_tokens": number % 7 + 1})
        said.append(legs)
    return lines, said


def weight(row: dict[str, Any]) -> float:
    level = row["difficulty_city"]
    if row["type"] != "planning":
        return {"easy": 1.0, "middle": 1.5, "hard": 2.0}[level]
    question = "emh"[min(row["question_transfer_count"], 2)]
    return WEIGHT[question + level[0]]


def points(row: dict[str, Any], legs: Legs, right: bool, released: bool) -> float:
    """Map score of a short route outside China, from the legs themselves: of the scripts, or of the paper."""
    if (legs[0]["departure_stop"], legs[-1]["arrival_stop"]) != (row["station_1"], row["station_2"]):
        return 0.0 + 10.0 * right
    best = 0
    for plan in json.loads(row["fine_grained_answer"]):
        score = 1
        for said, true in zip(legs, plan, strict=False):
            assert true["departure_stop"].endswith(" Station")
            score += said["departure_stop"] == true["departure_stop"]
            # The scripts never see the line, and mistake the departure for the arrival.
            score += said["arrival_stop"] == true["departure_stop" if released else "arrival_stop"]
            score += 0 if released else 2 * (said["route_name"] == true["route_name"])
        best = max(best, score)
    return min(best, 10) + 10.0 * right


def write(path: Path, lines: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def evaluate(data: Path, file: Path, **options: Any) -> tuple[dict[str, Any], Evaluation]:
    out = evaluate_target(EvalRequest(None, file, data=data, **options), QUIET)
    return json.loads((out / "report.json").read_text(encoding="utf-8")), Evaluation.from_jsonl(out / "after.jsonl")


@pytest.mark.parametrize("normaliser", ["training", "evaluation"])
@pytest.mark.parametrize("case", ["right", "wrong", "mutated"])
def test_every_metric_equals_an_independent_computation(
    case: str, normaliser: str, data: Path, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    draws = np.random.default_rng(4).random(len(rows))
    truth = {"right": draws > -1, "wrong": draws > 2, "mutated": draws < 0.6}[case]
    lines, said = answers(rows, lambda number: bool(truth[number]))
    np.random.default_rng(1).shuffle(lines)  # type: ignore[arg-type]
    report, evaluation = evaluate(data, write(tmp_path / "a.jsonl", lines), normaliser=normaliser)
    weights = np.array([weight(row) for row in rows])
    assert [record.uid for record in evaluation.records] == [row["uid"] for row in rows]
    assert [record.correct for record in evaluation.records] == truth.tolist()
    assert [record.weight for record in evaluation.records] == weights.tolist()
    assert report["weighted_accuracy"]["after"] == pytest.approx(weights @ truth / weights.sum(), abs=1e-12)
    kinds = np.array([row["type"] for row in rows])
    levels = np.array([row["difficulty_city"] for row in rows])
    transfers = np.array([row["question_transfer_count"] or 0 for row in rows])
    cities = np.array([f"{row['country']}/{row['city']}" for row in rows])
    tokens = np.arange(len(rows)) % 7 + 1
    planning = kinds == "planning"
    scores = {
        name: np.array(
            [
                points(row, legs, bool(truth[i]), released) if legs else 0.0
                for i, (row, legs) in enumerate(zip(rows, said, strict=True))
            ]
        )
        for name, released in (("map_score", True), ("map_score_paper", False))
    }
    parts = {
        ("whole", "all"): planning | True,
        ("benchmark", "ReasonMap"): planning,
        ("benchmark", "ReasonMap-Plus"): ~planning,
        ("benchmark", "Plus, counting"): np.char.startswith(kinds, "Counting"),
        ("benchmark", "Plus, true/false"): np.char.startswith(kinds, "TorF"),
        **{("kind", str(kind)): kinds == kind for kind in np.unique(kinds)},
        **{("map level", str(level)): levels == level for level in np.unique(levels)},
        **{("city", str(city)): cities == city for city in np.unique(cities)},
        ("transfers", "none"): planning & (transfers == 0),
        ("transfers", "one"): planning & (transfers == 1),
    }
    seen = {(cut, name) for cut, named in report["parts"].items() for name in named}
    assert seen - {("transfers", "two or more")} == set(parts)
    for (cut, name), chosen in parts.items():
        found = report["parts"][cut][name]
        assert found["n"] == chosen.sum() and found["total_weight"] == weights[chosen].sum()
        expected = weights[chosen] @ truth[chosen] / weights[chosen].sum()
        assert found["weighted_accuracy"]["value"] == pytest.approx(expected, abs=1e-12), name
        assert found["accuracy"]["value"] == pytest.approx(truth[chosen].mean(), abs=1e-12)
        assert found["tokens"] == pytest.approx(tokens[chosen].mean())
        assert found["format_valid"]["value"] == 1.0
        routes = chosen & planning
        for metric, values in scores.items():
            if not routes.any():
                assert found[metric] is None
                continue
            expected = weights[routes] @ values[routes] / weights[routes].sum()
            assert found[metric]["value"] == pytest.approx(expected, abs=1e-12), (name, metric)
    for metric in ("accuracy", "map_score_unweighted"):
        values = truth if metric == "accuracy" else scores["map_score"][planning]
        assert evaluation.estimate(metric).value == pytest.approx(values.mean(), abs=1e-12)
    assert report["parts"]["benchmark"]["ReasonMap"]["verified"]["value"] == pytest.approx(truth[planning].mean())


def test_sums_of_weights_are_printed(data: Path, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    lines, _ = answers(rows, lambda number: True)
    screen = Console(width=80, file=StringIO(), color_system=None)
    out = evaluate_target(EvalRequest(None, write(tmp_path / "a.jsonl", lines), data=data), screen)
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    for name, wanted in (("ReasonMap", True), ("ReasonMap-Plus", False)):
        total = sum(weight(row) for row in rows if (row["type"] == "planning") == wanted)
        for text in (shown, (out / "report.md").read_text(encoding="utf-8")):
            line = next(line for line in text.splitlines() if line.strip("| ").split("  ")[0].split(" |")[0] == name)
            assert f" {total:g} " in line
    assert max(map(len, shown.splitlines()[:-1])) <= 80


def test_the_evaluation_reads_names_more_strictly(data: Path, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    """Without "Station" the training reward takes a name, ReasonMap's evaluation does not."""
    lines, _ = answers(rows, lambda number: True)
    for line in lines:
        line["response"] = line["response"].replace(" Station", "")
    file = write(tmp_path / "a.jsonl", lines)
    assert evaluate(data, file, normaliser="training")[0]["kinds"]["planning"]["after"] == 1.0
    strict = evaluate(data, file)[0]
    assert strict["kinds"]["planning"]["after"] == 0.0 and strict["kinds"]["TorF1"]["after"] == 1.0


def test_lenient_extraction_forgives(data: Path, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    lines, _ = answers(rows, lambda number: True)
    for line in lines:
        line["response"] = line["response"].replace("\\boxed{", "So \\boxed{\\text{").replace("}", "}.}", 1)
    file = write(tmp_path / "a.jsonl", lines)
    published, lenient = (
        evaluate(data, file, extraction=how)[0]["parts"]["benchmark"] for how in ("published", "lenient")
    )
    assert published["ReasonMap-Plus"]["accuracy"]["value"] < 0.1
    assert lenient["ReasonMap-Plus"]["accuracy"]["value"] == 1.0
    assert lenient["ReasonMap"] == published["ReasonMap"]


def test_long_questions_of_reasonmap_by_an_independent_computation(tmp_path: Path) -> None:
    """Rows as ReasonMap's repository holds them, half asking for the number of via stops, half for their names."""
    folder = tmp_path / "reasonmap"
    write_dataset(folder, maps={"train": 1, "test": 6}, preset="tiny", seed=2, form="ReasonMap")
    rows = load_dataset(folder, "test", planning_question="long").problems
    lines, expected = [], []
    for number, row in enumerate(rows):
        plan = row.fine_grained_answer[0]
        via = [len(leg["via_stops"]) for leg in plan]
        counts = "Number of Via Stops: " in row.question
        late = number % 3 == 0  # says one stop too many on the first leg, or leaves the last leg's stops out
        blocks = []
        for i, leg in enumerate(plan):
            said = f"Number of Via Stops: {via[i] + (late and i == 0)}"
            if not counts:
                said = "Via Stops: " + (", ".join(leg["via_stops"]) if not (late and leg is plan[-1]) else "None")
            names = (leg["route_name"], leg["departure_stop"], leg["arrival_stop"])
            blocks.append("Route Name: {}\nDeparture Stop: {}\nArrival Stop: {}\n".format(*names) + said)
        lines.append({"uid": row.uid, "response": "\n--\n".join(blocks)})
        if counts:
            first = 4 - 4 / (via[0] + 1) if late else 4
            extra = min(10, first + 4 * (len(plan) - 1))
        else:
            named = sum(via) - (via[-1] if late else 0)
            extra = (10 * (named / sum(via) if sum(via) else 1) + min(10, named)) / 2
        expected.append(min(20, 1 + 4 * len(plan) + extra) + 20)
    assert {"Number of Via Stops: " in row.question for row in rows} == {True, False}
    file = write(tmp_path / "a.jsonl", lines)
    report, evaluation = evaluate(folder, file, questions="long")
    assert report["weighted_accuracy"]["after"] == 1.0
    assert [record.map_score_paper for record in evaluation.records] == pytest.approx(expected)
    assert report["parts"]["whole"]["all"]["verified"]["value"] == 1.0


def broken(lines: list[dict[str, Any]], how: str) -> list[Any]:
    first, second, *rest = lines
    return {
        "missing": rest,
        "foreign": [*lines, {"uid": "elsewhere-7", "response": "x"}],
        "twice": [*lines, first],
        "no text": [{**first, "response": 3}, second, *rest],
        "tokens": [{**first, "num_tokens": -1}, second, *rest],
        "huge": [{**first, "num_tokens": 10**400}, second, *rest],
        "no uid": [{"response": "x"}, second, *rest],
        "list": [[1], *lines],
    }[how]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "missing",
            r"a\.jsonl does not match the data: 2 questions have no response: {0}, {1}; check --data and --split",
        ),
        ("foreign", r"1 responses answer no question of the split: elsewhere-7"),
        ("twice", r"1 uids appear more than once: {0}"),
        ("no text", r"line 1, field 'response': 3 is not text"),
        ("tokens", r"line 1, field 'num_tokens': -1"),
        ("huge", r"line 1, field 'num_tokens': 1000.* is not a number of tokens"),
        ("no uid", r"line 1, field 'uid': None"),
        ("list", r"line 1: list, not an object"),
    ],
)
def test_a_file_that_does_not_match_is_named(
    how: str, message: str, data: Path, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    lines, _ = answers(rows, lambda number: True)
    file = write(tmp_path / "a.jsonl", broken(lines, how))
    with pytest.raises(DataError, match=message.format(lines[0]["uid"], lines[1]["uid"])):
        evaluate(data, file)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_line_that_json_gives_up_on_is_named(data: Path, tmp_path: Path) -> None:
    for line in ("[" * 5000, "9" * 5000):
        (tmp_path / "a.jsonl").write_text(line)
        with pytest.raises(DataError, match=r"a\.jsonl, line 1: not a line of JSON"):
            evaluate(data, tmp_path / "a.jsonl")


def test_an_answer_is_read_in_the_form_in_which_names_are(tmp_path: Path) -> None:
    problem = Problem("q", b"", "", "planning", -1, "Zürich", "Bern", "x/y", "easy")
    path = write(tmp_path / "a.jsonl", [{"uid": "q", "response": normalize("NFD", "Zürich")}])
    assert [answer.text for answer in read_responses(path, [problem])] == ["Zürich"]


def test_odd_line_separators_inside_an_answer_break_no_line(
    data: Path, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    lines, _ = answers(rows, lambda number: True)
    lines[0]["response"] += "\u2028\x85\r\nand more"
    lines[1]["response"] = "\ud800"
    path = tmp_path / "a.jsonl"
    written = (json.dumps(line, ensure_ascii=line is lines[1]) + "\n" for line in lines)
    path.write_text("".join(written), encoding="utf-8")
    _, evaluation = evaluate(data, path)
    assert evaluation.records[1].response == "?"
    assert evaluation.records[0].response == lines[0]["response"]
    # An evaluation's own records are a file of responses too.
    again = evaluate(data, tmp_path / "a-eval-maps-test" / "after.jsonl")[1]
    assert again == evaluation


def test_answers_to_a_smaller_picture_are_no_answers_to_the_whole_one(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, generate = [], LocalEngine.generate

    def noted(self: LocalEngine, problems: Sequence[Problem], *rest: Any) -> list[RolloutGroup]:
        asked.append(len(problems))
        return generate(self, problems, *rest)

    monkeypatch.setattr(LocalEngine, "generate", noted)
    for setting in ("max_pixels=4000", "max_pixels=4000", "max_pixels=20000", "dtype=bfloat16"):
        settings = ("eval.max_problems=3", "rollout.max_new_tokens=4", f"policy.{setting}")
        evaluate_target(EvalRequest(str(WARM_START), data=data, out=tmp_path, settings=settings), QUIET)
    assert asked == [3, 3, 3]


def test_mistakes_are_named_before_anything_runs(data: Path, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", answers(rows, lambda number: True)[0])
    with pytest.raises(DataError, match=r"no split 'val'; it has train, test"):
        evaluate(data, file, split="val")
    for request, message in (
        (EvalRequest(None), "name a run folder"),
        (EvalRequest(None, file), "--data FOLDER"),
        (EvalRequest(None, tmp_path / "gone.jsonl", data=data), r"gone\.jsonl: no such file"),
        (EvalRequest(str(tmp_path / "gone"), data=data), "no such run folder"),
        (EvalRequest(str(file), data=data), "not a run folder"),
        (EvalRequest(str(tmp_path), file, data=data), "only a run folder"),
        (EvalRequest(None, file, data=data, settings=["rollout.max_tokens=3"]), "rollout.max_new_tokens"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluate_target(request, QUIET)


def test_missing_annotation_names_the_questions(rows: list[dict[str, Any]], data: Path, tmp_path: Path) -> None:
    bare = [
        {**row, "fine_grained_answer": None if row["type"] == "planning" else row["fine_grained_answer"]}
        for row in rows
    ]
    folder = tmp_path / "bare"
    write_rows(folder, bare, "test")
    for name in ("maps", "stations"):
        shutil.copytree(data / name, folder / name)
    uids = [row["uid"] for row in rows if row["type"] == "planning"]
    file = write(tmp_path / "a.jsonl", answers(rows, lambda number: True)[0])
    named = rf"{len(uids)} planning questions cannot get a map score.*{uids[0]}: no reference routes.*{uids[4]} and"
    with pytest.raises(DataError, match=named):
        evaluate(folder, file)
    report, _ = evaluate(folder, file, map_scores=False)
    assert report["weighted_accuracy"]["after"] == 1.0 and report["parts"]["whole"]["all"]["map_score"] is None
