"""Compiled ``graph`` against its plain definition: the same outcome, to the last bit, whatever network and text."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewardmap.rewards import Rubric
from rewardmap.rewards.graph import score_graph
from rewardmap.rewards.graph_text import LAST_LETTER, folds
from rewardmap.rewards.topology import LONGEST_NAME, fold, topology
from rewardmap.transit.graph import Branch, Line, Network
from rewardmap.transit.topology import bare_name, network_from_lists
from rewardmap.types import KINDS, MetroData, Problem

STATIONS = Path(__file__).parents[2] / "shared" / "data" / "stations"

POOL = [
    *(
        "Alpha Station",
        "Brävo Station",
        "St. John",
        "St John",
        "st-john Station",
        "国贸站",
        "国贸",
        "Ōscar",
        "Ⅷ Street",
    ),
    *("Hub (A)", "Hub（B）", "hub", "hub (a) Station", "（Ōscar）", "St (John", "Oscar (old) (new)"),
    *("Station", "Metro Station", "Fluß", "①号", "ﬁeld Road", "X" * LONGEST_NAME, "Y" * (LONGEST_NAME + 1)),
]
LINES = ["Red Line", "Line 1", "1号线", "Route", "Linea Ｂ"]


@st.composite
def networks(draw: st.DrawFn) -> Network | MetroData:
    lines = []
    for name in LINES[: draw(st.integers(1, 5))]:
        stops = tuple(draw(st.lists(st.sampled_from(POOL), min_size=2, max_size=6, unique=draw(st.booleans()))))
        loop = len(set(stops)) > 2 and draw(st.booleans())
        branches: tuple[Branch, ...] = ()
        if not loop and draw(st.booleans()):
            tail = draw(st.lists(st.sampled_from(POOL), min_size=1, max_size=2, unique=True))
            towards = draw(st.sampled_from(["start", "end"]))
            branches = (Branch((draw(st.sampled_from(stops)), *tail), towards),)
        lines.append(Line(name, "#000000", stops, loop, branches, draw(st.integers(0, 3)) == 0))
    if draw(st.booleans()):
        return Network("made/up", "easy", tuple(lines), {})
    mark = draw(st.sampled_from(["", " (Branch-starting Station)"]))
    lists = {line.name: [line.stations[0] + mark, *line.stations[1:]] for line in lines}
    return network_from_lists("made/up", lists) if draw(st.booleans()) else lists


def stops_of(network: Network | MetroData) -> dict[str, list[str]]:
    """Line -> its stops."""
    return network.metro_data() if isinstance(network, Network) else {k: list(v) for k, v in network.items()}


def ask(kind: str, **fields: object) -> Problem:
    values: dict[str, object] = {
        "uid": "q", "image": b"", "question": "", "answer": 1, "station_1": "Alpha Station",
        "station_2": "Ōscar", "network_id": "made/up", "map_difficulty": "easy",
    }  # fmt: skip
    return Problem(kind=kind, **{**values, **fields})  # type: ignore[arg-type]


def check(problem: Problem, responses: list[str], network: Network | MetroData) -> None:
    batch = Rubric(mode="graph").score([problem] * len(responses), responses, {"made/up": network})
    known = topology("made/up", network)
    for i, response in enumerate(responses):
        got = (batch.correct[i], batch.detail[i], batch.format_valid[i], batch.failure[i])
        assert got == tuple(score_graph(problem, response, known)), response


def spelled(rng: random.Random, name: str) -> str:
    """The same name in another script, case or spacing, or one that is nearly it."""
    how = rng.randrange(15)
    if how == 0:
        return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in name)
    changed = {
        1: name.upper(), 2: name.lower(), 3: f"**{name}** ", 4: name + " Station", 5: name.removesuffix(" Station"),
        6: f" {name}（换乘站）", 7: name.replace("a", "á"), 8: name[:-1],
        9: name + rng.choice("站线駅역.-\u0301\u200b\ud800"), 10: name.split("(")[0], 11: name + " （or (so)",
    }  # fmt: skip
    return changed.get(how, name)


LABELS = [("Route Name", "Departure Stop", "Arrival Stop"), ("route\tname", "DEPARTURE STOP", "arrivalstop")]


def plan_text(rng: random.Random, legs: list[tuple[str, str, str]]) -> str:
    labels = LABELS[rng.randrange(8) == 0]
    colon = rng.choice([": "] * 6 + [":", "：", "** :**", "_: "])
    gap = rng.choice(["\n"] * 20 + [", ", ";", "\r\n", " ", "--"])
    pieces = [gap.join(f"{label}{colon}{value}" for label, value in zip(labels, leg, strict=True)) for leg in legs]
    text = rng.choice(["", "", "Sure!\n", "<think>Route Name: x</think>"])
    text += rng.choice(["\n--\n", "\n---\n", "--", "\n", " "]).join(pieces)
    text += rng.choice(["", "", "", "\nEnjoy!", "</think>", "\n--\n", "</answer>", "<"])
    for _ in range(rng.choice([0, 0, 0, 0, 0, 1, 3])):
        at = rng.randrange(len(text) + 1)
        text = (
            text[:at]
            + rng.choice(["", "\n", ":", "-", "--", "\x00", "ſ", "站", "Stop"])
            + text[at + rng.randrange(3) :]
        )
    return text


def any_legs(rng: random.Random, stops: dict[str, list[str]], start: str, goal: str) -> list[tuple[str, str, str]]:
    """Mostly a walk along lines, which ends where it should when the goal is near."""
    every = [stop for names in stops.values() for stop in names]
    legs = []
    here = start if rng.randrange(9) else rng.choice(every)
    for _ in range(rng.randint(1, 4)):
        lines = [line for line, names in stops.items() if here in names]
        line = rng.choice(lines if lines and rng.randrange(9) else [*stops, "Nowhere"])
        ends = stops.get(line, every) if rng.randrange(9) else every
        end = goal if goal in ends and rng.randrange(3) else rng.choice(ends)
        legs.append((spelled(rng, line), spelled(rng, here), spelled(rng, end)))
        if end == goal and rng.randrange(4):
            break
        here = end if rng.randrange(9) else rng.choice(every)
    return legs


@settings(max_examples=400, deadline=None)
@given(networks(), st.randoms(use_true_random=False))
def test_any_plan_on_any_network(network: Network | MetroData, rng: random.Random) -> None:
    stops = stops_of(network)
    start, goal = (rng.choice(rng.choice(list(stops.values()))) for _ in range(2))
    problem = ask("planning", station_1=start, station_2=goal)
    check(problem, [plan_text(rng, any_legs(rng, stops, start, goal)) for _ in range(12)], network)


TOKENS = [
    *"aBcD23+-_.,: \n\t={}$%*()\\[]İK\xa0٣３②ｙ",
    *("yes", "no", "Yes", "ＮＯ", "\\boxed{", "\\boxed{", "}", "}", "\\text{", "\\textbf", "\\mathrm ", "\\mbox"),
    *(
        "Stops: [",
        "**Lines**：[",
        "stops:[",
        "lines_ : [",
        "xstops: [",
        "]",
        "</think>",
        "<think>",
        "999999999",
        "1000000000",
    ),
    *("alpha", "Brävo Station", "国贸", "red line", "１号线", "Line 1", "", "X" * (LONGEST_NAME + 1)),
]
GOLD = [
    None,
    [],
    ["Alpha Station", "Brävo"],
    {"国贸": ["Red Line", "Line 1"]},
    ["Alpha", "alpha station", ""],
    [1],
    "x",
]


@settings(max_examples=600, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from(KINDS[:5]), st.sampled_from([0, 1, 2, 3, -1, 10**18]))
def test_any_short_answer(rng: random.Random, kind: str, gold: int) -> None:
    problem = ask(kind, answer=gold, fine_grained_answer=rng.choice(GOLD))
    texts = ["".join(rng.choices(TOKENS, k=rng.randrange(9))) for _ in range(10)]
    texts += [f"Stops: [{', '.join(rng.choices(TOKENS[-8:], k=4))}]\n\\boxed{{{rng.choice(TOKENS)}}}" for _ in range(5)]
    check(problem, texts, {"Red Line": ["Alpha Station", "Ōscar"]})


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(), min_size=1, max_size=5), st.sampled_from(KINDS), st.binary(max_size=100))
def test_any_text(texts: list[str], kind: str, noise: bytes) -> None:
    texts += [noise.decode("utf-8", "replace"), noise.decode("utf-8", "surrogateescape")]
    texts += [f"\\boxed{{{text}}} Stops: [{text}]" for text in texts]
    texts += [f"Route Name: {text}\nDeparture Stop: Alpha\nArrival Stop: {text}" for text in texts]
    check(ask(kind, fine_grained_answer=["Alpha Station"]), texts, {"Red Line": ["Alpha Station", "Ōscar", "Brävo"]})


@pytest.mark.parametrize(
    "odd", ["（换乘站）", " (Branch-starting Station)", "Old (West（换乘站）", "", "()", "站（支线起始站）"]
)
def test_odd_names_in_released_lists(odd: str) -> None:
    """Nothing but a marker, a bracket that only its marker closes, no name at all."""
    lists = {"Red": ["Alpha", odd, "Bravo"], "Blue": ["Bravo", odd]}
    asked = Problem("q", b"", "", "planning", -1, "Alpha", "Bravo", "made/up", "easy")
    text = "Route Name: Red\nDeparture Stop: Alpha\nArrival Stop: Bravo"
    for network in (network_from_lists("made/up", lists), lists):
        batch = Rubric(mode="graph").score([asked], [text], {"made/up": network})
        want = score_graph(asked, text, topology("made/up", network))
        assert (bool(batch.correct[0]), batch.detail[0]) == want[:2] == (True, 10.0)


def test_folding_works_letter_by_letter() -> None:
    letters = folds()
    parts = [letters.text[letters.at[p] : letters.at[p + 1]].tobytes().decode() for p in range(LAST_LETTER)]
    assert len(parts) == len(letters.at) - 1
    assert not any(fold(chr(point)) for point in range(LAST_LETTER, sys.maxunicode + 1))
    rng = random.Random(0)
    for _ in range(3000):
        points = [rng.randrange(0x300 if rng.randrange(2) else LAST_LETTER) for _ in range(8)]
        assert fold("".join(map(chr, points))) == "".join(parts[point] for point in points), points


def test_more_ways_than_are_followed_go_to_the_plain_code() -> None:
    """A hundred stops of one name on a hundred lines of one name."""
    lines = tuple(Line(f"Line-{'-' * i}1", "#000000", ("Start", f"Hub{'.' * i}", "Goal")) for i in range(100))
    network = Network("made/up", "easy", lines, {})
    legs = "--".join(
        f"Route Name: 1\nDeparture Stop: {a}\nArrival Stop: {b}\n" for a, b in (("Start", "Hub"), ("Hub", "Goal"))
    )
    check(ask("planning", station_1="Start", station_2="Goal"), [legs], network)


def test_threads_and_batches_change_nothing() -> None:
    stops = {"Red Line": ["A1", "A2", "A3"], "Blue": ["A2", "B1"]}
    network = Network("made/up", "easy", tuple(Line(name, "#0", tuple(names)) for name, names in stops.items()), {})
    rng = random.Random(1)
    asked, texts = [], []
    for i in range(1500):
        start, goal = rng.sample(["A1", "A2", "A3", "B1"], 2)
        asked.append(ask("planning", station_1=start, station_2=goal) if i % 3 else ask("Counting2"))
        plan = plan_text(rng, any_legs(rng, stops, start, goal))
        texts.append(plan if i % 3 else f"\\boxed{{{rng.randrange(3)}}}")
    one = Rubric(mode="graph").score(asked, texts, {"made/up": network})
    two = Rubric(mode="graph", threads=2).score(asked, texts, {"made/up": network})
    for name in ("score", "correct", "detail", "format_valid", "failure"):
        assert np.array_equal(getattr(one, name), getattr(two, name)), name
    known = topology("made/up", network)
    assert one.correct.sum() == sum(score_graph(p, t, known).correct for p, t in zip(asked, texts, strict=True)) > 100


@pytest.mark.skipif(not STATIONS.is_dir(), reason="the real networks are not here")
@pytest.mark.parametrize("exact", [True, False])
def test_real_networks(exact: bool) -> None:
    rng = random.Random(2)
    for path in sorted(STATIONS.glob("*/*.json")):
        lists = json.loads(path.read_text("utf-8"))
        network = network_from_lists(f"{path.parent.name}/{path.stem}", lists) if exact else lists
        stops = {line: [bare_name(name) for name in names] for line, names in lists.items()}
        for _ in range(8):
            start, goal = (rng.choice(rng.choice(list(stops.values()))) for _ in range(2))
            texts = [plan_text(rng, any_legs(rng, stops, start, goal)) for _ in range(12)]
            check(ask("planning", station_1=start, station_2=goal), texts, network)
