# mypy: disable-error-code="no-untyped-def"
"""Attention under the forest mask in Triton: forward, dQ, and dK with dV. No atomics; every sum in a fixed order.

The online softmax is that of FlashAttention-2 (Dao, arXiv 2307.08691) in base 2. Only tiles that hold a visible pair
are visited; those that are wholly visible skip the mask. In the others, rows that hold a NaN or an infinity are
replaced by zeros in the products that sum over them and the NaN is added to what is visible instead: 0 · NaN must not
carry a token's NaN to those that do not see it. The pass over key blocks knows such rows by their delta, Σ out · dout,
which is not finite where anything of the row is not: it need not look at what it loads, and its registers go to tiles.

float32 products run as three in tf32, which keeps float32's accuracy on tensor cores.
"""

from __future__ import annotations

import triton
import triton.language as tl

COUNTS = ("total", "group", "parts")
"""Whether one is 1 or a multiple of 16 is no reason to compile a kernel again."""


@triton.jit
def _rows(ptr, start, stride, wanted, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
          ALL: tl.constexpr):  # fmt: skip
    """ROWS rows of one head from start on; zero beyond the head dimension and, unless ALL, where not ``wanted``."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    at = ptr + start.to(tl.int64) * stride + row[:, None] * stride + column[None, :]
    if ALL:
        if HEAD_DIM == BLOCK_D:
            return tl.load(at)
        return tl.load(at, mask=column[None, :] < HEAD_DIM, other=0.0)
    return tl.load(at, mask=wanted[:, None] & (column[None, :] < HEAD_DIM), other=0.0)


@triton.jit
def _store_rows(ptr, value, start, stride, total, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    at = ptr + start.to(tl.int64) * stride + row[:, None] * stride + column[None, :]
    tl.store(at, value.to(ptr.dtype.element_ty), mask=(start + row[:, None] < total) & (column[None, :] < HEAD_DIM))


@triton.jit
def _poison(rows):
    """[rows] float32: 0 where all of a row is finite, NaN where it is not."""
    wide = rows.to(tl.float32)
    return tl.sum(wide - wide, 1)


@triton.jit
def _cleaned(rows, poison):
    """The rows, those that are not finite replaced by zeros."""
    return tl.where((poison == 0.0)[:, None], rows, tl.zeros_like(rows))


@triton.jit
def _forward_tile(acc, high, norm, q, k_ptr, v_ptr, k_stride, v_stride, ends_ptr, start_m, start_n, total, qk_scale,
                  HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                  FULL: tl.constexpr):  # fmt: skip
    j = start_n + tl.arange(0, BLOCK_N)
    k = _rows(k_ptr, start_n, k_stride, j < total, BLOCK_N, HEAD_DIM, BLOCK_D, FULL)
    scores = tl.dot(q, tl.trans(k), input_precision="tf32x3")
    v = _rows(v_ptr, start_n, v_stride, j < total, BLOCK_N, HEAD_DIM, BLOCK_D, FULL)
    if FULL:
        new_high = tl.maximum(high, tl.max(scores, 1) * qk_scale)
        p = tl.exp2(scores * qk_scale - new_high[:, None])
        fade = tl.exp2(high - new_high)
    else:
        i = start_m + tl.arange(0, BLOCK_M)
        end = tl.load(ends_ptr + j, mask=j < total, other=0)
        poison = _poison(v)
        v = _cleaned(v, poison)
        visible = (j[None, :] <= i[:, None]) & (i[:, None] < end[None, :])
        scores = tl.where(visible, scores * qk_scale + poison[None, :], float("-inf"))
        new_high = tl.maximum(high, tl.max(scores, 1))
        # A row that has seen nothing yet keeps -inf; subtracting it from itself would be NaN.
        base = tl.where(new_high == float("-inf"), 0.0, new_high)
        p = tl.exp2(scores - base[:, None])
        fade = tl.exp2(high - base)
    norm = norm * fade + tl.sum(p, 1)
    acc = acc * fade[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision="tf32x3")
    return acc, new_high, norm


@triton.jit(do_not_specialize=COUNTS)
def tree_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, ends_ptr, rows_ptr, keys_ptr, q_head, q_stride, k_head, k_stride, v_head,
    v_stride, out_head, out_stride, total, group, qk_scale, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One query block of one head: out, and the base-2 log-sum-exp of the scaled scores."""
    head = tl.program_id(0).to(tl.int64)
    row = rows_ptr + tl.program_id(1) * 4
    start_m = tl.load(row) * BLOCK_M
    first, full, last = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    k_ptr += head // group * k_head
    v_ptr += head // group * v_head
    i = start_m + tl.arange(0, BLOCK_M)
    q = _rows(q_ptr + head * q_head, start_m, q_stride, i < total, BLOCK_M, HEAD_DIM, BLOCK_D, False)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    high = norm + float("-inf")
    for index in range(first, full):
        acc, high, norm = _forward_tile(
            acc, high, norm, q, k_ptr, v_ptr, k_stride, v_stride, ends_ptr, start_m,
            tl.load(keys_ptr + index) * BLOCK_N, total, qk_scale, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, True,
        )  # fmt: skip
    for index in range(full, last):
        acc, high, norm = _forward_tile(
            acc, high, norm, q, k_ptr, v_ptr, k_stride, v_stride, ends_ptr, start_m,
            tl.load(keys_ptr + index) * BLOCK_N, total, qk_scale, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, False,
        )  # fmt: skip
    norm = tl.where(i < total, norm, 1.0)
    out = acc / norm[:, None]
    _store_rows(out_ptr + head * out_head, out, start_m, out_stride, total, BLOCK_M, HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + head * total + i, high + tl.log2(norm), mask=i < total)


