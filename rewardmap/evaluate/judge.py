"""From answers to evaluated records: correctness, form and map score by the benchmark's rules, whatever was trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rewardmap.evaluate.answers import Answer, named
from rewardmap.evaluate.map_score import map_score, reference_plans
from rewardmap.evaluate.reading import (
    Normaliser,
    form_of,
    lenient_answer,
    route_is_right,
    stated_legs,
    without_thinking,
)
from rewardmap.evaluate.records import Evaluation, Record
from rewardmap.evaluate.weights import evaluation_weight
from rewardmap.rewards import Networks, Rubric
from rewardmap.transit.graph import Network
from rewardmap.types import DataError, Problem


@dataclass(frozen=True)
class Judge:
    """The rules of an evaluation. They do not depend on the reward that a policy was trained with."""

    normaliser: Normaliser = "training"
    """How names in routes are cleaned: as the training reward does, or as ReasonMap's evaluation does, stricter."""
    extraction: Literal["published", "lenient"] = "published"
    """How short answers are read: as the published code does, or as VLMEvalKit does."""
    map_scores: bool = True
    """Whether routes get a map score; it needs reference routes."""

    def check(self, problems: Sequence[Problem], networks: Networks) -> None:
        """Whether these problems can be judged, before anything is answered.

        Raises:
            ValueError: no problems.
            DataError: a malformed problem, a network that is missing, or planning questions without the reference
                routes that a map score needs; uids are named.
        """
        if not problems:
            raise ValueError("nothing to evaluate: the split is empty")
        for problem in problems:
            evaluation_weight(problem)
        Rubric().score(problems, [""] * len(problems), networks)
        if not self.map_scores:
            return
        bad: list[tuple[str, str]] = []
        for problem in problems:
            if problem.kind == "planning":
                try:
                    reference_plans(problem)
                except DataError as error:
                    bad.append((problem.uid, str(error)))
        if bad:
            raise DataError(
                f"{len(bad)} planning questions cannot get a map score, the first: {bad[0][1]}; all: "
                f"{named([uid for uid, _ in bad])}; add the annotation, or leave map scores out (--no-map-scores)"
            )

    def evaluation(
        self,
        problems: Sequence[Problem],
        answers: Sequence[Answer],
        networks: Networks,
        topologies: Networks | None = None,
    ) -> Evaluation:
        """Judge ``answers[i]`` to ``problems[i]``.

        Args:
            networks: the flat lists that the published rules read.
            topologies: true networks, on which routes are verified as well; None leaves that out.
        """
        plain = [
            without_thinking(answer.text) if problem.kind == "planning" else answer.text
            for problem, answer in zip(problems, answers, strict=True)
        ]
        scores = Rubric().score(problems, plain, networks)
        verified = _verified(problems, plain, topologies) if topologies else [None] * len(problems)
        records = []
        for i, (problem, answer, text) in enumerate(zip(problems, answers, plain, strict=True)):
            planning = problem.kind == "planning"
            correct = bool(scores.correct[i])
            released = paper = None
            if planning:
                form = form_of(problem)
                legs = stated_legs(text, form)
                if self.normaliser == "evaluation" or form != "short":
                    network = networks[problem.network_id]
                    lists = network.metro_data() if isinstance(network, Network) else network
                    correct = route_is_right(problem, legs, lists, self.normaliser)
                if self.map_scores:
                    released, paper = (map_score(problem, legs, correct, how) for how in ("released", "paper"))
            elif self.extraction == "lenient":
                correct = lenient_answer(problem.kind, text) == problem.answer
            records.append(
                Record(
                    uid=problem.uid,
                    kind=problem.kind,
                    network_id=problem.network_id,
                    map_difficulty=problem.map_difficulty,
                    transfers_required=problem.transfers_required,
                    weight=evaluation_weight(problem),
                    correct=correct,
                    format_valid=bool(scores.format_valid[i]),
                    response=answer.text,
                    num_tokens=answer.num_tokens,
                    verified=verified[i],
                    map_score=released,
                    map_score_paper=paper,
                )
            )
        return Evaluation(tuple(records))


def _verified(problems: Sequence[Problem], texts: Sequence[str], topologies: Networks) -> list[bool | None]:
    """Whether each route can be ridden; None for other kinds, and where the question's own stops are not on the true
    network."""
    graph = Rubric(mode="graph")
    verified: list[bool | None] = [None] * len(problems)
    routes = [i for i, problem in enumerate(problems) if problem.kind == "planning"]
    try:
        correct = graph.score([problems[i] for i in routes], [texts[i] for i in routes], topologies).correct.tolist()
    except DataError:  # one by one, to leave out the questions at fault alone
        correct = [_rides(graph, problems[i], texts[i], topologies) for i in routes]
    for i, rides in zip(routes, correct, strict=True):
        verified[i] = rides
    return verified


def _rides(graph: Rubric, problem: Problem, text: str, topologies: Networks) -> bool | None:
    try:
        return bool(graph.score([problem], [text], topologies).correct[0])
    except DataError:
        return None
