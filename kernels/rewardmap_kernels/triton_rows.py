# mypy: disable-error-code="no-untyped-def"
"""Triton kernels over the rows of logits [N, V]: statistics, policy coefficient and gradient. One program per
row.

Row offsets are 64-bit; V, strides and every coefficient are run-time values, so varying lengths never recompile. The
columns after a row's last whole block are taken by themselves: whole blocks need no mask, so that vectors form at any
V. Values are widened to float32 right after each load. Exponentials are base 2, one instruction each, and relative to a
pivot that is known before the pass over the row: the larger of its first block's maximum and the target's logit. A
block that exceeds the pivot by GUARD bits becomes the pivot and what was summed so far shrinks with it, which hardly
ever happens: a block costs one reduction, sums are reduced once per row. Why each kernel reads and writes as often as
it does: docs/kernels.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOG_RATIO_BOUND = tl.constexpr(20.0)
GUARD = tl.constexpr(32.0)
LOWEST = tl.constexpr(-1e30)
"""A pivot is never below this, so that -inf minus the pivot is -inf."""
NOTHING = tl.constexpr(-200.0)
"""2 to this is 0 in float32: in 2^x x, an x held above it changes nothing, and no -inf makes NaN of the 0."""
ONE_A_ROW = (
    "targets_ptr", "temperature_ptr", "mask_ptr", "adv_ptr", "old_ptr", "ref_ptr", "rollout_ptr", "normalizer_ptr",
    "lse2_ptr", "entropy_ptr", "d_logprob_ptr", "d_entropy_ptr",
)  # fmt: skip
"""Read one by one: where a slice of them begins is no reason to compile a kernel again."""


@triton.jit
def _factor(temperature_ptr, temperature, row, HAS_TEMPERATURE: tl.constexpr):
    """log2(e) / T of the row."""
    if HAS_TEMPERATURE:
        temperature = tl.load(temperature_ptr + row).to(tl.float32)
    return 1.0 / temperature * LOG2E


@triton.jit
def _first_pivot(first, picked):
    return tl.maximum(tl.maximum(tl.max(first.to(tl.float32), 0), picked), LOWEST)


@triton.jit
def _take(
    block, columns, start, target, pivot, factor, rest, moment, to_ptr, WRITTEN: tl.constexpr, BLOCK: tl.constexpr
):
    """(2^gap, pivot, sums of 2^gap and of 2^gap gap over the columns beside the target) with one block more; gap =
    (z - pivot) log2(e) / T. WRITTEN: to_ptr holds the blocks before, which follow a new pivot too.
    """
    z = block.to(tl.float32)
    top = tl.max(z, 0)
    drop = (pivot - top) * factor
    if drop < -GUARD:
        ratio = tl.exp2(drop)
        moment = ratio * (moment + drop * rest)
        rest = ratio * rest
        if WRITTEN:
            tl.debug_barrier()
            for before in range(0, start, BLOCK):
                place = to_ptr + before + tl.arange(0, BLOCK)
                tl.store(place, (tl.load(place).to(tl.float32) * ratio).to(to_ptr.dtype.element_ty))
        pivot = top
    gap = (z - pivot) * factor
    weight = tl.exp2(gap)
    other = tl.where(columns == target, 0.0, weight)
    return weight, pivot, rest + other, moment + other * tl.maximum(gap, NOTHING)


@triton.jit
def _close(picked, target, pivot, factor, rest, moment):
    """(log2-sum-exp, total, total without the target, log-probability and entropy in nats) of a row's sums. A target
    below 0 is not in this row."""
    others = tl.sum(rest, 0)
    gap = (picked - pivot) * factor
    own = tl.where(target >= 0, tl.exp2(gap), 0.0)
    total = others + own
    log_total = tl.log2(total)
    mean_gap = (tl.sum(moment, 0) + tl.where(own == 0.0, 0.0, own * gap)) / total
    return pivot * factor + log_total, total, others, (gap - log_total) * LN2, (log_total - mean_gap) * LN2


@triton.jit
def _row_statistics(row_ptr, target, factor, vocab, BLOCK: tl.constexpr):
    """(log2-sum-exp, log-probability of the target in nats, entropy in nats) of one row. The next block is on its way
    while one is summed."""
    columns = tl.arange(0, BLOCK)
    whole = vocab // BLOCK * BLOCK
    picked = tl.load(row_ptr + target).to(tl.float32)
    block = tl.load(row_ptr + columns, mask=columns < vocab, other=float("-inf"))
    pivot = _first_pivot(block, picked)
    rest = tl.zeros([BLOCK], tl.float32)
    moment = tl.zeros([BLOCK], tl.float32)
    for start in range(0, whole, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        following = tl.load(row_ptr + columns + BLOCK, mask=columns + BLOCK < whole, other=float("-inf"))
        _, pivot, rest, moment = _take(
            block, columns, start, target, pivot, factor, rest, moment, row_ptr, False, BLOCK
        )
        block = following
    columns = whole + tl.arange(0, BLOCK)
    block = tl.load(row_ptr + columns, mask=columns < vocab, other=float("-inf"))
    _, pivot, rest, moment = _take(block, columns, whole, target, pivot, factor, rest, moment, row_ptr, False, BLOCK)
    lse2, _, _, logprob, entropy = _close(picked, target, pivot, factor, rest, moment)
    return lse2, logprob, entropy


@triton.jit
def _write_zeros(out_ptr, vocab, BLOCK: tl.constexpr):
    whole = vocab // BLOCK * BLOCK
    zeros = tl.zeros([BLOCK], out_ptr.dtype.element_ty)
    for start in range(0, whole, BLOCK):
        tl.store(out_ptr + start + tl.arange(0, BLOCK), zeros)
    columns = whole + tl.arange(0, BLOCK)
    tl.store(out_ptr + columns, zeros, mask=columns < vocab)


@triton.jit
def _block_below(row_ptr, columns, BLOCK: tl.constexpr):
    """The block before ``columns``, which nothing reads again."""
    return tl.load(row_ptr + columns - BLOCK, mask=columns >= BLOCK, other=0.0, eviction_policy="evict_first")


@triton.jit
def _slope(block, columns, target, factor, lse2, c, e, entropy, ENTROPY: tl.constexpr):
    """(c (onehot - p) - e p (log p + H)) of a block, c and e over T."""
    log2_p = block.to(tl.float32) * factor - lse2
    slope = c
    if ENTROPY:
        slope = c + e * (tl.maximum(log2_p, NOTHING) * LN2 + entropy)
    return tl.where(columns == target, c, 0.0) - tl.exp2(log2_p) * slope


@triton.jit
def _write_gradient(
    row_ptr, out_ptr, target, factor, lse2, entropy, c, e, vocab,
    BARRIER: tl.constexpr, ENTROPY: tl.constexpr, EVICTION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d loss / d z = (c (onehot - p) - e p (log p + H)) / T, from the last block, which is still in cache, to the
    first; zeros unread where both coefficients are 0.

    Over the row in its own dtype, a thread stores where it has read itself. A narrower gradient goes to the upper half
    of the row's bytes, where the blocks still to be read never lie, but where other threads have to have read: hence
    the BARRIER between load and store.
    """
    whole = vocab // BLOCK * BLOCK
    columns = whole + tl.arange(0, BLOCK)
    inside = columns < vocab
    if (c == 0.0) & (e == 0.0):
        _write_zeros(out_ptr, vocab, BLOCK)
    else:
        c *= factor * LN2  # 1 / T
        e *= factor * LN2
        block = tl.load(row_ptr + columns, mask=inside, other=float("-inf"))
        following = _block_below(row_ptr, columns, BLOCK)
        gradient = _slope(block, columns, target, factor, lse2, c, e, entropy, ENTROPY)
        if BARRIER:
            tl.debug_barrier()
        tl.store(out_ptr + columns, gradient.to(out_ptr.dtype.element_ty), mask=inside)
        for start in range(BLOCK, whole + BLOCK, BLOCK):
            columns = whole - start + tl.arange(0, BLOCK)
            block = following
            following = _block_below(row_ptr, columns, BLOCK)
            gradient = _slope(block, columns, target, factor, lse2, c, e, entropy, ENTROPY)
            if BARRIER:
                tl.debug_barrier()
            tl.store(out_ptr + columns, gradient.to(out_ptr.dtype.element_ty), eviction_policy=EVICTION)


