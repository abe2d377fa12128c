"""Policy objectives on [N] vectors: loss, its derivative coefficients and metrics, without a host sync.

Written once and called by every fused operation. One row is one response token. Sources: GRPO (arXiv
2402.03300), Dr. GRPO (2503.20783), DAPO (2503.14476), CISPO (2506.13585), GSPO (2507.18071), SAPO
(2511.20347), dual clip (1912.09729), KL estimators k1, k2, k3 (Schulman, "Approximating KL divergence",
2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._checks import (
    check_floating,
    check_integer,
    check_normalizer,
    check_range,
    check_rows,
    check_transforms,
    compute_dtype,
    first_order_only,
    positive,
    scalar_there,
)
from .objective import CLIPPED, PolicyObjective, require_inputs

LOG_RATIO_BOUND = 20.0
"""Log-ratios are clamped to +-this before exp: e^20 = 4.9e8 keeps float32 finite; the gradient outside is zero."""

_FIXED_POINT = 2.0**38
"""Per-sequence sums are made in 64-bit integers of this scale: exact in any order, so bitwise reproducible."""


def metric_names(objective: PolicyObjective, *, entropy: bool, reference: bool) -> tuple[str, ...]:
    """Keys of ``policy_loss``'s metrics, in order."""
    names = ["clip_fraction_low", "clip_fraction_high", "approx_kl", "ratio_mean"]
    if objective.importance_correction != "none":
        names += ["importance_mean", "importance_rejected"]
    return (*names, *(["kl_ref"] if reference else []), *(["entropy"] if entropy else []), "ratio_min", "ratio_max")


class PolicyLossOutput(NamedTuple):
    """``row_loss`` [N]: sums to the loss, differentiable. ``d_logprob``, ``d_entropy`` [N]: derivatives of
    that sum.

    ``metrics``: 0-d tensors, means over the unmasked rows: clip_fraction_low, clip_fraction_high, approx_kl
    (k3 of old against current), kl_ref, entropy, ratio_mean, ratio_min, ratio_max, importance_mean,
    importance_rejected.
    """

    row_loss: Tensor
    d_logprob: Tensor
    d_entropy: Tensor
    metrics: dict[str, Tensor]


class _AttachDerivatives(torch.autograd.Function):
    """Gives already computed per-row losses the already computed derivatives."""

    @staticmethod
    def forward(
        ctx: Any,
        logprobs: Tensor,
        entropy: Tensor | None,
        row_loss: Tensor,
        d_logprob: Tensor,
        d_entropy: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(d_logprob, d_entropy)
        ctx.dtypes = (logprobs.dtype, None if entropy is None else entropy.dtype)
        return row_loss.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        first_order_only("policy_loss")
        (grad,) = grad_outputs
        d_logprob, d_entropy = ctx.saved_tensors
        logprob_dtype, entropy_dtype = ctx.dtypes
        to_entropy = (
            (grad * d_entropy).to(entropy_dtype) if entropy_dtype is not None and ctx.needs_input_grad[1] else None
        )
        return (grad * d_logprob).to(logprob_dtype), to_entropy, None, None, None


def sequence_sums(values: Tensor, sequence: Tensor, num_sequences: int) -> Tensor:
    """Sum of values [N] over the rows of each row's sequence, as [N]. Exact in any order, hence reproducible.

    |values| <= LOG_RATIO_BOUND; resolution 2^-38; a sequence may have up to 2^20 rows. NaN, which integers have none
    of, makes its sequence's sum NaN.
    """
    fixed = (values.double() * _FIXED_POINT).round().to(torch.int64)
    totals = torch.zeros(num_sequences, dtype=torch.int64, device=values.device)
    totals.scatter_add_(0, sequence.long(), fixed)
    not_a_number = torch.zeros(num_sequences, dtype=values.dtype, device=values.device)
    not_a_number.scatter_add_(0, sequence.long(), values - values)
    return (totals[sequence.long()].double() / _FIXED_POINT).to(values.dtype) + not_a_number[sequence.long()]


def sequence_counts(mask: Tensor, sequence: Tensor, num_sequences: int) -> Tensor:
    counts = torch.zeros(num_sequences, dtype=torch.int64, device=mask.device)
    return counts.scatter_add_(0, sequence.long(), mask.to(torch.int64))[sequence.long()]


def _importance_weights(
    objective: PolicyObjective, gap: Tensor, mask: Tensor, sequence: Tensor | None, num_sequences: int
) -> tuple[Tensor, Tensor]:
    """The constant weight of each row and whether the correction rejected it (mask) or moved it
    (truncate)."""
    if objective.importance_level == "sequence":
        assert sequence is not None
        bounded = torch.where(mask, gap.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND), 0.0)
        gap = sequence_sums(bounded, sequence, num_sequences)
    weight = torch.exp(gap.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND))
    low, high = objective.importance_min, objective.importance_max
    outside = (weight < low) | (weight > high)
    if objective.importance_correction == "truncate":
        return weight.clamp(low, high), outside
    return weight.masked_fill_(outside, 0.0), outside


