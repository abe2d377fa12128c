"""Decoding one token at a time for many answers side by side: the decoder's own weights in a third of its operations.

transformers' forward pass computes rotary tables anew at every token, norms in six operations, and copies all keys and
values of a cache. At one token a step that is where the time goes. This is the same function of the same weights, for
the families that ``rewardmap.policy`` knows: pre-norm blocks, optional norms of queries and keys, grouped heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from rewardmap.policy import Policy

Tensor = torch.Tensor
_ROOM = 64
"""Tokens that keys and values have room for beyond those they hold."""


class Decoder:
    """Keys and values of S sequences, and the step that takes each one token further."""

    def __init__(
        self, policy: Policy, cache: Sequence[tuple[Tensor, Tensor]], visible: Tensor, position: Tensor
    ) -> None:
        """
        Args:
            cache: per layer, keys and values [S, heads, T, D] of the prompts, padded on the left.
            visible: [S, T] bool, False at padding.
            position: [S] int64, of the next token on all axes of mRoPE.
        """
        self._policy = policy
        self._length = cache[0][0].shape[2]
        self._ahead = position - self._length
        self._cache = [list(pair) for pair in cache]
        self._visible = None if bool(visible.all()) else visible
        self._move(slice(None))

    def keep(self, rows: Tensor) -> None:
        """Only these sequences (int64) go on."""
        self._move(rows)

    def step(self, token: Tensor) -> Tensor:
        """Logits [S, V] after ``token`` [S]."""
        text = self._policy.text_model
        if self._length == self._cache[0][0].shape[2]:
            self._move(slice(None))
        cos, sin = (table[:, self._length - self._begin, None] for table in self._tables)  # [S, 1, D]
        mask = None if self._visible is None else self._visible[:, None, None, : self._length + 1]
        hidden = text.embed_tokens(token)
        for layer, (keys, values) in zip(text.layers, self._cache, strict=True):
            normed = _norm(layer.input_layernorm, hidden)
            hidden = hidden + self._attend(layer.self_attn, normed, keys, values, cos, sin, mask)
            hidden = hidden + layer.mlp(_norm(layer.post_attention_layernorm, hidden))
        self._length += 1
        logits: Tensor = self._policy.model.lm_head(_norm(text.norm, hidden))
        return logits

    def _attend(
        self,
        attention: Any,
        normed: Tensor,
        keys: Tensor,
        values: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        rows, heads, width = len(normed), keys.shape[1], keys.shape[3]
        query = attention.q_proj(normed).view(rows, -1, width)
        key = attention.k_proj(normed).view(rows, heads, width)
        if hasattr(attention, "q_norm"):
            query, key = _norm(attention.q_norm, query), _norm(attention.k_norm, key)
        both = torch.cat((query, key), 1)
        turned = both * cos + both.roll(width // 2, -1) * sin  # the sign of each half is in the table
        query, keys[:, :, self._length] = turned[:, :-heads], turned[:, -heads:]
        values[:, :, self._length] = attention.v_proj(normed).view(rows, heads, width)
        seen = slice(self._length + 1)
        # The query heads that share a key head are rows of one product: keys are not repeated.
        out = functional.scaled_dot_product_attention(
            query.reshape(rows, heads, -1, width), keys[:, :, seen], values[:, :, seen], mask, scale=attention.scaling
        )
        projected: Tensor = attention.o_proj(out.reshape(rows, -1))
        return projected

    def _move(self, rows: Tensor | slice) -> None:
        """``rows`` to where the next tokens have room, with their rotary tables."""
        for pair in self._cache:
            for which, held in enumerate(pair):
                kept = held[rows, :, : self._length]
                pair[which] = kept.new_empty(*kept.shape[:2], self._length + _ROOM, kept.shape[3])
                pair[which][:, :, : self._length] = kept
        if self._visible is not None:
            self._visible = functional.pad(self._visible[rows, : self._length], (0, _ROOM), value=True)
        self._begin, self._ahead = self._length, self._ahead[rows]
        positions = self._ahead[:, None] + torch.arange(self._length, self._length + _ROOM, device=self._ahead.device)
        axes = self._policy.positions(positions.expand(3, -1, -1))
        cos, sin = self._policy.text_model.rotary_emb(self._cache[0][0], axes)
        if cos.dim() == 4:  # one for each axis of mRoPE, here all equal
            cos, sin = cos[0], sin[0]
        half = sin.shape[-1] // 2
        self._tables = cos, torch.cat((-sin[..., :half], sin[..., half:]), -1)


def _norm(module: Any, hidden: Tensor) -> Tensor:
    return functional.rms_norm(hidden, module.weight.shape, module.weight, module.variance_epsilon)
