"""The C++ operators against the float64 definition, for one instruction set and one build of the library.

``python tests/native_operators.py LIBRARY``: run by test_native.py in processes of their own, with
``ATEN_CPU_CAPABILITY`` and ``ONEDNN_MAX_CPU_ISA`` set, and with a library built with sanitizers. Prints the instruction
set and what was checked.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewardmap_kernels import PolicyObjective, native, reference, use_implementation
from rewardmap_kernels.dispatch import choose

sys.path.append(str(Path(__file__).parent))
import kernels_cases as cases

INFINITY = float("inf")
OPERATION = "logits_policy_loss"
VOCABULARIES = (1, 7, 16, 67, 2047, 6151)
"""Below, at and beyond a vector, odd, a block of the row less one, and three blocks with a tail."""


def logits_of(n: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[n, vocab] rows inside a wider matrix of NaN, some extreme, and targets that are possible."""
    g = torch.Generator().manual_seed(vocab)
    memory = torch.full((n, vocab + 5), float("nan"), dtype=dtype)
    logits = memory[:, 2 : vocab + 2]
    logits.copy_(torch.randn(n, vocab, generator=g) * 3)
    targets = torch.randint(0, vocab, (n,), generator=g)
    logits[1] += 90
    logits[2] -= 3e4
    logits[3, : vocab // 2] = -INFINITY  # whole blocks without a finite value
    logits[4] *= 1e-3
    targets[3] = vocab - 1
    if vocab > 1:
        logits[5, 0], targets[5] = 60.0, 0  # nearly certain: 1 - p cancels
        logits[6, -1], targets[6] = 60.0, 0  # and the other was taken
    return logits, targets


def row_inputs(n: int, logprobs: Tensor) -> dict[str, Any]:
    rows = cases.row_inputs(n, dtype=torch.float32)
    for name in ("old_logprobs", "ref_logprobs", "rollout_logprobs"):
        rows[name] = (logprobs + 0.3 * (rows[name] + 1.5)).float()
    return rows


def check(name: str, got: Tensor, wanted: Tensor, relative: float, absolute: float | Tensor) -> None:
    wanted = wanted.detach()
    gap = (got.double() - wanted).abs()
    beyond = gap - relative * wanted.abs() - absolute
    worst = float(beyond.max()) if beyond.numel() else 0.0
    assert not worst > 0 and not got.isnan().any(), f"{name}: {float(gap.max())}, {worst} too much"


def check_rows(objective: PolicyObjective, vocab: int, dtype: torch.dtype, per_row: bool) -> None:
    """logits_policy_loss by the operators, in place and not, against autograd of the definition in float64."""
    from rewardmap_kernels import native_rows

    n = 12
    logits, targets = logits_of(n, vocab, dtype)
    temperature = torch.linspace(0.5, 2.0, n) if per_row else 0.7
    exact = logits.double().requires_grad_()
    t = temperature.double() if isinstance(temperature, Tensor) else temperature
    logprobs, entropy = reference.selective_log_softmax(exact, targets, t)
    rows = row_inputs(n, logprobs.detach())
    keep = rows.pop("loss_mask")
    wide = {k: v.double() if v.is_floating_point() else v for k, v in rows.items()}
    loss = reference.policy_row_loss(logprobs, entropy=entropy, objective=objective, loss_mask=keep, **wide).sum()
    (wanted,) = torch.autograd.grad(loss, exact)
    poisoned = logits.masked_fill(~keep[:, None], float("nan"))
    # Rounding of the objective's inputs to float32 moves a coefficient by about 1e-6 of itself, bfloat16 by 2^-9.
    half_ulp = 2.0**-8 if dtype == torch.bfloat16 else 2e-5
    inputs = {**rows, "objective": objective}
    for in_place in (False, True):
        given = poisoned.clone()
        done = native_rows.fused(OPERATION, given, targets, temperature, keep, inputs, None, in_place)
        check("logprobs", done.logprobs, torch.where(keep, logprobs, 0.0), 2e-6, 2e-6)
        check("entropy", done.entropy, torch.where(keep, entropy, 0.0), 2e-6, 4e-6)
        check("gradient", done.gradient, wanted, half_ulp, 2e-7)
        assert (done.gradient[~keep] == 0).all() and (done.logprobs[~keep] == 0).all()
        assert (done.gradient.data_ptr() == given.data_ptr()) == in_place


def check_split(vocab: int, dtype: torch.dtype) -> None:
    """Statistics, then the gradient of given coefficients: what sequence-level objectives use."""
    from rewardmap_kernels import native_rows

    n = 12
    logits, targets = logits_of(n, vocab, dtype)
    g = torch.Generator().manual_seed(1)
    c, e = torch.randn(2, n, generator=g)
    c[7] = e[7] = 0.0
    exact = logits.double().requires_grad_()
    logprobs, entropy = reference.selective_log_softmax(exact, targets, 1.3)
    (wanted,) = torch.autograd.grad((c.double() * logprobs + e.double() * entropy).sum(), exact)
    found = native_rows.statistics(OPERATION, logits, targets, 1.3, None)
    check("logprobs", found.logprobs, logprobs.detach(), 2e-6, 2e-6)
    check("entropy", found.entropy, entropy.detach(), 2e-6, 4e-6)
    check("lse", found.lse, torch.logsumexp(exact.detach() / 1.3, 1), 1e-6, 1e-6)
    # log p = z / T - lse keeps of a large lse what float32 holds: four roundings of 2^-24 each.
    log_p = torch.log_softmax(exact.detach() / 1.3, 1).clamp(min=-1e4)
    slope = c.double()[:, None].abs() + e.double()[:, None].abs() * (log_p.abs() + entropy.detach()[:, None] + 1)
    lost = torch.logsumexp(exact.detach() / 1.3, 1).abs()[:, None] * 2.0**-22 * slope * log_p.exp() / 1.3
    half_ulp = 2.0**-8 if dtype == torch.bfloat16 else 2e-5
    for in_place in (False, True):
        given = logits.clone()
        got = native_rows.gradient(OPERATION, given, targets, 1.3, found, c, e, None, dtype, in_place)
        check("gradient", got, wanted, half_ulp, lost + 1e-6)
        assert (got[7] == 0).all()


def check_exponentials(vocab: int, dtype: torch.dtype) -> None:
    """E / total = p - onehot; the sum without the target where another rank has it; over the logits and beside them."""
    from rewardmap_kernels import native_rows

    n = 12
    logits, targets = logits_of(n, vocab, dtype)
    keep = torch.arange(n) != 7
    temperature = torch.linspace(0.5, 1.5, n)
    exact = logits.double() / temperature.double()[:, None]
    logprobs, entropy = reference.selective_log_softmax(exact, targets, 1.0)
    p = torch.softmax(exact, 1)
    wanted = p - torch.nn.functional.one_hot(targets, vocab)
    for made, beside in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        out = torch.full((n, vocab + 3), float("nan"), dtype=made)[:, :vocab] if beside else None
        given = logits.masked_fill(~keep[:, None], float("nan"))
        got = native_rows.exponentials(OPERATION, given, targets, temperature, keep, made, out)
        assert got.values.dtype == made
        half_ulp = 2.0**-8 if made == torch.bfloat16 else 2e-5
        assert out is None or got.values is out
        check("logprobs", got.rows.logprobs, torch.where(keep, logprobs, 0.0), 2e-6, 2e-6)
        check("entropy", got.rows.entropy, torch.where(keep, entropy, 0.0), 2e-6, 4e-6)
        check("lse", got.rows.lse, torch.where(keep, torch.logsumexp(exact, 1), 0.0), 1e-6, 1e-6)
        direction = got.values.double() / got.total.double()[:, None]
        check("p - onehot", direction, wanted * keep[:, None], half_ulp, 2e-7)
        assert (got.values[7] == 0).all() and got.total[7] == 1
        at_target = direction[5, targets[5]]  # 1 - p keeps its relative accuracy where p is near 1
        check("1 - p", at_target[None], -(wanted[5].sum() - wanted[5, targets[5]])[None], half_ulp + 1e-4, 1e-45)
    elsewhere = native_rows.exponentials(
        OPERATION, logits.clone(), torch.full_like(targets, -1), temperature, None, torch.float32, None
    )
    check("p", elsewhere.values.double() / elsewhere.total.double()[:, None], p, 2e-5, 2e-7)


def check_not_a_number() -> None:
    """A bad logit makes its row bad and no other."""
    from rewardmap_kernels import native_rows

    for vocab, column in itertools.product((5, 40, 5000), (0, -1)):
        logits, targets = torch.randn(3, vocab), torch.zeros(3, dtype=torch.long)
        logits[1, column] = float("nan")
        found = native_rows.statistics(OPERATION, logits, targets, 1.0, None)
        assert found.logprobs.isnan().tolist() == [False, True, False], (vocab, column, found)
        found = native_rows.statistics(OPERATION, torch.full((1, vocab), -INFINITY), targets[:1], 1.0, None)
        assert found.logprobs.isnan().all()


def check_advantage() -> None:
    """Every scale and baseline, groups of none, one, equal, few and many."""
    sizes = [1, 0, 4, 3, 8, 130, 5]
    offsets = torch.tensor([0, *itertools.accumulate(sizes)])
    g = torch.Generator().manual_seed(2)
    rewards, weights = torch.rand(2, int(offsets[-1]), generator=g)
    rewards[5:8] = 0.1
    for scale, baseline, ddof, inside in itertools.product(
        ("group", "batch", "none", "max_min", "mad"), ("mean", "leave_one_out", "batch_mean", "none"), (0, 1), (0, 1)
    ):
        if inside and scale not in ("group", "batch"):
            continue
        options = {"scale": scale, "ddof": ddof, "eps": 1e-4, "eps_inside": bool(inside), "baseline": baseline}
        wanted = reference.group_advantage(rewards.double(), offsets.tolist(), weights=weights.double(), **options)
        got = torch.ops.rewardmap.group_advantage(
            rewards, offsets, scale, ddof, 1e-4, bool(inside), baseline, weights
        )
        for name, a, b in zip(("advantages", "mean", "std"), got, wanted, strict=False):
            check(f"{name} {options}", a, b, 2e-7, 2e-7)
        assert torch.equal(got[3], wanted[3])


def check_product() -> None:
    """Both layouts and dtypes of either side, edges of panels, blocks and tiles, inside memory of NaN; cut for many
    threads as for one."""
    product, g = torch.ops.rewardmap.product_, torch.Generator().manual_seed(4)

    def operand(lines: int, depth: int, along: bool, dtype: torch.dtype) -> Tensor:
        shape = (lines, depth) if along else (depth, lines)
        memory = torch.full((shape[0], shape[1] + 3), float("nan"), dtype=dtype)
        memory[:, : shape[1]] = torch.randn(shape, generator=g)
        inside = memory[:, : shape[1]]
        return inside if along else inside.t()

    shapes = (
        (1, 1, 1), (5, 15, 2), (6, 16, 7), (7, 33, 9), (13, 47, 258), (200, 70, 31), (590, 19, 5), (3, 530, 515),
        (70, 45, 1100), (28, 40, 75),
    )  # fmt: skip
    dtypes = (torch.float32, torch.bfloat16)
    for shape, left, right, *dtype in itertools.product(shapes, (True, False), (True, False), dtypes, dtypes):
        (m, n, k), add = shape, left == right
        a, b = operand(m, k, left, dtype[0]), operand(n, k, right, dtype[1]).t()
        made = []
        for threads in (2, 3):
            torch.set_num_threads(threads)
            memory = torch.full((m, n + 5), 7.0)
            product(memory[:, :n], a, b, add)
            assert (memory[:, n:] == 7).all()
            made.append(memory[:, :n])
        assert torch.equal(*made)
        check(f"product {shape} {left} {right} {dtype}", made[0], a.double() @ b.double() + 7 * add, 1e-6, k * 2.0**-22)
    torch.set_num_threads(2)


def check_decoding() -> None:
    """Widths of one vector and of several, heads that share keys, norms, padded prompts in memory of NaN, answers of
    any length; as many threads as wanted."""
    ops, g = torch.ops.rewardmap, torch.Generator().manual_seed(6)

    def normed(x: Tensor, weight: Tensor | None) -> Tensor:
        return x if weight is None else x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight

    for width, heads, shared, prompt, length, with_norm in (
        (16, 1, 1, 1, 0, False), (32, 4, 1, 38, 5, False), (48, 2, 3, 7, 17, True), (128, 2, 4, 70, 33, True)
    ):  # fmt: skip
        groups, answers, room = 3, 8, length + 3
        group = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
        query, key, value = (
            torch.randn(answers, n * width, generator=g) for n in (heads * shared, heads, heads)
        )
        angle = torch.randn(answers, width // 2, generator=g).repeat(1, 2)
        tables = torch.full((2, answers, 2, width), float("nan"))  # of two positions: rows are apart
        tables[0, :, 1], tables[1, :, 1] = angle.cos(), angle.sin()
        tables[1, :, 1, : width // 2] *= -1
        cos, sin = tables[0, :, 1], tables[1, :, 1]
        begin = torch.tensor([0, prompt // 2, prompt - 1])
        prompts = torch.randn(2, groups, heads, prompt, width, generator=g)
        for i, first in enumerate(begin.tolist()):
            prompts[:, i, :, :first] = float("nan")
        own = torch.full((2, answers, heads, room, width), float("nan"))
        own[:, :, :, :length] = torch.randn(2, answers, heads, length, width, generator=g)
        norms = [torch.rand(width, generator=g) + 0.5 if with_norm else None for _ in range(2)]
        exact = []
        for s in range(answers):
            c, sn = cos[s].double(), sin[s].double()
            q = normed(query[s].view(heads, shared, width).double(), norms[0])
            k = normed(key[s].view(heads, width).double(), norms[1])
            q, k = (x * c + x.roll(width // 2, -1) * sn for x in (q, k))
            i = int(group[s])
            past = [torch.cat((prompts[j, i, :, begin[i] :], own[j, s, :, :length]), 1).double() for j in (0, 1)]
            keys = torch.cat((past[0], k[:, None]), 1)
            values = torch.cat((past[1], value[s].view(heads, 1, width).double()), 1)
            exact.append(((0.3 * q @ keys.transpose(1, 2)).softmax(-1) @ values).reshape(-1))
        made = []
        for threads in (2, 3):
            torch.set_num_threads(threads)
            keys, values = own[0].clone(), own[1].clone()
            made.append(ops.decode_attention(
                query, key, value, cos, sin, *prompts, begin, group, keys, values, length, 0.3, *norms, 1e-6
            ))  # fmt: skip
            assert torch.equal(values[:, :, length].reshape(answers, -1), value)
            assert keys[:, :, length + 1 :].isnan().all() and not keys[:, :, : length + 1].isnan().any()
        assert torch.equal(*made)
        check(f"decoding {width} {heads} {shared}", made[0], torch.stack(exact), 4e-6, 4e-6)
        hidden, update = torch.randn(2, 5, width, generator=g)
        weight = torch.rand(width, generator=g)
        for more in (None, update):
            x = hidden.clone()
            got = ops.add_norm_(x, more, weight, 1e-6)
            assert torch.equal(x, hidden if more is None else hidden + update)
            check(f"norm {width}", got, normed(x.double(), weight.double()), 1e-6, 1e-6)
    torch.set_num_threads(2)


def check_refusals() -> None:
    """Bad input raises; memory is never read beyond it."""
    ops = torch.ops.rewardmap
    logits, targets = torch.randn(3, 8), torch.tensor([0, 8, 1])

    def decode(**other: Any) -> Tensor:
        row, cache = torch.ones(2, 16), torch.ones(2, 1, 4, 16)
        given = {
            "query": row, "key": row, "value": row, "cos": row, "sin": row, "prompt_keys": cache,
            "prompt_values": cache, "prompt_begin": torch.tensor([0, 0]), "group": torch.tensor([0, 1]),
            "keys": cache.clone(), "values": cache.clone(), "length": 0, "scale": 1.0, "query_norm": None,
            "key_norm": None, "epsilon": 0.0,
        }  # fmt: skip
        return ops.decode_attention(*(given | other).values())

    for call, message in (
        (lambda: ops.row_statistics(logits, targets, 1.0, None, None), "targets[1] = 8"),
        (lambda: ops.row_statistics(logits, targets[:2], 1.0, None, None), "targets must be"),
        (lambda: ops.row_statistics(logits.t(), torch.zeros(8).long(), 1.0, None, None), "rows of stride 1"),
        (lambda: ops.row_statistics(logits.double(), targets * 0, 1.0, None, None), "float32 or bfloat16"),
        (lambda: ops.row_statistics(logits, targets * 0, 1.0, torch.ones(2), None), "temperatures must be"),
        (lambda: ops.product_(logits, torch.ones(3, 2), torch.ones(3, 8), False), "cannot be a"),
        (lambda: ops.product_(logits, torch.ones(3, 4)[:, ::2], torch.ones(2, 8), False), "a must have rows"),
        (lambda: ops.product_(torch.ones(3, 0), torch.ones(3, 2), torch.ones(2, 0), False), "cannot be a"),
        (lambda: ops.product_(torch.ones(8, 3).t(), torch.ones(3, 2), torch.ones(2, 8), False), "rows of stride 1"),
        (lambda: ops.product_(logits.bfloat16(), torch.ones(3, 2), torch.ones(2, 8), False), "out must be float32"),
        (lambda: ops.add_norm_(torch.ones(2, 24), None, torch.ones(24), 0.0), "a multiple of 16"),
        (lambda: ops.add_norm_(torch.ones(2, 32), None, torch.ones(16), 0.0), "weight must be contiguous"),
        (lambda: decode(group=torch.tensor([0, 2])), "group[1] = 2 is outside [0, 2)"),
        (lambda: decode(length=4), "leaves no room"),
        (lambda: decode(query=torch.ones(2, 16).double()), "query must be contiguous"),
        (lambda: ops.group_advantage(torch.ones(3), torch.tensor([0, 2, 1, 3]), "group", 1, 0.0, False, "mean", None),
         "offsets must rise"),
        (lambda: ops.group_advantage(torch.ones(3), torch.tensor([0, 9]), "group", 1, 0.0, False, "mean", None),
         "offsets must rise"),
    ):  # fmt: skip
        try:
            call()
        except RuntimeError as error:
            assert message in str(error), error
        else:
            raise AssertionError(f"nothing raised for: {message}")


def main() -> None:
    native.load(Path(sys.argv[1]))
    torch.set_num_threads(2)
    with use_implementation("torch"):  # this library is loaded already; there can be no second one in a process
        choose(OPERATION, torch.zeros(1))
    for dtype in (torch.float32, torch.bfloat16):
        for vocab in VOCABULARIES:
            check_split(vocab, dtype)
            check_exponentials(vocab, dtype)
        for i, objective in enumerate(o for o in cases.OBJECTIVES if not o.needs_sequence):
            for vocab in VOCABULARIES if i < 6 else (67,):
                check_rows(objective, vocab, dtype, per_row=i % 2 == 0)
    check_not_a_number()
    check_advantage()
    check_decoding()
    if torch.ops.rewardmap.products(False):
        check_product()
    check_refusals()
    products = [torch.ops.rewardmap.products(bfloat16) or "torch" for bfloat16 in (False, True)]
    print(f"{native.capability()}: all equal the definition, products by {' and '.join(products)}")


if __name__ == "__main__":
    main()
