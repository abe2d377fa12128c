"""The head's matrix products, by chunks of rows: logits out, their gradient back into hidden and weight.

On CUDA, 16-bit operands multiply on the tensor cores with float32 accumulation and results (``out_dtype``). torch has
no such product on the CPU. Where the implementation has one of its own (``PRODUCT``), that makes all three. Elsewhere
logits are multiplied in float32, and so are the gradients, but for bfloat16 where the processor has it
(``PRODUCTS_ON_CPU``): there torch rounds the products of a chunk to it before they are added.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ._checks import check_integer, compute_dtype

CHUNK_BYTES = 5 << 30
"""Budget of a chunk's float32 logits: 8,704 rows of a 152,064-token vocabulary. A chunk that holds all rows needs no
float32 weight gradient. With several, it is read and written once per chunk, which shows below 4,096 rows."""
CPU_CHUNK_BYTES = 64 << 20
"""The same on the CPU: 512 rows of a 32,768-token vocabulary, which keeps a step at H = 256 and N = 1,024 under a
quarter of torch eager's peak memory (bench/bench_native.py)."""

ALIGNMENT = 16
"""Elements that a row of the logits' memory is a multiple of, so that the products read whole vectors at any V."""


def full_weight(weight: Tensor) -> Tensor:
    """A sharded DTensor gathered, once per call; a plain tensor as it is.

    Its gradient is the mean over the mesh's ranks, as FSDP averages: right where each rank has rows of its own, and
    where all have the same.
    """
    if not hasattr(weight, "full_tensor"):
        return weight
    from torch.distributed.tensor import Partial

    mesh: Any = weight.device_mesh  # type: ignore[attr-defined]
    if weight.device.type == "cuda":
        gathered: Tensor = weight.full_tensor(grad_placements=[Partial("avg")] * mesh.ndim)
        return gathered
    gathered = weight.full_tensor(grad_placements=[Partial()] * mesh.ndim)  # gloo has no mean
    if gathered.requires_grad:
        gathered.register_hook(lambda grad: grad / mesh.size())
    return gathered


TILE = 4096
"""Columns of a chunk's gradient that both products read while the CPU's caches hold them."""


def operand_dtype(hidden: Tensor, weight: Tensor, implementation: ModuleType) -> torch.dtype:
    """What the gradient's products read: the wider of the two dtypes, on the CPU float32 where that has no product."""
    wider = torch.promote_types(hidden.dtype, weight.dtype)
    narrow = wider in (torch.float16, torch.bfloat16)
    if hidden.device.type == "cpu" and narrow and wider not in implementation.PRODUCTS_ON_CPU:
        return torch.float32
    return wider


def own_product(implementation: ModuleType, *operands: Tensor) -> Callable[..., None] | None:
    """The implementation's ``PRODUCT`` if it takes tensors of these dtypes and strides."""
    taken = all(t.dtype in (torch.float32, torch.bfloat16) and 1 in t.stride() for t in operands)
    return implementation.PRODUCT if taken else None


def _narrow(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float16, torch.bfloat16)


def _tiles(columns: int) -> list[slice]:
    return [slice(start, start + TILE) for start in range(0, columns, TILE)]


def logits_into(out: Tensor, x: Tensor, head: Tensor) -> None:
    """out [C, V] = x [C, H] @ head [V, H].T, accumulated in float32 and rounded where ``out`` is narrower."""
    if x.device.type == "cpu" and not _narrow(out):
        wide = x.to(out.dtype)
        for tile in _tiles(out.shape[1]):
            torch.mm(wide, head[tile].to(out.dtype).t(), out=out[:, tile])
    elif out.dtype == x.dtype:
        torch.mm(x, head.t(), out=out)
    elif x.device.type != "cuda" or not _narrow(x):
        out.copy_(x.float() @ head.float().t())
    elif out.dtype == torch.float32:
        torch.mm(x, head.t(), out_dtype=torch.float32, out=out)
    else:
        out.copy_(torch.mm(x, head.t(), out_dtype=torch.float32))


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, accumulated in float32 (float64 operands: float64), and kept in it but for bfloat16 on the CPU."""
    if not _narrow(a):
        return a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b).float() if a.dtype == torch.bfloat16 else a.float() @ b.float()


def product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b, accumulated in float32 and rounded once to out's dtype."""
    if out.dtype == a.dtype and (a.device.type == "cuda" or a.dtype != torch.float16):
        torch.mm(a, b, out=out)
    elif a.device.type == "cuda" and _narrow(a) and out.dtype == torch.float32:
        torch.mm(a, b, out_dtype=torch.float32, out=out)  # without a second matrix as large as a head's gradient
    else:
        out.copy_(wide_product(a, b))


def accumulate_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (float32 or float64) += a @ b."""
    if not _narrow(a):
        torch.addmm(total, a, b, out=total)
    elif a.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    elif a.dtype == torch.bfloat16:
        total.add_(torch.mm(a, b))
    else:
        torch.addmm(total, a.float(), b.float(), out=total)


def scaled_operand(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows x [C, H] times factor [C, 1], rounded to ``dtype`` as they are written: one pass."""
    return torch.mul(x, factor, out=torch.empty_like(x, dtype=dtype))


