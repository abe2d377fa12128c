"""hidden [N, H] x weight [V, H] -> policy loss, in chunks of rows, with the gradients made in the forward.

The logits of a chunk live only while the chunk is worked on; [N, V] never exists. A row's coefficient dL/dlogprob
depends on its own log-probability and on numbers known beforehand, so the gradient is formed at once, over the logits:
6NVH FLOP with a trainable head, 4NVH when weight or hidden is frozen. Sequence-level objectives make a pass for the
log-probabilities first (2NVH more), unless one chunk holds every row or the head is frozen.

The work is one custom operator, opaque to torch.compile; autograd and the checks stand around it.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import _rows
from ._checks import (
    check_linear,
    check_no_overlap,
    check_row_index,
    check_rows,
    check_temperature,
    check_tensor,
    check_transforms,
    compute_dtype,
    positive,
    readable,
    temperatures,
)
from ._head import Head, chunk_size, full_weight, operand_dtype, row_chunks
from ._scale import scaled, taken
from ._shard import VocabShard
from .objective import PolicyObjective, check_objective, from_key
from .policy_loss import PolicyLossOutput, check_policy_inputs, evaluate, metric_names
from .torch_rows import RowStatistics

OPERATION = "linear_policy_loss"


class LinearPolicyLoss(NamedTuple):
    """``loss`` 0-d, differentiable; ``logprobs``, ``entropy`` [N] detached float32 nats, 0 where a row was
    left out; ``metrics`` 0-d tensors, those of ``policy_loss``."""

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor
    metrics: dict[str, Tensor]


@torch.library.custom_op("rewardmap_kernels::linear_policy_loss", mutates_args=("weight_grad",))
def _forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, row_temperature: Tensor | None, temperature: float,
    advantages: Tensor, normalizer: Tensor, old_logprobs: Tensor | None, ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None, sequence: Tensor | None, num_sequences: int, loss_mask: Tensor | None,
    weight_grad: Tensor | None, objective: str, chunk_rows: int, logits_dtype: torch.dtype, group: str,
    need_hidden: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """loss, logprobs, entropy, metrics [M], d_hidden, d_weight (empty where not made here), their scale."""
    impl = _rows.implementation(OPERATION, hidden)
    inputs: dict[str, Any] = {
        "advantages": advantages, "normalizer": normalizer, "objective": from_key(objective),
        "old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "rollout_logprobs": rollout_logprobs,
        "sequence": sequence, "num_sequences": num_sequences,
    }  # fmt: skip
    divisor = temperature if row_temperature is None else row_temperature
    keep = None if loss_mask is None else loss_mask.bool()
    head = Head(impl, hidden, weight, keep, logits_dtype, need_hidden, need_weight, weight_grad, chunk_rows)
    shard = None if not group else VocabShard.of(group, weight.shape[0])
    targets = targets if shard is None else shard.local(targets)
    with _rows.no_autocast(hidden):
        whole, out, scale = _run(impl, head, shard, targets, divisor, inputs, keep)
    if shard is not None:
        shard.add_up(head.d_hidden)
    return (
        out.row_loss.sum(), whole.logprobs, whole.entropy, torch.stack(list(out.metrics.values())),
        hidden.new_empty(0) if head.d_hidden is None else head.d_hidden,
        hidden.new_empty(0) if head.d_weight is None or weight_grad is not None else head.d_weight,
        hidden.new_ones((), dtype=compute_dtype(hidden)) if scale is None else scale,
    )  # fmt: skip


def _order(
    objective: PolicyObjective, dtype: torch.dtype, chunks: int, need_hidden: bool, need_weight: bool
) -> tuple[bool, bool, bool]:
    """(gradients are made from exponentials, multiplied by the coefficients only when all of them are there, or from
    logits made a second time)."""
    training, late = need_hidden or need_weight, objective.needs_sequence and chunks > 1
    # An entropy gradient is no multiple of p - onehot; float16 has too few exponents for exponentials.
    factored = training and not objective.entropy_coef and dtype != torch.float16
    # A frozen head's product needs no coefficient: the rows of its result are multiplied afterwards.
    directions = late and factored and not need_weight
    return factored, directions, late and training and not directions


def _run(
    impl: Any, head: Head, shard: VocabShard | None, targets: Tensor, divisor: Tensor | float, inputs: dict[str, Any],
    keep: Tensor | None,
) -> tuple[RowStatistics, PolicyLossOutput, Tensor | None]:  # fmt: skip
    """The loop over chunks: all rows' statistics, ``policy_loss``'s output, and what the gradients are scaled by."""

    def gradient_of(rows: slice, logits: Tensor, found: RowStatistics, c: Tensor, e: Tensor) -> Tensor:
        per_row = _rows.row_slice(divisor, rows)
        made: Tensor = impl.gradient(
            OPERATION, logits, targets[rows], per_row, found, c, e, scale, head.dtype, in_place=True
        )
        return made

    objective: PolicyObjective = inputs["objective"]
    scale = _rows.float16_scale(head.dtype, inputs["normalizer"], head.hidden)
    need = head.d_hidden is not None, head.d_weight is not None
    training, one = any(need), len(head.chunks) == 1
    factored, directions, second_pass = _order(objective, head.dtype, len(head.chunks), *need)
    output, parts = None, []
    for rows in head.chunks:
        x, logits = head.logits(rows)
        per_row, on = _rows.row_slice(divisor, rows), _rows.row_slice(keep, rows)
        if factored and not second_pass:
            found, total, gradient = impl.exponentials(OPERATION, logits, targets[rows], per_row, on, head.dtype, None)
        else:
            found = impl.statistics(OPERATION, logits, targets[rows].clamp(min=0), per_row, on)
            total = gradient = None
        if shard is not None:
            found, total = shard.combine(found, targets[rows], on, impl.NATS_PER_UNIT, total, gradient)
        parts.append(found)
        if not training or second_pass:
            continue
        if directions:
            head.backward(rows, x, gradient, (-1.0 / (total * per_row))[:, None])
            continue
        part = {name: _rows.row_slice(value, rows) for name, value in inputs.items()}
        out = evaluate(found.logprobs, entropy=found.entropy, loss_mask=on, with_metrics=one, **part)
        output = out if one else None
        if factored:
            # Coefficients of 0 stay 0 beside an infinite quotient.
            factor = (out.d_logprob / (total * -per_row)).masked_fill_(out.d_logprob == 0, 0.0)
            head.backward(rows, x, gradient, factor[:, None])
        else:
            head.backward(rows, x, gradient_of(rows, logits, found, out.d_logprob, out.d_entropy))
    whole = _rows.joined(parts, head.hidden)
    if output is None:
        output = evaluate(whole.logprobs, entropy=whole.entropy, loss_mask=keep, **inputs)
    if directions and head.d_hidden is not None:
        head.d_hidden.mul_(output.d_logprob[:, None])
    if second_pass:
        for rows in head.chunks:
            x, logits = head.logits(rows)
            these = RowStatistics(*(values[rows] for values in whole))
            head.backward(rows, x, gradient_of(rows, logits, these, output.d_logprob[rows], output.d_entropy[rows]))
    return whole, output, scale


@_forward.register_fake
def _(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    weight_grad, objective, need_hidden, need_weight = rest[11], rest[12], rest[16], rest[17]
    wide = compute_dtype(hidden)
    names = metric_names(from_key(objective), entropy=True, reference=rest[6] is not None)
    rows = hidden.new_empty(hidden.shape[0], dtype=wide)
    impl = _rows.implementation(OPERATION, hidden)
    narrow = operand_dtype(hidden, weight, impl)
    single = hidden.shape[0] <= rest[13]
    return (
        hidden.new_empty((), dtype=wide), rows, torch.empty_like(rows), hidden.new_empty(len(names), dtype=wide),
        hidden.new_empty(hidden.shape, dtype=narrow) if need_hidden else hidden.new_empty(0),
        weight.new_empty(weight.shape, dtype=narrow if single else wide) if need_weight and weight_grad is None
        else hidden.new_empty(0),
        hidden.new_empty((), dtype=wide),
    )  # fmt: skip


@register_flop_formula(torch.ops.rewardmap_kernels.linear_policy_loss, get_raw=True)
def _flop(*args: Any, out_val: tuple[Tensor, ...], **named: Any) -> int:
    """For ``FlopCounterMode``: the products that run, 2NVH each."""
    given = inspect.signature(_forward._init_fn).bind(*args, **named).arguments
    (n, h), v = given["hidden"].shape, given["weight"].shape[0]
    need, chunks = (given["need_hidden"], given["need_weight"]), len(row_chunks(n, given["chunk_rows"]))
    again = _order(from_key(given["objective"]), out_val[4].dtype, chunks, *need)[2]
    return 2 * (1 + sum(need) + again) * n * v * h


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        loss, logprobs, entropy, metrics, d_hidden, d_weight, scale = _forward(
            hidden, weight, *rest, need_hidden, need_weight
        )
        ctx.save_for_backward(d_hidden, d_weight, scale)
        ctx.dtypes = (hidden.dtype, weight.dtype)
        ctx.accumulated = need_weight and rest[11] is not None
        ctx.arguments = len(rest)
        ctx.mark_non_differentiable(logprobs, entropy, metrics)
        return loss, logprobs, entropy, metrics

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, scale = taken(ctx, OPERATION, grads[0])
        if ctx.accumulated:
            check_gradient_is_one(grads[0])
        grad = grads[0] / scale
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        to_hidden = scaled(d_hidden, grad, ctx.dtypes[0]) if need_hidden else None
        to_weight = scaled(d_weight, grad, ctx.dtypes[1]) if need_weight and not ctx.accumulated else None
        return to_hidden, to_weight, *([None] * ctx.arguments)


def check_gradient_is_one(grad: Tensor) -> None:
    """Raise (on a GPU: assert there) unless the incoming gradient is 1, as a gradient already added elsewhere needs."""
    message = "weight_grad already holds the gradient: backward from this loss itself, with gradient 1"
    if readable(grad):
        if float(grad) != 1.0:
            raise ValueError(f"{message}, got {float(grad)}")
    else:
        torch._assert_async(grad == 1.0, message)


def contributing_rows(
    objective: PolicyObjective, advantages: Tensor, loss_mask: Tensor | None = None, sequence: Tensor | None = None
) -> Tensor:
    """int64 [M] index of the rows whose gradient can be other than zero, for ``linear_policy_loss(rows=)``.

    Unmasked rows, without those of zero advantage when the objective has neither a KL nor an entropy term; at sequence
    level, which needs ``sequence``, the rows of a sequence stay or leave together. ``advantages``, ``loss_mask`` and
    ``sequence`` [N] are on the CPU, where the trainer made them: on a GPU this would wait for it.
    Raises ValueError for tensors elsewhere or of other shapes, and for a sequence that is needed and None.
    """
    check_objective(objective)
    check_tensor("advantages", advantages)
    for name, value in (("advantages", advantages), ("loss_mask", loss_mask), ("sequence", sequence)):
        if isinstance(value, Tensor) and value.device.type != "cpu":
            raise ValueError(f"contributing_rows needs CPU tensors, got {name} on {value.device}")
    check_rows("advantages", advantages, advantages, advantages.numel())
    check_rows("loss_mask", loss_mask, advantages, len(advantages), "mask")
    check_rows("sequence", sequence, advantages, len(advantages), "int")
    on = torch.ones_like(advantages, dtype=torch.bool) if loss_mask is None else loss_mask != 0
    if not objective.kl_coef and not objective.entropy_coef:
        live = on & (advantages != 0)
        if objective.needs_sequence:
            if sequence is None:
                raise ValueError("contributing_rows at sequence level needs sequence ([N]), got None")
            live = on & torch.isin(sequence, sequence[live])
        on = live
    return on.nonzero()[:, 0]


def _check_weight_grad(weight_grad: Tensor, hidden: Tensor, weight: Tensor) -> None:
    if torch.float16 in (hidden.dtype, weight.dtype) or weight.dtype == torch.float64:
        raise ValueError(f"weight_grad needs bfloat16 or float32 operands, got {hidden.dtype} and {weight.dtype}")
    if weight_grad.shape != weight.shape or weight_grad.dtype != torch.float32:
        raise ValueError(
            f"weight_grad must be torch.float32 {tuple(weight.shape)}, "
            f"got {weight_grad.dtype} {tuple(weight_grad.shape)}"
        )
    if weight_grad.device != weight.device:
        raise ValueError(f"weight_grad is on {weight_grad.device}, expected {weight.device}")
    check_no_overlap("weight_grad", weight_grad)
    hooks = None if torch.compiler.is_compiling() else torch._C._autograd._top_saved_tensors_default_hooks(False)
    if hooks is not None and "_checkpoint_hook" in hooks[0].__qualname__:
        raise ValueError("weight_grad would be added to twice inside activation checkpointing: call the head outside")


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    advantages: Tensor,
    normalizer: Tensor | float,
    objective: PolicyObjective,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    sequence: Tensor | None = None,
    num_sequences: int | None = None,
    loss_mask: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    chunk_rows: int | None = None,
    rows: Tensor | None = None,
    weight_grad: Tensor | None = None,
    logits_dtype: torch.dtype = torch.float32,
    group: dist.ProcessGroup | None = None,
) -> LinearPolicyLoss:
    """Policy loss of softmax(hidden @ weight.T / temperature), without the [N, V] logits.

    Args: ``hidden`` [N, H] and ``weight`` [V, H], floating point; a frozen one skips its product. ``targets``
    [N] int32 or int64 token ids. ``temperature`` a positive number or [N]. ``chunk_rows`` rows per chunk (None: 5
    GiB of logits, on a CPU 64 MiB). ``rows`` int64 [M], distinct: only these enter the products, the others count as
    masked (they must not be able to contribute: see ``contributing_rows``; a sequence-level objective must
    see whole sequences). ``weight_grad`` [V, H] float32, whose elements do not overlap: the weight's gradient is added
    to it in this call and the weight, which must require a gradient, gets none; backward must then start at the loss
    itself, and the call be outside activation checkpointing, which would make it twice. ``logits_dtype`` bfloat16
    rounds the logits as an engine that computes them so does. ``group``: the head is split over these ranks, ``weight``
    [V / ranks, H] is this rank's slice, in rank order; every rank passes the same rows and gets the whole loss and
    hidden gradient, and its slice's weight gradient; one collective per chunk, one for the hidden gradient. The
    others are those of ``policy_loss``; ``normalizer`` is a divisor and counts every row it is meant to.

    Products accumulate in float32, the weight gradient over all chunks, and are rounded once (docs/kernels.md has the
    CPU's exception). Masked rows get gradient exactly 0 whatever they hold. First-order gradients only, and once.

    Raises ValueError for a wrong shape, dtype or device, for a target outside [0, V), for a divisor or temperature that
    is not positive, and for an input that the objective needs and that is None, before any work.
    """
    weight = full_weight(weight)
    check_linear(hidden, weight, targets, slices=1 if group is None else dist.get_world_size(group))
    n = hidden.shape[0]
    inputs: dict[str, Any] = {
        "advantages": advantages, "normalizer": normalizer, "objective": objective, "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs, "rollout_logprobs": rollout_logprobs, "sequence": sequence,
        "num_sequences": n if num_sequences is None else num_sequences,
    }  # fmt: skip
    check_policy_inputs(hidden, loss_mask=loss_mask, **inputs)
    check_temperature(temperature, hidden, n)
    check_transforms(OPERATION, hidden, weight)
    hidden = _rows.differentiable(_rows.autocast_operand(hidden))
    weight = _rows.differentiable(_rows.autocast_operand(weight))
    if logits_dtype not in (torch.float32, torch.bfloat16) or (
        logits_dtype == torch.bfloat16 and torch.promote_types(hidden.dtype, weight.dtype) == torch.float64
    ):
        raise ValueError(f"logits_dtype must be float32 or, below float64, bfloat16; got {logits_dtype}")
    if weight_grad is not None:
        _check_weight_grad(weight_grad, hidden, weight)
        if torch.is_grad_enabled() and not weight.requires_grad:
            raise ValueError("weight_grad would stay as it is: weight does not require a gradient")
    mask = loss_mask
    if rows is not None:
        check_row_index(rows, hidden)
        hidden, targets = hidden.index_select(0, rows), targets.index_select(0, rows)
        inputs = {k: v.index_select(0, rows) if _is_per_row(v) else v for k, v in inputs.items()}
        temperature = temperature.index_select(0, rows) if isinstance(temperature, Tensor) else temperature
        mask = None if loss_mask is None else loss_mask.index_select(0, rows)
    temperature = positive("temperature", temperature, hidden, mask, finite=True)
    loss, logprobs, entropy, metrics = _LinearPolicyLoss.apply(
        hidden, weight, targets, *temperatures(temperature),
        inputs["advantages"], _rows.divisor_of(inputs["normalizer"], hidden, mask), inputs["old_logprobs"],
        inputs["ref_logprobs"], inputs["rollout_logprobs"], inputs["sequence"], inputs["num_sequences"], mask,
        weight_grad, objective.key, chunk_size(hidden.shape[0], weight.shape[0], chunk_rows, hidden.device),
        logits_dtype, "" if group is None else group.group_name,
    )  # fmt: skip
    names = metric_names(objective, entropy=True, reference=ref_logprobs is not None)
    out = LinearPolicyLoss(loss, logprobs, entropy, dict(zip(names, metrics.unbind(), strict=True)))
    if rows is None:
        return out
    spread = [torch.zeros(n, dtype=v.dtype, device=v.device).index_copy_(0, rows, v) for v in out[1:3]]
    return out._replace(logprobs=spread[0], entropy=spread[1])


def _is_per_row(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 1
