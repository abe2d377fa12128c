"""``reference`` mode against the published implementation's own scores, and its quirks one by one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rewardmap.rewards import FAILURES, Rubric
from rewardmap.rewards.parse import clean, clean_network, extract_answer, strip_markers
from rewardmap.rewards.score import score_reference
from rewardmap.types import DataError, MetroData, Problem

SHARED = Path(__file__).parents[2] / "shared"
needs_shared = pytest.mark.skipif(not (SHARED / "spec").is_dir(), reason="the published scores are not here")

TOY: MetroData = {
    "Red Line": [f"{name} Station" for name in ("Alpha", "Bravo", "Charlie", "Delta", "Echo")],
    "Blue Line": [f"{name} Station" for name in ("Foxtrot", "Charlie", "Golf", "Hotel")],
    "Gold Line": [f"{name} Station" for name in ("Hotel", "India", "Juliet")],
}


def problem(kind: str = "planning", **fields: object) -> Problem:
    values: dict[str, object] = {
        "uid": "toy-1", "image": b"", "question": "", "answer": -1, "station_1": "Alpha Station",
        "station_2": "Echo Station", "network_id": "toy", "map_difficulty": "easy", "transfers_required": 0,
    }  # fmt: skip
    return Problem(kind=kind, **{**values, **fields})  # type: ignore[arg-type]


def leg(line: str, start: str, end: str) -> str:
    return f"Route Name: {line}\nDeparture Stop: {start}\nArrival Stop: {end}"


def plan(*legs: tuple[str, str, str]) -> str:
    return "\n--\n".join(leg(*one) for one in legs)


@needs_shared
def test_every_published_case() -> None:
    rubric = Rubric()
    for case in json.loads((SHARED / "spec" / "reward_cases.json").read_text("utf-8")):
        outcome = score_reference(
            case["type"],
            case["response"],
            case["ground_truth"],
            clean(case["station_1"]),
            clean(case["station_2"]),
            case["question_transfer_count"],
            clean_network("case", case["metro"]),
        )
        if case["acc"] is not None:
            assert (outcome.correct, outcome.detail) == (case["acc"], case["detail"]), case["id"]
        score = 10 * outcome.correct + 0.5 * outcome.detail
        assert score == pytest.approx(case["score_unweighted"], abs=1e-9), case["id"]
        if isinstance(case["ground_truth"], int):
            asked = problem(
                case["type"],
                uid=case["id"],
                answer=case["ground_truth"],
                station_1=case["station_1"],
                station_2=case["station_2"],
                map_difficulty=case["difficulty_city"],
                transfers_required=case["question_transfer_count"],
            )
            batch = rubric.score([asked], [case["response"]], {"toy": case["metro"]})
            assert batch.score[0] == pytest.approx(case["score"], abs=1e-9), case["id"]


@needs_shared
def test_every_published_row_in_one_batch() -> None:
    with (SHARED / "spec" / "reward_rows.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(row) for row in file]
    networks = {
        city: json.loads((SHARED / "data" / "stations" / f"{city}.json").read_text("utf-8"))
        for city in {row["city"] for row in rows}
    }
    problems = [
        problem(
            row["type"],
            uid=f"row-{i}",
            answer=row["ground_truth"],
            station_1=row["station_1"],
            station_2=row["station_2"],
            network_id=row["city"],
            map_difficulty=row["difficulty_city"],
            transfers_required=row["question_transfer_count"],
        )
        for i, row in enumerate(rows)
    ]
    batch = Rubric().score(problems, [row["response"] for row in rows], networks)
    worst = max(range(len(rows)), key=lambda i: abs(batch.score[i] - rows[i]["score"]))
    assert batch.score[worst] == pytest.approx(rows[worst]["score"], abs=1e-9), rows[worst]


@pytest.mark.parametrize(
    ("name", "once"),
    [
        ("York University Station", "yorkuniversityersity"),
        ("York Univ", "yorkuniversity"),
        ("Broadway", "bluway"),
        ("Metro Center", "center"),
        ("Metropolitan Av", "politanav"),
        ("135 St Stations", "135sts"),
        ("东管头南站 ", "东管头南站"),
        ("长沙火车南站站", "长沙火车南站"),
        ("Asian Games Village Station", "yayuncun"),
        ("X（a)-(b）Y", "xy"),
        ("UNION STATION", "unionstation"),
        ("A\u2003B\x1cC", "abc"),
    ],
)
def test_clean(name: str, once: str) -> None:
    assert clean(name) == once


def test_clean_is_not_idempotent_and_markers_are_exact() -> None:
    assert clean(clean("UNION STATION")) == "union"
    assert strip_markers("Court St (Transfer Station)") == "Court St"
    assert strip_markers("Court St(Transfer Station)") == "Court St(Transfer Station)"
    assert strip_markers("国贸站（换乘站）（支线起始站）") == "国贸站"


@pytest.mark.parametrize(
    ("response", "text"),
    [
        (r"I think \boxed{no}. Wait \boxed{yes", r"\boxed{yes"),
        (r"\boxed{Alpha=Bravo=yes}", "yes"),
        (r"x \approx y = 3", "3"),
        ("The answer is : 4.", "4"),
        ("The correct answer is yes\nbecause", "yes"),
        (r"\boxed{\\text yes}", "yes"),
        (r"\boxed{.}", "0"),
        (r"\boxed{1_0}", "1_0"),
        (r"\boxed{a}{b}", "a"),
        (r"\boxed{7 km}", "7"),
        (r"\boxed{\ap km prox 5}", "5"),
        ("oxed{", "oxed{"),
        ("", ""),
    ],
)
def test_extract_answer(response: str, text: str) -> None:
    assert extract_answer(response) == text


@pytest.mark.parametrize(
    ("kind", "gold", "response", "correct"),
    [
        ("Counting2", 3, r"\boxed{٣}", True),
        ("Counting2", 10, r"\boxed{1_0}", True),
        ("Counting2", 0, r"\boxed{.}", True),
        ("Counting2", 2, "\\boxed{\t2\u00a0}", True),
        ("Counting2", "2", r"\boxed{2}", False),
        ("Counting2", 1, r"\boxed{" + "1" * 5000 + "}", False),
        ("Counting1", 1, r"\boxed{b.}", True),
        ("Counting1", 1, r"\boxed{1}", False),
        ("TorF1", 5, r"\boxed{no}", True),
        ("TorF1", "1", r"\boxed{yes}", False),
    ],
)
def test_short_answers(kind: str, gold: object, response: str, correct: bool) -> None:
    assert score_reference(kind, response, gold, "", "", 0, {}).correct is correct


@pytest.mark.parametrize(
    ("response", "failure", "valid"),
    [
        (plan(("Red Line", "Alpha", "Echo")), "none", True),
        ("  ", "no_answer", False),
        ("I cannot read the map.", "bad_format", False),
        (plan(("Red Line", "Bravo", "Echo")), "endpoint", True),
        (plan(("Purple Line", "Alpha", "Echo")), "unknown_line", True),
        (plan(("Blue Line", "Alpha", "Echo")), "stop_not_on_line", True),
        (plan(("Red Line", "Alpha", "Charlie"), ("Red Line", "Delta", "Echo")), "broken_transfer", True),
        (plan(("Red Line", "Alpha", "Echo")) + "--Route Name: Red Line", "none", False),
        ("Route Name:Red\nDeparture Stop: Alpha\nArrival Stop: Echo", "unknown_line", False),
        ("Route Name: Red Line\nDeparture Stop: Alpha\nArrival Stop: ", "endpoint", False),
        ("route name: Red Line\nDeparture Stop: Alpha\nArrival Stop: Echo", "bad_format", False),
    ],
)
def test_failures_of_routes(response: str, failure: str, valid: bool) -> None:
    batch = Rubric().score([problem()], [response], {"toy": TOY})
    assert FAILURES[batch.failure[0]] == failure
    assert bool(batch.format_valid[0]) is valid
    assert bool(batch.correct[0]) is (failure == "none")


@pytest.mark.parametrize(
    ("kind", "gold", "response", "failure", "valid"),
    [
        ("TorF1", 1, r"\boxed{yes}", "none", True),
        ("TorF1", 1, "yes", "none", False),
        ("TorF1", 1, r"\boxed{no}", "wrong", True),
        ("TorF1", 1, r"\boxed{perhaps}", "bad_format", False),
        ("Counting1", 2, r"\boxed{a}", "wrong", True),
        ("Counting3", 2, r"\boxed{two}", "bad_format", False),
        ("Counting3", 2, "", "no_answer", False),
    ],
)
def test_failures_of_short_answers(kind: str, gold: int, response: str, failure: str, valid: bool) -> None:
    batch = Rubric().score([problem(kind, answer=gold)], [response], {"toy": TOY})
    assert FAILURES[batch.failure[0]] == failure
    assert bool(batch.format_valid[0]) is valid


def test_weights_and_where_they_act() -> None:
    levels = ("easy", "middle", "hard")
    asked = [problem(map_difficulty=level, transfers_required=n) for level in levels for n in (0, 2)]
    answers = ["nothing"] * 5 + [plan(("Red Line", "Alpha", "Charlie"), ("Red Line", "Charlie", "Echo"))]
    on_reward = Rubric().score(asked, answers, {"toy": TOY})
    on_advantage = Rubric(weight_on="advantage").score(asked, answers, {"toy": TOY})
    assert on_reward.weight.tolist() == [1.0, 1.5, 1.2, 1.7, 1.5, 2.0]
    assert on_reward.score[5] == 2 * on_advantage.score[5] == 2 * (10 + 0.5 * 9)
    assert on_reward.advantage_weight.tolist() == [1.0] * 6
    assert on_advantage.advantage_weight.tolist() == on_reward.weight.tolist()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"kind": "Counting9"}, "'kind'"),
        ({"map_difficulty": "medium"}, "'map_difficulty'"),
        ({"answer": "2"}, "'answer'"),
        ({"answer": True}, "'answer'"),
        ({"transfers_required": -1}, "'transfers_required'"),
        ({"transfers_required": 10**30}, "'transfers_required'"),
        ({"station_1": None}, "'station_1'"),
        ({"network_id": "atlantis"}, "'network_id'"),
    ],
)
def test_bad_rows_name_uid_and_field(fields: dict[str, object], named: str) -> None:
    with pytest.raises(DataError, match="'row-7'") as error:
        Rubric().score([problem(**{"uid": "row-7", **fields})], [""], {"toy": TOY})  # type: ignore[arg-type]
    assert named in str(error.value)


def test_wrong_lengths_modes_and_networks() -> None:
    with pytest.raises(ValueError, match="1 problems but 0 responses"):
        Rubric().score([problem()], [], {"toy": TOY})
    with pytest.raises(ValueError, match="mode"):
        Rubric(mode="kind")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight_on"):
        Rubric(weight_on="loss")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="map_weights"):
        Rubric(map_weights={"easy": 1.0})
    with pytest.raises(DataError, match="line 'A'"):
        Rubric().score([problem()], [""], {"toy": {"A": "Alpha"}})


def test_an_exchanged_network_is_read_again() -> None:
    rubric = Rubric()
    answer = plan(("Red Line", "Alpha", "Echo"))
    assert rubric.score([problem()], [answer], {"toy": TOY}).correct[0]
    assert not rubric.score([problem()], [answer], {"toy": {"Red Line": ["Alpha", "Bravo"]}}).correct[0]


@pytest.mark.parametrize(
    "options",
    [{"format_reward": 1.0}, {"threads": 0}, {"mode": "graph", "alpha": -1.0}],
)
def test_options_that_a_mode_does_not_have_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="|".join(options)):
        Rubric(**options)  # type: ignore[arg-type]
