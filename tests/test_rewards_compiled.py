"""The compiled scorer against the plain one: same numbers for whatever text, in any mode and on any thread
count."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewardmap.rewards import Rubric
from rewardmap.rewards.compiled_text import lower_table
from rewardmap.rewards.parse import clean, clean_network
from rewardmap.rewards.rubric import Mode
from rewardmap.rewards.score import score_paper, score_reference
from rewardmap.rewards.topology import station_key
from rewardmap.types import KINDS, MetroData, Problem

METRO: MetroData = {
    "Red Line": [
        "Alpha Station",
        "Bravo Station (Transfer Station)",
        "Metro Center Station",
        "York University Station",
    ],
    "Blue Line": [
        "Bravo Station (Transfer Station)",
        "Ōta’s Röad Station",
        "135 St Stations",
        "X（old）Station",
    ],
    "Line 1": ["国贸站（换乘站）", "四惠东站", "长沙火车南站站", "东管头南站 ", "Wrong Station"],
    "Line 4": ["国贸站（换乘站）", "西红门站", "Asian Games Village Station"],
    "大兴机场线": ["西红门站", "四惠东站"],
    "Wrong": ["Alpha Station", "K Station", "Station"],
}
LINES = clean_network("net", METRO)
STATIONS = [station for stations in METRO.values() for station in stations]
RUBRICS = {mode: Rubric(mode=mode) for mode in ("reference", "paper")}  # type: ignore[arg-type]

GRAPH = Rubric(mode="graph")
NOISE = st.sampled_from(
    [
        *"-,*\n' ()（）站\r\t\x1c\x85\u3000\u2003\u205f\u1680İΣKȺß�\x00🚇aZ",
        "",
        "--",
        "---",
        "Metro",
        "metro",
        "Univ.",
        "Univ",
        "Tech.",
        "Tech",
        "road",
        "Road",
        "Station",
        "STATION",
        "station",
        "Asian Games Village",
        "八通",
        "大兴",
        "Wrong",
        "Number of Via Stops: 3",
        "Route Name:",
        "Departure Stop: ",
        "Arrival Stop:",
        "route name: ",
    ]
)
NAMES = st.one_of(
    st.sampled_from([*STATIONS, *METRO, "Nowhere", "bravo", "BRAVO STATION", "国贸", "York Univ. Station"]),
    st.lists(st.one_of(NOISE, st.sampled_from(STATIONS), st.text(max_size=4)), max_size=5).map("".join),
)
USUAL = ("Route Name: ", "Departure Stop: ", "Arrival Stop: ")
OTHERS = [
    ("route name: ", "Departure Stop: ", "arrival stop: "),
    ("Route Name:", "Departure Stop:", "Arrival Stop:"),
    ("**Route Name:** ", "**Departure Stop:** ", "**Arrival Stop:** "),
]


def leg(labels: tuple[str, str, str], line: str, start: str, end: str, whole: bool) -> str:
    return f"{labels[0]}{line}" + (f"\n{labels[1]}{start}\n{labels[2]}{end}" if whole else "")


LEGS = st.builds(
    leg,
    st.sampled_from([USUAL] * 6 + OTHERS),
    st.one_of(st.sampled_from([*METRO, "八通线", "4号线大兴线"]), NAMES),
    NAMES,
    NAMES,
    st.sampled_from([True] * 9 + [False]),
)
PLANS = st.lists(st.one_of(LEGS, LEGS, LEGS, NOISE), max_size=5).flatmap(
    lambda legs: st.sampled_from(["\n--\n", "\n---\n", "--", " -- ", "\n-\n"]).map(lambda gap: gap.join(legs))
)
TOKENS = st.sampled_from(
    [
        *"aBcD23+-_.: \n\t={}$%k\\mİK\xa0٣",
        "yes",
        "no",
        "Yes",
        "10",
        "..",
        "000000000000000000002",
        ". ",
        "\\approx",
        "\\ap",
        "prox",
        "{}",
        "oxed{",
        "\\boxed{",
        "\\BOXED{",
        "\\text",
        "\\text{ ",
        "\\mbox",
        "\\left",
        "\\right",
        "^{\\circ}",
        "^\\circ",
        "{m}^3",
        "m^3",
        "{units}",
        "units",
        "{km}",
        "km",
        "\\,",
        "\\!",
        "\\\\",
        "\\$",
        "\\%",
        "le",
        "ft",
        "the answer is",
        "The answer is",
        "the final answer is",
        "The correct answer is",
        "the answer should be",
    ]
)
SHORT = st.lists(st.one_of(TOKENS, TOKENS, st.text(max_size=3)), max_size=9).map("".join)
SHORT = st.one_of(SHORT, SHORT.map(lambda text: f"\\boxed{{{text}}}"))


def ask(kind: str, **fields: object) -> Problem:
    values: dict[str, object] = {
        "uid": "q",
        "image": b"",
        "question": "",
        "answer": -1,
        "station_1": "Alpha Station",
        "station_2": "Bravo Station",
        "network_id": "net",
        "map_difficulty": "easy",
        "transfers_required": 0,
    }
    return Problem(kind=kind, **{**values, **fields})  # type: ignore[arg-type]


def check(problem: Problem, response: str) -> None:
    for mode, plain in (("reference", score_reference), ("paper", score_paper)):
        batch = RUBRICS[mode].score([problem], [response], {"net": METRO})
        want = plain(
            problem.kind,
            response,
            problem.answer,
            clean(problem.station_1),
            clean(problem.station_2),
            problem.transfers_required,
            LINES,
        )
        got = (batch.correct[0], batch.detail[0], batch.format_valid[0], batch.failure[0])
        assert got == tuple(want), (mode, response)
    if problem.station_1 in STATIONS and station_key(problem.station_1) != station_key(problem.station_2):
        assert GRAPH.score([problem], [response], {"net": METRO}).score[0] >= 0.0


@settings(max_examples=600, deadline=None)
@given(PLANS, st.sampled_from([*STATIONS, "Nowhere"]), st.sampled_from(STATIONS), st.integers(0, 3))
def test_any_plan(response: str, start: str, goal: str, transfers: int) -> None:
    check(ask("planning", station_1=start, station_2=goal, transfers_required=transfers), response)


@settings(max_examples=400, deadline=None)
@given(st.data(), st.integers(0, 3))
def test_plans_that_reach_their_goal(data: st.DataObject, transfers: int) -> None:
    """Endpoints always right, so that lines, stops and transfers decide."""
    stops = data.draw(st.lists(st.sampled_from(STATIONS), min_size=2, max_size=5))
    pieces = []
    for start, end in itertools.pairwise(stops):
        line = data.draw(st.sampled_from([*METRO, "Green Line", "八通线"]))
        noise = data.draw(st.sampled_from(["", "", "", "\r", " ", ",", "'", "*", "Metro"]))
        pieces.append(f"Route Name: {line}\nDeparture Stop: {start}{noise}\nArrival Stop: {noise}{end}")
    check(
        ask("planning", station_1=stops[0], station_2=stops[-1], transfers_required=transfers),
        "\n--\n".join(pieces),
    )


@settings(max_examples=800, deadline=None)
@given(SHORT, st.sampled_from(KINDS[:5]), st.sampled_from([0, 1, 2, 3, 10, 10**18]))
def test_any_short_answer(response: str, kind: str, gold: int) -> None:
    check(ask(kind, answer=gold), response)


@settings(max_examples=300, deadline=None)
@given(st.text(), st.sampled_from(KINDS))
def test_any_text(response: str, kind: str) -> None:
    check(ask(kind, answer=1), response)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(KINDS))
def test_any_bytes(response: bytes, kind: str) -> None:
    check(ask(kind, answer=1), response.decode("utf-8", "replace"))
    check(ask(kind, answer=1), response.decode("utf-8", "surrogateescape"))


def test_lower_case_of_every_letter() -> None:
    table = lower_table()
    simple = [point for point in range(0x80, len(table)) if table[point] and table[point] != 1 << 30]
    assert len(simple) > 1300
    assert all(chr(point).lower() == chr(point) for point in range(len(table), sys.maxunicode + 1))
    for point in simple:
        assert chr(point + table[point]) == chr(point).lower()
        assert ("x" + chr(point) + "x").lower() == "x" + chr(point + table[point]) + "x"


def test_threads_and_batches_change_nothing() -> None:
    text = "Route Name: Red Line\nDeparture Stop: Alpha{}\nArrival Stop: Bravo"
    texts = [text.format(n % 7 * ".") for n in range(1500)]
    asked = [ask("planning", transfers_required=n % 3) for n in range(1500)]
    one = Rubric().score(asked, texts, {"net": METRO})
    two = Rubric(threads=2).score(asked, texts, {"net": METRO})
    for name in (field.name for field in dataclasses.fields(one)):
        assert np.array_equal(getattr(one, name), getattr(two, name)), name
    assert one.correct.sum() == len(range(0, 1500, 7))
    assert len(Rubric().score([], [], {}).score) == 0


FORKED = """
import os
from rewardmap.rewards import Rubric
from rewardmap.types import Problem

