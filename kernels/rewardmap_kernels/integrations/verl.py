"""verl on our objective and head: ``register()`` in every worker, so in a module of your own that they import
(``actor_rollout_ref.model.external_lib=that_module``).

It adds a policy loss named "rewardmap" to verl's registry
(``actor_rollout_ref.actor.policy_loss.loss_mode=rewardmap``) and makes verl's fused-kernel switch
(``actor_rollout_ref.model.use_fused_kernels=True`` with
``actor_rollout_ref.model.fused_kernel_options.impl_backend=triton``; verl's default, torch, is a head of its own) call
``linear_logprobs``. Written for verl 0.9.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch
from torch import Tensor

from ..linear_logprob import linear_logprobs
from ..objective import PolicyObjective
from ..policy_loss import policy_loss


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """verl's fused head: hidden [..., H], weight [V, H], labels [...] -> (logprobs, entropy), flat float32.

    Raises ValueError for a reduction and for a head split over several ranks, which this path does not have.
    """
    if reduction.lower() != "none":
        raise ValueError(f"reduction = {reduction!r}: only 'none' is supported")
    if dist_process_group is not None and torch.distributed.get_world_size(dist_process_group) > 1:
        raise ValueError("the head is split over several ranks; linear_logprobs needs the whole vocabulary")
    return linear_logprobs(hidden.reshape(-1, hidden.shape[-1]), weight, labels.reshape(-1), temperature=temperature)


def _objective(config: Any) -> PolicyObjective:
    low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
    high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
    return PolicyObjective("grpo", clip_eps_low=low, clip_eps_high=high, dual_clip=config.get("clip_ratio_c", 3.0))


def register(name: str = "rewardmap", objective: PolicyObjective | None = None, *, head: bool = True) -> None:
    """Register our policy loss under ``name`` and, with ``head``, put our head behind verl's fused-kernel switch.

    ``objective`` None: clipped, with clip_ratio_low, clip_ratio_high and clip_ratio_c of the actor's config. verl
    aggregates (``loss_agg_mode``), adds its KL and entropy terms and gives the rollout correction weights, so an
    objective that has those raises ValueError.
    """
    from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss

    if objective is not None and (
        objective.kl_coef or objective.entropy_coef or objective.importance_correction != "none"
    ):
        raise ValueError("KL, entropy and importance correction are verl's own options; leave them out of objective")

    def loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """All tensors [B, L]; verl's contract."""
        size, length = log_prob.shape
        if rollout_is_weights is not None:
            # A constant, non-negative factor of the policy term is a factor of the advantage.
            advantages = advantages * rollout_is_weights
        sequence = torch.arange(size, device=log_prob.device).repeat_interleave(length)
        out = policy_loss(
            log_prob.reshape(-1),
            advantages=advantages.reshape(-1),
            normalizer=1.0,
            objective=_objective(config) if objective is None else objective,
            old_logprobs=old_log_prob.reshape(-1),
            sequence=sequence,
            num_sequences=max(size, 1),
            loss_mask=response_mask.reshape(-1),
        )
        rows = out.row_loss.view(size, length)
        total = agg_loss(
            loss_mat=rows, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **config.global_batch_info
        )
        values = torch.stack(list(out.metrics.values())).tolist()  # waits once
        return total, {f"actor/{key}": value for key, value in zip(out.metrics, values, strict=True)}

    register_policy_loss(name)(loss)
    if head:
        theirs = importlib.import_module("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy
        # Megatron's forwards, where they were imported before, have it by name.
        for module in [found for path, found in sys.modules.items() if path.startswith("verl.")]:
            if vars(module).get("linear_cross_entropy") is theirs:
                vars(module)["linear_cross_entropy"] = linear_cross_entropy
