"""Map scores worked by hand, how answers are read, and answers that are kept by content."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from rewardmap.evaluate import Answer, AnswerStore, Judge, ask, digest_folder, map_score
from rewardmap.evaluate.reading import form_of, lenient_answer, stated_legs, strict, without_thinking
from rewardmap.rewards.parse import clean, split_legs
from rewardmap.transit.wording import planning_text
from rewardmap.types import DataError, Problem, Rollout, RolloutGroup, SamplingParams


def leg(line: str, departure: str, arrival: str, *via: str) -> dict[str, Any]:
    names = {"route_name": line, "departure_stop": departure, "arrival_stop": arrival}
    return {**names, "via_stops": list(via), "num_via_stops": len(via)}


def asked(detail: Any, *plans: list[dict[str, Any]], country: str = "italy") -> Problem:
    first, last = plans[0][0]["departure_stop"], plans[0][-1]["arrival_stop"]
    suffix = "站" if country == "china" else " Station"
    first, last = (name if name.endswith(suffix) else name + suffix for name in (first, last))
    return Problem(
        uid="p",
        image=b"picture",
        question=planning_text(first, last, detail),
        kind="planning",
        answer=-1,
        station_1=first,
        station_2=last,
        network_id=f"{country}/city",
        map_difficulty="easy",
        transfers_required=len(plans[0]) - 1,
        fine_grained_answer=list(plans),
    )


def said(*legs: tuple[str, ...]) -> str:
    labels = ("Route Name", "Departure Stop", "Arrival Stop")
    blocks = []
    for line, departure, arrival, *extra in legs:
        block = [f"{label}: {value}" for label, value in zip(labels, (line, departure, arrival), strict=True)]
        blocks.append("\n".join([*block, *extra]))
    return "\n--\n".join(blocks)


ROME = [leg("Metro A", "Anagnina", "Termini", "Cinecittà", "Lodi"), leg("Metro B", "Termini", "Laurentina")]
SUFFIXED = [leg("A", "Anagnina Station", "Termini Station")]
BEIJING = [leg("地铁1号线", "国贸", "西单", "东单", "王府井"), leg("地铁4号线", "西单站", "角门西站", "宣武门")]


@pytest.mark.parametrize(
    ("detail", "plan", "country", "answer", "right", "released", "paper"),
    [
        # One leg of two: nobody's ends match, nothing is stated right.
        ("short", ROME, "italy", said(("A", "Anagnina Station", "Termini Station")), False, 0, 0),
        # Ends 1, four stops 4; the paper adds two lines, 2 each, but for the spelling of the line.
        ("short", ROME, "italy",
         said(("Metro A", "Anagnina Station", "Termini Station"), ("Metro B", "Termini Station", "Laurentina Station")),
         True, 15, 19),
        ("short", ROME, "italy",
         said(("Metro B", "Anagnina Station", "Termini Station"), ("Metro B", "Termini Station", "Laurentina Station")),
         False, 5, 7),
        # The reference has its suffix already: the scripts expect the departure as the arrival.
        ("short", SUFFIXED, "italy", said(("A", "Anagnina Station", "Termini Station")), True, 12, 15),
        # No leg at all.
        ("short", ROME, "italy", "I cannot read the map.", False, 0, 0),
        # China, short: lines by number; the second reference leg has its suffix, so its arrival is lost.
        ("short", BEIJING, "china",
         said(("Line 1", "国贸站", "西单站"), ("Line 4", "西单站", "角门西站")),
         True, 18, 19),
        # China, long: no such loss. Counts: exact 4, and 4 - 4·1/1 = 0 against 4 - 4·1/2 = 2.
        ("count", BEIJING, "china",
         said(("Line 1", "国贸站", "西单站", "Number of Via Stops: 2"),
              ("Line 4", "西单站", "角门西站", "Number of Via Stops: 2")),
         True, 1 + 8 + 4 + 20, 1 + 8 + 6 + 20),
        # A count where the reference is 0: nothing, but the paper divides by the larger.
        ("count", ROME, "italy",
         said(("x", "Anagnina Station", "x", "Number of Via Stops: 2"),
              ("x", "x", "Laurentina Station", "Number of Via Stops: 1")),
         False, 1 + 2 + 4, 1 + 2 + 4),
        # China, list: 3 of 3 stops named, overlap 3/3: (10 + 3)/2. A space behind the comma breaks one for the scripts:
        # then 2 named, overlap 2/4: (5 + 2)/2.
        ("list", BEIJING, "china",
         said(("Line 1", "国贸站", "西单站", "Via Stops: 东单站,王府井站"),
              ("Line 4", "西单站", "角门西站", "Via Stops: 宣武门站")),
         True, 9 + 6.5 + 20, 9 + 6.5 + 20),
        ("list", BEIJING, "china",
         said(("Line 1", "国贸站", "西单站", "Via Stops: 东单站, 王府井站"),
              ("Line 4", "西单站", "角门西站", "Via Stops: 宣武门站")),
         True, 9 + 3.5 + 20, 9 + 6.5 + 20),
        # Lists outside China: the scripts give nothing. Paper: 2 named, overlap 2/2.
        ("list", ROME, "italy",
         said(("Metro A", "Anagnina Station", "Termini Station", "Via Stops: Cinecittà Station, Lodi Station"),
              ("Metro B", "Termini Station", "Laurentina Station", "Via Stops: None")),
         True, 5 + 20, 9 + 6 + 20),
    ],
)  # fmt: skip
def test_map_scores_by_hand(
    detail: str, plan: Any, country: str, answer: str, right: bool, released: float, paper: float
) -> None:
    problem = asked(detail, plan, country=country)
    assert form_of(problem) == detail
    legs = stated_legs(answer, form_of(problem))
    assert map_score(problem, legs, right, "released") == pytest.approx(released)
    assert map_score(problem, legs, right, "paper") == pytest.approx(paper)


def test_the_best_plan_counts_and_what_is_stated_is_capped() -> None:
    other = [leg("C", "Anagnina", "Ottaviano"), leg("D", "Ottaviano", "Re"), leg("E", "Re", "Laurentina")]
    problem = asked("short", ROME, other)
    answer = said(("C", "Anagnina", "Ottaviano"), ("D", "Ottaviano", "Re"), ("E", "Re", "Laurentina"))
    legs = stated_legs(answer, "short")
    assert map_score(problem, legs, False, "paper") == 10  # 1 + 3 · 4, capped
    assert map_score(problem, legs, True, "paper") == 20


@pytest.mark.parametrize("label", ["Route Name: ", "Departure Stop: ", "Arrival Stop: "])
def test_labels_in_a_line_that_never_ends_take_no_time(label: str) -> None:
    text = "Route Name:Departure Stop:Arrival Stop:" + label * 10_000
    began = time.process_time()
    assert stated_legs(text, "count")[0].line == split_legs(text)[0][0].line == "Wrong"
    assert time.process_time() - began < 3


def test_long_answers_need_a_line_after_the_arrival() -> None:
    text = said(("A", "x", "y"))
    assert stated_legs(text, "short")[0].arrival == "y"
    assert stated_legs(text, "count")[0].arrival == "Wrong"
    counted = stated_legs(said(("A", "x", "y", "Number of Via Stops: 12")), "count")[0]
    assert (counted.arrival, counted.via_count, counted.via_stops) == ("y", 12, None)
    assert stated_legs(said(("A", "x", "y", "Via Stops: p, q")), "list")[0].via_stops == "p, q"
    assert stated_legs("route name: A\nDeparture Stop: x\nArrival Stop: y", "short") == []


@pytest.mark.parametrize("digits", [19, 400, 5000])
def test_a_model_that_repeats_a_digit_is_wrong_and_no_crash(digits: int) -> None:
    """float ends at 308 digits, int at 4,300."""
    network = {"italy/city": {"A": ["x Station", "y Station"]}}
    problem = asked("count", [leg("A", "x", "y", "w")])
    answer = Answer(said(("A", "x Station", "y Station", "Number of Via Stops: " + "9" * digits)), None)
    record = Judge(normaliser="evaluation").evaluation([problem], [answer], network).records[0]
    assert (record.correct, record.map_score, record.map_score_paper) == (True, 3 + 20, 5 + 20)
    assert lenient_answer("Counting2", f"{'9' * digits} or 3") is None


@pytest.mark.parametrize("plans", [[5], [[]], [[3]], [[leg("A", "x", "y") | {"num_via_stops": "many"}]],
                                   [[leg("A", "x", "y") | {"num_via_stops": -1}]],
                                   [[leg("A", "x", "y") | {"num_via_stops": 10**400}]],
                                   [[leg("A", "x", "y") | {"via_stops": 5}]]])  # fmt: skip
def test_reference_routes_of_another_form_are_named(plans: Any) -> None:
    problem = dataclasses.replace(asked("count", ROME), fine_grained_answer=plans)
    networks = {"italy/city": {"A": ["x Station", "y Station"]}}
    with pytest.raises(DataError, match="1 planning questions cannot get a map score, the first: p: a "):
        Judge().check([problem], networks)
    if "route_name" in str(plans):  # short questions need no via stops
        Judge().check([dataclasses.replace(problem, question=asked("short", ROME).question)], networks)


def test_thinking_is_no_part_of_a_route() -> None:
    """Draft legs inside the thinking would be read as legs; behind the tag stands the answer."""
    network = {"italy/city": {"A": ["x Station", "y Station"]}}
    problem = asked("short", [leg("A", "x", "y")])
    right = said(("A", "x Station", "y Station"))
    draft = f"<think>maybe {said(('A', 'x Station', 'z Station'))} -- </think>{right}"
    for text, correct in ((draft, True), (draft.replace("</think>", ""), False)):
        for normaliser in ("training", "evaluation"):
            judge = Judge(normaliser=normaliser)  # type: ignore[arg-type]
            assert judge.evaluation([problem], [Answer(text, None)], network).records[0].correct is correct
    assert without_thinking("a</think>b◁/think▷c") == "c"


def test_the_strict_normaliser() -> None:
    assert strict("Metro Center, *St.-George's* (Transfer Station) Station") == "centerst.george'sstation"
    assert strict("西单站（换乘站）") == "西单站"
    assert strict("a(b)c(d") == "ac(d"


@pytest.mark.parametrize("normalise", [strict, clean])
def test_brackets_that_nobody_closes_take_no_time(normalise: Callable[[str], str]) -> None:
    """A model that repeats one; 20 s when each was followed to the end."""
    began = time.process_time()
    assert normalise("(b)" + "(" * 40_000) == "(" * 40_000
    assert time.process_time() - began < 3


@pytest.mark.parametrize(
    ("kind", "text", "answer"),
    [
        ("TorF1", r"\boxed{\text{Yes}}", 1),
        ("TorF1", r"\boxed{True}", 1),
        ("TorF2", r"first \boxed{yes}, no: \boxed{F.}", 0),
        ("TorF2", "Looking at it, the answer is no.", 0),
        ("TorF1", "0", 0),
        ("TorF1", "perhaps", None),
        ("Counting1", r"\boxed{(B)}", 1),
        ("Counting1", r"\boxed{D) 3}", 3),
        ("Counting1", "The answer is c", 2),
        ("Counting1", "Delta", None),
        ("Counting2", r"\boxed{2 lines}", 2),
        ("Counting3", "I see 12 or 13", 12),
        ("Counting2", "two", None),
    ],
)
def test_lenient_reading(kind: str, text: str, answer: int | None) -> None:
    assert lenient_answer(kind, text) == answer


class Engine:
    """Answers with the question's number; dies when it has answered ``lives`` questions."""

    def __init__(self, lives: int = 10**6) -> None:
        self.asked: list[str] = []
        self.lives = lives

    def generate(self, problems: Sequence[Problem], group_size: int, sampling: SamplingParams) -> list[RolloutGroup]:
        if len(self.asked) + len(problems) > self.lives:
            raise RuntimeError("power cut")
        self.asked += [problem.uid for problem in problems]
        return [RolloutGroup(p, (), (Rollout((1, 2), (0.0, 0.0), p.question, "stop", 0),)) for p in problems]

    def update_weights(self, version: int) -> None: ...

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None: ...


