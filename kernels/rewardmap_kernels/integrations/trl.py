"""TRL's ``GRPOTrainer`` on our head and loss: ``fuse_grpo(trainer)`` after it is built, nothing else changes.

TRL 1.16 scores completions inside the model's forward, through one autograd function over hidden states and
head. While a fused trainer is at work, that function is ours: plain scoring (old and reference
log-probabilities, evaluation) goes to ``linear_logprobs``; the training pass goes to ``linear_policy_loss``,
whose loss replaces TRL's, so that no logits are made twice. TRL's own loss code still runs, on detached
log-probabilities, and logs its metrics. The loss leaves the model's forward on its log-probabilities: DDP, FSDP and
DeepSpeed hook a module's outputs, and would not know that a loss beside them has a backward.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..linear_logprob import linear_logprobs
from ..linear_loss import linear_policy_loss
from ..objective import PolicyObjective

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")
REPLACED = ("_compute_loss", "_get_per_token_logps_and_entropies")


class _FusedTrainer:
    """What a fused trainer asks of the head at this moment; ``rows`` are [B, T - 1] grids of
    linear_policy_loss's."""

    def __init__(self, trainer: Any, fused_loss: bool, entropy_gradient: bool) -> None:
        self.fused_loss, self.entropy_gradient = fused_loss, entropy_gradient
        self.objective = _objective(trainer) if fused_loss else None
        self.rows: dict[str, Tensor] | None = None
        self.scored: Tensor | None = None
        self.loss: Tensor | None = None


_active: list[_FusedTrainer] = []


class _OnLogprobs(torch.autograd.Function):
    """Log-probabilities [N], values only, whose gradient is the loss's."""

    @staticmethod
    def forward(ctx: Any, logprobs: Tensor, loss: Tensor) -> Tensor:
        return logprobs.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # The loss's gradient where TRL scores a row, else 0; the 0 that is added finds it whatever its sign, at any N.
        found = torch.nn.functional.pad(grads[0], (0, 1))
        return None, found.amax() + found.amin()


class _OffLogprobs(torch.autograd.Function):
    """The loss's value again, from the model's output that carries its gradient."""

    @staticmethod
    def forward(ctx: Any, logprobs: Tensor, loss: Tensor) -> Tensor:
        ctx.shape = logprobs.shape
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].expand(ctx.shape), None


