"""One token at a time for many answers that share prompts, on a CPU: attention over a prompt's keys where they are,
with rotation and norms in the same pass. C++ (``csrc/cpu/decode_kernels.h``), float32; without it callers use torch."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import choose, launched

__all__ = ["add_norm_", "decode_attention", "unavailable_reason"]


def unavailable_reason(tensor: Tensor, head_width: int, hidden_width: int) -> str | None:
    """None where these operations take tensors like ``tensor``, heads and hidden states so wide; else why not."""
    if tensor.dtype != torch.float32:
        return f"{tensor.dtype} is not float32"
    if head_width % 16 or hidden_width % 16:
        return f"heads of {head_width} or hidden states of {hidden_width} are no multiple of 16 wide"
    name = choose("decode_attention", tensor, refusal="it has no Triton kernel")
    return None if name == "native" else "there is no C++ for it"


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    prompt_keys: Tensor,
    prompt_values: Tensor,
    prompt_begin: Tensor,
    group: Tensor,
    keys: Tensor,
    values: Tensor,
    length: int,
    scale: float,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    epsilon: float = 0.0,
) -> Tensor:
    """softmax(scale q k^T) v of one token of S answers, over its prompt, the answer so far and itself.

    Args: ``query`` [S, heads x shared x D], ``key`` and ``value`` [S, heads x D] of this token, before norm and
    rotation. ``cos`` and ``sin`` [S, D] of its position, ``sin`` negative in the first half: x becomes
    x cos + roll(x, D / 2) sin. ``prompt_keys``, ``prompt_values`` [G, heads, P, D], rotated; prompt g begins at
    ``prompt_begin[g]`` (int64), what is before is padding; ``group`` [S] int64, an answer's prompt. ``keys``,
    ``values`` [S, heads, room, D] hold ``length`` tokens of each answer; this one's are written behind them.
    ``query_norm``, ``key_norm`` [D]: root mean square norms of the heads, with ``epsilon``. All float32 on the CPU,
    D a multiple of 16.

    Returns [S, heads x shared x D]. Raises RuntimeError for what does not fit together.
    """
    launched("decode_attention", "decode_attention")
    made: Tensor = torch.ops.rewardmap.decode_attention(
        query, key, value, cos, sin, prompt_keys, prompt_values, prompt_begin, group, keys, values, length, scale,
        query_norm, key_norm, epsilon,
    )  # fmt: skip
    return made


def add_norm_(hidden: Tensor, update: Tensor | None, weight: Tensor, epsilon: float) -> Tensor:
    """``hidden`` [N, H] += ``update``, if any; returns hidden / sqrt(mean(hidden^2) + epsilon) * weight, [N, H]."""
    made: Tensor = torch.ops.rewardmap.add_norm_(hidden, update, weight, epsilon)
    return made
