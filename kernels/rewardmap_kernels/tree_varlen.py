"""Tree attention by flash attention over variable lengths: one causal call for every node on itself, and one call per
level of the tree for what lies below that level's nodes, on their keys. A prompt with its answers takes two calls.

The parts are merged by their log-sum-exp. The backward pass hands every call the merged output and log-sum-exp, from
which flash attention recomputes the true probabilities of its pairs. Exact; ring attention does so (arXiv 2310.01889).

Three implementations of one call: the ``flash-attn`` package, torch's own flash attention, and plain torch, which
defines them. One operator each way, so that ``torch.compile`` takes them whole.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .tree_flop import register_attention_flop


class Calls(NamedTuple):
    """The calls of one packed row. Its integers are tensors, so that compiled code does not depend on them."""

    sizes: Tensor
    """[calls, 5] int64, on the CPU: segments, queries and keys in all, longest queries and longest keys. The first
    call is that of all tokens on themselves."""
    lengths: Tensor
    """int32: per call the cumulative lengths of its segments' queries, [segments + 1], and keys, [segments + 1]."""
    rows: Tensor
    """int64: per call but the first the rows of its queries and of its keys."""


def build_calls(subtree_end: Tensor) -> Calls:
    """``subtree_end`` [T] int64, valid, on the CPU. Neighbours of equal ends are one node: whoever sees the second
    sees the first."""
    total = len(subtree_end)
    starts = [0, *((subtree_end[1:] != subtree_end[:-1]).nonzero().squeeze(1) + 1).tolist()]
    levels: list[list[tuple[int, int, int]]] = []
    above: list[int] = []  # ends of the nodes this one lies below
    for start, end in zip(starts, [*starts[1:], total], strict=True):
        while above and above[-1] <= start:
            above.pop()
        below = int(subtree_end[start])
        if below > end:
            levels += [[]] if len(levels) == len(above) else []
            levels[len(above)].append((start, end, below))
        above.append(below)
    bounds = torch.tensor([*starts, total])
    longest = int(bounds.diff().max())
    sizes, lengths, rows = [[len(starts), total, total, longest, longest]], [bounds, bounds], [bounds[:0]]
    for level in levels:
        first, last, reach = torch.tensor(level).unbind(1)
        queries, keys = reach - last, last - first
        sizes.append([len(level), *(int(x) for x in (queries.sum(), keys.sum(), queries.max(), keys.max()))])
        lengths += [torch.nn.functional.pad(x.cumsum(0), (1, 0)) for x in (queries, keys)]
        rows += [torch.arange(end, below) for _, end, below in level] + [torch.arange(*node[:2]) for node in level]
    return Calls(torch.tensor(sizes), torch.cat(lengths).int(), torch.cat(rows))


def build_segments(bounds: Tensor, total: int, longest: int) -> Calls:
    """One call of segments that see themselves alone: ``bounds`` [segments + 1] int, where each begins and the last
    ends; on any device, and nothing waits for it."""
    size = torch.tensor([[len(bounds) - 1, total, total, longest, longest]])
    return Calls(size, torch.cat([bounds, bounds]).int(), bounds.new_empty(0, dtype=torch.int64))


def to_device(calls: Calls, device: torch.device) -> Calls:
    """The same calls for tensors on ``device``; sizes stay on the CPU."""
    if device.type == "cpu":
        return calls
    lengths, rows = (x.pin_memory().to(device, non_blocking=True) for x in (calls.lengths, calls.rows))
    return Calls(calls.sizes, lengths, rows)


class _Call(NamedTuple):
    cu_q: Tensor
    cu_k: Tensor
    longest_q: int
    longest_k: int
    queries: Tensor | None
    """Rows of the queries; None: all."""
    keys: Tensor | None


def _each(sizes: Tensor, lengths: Tensor, rows: Tensor) -> Iterator[_Call]:
    at = place = 0
    for number, (segments, queries, keys, longest_q, longest_k) in enumerate(sizes.tolist()):
        cu_q, cu_k = lengths[at : at + 2 * segments + 2].chunk(2)
        at += 2 * segments + 2
        named = rows[place : place + queries], rows[place + queries : place + queries + keys]
        place += (queries + keys) * (number > 0)
        yield _Call(cu_q, cu_k, longest_q, longest_k, *(named if number else (None, None)))


