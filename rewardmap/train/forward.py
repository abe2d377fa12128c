"""The model's pass over packed forests: each picture through the tower once a step, down to the hidden states of
response rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rewardmap.policy import Policy
from rewardmap.train.forest import PackedForest
from rewardmap.vision import ImageFeatures, to_device
from rewardmap_kernels.tree_attention import tree_mask

Tensor = torch.Tensor


class Vision:
    """Tower outputs of one optimizer step: each distinct picture once, whichever micro-batches show it.

    With a trainable tower the micro-batches' gradients gather on the outputs, and ``backward`` takes them through the
    tower once, after the last micro-batch. With a frozen one it does nothing.
    """

    def __init__(self, policy: Policy, forests: Sequence[PackedForest], together: bool = False) -> None:
        """``together``: the tower is sharded, so every rank runs it, forward and backward; one without pictures runs a
        blank one that no gradient reaches."""
        self._together = together and not policy.freeze_vision
        sources = list(dict.fromkeys(image for forest in forests for image in forest.images))
        self._outputs: list[Tensor] = []
        self._leaves: list[Tensor] = []
        self._features = {
            source: ImageFeatures(self._leaf(seen.merged), tuple(map(self._leaf, seen.deep)))
            for source, seen in zip(sources, policy.image_features(sources), strict=True)
        }
        if self._together and forests and not sources:
            blank = policy.blank_features()
            for output in (blank.merged, *blank.deep):
                self._leaf(output)

    def of(self, images: Sequence[str | bytes]) -> list[ImageFeatures]:
        return [self._features[image] for image in images]

    def backward(self) -> None:
        """Call once, after the last micro-batch's backward."""
        pairs = [
            (out, torch.zeros_like(out) if leaf.grad is None else leaf.grad)
            for out, leaf in zip(self._outputs, self._leaves, strict=True)
            if leaf.grad is not None or self._together
        ]
        if pairs:
            torch.autograd.backward([out for out, _ in pairs], [grad for _, grad in pairs])

    def _leaf(self, output: Tensor) -> Tensor:
        if not output.requires_grad:
            return output
        leaf = output.detach().requires_grad_()
        self._outputs.append(output)
        self._leaves.append(leaf)
        return leaf


def response_hidden(policy: Policy, forest: PackedForest, vision: Vision | None = None) -> Tensor:
    """Hidden states that predict the response tokens: [N, H], ready for the head. Prompt rows never meet the head.

    Args:
        vision: the step's tower outputs; None runs the tower for this forest, in the same graph.
    """
    device = policy.device
    seen = policy.image_features(forest.images) if vision is None else vision.of(forest.images)
    inputs = policy.text_inputs(forest.input_ids[None], seen)
    out = policy.text_model(
        **inputs,
        position_ids=policy.positions(to_device(forest.position_ids[:, None], device)),
        attention_mask=torch.empty(1, 1, 0, 0, device=device),  # a 4-d mask is passed through: ours is ``tree_mask``
        use_cache=False,
        tree_mask=tree_mask(forest.subtree_end, device).prepare(inputs["inputs_embeds"].dtype, policy.head_dim),
    )
    return gather_rows(out.last_hidden_state[0], forest.hidden_index)


def gather_rows(hidden: Tensor, index: Tensor) -> Tensor:
    """hidden [T, H] at index [N] (int64, on the CPU) -> [N, H].

    A prompt's last token predicts the first token of every answer, so rows repeat. Their gradients are summed in
    float32 (float64 for float64), in the order of the rows, and rounded once: the same bits every run.
    """
    return _GatherRows.apply(hidden, index)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, index: Tensor) -> Tensor:
        ctx.shape, ctx.index = hidden.shape, index
        unique, inverse = index.unique(return_inverse=True)
        return hidden.index_select(0, to_device(unique, hidden.device)).index_select(
            0, to_device(inverse, hidden.device)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        wide = torch.promote_types(grad.dtype, torch.float32)
        unique, inverse, count = ctx.index.unique(return_inverse=True, return_counts=True)
        order = inverse.argsort(stable=True)
        first = count.cumsum(0) - count
        sums = grad.index_select(0, to_device(order[first], grad.device)).to(wide)
        for nth in range(1, int(count.max()) if len(count) else 0):
            more = (count > nth).nonzero().squeeze(1)  # each row at most once: no two additions meet
            rows = grad.index_select(0, to_device(order[first[more] + nth], grad.device))
            sums.index_add_(0, to_device(more, grad.device), rows.to(wide))
        out = grad.new_zeros(ctx.shape)
        return out.index_copy_(0, to_device(unique, grad.device), sums.to(grad.dtype)), None
