"""Pack answers into prefix forests: every shared prefix stands once.

A tree is map -> question -> answer. Its tokens lie in depth-first order: the prefix that all questions about the map
share (template, image), then each question's rest followed by its answers. ``rewardmap_kernels.tree_attention``
documents the mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rewardmap.policy import EncodedPrompt

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class Answers:
    """All answers to one prompt, as the packer takes them."""

    prompt: EncodedPrompt
    image: str | bytes
    responses: tuple[tuple[int, ...], ...]
    """Token ids of each answer, stop token included."""
    sequences: tuple[int, ...]
    """Each answer's number in the batch: where its advantage stands."""
    rollout_logprobs: tuple[tuple[float, ...], ...] | None = None
    """nats, as sampled; None for supervised answers."""


@dataclass(frozen=True)
class PackedForest:
    """One packed row. T tokens, N response rows (one per response token).

    Example: a prompt of 30 tokens with answers of 3 and 5 tokens packs into T = 30 + 2 + 4 (a stop token is never an
    input) and N = 8; ``hidden_index`` starts with 29 twice, once for the first token of each answer.
    """

    input_ids: Tensor
    """[T] int64"""
    position_ids: Tensor
    """[3, T] int64, mRoPE positions of the unshared sequences."""
    subtree_end: Tensor
    """[T] int64; see ``rewardmap_kernels.tree_attention``."""
    images: tuple[str | bytes, ...]
    """Pictures in the order of their placeholders."""
    hidden_index: Tensor
    """[N] int64: the packed token whose hidden state predicts this row's target."""
    target: Tensor
    """[N] int64"""
    sequence: Tensor
    """[N] int64: the answer's number in the batch."""
    rollout_logprobs: Tensor | None
    """[N] float32 nats; None when any answer came without."""
    logical_tokens: int
    """Tokens of the unshared sequences, what an engine without sharing would compute."""


def pack_forest(batch: Sequence[Answers], max_tokens: int) -> list[PackedForest]:
    """Pack answers into micro-batches of at most ``max_tokens`` packed tokens.

    Answers about the same image form one tree. Trees are placed first-fit by decreasing size; a tree larger than the
    budget is cut between its questions, a question larger than the budget between its answers.

    Raises:
        ValueError: one prompt with one answer exceeds the budget, or an answer is empty.
    """
    trees: dict[str | bytes, list[Answers]] = {}
    for item in batch:
        if not all(item.responses):
            raise ValueError("an answer has no tokens; the engine must return at least the stop token")
        trees.setdefault(item.image, []).append(item)
    pieces = [piece for tree in trees.values() for piece in _cut(tree, max_tokens)]
    pieces.sort(key=_tree_tokens, reverse=True)
    rows: list[tuple[int, list[list[Answers]]]] = []
    for piece in pieces:
        size = _tree_tokens(piece)
        for index, (used, members) in enumerate(rows):
            if used + size <= max_tokens:
                rows[index] = (used + size, [*members, piece])
                break
        else:
            rows.append((size, [piece]))
    return [_pack_row(members) for _, members in rows]


def _shared(tree: Sequence[Answers]) -> int:
    """Tokens all prompts of a tree have in common; each prompt keeps at least one token of its own."""
    if len(tree) == 1:
        return 0
    return min(item.prompt.shared_length for item in tree)


def _tree_tokens(tree: Sequence[Answers]) -> int:
    shared = _shared(tree)
    answers = sum(len(response) - 1 for item in tree for response in item.responses)
    return shared + answers + sum(len(item.prompt.token_ids) - shared for item in tree)


def _cut(tree: list[Answers], max_tokens: int) -> list[list[Answers]]:
    if _tree_tokens(tree) <= max_tokens:
        return [tree]
    if len(tree) > 1:
        half = len(tree) // 2
        return _cut(tree[:half], max_tokens) + _cut(tree[half:], max_tokens)
    item = tree[0]
    count = len(item.responses)
    if count == 1:
        raise ValueError(
            f"one prompt with one answer takes {_tree_tokens(tree)} tokens, over "
            f"train.max_tokens_per_micro_batch={max_tokens}; raise it, or lower "
            "policy.max_pixels or rollout.max_new_tokens"
        )
    return [
        piece
        for part in (slice(0, count // 2), slice(count // 2, count))
        for piece in _cut([_part(item, part)], max_tokens)
    ]


def _part(item: Answers, part: slice) -> Answers:
    logprobs = None if item.rollout_logprobs is None else item.rollout_logprobs[part]
    return Answers(item.prompt, item.image, item.responses[part], item.sequences[part], logprobs)


def _pack_row(trees: Sequence[Sequence[Answers]]) -> PackedForest:
    ids: list[int] = []
    positions: list[np.ndarray] = []
    ends: list[np.ndarray] = []
    hidden: list[np.ndarray] = []
    target: list[int] = []
    sequence: list[int] = []
    logprobs: list[float] | None = []
    logical = 0
    for tree in trees:
        shared = _shared(tree)
        start, end = len(ids), len(ids) + _tree_tokens(tree)
        ids += tree[0].prompt.token_ids[:shared]
        positions.append(tree[0].prompt.position_ids[:, :shared])
        ends.append(np.full(shared, end))
        for item in tree:
            own = len(item.prompt.token_ids) - shared
            answer_tokens = sum(len(response) - 1 for response in item.responses)
            ids += item.prompt.token_ids[shared:]
            positions.append(item.prompt.position_ids[:, shared:])
            ends.append(np.full(own, len(ids) + answer_tokens))
            last_prompt_token = len(ids) - 1
            next_position = int(item.prompt.position_ids.max()) + 1
            for number, response in zip(item.sequences, item.responses, strict=True):
                inputs = len(response) - 1
                hidden.append(np.concatenate(([last_prompt_token], np.arange(len(ids), len(ids) + inputs))))
                positions.append(np.broadcast_to(np.arange(inputs) + next_position, (3, inputs)))
                ids += response[:-1]
                ends.append(np.full(inputs, len(ids)))
                target += response
                sequence += [number] * len(response)
                logical += len(item.prompt.token_ids) + inputs
            if item.rollout_logprobs is None:
                logprobs = None
            elif logprobs is not None:
                logprobs += [value for row in item.rollout_logprobs for value in row]
        assert len(ids) == end, (start, end, len(ids))
    return PackedForest(
        input_ids=torch.tensor(ids),
        position_ids=torch.from_numpy(np.concatenate(positions, axis=1)),
        subtree_end=torch.from_numpy(np.concatenate(ends)),
        images=tuple(tree[0].image for tree in trees),
        hidden_index=torch.from_numpy(np.concatenate(hidden)),
        target=torch.tensor(target),
        sequence=torch.tensor(sequence),
        rollout_logprobs=None if logprobs is None else torch.tensor(logprobs, dtype=torch.float32),
        logical_tokens=logical,
    )
