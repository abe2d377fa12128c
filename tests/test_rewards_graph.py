"""``graph`` mode by example: names, branches and rings, homonyms, short answers, and what it refuses."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewardmap.rewards import FAILURES, Rubric
from rewardmap.rewards.graph import read_legs
from rewardmap.rewards.topology import fold, line_key, station_key
from rewardmap.transit.graph import Branch, Line, Network
from rewardmap.transit.topology import network_from_lists
from rewardmap.types import DataError, Problem

RUBRIC = Rubric(mode="graph")
Plan = tuple[tuple[str, str, str], ...]


def question(start: str, goal: str, **fields: object) -> Problem:
    values: dict[str, object] = {
        "uid": "q-1", "image": b"", "question": "", "kind": "planning", "answer": -1, "network_id": "made/up",
        "map_difficulty": "easy", "station_1": start, "station_2": goal,
    }  # fmt: skip
    return Problem(**{**values, **fields})  # type: ignore[arg-type]


def text(plan: Plan) -> str:
    return "\n--\n".join(f"Route Name: {a}\nDeparture Stop: {b}\nArrival Stop: {c}" for a, b, c in plan)


def score(asked: Problem, answer: str, network: object) -> tuple[float, bool, str]:
    batch = RUBRIC.score([asked], [answer], {"made/up": network})  # type: ignore[dict-item]
    return float(batch.score[0]), bool(batch.correct[0]), FAILURES[batch.failure[0]]


@given(
    st.one_of(
        st.text(),
        st.lists(st.sampled_from(["Station", "站", "地铁", "Line", "线", "ß", "Å", "１"])).map("".join),
    )
)
def test_keys_are_idempotent(name: str) -> None:
    assert fold(fold(name)) == fold(name)
    assert station_key(station_key(name)) == station_key(name)
    assert line_key(line_key(name)) == line_key(name)


def test_keys() -> None:
    assert {line_key(n) for n in ("Line 1", "Route 1", "1", "1号线", "LINE 1", "地铁1号线")} == {"1"}
    assert {station_key(n) for n in ("国贸站", "国贸", "国贸站（换乘站）", "国贸地铁站")} == {"国贸"}
    assert {station_key(n) for n in ("St. George Station", "st george", "ST GEORGE STATION")} == {"stgeorge"}
    assert station_key("Waitematā (Britomart) Station") == station_key("waitemata britomart")
    assert station_key("Station") == "station"
    assert station_key("合肥火车站") == station_key("合肥火车") == "合肥火车"


BRANCHED = Network(
    "made/up",
    "easy",
    (
        Line("Red Line", "#f00", ("A1", "A2", "A3", "A4"), branches=(Branch(("A2", "B1", "B2")),)),
        Line("Ring", "#0f0", ("A3", "R1", "R2", "R3", "R4", "B2"), loop=True),
    ),
    {},
)


@pytest.mark.parametrize(
    ("plan", "failure", "earned"),
    [
        ((("Red Line", "A4", "A2"), ("Red Line", "A2", "B2")), "not_optimal", 12.5),
        ((("Red Line", "A4", "B2"),), "wrong_branch", 0.0),
        ((("Red Line", "A4", "A3"), ("Ring", "A3", "B2")), "none", 15.0),
        ((("Red Line", "A4", "A3"), ("Ring", "A3", "R4"), ("Ring", "R4", "B2")), "repeated_stop", None),
        ((("Ring", "A4", "B2"),), "stop_not_on_line", 0.0),
        ((("Green", "A4", "B2"),), "unknown_line", 0.0),
        ((("Red Line", "A1", "B2"),), "endpoint", 0.0),
        ((("Red Line", "A4", "A2"), ("Red Line", "A1", "B2")), "broken_transfer", None),
        ((("Red Line", "A4", "A2"),), "endpoint", None),
    ],
)
def test_branches_rings_and_failures(plan: Plan, failure: str, earned: float | None) -> None:
    got, _, why = score(question("A4", "B2"), text(plan), BRANCHED)
    assert why == failure
    assert got == earned if earned is not None else 0.0 < got < 5.0


def test_a_detour_that_can_be_ridden_is_right_but_worth_less() -> None:
    """Three stops around the ring instead of the two legs' shortest; and one train taken as two legs."""
    asked = question("A1", "A4")
    split = text((("Red Line", "A1", "A2"), ("Red Line", "A2", "A4")))
    assert score(asked, split, BRANCHED) == (12.5, True, "not_optimal")
    assert score(asked, text((("Red Line", "A1", "A4"),)), BRANCHED)[0] == 15.0


