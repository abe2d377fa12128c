"""The six kinds of questions about a network, in the wording of ReasonMap and ReasonMap-Plus, with their answers.

A row is a dictionary in ReasonMap-Train's schema. ``Balance`` keeps labels balanced over a whole data set, so that
nothing in the text of a question predicts its answer.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from rewardmap.transit.graph import Network, Route
from rewardmap.types import Problem

_BOXED = 'Please solve the problem and put your answer in one "\\boxed{}". According to the subway map, '
_YES_NO = (
    'Please solve the problem and put your answer (only answer yes or no) in one "\\boxed{}". '
    "According to the subway map, "
)
_CHOICE = (
    'Please solve the multiple choice problem and put your answer (one of ABCD) in one "\\boxed{}". '
    "According to the subway map, "
)
_BLOCK = "Route Name: Line x\nDeparture Stop: xx Station\nArrival Stop: xx Station"

QUESTION_COUNTS: dict[str, dict[str, int]] = {
    "tiny": {"TorF1": 2, "TorF2": 2, "Counting1": 2, "Counting2": 2, "Counting3": 1, "planning": 4}
}
"""Questions per map and kind, by preset."""

COLUMNS = (
    "uid",
    "country",
    "city",
    "station_1",
    "station_2",
    "figure",
    "json",
    "question",
    "answer",
    "type",
    "difficulty_city",
    "difficulty_question",
    "city_line_count",
    "city_transfer_count",
    "question_transfer_count",
    "fine_grained_answer",
)
"""Columns of a row: ReasonMap-Train's, and ``uid`` and ``fine_grained_answer``."""


class Balance:
    """Picks labels so that each is used equally often wherever a map offers it. Deterministic given its generator."""

    def __init__(self) -> None:
        self._used: dict[str, Counter[Hashable]] = {}

    def order(self, rng: np.random.Generator, topic: str, labels: Sequence[Any]) -> list[Any]:
        """``labels``, the least used first, ties in random order."""
        used = self._used.setdefault(topic, Counter())
        shuffled = [labels[index] for index in rng.permutation(len(labels))]
        return sorted(shuffled, key=lambda label: used[label])

    def count(self, topic: str, label: Hashable) -> None:
        """Notes that a question with this label was made."""
        self._used.setdefault(topic, Counter())[label] += 1


def question_text(kind: str, station_1: str = "", station_2: str = "", choices: Sequence[int] = ()) -> str:
    """The text of a question; ``choices`` are the four counts of Counting1, ``station_2`` the line for TorF2."""
    if kind == "TorF1":
        return f"{_YES_NO}is it true that {station_1} is the same line as {station_2}?"
    if kind == "TorF2":
        return f"{_YES_NO}is it true that {station_1} is on the line {station_2}?"
    if kind == "Counting1":
        options = "".join(f"{letter}) {count} \n" for letter, count in zip("ABCD", choices, strict=True))
        return (
            f"{_CHOICE}how many intermediate stops are there between {station_1} and {station_2} "
            f"(except for this two stops)? \n{options}"
        )
    if kind == "Counting2":
        return f"{_BOXED}how many lines pass through {station_1}?"
    if kind == "Counting3":
        return f"{_BOXED}how many subway (metro) lines are there in total?"
    if kind == "planning":
        return (
            f"According to the subway map, how do I get from {station_1} to {station_2}? Provide only one optimal "
            "route, with only the line name and the departure and arrival stations. "
            f"The format should be strictly followed:\n{_BLOCK}\n--\n{_BLOCK}"
        )
    raise ValueError(f"unknown question kind {kind!r}")


def gold_response(problem: Problem) -> str:
    """An ideal answer in exactly the form that the question asks for.

    Raises ValueError for a planning problem that does not carry its optimal routes.
    """
    if problem.kind in ("TorF1", "TorF2"):
        return f"\\boxed{{{'yes' if problem.answer == 1 else 'no'}}}"
    if problem.kind == "Counting1":
        return f"\\boxed{{{'ABCD'[problem.answer]}}}"
    if problem.kind in ("Counting2", "Counting3"):
        return f"\\boxed{{{problem.answer}}}"
    if not problem.fine_grained_answer:
        raise ValueError(f"{problem.uid}: fine_grained_answer holds no route, so there is no gold response")
    return "\n--\n".join(
        f"Route Name: {leg['route_name']}\nDeparture Stop: {leg['departure_stop']}\nArrival Stop: {leg['arrival_stop']}"
        for leg in problem.fine_grained_answer[0]
    )