rubric = Rubric(threads=2)
asked = [Problem(str(n), b"", "", "TorF1", 1, "", "", "net", "easy") for n in range(1500)]

def right():
    return int(rubric.score(asked, ["\\\\boxed{yes}"] * 1500, {"net": {"A": ["B"]}}).correct.sum())

assert right() == 1500
child = os.fork()
if not child:
    os._exit(0 if right() == 1500 else 1)
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_forked_process_scores_with_threads_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


LEG = "Route Name: Red Line\nDeparture Stop: Alpha Station\nArrival Stop: Bravo Station\n--\n"


@pytest.mark.parametrize(
    "unit",
    [
        "-",
        "--",
        "(",
        "（",
        "站",
        "x",
        "Univ",
        "\x00",
        "Route Name: ",
        "Arrival Stop:",
        LEG,
        "\\boxed{",
        "{",
        "}",
        "=",
        ".",
        "\\approx",
        "the answer is",
        "km",
        "\\left",
        "\\\\",
        "9",
        "\u3000",
        "�",
        "İ",
    ],
)
@pytest.mark.parametrize("kind", ["planning", "Counting2"])
@pytest.mark.parametrize("mode", ["reference", "graph"])
def test_a_megabyte_is_scored_in_linear_time(unit: str, kind: str, mode: Mode) -> None:
    sizes = (100_000, 1_000_000)
    rubric = Rubric(mode=mode)
    rubric.score([ask(kind)], ["warm"], {"net": METRO})
    took = []
    for size in sizes:
        text = (unit * (size // len(unit.encode("utf-8", "surrogatepass")) + 1)) + "\nArrival Stop: Bravo"
        times = []
        for _ in range(2):
            began = time.thread_time()
            rubric.score([ask(kind)], [text], {"net": METRO})
            times.append(time.thread_time() - began)
        took.append(min(times))
    assert took[1] < 30 * max(took[0], 0.005), took


def test_ten_thousand_legs() -> None:
    text = LEG * 10_000
    batch = Rubric().score([ask("planning")], [text], {"net": METRO})
    lines = clean_network("net", METRO)
    want = score_reference("planning", text, -1, "alpha", "bravo", 0, lines)
    assert (batch.correct[0], batch.detail[0], batch.failure[0]) == (want.correct, want.detail, want.failure)
    assert batch.detail[0] < -9_000
    verified = Rubric(mode="graph").score([ask("planning")], [text], {"net": METRO})
    assert verified.score[0] >= 0.0
    assert not verified.correct[0]


def test_no_text_is_refused_by_row() -> None:
    with pytest.raises(ValueError, match="response 1 is NoneType"):
        Rubric().score([ask("TorF1")] * 2, ["yes", None], {"net": METRO})  # type: ignore[list-item]


SCRIPT = """
from rewardmap.rewards import Rubric
from rewardmap.types import Problem
asked = Problem("q", b"", "", "TorF1", 1, "", "", "net", "easy")
print(Rubric().score([asked], [chr(92) + "boxed{yes}"], {"net": {"A": ["B"]}}).score[0])
"""


@pytest.mark.slow
def test_the_first_call_says_that_it_compiles_and_the_next_process_does_not(tmp_path: Path) -> None:
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    first, second = (
        subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True) for _ in range(2)
    )
    assert (first.stdout, second.stdout) == ("10.0\n", "10.0\n"), first.stderr + second.stderr
    assert "compiling score_short (a few seconds; once)" in first.stderr
    assert second.stderr == ""


@pytest.mark.slow
def test_without_a_writable_cache_it_still_scores(tmp_path: Path) -> None:
    """A file stands where the cache folder should be, so that not even root can write there."""
    (tmp_path / "file").write_text("")
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "file" / "cache"), "HOME": str(tmp_path / "file")}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True)
    assert done.stdout == "10.0\n", done.stderr
    assert f"in every process, for {tmp_path / 'file' / 'cache'} cannot be written; set NUMBA_CACHE_DIR" in done.stderr


