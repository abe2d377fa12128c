"""``graph`` mode over random networks: what is right, what partial credit is for, and that no gaming pays."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rewardmap.rewards import FAILURES, Rubric
from rewardmap.rewards.graph import read_legs
from rewardmap.rewards.topology import fold, line_key, station_key
from rewardmap.transit.graph import Branch, Line, Network
from rewardmap.types import DataError, Problem

POOL = [
    "Alpha",
    "Brävo",
    "Charlie",
    "Delta",
    "Echo",
    "Foxtrot",
    "Golf",
    "Hôtel",
    "India",
    "Juliet",
    "Kilo",
    "Ōscar",
]
POOL = [f"{name} Station" for name in POOL]
LINE_NAMES = ["Red Line", "Blue Line", "Line 3"]
RUBRIC = Rubric(mode="graph")
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
        lines.append(Line(name, "#000000", tuple(stops), loop, branches))
    return Network("made/up", "easy", tuple(lines), {})


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


@st.composite
def asked_with_best(draw: st.DrawFn) -> tuple[Network, Problem, Plan]:
    network = draw(networks())
    start, goal = draw(st.sampled_from(list(itertools.permutations(network.stations, 2))))
    routes = network.shortest_routes(start, goal)
    assume(routes)
    route = draw(st.sampled_from(routes))
    return network, question(start, goal), tuple((leg.line, leg.departure, leg.arrival) for leg in route)


@st.composite
def any_plan(draw: st.DrawFn, network: Network, start: str) -> Plan:
    """Connected more often than not, so that some legs are verified."""
    plan = []
    here = start if draw(st.integers(0, 4)) else draw(st.sampled_from(POOL))
    for _ in range(draw(st.integers(1, 4))):
        line = draw(st.sampled_from(network.lines))
        end = draw(st.sampled_from(line.stops() if draw(st.integers(0, 4)) else POOL))
        plan.append((line.name if draw(st.integers(0, 9)) else "Green Line", here, end))
        here = end if draw(st.integers(0, 6)) else draw(st.sampled_from(POOL))
    return tuple(plan)


def ridable(network: Network, plan: Plan, start: str, goal: str) -> bool:
    """Said independently of the scorer: every choice of trains and directions is tried, stop by stop."""
    if plan[0][1] != start or plan[-1][2] != goal:
        return False
    if any(one[2] != other[1] for one, other in itertools.pairwise(plan)):
        return False

    def ways(line: str, a: str, b: str) -> list[tuple[str, ...]]:
        found = []
        for service in next((one.services() for one in network.lines if one.name == line), ()):
            ring = service[:-1] if service[0] == service[-1] else None
            runs = [ring[k:] + ring[:k] for k in range(len(ring))] if ring else [service]
            for run in [*runs, *(tuple(reversed(run)) for run in runs)]:
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

    return ride(0, frozenset({start}))


@settings(max_examples=150, deadline=None)
@given(asked_with_best())
def test_every_shortest_route_earns_everything(case: tuple[Network, Problem, Plan]) -> None:
    network, asked, best = case
    assert score(asked, text(best), network) == (15.0, True, "none")


@settings(max_examples=400, deadline=None)
@given(st.data(), asked_with_best())
def test_right_above_wrong_above_nothing(data: st.DataObject, case: tuple[Network, Problem, Plan]) -> None:
    network, asked, best = case
    plan = data.draw(any_plan(network, asked.station_1))
    earned, right, failure = score(asked, text(plan), network)
    assert right == ridable(network, plan, asked.station_1, asked.station_2)
    assert (failure in ("none", "not_optimal")) == right
    assert (10.0 < earned <= 15.0) if right else (0.0 <= earned <= 4.0)
    assert score(asked, "I cannot read the map.", network) == (0.0, False, "bad_format")
    if right:
        assert (failure == "none") == (earned == 15.0)
        assert failure == "not_optimal" or len(plan) == len(best)


GAMES = ("repeat_leg", "append_leg", "out_and_back", "twice", "split", "chatter", "hedge", "zero_length")


def play(game: str, plan: Plan, at: int, network: Network, other: Plan) -> Plan:
    line, start, end = plan[at]
    if game == "repeat_leg":
        return (*plan[: at + 1], *plan[at:])
    if game == "append_leg":
        return (*plan, (line, plan[-1][2], start))
    if game == "out_and_back":
        return (*plan[: at + 1], (line, end, start), (line, start, end), *plan[at + 1 :])
    if game == "twice":
        return plan + plan
    if game == "zero_length":
        return (*plan[:at], (line, start, start), *plan[at:])
    if game == "hedge":
        return plan + other
    stops = next((one.stops() for one in network.lines if one.name == line), ())
    middle = [stop for stop in stops if stop not in (start, end)]
    return (*plan[:at], (line, start, middle[0]), (line, middle[0], end), *plan[at + 1 :]) if middle else plan


@settings(max_examples=400, deadline=None)
@given(st.data(), asked_with_best(), st.sampled_from(GAMES))
def test_no_game_gains(data: st.DataObject, case: tuple[Network, Problem, Plan], game: str) -> None:
    """Against the shortest route and against any ridable beginning of a route."""
    network, asked, best = case
    plan = data.draw(st.one_of(st.just(best), any_plan(network, asked.station_1)))
    honest, right, failure = score(asked, text(plan), network)
    played = play(game, plan, data.draw(st.integers(0, len(plan) - 1)), network, best)
    answer = f"Let me think.\n{text(plan)}\nEnjoy your trip!" if game == "chatter" else text(played)
    gained, still, _ = score(asked, answer, network)
    if right or game in ("repeat_leg", "out_and_back", "twice", "chatter", "zero_length"):
        assert gained <= honest, (game, plan, played)
    else:  # more legs may be more progress, never more than a right answer
        assert gained < 10.0 or still
    if failure == "none" and game not in ("chatter", "split", "hedge"):
        assert gained < honest


def rewritten(name: str, how: str) -> str:
    wide = "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in name)
    return {
        "upper": name.upper(),
        "spaced": "  " + name.replace(" ", "   ") + " ",
        "bare": name.removesuffix(" Station"),
        "wide": wide,
        "plain": name.replace("ä", "a").replace("ô", "o").replace("Ō", "O"),
        "bold": f"**{name}**",
        "marked": name + " (Transfer Station)",
    }[how]


WAYS = ("upper", "spaced", "bare", "wide", "plain", "bold", "marked")


@settings(max_examples=150, deadline=None)
@given(st.data(), asked_with_best(), st.sampled_from(WAYS))
def test_spelling_does_not_matter(data: st.DataObject, case: tuple[Network, Problem, Plan], how: str) -> None:
    network, asked, _ = case
    plan = data.draw(any_plan(network, asked.station_1))
    other = tuple((line, rewritten(start, how), rewritten(end, how)) for line, start, end in plan)
    assert score(asked, text(other), network) == score(asked, text(plan), network)
    assert score(asked, text(plan).upper(), network) == score(asked, text(plan), network)


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
    assert short("TorF2", 1, "\\boxed{no}", lines)[0] == 0.0


def test_thinking_is_not_read() -> None:
    draft = text((("Red Line", "A4", "A3"),))
    answer = f"<think>{draft}\n--\n</think>\n" + text((("Red Line", "A1", "A4"),))
    assert score(question("A1", "A4"), answer, BRANCHED)[0] == 15.0


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
    [("Atlantis", "A4", "station_1"), ("A1", "", "station_2"), ("A1", "a1", "station_2")],
)
def test_stations_must_be_in_the_network(start: str, goal: str, named: str) -> None:
    with pytest.raises(DataError, match=f"'q-1', field '{named}'"):
        RUBRIC.score([question(start, goal)], ["x"], {"made/up": BRANCHED})


def test_detail_must_stay_below_correctness() -> None:
    with pytest.raises(ValueError, match="alpha"):
        Rubric(mode="graph", alpha=1.0)


def test_where_the_other_modes_break() -> None:
    """The published code and the printed formula reward what ``graph`` does not."""
    metro = {"Red": ["A", "B", "C"], "Blue": ["C", "D", "E"]}
    published, printed = Rubric(), Rubric(mode="paper")

    def three(asked: Problem, answer: str) -> tuple[float, float, float]:
        one, two = (rubric.score([asked], [answer], {"made/up": metro}).score[0] for rubric in (published, printed))
        return one, two, score(asked, answer, metro)[0]

    direct, far = question("A", "C"), question("A", "E", transfers_required=1)
    wrong_line = three(direct, text((("Green", "A", "C"),)))
    garbage = three(direct, "no idea")
    assert wrong_line[0] < garbage[0] and wrong_line[2] >= garbage[2]
    best = text((("Red", "A", "C"), ("Blue", "C", "E")))
    back = text((("Red", "A", "C"), ("Red", "C", "B"), ("Red", "B", "C"), ("Blue", "C", "E")))
    jump = text((("Blue", "A", "D"), ("Red", "D", "E")))
    assert three(far, best)[2] == 1.5 * 15.0 and three(far, back)[2] < 10.0
    assert three(far, back)[0] >= 10.0  # out and back is still right as published
    assert three(far, jump)[0] > 0 and three(far, jump)[1] > 0 and three(far, jump)[2] == 0.0


@settings(max_examples=200, deadline=None)
@given(st.text(), st.sampled_from(["planning", "TorF1", "Counting1", "Counting3"]))
def test_any_text_is_scored(response: str, kind: str) -> None:
    got = score(question("A1", "A4", kind=kind, answer=1), response, BRANCHED)
    assert got[0] >= 0.0
    boxed = score(question("A1", "A4", kind=kind, answer=1), rf"\boxed{{{response}}} Stops: [{response}]", BRANCHED)
    assert boxed[0] >= 0.0
