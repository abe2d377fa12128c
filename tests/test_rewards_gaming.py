"""``graph`` over random networks and answers: right above wrong above nothing, no game gains, spelling does not matter.

Each property that ``graph`` keeps is searched for a counterexample in ``reference`` and ``paper``, which break most.
"""

from __future__ import annotations

import itertools
import random
import unicodedata
from collections.abc import Callable
from typing import NamedTuple

import pytest
from hypothesis import Phase, assume, find, given, settings
from hypothesis import strategies as st

from rewardmap.rewards import FAILURES, Rubric
from rewardmap.rewards.rubric import MODES
from rewardmap.transit.graph import Branch, Line, Network
from rewardmap.types import Problem

NAMES = "Alpha Brävo Charlie Delta Echo Foxtrot Golf Hôtel India Juliet Kilo Ōscar"
POOL = [f"{name} Station" for name in NAMES.split()]
LINE_NAMES = ["Red Line", "Blue Line", "Line 3"]
RUBRICS = {mode: Rubric(mode=mode) for mode in MODES}
Plan = tuple[tuple[str, str, str], ...]


@st.composite
def networks(draw: st.DrawFn) -> Network:
    lines = []
    for name in LINE_NAMES[: draw(st.integers(1, 3))]:
        stops = draw(st.lists(st.sampled_from(POOL[1:]), min_size=3, max_size=6, unique=True))
        stops.insert(draw(st.integers(0, 3)), POOL[0])  # every line calls here, so that all is connected
        rest = [stop for stop in POOL if stop not in stops]
        branches: tuple[Branch, ...] = ()
        loop = draw(st.booleans())
        if not loop and draw(st.booleans()):
            tail = draw(st.lists(st.sampled_from(rest), min_size=1, max_size=2, unique=True))
            branches = (Branch((stops[2], *tail), draw(st.sampled_from(["start", "end"]))),)
        lines.append(Line(name, "#000000", tuple(stops), loop, branches, one_way=draw(st.integers(0, 5)) == 5))
    return Network("made/up", "easy", tuple(lines), {})


class Case(NamedTuple):
    network: Network
    asked: Problem
    best: Plan
    """One of the shortest routes."""
    plan: Plan
    """What somebody answers."""


class Scored(NamedTuple):
    score: float
    correct: bool
    failure: str


def rate(mode: str, case: Case, answer: str) -> Scored:
    batch = RUBRICS[mode].score([case.asked], [answer], {"made/up": case.network})  # type: ignore[index]
    return Scored(float(batch.score[0] / batch.weight[0]), bool(batch.correct[0]), FAILURES[batch.failure[0]])


def text(plan: Plan) -> str:
    return "\n--\n".join(f"Route Name: {a}\nDeparture Stop: {b}\nArrival Stop: {c}" for a, b, c in plan)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    network = draw(networks())
    start, goal = draw(st.sampled_from(list(itertools.permutations(network.stations, 2))))
    routes = network.shortest_routes(start, goal)
    assume(routes)
    best = tuple((leg.line, leg.departure, leg.arrival) for leg in draw(st.sampled_from(routes)))
    asked = Problem("q-1", b"", "", "planning", -1, start, goal, "made/up", "easy", len(best) - 1)
    plan = best if draw(st.integers(0, 2)) == 0 else draw(any_plan(network, start, goal))
    return Case(network, asked, best, plan)


@st.composite
def any_plan(draw: st.DrawFn, network: Network, start: str, goal: str) -> Plan:
    """Connected more often than not, so that some legs are verified and some routes arrive."""
    if draw(st.integers(0, 4)) == 0:  # one ride on any line, be there a way or not
        return ((draw(st.sampled_from(LINE_NAMES)), start, goal),)
    plan = []
    here = start if draw(st.integers(0, 4)) else draw(st.sampled_from(POOL))
    for _ in range(draw(st.integers(1, 4))):
        line = draw(st.sampled_from(network.lines))
        ends = [goal] if goal in line.stops() and draw(st.booleans()) else list(line.stops())
        end = draw(st.sampled_from(ends if draw(st.integers(0, 4)) else POOL))
        plan.append((line.name if draw(st.integers(0, 9)) else "Green Line", here, end))
        if end == goal and draw(st.integers(0, 3)):
            break
        here = end if draw(st.integers(0, 6)) else draw(st.sampled_from(POOL))
    return tuple(plan)


