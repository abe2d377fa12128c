"""Fused operations for policy-gradient training of language models; torch is all they need."""

from .dispatch import last_path, use_implementation
from .group_advantage import GroupAdvantage, group_advantage
from .linear_logprob import linear_logprobs
from .linear_loss import LinearPolicyLoss, contributing_rows, linear_policy_loss
from .logits_loss import LogitsPolicyLoss, logits_policy_loss, selective_log_softmax
from .normalizer import loss_normalizer
from .objective import PolicyObjective
from .policy_loss import PolicyLossOutput, policy_loss

__all__ = [
    "GroupAdvantage",
    "LinearPolicyLoss",
    "LogitsPolicyLoss",
    "PolicyLossOutput",
    "PolicyObjective",
    "contributing_rows",
    "group_advantage",
    "last_path",
    "linear_logprobs",
    "linear_policy_loss",
    "logits_policy_loss",
    "loss_normalizer",
    "policy_loss",
    "selective_log_softmax",
    "use_implementation",
]