@triton.jit
def _dq_tile(acc, q, dout, lse, delta, k_ptr, v_ptr, k_stride, v_stride, ends_ptr, start_m, start_n, total, qk_scale,
             HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
             FULL: tl.constexpr):  # fmt: skip
    j = start_n + tl.arange(0, BLOCK_N)
    k = _rows(k_ptr, start_n, k_stride, j < total, BLOCK_N, HEAD_DIM, BLOCK_D, FULL)
    v = _rows(v_ptr, start_n, v_stride, j < total, BLOCK_N, HEAD_DIM, BLOCK_D, FULL)
    scores = tl.dot(q, tl.trans(k), input_precision="tf32x3")
    d_p = tl.dot(dout, tl.trans(v), input_precision="tf32x3")
    d_scores = tl.exp2(scores * qk_scale - lse[:, None]) * (d_p - delta[:, None])
    if not FULL:
        i = start_m + tl.arange(0, BLOCK_M)
        end = tl.load(ends_ptr + j, mask=j < total, other=0)
        d_scores = tl.where((j[None, :] <= i[:, None]) & (i[:, None] < end[None, :]), d_scores, 0.0)
        k = _cleaned(k, _poison(k))
    return tl.dot(d_scores.to(k.dtype), k, acc, input_precision="tf32x3")