def chunk_size(rows: int, vocab: int, chunk_rows: int | None, device: torch.device) -> int:
    """Rows of a chunk: as given, or all chunks of equal size, a multiple of 128, whose float32 logits fill at most
    the device's budget. Raises ValueError below 1."""
    if chunk_rows is not None:
        check_integer("chunk_rows", chunk_rows)
        if chunk_rows < 1:
            raise ValueError(f"chunk_rows must be >= 1, got {chunk_rows}")
        return chunk_rows
    budget = CPU_CHUNK_BYTES if device.type == "cpu" else CHUNK_BYTES
    most = max(128, budget // (4 * vocab) // 128 * 128)
    count = max(1, -(-rows // most))
    return max(128, -(-rows // (128 * count)) * 128)


def row_chunks(rows: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


class Head:
    """One call's operands: gives chunks of logits, and takes their gradients into the products.

    All chunks share one buffer: a chunk's logits are gone when the next one's are made.
    """

    def __init__(
        self, rows: ModuleType, hidden: Tensor, weight: Tensor, keep: Tensor | None, logits_dtype: torch.dtype,
        need_hidden: bool, need_weight: bool, weight_grad: Tensor | None, chunk_rows: int,
    ) -> None:  # fmt: skip
        self.dtype = operand_dtype(hidden, weight, rows)
        self._product = own_product(rows, hidden, weight)
        if weight_grad is not None and weight_grad.stride(1) != 1:
            self._product = None
        wide = compute_dtype(hidden)
        n, vocab = hidden.shape[0], weight.shape[0]
        self.chunks = row_chunks(n, chunk_rows)
        self.logits_dtype = logits_dtype if wide == torch.float32 else wide
        self.hidden, self.keep = hidden, keep
        self.weight = weight if self._product else weight.to(self.dtype)
        self.d_hidden = torch.empty(hidden.shape, dtype=self.dtype, device=hidden.device) if need_hidden else None
        self.d_weight = weight_grad if need_weight else None
        if need_weight and weight_grad is None:
            # One chunk: one product, rounded once. Several: float32 in between.
            dtype = self.dtype if len(self.chunks) <= 1 else wide
            # Not by large pages: fresh ones are dear on virtual machines that hand free memory back to their host.
            self.d_weight = torch.empty(weight.shape, dtype=dtype, device=weight.device)
            if not self.chunks:
                self.d_weight.zero_()
        self.adds = weight_grad is not None
        columns = -(-vocab // ALIGNMENT) * ALIGNMENT
        if hidden.device.type == "cpu" and columns % 1024 == 0:
            columns += ALIGNMENT  # rows a multiple of 4 KiB apart compete for the same places in the caches
        self._buffer = rows.empty_matrix(min(chunk_rows, n), columns, self.logits_dtype, hidden.device)

    def logits(self, rows: slice) -> tuple[Tensor, Tensor]:
        """(the chunk's hidden rows, masked ones zeroed; their logits)."""
        x = self.hidden[rows].to(self.dtype)
        if self.keep is not None:
            x = torch.where(self.keep[rows, None], x, 0.0)
        logits = self._buffer[: x.shape[0], : self.weight.shape[0]]
        if self._product and logits.dtype == torch.float32:
            self._product(logits, x, self.weight.t(), False)
        else:
            logits_into(logits, x, self.weight)
        return x, logits

    def direction(self, gradient: Tensor) -> Tensor:
        """gradient [C, V] @ weight, for hidden [C, H], in float32."""
        if self._product is None:
            return wide_product(gradient, self.weight)
        made = gradient.new_empty(gradient.shape[0], self.weight.shape[1], dtype=torch.float32)
        self._product(made, gradient, self.weight, False)
        return made

    def backward(self, rows: slice, x: Tensor, gradient: Tensor, factor: Tensor | None = None) -> None:
        """Products of a chunk's logit gradient [C, V], or of factor [C, 1] times it."""
        scaled = x if factor is None or self.d_weight is None else scaled_operand(x, factor, x.dtype)
        on_cpu = gradient.device.type == "cpu"
        together = (
            on_cpu and self._product is None and not _narrow(gradient)
            and self.d_hidden is not None and self.d_weight is not None
        )  # fmt: skip
        to_hidden = torch.zeros_like(x) if together else None
        if self.d_weight is not None:
            tiled = on_cpu and (self._product is None or _narrow(self.d_weight))
            for tile in _tiles(gradient.shape[1]) if tiled else [slice(None)]:
                if to_hidden is not None:
                    torch.addmm(to_hidden, gradient[:, tile], self.weight[tile], out=to_hidden)
                self._to_weight(self.d_weight[tile], gradient[:, tile], scaled)
            self.adds = True
        if self.d_hidden is None:
            return
        # A product with a narrow result may be summed in it, over parts of V: cuBLAS chooses.
        exact = on_cpu or not _narrow(gradient)
        if self._product is None and to_hidden is None and factor is None and exact:
            product_into(self.d_hidden[rows], gradient, self.weight)
        else:
            made = self.direction(gradient) if to_hidden is None else to_hidden
            torch.mul(made, 1.0 if factor is None else factor, out=self.d_hidden[rows])

    def _to_weight(self, total: Tensor, gradient: Tensor, x: Tensor) -> None:
        """total [T, H] = or += gradient [C, T].T @ x."""
        if self._product is None:
            (accumulate_product if self.adds else product_into)(total, gradient.t(), x)
        elif _narrow(total):
            made = torch.empty(total.shape, dtype=torch.float32, device=total.device)
            self._product(made, gradient.t(), x, False)
            total.copy_(made)
        else:
            self._product(total, gradient.t(), x, self.adds)
