"""The model families that are known here, and what their transformers code needs to take packed forests.

Attention under a forest's mask, the vision tower's attention in one call, its patch embedding as a matrix product,
Qwen3-VL's deep features without waiting for the GPU, and mRoPE positions.
"""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rewardmap.config import ConfigError
from rewardmap_kernels.tree_attention import TreeMask, segment_attention, tree_attention

Tensor = torch.Tensor
ATTENTION = "rewardmap"
"""Name of our attention function: packed forests when the caller passes ``tree_mask``, torch's SDPA otherwise."""
TOWER_ATTENTION = "rewardmap_flash"
"""That of vision towers on a GPU: transformers hands all segments at once to what is called flash."""
VISION_MODELS, TEXT_MODELS = ("qwen2_5_vl", "qwen3_vl"), ("qwen2", "qwen3")


def take_forests(model: Any) -> None:
    """Make a model's forward pass that of packed forests as well.

    Raises:
        ConfigError: attention that a forest's mask cannot express (sliding windows, linear attention), or a family
            whose forward pass is not known here.
    """
    _check(model.config)
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)  # plain padded batches keep their mask
    decoder = getattr(model.model, "language_model", model.model)
    decoder.config._attn_implementation = ATTENTION
    if hasattr(decoder, "_deepstack_process"):
        decoder._deepstack_process = _add_deep_features
    if hasattr(model.model, "visual"):
        linear_patch_embedding(model.model.visual.patch_embed)
        if torch.cuda.is_available():
            attend_at_once(model.model.visual)


def _check(config: Any) -> None:
    """Raises ConfigError for a model that would compute something else on a packed forest."""
    text = getattr(config, "text_config", config)
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"]) - {"full_attention"}
    if getattr(text, "use_sliding_window", False) and getattr(text, "sliding_window", None):
        kinds.add("sliding_attention")
    if kinds:
        raise ConfigError(
            f"'{config.model_type}' with {', '.join(sorted(kinds))}: prefixes can be shared under full attention only"
        )
    if config.model_type not in VISION_MODELS + TEXT_MODELS:
        raise ConfigError(
            f"'{config.model_type}' cannot be trained; known are {', '.join(VISION_MODELS + TEXT_MODELS)}"
        )


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    mask: TreeMask | None = kwargs.pop("tree_mask", None)
    if mask is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return tree_attention(query, key, value, mask, kwargs["scaling"]).transpose(1, 2), None


def attend_at_once(tower: torch.nn.Module) -> None:
    """All windows of all pictures in one call of a tower's attention, for a GPU."""
    AttentionInterface.register(TOWER_ATTENTION, _tower_attention)
    tower.config._attn_implementation = TOWER_ATTENTION  # type: ignore[union-attr]


def _tower_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **kwargs: Any
) -> tuple[Tensor, None]:
    segments = kwargs["cu_seq_lens_q"], int(kwargs["max_length_q"])  # a tensor in some releases of transformers
    return segment_attention(query, key, value, *segments, kwargs["scaling"]).transpose(1, 2), None


def linear_patch_embedding(patch_embed: Any) -> None:
    """The patch convolution's stride equals its kernel, so it is a matrix product; conv3d is far slower on most
    backends."""

    def forward(self: Any, patches: Tensor) -> Tensor:
        weight = self.proj.weight.flatten(1)
        return functional.linear(patches.to(weight.dtype).view(-1, weight.shape[1]), weight, self.proj.bias)

    patch_embed.forward = types.MethodType(forward, patch_embed)  # bound, so that a copy computes with its own weights


def _add_deep_features(hidden: Tensor, places: Tensor, features: Tensor) -> Tensor:
    """hidden [B, T, H] plus features [N, H] at places [N] of its B·T rows. transformers gives a mask [B, T] of bool, of
    which a GPU's host waits to hear how many places it holds, several times a micro-batch."""
    if places.dtype == torch.bool:
        places = places.to(hidden.device).view(-1).nonzero().squeeze(1)
    rows = hidden.view(-1, hidden.shape[-1])
    return rows.index_add(0, places, features.to(hidden.dtype)).view_as(hidden)


def head_dim(text: Any) -> int:
    """Of the attention of a decoder with this configuration."""
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def mrope_positions(length: int, image_start: int, grid: tuple[int, int, int]) -> np.ndarray:
    """mRoPE positions [3, length] of text, one image of ``grid`` (temporal, height, width) merged patches, text.

    Qwen2-VL (arXiv 2409.12191) section 2.1: text counts up on all three axes, the image spans its grid, and the text
    after it starts one past the largest position used.
    """
    positions = np.empty((3, length), dtype=np.int64)
    tokens = grid[0] * grid[1] * grid[2]
    positions[:, :image_start] = np.arange(image_start)
    positions[:, image_start : image_start + tokens] = np.indices(grid).reshape(3, -1) + image_start
    after = length - image_start - tokens
    positions[:, image_start + tokens :] = np.arange(after) + image_start + max(grid)
    return positions
