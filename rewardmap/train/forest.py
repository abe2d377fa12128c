"""Pack answers into prefix forests: every shared prefix stands once.

A packed row is one micro-batch: the tokens of several trees (``rewardmap.train.trees``), each in depth-first order.
``rewardmap_kernels.tree_attention`` documents the mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rewardmap.train.balance import CostModel, balance
from rewardmap.train.trees import Answers, Branch, Tree, grow

__all__ = ["Answers", "PackedForest", "pack_forest"]

Tensor = torch.Tensor


@dataclass(frozen=True)
class PackedForest:
    """One packed row. T tokens, N response rows (one per response token that trains).

    Example: a prompt of 30 tokens with answers of 3 and 5 tokens packs into T = 30 + 2 + 4 (a stop token is never an
    input) and N = 8; ``hidden_index`` holds 29 twice, once for the first token of each answer.

    A filler (``loss_mask`` all zero) is one token without a picture and one row without weight. It stands where a rank
    has no more work while others have: it runs every collective of a step and adds exactly zero to every gradient.
    """

    input_ids: Tensor
    """[T] int64"""
    position_ids: Tensor
    """[3, T] int64, mRoPE positions of the unshared sequences."""
    subtree_end: Tensor
    """[T] int64; see ``rewardmap_kernels.tree_attention``."""
    images: tuple[str | bytes, ...]
    """Pictures in the order of their placeholders."""
    image_tokens: tuple[int, ...]
    """Of each picture."""
    hidden_index: Tensor
    """[N] int64: the packed token whose hidden state predicts this row's target."""
    target: Tensor
    """[N] int64"""
    sequence: Tensor
    """[N] int64: the answer's number in the batch."""
    loss_mask: Tensor
    """[N] float32: 1, or 0 in a filler."""
    rollout_logprobs: Tensor | None
    """[N] float32 nats; None when any answer came without."""
    logical_tokens: int
    """Tokens of the unshared sequences, what an engine without sharing would compute."""

    @property
    def pairs(self) -> int:
        """Visible pairs of tokens."""
        return int((self.subtree_end - torch.arange(len(self.subtree_end))).sum())


def pack_forest(
    batch: Sequence[Answers],
    max_tokens: int,
    *,
    ranks: int = 1,
    rank: int = 0,
    cost: CostModel | None = None,
    share: bool = True,
) -> list[PackedForest]:
    """Pack answers into this rank's micro-batches of at most ``max_tokens`` packed tokens.

    Every rank passes the same batch and gets the same number of micro-batches, fillers where it has less work
    (``rewardmap.train.balance`` says how work is divided). Nothing is exchanged: equal batches give equal plans.

    Args:
        ranks, rank: size of the data-parallel group, and this process's place in it.
        cost: what a tree costs; None counts its tokens.
        share: False packs every sequence by itself, for comparison.

    Raises:
        ValueError: one prompt with one answer exceeds the budget, or an answer is malformed; the problem is named.
    """
    plan = balance(grow(batch, share), max_tokens, ranks, cost)
    filler = batch[0].prompt.token_ids[0] if batch else 0
    return [_pack_row(trees) if trees else _filler(filler) for trees in plan[rank]]


def _pack_row(trees: Sequence[Tree]) -> PackedForest:
    total = sum(tree.tokens for tree in trees)
    ids, ends = np.empty(total, np.int64), np.empty(total, np.int64)
    positions = np.empty((3, total), np.int64)
    rows = _Rows([], [], [], [])
    size = logical = 0
    for tree in trees:
        path = np.empty(max(branch.num_inputs for branch in tree.branches), np.int64)  # packed index by depth
        length = 0
        for branch, shared in zip(tree.branches, tree.shared, strict=True):
            ends[path[shared:length]] = size  # the nodes this branch does not share end here
            new = slice(size, size + branch.num_inputs - shared)
            ids[new] = branch.inputs(shared)
            positions[:, new] = _positions(branch, shared)
            length = branch.num_inputs
            path[shared:length] = np.arange(new.start, new.stop)
            size = new.stop
            logical += length
            rows.add(branch, path[len(branch.prompt_ids) - 1 : length])
        ends[path[:length]] = size
    logprobs = [values for values in rows.logprobs if values is not None]
    complete = len(logprobs) == len(rows.logprobs)
    return PackedForest(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions),
        subtree_end=torch.from_numpy(ends),
        images=tuple(tree.image for tree in trees if tree.image is not None),
        image_tokens=tuple(tree.image_tokens for tree in trees if tree.image is not None),
        hidden_index=torch.from_numpy(np.concatenate(rows.hidden)),
        target=torch.from_numpy(np.concatenate(rows.target)),
        sequence=torch.from_numpy(np.concatenate(rows.sequence)),
        loss_mask=torch.ones(sum(map(len, rows.target))),
        rollout_logprobs=torch.from_numpy(np.concatenate(logprobs)).float() if complete else None,
        logical_tokens=logical,
    )


@dataclass
class _Rows:
    """Response rows as they come, one array per branch."""

    hidden: list[np.ndarray]
    target: list[np.ndarray]
    sequence: list[np.ndarray]
    logprobs: list[np.ndarray | None]

    def add(self, branch: Branch, hidden: np.ndarray) -> None:
        on = slice(None) if branch.loss_mask is None else np.array(branch.loss_mask, bool)
        self.hidden.append(hidden[on].copy())  # the path it comes from is written over
        self.target.append(branch.response[on])
        self.sequence.append(np.full(len(self.target[-1]), branch.sequence, np.int64))
        self.logprobs.append(None if branch.rollout_logprobs is None else np.array(branch.rollout_logprobs)[on])


def _positions(branch: Branch, shared: int) -> np.ndarray:
    """[3, num_inputs - shared]: positions from token ``shared`` on; an answer goes on after the prompt's largest."""
    prompt = branch.prompt.position_ids
    first = max(shared - prompt.shape[1], 0)
    answer = np.arange(first, len(branch.response) - 1) + branch.next_position
    return np.concatenate([prompt[:, shared:], np.broadcast_to(answer, (3, len(answer)))], axis=1)


def _filler(token: int) -> PackedForest:
    zero = torch.zeros(1, dtype=torch.int64)
    return PackedForest(
        input_ids=zero + token,
        position_ids=torch.zeros(3, 1, dtype=torch.int64),
        subtree_end=zero + 1,
        images=(),
        image_tokens=(),
        hidden_index=zero,
        target=zero,
        sequence=zero,
        loss_mask=torch.zeros(1),
        rollout_logprobs=torch.zeros(1),
        logical_tokens=0,
    )