def make_questions(
    network: Network, counts: dict[str, int], rng: np.random.Generator, balance: Balance
) -> list[dict[str, Any]]:
    """Rows about one map, without repeats, ``counts[kind]`` of each kind where the map offers as many.

    Every row has all ``COLUMNS``; ``figure`` and ``json`` are the paths that ``write_dataset`` uses.
    """
    country, city = network.network_id.split("/")
    rows: list[dict[str, Any]] = []
    for kind, wanted in counts.items():
        asked: set[tuple[str, ...]] = set()
        for _ in range(wanted):
            made = _MAKERS[kind](network, rng, balance, asked)
            if made is None:
                break
            row = {
                "uid": f"{country}-{city}-{kind}-{len(asked)}",
                "country": country,
                "city": city,
                "figure": f"./maps/{country}/{city}.png",
                "json": f"./stations/{country}/{city}.json",
                "type": kind,
                "difficulty_city": network.map_difficulty,
                "difficulty_question": network.map_difficulty,
                "city_line_count": len(network.lines),
                "city_transfer_count": network.transfer_marks(),
                "question_transfer_count": 0,
                **made,
            }
            row["fine_grained_answer"] = json.dumps(row["fine_grained_answer"], ensure_ascii=False)
            rows.append({column: row[column] for column in COLUMNS})
    return rows


Asked = set[tuple[str, ...]]
Made = dict[str, Any] | None


def _fresh_pair(
    pairs: list[tuple[str, str]], asked: Asked, rng: np.random.Generator
) -> tuple[str, str] | None:
    """A random pair that was not asked yet, in random order."""
    left = [pair for pair in pairs if tuple(sorted(pair)) not in asked]
    if not left:
        return None
    first, second = left[int(rng.integers(len(left)))]
    asked.add(tuple(sorted((first, second))))
    return (first, second) if rng.integers(2) else (second, first)


def _pairs(network: Network) -> list[tuple[str, str]]:
    stops = network.stations
    return [(a, b) for i, b in enumerate(stops) for a in stops[:i]]


def _same_line(network: Network, rng: np.random.Generator, balance: Balance, asked: Asked) -> Made:
    share = {
        p: bool(set(network.lines_through(p[0])) & set(network.lines_through(p[1]))) for p in _pairs(network)
    }
    neighbours = {edge for line in network.lines for edge in line.edges()}
    for label in balance.order(rng, "TorF1", (True, False)):
        pool = [pair for pair, shared in share.items() if shared == label]
        # Far stops of one line are harder than neighbours; across lines the hard ones lie one stop beyond a change.
        hard = [p for p in pool if (tuple(sorted(p)) not in neighbours if label else _near(network, *p))]
        pair = _fresh_pair(hard, asked, rng) or _fresh_pair(pool, asked, rng)
        if pair is not None:
            balance.count("TorF1", label)
            lines = {stop: list(network.lines_through(stop)) for stop in pair}
            text = question_text("TorF1", *pair)
            return {
                "station_1": pair[0],
                "station_2": pair[1],
                "question": text,
                "answer": int(label),
                "fine_grained_answer": lines,
            }
    return None


def _near(network: Network, first: str, second: str) -> bool:
    return any(
        {first, second} == {a, c}
        for line in network.lines
        for a, b in (edge for pair in line.edges() for edge in (pair, pair[::-1]))
        for other in network.lines
        for c in (end for pair in other.edges() if b in pair for end in pair if end != b)
    )


def _on_line(network: Network, rng: np.random.Generator, balance: Balance, asked: Asked) -> Made:
    for label in balance.order(rng, "TorF2", (True, False)):
        pool = [
            (stop, line.name)
            for stop in network.stations
            for line in network.lines
            if (line.name in network.lines_through(stop)) == label and (stop, line.name) not in asked
        ]
        if pool:
            # The line is drawn first, so that a long line is not asked about more often than a short one.
            name = balance.order(rng, f"TorF2 {label}", sorted({line for _, line in pool}))[0]
            stops = [stop for stop, line in pool if line == name]
            stop = stops[int(rng.integers(len(stops)))]
            asked.add((stop, name))
            balance.count("TorF2", label)
            balance.count(f"TorF2 {label}", name)
            return {
                "station_1": stop,
                "station_2": name,
                "question": question_text("TorF2", stop, name),
                "answer": int(label),
                "fine_grained_answer": {stop: list(network.lines_through(stop))},
            }
    return None