def test_without_a_home_directory_it_compiles_and_names_the_remedy() -> None:
    """As a container's user without a name: no ``HOME``, and no entry among the users."""
    script = """
import os
os.getuid = lambda: 2**31 - 2
from rewardmap.rewards import jit
jit.announce("twice")
print(jit.entry(lambda number: 2 * number)(21))
"""
    env = {key: os.environ[key] for key in os.environ.keys() - {"HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR"}}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.stdout == "42\n", done.stderr
    assert "in every process, for there is no home directory; set NUMBA_CACHE_DIR" in done.stderr


@pytest.mark.slow
def test_processes_that_compile_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", SCRIPT]
    at_once = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0] for process in at_once] == ["10.0\n"] * 3
    after = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (after.stdout, after.stderr) == ("10.0\n", "")


PAPER_CASES = [
    ("Red Line", "Alpha", "Bravo", 0, 1 + 10 + 0.5 * 6),
    ("Purple Line", "Alpha", "Bravo", 0, 1 + 0.5 * 2),
    ("Red Line", "Bravo", "Bravo", 0, 1 + 0.5 * 6),
    ("Red Line", "Bravo", "Alpha", 0, 1 + 0.5 * 4),
]


@pytest.mark.parametrize(("line", "start", "end", "transfers", "score"), PAPER_CASES)
def test_paper_mode(line: str, start: str, end: str, transfers: int, score: float) -> None:
    answer = f"Route Name: {line}\nDeparture Stop: {start}\nArrival Stop: {end}"
    asked = ask("planning", transfers_required=transfers)
    assert RUBRICS["paper"].score([asked], [answer], {"net": METRO}).score[0] == score
    other = Rubric(mode="paper", alpha=1.0, format_reward=0.0, correct_reward=2.0)
    batch = other.score([asked], [answer], {"net": METRO})
    assert batch.score[0] == 2.0 * batch.correct[0] + batch.detail[0]


def test_perfect_detail_of_the_printed_algorithm() -> None:
    """6, 7, 8 for 0, 1, 2 transfers, reading it literally with a count from 0."""
    stops = ["Alpha", "Bravo", "135 St Stations", "Bravo"]
    for transfers in range(3):
        legs = list(zip(["Red Line", "Blue Line", "Blue Line"], stops, stops[1:], strict=False))[: transfers + 1]
        text = "\n--\n".join(f"Route Name: {a}\nDeparture Stop: {b}\nArrival Stop: {c}" for a, b, c in legs)
        asked = ask("planning", station_2=legs[-1][2], transfers_required=transfers)
        batch = RUBRICS["paper"].score([asked], [text], {"net": METRO})
        assert (batch.correct[0], batch.detail[0]) == (True, 6 + transfers)
