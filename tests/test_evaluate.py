"""Held-out accuracy against hand-made cases: weights, intervals, controls."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from rewardmap.evaluate import (
    DIRECT,
    TRANSFER,
    Evaluation,
    Judge,
    Record,
    ask,
    evaluation_weight,
    swap_maps,
    text_prior,
)
from rewardmap.rewards import Rubric
from rewardmap.rollout.engine import RolloutEngine
from rewardmap.transit.questions import gold_response, question_text
from rewardmap.types import DataError, Problem, Rollout, RolloutGroup, SamplingParams

NETWORK = {
    "Red Line": ["A Station", "B Station (Transfer Station)", "C Station"],
    "Blue Line": ["D Station", "B Station (Transfer Station)", "E Station"],
}


def problem(kind: str, answer: int = 1, city: str = "m0", uid: str = "", **fields: object) -> Problem:
    base = Problem(
        uid=uid or f"{city}-{kind}-{answer}",
        image=f"/maps/{city}.png",
        question=question_text(kind, "A Station", "C Station", (0, 1, 2, 3)),
        kind=kind,
        answer=answer,
        station_1="A Station",
        station_2="C Station",
        network_id=f"land/{city}",
        map_difficulty="easy",
    )
    return dataclasses.replace(base, **fields)  # type: ignore[arg-type]


def record(city: int, correct: bool, weight: float = 1.0, kind: str = "TorF1", number: int = 0) -> Record:
    return Record(f"{city}-{kind}-{number}", kind, f"land/{city}", "easy", 0, weight, correct, correct, "", 2)


@pytest.mark.parametrize(
    ("kind", "level", "transfers", "weight"),
    [
        # ReasonMap-Plus: by map alone, whatever the question.
        ("TorF1", "easy", 0, 1.0),
        ("Counting1", "middle", 0, 1.5),
        ("Counting3", "hard", 0, 2.0),
        # ReasonMap: (question, map) = ee, me, em, he, mm, eh, mh, hm, hh.
        ("planning", "easy", 0, 1.0),
        ("planning", "easy", 1, 1.5),
        ("planning", "middle", 0, 1.5),
        ("planning", "easy", 2, 2.0),
        ("planning", "middle", 1, 2.0),
        ("planning", "hard", 0, 2.0),
        ("planning", "hard", 1, 2.5),
        ("planning", "middle", 2, 2.5),
        ("planning", "hard", 3, 3.0),
    ],
)
def test_benchmark_weights(kind: str, level: str, transfers: int, weight: float) -> None:
    asked = problem(kind, map_difficulty=level, transfers_required=transfers)
    assert evaluation_weight(asked) == weight


def test_published_sum_of_weights() -> None:
    """The 312 test questions of ReasonMap by (question, map) level weigh 576 together."""
    buckets = {"ee": 55, "em": 46, "eh": 80, "me": 28, "mm": 23, "mh": 57, "he": 7, "hm": 1, "hh": 15}
    levels = {"e": "easy", "m": "middle", "h": "hard"}
    total = sum(
        count
        * evaluation_weight(
            problem("planning", map_difficulty=levels[pair[1]], transfers_required="emh".index(pair[0]))
        )
        for pair, count in buckets.items()
    )
    assert sum(buckets.values()) == 312
    assert total == 576


def test_unknown_difficulty_is_named() -> None:
    with pytest.raises(DataError, match=r"m0-TorF1-1.*'medium'.*middle"):
        evaluation_weight(problem("TorF1", map_difficulty="medium"))


def test_metrics_by_hand() -> None:
    route = {
        "kind": "planning",
        "network_id": "land/9",
        "map_difficulty": "hard",
        "response": "",
        "num_tokens": 5,
    }
    records = (
        record(0, True, 1.0),
        record(1, False, 2.0),
        Record(uid="d", transfers_required=0, weight=2.0, correct=True, format_valid=True, **route),
        Record(uid="t", transfers_required=2, weight=3.0, correct=False, format_valid=True, **route),
    )
    evaluation = Evaluation(records)
    assert evaluation.weighted_accuracy == pytest.approx((1 + 2) / 8)
    assert evaluation.format_valid == pytest.approx(3 / 4)
    assert evaluation.num_tokens == 14
    assert evaluation.groups == ("TorF1", "planning", DIRECT, TRANSFER)
    values = {group: evaluation.estimate(group).value for group in evaluation.groups}
    assert values == {"TorF1": 0.5, "planning": 0.5, DIRECT: 1.0, TRANSFER: 0.0}
    assert evaluation.estimate("planning").n == 2
    with pytest.raises(ValueError, match=r"accurracy.*weighted_accuracy"):
        evaluation.estimate("accurracy")


def test_no_answers_is_an_error() -> None:
    with pytest.raises(ValueError, match="empty"):
        Evaluation(())


def test_intervals_are_over_maps_not_questions() -> None:
    """40 maps of 25 questions that agree within a map tell as much as 40 coin flips, not 1,000."""
    rng = np.random.default_rng(3)
    lucky = rng.random(40) < 0.5
    clustered = Evaluation(tuple(record(m, bool(lucky[m]), number=i) for m in range(40) for i in range(25)))
    found = clustered.estimate()
    expected = 1.96 * np.sqrt(lucky.mean() * (1 - lucky.mean()) / 40)
    assert (found.high - found.low) / 2 == pytest.approx(expected, rel=0.1)
    assert found.low < found.value < found.high


def test_interval_covers_the_truth() -> None:
    """About 95 of 100 intervals of samples with accuracy 0.7 hold 0.7."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        answers = rng.random((60, 4)) < 0.7
        records = tuple(record(m, bool(answers[m, i]), number=i) for m in range(60) for i in range(4))
        estimate = Evaluation(records).estimate()
        covered += estimate.low <= 0.7 <= estimate.high
    assert 88 <= covered <= 99


