# mypy: disable-error-code="no-untyped-def"
"""Triton kernels over the rows of logits [N, V]: statistics, policy coefficient and gradient. One program per
row.

A row is read once for its running maximum and sums (started at -inf and 0), and once more, backwards so that
the part still in cache comes first, for the gradient. Row offsets are 64-bit; V, strides and every
coefficient are run-time values, so varying lengths never recompile. Values are widened to float32 right after
each load. Arithmetic is in base 2:
y = z log2(e) / T, so that exp is one instruction.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOG_RATIO_BOUND = tl.constexpr(20.0)


@triton.jit
def _row_statistics(row_ptr, target, factor, vocab, BLOCK: tl.constexpr):
    """(log2-sum-exp, log-probability of the target in nats, entropy in nats) of one row; ``factor`` is
    log2(e) / T."""
    top = float("-inf")
    total = 0.0  # sum of 2^(y - top)
    moment = 0.0  # sum of 2^(y - top) (y - top): relative to the maximum, so that large logits cost no accuracy
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        y = tl.load(row_ptr + columns, mask=columns < vocab, other=float("-inf")).to(tl.float32) * factor
        new_top = tl.maximum(top, tl.max(y, 0))
        # While everything is -inf the reference point is 0: -inf minus -inf is not a number.
        pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
        shift = tl.where(top == float("-inf"), 0.0, top - pivot)
        keep = tl.where(top == float("-inf"), 0.0, tl.exp2(shift))
        gap = y - pivot
        weight = tl.exp2(gap)
        moment = keep * (moment + shift * total) + tl.sum(tl.where(weight == 0.0, 0.0, weight * gap), 0)
        total = keep * total + tl.sum(weight, 0)
        top = new_top
    log_total = tl.log2(total)
    picked = tl.load(row_ptr + target).to(tl.float32) * factor
    return top + log_total, (picked - top - log_total) * LN2, (log_total - moment / total) * LN2


@triton.jit
def _write_gradient(
    row_ptr, out_ptr, target, factor, lse2, entropy, c, e, vocab,
    IN_PLACE: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d loss / d z = (c (onehot - p) - e p (log p + H)) / T, from the last block to the first.

    In place, a block is stored over columns that every thread has read: hence the barrier between load and
    store. A narrower gradient goes to the upper half of the row's bytes, where the blocks still to be read
    never lie.
    """
    inverse = factor * LN2  # 1 / T
    blocks = tl.cdiv(vocab, BLOCK)
    for i in range(0, blocks):
        columns = (blocks - 1 - i) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < vocab
        if (c == 0.0) & (e == 0.0):
            gradient = tl.zeros([BLOCK], tl.float32)
        else:
            y = tl.load(row_ptr + columns, mask=inside, other=float("-inf")).to(tl.float32) * factor
            log2_p = y - lse2
            p = tl.exp2(log2_p)
            slope = tl.zeros([BLOCK], tl.float32) + c
            if ENTROPY:
                slope += e * (tl.where(p == 0.0, 0.0, log2_p) * LN2 + entropy)
            gradient = (tl.where(columns == target, c, 0.0) - p * slope) * inverse
        if IN_PLACE:
            tl.debug_barrier()
        tl.store(out_ptr + columns, gradient.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _coefficient(
    logprob, row, adv_ptr, old_ptr, ref_ptr, rollout_ptr, clip_low, clip_high, dual_clip, delta, kl_coef,
    importance_min, importance_max, tau_pos, tau_neg,
    OBJECTIVE: tl.constexpr, DUAL_CLIP: tl.constexpr, DELTA: tl.constexpr, KL: tl.constexpr,
    KL_BIAS: tl.constexpr, IMPORTANCE: tl.constexpr, HAS_OLD: tl.constexpr,
):  # fmt: skip
    """d l / d logprob of one unmasked row before normalisation: ``policy_loss`` at token level, in
    scalars."""
    adv = tl.load(adv_ptr + row).to(tl.float32)
    old = logprob
    ratio = 1.0 + (logprob - logprob)
    slope = ratio
    if HAS_OLD:
        old = tl.load(old_ptr + row).to(tl.float32)
        log_ratio = logprob - old
        ratio = tl.exp(tl.minimum(tl.maximum(log_ratio, -LOG_RATIO_BOUND), LOG_RATIO_BOUND))
        ratio = tl.where(log_ratio != log_ratio, log_ratio, ratio)
        slope = tl.where(tl.abs(log_ratio) > LOG_RATIO_BOUND, 0.0, ratio)
    ratio_slope = slope
    bounded = tl.minimum(tl.maximum(ratio, clip_low), clip_high)
    if OBJECTIVE == "reinforce":
        c = -adv
    elif OBJECTIVE == "cispo":
        c = -tl.where(ratio != ratio, ratio, bounded) * adv
    elif OBJECTIVE == "sapo":
        tau = tl.where(adv > 0, tau_pos, tau_neg)
        gate = 1.0 / (1.0 + tl.exp(-tau * (ratio - 1.0)))
        c = -4.0 * gate * (1.0 - gate) * slope * adv
    else:
        capped = ratio
        if DELTA:
            capped = tl.minimum(ratio, delta)
            slope = tl.where(ratio <= delta, slope, 0.0)
        plain = capped * adv
        clipped = bounded * adv
        c = tl.where(plain > clipped, 0.0, -slope * adv)
        if DUAL_CLIP:
            c = tl.where((adv < 0) & (tl.minimum(plain, clipped) < dual_clip * adv), 0.0, c)
    if IMPORTANCE != "none":
        gap = old - tl.load(rollout_ptr + row).to(tl.float32)
        weight = tl.exp(tl.minimum(tl.maximum(gap, -LOG_RATIO_BOUND), LOG_RATIO_BOUND))
        if IMPORTANCE == "truncate":
            weight = tl.minimum(tl.maximum(weight, importance_min), importance_max)
        else:
            weight = tl.where((weight < importance_min) | (weight > importance_max), 0.0, weight)
        c *= weight
    if KL != "none":
        gap = tl.load(ref_ptr + row).to(tl.float32) - logprob
        if KL == "k1":
            kl = -gap
            d_kl = 1.0 + (gap - gap)
        elif KL == "k2":
            kl = 0.5 * gap * gap
            d_kl = -gap
        else:
            bounded_gap = tl.minimum(tl.maximum(gap, -LOG_RATIO_BOUND), LOG_RATIO_BOUND)
            growth = tl.exp(bounded_gap)
            kl = growth - bounded_gap - 1.0
            d_kl = tl.where(tl.abs(gap) > LOG_RATIO_BOUND, 0.0, 1.0 - growth)
        if KL_BIAS:
            d_kl = d_kl * ratio + kl * ratio_slope
        c += kl_coef * d_kl
    return c


@triton.jit
def policy_row_kernel(
    logits_ptr, logits_stride, out_ptr, out_stride, targets_ptr, temperature_ptr, mask_ptr, adv_ptr, old_ptr,
    ref_ptr, rollout_ptr, normalizer_ptr, normalizer_stride, gradient_scale_ptr, logprob_ptr, entropy_ptr,
    d_logprob_ptr, vocab, temperature, clip_low, clip_high, dual_clip, delta, kl_coef, entropy_coef,
    importance_min, importance_max, tau_pos, tau_neg,
    OBJECTIVE: tl.constexpr, DUAL_CLIP: tl.constexpr, DELTA: tl.constexpr, KL: tl.constexpr,
    KL_BIAS: tl.constexpr, IMPORTANCE: tl.constexpr, ENTROPY: tl.constexpr, HAS_OLD: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Statistics, coefficient and gradient of one row in one launch."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride
    live = True
    if HAS_MASK:
        live = tl.load(mask_ptr + row) != 0
    if HAS_TEMPERATURE:
        factor = 1.0 / tl.load(temperature_ptr + row).to(tl.float32) * LOG2E
    else:
        factor = 1.0 / temperature * LOG2E
    target = tl.load(targets_ptr + row).to(tl.int64)
    lse2 = 0.0
    logprob = 0.0
    entropy = 0.0
    c = 0.0
    e = 0.0
    if live:
        lse2, logprob, entropy = _row_statistics(row_ptr, target, factor, vocab, BLOCK)
        scale = tl.load(gradient_scale_ptr) / tl.load(normalizer_ptr + row * normalizer_stride).to(tl.float32)
        c = scale * _coefficient(
            logprob, row, adv_ptr, old_ptr, ref_ptr, rollout_ptr, clip_low, clip_high, dual_clip, delta,
            kl_coef, importance_min, importance_max, tau_pos, tau_neg, OBJECTIVE, DUAL_CLIP, DELTA, KL,
            KL_BIAS, IMPORTANCE, HAS_OLD,
        )  # fmt: skip
        if ENTROPY:
            e = -scale * entropy_coef
    tl.store(logprob_ptr + row, logprob)
    tl.store(entropy_ptr + row, entropy)
    tl.store(d_logprob_ptr + row, c)
    _write_gradient(row_ptr, out_ptr + row * out_stride, target, factor, lse2, entropy, c, e, vocab, IN_PLACE,
    ENTROPY,
                    BLOCK)  # fmt: skip


@triton.jit
def statistics_kernel(
    logits_ptr, logits_stride, targets_ptr, temperature_ptr, mask_ptr, lse2_ptr, logprob_ptr, entropy_ptr,
    vocab, temperature, HAS_MASK: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Log2-sum-exp, log-probability and entropy of one row; masked rows give 0 unread."""
    row = tl.program_id(0).to(tl.int64)
    live = True
    if HAS_MASK:
        live = tl.load(mask_ptr + row) != 0
    if HAS_TEMPERATURE:
        factor = 1.0 / tl.load(temperature_ptr + row).to(tl.float32) * LOG2E
    else:
        factor = 1.0 / temperature * LOG2E
    lse2 = 0.0
    logprob = 0.0
    entropy = 0.0
    if live:
        target = tl.load(targets_ptr + row).to(tl.int64)
        lse2, logprob, entropy = _row_statistics(logits_ptr + row * logits_stride, target, factor, vocab, BLOCK)
    tl.store(lse2_ptr + row, lse2)
    tl.store(logprob_ptr + row, logprob)
    tl.store(entropy_ptr + row, entropy)


@triton.jit
def gradient_kernel(
    logits_ptr, logits_stride, out_ptr, out_stride, targets_ptr, temperature_ptr, gradient_scale_ptr,
    lse2_ptr, entropy_ptr, d_logprob_ptr, d_entropy_ptr, vocab, temperature, HAS_TEMPERATURE: tl.constexpr,
    IN_PLACE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of one row from its statistics and given coefficients; coefficients of 0 write zeros
    unread."""
    row = tl.program_id(0).to(tl.int64)
    if HAS_TEMPERATURE:
        factor = 1.0 / tl.load(temperature_ptr + row).to(tl.float32) * LOG2E
    else:
        factor = 1.0 / temperature * LOG2E
    scale = tl.load(gradient_scale_ptr)
    target = tl.load(targets_ptr + row).to(tl.int64)
    c = scale * tl.load(d_logprob_ptr + row).to(tl.float32)
    e = scale * tl.load(d_entropy_ptr + row).to(tl.float32)
    lse2 = tl.load(lse2_ptr + row)
    entropy = tl.load(entropy_ptr + row)
    row_ptr = logits_ptr + row * logits_stride
    _write_gradient(
        row_ptr, out_ptr + row * out_stride, target, factor, lse2, entropy, c, e, vocab, IN_PLACE, True, BLOCK
    )


@triton.jit
def scale_kernel(values_ptr, stride, columns_total, scale_ptr, BLOCK: tl.constexpr):
    """values *= scale in place, by rows; returns at once where the scale is 1, which it almost always is."""
    scale = tl.load(scale_ptr).to(tl.float32)
    if scale != 1.0:
        base = values_ptr + tl.program_id(0).to(tl.int64) * stride
        for start in range(0, columns_total, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < columns_total
            value = tl.load(base + columns, mask=inside).to(tl.float32) * scale
            tl.store(base + columns, value.to(values_ptr.dtype.element_ty), mask=inside)
