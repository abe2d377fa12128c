"""Every operation in plain torch: the definition, the oracle of the tests, independent of the fused code.

Written for reading, in any floating dtype (float64 for the oracle), differentiable by autograd, [N, V]
materialised. Nothing here shares arithmetic with the fused paths: stop-gradients are ``detach``, sequences
and groups are loops.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from .objective import CLIPPED, PolicyObjective
from .policy_loss import LOG_RATIO_BOUND


def selective_log_softmax(logits: Tensor, targets: Tensor, temperature: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """logits [N, V], targets [N] -> logprobs [N] of the targets and entropy [N], nats, of softmax(logits /
    temperature)."""
    divisor = temperature[:, None] if isinstance(temperature, Tensor) else temperature
    log_probs = torch.log_softmax(logits / divisor, dim=-1)
    # A column at -inf has probability 0 and adds 0 to the entropy.
    finite = torch.where(torch.isinf(log_probs), torch.zeros_like(log_probs), log_probs)
    entropy = -(log_probs.exp() * finite).sum(-1)
    return log_probs.gather(1, targets.long()[:, None])[:, 0], entropy


def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor | float = 1.0
) -> tuple[Tensor, Tensor]:
    """hidden [N, H] @ weight [V, H].T -> (logprobs [N], entropy [N])."""
    return selective_log_softmax(hidden @ weight.t(), targets, temperature)


def policy_row_loss(
    logprobs: Tensor,
    *,
    advantages: Tensor,
    normalizer: Tensor | float,
    objective: PolicyObjective,
    entropy: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    sequence: Tensor | None = None,
    loss_mask: Tensor | None = None,
) -> Tensor:
    """[N] per-row loss as ``policy_loss`` defines it, for autograd to differentiate. Masked rows are 0."""
    o = objective
    mask = torch.ones_like(logprobs, dtype=torch.bool) if loss_mask is None else loss_mask != 0
    keep = mask.nonzero()[:, 0]
    logp, adv = logprobs[keep], advantages[keep]
    old = logp.detach() if old_logprobs is None else old_logprobs[keep]
    ids = None if sequence is None else sequence[keep]
    log_ratio = logp - old
    if o.name == "gspo":
        assert ids is not None
        mean = torch.stack([log_ratio[ids == i].mean() for i in ids]) if len(keep) else log_ratio
        log_ratio = mean.detach() + logp - logp.detach()
    ratio = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    low, high = 1 - o.clip_eps_low, 1 + o.clip_eps_high
    if o.name in CLIPPED:
        capped = ratio if o.delta is None else ratio.clamp(max=o.delta)
        value = torch.minimum(capped * adv, ratio.clamp(low, high) * adv)
        if o.dual_clip is not None:
            value = torch.where(adv < 0, torch.maximum(value, o.dual_clip * adv), value)
        loss = -value
    elif o.name == "cispo":
        loss = -ratio.clamp(low, high).detach() * adv * logp
    elif o.name == "sapo":
        tau = torch.where(adv > 0, o.sapo_temperature_pos, o.sapo_temperature_neg)
        loss = -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * adv
    else:
        loss = -adv * logp
    if o.importance_correction != "none":
        assert rollout_logprobs is not None
        gap = (old - rollout_logprobs[keep]).detach()
        if o.importance_level == "sequence":
            assert ids is not None
            gap = torch.stack([gap[ids == i].sum() for i in ids]) if len(keep) else gap
        weight = gap.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
        if o.importance_correction == "truncate":
            weight = weight.clamp(o.importance_min, o.importance_max)
        else:
            weight = weight * ((weight >= o.importance_min) & (weight <= o.importance_max))
        loss = loss * weight
    if o.kl_coef:
        assert ref_logprobs is not None
        gap = ref_logprobs[keep] - logp
        kl = {"k1": -gap, "k2": gap**2 / 2, "k3": gap.exp() - gap - 1}[o.kl_estimator]
        kl = kl * ratio if o.kl_bias_correction else kl
        loss = loss + o.kl_coef * kl
    if o.entropy_coef:
        assert entropy is not None
        loss = loss - o.entropy_coef * entropy[keep]
    divisor = normalizer[keep] if isinstance(normalizer, Tensor) and normalizer.dim() else normalizer
    return torch.zeros_like(logprobs).index_put((keep,), loss / divisor)


def group_advantage(
    rewards: Tensor,
    offsets: Sequence[int],
    *,
    scale: str = "group",
    ddof: int = 1,
    eps: float = 1e-6,
    baseline: str = "mean",
    weights: Tensor | None = None,
    eps_inside: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """rewards [B] -> (advantages [B], mean [G], std [G], degenerate [G]); ``group_advantage.group_advantage``
    documents it."""
    advantages = torch.zeros_like(rewards)
    groups = len(offsets) - 1
    mean, std = rewards.new_zeros(groups), rewards.new_zeros(groups)
    degenerate = torch.ones(groups, dtype=torch.bool)
    batch_std = rewards.std(correction=ddof) if len(rewards) > ddof else rewards.new_zeros(())
    for g, (start, end) in enumerate(itertools.pairwise(offsets)):
        r = rewards[start:end]
        if len(r) == 0:
            continue
        mean[g] = r.mean()
        std[g] = r.std(correction=ddof) if len(r) > ddof else 0.0
        degenerate[g] = bool((r == r[0]).all())
        if baseline == "leave_one_out":
            centred = (r - r.mean()) * len(r) / max(len(r) - 1, 1)
        elif baseline == "batch_mean":
            centred = r - rewards.mean()
        elif baseline == "none":
            centred = r
        else:
            centred = r - r.mean()
        if scale == "group":
            centred = centred / ((std[g] ** 2 + eps).sqrt() if eps_inside else std[g] + eps)
        elif scale == "batch":
            centred = centred / ((batch_std**2 + eps).sqrt() if eps_inside else batch_std + eps)
        elif scale == "max_min":
            centred = centred / (r.max() - r.min() + eps)
        elif scale == "mad":
            centred = centred / ((r - r.quantile(0.5)).abs().quantile(0.5) + eps)
        if degenerate[g] and baseline in ("mean", "leave_one_out"):
            centred = torch.zeros_like(r)
        advantages[start:end] = centred
    return (advantages if weights is None else advantages * weights), mean, std, degenerate
