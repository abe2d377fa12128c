"""What a policy update optimises: the objective's settings, checked once, and what they read and report."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

ObjectiveName = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo", "sapo", "reinforce"]
OBJECTIVES: tuple[str, ...] = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo", "sapo", "reinforce")
_KINDS: dict[str, tuple[str, Any]] = {
    "float": ("a number", Real), "float | None": ("a number", (Real, type(None))), "bool": ("True or False", bool),
}  # fmt: skip
CLIPPED: tuple[str, ...] = ("grpo", "bnpo", "dr_grpo", "dapo", "gspo")  # -min(r A, clip(r) A)


@dataclass(frozen=True)
class PolicyObjective:
    """What is optimised. Immutable and hashable.

    ``name``: grpo, bnpo, dr_grpo, dapo (clipped; they differ by ``loss_normalizer`` only), cispo, gspo, sapo,
    reinforce. ``clip_eps_low``, ``clip_eps_high``: the ratio is clipped to [1 - low, 1 + high] (cispo: its
    stop-gradient weight is). ``dual_clip``: c > 1; for negative advantages the loss is at most c |A|.
    ``delta``: the unclipped ratio is capped at delta > 1 + clip_eps_high (two-sided clipping, arXiv
    2505.07291). Both: clipped objectives only. ``kl_coef``, ``kl_estimator``: adds kl_coef * KL(policy ||
    reference), estimator k1, k2 or k3, per row; ``kl_bias_correction`` multiplies the estimate by the row's ratio,
    with its gradient. ``entropy_coef``: subtracts entropy_coef * entropy per row.
    ``importance_correction``: multiplies the policy term by w = exp(old_logprobs - rollout_logprobs), a
    constant. "truncate" clamps w to [importance_min, importance_max]; "mask" makes w 0 outside.
    ``importance_level``: "token", or "sequence": w is the product over the sequence's rows.
    ``sapo_temperature_pos``, ``sapo_temperature_neg``: SAPO's temperatures for advantages > 0 and <= 0.

    Raises ValueError for a value out of range, and for a flag that the objective would ignore. The clip bounds always
    have values: sapo and reinforce do not read them.
    """

    name: ObjectiveName = "grpo"
    clip_eps_low: float = 0.2
    clip_eps_high: float = 0.2
    dual_clip: float | None = None
    delta: float | None = None
    kl_coef: float = 0.0
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_bias_correction: bool = False
    entropy_coef: float = 0.0
    importance_correction: Literal["none", "truncate", "mask"] = "none"
    importance_level: Literal["token", "sequence"] = "token"
    importance_min: float = 0.0
    importance_max: float = 2.0
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05

    if TYPE_CHECKING:  # no field, so that PolicyObjective(**asdict(objective)) is the objective again

        @property
        def key(self) -> str:
            """All fields in order, as text: how an objective passes through a custom operator, which takes no
            objects."""

    def __post_init__(self) -> None:
        """Check every field."""
        object.__setattr__(self, "key", " ".join(str(getattr(self, one.name)) for one in fields(self)))
        for which, allowed in (
            ("name", OBJECTIVES),
            ("kl_estimator", ("k1", "k2", "k3")),
            ("importance_correction", ("none", "truncate", "mask")),
            ("importance_level", ("token", "sequence")),
        ):
            if getattr(self, which) not in allowed:
                raise ValueError(f"{which} = {getattr(self, which)!r} is not one of {', '.join(allowed)}")
        for one in fields(self):  # a configuration file's 1e-6 may be text
            value = getattr(self, one.name)
            kind, types = _KINDS.get(str(one.type), ("", object))
            if not isinstance(value, types):
                raise ValueError(f"{one.name} must be {kind}, got {value!r}")
        for which in ("clip_eps_low", "clip_eps_high", "kl_coef", "importance_min"):
            value = getattr(self, which)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{which} must be finite and >= 0, got {value}")
        for which in ("importance_max", "sapo_temperature_pos", "sapo_temperature_neg"):
            if not getattr(self, which) > 0:
                raise ValueError(f"{which} must be > 0, got {getattr(self, which)}")
        if not math.isfinite(self.entropy_coef):
            raise ValueError(f"entropy_coef must be finite, got {self.entropy_coef}")
        if self.importance_min > self.importance_max:
            raise ValueError(f"importance_min {self.importance_min} is above importance_max {self.importance_max}")
        if self.name not in CLIPPED and (self.dual_clip is not None or self.delta is not None):
            raise ValueError(
                f"dual_clip and delta apply to {', '.join(CLIPPED)}; the objective {self.name} ignores them"
            )
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip must be > 1, got {self.dual_clip}")
        if self.delta is not None and not self.delta > 1 + self.clip_eps_high:
            raise ValueError(f"delta must be > 1 + clip_eps_high = {1 + self.clip_eps_high}, got {self.delta}")
        if self.name != "sapo" and (self.sapo_temperature_pos, self.sapo_temperature_neg) != (1.0, 1.05):
            raise ValueError(f"sapo_temperature_pos/neg apply to sapo; the objective {self.name} ignores them")
        if self.kl_bias_correction and (not self.kl_coef or self.name in ("gspo", "reinforce")):
            raise ValueError(
                "kl_bias_correction needs kl_coef and a ratio per row; "
                f"got kl_coef = {self.kl_coef} and the objective {self.name}"
            )
        if self.importance_correction == "none" and self.importance_level != "token":
            raise ValueError("importance_level = 'sequence' needs importance_correction 'truncate' or 'mask'")

    @property
    def needs_sequence(self) -> bool:
        """Whether a row's coefficient depends on the other rows of its sequence."""
        return self.name == "gspo" or (self.importance_correction != "none" and self.importance_level == "sequence")


@functools.cache
def from_key(key: str) -> PolicyObjective:
    """The objective whose ``key`` this is."""

    def value(word: str) -> Any:
        constants = {"None": None, "True": True, "False": False}
        if word in constants:
            return constants[word]
        try:
            return float(word)
        except ValueError:
            return word

    return PolicyObjective(*map(value, key.split(" ")))


def check_objective(objective: object) -> None:
    """Raise unless this is a ``PolicyObjective``."""
    if not isinstance(objective, PolicyObjective):
        raise ValueError(f"objective must be a PolicyObjective, got {objective!r}")


def require_inputs(
    objective: PolicyObjective,
    *,
    ref_logprobs: object,
    rollout_logprobs: object,
    sequence: object,
) -> None:
    """Raise ValueError for what is no objective, and when an input that it reads is None."""
    check_objective(objective)
    if objective.kl_coef and ref_logprobs is None:
        raise ValueError(f"kl_coef = {objective.kl_coef} needs ref_logprobs, got None")
    if objective.importance_correction != "none" and rollout_logprobs is None:
        raise ValueError(
            f"importance_correction = {objective.importance_correction!r} needs rollout_logprobs, got None"
        )
    if objective.needs_sequence and sequence is None:
        level = "gspo" if objective.name == "gspo" else "importance_level = 'sequence'"
        raise ValueError(f"{level} needs sequence ([N], the index of each row's sequence), got None")
