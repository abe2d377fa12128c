"""Answers that ignore the picture: how much of a test split the words of its questions give away.

All kinds but planning: the majority answer; the majority among questions naming the same first stop, or the
same second (for TorF2 the line). Counting1 also, where every question offers four numbers: the offered number
that was right most often when offered; the rank among the offered numbers that was right most often. planning:
one leg on the line, or two legs changing at the stop, that most training routes accept.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from rewardmap.rewards import Networks, Rubric
from rewardmap.transit.graph import Network
from rewardmap.types import MetroData, Problem

MAX_ROUTES = 20
"""Candidates of each form of route, the most frequent ones of the training questions."""


def blind_policies(
    kind: str,
    seen: Sequence[Problem],
    asked: Sequence[Problem],
    networks: Networks,
    rubric: Rubric,
) -> dict[str, NDArray[np.bool_]]:
    """Every policy for one kind, fitted on ``seen``: name -> which of the n ``asked`` it gets right, [n].

    Args:
        seen, asked: problems of that kind, at least one each.
        networks: those of both.
    """
    if kind == "planning":
        return _planning_policies(seen, asked, networks, rubric)
    return {
        name: np.array([answer(problem) == problem.answer for problem in asked])
        for name, answer in _answer_policies(kind, seen, asked).items()
    }


def _answer_policies(
    kind: str, seen: Sequence[Problem], asked: Sequence[Problem]
) -> dict[str, Callable[[Problem], int]]:
    majority = Counter(problem.answer for problem in seen).most_common(1)[0][0]
    policies: dict[str, Callable[[Problem], int]] = {f"always {majority}": lambda problem: majority}
    for name in ("station_1", "station_2"):
        by_name: dict[str, Counter[int]] = {}
        for problem in seen:
            by_name.setdefault(getattr(problem, name), Counter())[problem.answer] += 1
        best = {key: counts.most_common(1)[0][0] for key, counts in by_name.items()}
        if len(best) > 1:
            policies[f"most frequent for {name}"] = partial(_look_up, best, name, majority)
    # Read when a run is over: questions that offer something else must not fail then.
    if kind == "Counting1" and all(len(_choices(problem)) == 4 for problem in (*seen, *asked)):
        offered = [_choices(problem) for problem in seen]
        right, shown, ranks = Counter[int](), Counter[int](), Counter[int]()
        for problem, choices in zip(seen, offered, strict=True):
            shown.update(choices)
            right[choices[problem.answer]] += 1
            ranks[sorted(choices).index(choices[problem.answer])] += 1
        rank = ranks.most_common(1)[0][0]
        rate = {number: right[number] / shown[number] for number in shown}
        policies["the number most often right"] = lambda problem: max(
            range(4), key=lambda index: rate.get(_choices(problem)[index], 0.0)
        )
        policies[f"the number of rank {rank + 1}"] = lambda problem: _choices(problem).index(
            sorted(_choices(problem))[rank]
        )
    return policies


def _look_up(best: Mapping[str, int], name: str, otherwise: int, problem: Problem) -> int:
    return best.get(getattr(problem, name), otherwise)


def _choices(problem: Problem) -> list[int]:
    """The numbers offered behind A) to D): four in the published form."""
    return [int(number) for number in re.findall(r"^\s*[ABCD]\) *(-?\d{1,9})\b", problem.question, re.MULTILINE)]


def _planning_policies(
    seen: Sequence[Problem], asked: Sequence[Problem], networks: Networks, rubric: Rubric
) -> dict[str, NDArray[np.bool_]]:
    """Correctness [asked] of the best one-leg and the best two-leg answer on ``seen``."""
    lines = Counter(line for problem in seen for line in _line_names(networks[problem.network_id]))
    changes = Counter(
        (first["route_name"], first["arrival_stop"], second["route_name"])
        for problem in seen
        for first, second in itertools.pairwise((problem.fine_grained_answer or [[]])[0])
    )
    families: dict[str, list[tuple[str, ...]]] = {
        "one leg on": [(line,) for line, _ in lines.most_common(MAX_ROUTES)],
        "two legs,": [change for change, _ in changes.most_common(MAX_ROUTES)],
    }
    found = {}
    for family, routes in families.items():
        if routes:
            route = max(routes, key=lambda route: _accepted(route, seen, networks, rubric).mean())
            found[f"{family} {' / '.join(route)}"] = _accepted(route, asked, networks, rubric)
    return found


def _line_names(network: MetroData | Network) -> list[str]:
    return [line.name for line in network.lines] if isinstance(network, Network) else list(network)


def _accepted(
    route: tuple[str, ...], problems: Sequence[Problem], networks: Networks, rubric: Rubric
) -> NDArray[np.bool_]:
    """Which problems a fixed route solves: lines at even places, stops to change at between them."""
    answers = []
    for problem in problems:
        stops = [problem.station_1, *route[1::2], problem.station_2]
        legs = [
            f"Route Name: {line}\nDeparture Stop: {first}\nArrival Stop: {last}"
            for line, (first, last) in zip(route[::2], itertools.pairwise(stops), strict=True)
        ]
        answers.append("\n--\n".join(legs))
    return rubric.score(problems, answers, networks).correct
