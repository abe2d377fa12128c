"""The reference policy of the KL term: its log-probabilities of the answers, over the same packed forests.

It shares prefixes as the update does. Under LoRA it is the adapter-free base, which costs no memory; else the weights
the run began with, split over the ranks as the policy's are. A tower that does not train is one for both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from rewardmap.config import Config, ConfigError
from rewardmap.policy import Policy
from rewardmap.train.forest import PackedForest
from rewardmap.train.forward import Vision, response_hidden
from rewardmap.train.lora import without_adapters
from rewardmap.train.parallel import Forward, split_again
from rewardmap.vision import to_device
from rewardmap_kernels import linear_logprobs

Tensor = torch.Tensor


@dataclass(frozen=True)
class Reference:
    """What the trained policy must stay close to."""

    policy: Policy
    """The policy that trains."""
    frozen: Policy | None
    """The weights to stay close to; None: ``policy`` without its adapters."""
    forward: Forward | None = None
    """Of ``frozen``."""

    @torch.no_grad()
    def logprobs(self, forest: PackedForest, vision: Vision, forward: Forward, temperature: float) -> Tensor:
        """nats [N] of the forest's rows, float32 at least.

        Args:
            vision, forward: the trained policy's, of this step.
        """
        if self.frozen is None:
            with without_adapters(self.policy.model):
                return _logprobs(self.policy, forward(forest, vision), forest, temperature)
        assert self.forward is not None
        hidden = self.forward(forest, vision if self.policy.freeze_vision else None)
        logprobs = _logprobs(self.frozen, hidden, forest, temperature)
        split_again(self.frozen)
        return logprobs


def _logprobs(policy: Policy, hidden: Tensor, forest: PackedForest, temperature: float) -> Tensor:
    target = to_device(forest.target, hidden.device)
    return linear_logprobs(hidden, policy.model.lm_head.weight, target, temperature=temperature)[0]


def make_reference(
    policy: Policy, config: Config, initial: Policy | None, shard: Callable[[Policy], Forward] | None = None
) -> Reference | None:
    """None where ``train.kl_coef`` is 0. Before ``prepare_policy``, which changes what would be copied.

    Args:
        initial: the policy as the run began with it; not needed under LoRA.
        shard: splits it over the ranks; None: it stays whole.

    Raises:
        ConfigError: under LoRA, a vision tower that trains: without adapters it is not what it was.
    """
    if not config.train.kl_coef:
        return None
    if not config.policy.lora_rank:
        assert initial is not None
        frozen = initial.frozen_copy() if initial is policy else initial
        frozen.model.requires_grad_(False)
        frozen.freeze_vision = True
        if policy.freeze_vision and policy.vision_tower is not None:
            frozen.model.model.visual = policy.vision_tower
        return Reference(policy, frozen, partial(response_hidden, frozen) if shard is None else shard(frozen))
    if not config.policy.freeze_vision:
        raise ConfigError(
            "train.kl_coef under policy.lora_rank takes the model without adapters for its reference; set "
            "policy.freeze_vision=true, or train without adapters"
        )
    return Reference(policy, None)
