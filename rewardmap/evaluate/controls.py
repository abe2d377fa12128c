"""Controls that need no new answers from the model's eyes: maps swapped between questions, and picture-blind priors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rewardmap.blind import blind_policies
from rewardmap.evaluate.weights import evaluation_weight
from rewardmap.rewards import Networks, Rubric
from rewardmap.types import KINDS, Problem


def swap_maps(problems: Sequence[Problem], seed: int) -> list[Problem]:
    """The ``text_only`` control: every question gets the picture of another map; its network and answer stay.

    Maps are permuted along one random cycle: none keeps its picture, and every picture stays in use.

    Raises:
        ValueError: fewer than two maps.
    """
    pictures = {problem.network_id: problem.image for problem in problems}
    if len(pictures) < 2:
        raise ValueError("swapping maps needs at least two of them; give a split with more maps")
    order = [list(pictures)[index] for index in np.random.default_rng(seed).permutation(len(pictures))]
    swapped = {name: pictures[other] for name, other in zip(order, order[1:] + order[:1], strict=True)}
    return [dataclasses.replace(problem, image=swapped[problem.network_id]) for problem in problems]


@dataclass(frozen=True, slots=True)
class TextPrior:
    """What the best answer that ignores the picture scores on a test split."""

    weighted_accuracy: float
    kinds: dict[str, float]
    """Plain accuracy by kind."""
    policies: dict[str, str]
    """By kind: which policy was the best."""


def text_prior(train: Sequence[Problem], test: Sequence[Problem], networks: Networks, rubric: Rubric) -> TextPrior:
    """Accuracy of the best picture-blind policy for each kind (``rewardmap.blind`` lists them).

    Policies are fitted on ``train``; of each kind's, the one with the highest accuracy on ``test`` itself
    counts, which makes the bar higher, not lower. A kind that ``train`` lacks is fitted on ``test``.

    Args:
        networks: those of both splits.

    Raises:
        ValueError: no test problems.
    """
    if not test:
        raise ValueError("a text prior needs test problems; the split is empty")
    kinds, policies = {}, {}
    above = below = 0.0
    for kind in KINDS:
        asked = [problem for problem in test if problem.kind == kind]
        if not asked:
            continue
        seen = [problem for problem in train if problem.kind == kind] or asked
        options = blind_policies(kind, seen, asked, networks, rubric)
        name = max(options, key=lambda option: options[option].mean())
        weights = np.array([evaluation_weight(problem) for problem in asked])
        kinds[kind], policies[kind] = float(options[name].mean()), name
        above += float(weights @ options[name])
        below += float(weights.sum())
    return TextPrior(above / below, kinds, policies)
