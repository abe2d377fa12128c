"""The reference policy of the KL term: its log-probabilities of the answers, over the same packed forests.

It shares prefixes as the update does. Under LoRA it is the adapter-free base, which costs no memory; else the weights
the run began with, whole on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rewardmap.config import Config, ConfigError
from rewardmap.policy import Policy
from rewardmap.train.forest import PackedForest
from rewardmap.train.forward import Vision, response_hidden
from rewardmap.train.lora import without_adapters
from rewardmap.train.parallel import Forward
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

    @torch.no_grad()
    def logprobs(self, forest: PackedForest, vision: Vision, forward: Forward, temperature: float) -> Tensor:
        """nats [N] of the forest's rows, float32 at least.

        Args:
            vision, forward: the trained policy's, of this step; a frozen copy has its own.
        """
        if self.frozen is None:
            with without_adapters(self.policy.model):
                hidden, model = forward(forest, vision), self.policy.model
        else:
            hidden, model = response_hidden(self.frozen, forest), self.frozen.model
        target = to_device(forest.target, hidden.device)
        return linear_logprobs(hidden, model.lm_head.weight, target, temperature=temperature)[0]


def make_reference(policy: Policy, config: Config, initial: Policy | None) -> Reference | None:
    """None where ``train.kl_coef`` is 0.

    Args:
        initial: the policy as the run began with it; not needed under LoRA.

    Raises:
        ConfigError: under LoRA, a vision tower that trains: without adapters it is not what it was.
    """
    if not config.train.kl_coef:
        return None
    if not config.policy.lora_rank:
        assert initial is not None
        return Reference(policy, initial.frozen_copy() if initial is policy else initial)
    if not config.policy.freeze_vision:
        raise ConfigError(
            "train.kl_coef under policy.lora_rank takes the model without adapters for its reference; set "
            "policy.freeze_vision=true, or train without adapters"
        )
    return Reference(policy, None)