def ridable(case: Case) -> bool:
    """Said independently of the scorer: every choice of trains and directions is tried, stop by stop."""
    plan = case.plan
    if plan[0][1] != case.asked.station_1 or plan[-1][2] != case.asked.station_2:
        return False
    if any(one[2] != other[1] for one, other in itertools.pairwise(plan)):
        return False

    def ways(name: str, a: str, b: str) -> list[tuple[str, ...]]:
        found = []
        for line in case.network.lines:
            for service in line.services() if line.name == name else ():
                ring = service[:-1] if service[0] == service[-1] else None
                runs = [ring[k:] + ring[:k] for k in range(len(ring))] if ring else [service]
                for run in runs if line.one_way else [*runs, *(tuple(reversed(run)) for run in runs)]:
                    if a in run and b in run and run.index(a) < run.index(b):
                        found.append(run[run.index(a) + 1 : run.index(b) + 1])
        return found

    def ride(i: int, visited: frozenset[str]) -> bool:
        if i == len(plan):
            return True
        # The shortest way of a leg is the one taken.
        options = sorted(ways(*plan[i]), key=len)
        return any(
            ride(i + 1, visited | set(way)) for way in options if len(way) == len(options[0]) and not visited & set(way)
        )

    return ride(0, frozenset({case.asked.station_1}))


@settings(max_examples=150, deadline=None)
@given(cases())
def test_every_shortest_route_earns_everything(case: Case) -> None:
    assert rate("graph", case, text(case.best)) == (15.0, True, "none")


@settings(max_examples=500, deadline=None)
@given(cases())
def test_right_above_wrong_above_nothing(case: Case) -> None:
    earned, right, failure = rate("graph", case, text(case.plan))
    assert right == ridable(case)
    assert (failure in ("none", "not_optimal")) == right
    assert (10.0 < earned <= 15.0) if right else (0.0 <= earned <= 4.0)
    assert rate("graph", case, "I cannot read the map.") == (0.0, False, "bad_format")
    if right:
        assert (failure == "none") == (earned == 15.0)
        assert failure == "not_optimal" or len(case.plan) == len(case.best)


# Games: what is done to an answer without knowing more about the map than it says.


def repeat_leg(case: Case, at: int) -> Plan:
    return (*case.plan[: at + 1], *case.plan[at:])


def go_back(case: Case, at: int) -> Plan:
    """To where a leg began, from the end."""
    return (*case.plan, (case.plan[at][0], case.plan[-1][2], case.plan[at][1]))


def out_and_back(case: Case, at: int) -> Plan:
    line, start, end = case.plan[at]
    return (*case.plan[: at + 1], (line, end, start), (line, start, end), *case.plan[at + 1 :])


def twice(case: Case, at: int) -> Plan:
    return case.plan * 2


def zero_length(case: Case, at: int) -> Plan:
    line, start, _ = case.plan[at]
    return (*case.plan[:at], (line, start, start), *case.plan[at:])


def junk_leg(case: Case, at: int) -> Plan:
    return (*case.plan[: at + 1], ("Green Line", *case.plan[at][1:]), *case.plan[at + 1 :])


def second_plan(case: Case, at: int) -> Plan:
    """The right one, even."""
    return case.plan + case.best


def ask_again(case: Case, at: int) -> Plan:
    """The whole question as one leg more, on any line."""
    return (*case.plan, (case.network.lines[at % len(case.network.lines)].name, *case.best[0][1:2], case.best[-1][2]))


def every_line(case: Case, at: int) -> Plan:
    """The leg on each line of the map in turn: a hedge on its name."""
    ways = [(line.name, *case.plan[at][1:]) for line in case.network.lines]
    return (*case.plan[: at + 1], *ways, *case.plan[at + 1 :])