class _Head:
    """Stands in for TRL's autograd function: ours for a fused trainer, TRL's for any other."""

    original: Any = None

    @staticmethod
    def apply(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, chunk_size: int,
        final_logit_softcapping: float | None = None, logit_scale: float = 1.0, outputs: tuple[str, ...] = (),
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        if not _active:
            result: tuple[Tensor | None, ...] = _Head.original.apply(
                hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs
            )
            return result
        if bias is not None or final_logit_softcapping is not None:
            raise ValueError(
                f"a head with bias ({bias is not None}) or soft-capping ({final_logit_softcapping}) has no fused kernel"
            )
        if not logit_scale > 0:
            raise ValueError(f"a logit scale must be positive for the fused head, got {logit_scale}")
        temperature = temperature / logit_scale
        extra = set(outputs) - {"log_probs", "entropy"}
        if extra:
            raise ValueError(f"the fused head has no outputs {sorted(extra)}")
        state = _active[-1]
        if state.rows is None:
            logprobs, entropy = linear_logprobs(
                hidden, weight, targets, temperature=temperature, entropy_gradient=state.entropy_gradient
            )
            return logprobs, entropy, None, None, None
        assert state.scored is not None and state.objective is not None
        # Virtual tokens (PEFT's prompt tuning) stand before the prompt; nothing of theirs is scored.
        size, length = state.scored.shape
        virtual = max(hidden.shape[0] - size * length, 0) // size
        rows: dict[str, Any] = {
            name: torch.nn.functional.pad(grid, (virtual, 0)).reshape(-1) for name, grid in state.rows.items()
        }
        if hidden.shape[0] < size * length:  # TRL took the scored positions only
            rows = {name: values[state.scored.reshape(-1)] for name, values in rows.items()}
        # A model split by device_map: TRL has brought hidden and targets to the head's device.
        rows = {name: values.to(hidden.device) for name, values in rows.items()}
        out = linear_policy_loss(
            hidden, weight, targets, objective=state.objective, temperature=temperature,
            num_sequences=size, **rows,
        )  # fmt: skip
        state.loss = out.loss.detach()
        return _OnLogprobs.apply(out.logprobs, out.loss), out.entropy, None, None, None


def _bias_correction(trainer: Any) -> bool:
    return bool(trainer.beta != 0.0 and trainer.args.use_bias_correction_kl)


def _by_token(trainer: Any) -> bool:
    """Whether the engine's correction differs from token to token."""
    corrected = trainer.use_vllm and trainer.vllm_importance_sampling_correction
    return bool(corrected and trainer.vllm_importance_sampling_mode.startswith("token"))


def _objective(trainer: Any) -> PolicyObjective:
    """The trainer's options as ours; ValueError for one that has no fused loss."""
    args, kind, level = trainer.args, trainer.loss_type, trainer.importance_sampling_level
    refused = {
        f"loss_type={kind!r}": kind not in LOSS_TYPES,
        # TRL caps CISPO's weight at epsilon_high itself.
        f"loss_type='cispo' with epsilon_high={trainer.epsilon_high} < 1": kind == "cispo" and trainer.epsilon_high < 1,
        f"importance_sampling_level={level!r} with {kind}": level != "token" and kind in ("cispo", "sapo"),
        "top_entropy_quantile": trainer.top_entropy_quantile < 1.0,
        "off_policy_mask_threshold": trainer.off_policy_mask_threshold is not None,
        "use_bias_correction_kl at sequence level": level != "token" and _bias_correction(trainer),
        # Ours holds a sequence's ratio constant and each row has its own gradient (GSPO-token): TRL's only where every
        # row of a sequence has the same factor.
        "a token-level vllm_importance_sampling_mode at sequence level": level != "token" and _by_token(trainer),
        "an entropy bonus": getattr(trainer, "_entropy_bonus_enabled", False),
        "a router auxiliary loss": trainer.aux_loss_enabled,
    }
    names = [name for name, present in refused.items() if present]
    if names:
        raise ValueError(
            f"no fused loss for {', '.join(names)}; fuse_grpo(trainer, fused_loss=False) fuses the head alone"
        )
    options: dict[str, Any] = {"kl_coef": trainer.beta, "kl_bias_correction": _bias_correction(trainer)}
    if kind == "cispo":
        # TRL's weight has no lower bound.
        return PolicyObjective("cispo", clip_eps_low=1.0, clip_eps_high=trainer.epsilon_high - 1.0, **options)
    if kind == "sapo":
        options["sapo_temperature_pos"] = args.sapo_temperature_pos
        options["sapo_temperature_neg"] = args.sapo_temperature_neg
        return PolicyObjective("sapo", **options)
    options |= {
        "clip_eps_low": trainer.epsilon_low,
        "clip_eps_high": trainer.epsilon_high,
        "delta": args.delta,
    }
    return PolicyObjective("gspo" if level == "sequence" else kind, **options)


def _normalizer(trainer: Any, inputs: dict[str, Any], mask: Tensor) -> Tensor:
    """The divisor of every completion token, [B, L], as TRL's loss types define it."""
    steps = trainer.current_gradient_accumulation_steps
    if trainer.loss_type in ("grpo", "sapo"):
        divisor = mask.sum(-1, keepdim=True).clamp(min=1) * mask.shape[0] * steps
    elif trainer.loss_type == "bnpo":
        divisor = mask.sum().clamp(min=1) * steps
    elif trainer.loss_type == "dr_grpo":
        divisor = torch.full((), float(mask.shape[0] * trainer.max_completion_length * steps), device=mask.device)
    else:
        items = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
        divisor = items * steps / trainer.args.steps_per_generation
    return divisor.to(torch.float32).expand(mask.shape)


def _rows(trainer: Any, inputs: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
    """linear_policy_loss's per-row inputs as [B, T - 1] grids, and which positions TRL scores."""
    completion = inputs["completion_mask"]
    mask = completion if "tool_mask" not in inputs else completion * inputs["tool_mask"]
    size, length = mask.shape
    advantages = inputs["advantages"]
    if advantages.dim() == 2 and trainer.importance_sampling_level == "sequence":
        raise ValueError(
            f"no fused loss for advantages by token, {tuple(advantages.shape)}, at "
            "importance_sampling_level='sequence'; fuse_grpo(trainer, fused_loss=False) fuses the head alone"
        )
    advantages = (advantages[:, None] if advantages.dim() == 1 else advantages).expand(size, length)
    if trainer.use_vllm and trainer.vllm_importance_sampling_correction:
        # A constant, non-negative factor of the policy term is a factor of the advantage.
        advantages = advantages * inputs["importance_sampling_ratio"]
    found = {
        "advantages": advantages.float(),
        "loss_mask": mask,
        "normalizer": _normalizer(trainer, inputs, mask),
        "sequence": torch.arange(size, device=mask.device)[:, None].expand(size, length),
    }
    if inputs.get("old_per_token_logps") is not None:
        found["old_logprobs"] = inputs["old_per_token_logps"]
    if trainer.beta != 0.0:
        found["ref_logprobs"] = inputs["ref_per_token_logps"]
    width = inputs["prompt_mask"].shape[1] - 1

    def with_prompt(values: Tensor) -> Tensor:
        return torch.cat([values.new_zeros(size, width), values], dim=1)

    return {name: with_prompt(values) for name, values in found.items()}, with_prompt(completion) != 0


def _takes_what_ours_takes(function: Any) -> bool:
    """Whether this is the autograd function of TRL 1.16. That of 1.10 to 1.14 takes less, and GRPOTrainer does not call
    it by the name that is replaced."""
    if function is None:
        return False
    _, *names = inspect.signature(function.forward).parameters  # without ctx
    return names == list(inspect.signature(_Head.apply).parameters)


@contextlib.contextmanager
def _at_work(state: _FusedTrainer) -> Iterator[None]:
    _active.append(state)
    try:
        yield
    finally:
        _active.pop()


def fuse_grpo(trainer: Any, *, fused_loss: bool = True) -> Any:
    """Make this ``trl.GRPOTrainer`` use our head and, with ``fused_loss``, our loss; returns the trainer.

    Other trainers of the process are untouched. Same loss, gradients and metrics as TRL's. With a trainable
    head this is 6NVH FLOP for TRL's 8, with a frozen one 4NVH for 6.

    Raises ValueError for an option of the trainer that the fused loss cannot honour (the message names it), for a
    subclass with a loss or scoring of its own, whose head alone can be fused, for a trainer that was fused before,
    for a TRL without the head that is replaced, and, with the loss, for another than 1.16. An option that changes
    during training is checked again.
    """
    import trl.trainer.grpo_trainer
    import trl.trainer.utils

    utils: Any = trl.trainer.utils
    base: Any = trl.trainer.grpo_trainer.GRPOTrainer
    found = getattr(utils, "_ChunkedLogProbFunction", None)
    if found is not _Head and not _takes_what_ours_takes(found):
        raise ValueError(f"fuse_grpo replaces the head of TRL 1.16; TRL {trl.__version__} has another or none")
    if fused_loss and not trl.__version__.startswith("1.16."):
        raise ValueError(
            f"the fused loss knows the options of TRL 1.16, got {trl.__version__}: it would ignore a new one; "
            "fuse_grpo(trainer, fused_loss=False) fuses the head alone"
        )
    kind = type(trainer)
    if not isinstance(trainer, base):
        raise ValueError(f"fuse_grpo takes a trl.GRPOTrainer, got {kind.__name__}")
    if "_compute_loss" in vars(trainer):
        raise ValueError("this trainer's _compute_loss was replaced before, by fuse_grpo or by hand")
    own = [name for name in REPLACED if getattr(kind, name) is not getattr(base, name)]
    if fused_loss and own:
        raise ValueError(
            f"no fused loss for {kind.__name__}, which has its own {' and '.join(own)}; "
            "fuse_grpo(trainer, fused_loss=False) fuses the head alone"
        )
    state = _FusedTrainer(trainer, fused_loss, bool(own) or trainer._entropy_bonus_enabled)
    if found is not _Head:
        _Head.original = found
        utils._ChunkedLogProbFunction = _Head
    score, compute = trainer._get_per_token_logps_and_entropies, trainer._compute_loss

    def scored(*args: Any, **kwargs: Any) -> Any:
        with _at_work(state):
            logprobs, *others = score(*args, **kwargs)
        if state.rows is None:
            return logprobs, *others
        assert state.loss is not None
        state.loss = _OffLogprobs.apply(logprobs, state.loss.to(logprobs.device))
        return logprobs.detach(), *others

    def computed(model: Any, inputs: dict[str, Any]) -> Tensor:
        if not (state.fused_loss and trainer.model.training):
            return compute(model, inputs)  # type: ignore[no-any-return]
        state.objective = _objective(trainer)
        state.rows, state.scored = _rows(trainer, inputs)
        try:
            compute(model, inputs)
            loss = state.loss
        finally:
            state.rows = state.scored = state.loss = None
        assert loss is not None
        return loss

    trainer._get_per_token_logps_and_entropies = scored
    trainer._compute_loss = computed
    return trainer