def _policy_term(
    objective: PolicyObjective, logprobs: Tensor, ratio: Tensor, slope: Tensor, adv: Tensor
) -> tuple[Tensor, Tensor]:
    """The policy term per row and its derivative with respect to the row's log-probability; ``slope``: the ratio's."""
    low, high = 1.0 - objective.clip_eps_low, 1.0 + objective.clip_eps_high
    if objective.name == "reinforce":
        return -adv * logprobs, -adv
    if objective.name == "cispo":
        weighted = -ratio.clamp(low, high) * adv
        return weighted * logprobs, weighted
    if objective.name == "sapo":
        tau = torch.where(adv > 0, objective.sapo_temperature_pos, objective.sapo_temperature_neg).to(ratio.dtype)
        gate, rest = torch.sigmoid(tau * (ratio - 1.0)), torch.sigmoid(tau * (1.0 - ratio))  # rest = 1 - gate, exactly
        return -gate * 4.0 / tau * adv, -4.0 * gate * rest * slope * adv
    capped, capped_slope = ratio, slope
    if objective.delta is not None:
        capped = ratio.clamp(max=objective.delta)
        capped_slope = slope.masked_fill(ratio > objective.delta, 0.0)
    plain, clipped = capped * adv, ratio.clamp(low, high) * adv
    cut = plain > clipped
    value = torch.where(cut, clipped, plain)
    # Where the clipped branch wins strictly, the ratio is outside [low, high] and the clip's derivative is
    # zero.
    derivative = (capped_slope * adv).masked_fill_(cut, 0.0)
    if objective.dual_clip is not None:
        floor = objective.dual_clip * adv
        bounded = (adv < 0) & (value < floor)
        value = torch.where(bounded, floor, value)
        derivative.masked_fill_(bounded, 0.0)
    return -value, -derivative