def _rows(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x.index_select(0, index)


# One call: q [Tq, Hq, D], k and v [Tk, Hkv, D] and its lengths -> out [Tq, Hq, D], lse [Hq, Tq] base e, float32 at
# least; and its backward from the output and log-sum-exp of all pairs, its own and others'.


def _plain_forward(q: Tensor, k: Tensor, v: Tensor, call: _Call, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=_wide(q.dtype))
    for a, b in _segments(call):
        scores = _scores(q[a], k[b], causal, scale)
        lse[:, a] = scores.logsumexp(-1)
        values = v[b].to(scores.dtype).repeat_interleave(q.shape[1] // k.shape[1], 1)
        out[a] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).to(q.dtype)
    return out, lse


def _plain_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: _Call, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    group = q.shape[1] // k.shape[1]
    for a, b in _segments(call):
        scores = _scores(q[a], k[b], causal, scale)
        p = (scores - lse[:, a, None]).exp()
        wide = scores.dtype
        grad, keys, values = dout[a].to(wide), *(x[b].to(wide).repeat_interleave(group, 1) for x in (k, v))
        delta = (grad * out[a].to(wide)).sum(-1).T
        ds = p * (torch.einsum("qhd,khd->hqk", grad, values) - delta[..., None]) * scale
        dq[a] = torch.einsum("hqk,khd->qhd", ds, keys).to(q.dtype)
        for total, left, right in ((dk, ds, q[a].to(wide)), (dv, p, grad)):
            total[b] = torch.einsum("hqk,qhd->khd", left, right).unflatten(1, (-1, group)).sum(2).to(k.dtype)
    return dq, dk, dv


def _segments(call: _Call) -> Iterator[tuple[slice, slice]]:
    queries, keys = (pairwise(cumulative.tolist()) for cumulative in (call.cu_q, call.cu_k))
    return ((slice(*a), slice(*b)) for a, b in zip(queries, keys, strict=True))


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    wide = _wide(q.dtype)
    keys = k.to(wide).repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.einsum("qhd,khd->hqk", q.to(wide), keys) * scale
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(hidden, float("-inf")) if causal else scores


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _torch_forward(q: Tensor, k: Tensor, v: Tensor, call: _Call, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, call.cu_q, call.cu_k, call.longest_q, call.longest_k, 0.0, causal, False, scale=scale
    )
    return out, lse


def _torch_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: _Call, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    unused = torch.empty(2, dtype=torch.uint64, device=q.device)  # the random state of a dropout there is not
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # The only way to ask for a fixed order of its sums; torch's public switch would change the compiler's settings too.
    torch._C._set_deterministic_algorithms(True, warn_only=False)
    try:
        grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
            dout, q, k, v, out, lse, call.cu_q, call.cu_k, call.longest_q, call.longest_k, 0.0, causal,
            unused, unused, scale=scale,
        )  # fmt: skip
    finally:
        torch._C._set_deterministic_algorithms(before[0], warn_only=before[1])
    return grads


