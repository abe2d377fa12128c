"""The embedded rollout engine: the Hugging Face model in this process. Works on a CPU.

Each prompt is prefilled once for all its answers; answers decode side by side with a key-value cache, finished ones
leave the batch, and log-probabilities are recorded as each token is sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from rewardmap.policy import EncodedPrompt, Policy
from rewardmap.rollout.engine import OnGroup
from rewardmap.types import FinishReason, Problem, Rollout, RolloutGroup, SamplingParams

Tensor = torch.Tensor
_ROOM = 64
"""Tokens that keys and values have room for beyond those they hold."""


class LocalEngine:
    """``RolloutEngine`` on the trainer's own model: weights are always the current ones."""

    def __init__(self, policy: Policy, batch_sequences: int) -> None:
        self._policy = policy
        self._batch_sequences = batch_sequences
        self._version = 0

    def update_weights(self, version: int) -> None:
        """The weights are shared with the trainer; only the version stamped on rollouts changes."""
        self._version = version

    def metrics(self) -> dict[str, float]:
        """Nothing to tell."""
        return {}

    def close(self) -> None:
        """Nothing to release."""

    @torch.no_grad()
    def generate(
        self,
        problems: Sequence[Problem],
        group_size: int,
        sampling: SamplingParams,
        on_group: OnGroup | None = None,
    ) -> list[RolloutGroup]:
        """Sample ``group_size`` answers to each problem, in the problems' order.

        Raises:
            DataError: a picture that cannot be read, or a prompt without exactly one image.
        """
        prompts = [self._policy.encode(problem) for problem in problems]
        generator = torch.Generator(self._policy.device).manual_seed(sampling.seed)
        # Similar prompt lengths side by side: less padding.
        order = sorted(range(len(problems)), key=lambda index: len(prompts[index].token_ids))
        per_batch = max(1, self._batch_sequences // group_size)
        groups: list[RolloutGroup | None] = [None] * len(problems)
        for start in range(0, len(order), per_batch):
            chosen = order[start : start + per_batch]
            batch = self._generate_batch(
                [problems[index] for index in chosen],
                [prompts[index] for index in chosen],
                group_size,
                sampling,
                generator,
            )
            for index, group in zip(chosen, batch, strict=True):
                groups[index] = group
                if on_group is not None:
                    on_group(index, group)
        return [group for group in groups if group is not None]

    def _generate_batch(
        self,
        problems: Sequence[Problem],
        prompts: Sequence[EncodedPrompt],
        group_size: int,
        sampling: SamplingParams,
        generator: torch.Generator,
    ) -> list[RolloutGroup]:
        policy = self._policy
        logits, cache, padding, next_position = self._prefill(problems, prompts)
        # S = prompts x group_size answers, group by group.
        logits = logits.repeat_interleave(group_size, 0)
        cache.batch_repeat_interleave(group_size)
        padding = padding.repeat_interleave(group_size, 0)
        next_position = next_position.repeat_interleave(group_size)

        total = len(problems) * group_size
        tokens: list[list[int]] = [[] for _ in range(total)]
        logprobs: list[list[float]] = [[] for _ in range(total)]
        finish: list[FinishReason] = ["length"] * total
        stop = torch.tensor(policy.stop_token_ids, device=policy.device)
        alive = torch.arange(total, device=policy.device)
        for step in range(sampling.max_new_tokens):
            token, logprob = sample(logits, sampling, policy.banned_token_ids, generator)
            stopped = torch.isin(token, stop)
            for row, value, nats, done in zip(
                alive.tolist(), token.tolist(), logprob.tolist(), stopped.tolist(), strict=True
            ):
                tokens[row].append(value)
                logprobs[row].append(nats)
                if done:
                    finish[row] = "stop"
            keep = (~stopped).nonzero().squeeze(1)
            if len(keep) == 0 or step + 1 == sampling.max_new_tokens:
                break
            if len(keep) < len(alive):
                cache.batch_select_indices(keep)
                alive, token, padding, next_position = (
                    alive[keep],
                    token[keep],
                    padding[keep],
                    next_position[keep],
                )
            visible = torch.nn.functional.pad(padding, (0, step + 1), value=True)
            out = policy.text_model(
                inputs_embeds=policy.text_model.embed_tokens(token[:, None]),
                position_ids=(next_position + step).view(1, -1, 1).expand(3, -1, 1),
                attention_mask=visible[:, None, None, :],
                past_key_values=cache,
                use_cache=True,
            )
            logits = policy.model.lm_head(out.last_hidden_state[:, -1])

        rollouts = [
            Rollout(
                tuple(tokens[row]),
                tuple(logprobs[row]),
                policy.decode(tokens[row]),
                finish[row],
                self._version,
            )
            for row in range(total)
        ]
        return [
            RolloutGroup(problem, prompt.token_ids, tuple(rollouts[group * group_size : (group + 1) * group_size]))
            for group, (problem, prompt) in enumerate(zip(problems, prompts, strict=True))
        ]

    def _prefill(
        self, problems: Sequence[Problem], prompts: Sequence[EncodedPrompt]
    ) -> tuple[Tensor, Cache, Tensor, Tensor]:
        """One pass over B left-padded prompts.

        Returns:
            logits [B, V] of the first answer token, the cache, padding mask [B, P] (True: a real token), and each
            prompt's next mRoPE position [B].
        """
        policy, device = self._policy, self._policy.device
        longest = max(len(prompt.token_ids) for prompt in prompts)
        pad_token = policy.stop_token_ids[0]
        ids = torch.full((len(prompts), longest), pad_token)
        positions = torch.zeros(3, len(prompts), longest, dtype=torch.int64)
        padding = torch.zeros(len(prompts), longest, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            length = len(prompt.token_ids)
            ids[row, longest - length :] = torch.tensor(prompt.token_ids)
            positions[:, row, longest - length :] = torch.from_numpy(prompt.position_ids)
            padding[row, longest - length :] = True
        ids, padding = ids.to(device), padding.to(device)
        features = policy.image_features([problem.image for problem in problems])
        causal = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
        # A padding query sees itself, or its softmax would be empty.
        visible = causal & padding[:, None, :] | torch.eye(longest, dtype=torch.bool, device=device)
        cache = Cache(layers=[_Roomy() for _ in range(policy.text_model.config.num_hidden_layers)])
        out = policy.text_model(
            **policy.text_inputs(ids, features),
            position_ids=positions.to(device),
            attention_mask=visible[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        logits = policy.model.lm_head(out.last_hidden_state[:, -1])
        return logits, cache, padding, positions.amax((0, 2)).to(device) + 1


class _Roomy(DynamicLayer):
    """One layer's keys and values [S, heads, T, D] with room behind them for the next tokens. ``DynamicLayer`` copies
    all it holds at every token."""

    def __init__(self) -> None:
        super().__init__()
        self._rooms: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.keys, self.values, self.is_initialized = key_states, value_states, True
            return key_states, value_states
        length = self.get_seq_length()
        end = length + key_states.shape[2]
        if not self._rooms or end > self._rooms[0].shape[2]:
            self._move(slice(None))
        for room, states in zip(self._rooms, (key_states, value_states), strict=True):
            room[:, :, length:end] = states
        self.keys, self.values = (room[:, :, :end] for room in self._rooms)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        self._move(indices)

    def _move(self, rows: Tensor | slice) -> None:
        """``rows`` into new rooms."""
        kept = [held[rows] for held in (self.keys, self.values) if held is not None]
        length = kept[0].shape[2]
        self._rooms = [one.new_empty(*one.shape[:2], length + _ROOM, one.shape[3]) for one in kept]
        for room, one in zip(self._rooms, kept, strict=True):
            room[:, :, :length] = one
        self.keys, self.values = (room[:, :, :length] for room in self._rooms)


def sample(
    logits: Tensor, sampling: SamplingParams, banned: Sequence[int], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw one token per row.

    Args:
        logits: [S, V]
        banned: token ids never drawn; log-probabilities are those of the full distribution all the same.

    Returns:
        token [S] int64; logprob [S] float32 nats of the drawn token at the sampling temperature (at 1 when greedy),
        before any top-p or top-k cut, as the trainer computes it.
    """
    greedy = sampling.temperature == 0
    logprobs = torch.log_softmax(logits.float() / (1.0 if greedy else sampling.temperature), dim=-1)
    allowed = logprobs.clone()
    allowed[:, list(banned)] = -torch.inf
    if greedy:
        token = allowed.argmax(-1)
    else:
        if 0 < sampling.top_k < allowed.shape[1]:
            threshold = allowed.topk(sampling.top_k, dim=-1).values[:, -1:]
            allowed = allowed.masked_fill(allowed < threshold, -torch.inf)
        if sampling.top_p < 1:
            ordered, index = allowed.sort(descending=True, dim=-1)
            probs = ordered.softmax(-1)
            cut = probs.cumsum(-1) - probs >= sampling.top_p  # mass before a token; the first one always stays
            allowed = allowed.masked_fill(cut.gather(-1, index.argsort(-1)), -torch.inf)
        token = torch.multinomial(allowed.softmax(-1), 1, generator=generator).squeeze(1)
    return token, logprobs.gather(-1, token[:, None]).squeeze(1)