@triton.jit
def _coefficient(
    logprob, row, adv_ptr, old_ptr, ref_ptr, rollout_ptr, clip_low, clip_high, dual_clip, delta, kl_coef,
    importance_min, importance_max, tau_pos, tau_neg,
    OBJECTIVE: tl.constexpr, DUAL_CLIP: tl.constexpr, DELTA: tl.constexpr, KL: tl.constexpr,
    KL_BIAS: tl.constexpr, IMPORTANCE: tl.constexpr, HAS_OLD: tl.constexpr,
):  # fmt: skip
    """d l / d logprob of one unmasked row before normalisation: ``policy_loss`` at token level, in scalars.

    A GPU's minimum and maximum return the number where the other is NaN, which has to reach the derivative.
    """
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
        shrunk = tl.exp(-tl.abs(tau * (ratio - 1.0)))  # gate (1 - gate) without the difference
        c = -4.0 * (shrunk / ((1.0 + shrunk) * (1.0 + shrunk))) * slope * adv
    else:
        capped = ratio
        if DELTA:
            capped = tl.where(ratio > delta, delta, ratio)
            slope = tl.where(ratio > delta, 0.0, slope)
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
        c *= tl.where(gap != gap, gap, weight)
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
            growth = tl.where(gap != gap, gap, tl.exp(bounded_gap))
            kl = growth - bounded_gap - 1.0
            d_kl = tl.where(tl.abs(gap) > LOG_RATIO_BOUND, 0.0, 1.0 - growth)
        if KL_BIAS:
            d_kl = d_kl * ratio + kl * ratio_slope
            if KL == "k3":  # the same without the large numbers that cancel
                d_kl = tl.where((tl.abs(gap) <= LOG_RATIO_BOUND) & (ratio_slope > 0.0), -gap * ratio, d_kl)
        c += kl_coef * d_kl
    return c


