"""Forests, inputs and the definition of tree attention, shared by its tests."""

from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import strategies as st

Tensor = torch.Tensor
Node = tuple[int, list["Node"]]


class Inputs(NamedTuple):
    """float64 unless converted: q and dout [1, Hq, T, D], k and v [1, Hkv, T, D]; ends [T] int64."""

    ends: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor


def inputs(ends: list[int], heads: int, kv_heads: int, dim: int) -> Inputs:
    g = torch.Generator().manual_seed(len(ends))
    shapes = [(1, h, len(ends), dim) for h in (heads, kv_heads, kv_heads, heads)]
    return Inputs(torch.tensor(ends), *(torch.randn(s, generator=g, dtype=torch.float64) for s in shapes))


def visible(ends: Tensor) -> Tensor:
    """[T, T] bool: query (row) sees key (column), pair by pair from the rule."""
    reach = ends.tolist()  # once: on a GPU each of a million reads would wait for it
    return torch.tensor([[j <= i < end for j, end in enumerate(reach)] for i in range(len(reach))])


def definition(case: Inputs) -> tuple[Tensor, ...]:
    """(out, dq, dk, dv) by a softmax over the whole row, in the inputs' dtype."""
    q, k, v = (x.clone().requires_grad_() for x in (case.q, case.k, case.v))
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).mT * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~visible(case.ends).to(q.device), float("-inf"))
    out = scores.softmax(-1) @ v.repeat_interleave(group, 1)
    return out, *torch.autograd.grad(out, (q, k, v), case.dout)


def pack(trees: list[Node]) -> list[int]:
    """``subtree_end`` of trees of (own tokens, children), depth first."""
    ends: list[int] = []

    def visit(node: Node) -> None:
        start = len(ends)
        ends.extend([0] * node[0])
        for child in node[1]:
            visit(child)
        ends[start : start + node[0]] = [len(ends)] * node[0]

    for tree in trees:
        visit(tree)
    return ends


def forests() -> st.SearchStrategy[list[int]]:
    """``subtree_end`` of one to three trees of nested nodes of 1 to 40 tokens."""
    size = st.integers(1, 40)
    node = st.recursive(
        st.tuples(size, st.just([])),
        lambda children: st.tuples(size, st.lists(children, min_size=1, max_size=3)),
        max_leaves=5,
    )
    return st.lists(node, min_size=1, max_size=3).map(pack).filter(lambda ends: len(ends) <= 160)


SHAPES = {
    "answers": pack([(37, [(7, []), (13, []), (1, []), (20, [])])]),
    "two trees": pack([(20, [(5, [(9, []), (3, [])]), (11, [(2, [])])]), (1, [(30, [])])]),
    "no sharing": pack([(17, []), (1, []), (40, []), (33, [])]),
    "chain": pack([(97, [])]),
    "lone tokens": pack([(1, [])] * 35),
    "padded": pack([(30, [(9, []), (6, [])]), *[(1, [])] * 6]),
}
"""Odd lengths, most of them no multiple of a block."""