def _package_forward(q: Tensor, k: Tensor, v: Tensor, call: _Call, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    interface: Any = importlib.import_module("flash_attn.flash_attn_interface")
    out, lse, *_ = interface._flash_attn_varlen_forward(
        q, k, v, call.cu_q, call.cu_k, call.longest_q, call.longest_k, 0.0, scale, causal
    )
    return out, lse


def _package_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: _Call, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    interface: Any = importlib.import_module("flash_attn.flash_attn_interface")
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    interface._flash_attn_varlen_backward(
        dout, q, k, v, out, lse, *grads, call.cu_q, call.cu_k, call.longest_q, call.longest_k, 0.0, scale, causal,
        -1, -1, 0.0, None, True,
    )  # fmt: skip
    return grads


_Forward = Callable[..., tuple[Tensor, Tensor]]
_Backward = Callable[..., tuple[Tensor, Tensor, Tensor]]
ROUTES: dict[str, tuple[_Forward, _Backward]] = {
    "flash-attn": (_package_forward, _package_backward),
    "torch-flash": (_torch_forward, _torch_backward),
    "plain": (_plain_forward, _plain_backward),
}
"""By name: the forward and backward of one call. ``plain`` is the definition, for any device and dtype."""


@cache
def _why_not_here(route: str) -> str | None:
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if route == "flash-attn":
        try:
            importlib.import_module("flash_attn.flash_attn_interface")
        except (ImportError, OSError) as error:  # absent, or built for another torch
            return f"the flash-attn package does not load ({error})"
    return None


def why_not(route: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a route cannot take such tensors on this machine's GPU; None where it can."""
    if route not in ROUTES:
        return f"there is no route {route!r}; there are {', '.join(ROUTES)}"
    if route == "plain":
        return None
    if dtype.itemsize != 2:
        return f"{dtype} has no flash attention"
    if head_dim % 8 or head_dim > 256:
        return f"flash attention takes head dimensions that are multiples of 8 up to 256, not {head_dim}"
    return _why_not_here(route)


@torch.library.custom_op("rewardmap_kernels::tree_varlen_forward", mutates_args=())
def tree_varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, sizes: Tensor, lengths: Tensor, rows: Tensor, causal: bool, scale: float,
    route: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q [1, Hq, T, D], k and v [1, Hkv, T, D] and ``Calls`` -> (out [1, Hq, T, D], lse [Hq, T], base e).

    ``causal``: whether the first call is; the others never are."""
    forward = ROUTES[route][0]
    q, k, v = map(_tokens_first, (q, k, v))
    first, *others = _each(sizes, lengths, rows)
    out, lse = forward(q, k, v, first, causal, scale)
    if not others:
        return _heads_first(out), lse
    total = out.to(_wide(out.dtype))
    for call in others:
        assert call.queries is not None
        part, part_lse = forward(*_inputs(q, k, v, call), call, False, scale)
        old = lse.index_select(1, call.queries)
        new = torch.logaddexp(old, part_lse)
        kept, added = ((x - new).exp().T[..., None] for x in (old, part_lse))
        merged = kept * total.index_select(0, call.queries) + added * part
        total.index_copy_(0, call.queries, merged)
        lse.index_copy_(1, call.queries, new)
    return _heads_first(total.to(q.dtype)), lse


@torch.library.custom_op("rewardmap_kernels::tree_varlen_backward", mutates_args=())
def tree_varlen_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sizes: Tensor, lengths: Tensor,
    rows: Tensor, causal: bool, scale: float, route: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v; those of several calls are summed in float32 (float64 for float64), in their order."""
    backward = ROUTES[route][1]
    dout, q, k, v, out = map(_tokens_first, (dout, q, k, v, out))
    first, *others = _each(sizes, lengths, rows)
    grads = backward(dout, q, k, v, out, lse.contiguous(), first, causal, scale)
    if others:
        sums = [grad.to(_wide(grad.dtype)) for grad in grads]
        for call in others:
            assert call.queries is not None and call.keys is not None
            parts = backward(
                dout.index_select(0, call.queries), *_inputs(q, k, v, call), out.index_select(0, call.queries),
                lse.index_select(1, call.queries), call, False, scale,
            )  # fmt: skip
            # A call names each row once: no two additions meet.
            for total, part, named in zip(sums, parts, (call.queries, call.keys, call.keys), strict=True):
                total.index_add_(0, named, part.to(total.dtype))
        grads = tuple(total.to(q.dtype) for total in sums)  # type: ignore[assignment]
    dq, dk, dv = map(_heads_first, grads)
    return dq, dk, dv


def _inputs(q: Tensor, k: Tensor, v: Tensor, call: _Call) -> tuple[Tensor, Tensor, Tensor]:
    return _rows(q, call.queries), _rows(k, call.keys), _rows(v, call.keys)


def _tokens_first(x: Tensor) -> Tensor:
    """[1, H, T, D] -> [T, H, D], its last dimension dense."""
    x = x[0].transpose(0, 1)
    return x if x.stride(-1) == 1 else x.contiguous()


def _heads_first(x: Tensor) -> Tensor:
    """[T, H, D] -> [1, H, T, D] whose memory stays [T, H, D]: the model's next reshape costs no copy."""
    return x.contiguous().transpose(0, 1)[None]


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[2], x.shape[1], x.shape[3]).transpose(0, 1)[None]


@tree_varlen_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, sizes: Tensor, lengths: Tensor, rows: Tensor, causal: bool, scale: float,
    route: str,
) -> Any:  # fmt: skip
    return _like(q), q.new_empty(q.shape[1], q.shape[2], dtype=_wide(q.dtype))


@tree_varlen_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sizes: Tensor, lengths: Tensor,
    rows: Tensor, causal: bool, scale: float, route: str,
) -> Any:  # fmt: skip
    return _like(q), _like(k), _like(v)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.causal, ctx.scale, ctx.route = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])


def _backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dv = tree_varlen_backward(dout, *ctx.saved_tensors, ctx.causal, ctx.scale, ctx.route)
    return dq, dk, dv, None, None, None, None, None, None


tree_varlen_forward.register_autograd(_backward, setup_context=_setup)


def _pairs(sizes: Tensor, lengths: Tensor, rows: Tensor, causal: bool, *rest: Any) -> int:
    """Waits for a GPU, as torch's own count of variable lengths does."""
    first, *others = ((call.cu_q.diff().long(), call.cu_k.diff()) for call in _each(sizes, lengths, rows))
    own = first[0] * (first[0] + 1) // 2 if causal else first[0] * first[1]
    return int(own.sum() + sum((q * k).sum() for q, k in others))


register_attention_flop("tree_varlen", _pairs)
