"""Answers per second of the compiled reward beside plain Python, both equal to the published scores.

Three plain implementations of ``reference`` are timed: ``as_published`` goes step by step as the published code does
(which reaches 3,770 answers/s on one core of a quiet machine: below that, this one is not quiet); ``self_contained``
cleans the lines that an answer names once for it; ``prepared`` is the package's own, which cleans each network once.
Texts are made anew for every repetition, so that nothing of them is cached; the compiled time holds everything from
Python strings to arrays. CPU time of one thread where one thread works, wall time where two are compared.
``second_core`` is how much more two processes, which share nothing, score at once than one of them alone, in the same
minutes: what two threads can reach on the machine at best.
``load_average`` is from before the run: where it is not near 0 the times of two threads say little.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import random
import resource
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent))
from records import processor

from rewardmap.rewards import Networks, Rubric
from rewardmap.rewards.parse import clean, clean_network, split_legs, strip_markers
from rewardmap.rewards.rubric import MODES
from rewardmap.rewards.score import check_route, line_key, route_detail, score_reference
from rewardmap.transit.topology import network_from_lists
from rewardmap.types import MetroData, Problem

STATIONS = Path(__file__).parents[2] / "shared" / "data" / "stations"
ANSWERS = 8192
GROUP = 8
RESULTS = Path(__file__).parent / "results"

pytestmark = pytest.mark.skipif(not STATIONS.is_dir(), reason="the real networks are not here")


def stations() -> dict[str, MetroData]:
    return {
        f"{path.parent.name}/{path.stem}": json.loads(path.read_text("utf-8"))
        for path in sorted(STATIONS.glob("*/*.json"))
    }


def spoil(rng: random.Random, legs: list[tuple[str, str, str]], lines: list[str], stops: list[str]) -> None:
    """What a policy under training gets wrong: a line, a stop, a spelling."""
    i = rng.randrange(len(legs))
    line, start, end = legs[i]
    legs[i] = rng.choice(
        [
            (rng.choice(lines), start, end),
            (line, rng.choice(stops), end),
            (line, start, rng.choice(stops)),
            (line, start.lower(), end.removesuffix(" Station").removesuffix("站")),
            (line + "x", start, end),
        ]
    )


def make(networks: dict[str, MetroData], seed: int = 0) -> tuple[list[Problem], list[str]]:
    """ANSWERS distinct planning answers in groups of GROUP per problem: a third right, the others spoilt."""
    rng = random.Random(seed)
    plain = {
        name: {line: [strip_markers(stop) for stop in stops] for line, stops in metro.items()}
        for name, metro in networks.items()
    }
    problems: list[Problem] = []
    answers: dict[str, None] = {}
    while len(answers) < ANSWERS:
        name = rng.choice(sorted(plain))
        lines = plain[name]
        here = start = rng.choice(lines[rng.choice(list(lines))])
        legs = []
        for _ in range(rng.choice([1, 1, 2, 2, 3])):
            line = rng.choice([line for line, stops in lines.items() if here in stops])
            end = rng.choice(lines[line])
            legs.append((line, here, end))
            here = end
        problem = Problem(
            f"{len(problems)}",
            b"",
            "",
            "planning",
            -1,
            start,
            here,
            name,
            "hard",
            transfers_required=len(legs) - 1,
        )
        stops = [stop for line in lines.values() for stop in line]
        group: dict[str, None] = {}
        for k in range(50 * GROUP):
            tried = list(legs)
            if k % 3:
                spoil(rng, tried, list(lines), stops)
            opening = rng.choice(["", "The best route is:\n", "Sure!\n", "\n"])
            gap = rng.choice(["\n--\n", "\n---\n", " -- "])
            text = opening + gap.join(f"Route Name: {a}\nDeparture Stop: {b}\nArrival Stop: {c}" for a, b, c in tried)
            if text not in answers and len(group) < GROUP:
                group[text] = None
        if len(group) == GROUP:
            answers |= group
            problems += [problem] * GROUP
    return problems, list(answers)


def as_published(problem: Problem, response: str, metro: dict[str, list[str]]) -> tuple[bool, float]:
    """The published procedure step for step: correctness and detail each read the answer, and clean a line's
    list for each leg that names it; for direct questions detail cleans the lines it looks through."""
    start, goal = clean(problem.station_1), clean(problem.station_2)
    required = problem.transfers_required
    legs = [leg for leg in split_legs(response)[0] if leg.exact_labels]
    correct = bool(legs) and legs[0].departure == start and legs[-1].arrival == goal
    for i, leg in enumerate(legs if correct else ()):
        stops = [clean(stop) for stop in metro.get(line_key(leg.line), ())]
        joined = i + 1 == len(legs) or leg.arrival == legs[i + 1].departure
        correct = correct and joined and leg.departure in stops and leg.arrival in stops
    legs = split_legs(response)[0]
    if not legs or legs[0].departure != start or legs[-1].arrival != goal:
        return correct, 0.0
    detail = 2.0
    for i, leg in enumerate(legs):
        detail -= 5.0 if i + 1 > required else 0.0
        line = line_key(leg.line)
        if line not in metro:
            continue
        if required:
            detail += 3.0
        else:
            for other, names in metro.items():
                cleaned = [clean(name) for name in names]
                if start in cleaned and goal in cleaned and other == line:
                    detail += 4.0
                    break
        stops = [clean(stop) for stop in metro[line]]
        joined = i + 1 < len(legs) and leg.arrival == legs[i + 1].departure
        if joined and i + 1 <= required and leg.departure in stops and leg.arrival in stops:
            detail += 1.0
    return correct, min(detail, 10.0)


def self_contained(problem: Problem, response: str, metro: dict[str, list[str]]) -> tuple[bool, float]:
    """The same result, where the lines that an answer names are cleaned once for it."""
    legs, _ = split_legs(response)
    start, goal = clean(problem.station_1), clean(problem.station_2)
    named = {line_key(leg.line) for leg in legs}
    lines = {line: frozenset(map(clean, metro[line])) for line in named if line in metro}
    exact = [leg for leg in legs if leg.exact_labels]
    correct = check_route(exact, start, goal, lines) == "none"
    return correct, route_detail(legs, start, goal, problem.transfers_required, lines)


def resident() -> float:
    """MiB of memory that the process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def best_of(run: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    times = []
    for _ in range(repeats):
        began = clock()
        run()
        times.append(clock() - began)
    return min(times)


def again(answers: list[str]) -> list[str]:
    return [answer[:1] + answer[1:] for answer in answers]


def score_when_told(pipe: Connection, modes: tuple[str, ...]) -> None:
    """In a process: for every mode received, score the answers once and send the seconds it took."""
    networks = stations()
    problems, answers = make(networks)
    known = networks_of(networks)
    rubrics = {mode: Rubric(mode=mode) for mode in modes}  # type: ignore[arg-type]
    for mode, rubric in rubrics.items():
        rubric.score(problems, answers, known[mode])
    while True:
        fresh = again(answers)
        pipe.send(0.0)
        mode = pipe.recv()
        if not mode:
            return
        began = time.perf_counter()
        rubrics[mode].score(problems, fresh, known[mode])
        pipe.send(time.perf_counter() - began)


class Rivals:
    """Two processes that score at once: how much more they do than one of them is ``gain``."""

    def __init__(self, modes: tuple[str, ...]) -> None:
        sys.path.append(str(Path(__file__).parents[1]))  # pytest may know this module without a way to import it
        context = multiprocessing.get_context("spawn")
        self.took: dict[str, tuple[list[float], list[float]]] = {mode: ([], []) for mode in modes}
        self._pipes = []
        for _ in range(2):
            ours, theirs = context.Pipe()
            context.Process(target=score_when_told, args=(theirs, modes), daemon=True).start()
            self._pipes.append(ours)

    def round(self) -> None:
        for mode, (alone, together) in self.took.items():
            alone.append(self._run(mode, self._pipes[:1]))
            together.append(self._run(mode, self._pipes))

    def gain(self) -> dict[str, float]:
        return {mode: 2 * min(alone) / min(together) for mode, (alone, together) in self.took.items()}

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.recv()
            pipe.send("")

    def _run(self, mode: str, pipes: list[Connection]) -> float:
        for pipe in pipes:
            pipe.recv()
        for pipe in pipes:
            pipe.send(mode)
        return max(pipe.recv() for pipe in pipes)


def networks_of(lists: dict[str, MetroData]) -> dict[str, Networks]:
    """What each mode is given to know."""
    exact = {name: network_from_lists(name, metro) for name, metro in lists.items()}
    return {mode: exact if mode == "graph" else lists for mode in MODES}


def measure(threads: tuple[int, ...] = (1, 2)) -> dict[str, object]:
    load = os.getloadavg()[0]
    networks = stations()
    problems, answers = make(networks)
    assert len(set(answers)) == ANSWERS
    stripped = {
        name: {line: [strip_markers(stop) for stop in stops] for line, stops in metro.items()}
        for name, metro in networks.items()
    }
    cleaned = {name: clean_network(name, metro) for name, metro in networks.items()}
    part = range(0, ANSWERS, 4)

    def published() -> list[tuple[bool, float]]:
        return [as_published(problems[i], answers[i], stripped[problems[i].network_id]) for i in part]

    def naive() -> list[tuple[bool, float]]:
        return [self_contained(problems[i], answers[i], stripped[problems[i].network_id]) for i in part]

    def prepared() -> list[tuple[bool, float]]:
        return [
            score_reference(
                p.kind,
                a,
                -1,
                clean(p.station_1),
                clean(p.station_2),
                p.transfers_required,
                cleaned[p.network_id],
            )[:2]
            for p, a in zip(problems, answers, strict=True)
        ]

    rubric = Rubric()
    batch = rubric.score(problems, answers, networks)
    rate = {
        "plain_as_published": len(part) / best_of(published, 3, time.thread_time),
        "plain_self_contained": len(part) / best_of(naive, 3, time.thread_time),
        "plain_prepared": ANSWERS / best_of(prepared, 3, time.thread_time),
    }
    times: dict[str, list[float]] = {}
    rubrics = {(mode, n): Rubric(mode=mode, threads=n) for mode in MODES for n in threads}
    known = networks_of(networks)
    rivals = Rivals(MODES)
    for _ in range(25):  # by turns, so that what else the machine does meets all alike
        for (mode, n), used in rubrics.items():
            fresh = again(answers)
            began = time.perf_counter(), time.thread_time()
            used.score(problems, fresh, known[mode])
            times.setdefault(f"{mode}_{n}_threads_wall", []).append(time.perf_counter() - began[0])
            if n == 1:
                times.setdefault(f"{mode}_1_thread", []).append(time.thread_time() - began[1])
        rivals.round()
    rivals.close()
    rate |= {f"compiled_{name}": ANSWERS / min(took) for name, took in times.items()}
    before = resident()
    rubric.score(problems * 8, answers * 8, networks)
    want = prepared()
    assert naive() == [want[i] for i in part] == published()
    return {
        "answers": ANSWERS,
        "bytes_per_answer": sum(len(answer.encode()) for answer in answers) / ANSWERS,
        "right": float(np.mean(batch.correct)),
        "different_scores": sum(
            (bool(c), float(d)) != tuple(w) for c, d, w in zip(batch.correct, batch.detail, want, strict=True)
        ),
        "answers_per_second": rate,
        "second_core": rivals.gain(),
        "mib_at_rest": before,
        "mib_added_by_8_times_as_many": resident() - before,
        "cpu": processor(),
        "load_average": load,
        "cores_allowed": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
    }


def test_compiled_beside_plain() -> None:
    cores = len(os.sched_getaffinity(0))
    row = measure((1, 2) if cores > 1 else (1,))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "rewards.json").write_text(json.dumps(row, indent=1) + "\n")
    print(json.dumps(row, indent=1))
    rate = row["answers_per_second"]
    assert isinstance(rate, dict)
    assert row["different_scores"] == 0
    assert rate["compiled_reference_1_thread"] >= 100 * rate["plain_as_published"]
    assert rate["compiled_reference_1_thread"] >= 10 * rate["plain_prepared"]
