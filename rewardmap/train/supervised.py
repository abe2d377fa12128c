"""Maximum likelihood on packed forests: the loss of a supervised stage."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from rewardmap.policy import Policy
from rewardmap.train.balance import CostModel
from rewardmap.train.forest import Answers, PackedForest, pack_forest
from rewardmap.train.forward import Vision, response_hidden
from rewardmap.train.parallel import Forward, each_micro_batch
from rewardmap.train.ranks import ALONE, Ranks
from rewardmap.types import Problem
from rewardmap.vision import to_device
from rewardmap_kernels import PolicyObjective, linear_policy_loss

_LIKELIHOOD = PolicyObjective(name="reinforce")
"""With advantages of 1, REINFORCE on given answers is maximum likelihood."""


def gold_answers(policy: Policy, problem: Problem, text: str, number: int) -> Answers:
    """One given answer, as the packer takes it; ``number`` is its place in the batch."""
    tokens = policy.tokenizer(text, add_special_tokens=False).input_ids
    return Answers(policy.encode(problem), problem.image, ((*tokens, policy.stop_token_ids[0]),), (number,))


def supervised_backward(
    policy: Policy,
    batch: Sequence[Answers],
    max_tokens: int,
    *,
    ranks: Ranks = ALONE,
    forward: Forward | None = None,
    cost: CostModel | None = None,
) -> tuple[float, list[PackedForest]]:
    """Accumulate the gradient of the mean negative log-likelihood over answer tokens; ranks share the work.

    Args:
        batch: the same on every rank.
        forward: of a sharded policy; None: the policy is whole.

    Returns:
        The loss in nats per token over all ranks, and this rank's micro-batches.
    """
    forward = forward or partial(response_hidden, policy)
    forests = pack_forest(batch, max_tokens, ranks=ranks.size, rank=ranks.rank, cost=cost)
    tokens = sum(len(response) for answers in batch for response in answers.responses)
    vision = Vision(policy, forests, together=ranks.size > 1)
    nats = torch.zeros((), dtype=torch.float64, device=policy.device)  # one host sync a step
    for forest in each_micro_batch(policy, forests):
        mask = to_device(forest.loss_mask, policy.device)
        out = linear_policy_loss(
            forward(forest, vision),
            policy.model.lm_head.weight,
            to_device(forest.target, policy.device),
            advantages=torch.ones(len(forest.target), device=policy.device),
            normalizer=float(tokens),
            objective=_LIKELIHOOD,
            loss_mask=mask,
        )
        out.loss.backward()
        nats -= (out.logprobs.detach() * mask).sum()
    vision.backward()
    return ranks.sum({"loss": float(nats) / tokens})["loss"], forests