def questions(count: int) -> list[Problem]:
    return [Problem(f"u{n}", b"map", f"question {n}", "TorF1", 1, "", "", "a/b", "easy") for n in range(count)]


def test_a_stopped_evaluation_goes_on_and_nothing_is_asked_twice(tmp_path: Path) -> None:
    problems, greedy, path = questions(10), SamplingParams(max_new_tokens=9), tmp_path / "answers.jsonl"
    first = Engine(lives=6)
    with pytest.raises(RuntimeError, match="power cut"):
        ask(first, problems, greedy, AnswerStore(path, "w"), batch=3)
    path.write_bytes(path.read_bytes() + '{"key": "站'.encode()[:-1])  # killed while writing, inside a letter
    second, calls = Engine(), []
    answers = ask(second, problems, greedy, AnswerStore(path, "w"), lambda *done: calls.append(done), batch=3)
    assert second.asked == [f"u{n}" for n in range(6, 10)] and calls == [(6, 10), (9, 10), (10, 10)]
    assert answers == [Answer(f"question {n}", 2) for n in range(10)]
    third = Engine()
    assert ask(third, problems[::-1], greedy, AnswerStore(path, "w")) == answers[::-1] and not third.asked


def test_kept_answers_are_of_the_same_weights_picture_and_limit(tmp_path: Path) -> None:
    problems, sampling, path = questions(1), SamplingParams(max_new_tokens=9), tmp_path / "answers.jsonl"
    ask(Engine(), problems, sampling, AnswerStore(path, "w"))
    picture = tmp_path / "map.png"
    picture.write_bytes(b"map")
    same_picture = [dataclasses.replace(problems[0], image=str(picture), uid="other uid")]
    for model, asked_now, limit, again in (
        ("w", problems, 9, 0),
        ("w", same_picture, 9, 0),
        ("v", problems, 9, 1),
        ("w", problems, 8, 1),
        ("w", [dataclasses.replace(problems[0], image=b"other")], 9, 1),
    ):
        engine = Engine()
        ask(engine, asked_now, SamplingParams(max_new_tokens=limit), AnswerStore(path, model))
        assert len(engine.asked) == again
    with pytest.raises(DataError, match=r"u0: .*gone\.png"):
        missing = [dataclasses.replace(problems[0], image=str(tmp_path / "gone.png"))]
        ask(Engine(), missing, sampling, AnswerStore(path, "w"))
    path.write_text("{}\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"answers\.jsonl, line 1"):
        AnswerStore(path, "w")


def test_a_checkpoint_is_known_by_its_content(tmp_path: Path) -> None:
    for name, content in (("model.safetensors", b"1"), ("config.json", b"{}"), ("optimizer.safetensors", b"2")):
        (tmp_path / name).write_bytes(content)
    before = digest_folder(tmp_path)
    (tmp_path / "optimizer.safetensors").write_bytes(b"3")
    assert digest_folder(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"4")
    assert digest_folder(tmp_path) != before
