"""The head's matrix products, by chunks of rows: logits out, their gradient back into hidden and weight.

On CUDA, 16-bit operands multiply on the tensor cores with float32 accumulation (``out_dtype``); on the CPU,
where torch has no such product, they are widened.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from . import torch_rows
from ._checks import compute_dtype

CHUNK_BYTES = 5 << 29
"""Budget of a chunk's float32 logits: 4,352 rows of a 152,064-token vocabulary. Below 4,096 rows the traffic
of the weight gradient, read and written once per chunk, starts to show."""


def full_weight(weight: Tensor) -> Tensor:
    """A sharded DTensor gathered (differentiably), once per call; a plain tensor as it is."""
    gather = getattr(weight, "full_tensor", None)
    return weight if gather is None else gather()


def operand_dtype(hidden: Tensor, weight: Tensor, implementation: ModuleType) -> torch.dtype:
    """What the products read. Plain torch on the CPU widens once; otherwise the wider of the two dtypes."""
    wider = torch.promote_types(hidden.dtype, weight.dtype)
    if hidden.device.type == "cpu" and implementation is torch_rows and wider != torch.float64:
        return torch.float32
    return wider


def _narrow(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float16, torch.bfloat16)


def logits_product(x: Tensor, head: Tensor, logits_dtype: torch.dtype) -> Tensor:
    """x [C, H] @ head [V, H].T, accumulated and kept in float32, or rounded to bfloat16 where asked."""
    if not _narrow(x):
        logits = x @ head.t()
    elif x.device.type == "cuda":
        if logits_dtype == x.dtype:
            return x @ head.t()
        logits = torch.mm(x, head.t(), out_dtype=torch.float32)
    else:
        logits = x.float() @ head.float().t()
    return logits if logits_dtype == torch.float32 else logits.to(logits_dtype)


def product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b, accumulated in float32 and rounded once to out's dtype."""
    if _narrow(a) and a.device.type != "cuda":
        out.copy_(a.float() @ b.float())
    else:
        torch.mm(a, b, out=out)


def accumulate_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (float32 or float64) += a @ b."""
    if not _narrow(a):
        total.addmm_(a, b)
    elif a.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


def row_chunks(rows: int, vocab: int, chunk_rows: int | None) -> list[slice]:
    """Chunks of ``chunk_rows``, or of equal size, a multiple of 128, whose float32 logits fill at most
    CHUNK_BYTES."""
    if chunk_rows is None:
        most = max(128, CHUNK_BYTES // (4 * vocab) // 128 * 128)
        count = -(-rows // most)
        chunk_rows = most if count == 0 else -(-rows // (128 * count)) * 128
    elif chunk_rows < 1:
        raise ValueError(f"chunk_rows must be >= 1, got {chunk_rows}")
    return [slice(start, min(start + chunk_rows, rows)) for start in range(0, rows, chunk_rows)]


class Head:
    """One call's operands: gives chunks of logits, and takes their gradients into the products."""

    def __init__(
        self, rows: ModuleType, hidden: Tensor, weight: Tensor, keep: Tensor | None, logits_dtype: torch.dtype,
        need_hidden: bool, need_weight: bool, weight_grad: Tensor | None,
    ) -> None:  # fmt: skip
        self.dtype = operand_dtype(hidden, weight, rows)
        self.logits_dtype = logits_dtype
        self.hidden, self.keep, self.weight = hidden, keep, weight.to(self.dtype)
        self.d_hidden = torch.empty(hidden.shape, dtype=self.dtype, device=hidden.device) if need_hidden else None
        self.d_weight = None
        if need_weight:
            wide = compute_dtype(self.weight)
            self.d_weight = torch.zeros_like(weight, dtype=wide) if weight_grad is None else weight_grad

    def logits(self, rows: slice) -> tuple[Tensor, Tensor]:
        """(the chunk's hidden rows, masked ones zeroed; their logits)."""
        x = self.hidden[rows].to(self.dtype)
        if self.keep is not None:
            x = torch.where(self.keep[rows, None], x, 0.0)
        return x, logits_product(x, self.weight, self.logits_dtype)

    def backward(self, rows: slice, x: Tensor, gradient: Tensor) -> None:
        """Products of a chunk's logit gradient."""
        if self.d_hidden is not None:
            product_into(self.d_hidden[rows], gradient, self.weight)
        if self.d_weight is not None:
            accumulate_product(self.d_weight, gradient.t(), x)