def test_one_map_has_no_interval() -> None:
    estimate = Evaluation((record(0, True), record(0, False, number=1))).estimate()
    assert estimate.value == 0.5
    assert np.isnan([estimate.low, estimate.high]).all()
    among_others = Evaluation((record(0, True), record(1, False), record(1, True, kind="Counting3")))
    for estimate in (among_others.estimate("Counting3"), among_others.gain_over(among_others, "Counting3")):
        assert estimate.interval is None
    assert among_others.estimate("TorF1").interval == [0.0, 1.0]


def test_same_seed_same_interval() -> None:
    evaluation = Evaluation(tuple(record(m, m % 3 == 0, weight=1 + m / 7) for m in range(30)))
    assert evaluation.estimate(seed=1) == evaluation.estimate(seed=1) != evaluation.estimate(seed=2)


def test_a_paired_gain_is_sharper_than_two_intervals() -> None:
    """Maps of very different difficulty, each one question of ten better: pairing removes the spread."""
    before = Evaluation(tuple(record(m, i < m % 9, number=i) for m in range(45) for i in range(10)))
    after = Evaluation(tuple(record(m, i < m % 9 + 1, number=i) for m in range(45) for i in range(10)))
    gain = after.gain_over(before)
    assert gain.value == pytest.approx(0.1)
    assert gain.high - gain.low < 1e-9
    assert after.estimate().low < before.estimate().high
    assert after.gain_over(after).value == 0


def test_a_paired_gain_needs_the_same_questions() -> None:
    first = Evaluation((record(0, True), record(1, True)))
    with pytest.raises(ValueError, match="same questions"):
        first.gain_over(Evaluation((record(1, True), record(0, True))))