def test_flat_lists_are_enough_for_lines_stops_and_transfers() -> None:
    metro = BRANCHED.metro_data()
    asked = question("A4", "B2")
    assert score(asked, text((("Red Line", "A4", "B2"),)), metro) == (15.0, True, "none")
    assert score(asked, text((("Red Line", "A4", "A3"), ("Ring", "A3", "B2"))), metro) == (
        12.5,
        True,
        "not_optimal",
    )
    assert score(asked, text((("Ring", "A4", "B2"),)), metro)[2] == "stop_not_on_line"


def test_stops_that_share_a_key_stay_apart() -> None:
    network = Network(
        "made/up",
        "easy",
        (
            Line("Red", "#f00", ("Start", "St. John")),
            Line("Blue", "#00f", ("St John", "Goal")),
            Line("Gold", "#ff0", ("Start", "Hub", "Goal")),
        ),
        {},
    )
    asked = question("Start", "Goal")
    fake = text((("Red", "Start", "St John"), ("Blue", "St John", "Goal")))
    assert score(asked, fake, network)[1:] == (False, "stop_not_on_line")
    assert score(asked, text((("Gold", "Start", "Goal"),)), network)[1]


def test_a_question_that_ends_where_it_starts_earns_nothing() -> None:
    for plan in ((("Red Line", "A1", "A1"),), (("Red Line", "A1", "A3"), ("Red Line", "A3", "A1"))):
        assert score(question("A1", "a1 Station"), text(plan), BRANCHED) == (0.0, False, "repeated_stop")
    assert score(question("A1", "A1"), "?", BRANCHED) == (0.0, False, "bad_format")


def test_a_question_means_the_stop_that_is_spelt_so() -> None:
    """An answer's name may mean either of two stops of one key; the route must still end at the right one."""
    lines = (Line("Red", "#f00", ("Start", "St. John")), Line("Blue", "#00f", ("Start", "Hub", "St John")))
    network = Network("made/up", "easy", lines, {})
    asked = question("Start", "St John")
    assert score(asked, text((("Blue", "start", "ST JOHN"),)), network) == (15.0, True, "none")
    assert score(asked, text((("Red", "start", "st. john"),)), network)[1:] == (False, "endpoint")
    between = text((("Red", "St John", "Start"), ("Blue", "Start", "St John")))
    assert score(question("St. John", "St John"), between, network) == (15.0, True, "none")
    assert score(question("St John", "St. John"), between, network)[1:] == (False, "stop_not_on_line")
    assert score(question("Start", "st john station"), text((("Red", "Start", "St John"),)), network)[1]


def test_spellings_in_released_lists_are_one_station() -> None:
    lists = {
        "1": ["Union Sq Station Station (Transfer Station)", "Park (110 St) Station", "South Station"],
        "2": ["Union Sq Station", "West Station", "Park Station (110 St)"],
        "3": ["Park(110 St)(Transfer Station)", "North Station"],
    }
    plan = (("1", "South", "Park"), ("3", "Park (110 St)", "North"))
    other = (("2", "West", "Union Sq"), ("1", "Union Sq Station", "Park (to the right)"), ("3", "Park", "North"))
    for network in (lists, network_from_lists("made/up", lists)):
        assert score(question("South Station", "North Station"), text(plan), network) == (15.0, True, "none")
        assert score(question("West Station", "North Station"), text(other), network)[1:] == (True, "not_optimal")


