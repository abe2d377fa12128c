"""Maximum likelihood on packed forests: the loss of a supervised stage."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rewardmap.policy import Policy
from rewardmap.train.forest import Answers, PackedForest, pack_forest
from rewardmap.train.forward import response_hidden
from rewardmap.types import Problem
from rewardmap_kernels import PolicyObjective, linear_policy_loss

_LIKELIHOOD = PolicyObjective(name="reinforce")
"""With advantages of 1, REINFORCE on given answers is maximum likelihood."""


def gold_answers(policy: Policy, problem: Problem, text: str, number: int) -> Answers:
    """One given answer, as the packer takes it; ``number`` is its place in the batch."""
    tokens = policy.tokenizer(text, add_special_tokens=False).input_ids
    return Answers(policy.encode(problem), problem.image, ((*tokens, policy.stop_token_ids[0]),), (number,))


def supervised_backward(policy: Policy, batch: Sequence[Answers], max_tokens: int) -> tuple[float, list[PackedForest]]:
    """Accumulate the gradient of the mean negative log-likelihood over answer tokens.

    Returns:
        The loss in nats per token, and the packed micro-batches.
    """
    forests = pack_forest(batch, max_tokens)
    tokens = sum(len(forest.target) for forest in forests)
    loss = 0.0
    for forest in forests:
        out = linear_policy_loss(
            response_hidden(policy, forest),
            policy.model.lm_head.weight,
            forest.target.to(policy.device),
            advantages=torch.ones(len(forest.target), device=policy.device),
            normalizer=float(tokens),
            objective=_LIKELIHOOD,
        )
        out.loss.backward()
        loss -= float(out.logprobs.sum()) / tokens
    return loss, forests
