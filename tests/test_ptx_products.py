"""Products of matrices in ``ptx_machine.py``, against plain ones of random matrices: fragments, and the layouts of
shared memory that descriptors name."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parent))
from ptx_blocks import Launch
from ptx_machine import run
from ptx_memory import Memory, PtxError
from ptx_text import parse


def launch(body: str, threads: int, *tensors: Tensor, dynamic_shared: int = 0) -> None:
    """Runs a kernel of these pointers, %rd0 and on, with thread %r0 and shared memory ``memory``."""
    names = ", ".join(f".param .u64 p{i}" for i in range(len(tensors)))
    read = "".join(f"ld.param.u64 %rd{i}, [p{i}];\n" for i in range(len(tensors)))
    text = f""".target sm_90a
    .extern .shared .align 1024 .b8 memory[];
    .visible .entry kernel({names}) {{
    .reg .pred %p<9>; .reg .b32 %r<200>; .reg .b64 %rd<40>;
    mov.u32 %r0, %tid.x;
    mov.b32 %r1, memory;
    {read} {body}
    ret;
    }}"""
    raw = struct.pack(f"{len(tensors)}Q", *(t.data_ptr() for t in tensors))
    run(Launch(parse(text), (1, 1, 1), threads, raw, Memory(tensors), dynamic_shared=dynamic_shared, seed=1))


def copy_in(tensor: int, bytes_each: int, to: int = 0) -> str:
    """PTX: every thread copies its part of a tensor to shared memory."""
    lines = [f"mad.wide.u32 %rd39, %r0, {bytes_each}, %rd{tensor};", f"mad.lo.u32 %r199, %r0, {bytes_each}, %r1;"]
    for at in range(0, bytes_each, 4):
        lines += [f"ld.global.b32 %r198, [%rd39+{at}];", f"st.shared.b32 [%r199+{to + at}], %r198;"]
    return "\n".join(lines)


def random_matrix(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "f16")])
def test_a_product_of_fragments_that_were_loaded(dtype: torch.dtype, name: str, transposed: bool) -> None:
    """``transposed``: the right side lies in shared memory by rows of B, not by columns."""
    a, b = random_matrix(16, 16, dtype), random_matrix(8, 16, dtype)  # b: columns of B
    c, out = torch.randn(16, 8), torch.empty(16, 8)
    right = b.t().contiguous() if transposed else b
    # Address of what a lane gives: rows of A as four matrices, down first; of B as two.
    row_b = "and.b32 %r5, %r0, 15; shl.b32 %r5, %r5, 4;" if transposed else (
        "and.b32 %r5, %r0, 7; shl.b32 %r5, %r5, 5; and.b32 %r6, %r0, 8; shl.b32 %r6, %r6, 1; add.u32 %r5, %r5, %r6;"
    )  # fmt: skip
    launch(
        f"""{copy_in(0, 16)} {copy_in(1, 8, 512)}
        bar.sync 0;
        and.b32 %r2, %r0, 15; shl.b32 %r2, %r2, 5; shr.u32 %r3, %r0, 4; shl.b32 %r3, %r3, 4; add.u32 %r2, %r2, %r3;
        add.u32 %r2, %r2, %r1;
        {row_b} add.u32 %r5, %r5, %r1;
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r10, %r11, %r12, %r13}}, [%r2];
        ldmatrix.sync.aligned.m8n8.x2{".trans" * transposed}.shared.b16 {{%r14, %r15}}, [%r5+512];
        shr.u32 %r6, %r0, 2; shl.b32 %r6, %r6, 5; and.b32 %r7, %r0, 3; shl.b32 %r7, %r7, 3; add.u32 %r6, %r6, %r7;
        cvt.u64.u32 %rd10, %r6; add.s64 %rd11, %rd2, %rd10; add.s64 %rd12, %rd3, %rd10;
        ld.global.v2.b32 {{%r20, %r21}}, [%rd11]; ld.global.v2.b32 {{%r22, %r23}}, [%rd11+256];
        mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32 {{%r24, %r25, %r26, %r27}}, {{%r10, %r11, %r12, %r13}},
            {{%r14, %r15}}, {{%r20, %r21, %r22, %r23}};
        st.global.v2.b32 [%rd12], {{%r24, %r25}}; st.global.v2.b32 [%rd12+256], {{%r26, %r27}};""",
        32, a, right, c, out, dynamic_shared=768,
    )  # fmt: skip
    exact = c.double() + a.double() @ b.double().t()
    assert torch.equal(out, exact.float())


def laid_out(matrix: Tensor, width: int) -> Tensor:
    """Rows cut into pieces of ``width`` bytes, all rows of the first piece first, and swizzled as TMA does: piece c of
    16 bytes at c xor the number of the 128 bytes it lies in, as far as there are bits for that."""
    per = width // matrix.itemsize
    pieces = [matrix[:, i : i + per] for i in range(0, matrix.shape[1], per)]
    flat = torch.cat([p.contiguous().view(torch.uint8).reshape(-1, 16) for p in pieces])
    at = torch.arange(len(flat))
    return flat[at ^ (at // 8 % 8 & (width // 16 - 1))].contiguous()


def descriptor(leading: int, stride: int, width: int) -> int:
    return leading >> 4 << 16 | stride >> 4 << 32 | {128: 1, 64: 2, 32: 3, 16: 0}[width] << 62


COLUMNS = 64


@pytest.mark.parametrize("width", [128, 64, 32, 16])
@pytest.mark.parametrize("across", ["", "a", "b", "ab"])
def test_layouts_of_shared_memory(width: int, across: str) -> None:
    """A is 64 by 16, B is 16 by 64. ``across``: which of them lie with their long sides as rows."""
    a, b, out = random_matrix(64, 16, torch.bfloat16), random_matrix(COLUMNS, 16, torch.bfloat16), torch.empty(128, 32)
    # A row of 16 elements is 32 bytes; of wider rows it is the second part, to see where descriptors may begin.
    words, images = [], []
    for name, x in (("a", a), ("b", b)):
        rows = len(x)
        if name in across:
            image = laid_out(x.t().contiguous(), width)
            next_piece, next_rows = 16 * width, 8 * width
            word = descriptor(next_piece, next_rows, width) if width > 16 else descriptor(next_rows, next_piece, width)
        else:
            wide = torch.cat([torch.full_like(x, float("nan")), x, x.new_full((rows, 32), float("nan"))], 1)
            image = laid_out(wide, width)
            begin = 32 * rows if width < 64 else 32
            word = descriptor(rows * width, 8 * width, width) + (begin >> 4)
        images.append(image)
        words.append(word)
    second = images[0].numel()
    registers = ", ".join(f"%r{10 + i}" for i in range(COLUMNS // 2))
    stores = "".join(f"st.global.b32 [%rd10+{4 * i}], %r{10 + i};" for i in range(COLUMNS // 2))
    launch(
        f"""{copy_in(0, images[0].numel() // 128)} {copy_in(1, images[1].numel() // 128, second)}
        fence.proxy.async.shared::cta;
        bar.sync 0;
        mov.b64 %rd20, {words[0]}; mov.b64 %rd21, {words[1] + (second >> 4)};
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n{COLUMNS}k16.f32.bf16.bf16 {{{registers}}}, %rd20, %rd21, 0, 1, -1,
            {int("a" in across)}, {int("b" in across)};
        wgmma.mma_async.sync.aligned.m64n{COLUMNS}k16.f32.bf16.bf16 {{{registers}}}, %rd20, %rd21, 1, 1, 1,
            {int("a" in across)}, {int("b" in across)};
        wgmma.mma_async.sync.aligned.m64n{COLUMNS}k16.f32.bf16.bf16 {{{registers}}}, %rd20, %rd21, 1, 1, 1,
            {int("a" in across)}, {int("b" in across)};
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;
        mad.wide.u32 %rd10, %r0, {2 * COLUMNS}, %rd2;
        {stores}""",
        128, *images, out, dynamic_shared=second + images[1].numel(),
    )  # fmt: skip
    thread, register = torch.arange(128)[:, None], torch.arange(COLUMNS // 2)
    row = thread // 32 * 16 + thread % 32 // 4 + register // 2 % 2 * 8
    column = register // 4 * 8 + thread % 4 * 2 + register % 2
    exact = (a.double() @ b.double().t()).float()  # minus it, plus it twice
    torch.testing.assert_close(out, exact[row, column], rtol=0, atol=1e-5)


def test_accumulators_are_nobody_s_until_waited_for() -> None:
    registers = ", ".join(f"%r{10 + i}" for i in range(4))
    begin = f"""mov.b32 %r10, 0; mov.b32 %r11, 0; mov.b32 %r12, 0; mov.b32 %r13, 0; {copy_in(0, 64)}
        fence.proxy.async.shared::cta; bar.sync 0; mov.b64 %rd20, {descriptor(128, 256, 16)};
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{{registers}}}, %rd20, %rd20, 1, 1, 1, 0, 0;
        wgmma.commit_group.sync.aligned;"""
    image = torch.zeros(128 * 64, dtype=torch.uint8)
    launch(begin + "wgmma.wait_group.sync.aligned 0; add.f32 %r20, %r10, %r10;", 128, image, dynamic_shared=8192)
    for then, error in (
        ("add.f32 %r20, %r10, %r10;", "%r10 belongs to a product"),
        ("wgmma.wait_group.sync.aligned 1; mov.b32 %r13, 0;", "%r13 belongs to a product"),
        ("st.shared.b32 [%r1], 1;", "a copy of these bytes is still under way"),
        (f"wgmma.fence.sync.aligned; wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{{registers}}}, "
         f"{{{registers}}}, %rd20, 1, 1, 1, 0;", "belongs to a product"),
    ):  # fmt: skip
        with pytest.raises(PtxError, match=error):
            launch(begin + then, 128, image, dynamic_shared=8192)