GAMES: list[Callable[[Case, int], Plan]] = [
    repeat_leg, go_back, out_and_back, twice, zero_length, junk_leg, second_plan, ask_again, every_line,
]  # fmt: skip


@settings(max_examples=700, deadline=None)
@given(cases(), st.lists(st.tuples(st.sampled_from(GAMES), st.integers(0, 9)), min_size=1, max_size=3))
def test_no_game_gains(case: Case, games: list[tuple[Callable[[Case, int], Plan], int]]) -> None:
    """Whatever the answer was: right, partly right or wrong; and games upon games."""
    honest = rate("graph", case, text(case.plan))
    played = case
    for game, at in games:
        played = played._replace(plan=game(played, at % len(played.plan)))
    got = rate("graph", case, text(played.plan))
    assert got.score <= honest.score, (honest, got, played.plan)
    assert not got.correct


@settings(max_examples=200, deadline=None)
@given(cases(), st.integers(0, 9), st.integers(0, 9))
def test_splitting_a_ride_of_a_right_answer_costs(case: Case, at: int, middle: int) -> None:
    line, start, end = case.best[at % len(case.best)]
    stops = [stop for stop in case.network.line(line).stops() if stop not in (start, end)]
    at %= len(case.best)
    via = stops[middle % len(stops)]
    split = text((*case.best[:at], (line, start, via), (line, via, end), *case.best[at + 1 :]))
    assert rate("graph", case, split).score < 15.0


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from(["Let me think.\n\n", "<think>It could be -- well.</think>", "The route:\n", "\n \n"]))
def test_text_around_the_legs_changes_nothing(case: Case, before: str) -> None:
    answer = text(case.plan)
    padded = before + answer.replace("\n--\n", "\n\n--\n \n") + "\n\nEnjoy your trip! -- It is: fast.\n" * 3
    assert rate("graph", case, padded) == rate("graph", case, answer)


SUFFIXES = (
    "",
    " Station",
    " STATION ",
    "站",
    " 駅",
    "역",
    " Stazione",
    " estación",
    " Metro Station",
    " (Transfer Station)",
)
LINE_SPELLINGS = {
    "Line 3": ["3", "Route 3", "LINE ３", "3号线", "Linea 3", "line  ③", "地铁３号线", "3 LINE"],
    "Red Line": ["red line", "RED", "Ｒｅｄ  Ｌｉｎｅ", "**Red Line**", "Metrorail Red Line", "Red-Line"],
    "Blue Line": ["blue", "BLUE LINE", "Blue\u00a0Line", "Ｂｌｕｅ", "Linea Blue", "blue line:"],
}


def respelt(rng: random.Random, name: str) -> str:
    """The same stop in another case, spacing, script, Unicode form and language's suffix."""
    name = name.removesuffix(" Station")
    for change in rng.sample(range(6), k=rng.randrange(4)):
        if change == 0:
            name = "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in name)
        elif change == 1:
            name = rng.choice([str.upper, str.lower, str.swapcase])(name)
        elif change == 2:
            name = unicodedata.normalize(rng.choice(["NFD", "NFC", "NFKD"]), name)
        elif change == 3:
            name = "".join(c for c in unicodedata.normalize("NFD", name) if not unicodedata.combining(c))
        elif change == 4:
            name = rng.choice([" ", "\u3000", "\u00a0", "-", "'"]).join((name[:2], name[2:]))
        else:
            name = rng.choice(["*", "_", "“", " "]) + name + rng.choice(["*", ".", "”", "\t"])
    return name + rng.choice(SUFFIXES)


@settings(max_examples=400, deadline=None)
@given(cases(), st.randoms(use_true_random=False))
def test_spelling_does_not_matter(case: Case, rng: random.Random) -> None:
    other = tuple(
        (rng.choice(LINE_SPELLINGS.get(line, [line])), respelt(rng, start), respelt(rng, end))
        for line, start, end in case.plan
    )
    assert rate("graph", case, text(other)) == rate("graph", case, text(case.plan))
    assert rate("graph", case, text(case.plan).upper()) == rate("graph", case, text(case.plan))


# What the other modes make of it. Each law says whether a mode's rewards keep it in one case; ``graph`` does in all.