def test_stops_that_brackets_tell_apart_in_lists_are_two() -> None:
    lists = {"Red": ["Start", "Airport (T1)（换乘站）", "Airport (T2)"], "Blue": ["Airport（T1） Station", "Goal"]}
    for network in (lists, network_from_lists("made/up", lists)):
        between = question("Airport (T1)", "Airport (T2)")
        assert score(between, text((("Red", "Airport (T1)", "Airport T2"),)), network) == (15.0, True, "none")
        assert score(between, text((("Red", "Airport (T1)", "Airport"),)), network)[2] == "stop_not_on_line"
        asked = question("Start", "Goal")
        right = text((("Red", "Start", "Airport (T1)"), ("Blue", "Airport T1", "Goal")))
        assert score(asked, right, network) == (15.0, True, "none")
        assert not score(asked, right.replace("T1", "T2"), network)[1]


def test_a_list_with_a_branch_from_nobody_knows_where() -> None:
    """What stands between two stops of the list may lie on another branch: nothing is passed twice there."""
    stops = ["West", "Fork (Branch-starting Station)", "East", "End", "North", "Tip"]
    lists = {"Red": stops, "Blue": ["Bus", "East"]}
    asked = question("Tip", "End")
    for network in (lists, network_from_lists("made/up", lists)):
        change = text((("Red", "Tip", "Fork"), ("Red", "Fork", "End")))
        assert score(asked, change, network)[1:] == (True, "not_optimal")
        assert score(asked, text((("Red", "Tip", "End"),)), network) == (15.0, True, "none")
        back = text((("Red", "Tip", "Fork"), ("Red", "Fork", "Tip"), ("Red", "Tip", "End")))
        assert score(asked, back, network)[1:] == (False, "repeated_stop")


def test_brackets_behind_a_line_do_not_matter() -> None:
    lines = {"Line 1": ["Start", "Hub"], "Line 1 (Express)": ["Start", "Goal"]}
    asked = question("Start", "Goal")
    assert score(asked, text((("Line 1 (Express)", "Start", "Goal"),)), lines)[1]
    assert score(question("Start", "Hub"), text((("1号线（红色）", "Start", "Hub"),)), lines) == (15.0, True, "none")
    assert score(asked, text((("Line 1 (to Goal)", "Start", "Goal"),)), lines)[2] == "stop_not_on_line"
    assert score(asked, text((("(Line 1)", "Start", "Goal"),)), lines)[2] == "stop_not_on_line"
    assert score(asked, text((("Rail (Line 1)", "Start", "Goal"),)), lines)[2] == "unknown_line"


def test_bracketed_text_may_be_left_out_where_it_says_nothing() -> None:
    stops = ("Start", "Hub (North)", "Hub (South)", "Waitematā (Britomart) Station")
    network = Network("made/up", "easy", (Line("Red", "#f00", stops),), {})
    for name in ("Waitemata", "waitematā (britomart)", "WAITEMATA BRITOMART", "Waitematā（换乘站）", "Waitemata (x)"):
        assert score(question("Start", stops[-1]), text((("Red", "Start (here)", name),)), network)[1], name
    assert score(question("Start", stops[1]), text((("Red", "Start", "Hub (North)"),)), network)[1]
    assert score(question("Start", stops[1]), text((("Red", "Start", "Hub"),)), network)[2] == "stop_not_on_line"


def short(kind: str, answer: int, response: str, gold: object = None) -> tuple[float, bool, str]:
    asked = question("Alpha", "Bravo", kind=kind, answer=answer, fine_grained_answer=gold)
    return score(asked, response, {"Red": ["Alpha", "Bravo"]})


@pytest.mark.parametrize("kind", ["TorF1", "Counting1", "Counting2", "Counting3"])
def test_short_answers_right_above_wrong_above_garbage(kind: str) -> None:
    say = {"TorF1": ("yes", "no"), "Counting1": ("B", "c")}.get(kind, ("1", "2"))
    right = short(kind, 1, rf"\boxed{{{say[0]}}}")
    wrong = short(kind, 1, rf"\boxed{{{say[1]}}}")
    garbage = short(kind, 1, r"\boxed{perhaps}")
    hedged = short(kind, 1, rf"\boxed{{{say[1]}}} or \boxed{{{say[0]}}}")
    assert right == (15.0, True, "none")
    assert garbage == (0.0, False, "bad_format") == hedged
    assert garbage[0] <= wrong[0] <= 5.0
    assert wrong[2] == "wrong"
    for wrapped in (r"\boxed{\text{%s}}", r"$\boxed{%s.}$", r"\boxed{(%s)}", r"\boxed{**%s**}", "%s"):
        assert short(kind, 1, wrapped % say[0])[1], wrapped


