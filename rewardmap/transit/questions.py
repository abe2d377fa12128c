"""Questions of all six kinds about a network, with their answers, as rows of ReasonMap-Train.

``Balance`` keeps labels balanced over a whole data set, so that nothing in the text of a question predicts
its answer; wrong answers are made hard (a stop just beyond an interchange, a line that passes close by).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from rewardmap.transit.graph import Network
from rewardmap.transit.wording import gold_response, question_text, routes_as_plans
from rewardmap.types import Problem

__all__ = ["COLUMNS", "QUESTION_COUNTS", "Balance", "as_problem", "gold_response", "make_questions", "question_text"]

QUESTION_COUNTS: dict[str, dict[str, int]] = {
    "tiny": {"TorF1": 2, "TorF2": 2, "Counting1": 2, "Counting2": 2, "Counting3": 1, "planning": 4},
    "full": {"TorF1": 35, "TorF2": 31, "Counting1": 35, "Counting2": 37, "Counting3": 1, "planning": 40},
}
QUESTION_COUNTS |= {"grid-tiny": QUESTION_COUNTS["tiny"], "grid": QUESTION_COUNTS["full"]}
"""Questions per map and kind, by preset; "full" as in ReasonMap and ReasonMap-Plus, fewer where a map has fewer."""

_PLANNING = {"tiny": (2, 2), "full": (20, 15, 5), "grid-tiny": (2, 2), "grid": (20, 15, 5)}
"""Planning questions per map by transfers. A map without enough such pairs gets fewer questions, not others."""
_MOST_LINES = {"tiny": 2, "full": 3, "grid-tiny": 2, "grid": 2}
"""Counting2 is balanced over 1, 2, ... lines through a stop; this many and more are one class."""

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

Pair = tuple[str, str]
Made = dict[str, Any] | None


class Balance:
    """Orders labels so that each is used equally often, wherever the maps offer it."""

    def __init__(self) -> None:
        self._used: dict[str, Counter[Hashable]] = {}

    def order(self, rng: np.random.Generator, topic: str, labels: Sequence[Any]) -> list[Any]:
        """``labels``, the least used first, ties in random order."""
        used = self._used.setdefault(topic, Counter())
        shuffled = [labels[index] for index in rng.permutation(len(labels))]
        return sorted(shuffled, key=lambda label: used[label])

    def share(self, topic: str, label: Hashable) -> float:
        """Share of a label among the questions of a topic so far; 0 where there are none."""
        used = self._used.get(topic, Counter())
        return used[label] / max(1, used.total())

    def count(self, topic: str, label: Hashable) -> None:
        """Notes that a question with this label was made."""
        self._used.setdefault(topic, Counter())[label] += 1


def make_questions(network: Network, preset: str, rng: np.random.Generator, balance: Balance) -> list[dict[str, Any]]:
    """Rows about one map without repeats: ``QUESTION_COUNTS[preset]``, fewer of a kind where the map has
    fewer.

    Every row has all ``COLUMNS``; ``figure`` and ``json`` are the paths that ``write_dataset`` uses.
    """
    country, city = network.network_id.split("/")
    asker = _Asker(network, preset, rng, balance)
    rows: list[dict[str, Any]] = []
    for kind, wanted in QUESTION_COUNTS[preset].items():
        for number in range(1, wanted + 1):
            made = asker.ask(kind, number - 1)
            if made is None:
                continue
            row = {
                "uid": f"{country}-{city}-{kind}-{number}",
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


def as_problem(row: Mapping[str, Any], image: str | bytes, network_id: str) -> Problem:
    """The question of a row of ``make_questions`` about a picture."""
    return Problem(
        uid=row["uid"],
        image=image,
        question=row["question"],
        kind=row["type"],
        answer=row["answer"],
        station_1=row["station_1"],
        station_2=row["station_2"],
        network_id=network_id,
        map_difficulty=row["difficulty_city"],
        transfers_required=row["question_transfer_count"],
        fine_grained_answer=json.loads(row["fine_grained_answer"]),
    )


class _Asker:
    """Asks about one network; what several questions need is worked out once."""

    def __init__(self, network: Network, preset: str, rng: np.random.Generator, balance: Balance) -> None:
        self.network, self.preset, self.rng, self.balance = network, preset, rng, balance
        self.asked: dict[str, set[Pair]] = {}
        self.makers: dict[str, Callable[[int], Made]] = {
            "TorF1": self._same_line,
            "TorF2": self._on_line,
            "Counting1": self._stops_between,
            "Counting2": self._lines_through,
            "Counting3": self._lines_in_all,
            "planning": self._plan,
        }

    def ask(self, kind: str, number: int) -> Made:
        """Question ``number`` (from 0) of a kind, or None if the map has no more."""
        return self.makers[kind](number)

    def _fresh(self, kind: str, pairs: Sequence[Pair]) -> Pair | None:
        """A random pair that was not asked yet, in random order."""
        asked = self.asked.setdefault(kind, set())
        left = [pair for pair in pairs if pair not in asked]
        if not left:
            return None
        pair = left[int(self.rng.integers(len(left)))]
        asked |= {pair, pair[::-1]}
        return pair if self.rng.integers(2) else pair[::-1]

    @cached_property
    def _pairs(self) -> list[Pair]:
        stops = self.network.stations
        return [(a, b) for i, b in enumerate(stops) for a in stops[:i]]

    @cached_property
    def _neighbours(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {stop: set() for stop in self.network.stations}
        for line in self.network.lines:
            for a, b in line.edges():
                found[a].add(b)
                found[b].add(a)
        return found

    @cached_property
    def _same_line_pools(self) -> dict[bool, tuple[list[Pair], list[Pair]]]:
        """Label -> (hard pairs, all pairs). Far stops of one line, stops two apart on different lines."""
        lines = {stop: set(self.network.lines_through(stop)) for stop in self.network.stations}
        near = self._neighbours
        pools: dict[bool, tuple[list[Pair], list[Pair]]] = {True: ([], []), False: ([], [])}
        for a, b in self._pairs:
            label = bool(lines[a] & lines[b])
            pools[label][1].append((a, b))
            if (b not in near[a]) if label else (near[a] & near[b]):
                pools[label][0].append((a, b))
        return pools

    def _same_line(self, number: int) -> Made:
        for label in self.balance.order(self.rng, "TorF1", (True, False)):
            hard, every = self._same_line_pools[label]
            pair = self._fresh("TorF1", hard) or self._fresh("TorF1", every)
            if pair is not None:
                self.balance.count("TorF1", label)
                return {
                    "station_1": pair[0],
                    "station_2": pair[1],
                    "question": question_text("TorF1", *pair),
                    "answer": int(label),
                    "fine_grained_answer": {stop: list(self.network.lines_through(stop)) for stop in pair},
                }
        return None

    def _on_line(self, number: int) -> Made:
        asked = self.asked.setdefault("TorF2", set())
        for label in self.balance.order(self.rng, "TorF2", (True, False)):
            pool: dict[str, list[str]] = {}
            for stop in self.network.stations:
                through = self.network.lines_through(stop)
                for line in self.network.lines:
                    if (line.name in through) == label and (stop, line.name) not in asked:
                        pool.setdefault(line.name, []).append(stop)
            if pool:
                # The line is drawn first, so that a long line is not asked about more often than a short one.
                name = self.balance.order(self.rng, f"TorF2 {label}", sorted(pool))[0]
                stops = pool[name] if label else self._close_to(name, pool[name])
                stop = stops[int(self.rng.integers(len(stops)))]
                asked.add((stop, name))
                self.balance.count("TorF2", label)
                self.balance.count(f"TorF2 {label}", name)
                return {
                    "station_1": stop,
                    "station_2": name,
                    "question": question_text("TorF2", stop, name),
                    "answer": int(label),
                    "fine_grained_answer": {stop: list(self.network.lines_through(stop))},
                }
        return None

    def _close_to(self, name: str, stops: list[str]) -> list[str]:
        """The nearer half of ``stops``, as the picture shows them, to a line; all where there are few or no picture."""
        if len(stops) < 10 or not self.network.positions:
            return stops
        at = self.network.positions
        line = np.array([at[stop] for stop in self.network.line(name).stops()])
        gaps = {stop: float(np.abs(line - np.array(at[stop])).max(axis=1).min()) for stop in stops}
        return sorted(stops, key=lambda stop: (gaps[stop], stop))[: len(stops) // 2]

    @cached_property
    def _between(self) -> dict[int, list[Pair]]:
        """Number of stops between two stops of a line -> such pairs; not on loops, nor where two lines differ."""
        self._via: dict[Pair, list[str] | None] = {}
        for line in self.network.lines:
            for service in line.services():
                for j, last in enumerate(service):
                    for i, first in enumerate(service[:j]):
                        via = None if line.loop else list(service[i + 1 : j])
                        pair = (first, last)
                        if pair not in self._via and pair[::-1] in self._via:
                            pair, via = pair[::-1], None if via is None else via[::-1]
                        if self._via.setdefault(pair, via) != via:
                            self._via[pair] = None
        pools: dict[int, list[Pair]] = {}
        for pair, stops in self._via.items():
            if stops is not None:
                pools.setdefault(len(stops), []).append(pair)
        return pools

    def _stops_between(self, number: int) -> Made:
        most = max(3, *self._between, 0)
        topic = f"Counting1 up to {most}"
        for count in self.balance.order(self.rng, topic, sorted(self._between)):
            pair = self._fresh("Counting1", self._between[count])
            if pair is None:
                continue
            via = self._via[pair] if pair in self._via else list(reversed(self._via[pair[::-1]] or []))
            # Counts are balanced and distractors drawn from the same range: a choice's rank tells nothing.
            others = [other for other in range(most + 1) if other != count]
            choices = [int(value) for value in self.rng.choice(others, 3, replace=False)]
            answer = int(self.balance.order(self.rng, "Counting1 letter", (0, 1, 2, 3))[0])
            choices.insert(answer, count)
            self.balance.count(topic, count)
            self.balance.count("Counting1 letter", answer)
            return {
                "station_1": pair[0],
                "station_2": pair[1],
                "question": question_text("Counting1", *pair, choices),
                "answer": answer,
                "fine_grained_answer": via,
            }
        return None

    def _lines_through(self, number: int) -> Made:
        asked = self.asked.setdefault("Counting2", set())
        most = _MOST_LINES[self.preset]
        pools: dict[int, list[str]] = {}
        for stop in self.network.stations:
            if (stop, "") not in asked:
                pools.setdefault(min(most, len(self.network.lines_through(stop))), []).append(stop)
        if not pools:
            return None
        label = self.balance.order(self.rng, "Counting2", sorted(pools))[0]
        if set(pools) == {1} and self.balance.share("Counting2", 1) > 0.5:
            return None  # more of these would make "1" the answer to guess
        stop = pools[label][int(self.rng.integers(len(pools[label])))]
        asked.add((stop, ""))
        self.balance.count("Counting2", label)
        lines = list(self.network.lines_through(stop))
        return {
            "station_1": stop,
            "station_2": "",
            "question": question_text("Counting2", stop),
            "answer": len(lines),
            "fine_grained_answer": {stop: lines},
        }

    def _lines_in_all(self, number: int) -> Made:
        return {
            "station_1": "",
            "station_2": "",
            "question": question_text("Counting3"),
            "answer": len(self.network.lines),
            "fine_grained_answer": [line.name for line in self.network.lines],
        }

    @cached_property
    def _by_transfers(self) -> dict[int, list[Pair]]:
        """Transfers -> pairs that need so many in one direction at least."""
        stops, fewest = self.network.stations, self.network.fewest_transfers()
        self._fewest: dict[Pair, int] = {}
        pools: dict[int, list[Pair]] = {}
        for j in range(len(stops)):
            for i in range(j):
                there, back = int(fewest[i, j]), int(fewest[j, i])
                self._fewest[stops[i], stops[j]], self._fewest[stops[j], stops[i]] = there, back
                for transfers in {there, back}:
                    pools.setdefault(transfers, []).append((stops[i], stops[j]))
        return pools

    def _plan(self, number: int) -> Made:
        transfers, before = 0, 0
        while number >= before + _PLANNING[self.preset][transfers]:
            before += _PLANNING[self.preset][transfers]
            transfers += 1
        pair = self._fresh("planning", self._by_transfers.get(transfers, []))
        if pair is None:
            return None
        if self._fewest[pair] != transfers:  # a one-way line: only the other direction needs so many
            pair = pair[::-1]
        return {
            "station_1": pair[0],
            "station_2": pair[1],
            "question": question_text("planning", *pair),
            "answer": -1,
            "difficulty_question": ("easy", "middle", "hard")[min(transfers, 2)],
            "question_transfer_count": transfers,
            "fine_grained_answer": routes_as_plans(self.network.shortest_routes(*pair)),
        }