def _between(network: Network) -> dict[tuple[str, str], list[str]]:
    """Stops strictly between two stops of one line, where all lines that join them agree; loops are ambiguous."""
    found: dict[tuple[str, str], list[str] | None] = {}
    for line in network.lines:
        for service in line.services():
            for j, last in enumerate(service):
                for i, first in enumerate(service[:j]):
                    via = None if line.loop else list(service[i + 1 : j])
                    pair = (first, last)
                    if pair not in found and pair[::-1] in found:
                        pair, via = pair[::-1], via[::-1] if via is not None else None
                    if pair in found and found[pair] != via:
                        found[pair] = None
                    else:
                        found[pair] = via
    return {pair: via for pair, via in found.items() if via is not None}


def _count_between(network: Network, rng: np.random.Generator, balance: Balance, asked: Asked) -> Made:
    between = _between(network)
    counts = sorted({len(via) for via in between.values()})
    for count in balance.order(rng, "Counting1", counts):
        pair = _fresh_pair([p for p, via in between.items() if len(via) == count], asked, rng)
        if pair is None:
            continue
        via = between[pair] if pair in between else between[pair[::-1]][::-1]
        # Counts are balanced and distractors drawn from the same range, so the rank of a choice tells nothing.
        others = [other for other in range(max(3, *counts) + 1) if other != count]
        choices = [int(value) for value in rng.choice(others, 3, replace=False)]
        answer = int(balance.order(rng, "Counting1 letter", (0, 1, 2, 3))[0])
        choices.insert(answer, count)
        balance.count("Counting1", count)
        balance.count("Counting1 letter", answer)
        return {
            "station_1": pair[0],
            "station_2": pair[1],
            "question": question_text("Counting1", *pair, choices),
            "answer": answer,
            "fine_grained_answer": via,
        }
    return None


def _count_lines_through(network: Network, rng: np.random.Generator, balance: Balance, asked: Asked) -> Made:
    for shared in balance.order(rng, "Counting2", (True, False)):
        stops = [
            s for s in network.stations if (len(network.lines_through(s)) > 1) == shared and (s,) not in asked
        ]
        if stops:
            stop = stops[int(rng.integers(len(stops)))]
            asked.add((stop,))
            balance.count("Counting2", shared)
            lines = list(network.lines_through(stop))
            return {
                "station_1": stop,
                "station_2": "",
                "question": question_text("Counting2", stop),
                "answer": len(lines),
                "fine_grained_answer": {stop: lines},
            }
    return None


def _count_lines(network: Network, rng: np.random.Generator, balance: Balance, asked: Asked) -> Made:
    if ("all",) in asked:
        return None
    asked.add(("all",))
    return {
        "station_1": "",
        "station_2": "",
        "question": question_text("Counting3"),
        "answer": len(network.lines),
        "fine_grained_answer": [line.name for line in network.lines],
    }


def routes_as_plans(routes: Sequence[Route]) -> list[list[dict[str, Any]]]:
    """Routes in ReasonMap's ``routes`` form: per plan, per leg, names, via stops and their number."""
    return [
        [
            {
                "route_name": leg.line,
                "departure_stop": leg.departure,
                "arrival_stop": leg.arrival,
                "via_stops": list(leg.via),
                "num_via_stops": len(leg.via),
            }
            for leg in route
        ]
        for route in routes
    ]


def _plan(network: Network, rng: np.random.Generator, balance: Balance, asked: Asked) -> Made:
    by_transfers: dict[int, list[tuple[str, str]]] = {}
    for pair in _pairs(network):
        by_transfers.setdefault(len(network.shortest_routes(*pair)[0]) - 1, []).append(pair)
    for transfers in balance.order(rng, "planning", (0, 1)):
        pair = _fresh_pair(by_transfers.get(transfers, []), asked, rng)
        if pair is None:
            continue
        balance.count("planning", transfers)
        return {
            "station_1": pair[0],
            "station_2": pair[1],
            "question": question_text("planning", *pair),
            "answer": -1,
            "difficulty_question": ("easy", "middle")[transfers],
            "question_transfer_count": transfers,
            "fine_grained_answer": routes_as_plans(network.shortest_routes(*pair)),
        }
    return None


_MAKERS: dict[str, Callable[[Network, np.random.Generator, Balance, Asked], Made]] = {
    "TorF1": _same_line,
    "TorF2": _on_line,
    "Counting1": _count_between,
    "Counting2": _count_lines_through,
    "Counting3": _count_lines,
    "planning": _plan,
}
