"""A minute of noise, in every mode and for every kind: nothing crashes, and compiled code says what plain code says.

Noise is random bytes, tokens that mean something to a parser, answers with bytes changed, control characters, invalid
UTF-8 (which a text holds as lone surrogates or replacement characters), and now and then a megabyte of any of these.
"""

from __future__ import annotations

import math
import random
import time

import numpy as np
import pytest

from rewardmap.rewards import Rubric
from rewardmap.rewards.graph import score_graph
from rewardmap.rewards.parse import clean, clean_network
from rewardmap.rewards.score import Outcome, score_paper, score_reference
from rewardmap.rewards.topology import topology
from rewardmap.transit.topology import network_from_lists
from rewardmap.types import KINDS, Problem

LISTS = {
    "Red Line": ["Alpha Station", "Brävo (North) Station（换乘站）", "Metro Center Station", "York University Station"],
    "Line 1": ["国贸站（换乘站）", "四惠东站", "Brävo (North) Station (Transfer Station)", "长沙火车南站站", "Wrong"],
    "1号线": ["国贸", "St. John", "st john ", "Alpha Station"],
    "大兴线": ["国贸站", "135 St Stations", "国贸站"],
}
NETWORK = network_from_lists("made/up", LISTS)
STATIONS = [stop for stops in LISTS.values() for stop in stops]
TOKENS = [
    *STATIONS,
    *LISTS,
    *("Route Name:", "Route Name: ", "Departure Stop: ", "Arrival Stop: ", "route name：", "**Arrival Stop:** "),
    *("\n", "\n", "--", "\n--\n", "-", ":", "：", " ", "\r", "\t", "\x00", "\x1b[0m", "\x7f", "\x85", "\u2028"),
    *("\\boxed{", "oxed{", "\\BOXED{", "{", "}", "{}", "=", "\\approx", "\\text{", "\\frac12", "$", "%", "^\\circ"),
    *("yes", "No", "A", "b", "2", "+3", "1_0", "٣", "½", "²", "９", "-1", "0.5", "1/2", "the answer is "),
    *("Stops: [", "Lines: [", "]", ",", "[", "</think>", "<think>", "八通", "大兴", "Univ.", "Tech", "Metro", "站"),
    *("İ", "ß", "ſ", "Σ", "ﬁ", "Ａ", "（", "）", "(", ")", "\u0301", "\u200b", "\ufeff", "\U0010ffff", "🚇"),
    *("\ud800", "\udfff", "\udcff", "Station"),
]  # fmt: skip


def ask(rng: random.Random) -> Problem:
    kind = rng.choice(KINDS)
    start, goal = rng.choices(STATIONS, k=2)
    fine = rng.choice([None, STATIONS[:3], {"Alpha Station": ["Red Line", "1号线"]}, "x", [1]])
    return Problem(
        "q", b"", "", kind, rng.choice([0, 1, 2, 3, -1, 10**18]), start, goal, "made/up",
        rng.choice(["easy", "middle", "hard"]), rng.randrange(3), None, fine,
    )  # fmt: skip


def answer(rng: random.Random, asked: Problem) -> str:
    """One that may be right."""
    if asked.kind != "planning":
        gold = {"TorF1": ("no", "yes"), "TorF2": ("no", "yes"), "Counting1": tuple("ABCD")}.get(asked.kind)
        said = str(asked.answer) if gold is None else gold[asked.answer % len(gold)]
        said = rng.choice([said, said, rng.choice(TOKENS)])
        return f"Stops: [{', '.join(rng.choices(STATIONS, k=3))}]\n\\boxed{{{said}}}"
    here, legs = asked.station_1, []
    for _ in range(rng.randint(1, 3)):
        line = rng.choice([line for line, stops in LISTS.items() if here in stops] or [*LISTS])
        end = asked.station_2 if asked.station_2 in LISTS[line] else rng.choice(LISTS[line])
        legs.append(f"Route Name: {line}\nDeparture Stop: {here}\nArrival Stop: {end}")
        here = end
    return "\n--\n".join(legs)


def noise(rng: random.Random, asked: Problem) -> str:
    how = rng.randrange(6)
    if how == 0:
        text = rng.randbytes(rng.randrange(300)).decode("utf-8", rng.choice(["replace", "surrogateescape"]))
    elif how == 1:
        text = "".join(rng.choices(TOKENS, k=rng.randrange(40)))
    elif how == 2:
        text = "".join(chr(rng.randrange(rng.choice([0x20, 0x80, 0x110000]))) for _ in range(rng.randrange(60)))
    else:
        text = answer(rng, asked)
        for _ in range(rng.randrange(4)):
            at = rng.randrange(len(text) + 1)
            text = text[:at] + rng.choice(TOKENS) + text[at + rng.randrange(6) :]
        if how == 5:
            raw = bytearray(text.encode("utf-8", "surrogatepass"))
            for _ in range(rng.randrange(4)):
                raw[rng.randrange(len(raw))] = rng.randrange(256)
            text = raw.decode("utf-8", "surrogateescape")
    if rng.randrange(2000) == 0 and text:
        text *= 1_000_000 // len(text)
    return text


@pytest.mark.slow
@pytest.mark.parametrize("seed", [time.time_ns()], ids=["new"])
def test_a_minute_of_noise(seed: int) -> None:
    print("seed", seed)
    rng = random.Random(seed)
    lines, exact = clean_network("made/up", LISTS), topology("made/up", NETWORK)
    rubrics = {mode: Rubric(mode=mode, threads=2) for mode in ("reference", "paper", "graph")}  # type: ignore[arg-type]

    def plain(mode: str, asked: Problem, text: str) -> Outcome:
        if mode == "graph":
            return score_graph(asked, text, exact)
        published = score_reference if mode == "reference" else score_paper
        ends = clean(asked.station_1), clean(asked.station_2)
        return published(asked.kind, text, asked.answer, *ends, asked.transfers_required, lines)

    answers = right = 0
    began = time.monotonic()
    while time.monotonic() - began < 60:
        asked = [ask(rng) for _ in range(600)]
        texts = [noise(rng, one) for one in asked]
        for mode, rubric in rubrics.items():
            batch = rubric.score(asked, texts, {"made/up": NETWORK if mode == "graph" else LISTS})
            for i, text in enumerate(texts):
                got = (batch.correct[i], batch.detail[i], batch.format_valid[i], batch.failure[i])
                assert got == tuple(plain(mode, asked[i], text)), (seed, mode, asked[i], text[:2000])
            assert np.isfinite(batch.score).all()
            if mode == "graph":
                assert batch.score.min() >= 0.0
                weighted = batch.score / batch.weight
                assert weighted[batch.correct].min(initial=math.inf) > 10.0 > weighted[~batch.correct].max(initial=0.0)
                right += int(batch.correct.sum())
        answers += len(texts)
    print(answers, "answers,", right, "right in graph mode")
    assert right > answers // 100
