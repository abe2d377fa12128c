"""The divisor of a policy loss, fixed from masks before any logits exist."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_integer, check_range, check_rows, check_tensor, number_on
from .objective import PolicyObjective, check_objective
from .policy_loss import sequence_counts


def loss_normalizer(
    objective: PolicyObjective,
    loss_mask: Tensor,
    *,
    sequence: Tensor | None = None,
    num_sequences: int | None = None,
    max_length: int | None = None,
    total_tokens: Tensor | float | None = None,
) -> Tensor:
    """The divisor of every row's loss, float32, from masks alone, on the mask's device and without a sync.

    - dapo, bnpo, cispo, reinforce (token mean): the number of unmasked rows, 0-d; ``total_tokens`` replaces it when the
      optimizer step spans several micro-batches or ranks (dapo's definition; bnpo's is the local count).
    - grpo, gspo, sapo (mean over sequences of their token means): rows of the sequence * num_sequences, [N]; needs
      ``sequence`` [N] and ``num_sequences`` (of the whole step when it spans several micro-batches).
    - dr_grpo: num_sequences * max_length, 0-d.

    ``loss_mask`` [N], non-zero where the row counts. A step's loss is the plain sum of its micro-batches' losses. Zero
    counts become 1. Raises ValueError for a missing or a superfluous argument.
    """
    check_objective(objective)
    check_tensor("loss_mask", loss_mask)
    if loss_mask.dim() != 1:
        raise ValueError(f"loss_mask must have shape (N,), got {tuple(loss_mask.shape)}")
    per_sequence = objective.name in ("grpo", "gspo", "sapo")
    if not per_sequence and objective.name != "dr_grpo":
        if max_length is not None:
            raise ValueError(f"max_length applies to dr_grpo; the objective {objective.name} ignores it")
        if total_tokens is not None:
            total = number_on(total_tokens, loss_mask.device)
        else:
            total = (loss_mask != 0).sum().to(torch.float32)
        return total.clamp(min=1.0)
    if total_tokens is not None:
        raise ValueError(f"total_tokens applies to token means; the objective {objective.name} ignores it")
    if num_sequences is None or num_sequences < 1:
        raise ValueError(f"the objective {objective.name} needs num_sequences >= 1, got {num_sequences}")
    if not per_sequence:
        if max_length is None or max_length < 1:
            raise ValueError(f"dr_grpo needs max_length >= 1, got {max_length}")
        return number_on(num_sequences * max_length, loss_mask.device)
    if max_length is not None:
        raise ValueError(f"max_length applies to dr_grpo; the objective {objective.name} ignores it")
    if sequence is None:
        raise ValueError(f"the objective {objective.name} needs sequence ([N]), got None")
    check_integer("num_sequences", num_sequences)
    check_rows("sequence", sequence, loss_mask, loss_mask.shape[0], "int")
    check_range("sequence", sequence, 0, num_sequences)
    counts = sequence_counts(loss_mask != 0, sequence, num_sequences).clamp(min=1)
    return counts.to(torch.float32) * num_sequences
