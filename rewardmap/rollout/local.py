"""The embedded rollout engine: the Hugging Face model in this process. Works on a CPU.

Each prompt is prefilled once for all its answers; answers decode side by side with a key-value cache, finished ones
leave the batch, and log-probabilities are recorded as each token is sampled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from rewardmap.policy import EncodedPrompt, Policy
from rewardmap.rollout.decoder import Decoder
from rewardmap.rollout.engine import OnGroup
from rewardmap.types import FinishReason, Problem, Rollout, RolloutGroup, SamplingParams
from rewardmap.vision import to_device

Tensor = torch.Tensor


class LocalEngine:
    """``RolloutEngine`` on the trainer's own model: weights are always the current ones."""

    def __init__(self, policy: Policy, batch_sequences: int, batch_tokens: int = 131_072) -> None:
        """
        Args:
            batch_sequences: answers that decode side by side, at most.
            batch_tokens: of all these answers' prompts, padding included, at most; one group's may be more.
        """
        self._policy = policy
        self._batch_sequences, self._batch_tokens = batch_sequences, batch_tokens
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
        groups: list[RolloutGroup | None] = [None] * len(problems)
        for chosen in self._batches(order, [len(prompt.token_ids) for prompt in prompts], group_size):
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

    def _batches(self, order: Sequence[int], lengths: Sequence[int], group_size: int) -> Iterator[list[int]]:
        """Runs of ``order``, by rising length, each within both limits."""
        batch: list[int] = []
        for index in order:
            answers = (len(batch) + 1) * group_size
            if batch and (answers > self._batch_sequences or answers * lengths[index] > self._batch_tokens):
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def _generate_batch(
        self,
        problems: Sequence[Problem],
        prompts: Sequence[EncodedPrompt],
        group_size: int,
        sampling: SamplingParams,
        generator: torch.Generator,
    ) -> list[RolloutGroup]:
        policy = self._policy
        logits, decoder = self._prefill(problems, prompts, group_size)
        total = len(problems) * group_size
        tokens: list[list[int]] = [[] for _ in range(total)]
        logprobs: list[list[float]] = [[] for _ in range(total)]
        finish: list[FinishReason] = ["length"] * total
        alive = list(range(total))
        for step in range(sampling.max_new_tokens):
            token, logprob = sample(logits, sampling, policy.banned_token_ids, generator)
            values, nats = torch.stack((token.double(), logprob.double())).tolist()  # a step waits for a GPU once
            going: list[int] = []
            for place, (row, value, nat) in enumerate(zip(alive, map(int, values), nats, strict=True)):
                tokens[row].append(value)
                logprobs[row].append(nat)
                if value in policy.stop_token_ids:
                    finish[row] = "stop"
                else:
                    going.append(place)
            if not going or step + 1 == sampling.max_new_tokens:
                break
            if len(going) < len(alive):
                keep = to_device(torch.tensor(going), policy.device)
                decoder.keep(keep)
                alive, token = [alive[place] for place in going], token[keep]
            logits = decoder.step(token)

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
        self, problems: Sequence[Problem], prompts: Sequence[EncodedPrompt], group_size: int
    ) -> tuple[Tensor, Decoder]:
        """One pass over B left-padded prompts.

        Returns:
            logits [S, V] of the first token of S = B x group_size answers, group by group, and what decodes the next.
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
        next_position = to_device(positions.amax((0, 2)) + 1, device)
        padding = to_device(padding, device)
        features = policy.image_features([problem.image for problem in problems])
        causal = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
        # A padding query sees itself, or its softmax would be empty.
        visible = causal & padding[:, None, :] | torch.eye(longest, dtype=torch.bool, device=device)
        out = policy.text_model(
            **policy.text_inputs(ids, features),
            position_ids=to_device(positions, device),
            attention_mask=visible[:, None],
            use_cache=True,
        )
        logits = policy.model.lm_head(out.last_hidden_state[:, -1])
        own = torch.arange(len(prompts), device=device).repeat_interleave(group_size)
        cache = out.cache if "cache" in out else out.past_key_values  # its name since transformers 5.24
        pairs = [(layer.keys, layer.values) for layer in cache.layers]
        return logits[own], Decoder(policy, pairs, padding, next_position, own)


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
    for one in banned:  # a list as an index would be copied to a GPU first
        allowed[:, one] = -torch.inf
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
        # One number a row. torch.multinomial draws one for each entry, which takes longer than a small model's layer.
        mass = allowed.exp().cumsum(-1, dtype=torch.float64)
        draw = torch.rand(len(mass), 1, dtype=torch.float64, device=mass.device, generator=generator)
        token = torch.searchsorted(mass, draw * mass[:, -1:], right=True).squeeze(1)
    return token, logprobs.gather(-1, token[:, None]).squeeze(1)