@triton.jit(do_not_specialize=["normalizer_stride"], do_not_specialize_on_alignment=ONE_A_ROW)
def policy_row_kernel(
    logits_ptr, logits_stride, out_ptr, out_stride, targets_ptr, temperature_ptr, mask_ptr, adv_ptr, old_ptr,
    ref_ptr, rollout_ptr, normalizer_ptr, normalizer_stride, gradient_scale_ptr, logprob_ptr, entropy_ptr,
    d_logprob_ptr, vocab, temperature, clip_low, clip_high, dual_clip, delta, kl_coef, entropy_coef,
    importance_min, importance_max, tau_pos, tau_neg,
    OBJECTIVE: tl.constexpr, DUAL_CLIP: tl.constexpr, DELTA: tl.constexpr, KL: tl.constexpr,
    KL_BIAS: tl.constexpr, IMPORTANCE: tl.constexpr, ENTROPY: tl.constexpr, HAS_OLD: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Statistics, coefficient and gradient of one row in one launch, over the row or elsewhere, in its dtype."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride
    live = True
    if HAS_MASK:
        live = tl.load(mask_ptr + row) != 0
    factor = _factor(temperature_ptr, temperature, row, HAS_TEMPERATURE)
    target = tl.load(targets_ptr + row).to(tl.int32)
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
    _write_gradient(
        row_ptr, out_ptr + row * out_stride, target, factor, lse2, entropy, c, e, vocab, False, ENTROPY, "evict_first",
        BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=ONE_A_ROW)
def statistics_kernel(
    logits_ptr, logits_stride, targets_ptr, temperature_ptr, mask_ptr, lse2_ptr, logprob_ptr, entropy_ptr,
    vocab, temperature, HAS_MASK: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Log2-sum-exp, log-probability and entropy of one row; masked rows give 0 unread."""
    row = tl.program_id(0).to(tl.int64)
    live = True
    if HAS_MASK:
        live = tl.load(mask_ptr + row) != 0
    factor = _factor(temperature_ptr, temperature, row, HAS_TEMPERATURE)
    lse2 = 0.0
    logprob = 0.0
    entropy = 0.0
    if live:
        target = tl.load(targets_ptr + row).to(tl.int32)
        lse2, logprob, entropy = _row_statistics(logits_ptr + row * logits_stride, target, factor, vocab, BLOCK)
    tl.store(lse2_ptr + row, lse2)
    tl.store(logprob_ptr + row, logprob)
    tl.store(entropy_ptr + row, entropy)


@triton.jit(do_not_specialize_on_alignment=ONE_A_ROW)
def exponentials_kernel(
    logits_ptr, logits_stride, out_ptr, out_stride, targets_ptr, temperature_ptr, mask_ptr, lse2_ptr, total_ptr,
    logprob_ptr, entropy_ptr, vocab, temperature,
    HAS_MASK: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One read and one write of a row: statistics, and E with E / total = p - onehot (masked rows: 0, total 1).

    float32 and bfloat16 hold 127 bits, so E relative to the pivot does not overflow. The target's E is minus the sum
    of the others: exact where p is near 1. A narrower E goes to the lower half of the row's bytes, over columns that
    were read in the same block or an earlier one.
    """
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride
    to_ptr = out_ptr + row * out_stride
    live = True
    if HAS_MASK:
        live = tl.load(mask_ptr + row) != 0
    factor = _factor(temperature_ptr, temperature, row, HAS_TEMPERATURE)
    target = tl.load(targets_ptr + row).to(tl.int32)
    lse2 = 0.0
    total = 1.0
    logprob = 0.0
    entropy = 0.0
    if live:
        columns = tl.arange(0, BLOCK)
        whole = vocab // BLOCK * BLOCK
        picked = tl.load(row_ptr + tl.maximum(target, 0)).to(tl.float32)
        block = tl.load(row_ptr + columns, mask=columns < vocab, other=float("-inf"))
        pivot = _first_pivot(block, picked)
        rest = tl.zeros([BLOCK], tl.float32)
        moment = tl.zeros([BLOCK], tl.float32)
        for start in range(0, whole, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            following = tl.load(row_ptr + columns + BLOCK, mask=columns + BLOCK < whole, other=float("-inf"))
            weight, pivot, rest, moment = _take(
                block, columns, start, target, pivot, factor, rest, moment, to_ptr, True, BLOCK
            )
            if IN_PLACE:
                tl.debug_barrier()
            tl.store(to_ptr + columns, weight.to(out_ptr.dtype.element_ty))
            block = following
        columns = whole + tl.arange(0, BLOCK)
        block = tl.load(row_ptr + columns, mask=columns < vocab, other=float("-inf"))
        weight, pivot, rest, moment = _take(
            block, columns, whole, target, pivot, factor, rest, moment, to_ptr, True, BLOCK
        )
        if IN_PLACE:
            tl.debug_barrier()
        tl.store(to_ptr + columns, weight.to(out_ptr.dtype.element_ty), mask=columns < vocab)
        lse2, total, others, logprob, entropy = _close(picked, target, pivot, factor, rest, moment)
        tl.debug_barrier()
        if target >= 0:
            tl.store(to_ptr + target, (-others).to(out_ptr.dtype.element_ty))
    else:
        _write_zeros(to_ptr, vocab, BLOCK)
    tl.store(lse2_ptr + row, lse2)
    tl.store(total_ptr + row, total)
    tl.store(logprob_ptr + row, logprob)
    tl.store(entropy_ptr + row, entropy)


@triton.jit(do_not_specialize_on_alignment=ONE_A_ROW)
def gradient_kernel(
    logits_ptr, logits_stride, out_ptr, out_stride, targets_ptr, temperature_ptr, gradient_scale_ptr,
    lse2_ptr, entropy_ptr, d_logprob_ptr, d_entropy_ptr, vocab, temperature, HAS_TEMPERATURE: tl.constexpr,
    BARRIER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of one row from its statistics and given coefficients; coefficients of 0 write zeros
    unread."""
    row = tl.program_id(0).to(tl.int64)
    factor = _factor(temperature_ptr, temperature, row, HAS_TEMPERATURE)
    scale = tl.load(gradient_scale_ptr)
    target = tl.load(targets_ptr + row).to(tl.int32)
    c = scale * tl.load(d_logprob_ptr + row).to(tl.float32)
    e = scale * tl.load(d_entropy_ptr + row).to(tl.float32)
    lse2 = tl.load(lse2_ptr + row)
    entropy = tl.load(entropy_ptr + row)
    row_ptr = logits_ptr + row * logits_stride
    _write_gradient(
        row_ptr, out_ptr + row * out_stride, target, factor, lse2, entropy, c, e, vocab, BARRIER, True, "", BLOCK
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