@triton.jit(do_not_specialize=COUNTS)
def tree_dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, ends_ptr, rows_ptr, keys_ptr, q_head, q_stride,
    k_head, k_stride, v_head, v_stride, out_head, out_stride, dout_head, dout_stride, dq_head, dq_stride, total, group,
    qk_scale, scale, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One query block of one head: dQ, and delta = Σ out · dout for the kernel of dK and dV."""
    head = tl.program_id(0).to(tl.int64)
    row = rows_ptr + tl.program_id(1) * 4
    start_m = tl.load(row) * BLOCK_M
    first, full, last = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    k_ptr += head // group * k_head
    v_ptr += head // group * v_head
    i = start_m + tl.arange(0, BLOCK_M)
    dout = _rows(dout_ptr + head * dout_head, start_m, dout_stride, i < total, BLOCK_M, HEAD_DIM, BLOCK_D, False)
    out = _rows(out_ptr + head * out_head, start_m, out_stride, i < total, BLOCK_M, HEAD_DIM, BLOCK_D, False)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    tl.store(delta_ptr + head * total + i, delta, mask=i < total)
    lse = tl.load(lse_ptr + head * total + i, mask=i < total, other=0.0)
    q = _rows(q_ptr + head * q_head, start_m, q_stride, i < total, BLOCK_M, HEAD_DIM, BLOCK_D, False)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for index in range(first, full):
        acc = _dq_tile(
            acc, q, dout, lse, delta, k_ptr, v_ptr, k_stride, v_stride, ends_ptr, start_m,
            tl.load(keys_ptr + index) * BLOCK_N, total, qk_scale, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, True,
        )  # fmt: skip
    for index in range(full, last):
        acc = _dq_tile(
            acc, q, dout, lse, delta, k_ptr, v_ptr, k_stride, v_stride, ends_ptr, start_m,
            tl.load(keys_ptr + index) * BLOCK_N, total, qk_scale, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, False,
        )  # fmt: skip
    _store_rows(dq_ptr + head * dq_head, acc * scale, start_m, dq_stride, total, BLOCK_M, HEAD_DIM, BLOCK_D)


@triton.jit
def _dkv_tiles(dk, dv, k, v, end, q_ptr, dout_ptr, lse_ptr, delta_ptr, q_head, q_stride, dout_head, dout_stride, begin,
               count, gap_at, gap, heads, start_n, total, qk_scale, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FULL: tl.constexpr):  # fmt: skip
    """``count`` query blocks from ``begin`` on, skipping ``gap`` blocks at ``gap_at``, for every head of the group: one
    loop, so that loads run ahead across heads."""
    head = tl.full([], 0, tl.int64)
    block = begin
    for _ in range(0, heads * count):
        start_m = tl.where(block < gap_at, block, block + gap) * BLOCK_M
        i = start_m + tl.arange(0, BLOCK_M)
        lse = tl.load(lse_ptr + head * total + i, mask=i < total, other=0.0)
        delta = tl.load(delta_ptr + head * total + i, mask=i < total, other=0.0)
        poison = delta - delta
        wanted = i < total if FULL else (i < total) & (poison == 0.0)
        q = _rows(q_ptr + head * q_head, start_m, q_stride, wanted, BLOCK_M, HEAD_DIM, BLOCK_D, False)
        dout = _rows(dout_ptr + head * dout_head, start_m, dout_stride, wanted, BLOCK_M, HEAD_DIM, BLOCK_D, False)
        # Transposed, [key, query]: both products below take their left side from registers.
        scores = tl.dot(k, tl.trans(q), input_precision="tf32x3")
        p = tl.exp2(scores * qk_scale - lse[None, :])
        d_p = tl.dot(v, tl.trans(dout), input_precision="tf32x3")
        d_scores = p * (d_p - delta[None, :])
        if not FULL:
            j = start_n + tl.arange(0, BLOCK_N)
            visible = (j[:, None] <= i[None, :]) & (i[None, :] < end[:, None])
            p = tl.where(visible, p + poison[None, :], 0.0)
            d_scores = tl.where(visible, d_scores, 0.0)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="tf32x3")
        dk = tl.dot(d_scores.to(q.dtype), q, dk, input_precision="tf32x3")
        block += 1
        ended = block == begin + count
        block = tl.where(ended, begin, block)
        head += ended.to(tl.int64)
    return dk, dv


@triton.jit(do_not_specialize=COUNTS)
def tree_dkv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, ends_ptr, columns_ptr, q_head, q_stride, k_head,
    k_stride, v_head, v_stride, dout_head, dout_stride, dk_part, dk_head, dk_stride, total, group, parts, qk_scale,
    scale, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One key block of one key head, summed over one part of the query heads that share it: dK and dV."""
    kv_head = (tl.program_id(0) // parts).to(tl.int64)
    part = (tl.program_id(0) % parts).to(tl.int64)
    column = columns_ptr + tl.program_id(1) * 5
    start_n = tl.load(column) * BLOCK_N
    first, full_first = tl.load(column + 1), tl.load(column + 2)
    full_last, last = tl.load(column + 3), tl.load(column + 4)
    heads = group // parts
    head = kv_head * group + part * heads
    q_ptr += head * q_head
    dout_ptr += head * dout_head
    lse_ptr += head * total
    delta_ptr += head * total
    j = start_n + tl.arange(0, BLOCK_N)
    k = _rows(k_ptr + kv_head * k_head, start_n, k_stride, j < total, BLOCK_N, HEAD_DIM, BLOCK_D, False)
    v = _rows(v_ptr + kv_head * v_head, start_n, v_stride, j < total, BLOCK_N, HEAD_DIM, BLOCK_D, False)
    end = tl.load(ends_ptr + j, mask=j < total, other=0)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    wholly = full_last - full_first
    dk, dv = _dkv_tiles(
        dk, dv, k, v, end, q_ptr, dout_ptr, lse_ptr, delta_ptr, q_head, q_stride, dout_head, dout_stride, full_first,
        wholly, full_last, 0, heads, start_n, total, qk_scale, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, True,
    )  # fmt: skip
    dk, dv = _dkv_tiles(
        dk, dv, k, v, end, q_ptr, dout_ptr, lse_ptr, delta_ptr, q_head, q_stride, dout_head, dout_stride, first,
        last - first - wholly, full_first, wholly, heads, start_n, total, qk_scale, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
        False,
    )  # fmt: skip
    to = part * dk_part + kv_head * dk_head
    _store_rows(dk_ptr + to, dk * scale, start_n, dk_stride, total, BLOCK_N, HEAD_DIM, BLOCK_D)
    _store_rows(dv_ptr + to, dv, start_n, dk_stride, total, BLOCK_N, HEAD_DIM, BLOCK_D)
