"""The records that pass between rooms. Frozen, plain Python, no torch: every room may import this file.

Lifecycle of one training step: ``Problem`` (what is asked) -> ``RolloutGroup`` (what the policy answered) -> arrays of
rewards and advantages beside them. Nothing is ever written back into a record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

KINDS = ("TorF1", "TorF2", "Counting1", "Counting2", "Counting3", "planning")
"""The six question types of ReasonMap-Train, by the names its ``type`` column uses.

TorF1: are two stops on one line. TorF2: is a stop on a line. Counting1: stops between two stops (four choices).
Counting2: lines through a stop. Counting3: lines on the map. planning: an optimal route.
"""

ANSWERS = {
    "TorF1": range(2),
    "TorF2": range(2),
    "Counting1": range(4),
    "Counting2": range(10_000),
    "Counting3": range(10_000),
}
"""What a gold answer may be, by kind; planning questions have none."""
TRANSFERS = range(100)
"""What the fewest transfers of a planning question may be."""

LEVELS = ("easy", "middle", "hard")
"""Difficulty labels of maps (``difficulty_city``) and of planning questions (``difficulty_question``)."""

MetroData = Mapping[str, Sequence[str]]
"""The reference's flat network: line name -> ordered station names, with the data's own transfer and branch markers."""

FinishReason = Literal["stop", "length", "abort"]


class DataError(ValueError):
    """Bad data from a user: the message names the file, the row, the field, the value and the remedy."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One question about one map.

    Example:
        Problem(uid="train-000017", image="/data/maps/norway/oslo.png", question="According to the subway map, ...",
                kind="planning", answer=-1, station_1="Ris Station", station_2="Tøyen Station",
                network_id="norway/oslo", map_difficulty="middle", transfers_required=1)
    """

    uid: str
    """Unique within a data set; every error and every sample names it."""
    image: str | bytes
    """Absolute path of the map's picture, or the encoded picture itself. Problems of one map share the value."""
    question: str
    """The user's text, exactly as the model sees it (without the image)."""
    kind: str
    """One of ``KINDS``."""
    answer: int
    """TorF: 1 yes, 0 no. Counting1: index of the right choice, 0..3. Counting2/3: the count. planning: -1."""
    station_1: str
    """First stop named by the question; planning: where the route starts. May be empty for Counting3."""
    station_2: str
    """Second stop (TorF2: the line); planning: where the route ends. May be empty."""
    network_id: str
    """``country/city``: key into the networks that a data set carries."""
    map_difficulty: str
    """One of ``LEVELS`` (``difficulty_city``)."""
    transfers_required: int = 0
    """Fewest transfers of any route (``question_transfer_count``); 0 for the other kinds."""
    question_difficulty: str | None = None
    """One of ``LEVELS`` for planning: easy, middle, hard for 0, 1, 2 or more transfers."""
    fine_grained_answer: Any = None
    """The steps to the answer, JSON values: a stop list, ``{stop: [lines]}``, or every optimal route's legs."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled answer. ``R`` is its number of tokens, the stop token included."""

    token_ids: tuple[int, ...]
    """[R]"""
    rollout_logprobs: tuple[float, ...]
    """[R] nats, as the engine computed them when it sampled, temperature applied."""
    text: str
    """Decoded without special tokens; what the rubric reads."""
    finish_reason: FinishReason
    policy_version: int
    """Number of optimizer steps behind the weights that sampled it."""


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """All answers to one problem; their prompt is shared. ``P`` is the prompt's length with image tokens expanded."""

    problem: Problem
    prompt_token_ids: tuple[int, ...]
    """[P]"""
    rollouts: tuple[Rollout, ...]
    """``group_size`` of them."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """SGLang's names. ``temperature`` 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_new_tokens: int = 512
    seed: int = 0
    """Two calls with equal seeds, weights and problems give equal answers (local engine)."""