def ordering(mode: str, case: Case) -> bool:
    """A right answer, however slow, is above a wrong one."""
    line, start, end = case.best[0]
    slow = (*case.best[:1], *((line, end, start), (line, start, end)) * 6, *case.best[1:])
    answers = [rate(mode, case, text(plan)) for plan in (case.best, slow, case.plan)]
    wrong = [one.score for one in answers if not one.correct]
    return all(one.score > most for one in answers if one.correct for most in wrong)


def floor(mode: str, case: Case) -> bool:
    return rate(mode, case, text(case.plan * 5)).score >= 0.0


def garbage_lowest(mode: str, case: Case) -> bool:
    return rate(mode, case, text(case.plan)).score >= rate(mode, case, "I cannot read the map.").score


def only_rides_are_right(mode: str, case: Case) -> bool:
    return rate(mode, case, text(case.plan)).correct <= ridable(case)


def nothing_for_names(mode: str, case: Case) -> bool:
    """Lines that exist and the question's own stops, without a way between them, earn nothing."""
    start, goal = case.asked.station_1, case.asked.station_2
    legs = [(line.name, start, goal) for line in case.network.lines if start not in line.stops()]
    return not legs or rate(mode, case, text(tuple(legs))).score <= 0.0


def case_folds(mode: str, case: Case) -> bool:
    return rate(mode, case, text(case.plan).lower()) == rate(mode, case, text(case.plan))


LAWS = [ordering, floor, garbage_lowest, only_rides_are_right, nothing_for_names, case_folds]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("mode", ["reference", "paper"])
def test_where_the_other_modes_break(mode: str, law: Callable[[str, Case], bool]) -> None:
    """Searched for until one is found; NoSuchExample if none is."""
    options = settings(max_examples=3000, deadline=None, database=None, derandomize=True, phases=[Phase.generate])
    broken = find(cases(), lambda case: not law(mode, case), settings=options)
    assert law("graph", broken), broken


CHAIN = Network(
    "made/up",
    "easy",
    tuple(Line(f"Line {n}", "#000000", (f"Stop {n}", f"Between {n}", f"Stop {n + 1}")) for n in range(1, 5)),
    {},
)
ACROSS = tuple((f"Line {n}", f"Stop {n}", f"Stop {n + 1}") for n in range(1, 5))
WRONG: Plan = (("Line 1", "Stop 1", "Stop 5"),)
BEGUN = ACROSS[:1]


@pytest.mark.parametrize(
    ("mode", "plan", "games"),
    [
        ("reference", WRONG, [repeat_leg, out_and_back, twice, zero_length, ask_again, every_line]),
        ("paper", BEGUN, [go_back, out_and_back, zero_length]),
    ],
    ids=["reference", "paper"],
)
def test_games_that_pay_in_the_other_modes(mode: str, plan: Plan, games: list[Callable[[Case, int], Plan]]) -> None:
    """A question of three transfers leaves room for legs that are paid without being checked."""
    asked = Problem("q-1", b"", "", "planning", -1, "Stop 1", "Stop 5", "made/up", "easy", 3)
    case = Case(CHAIN, asked, ACROSS, plan)
    for game in games:
        played = text(game(case, 0))
        assert rate(mode, case, played).score > rate(mode, case, text(plan)).score, game.__name__
        assert rate("graph", case, played).score <= rate("graph", case, text(plan)).score, game.__name__


def test_hedging_between_boxes_pays_in_the_other_modes_only() -> None:
    asked = Problem("q-1", b"", "", "TorF1", 1, "", "", "made/up", "easy")
    case = Case(CHAIN, asked, ACROSS, ACROSS)
    hedge = r"\boxed{no}, or rather \boxed{yes}"
    assert rate("reference", case, hedge).correct and rate("paper", case, hedge).correct
    assert rate("graph", case, hedge) == (0.0, False, "bad_format")


@settings(max_examples=300, deadline=None)
@given(cases(), st.sampled_from(LAWS))
def test_graph_keeps_every_law(case: Case, law: Callable[[str, Case], bool]) -> None:
    assert law("graph", case)
