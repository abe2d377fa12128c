"""Decoding one token at a time for many answers side by side: the decoder's own weights in a third of its operations.

transformers' forward pass computes rotary tables anew at every token, norms in six operations, and copies all keys and
values of a cache. At one token a step that is where the time goes. This is the same function of the same weights, for
the families that ``rewardmap.policy`` knows: pre-norm blocks, optional norms of queries and keys, grouped heads.

On a CPU attention reads a prompt's keys where they are, once for the answers that share them, by the kernel library's
C++. Elsewhere each answer has a copy of them, for torch's attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from rewardmap.policy import Policy
from rewardmap_kernels import decoding

Tensor = torch.Tensor
Cache = Sequence[tuple[Tensor, Tensor]]
ROOM = 64
"""Tokens that keys and values have room for beyond those they hold."""


class Decoder:
    """Keys and values of S answers, and the step that takes each one token further."""

    def __init__(self, policy: Policy, cache: Cache, visible: Tensor, position: Tensor, group: Tensor) -> None:
        """
        Args:
            cache: per layer, keys and values [B, heads, T, D] of the prompts, padded on the left.
            visible: [B, T] bool, False at padding.
            position: [B] int64, of the first answer token on all axes of mRoPE.
            group: [S] int64, each answer's prompt.
        """
        self._policy = policy
        text = policy.text_model
        keys, width = cache[0][0], text.embed_tokens.weight.shape[1]
        self._why_torch = decoding.unavailable_reason(keys, keys.shape[3], width)
        self._attention = (_Shared if self._why_torch is None else _Copied)(cache, visible, group)
        self._position, self._length = position[group], 0
        self._make_tables()

    def keep(self, rows: Tensor) -> None:
        """Only these answers (int64) go on."""
        self._position = self._position[rows]
        self._attention.keep(rows)
        self._make_tables()

    def step(self, token: Tensor) -> Tensor:
        """Logits [S, V] after ``token`` [S]."""
        text = self._policy.text_model
        if self._length == self._begin + ROOM:
            self._make_tables()
        self._attention.begin_token()
        cos, sin = (table[:, self._length - self._begin] for table in self._tables)  # [S, D]
        hidden, update = text.embed_tokens(token), None
        for number, layer in enumerate(text.layers):
            own = layer.self_attn
            normed = self._normed(layer.input_layernorm, hidden, update)
            parts = own.q_proj(normed), own.k_proj(normed), own.v_proj(normed)
            update = own.o_proj(self._attention.attend(number, own, *parts, cos, sin))
            update = layer.mlp(self._normed(layer.post_attention_layernorm, hidden, update))
        self._length += 1
        logits: Tensor = self._policy.model.lm_head(self._normed(text.norm, hidden, update))
        return logits

    def _normed(self, module: Any, hidden: Tensor, update: Tensor | None) -> Tensor:
        """``hidden`` += ``update``, and its norm."""
        if self._why_torch is None:
            return decoding.add_norm_(hidden, update, module.weight, module.variance_epsilon)
        return _norm(module, hidden if update is None else hidden.add_(update))

    def _make_tables(self) -> None:
        """Rotary tables of the next tokens."""
        self._begin = self._length
        ahead = torch.arange(self._length, self._length + ROOM, device=self._position.device)
        axes = self._policy.positions((self._position[:, None] + ahead).expand(3, -1, -1))
        text = self._policy.text_model
        cos, sin = text.rotary_emb(text.embed_tokens.weight, axes)
        if cos.dim() == 4:  # one for each axis of mRoPE, here all equal
            cos, sin = cos[0], sin[0]
        half = sin.shape[-1] // 2
        self._tables = cos, torch.cat((-sin[..., :half], sin[..., half:]), -1)


class _Copied:
    """Each answer's keys and values, its prompt's included."""

    def __init__(self, cache: Cache, visible: Tensor, group: Tensor) -> None:
        self._length = cache[0][0].shape[2]
        self._cache = [list(pair) for pair in cache]
        self._visible = None if bool(visible.all()) else visible
        self.keep(group)

    def keep(self, rows: Tensor | slice) -> None:
        """``rows`` to where the next tokens have room."""
        for pair in self._cache:
            for which, held in enumerate(pair):
                kept = held[rows, :, : self._length]
                pair[which] = _roomy(kept, self._length)
        if self._visible is not None:
            self._visible = functional.pad(self._visible[rows, : self._length], (0, ROOM), value=True)

    def begin_token(self) -> None:
        if self._length == self._cache[0][0].shape[2]:
            self.keep(slice(None))
        self._mask = None if self._visible is None else self._visible[:, None, None, : self._length + 1]
        self._length += 1

    def attend(
        self, number: int, module: Any, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        keys, values = self._cache[number]
        rows, heads, width = len(query), keys.shape[1], keys.shape[3]
        query, key = query.view(rows, -1, width), key.view(rows, heads, width)
        if hasattr(module, "q_norm"):
            query, key = _norm(module.q_norm, query), _norm(module.k_norm, key)
        both = torch.cat((query, key), 1)
        turned = both * cos[:, None] + both.roll(width // 2, -1) * sin[:, None]  # a half's sign is in the table
        query, keys[:, :, self._length - 1] = turned[:, :-heads], turned[:, -heads:]
        values[:, :, self._length - 1] = value.view(rows, heads, width)
        seen = slice(self._length)
        # The query heads that share a key head are rows of one product: keys are not repeated.
        out = functional.scaled_dot_product_attention(
            query.reshape(rows, heads, -1, width), keys[:, :, seen], values[:, :, seen], self._mask,
            scale=module.scaling,
        )  # fmt: skip
        return out.reshape(rows, -1)


class _Shared:
    """The prompts' keys and values, and those of each answer's own tokens."""

    def __init__(self, cache: Cache, visible: Tensor, group: Tensor) -> None:
        self._prompts = [(keys.contiguous(), values.contiguous()) for keys, values in cache]
        self._begin = (~visible).sum(1)
        self._group, self._length = group, 0
        _, heads, _, width = cache[0][0].shape
        self._own = [[_roomy(held.new_empty(len(group), heads, 0, width), 0) for held in pair] for pair in cache]

    def keep(self, rows: Tensor | slice) -> None:
        self._group = self._group[rows]
        for pair in self._own:
            pair[:] = [_roomy(held[rows, :, : self._length], self._length) for held in pair]

    def begin_token(self) -> None:
        if self._length == self._own[0][0].shape[2]:
            self.keep(slice(None))
        self._length += 1

    def attend(
        self, number: int, module: Any, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        norms: dict[str, Any] = {}
        if hasattr(module, "q_norm"):
            epsilon = module.q_norm.variance_epsilon
            norms = {"query_norm": module.q_norm.weight, "key_norm": module.k_norm.weight, "epsilon": epsilon}
        prompts, (keys, values) = self._prompts[number], self._own[number]
        return decoding.decode_attention(
            query, key, value, cos, sin, *prompts, self._begin, self._group, keys, values, self._length - 1,
            module.scaling, **norms,
        )  # fmt: skip


def _roomy(held: Tensor, length: int) -> Tensor:
    """[S, heads, length + room, D] that begins with the first ``length`` tokens of ``held``."""
    made = held.new_empty(*held.shape[:2], length + ROOM, held.shape[3])
    made[:, :, :length] = held[:, :, :length]
    return made


def _norm(module: Any, hidden: Tensor) -> Tensor:
    return functional.rms_norm(hidden, module.weight.shape, module.weight, module.variance_epsilon)
