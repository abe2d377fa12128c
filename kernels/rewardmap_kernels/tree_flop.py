"""FLOP of attention over a packed forest, for ``torch.utils.flop_counter.FlopCounterMode``.

As torch counts its own flash attention, but of the visible pairs: 4 per pair, query head and dimension forward (two
products), 10 backward (five, with the scores once again).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula


def register_attention_flop(name: str, pairs: Callable[..., int]) -> None:
    """Count the operators ``name``_forward and ``name``_backward. ``pairs(*rest)``: the visible ones, from what the
    operators take after q, k and v (with what belongs to them); not asked where that has no values, as in fake tensors:
    there all tokens count as one sequence."""

    def count(each: int, q: Tensor, rest: tuple[Any, ...]) -> int:
        _, heads, tokens, dim = q.shape
        known = not any(isinstance(x, Tensor) and (x.is_meta or isinstance(x, FakeTensor)) for x in (q, *rest))
        return each * heads * dim * (pairs(*rest) if known else tokens * (tokens + 1) // 2)

    operators = torch.ops.rewardmap_kernels

    @register_flop_formula(getattr(operators, f"{name}_forward"), get_raw=True)
    def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any, out_val: Any) -> int:
        return count(4, q, rest)

    @register_flop_formula(getattr(operators, f"{name}_backward"), get_raw=True)
    def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any, out_val: Any) -> int:
        return count(10, q, rest)
