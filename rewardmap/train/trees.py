"""Answers that share a prefix, as a tree: what stands once, how large it is, where it may be cut.

A tree holds all sequences about one picture (or one text prompt): map -> question -> answer -> turns. Sequences are
sorted by their tokens; then each shares most with the one before it, and "tokens shared with the one before" says
everything about the tree: which tokens are new, how many pairs attention sees, where a cut costs least.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from rewardmap.policy import EncodedPrompt


@dataclass(frozen=True, slots=True)
class Answers:
    """All answers to one prompt, as the packer takes them."""

    prompt: EncodedPrompt
    image: str | bytes | None
    """None: a prompt without a picture."""
    responses: tuple[tuple[int, ...], ...]
    """Token ids of each answer, stop token included; of several turns, the other side's tokens too."""
    sequences: tuple[int, ...]
    """Each answer's number in the batch: where its advantage stands."""
    rollout_logprobs: tuple[tuple[float, ...], ...] | None = None
    """nats, as sampled, one per token; None for supervised answers."""
    loss_masks: tuple[tuple[bool, ...], ...] | None = None
    """Which tokens of each answer the policy said (the others it was told); None: all of them."""


@dataclass(frozen=True, slots=True)
class Branch:
    """One sequence of a tree: a prompt and one answer to it."""

    prompt: EncodedPrompt
    prompt_ids: np.ndarray
    """[P] int64, one array for all answers to the prompt."""
    next_position: int
    """Of the answer's first token: one past the prompt's largest."""
    response: np.ndarray
    """[R] int64"""
    sequence: int
    rollout_logprobs: tuple[float, ...] | None
    loss_mask: tuple[bool, ...] | None

    def inputs(self, start: int = 0) -> np.ndarray:
        """Tokens the model reads, from the one numbered ``start`` on; the answer's last is only ever a target."""
        answer = self.response[max(start - len(self.prompt_ids), 0) : -1]
        return np.concatenate([self.prompt_ids[start:], answer])

    @property
    def num_inputs(self) -> int:
        return len(self.prompt_ids) + len(self.response) - 1


@dataclass(frozen=True)
class Tree:
    """Sequences about one picture, sorted by their tokens."""

    image: str | bytes | None
    image_tokens: int
    branches: tuple[Branch, ...]
    shared: tuple[int, ...]
    """Tokens each branch has in common with the one before it; 0 for the first."""

    @cached_property
    def tokens(self) -> int:
        """Packed tokens: every prefix once."""
        return sum(branch.num_inputs - shared for branch, shared in zip(self.branches, self.shared, strict=True))

    @cached_property
    def pairs(self) -> int:
        """Visible (query, key) pairs of one head."""
        return sum(
            branch.num_inputs * (branch.num_inputs + 1) // 2 - shared * (shared + 1) // 2
            for branch, shared in zip(self.branches, self.shared, strict=True)
        )

    @cached_property
    def rows(self) -> int:
        """Response tokens, which alone meet the head."""
        return sum(len(branch.response) for branch in self.branches)

    def part(self, start: int, stop: int) -> Tree:
        """The tree of branches start..stop; the prefix it shares with the rest stands in both."""
        return Tree(self.image, self.image_tokens, self.branches[start:stop], (0, *self.shared[start + 1 : stop]))


def grow(batch: Sequence[Answers], share: bool = True) -> list[Tree]:
    """Trees of a batch, one per picture, or per prompt where there is none; in the order of first appearance.

    Args:
        share: False puts every sequence into a tree of its own, as an engine without sharing would compute it.

    Raises:
        ValueError: an answer without tokens, or numbers, masks or log-probabilities that do not fit the answers.
    """
    trees: dict[object, tuple[Answers, list[Branch]]] = {}
    for item in batch:
        for branch in _branches(item):
            key: object = (item.image or item.prompt.token_ids) if share else branch.sequence
            trees.setdefault(key, (item, []))[1].append(branch)
    return [_tree(first, branches) for first, branches in trees.values()]


def cut(tree: Tree, max_tokens: int) -> list[Tree]:
    """The fewest pieces of at most ``max_tokens`` packed tokens, about equal in size; the tree itself if it fits.

    Raises:
        ValueError: one prompt with one answer exceeds the budget; the problem is named.
    """
    if tree.tokens <= max_tokens:
        return [tree]
    longest = max(tree.branches, key=lambda branch: branch.num_inputs)
    if longest.num_inputs > max_tokens:
        raise ValueError(
            f"{longest.prompt.uid or 'a problem'}: one prompt with one answer takes {longest.num_inputs} tokens, over "
            f"train.max_tokens_per_micro_batch={max_tokens}; raise it, or lower policy.max_pixels or "
            "rollout.max_new_tokens"
        )
    fewest = len(_ends(tree, max_tokens))
    low, high = longest.num_inputs, max_tokens  # the smallest budget that needs no more pieces evens them out
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_ends(tree, middle)) == fewest else (middle + 1, high)
    ends = _ends(tree, low)
    return [tree.part(start, stop) for start, stop in zip([0, *ends[:-1]], ends, strict=True)]


def _ends(tree: Tree, max_tokens: int) -> list[int]:
    """Where pieces end when each takes as many branches as fit."""
    ends, used = [], 0
    for index, (branch, shared) in enumerate(zip(tree.branches, tree.shared, strict=True)):
        if used and used + branch.num_inputs - shared > max_tokens:
            ends.append(index)
            used = 0
        used += branch.num_inputs - (shared if used else 0)
    return [*ends, len(tree.branches)]


def _branches(item: Answers) -> list[Branch]:
    name = item.prompt.uid or "a problem"
    nothing = [None] * len(item.responses)
    logprobs, masks = item.rollout_logprobs or nothing, item.loss_masks or nothing
    if not len(item.responses) == len(item.sequences) == len(logprobs) == len(masks):
        raise ValueError(
            f"{name}: {len(item.responses)} answers with {len(item.sequences)} numbers, {len(logprobs)} rows of "
            f"log-probabilities and {len(masks)} masks; give one of each per answer"
        )
    for response, row, mask in zip(item.responses, logprobs, masks, strict=True):
        if not response:
            raise ValueError(f"{name}: an answer has no tokens; the engine must return at least the stop token")
        if any(values is not None and len(values) != len(response) for values in (row, mask)):
            raise ValueError(f"{name}: an answer of {len(response)} tokens whose log-probabilities or mask are not")
    ids, after = np.array(item.prompt.token_ids, np.int64), int(item.prompt.position_ids.max()) + 1
    return [
        Branch(item.prompt, ids, after, np.array(response, np.int64), number, row, mask)
        for response, number, row, mask in zip(item.responses, item.sequences, logprobs, masks, strict=True)
    ]


def _tree(first: Answers, branches: list[Branch]) -> Tree:
    # Most significant byte first, bytes sort as the tokens do.
    ordered = tuple(sorted(branches, key=lambda branch: branch.inputs().astype(">u4").tobytes()))
    shared = (0, *(_common(a, b) for a, b in pairwise(ordered)))
    return Tree(first.image, first.prompt.image_tokens, ordered, shared)


def _common(a: Branch, b: Branch) -> int:
    """Length of the common prefix."""
    known = len(a.prompt_ids) if a.prompt_ids is b.prompt_ids else 0
    left, right = a.inputs(known), b.inputs(known)
    n = min(len(left), len(right))
    different = np.flatnonzero(left[:n] != right[:n])
    return known + (int(different[0]) if len(different) else n)