def test_jsonl_round_trip_and_bad_lines(tmp_path: Path) -> None:
    evaluation = Evaluation((dataclasses.replace(record(0, True), response="Tøyen\n“x” 济南"), record(1, False)))
    path = tmp_path / "after.jsonl"
    evaluation.to_jsonl(path)
    assert Evaluation.from_jsonl(path) == evaluation
    assert [file.name for file in tmp_path.iterdir()] == ["after.jsonl"]
    path.write_text(path.read_text(encoding="utf-8") + '{"uid": 3}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"after\.jsonl, line 3"):
        Evaluation.from_jsonl(path)


class ScriptedEngine:
    """Answers right where ``knows`` says so, from the picture it is shown."""

    def __init__(self, pictures: dict[str, Problem]) -> None:
        self.seen: list[tuple[int, SamplingParams]] = []
        self._pictures = pictures

    def generate(self, problems: Sequence[Problem], group_size: int, sampling: SamplingParams) -> list[RolloutGroup]:
        self.seen.append((len(problems), sampling))
        groups = []
        for asked in problems:
            shown = self._pictures[f"{asked.image!r}{asked.kind}"]
            rollout = Rollout((1, 2, 3), (0.0,) * 3, gold_response(shown), "stop", 4)
            groups.append(RolloutGroup(asked, (7,), (rollout,) * group_size))
        return groups

    def update_weights(self, version: int) -> None: ...

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None: ...


def counting_data(cities: int) -> tuple[list[Problem], dict[str, dict[str, list[str]]]]:
    problems = [
        problem(kind, answer=city, city=f"m{city}") for city in range(cities) for kind in ("Counting2", "Counting3")
    ]
    return problems, {item.network_id: NETWORK for item in problems}


def test_asking_is_greedy_batched_and_in_order() -> None:
    problems, networks = counting_data(5)
    engine = ScriptedEngine({f"{item.image!r}{item.kind}": item for item in problems})
    assert isinstance(engine, RolloutEngine)
    calls: list[tuple[int, int]] = []
    sampling = SamplingParams(temperature=0.7, max_new_tokens=33)
    answers = ask(engine, problems, sampling, progress=lambda done, of: calls.append((done, of)), batch=4)
    result = Judge().evaluation(problems, answers, networks)
    assert [item.uid for item in result.records] == [item.uid for item in problems]
    assert calls == [(4, 10), (8, 10), (10, 10)]
    assert [count for count, _ in engine.seen] == [4, 4, 2]
    assert all(used == SamplingParams(temperature=0.0, max_new_tokens=33) for _, used in engine.seen)
    assert result.weighted_accuracy == result.format_valid == 1.0
    assert result.num_tokens == 30


def test_swapped_maps_expose_who_reads_the_picture() -> None:
    problems, networks = counting_data(6)
    engine = ScriptedEngine({f"{item.image!r}{item.kind}": item for item in problems})
    swapped = swap_maps(problems, seed=5)
    for before, after in zip(problems, swapped, strict=True):
        assert after.image != before.image
        assert dataclasses.replace(after, image=before.image) == before
    assert {item.image for item in swapped} == {item.image for item in problems}
    assert swapped == swap_maps(problems, seed=5) != swap_maps(problems, seed=6)
    answers = ask(engine, swapped, SamplingParams())
    assert Judge().evaluation(swapped, answers, networks).weighted_accuracy == 0.0


def test_one_map_cannot_be_swapped() -> None:
    with pytest.raises(ValueError, match="two"):
        swap_maps([problem("TorF1"), problem("TorF2")], seed=0)


def test_text_prior_finds_what_the_words_give_away() -> None:
    """The line decides TorF2; 2 is right if offered; the Red Line joins A and C on three of four maps."""
    lines = ("Red Line", "Blue Line")
    other = {"Red Line": ["A Station", "B Station"], "Blue Line": ["B Station", "C Station", "A Station"]}
    networks = {f"land/{side}{i}": other if i == 3 else NETWORK for side in ("a", "b") for i in range(4)}
    train, test = (
        [
            item
            for i in range(4)
            for item in (
                problem("TorF2", int(i % 2), f"{side}{i}", station_2=lines[i % 2]),
                problem("Counting1", (i + 2) % 4, f"{side}{i}", question=choices(i)),
                problem("planning", -1, f"{side}{i}", fine_grained_answer=[[leg()]]),
            )
        ]
        for side in ("a", "b")
    )
    prior = text_prior(train, test, networks, Rubric())
    assert prior.kinds == {"TorF2": 1.0, "Counting1": 1.0, "planning": 0.75}
    assert prior.policies["TorF2"] == "most frequent for station_2"
    assert prior.policies["Counting1"] == "the number most often right"
    assert prior.policies["planning"] == "one leg on Red Line"
    assert prior.weighted_accuracy == pytest.approx((4 + 4 + 3) / 12)


def choices(shift: int) -> str:
    """The offered numbers, 2 at index (shift + 2) % 4; the others such that neither place nor rank helps."""
    numbers = [[0, 1, 2, 9], [2, 3, 9, 2 + 5], [2, 0, 1, 3], [8, 2, 0, 1]][shift]
    numbers.remove(2)
    numbers.insert((shift + 2) % 4, 2)
    return question_text("Counting1", "A Station", "C Station", numbers)


def leg() -> dict[str, object]:
    return {"route_name": "Red Line", "departure_stop": "A Station", "arrival_stop": "C Station"}


def test_text_prior_of_two_legs() -> None:
    legs = [
        {"route_name": "Red Line", "departure_stop": "A Station", "arrival_stop": "B Station"},
        {"route_name": "Blue Line", "departure_stop": "B Station", "arrival_stop": "E Station"},
    ]
    asked = problem("planning", -1, station_2="E Station", transfers_required=1, fine_grained_answer=[legs])
    prior = text_prior([asked], [asked], {asked.network_id: NETWORK}, Rubric())
    assert prior.kinds == {"planning": 1.0}
    assert prior.policies == {"planning": "two legs, Red Line / B Station / Blue Line"}


def test_a_question_without_choices_is_no_error_when_the_run_is_over() -> None:
    for question in ("How many?", "How many?\nA) 1\nB) 2\nC) 3\nD) " + "9" * 5000):
        asked = problem("Counting1", question=question)
        prior = text_prior([asked], [asked], {asked.network_id: NETWORK}, Rubric())
        assert prior.policies == {"Counting1": f"always {asked.answer}"}
