"""What a mode must be able to do, and the networks that it has read."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rewardmap.rewards.score import Outcome
from rewardmap.rewards.texts import Chunk
from rewardmap.transit.graph import Network
from rewardmap.types import DataError, MetroData, Problem

AnyNetwork: TypeAlias = MetroData | Network
Networks: TypeAlias = Mapping[str, AnyNetwork]
"""``Problem.network_id`` -> the raw stations file, markers and all, or a ``transit.Network``."""

HAND_BACK = -1
"""In place of a failure code: this answer is left to ``Scorer.by_hand``."""


class Results(NamedTuple):
    """Filled by ``Scorer.score``, one value per answer; see ``RewardBatch``."""

    correct: NDArray[np.bool_]
    detail: NDArray[np.float64]
    format_valid: NDArray[np.bool_]
    failure: NDArray[np.int8]

    def part(self, rows: slice) -> Results:
        """Views of those rows."""
        return Results(self.correct[rows], self.detail[rows], self.format_valid[rows], self.failure[rows])


class Scorer(Protocol):
    """A mode and the networks it knows. Never changed once made, so that threads may share it."""

    @property
    def networks(self) -> Networks:
        """Those it knows."""

    def knowing(self, networks: Networks) -> Scorer:
        """The same mode, which also knows these. Raises DataError for a malformed one."""

    def score(self, chunk: Chunk, results: Results) -> None:
        """Score each of the answers, outside the interpreter's lock.

        Raises DataError for a problem that its network cannot pose.
        """

    def by_hand(self, problem: Problem, response: str) -> Outcome:
        """The plain definition, for what ``score`` has marked ``HAND_BACK``."""


class Reader:
    """Holds a scorer and has it read each network once, recognised by identity."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._lock = threading.Lock()

    def scorer(self, problems: Sequence[Problem], networks: Networks, posed: Sequence[Problem]) -> Scorer:
        """One that knows the networks of ``posed``. Where these have to be read, those of all ``problems`` are.

        Raises DataError where one is missing or malformed.
        """
        with self._lock:
            known = self._scorer.networks
            if any(known.get(name, self) is not networks.get(name) for name in {one.network_id for one in posed}):
                self._scorer = self._scorer.knowing(_unread(problems, networks, known))
            return self._scorer


def _unread(problems: Sequence[Problem], networks: Networks, known: Networks) -> Networks:
    new: dict[str, AnyNetwork] = {}
    for problem in problems:
        network = networks.get(problem.network_id)
        if network is None:
            raise DataError(
                f"row {problem.uid!r}, field 'network_id': no network {problem.network_id!r} among the "
                f"{len(networks)} given; load its stations file"
            )
        if known.get(problem.network_id) is not network:
            new[problem.network_id] = network
    return new