def test_dense_detail_of_short_answers() -> None:
    assert [short("Counting2", 3, rf"\boxed{{{n}}}")[0] for n in (3, 4, 5, 1)] == [15.0, 2.5, 1.25, 1.25]
    stops = ["Alpha Station", "Brävo", "Charlie", "Delta"]
    full = "Stops: [alpha, bravo, Charlie Station, delta]\n\\boxed{A}"
    assert short("Counting1", 1, full, stops)[0] == 5.0
    assert short("Counting1", 0, full, stops)[0] == 15.0
    assert short("Counting1", 1, "Stops: [alpha, alpha, alpha, alpha]\n\\boxed{A}", stops)[0] == 0.25 * 5.0
    every = "Stops: [" + ", ".join(f"x{i}" for i in range(36)) + ", alpha, bravo, charlie, delta]\n\\boxed{A}"
    assert short("Counting1", 1, every, stops)[0] == pytest.approx(5.0 * 8 / 44)
    lines = {"Alpha": ["Red Line", "Blue Line"]}
    assert short("TorF2", 1, "Lines: [red, blue]\n\\boxed{no}", lines)[0] == 5.0
    assert short("TorF2", 1, "Lines: [red]\n\\boxed{no}", {"Alpha": "Red Line"})[0] == 5.0  # the paper's spelling
    assert short("TorF2", 1, "Lines: [red]\n\\boxed{no}", {"Alpha": 1})[0] == 0.0
    assert short("TorF2", 1, "\\boxed{no}", lines)[0] == 0.0


def test_thinking_is_not_read() -> None:
    draft = text((("Red Line", "A4", "A3"),))
    answer = f"<think>{draft}\n--\n</think>\n" + text((("Red Line", "A1", "A4"),))
    assert score(question("A1", "A4"), answer, BRANCHED)[0] == 15.0


@pytest.mark.parametrize("around", ["<answer>{}</answer>", "<think>A2?</think><answer>\n{}</answer>", "{}<|im_end|>"])
def test_tags_around_the_legs_are_no_part_of_names(around: str) -> None:
    answer = around.format(text((("Red Line", "A1", "A4"),)))
    assert score(question("A1", "A4"), answer, BRANCHED) == (15.0, True, "none")


@pytest.mark.parametrize(
    "answer",
    [
        "Route Name: A",
        "Route Name: A\nArrival Stop: B\nDeparture Stop: C",
        "Route Name:\nDeparture Stop: B\nArrival Stop: C",
        text((("A", "B", "C"),)) + "\nRoute Name: D",
    ],
)
def test_torn_legs_are_no_plan(answer: str) -> None:
    assert read_legs(answer) == []


def test_on_one_line_and_bold() -> None:
    answer = "**Route Name:** Red Line, **Departure Stop:** A1, **Arrival Stop:** A4. -- bye"
    assert read_legs(answer)[0] == ("Red Line", "A1", "A4.")
    assert score(question("A1", "A4"), answer, BRANCHED)[0] == 15.0


@pytest.mark.parametrize(
    ("start", "goal", "named"),
    [("Atlantis", "A4", "station_1"), ("A1", "", "station_2")],
)
def test_stations_must_be_in_the_network(start: str, goal: str, named: str) -> None:
    with pytest.raises(DataError, match=f"'q-1', field '{named}'"):
        RUBRIC.score([question(start, goal)], ["x"], {"made/up": BRANCHED})


def test_detail_must_stay_below_correctness() -> None:
    with pytest.raises(ValueError, match="alpha"):
        Rubric(mode="graph", alpha=1.0)


@settings(max_examples=200, deadline=None)
@given(st.text(), st.sampled_from(["planning", "TorF1", "Counting1", "Counting3"]))
def test_any_text_is_scored(response: str, kind: str) -> None:
    got = score(question("A1", "A4", kind=kind, answer=1), response, BRANCHED)
    assert got[0] >= 0.0
    boxed = score(question("A1", "A4", kind=kind, answer=1), rf"\boxed{{{response}}} Stops: [{response}]", BRANCHED)
    assert boxed[0] >= 0.0