def _clipped(objective: PolicyObjective, ratio: Tensor, adv: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the clip acts on a row whose ratio is too low, and on one whose ratio is too high."""
    low, high = ratio < 1.0 - objective.clip_eps_low, ratio > 1.0 + objective.clip_eps_high
    if objective.name == "cispo":
        return low, high
    if objective.name in CLIPPED:
        return low & (adv < 0), high & (adv > 0)
    return torch.zeros_like(low), torch.zeros_like(high)


def _kl_terms(estimator: str, gap: Tensor) -> tuple[Tensor, Tensor]:
    """KL estimate and its derivative with respect to logprob; gap = ref_logprobs - logprobs."""
    if estimator == "k1":
        return -gap, torch.ones_like(gap)
    if estimator == "k2":
        return 0.5 * gap * gap, -gap
    bounded = gap.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    growth = torch.expm1(bounded)
    return growth - bounded, (-growth).masked_fill_(gap.abs() > LOG_RATIO_BOUND, 0.0)


def _times_ratio(estimator: str, gap: Tensor, kl: Tensor, d_kl: Tensor, ratio: Tensor, slope: Tensor) -> Tensor:
    """Derivative of kl * ratio with respect to logprob; ``slope``: the ratio's."""
    derivative = d_kl * ratio + kl * slope
    if estimator != "k3":
        return derivative
    # (1 - e^gap) ratio + (e^gap - gap - 1) ratio without the large numbers that cancel, where nothing is clamped.
    return torch.where((gap.abs() <= LOG_RATIO_BOUND) & (slope > 0), -gap * ratio, derivative)


def check_policy_inputs(
    like: Tensor, *, advantages: Tensor, normalizer: Tensor | float, objective: PolicyObjective,
    old_logprobs: Tensor | None, ref_logprobs: Tensor | None, rollout_logprobs: Tensor | None, sequence: Tensor | None,
    num_sequences: int, loss_mask: Tensor | None,
) -> None:  # fmt: skip
    """Raise for what ``policy_loss`` raises for, of rows [N] like those of ``like`` [N, ...]; all but the entropy."""
    n = like.shape[0]
    if advantages is None:
        raise ValueError("advantages must be a [N] tensor, got None")
    check_rows("advantages", advantages, like, n)
    check_rows("old_logprobs", old_logprobs, like, n)
    check_rows("ref_logprobs", ref_logprobs, like, n)
    check_rows("rollout_logprobs", rollout_logprobs, like, n)
    check_rows("sequence", sequence, like, n, "int")
    check_rows("loss_mask", loss_mask, like, n, "mask")
    check_normalizer(normalizer, like, n)
    check_integer("num_sequences", num_sequences)
    require_inputs(objective, ref_logprobs=ref_logprobs, rollout_logprobs=rollout_logprobs, sequence=sequence)
    if sequence is not None and objective.needs_sequence:
        check_range("sequence", sequence, 0, num_sequences)


def policy_loss(
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
    num_sequences: int | None = None,
    loss_mask: Tensor | None = None,
) -> PolicyLossOutput:
    """Per-row policy loss, its derivatives with respect to log-probability and entropy, and metrics.

    The loss is ``row_loss.sum()``, with row_loss[n] = mask[n] * l[n] / normalizer[n] and
    l = policy term * importance weight + kl_coef * KL - entropy_coef * entropy.

    Args (all [N], on one device): ``logprobs`` nats of the chosen tokens at the sampling temperature;
    ``advantages``; ``normalizer`` the divisor: a number, a 0-d tensor or [N], from ``loss_normalizer``;
    ``entropy`` nats; ``old_logprobs`` of the policy that the ratio is taken against, None when it is the
    current one (ratio 1, with its gradient); ``ref_logprobs`` for the KL; ``rollout_logprobs`` as the
    sampling engine reported them, for the importance correction; ``sequence`` integer index of each row's
    sequence in [0, num_sequences), for sequence-level objectives (``num_sequences`` defaults to N);
    ``loss_mask`` non-zero where the row counts: masked rows get loss and derivatives of exactly 0 whatever
    they hold. All but ``logprobs`` and ``entropy`` are constants, and there are first-order gradients only.
    Log-ratios are clamped to +-20 before exp; outside, their gradient is 0.

    gspo follows GSPO-token (arXiv 2507.18071, eq. 14): the ratio is the sequence's geometric mean, held
    constant, times pi/sg(pi) of the row; with a constant advantage per sequence this is the gradient of GSPO.

    Raises ValueError for a wrong shape, dtype or device, for a divisor that is not positive and for an input that the
    objective needs and that is None.
    """
    check_floating("logprobs", logprobs, 1)
    inputs: dict[str, Any] = {
        "advantages": advantages, "normalizer": normalizer, "objective": objective, "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs, "rollout_logprobs": rollout_logprobs, "sequence": sequence,
        "num_sequences": logprobs.shape[0] if num_sequences is None else num_sequences, "loss_mask": loss_mask,
    }  # fmt: skip
    check_policy_inputs(logprobs, **inputs)
    check_rows("entropy", entropy, logprobs, logprobs.shape[0])
    if objective.entropy_coef and entropy is None:
        raise ValueError(f"entropy_coef = {objective.entropy_coef} needs entropy, got None")
    if isinstance(normalizer, Tensor):
        inputs["normalizer"] = positive("normalizer", scalar_there(normalizer, logprobs.device), logprobs, loss_mask)
    check_transforms("policy_loss", logprobs, entropy)
    with torch.no_grad():
        output = evaluate(logprobs, entropy=entropy, **inputs)
    if torch.is_grad_enabled() and (logprobs.requires_grad or (entropy is not None and entropy.requires_grad)):
        row_loss = _AttachDerivatives.apply(logprobs, entropy, output.row_loss, output.d_logprob, output.d_entropy)
        return output._replace(row_loss=row_loss)
    return output


def _extreme(ratio: Tensor, mask: Tensor, reduce: Callable[[Tensor], Tensor], neutral: float) -> Tensor:
    if ratio.numel() == 0:
        return ratio.new_ones(())
    found = reduce(torch.where(mask, ratio, neutral))
    return torch.where(mask.any(), found, 1.0)


def _metrics(
    objective: PolicyObjective, ratio: Tensor, log_ratio: Tensor, adv: Tensor, others: dict[str, Tensor], mask: Tensor
) -> dict[str, Tensor]:
    """Means over the unmasked rows, of ``others`` [N] too, and the extremes of their ratios."""
    low, high = _clipped(objective, ratio, adv)
    rows = {"clip_fraction_low": low, "clip_fraction_high": high, "approx_kl": ratio - 1.0 - log_ratio}
    rows |= {"ratio_mean": ratio, **others}
    stacked = torch.stack([values.to(ratio.dtype) for values in rows.values()])
    means = torch.where(mask, stacked, 0.0).sum(1) / mask.sum().clamp(min=1)
    return {
        **dict(zip(rows, means.unbind(), strict=True)),
        "ratio_min": _extreme(ratio, mask, torch.amin, math.inf),
        "ratio_max": _extreme(ratio, mask, torch.amax, -math.inf),
    }


def evaluate(
    logprobs: Tensor, *, advantages: Tensor, normalizer: Tensor | float, objective: PolicyObjective,
    entropy: Tensor | None, old_logprobs: Tensor | None, ref_logprobs: Tensor | None, rollout_logprobs: Tensor | None,
    sequence: Tensor | None, num_sequences: int, loss_mask: Tensor | None, with_metrics: bool = True,
) -> PolicyLossOutput:  # fmt: skip
    """``policy_loss`` for fused operations: of inputs that were checked, without autograd; ``metrics`` are empty
    unless asked for."""
    dtype = compute_dtype(logprobs)
    mask = torch.ones_like(logprobs, dtype=torch.bool) if loss_mask is None else loss_mask.bool()
    zero = torch.zeros((), dtype=dtype, device=logprobs.device)  # a number would be filled in anew at every use

    def clean(values: Tensor) -> Tensor:
        return torch.where(mask, values.to(dtype), zero)

    logp, adv = clean(logprobs), clean(advantages)
    old = logp if old_logprobs is None else clean(old_logprobs)
    log_ratio = logp - old
    if objective.name == "gspo":
        assert sequence is not None
        bounded = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
        counts = sequence_counts(mask, sequence, num_sequences).clamp(min=1)
        log_ratio = sequence_sums(bounded, sequence, num_sequences) / counts
    bounded = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    ratio = torch.exp(bounded)
    slope = ratio.masked_fill(log_ratio.abs() > LOG_RATIO_BOUND, 0.0)  # d ratio / d logprob
    loss, d_logprob = _policy_term(objective, logp, ratio, slope, adv)
    shown: dict[str, Tensor] = {}
    if objective.importance_correction != "none":
        assert rollout_logprobs is not None
        gap = old - clean(rollout_logprobs)
        weight, outside = _importance_weights(objective, gap, mask, sequence, num_sequences)
        loss, d_logprob = loss * weight, d_logprob * weight
        shown |= {"importance_mean": weight, "importance_rejected": outside}
    if ref_logprobs is not None:
        gap = clean(ref_logprobs) - logp
        kl, d_kl = _kl_terms(objective.kl_estimator, gap)
        if objective.kl_bias_correction:
            d_kl = _times_ratio(objective.kl_estimator, gap, kl, d_kl, ratio, slope)
            kl = kl * ratio
        shown["kl_ref"] = kl
        if objective.kl_coef:
            loss = loss + objective.kl_coef * kl
            d_logprob = d_logprob + objective.kl_coef * d_kl
    if entropy is not None:
        shown["entropy"] = entropy
        if objective.entropy_coef:
            loss = loss - objective.entropy_coef * clean(entropy)
    divisor = normalizer.to(device=logp.device, dtype=dtype) if isinstance(normalizer, Tensor) else normalizer

    def scale(values: Tensor) -> Tensor:
        return torch.where(mask, values / divisor, zero)

    d_entropy = torch.zeros_like(logp)
    if objective.entropy_coef:
        d_entropy = scale(d_entropy - objective.entropy_coef)
    metrics = _metrics(objective, ratio, bounded, adv, shown, mask) if with_metrics else {}
    return PolicyLossOutput(scale(loss), scale(d_logprob), d_entropy, metrics)
