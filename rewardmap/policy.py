"""The policy: a Hugging Face vision-language model, its tokenizer and image processor, and the vision cache.

Works on any Qwen2.5-VL checkpoint, the tiny one of ``rewardmap.tiny`` included. torchvision is not needed: the image
processor is loaded by itself and image tokens are expanded here.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional
from transformers import AttentionInterface, AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import logging as transformers_logging

from rewardmap.config import ConfigError, PolicyConfig
from rewardmap.types import DataError, Problem
from rewardmap_kernels.tree_attention import tree_attention

transformers_logging.disable_progress_bar()  # its bars for loading and saving would cut through ours

Tensor = torch.Tensor
ATTENTION = "rewardmap"
"""Name of our attention function: packed forests when the caller passes ``tree_mask``, torch's SDPA otherwise."""


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A problem as the model sees it. P tokens, image tokens expanded."""

    token_ids: tuple[int, ...]
    """[P]"""
    position_ids: np.ndarray
    """[3, P] int64, Qwen's mRoPE (temporal, height, width)."""
    shared_length: int
    """Tokens up to the end of the image: equal for all questions about one map."""


@dataclass(frozen=True, slots=True)
class EncodedImage:
    pixel_values: Tensor
    """[patches, channels · temporal · patch · patch]"""
    grid_thw: tuple[int, int, int]


@dataclass
class Policy:
    """A model with everything needed to read a problem. Mutable only through the optimizer and its caches."""

    model: Any
    tokenizer: Any
    image_processor: Any
    freeze_vision: bool
    stop_token_ids: tuple[int, ...]
    banned_token_ids: tuple[int, ...]
    """Image and video placeholders: a sampled one would desynchronise tokens and features."""
    _images: dict[str | bytes, EncodedImage] = field(default_factory=dict)
    _features: dict[str | bytes, Tensor] = field(default_factory=dict)
    _prompts: dict[tuple[str, str | bytes], EncodedPrompt] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def text_model(self) -> Any:
        """The decoder without its head."""
        return self.model.model.language_model

    def image(self, source: str | bytes) -> EncodedImage:
        """Decode and resize one picture, once. Raises DataError with the path when it cannot be read."""
        if source not in self._images:
            out = self.image_processor(images=[read_image(source)], return_tensors="pt")
            self._images[source] = EncodedImage(out["pixel_values"], tuple(out["image_grid_thw"][0].tolist()))
        return self._images[source]

    def encode(self, problem: Problem) -> EncodedPrompt:
        """Chat template, image tokens expanded, mRoPE positions. Cached by uid and image."""
        key = (problem.uid, problem.image)
        if key not in self._prompts:
            self._prompts[key] = self._encode(problem)
        return self._prompts[key]

    def _encode(self, problem: Problem) -> EncodedPrompt:
        content = [{"type": "image"}, {"type": "text", "text": problem.question}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        config = self.model.config
        merge = config.vision_config.spatial_merge_size
        grid = self.image(problem.image).grid_thw
        image_tokens = grid[0] * grid[1] * grid[2] // merge**2
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        places = [index for index, token in enumerate(ids) if token == config.image_token_id]
        if len(places) != 1:
            raise DataError(
                f"{problem.uid}: the prompt holds {len(places)} image placeholders, expected 1; "
                "remove '<|image_pad|>' from the question"
            )
        place = places[0]
        ids[place : place + 1] = [config.image_token_id] * image_tokens
        positions = mrope_positions(len(ids), place, (grid[0], grid[1] // merge, grid[2] // merge))
        # The token after the image closes it and is the same for every question.
        return EncodedPrompt(tuple(ids), positions, place + image_tokens + 1)

    def image_features(self, sources: Sequence[str | bytes]) -> list[Tensor]:
        """Vision-tower outputs [image tokens, H], one per source, in order; a repeated source is computed once.

        With a frozen tower they are kept for the run; with a trainable one they carry gradients and are never kept.
        """
        distinct = list(dict.fromkeys(sources))
        missing = [source for source in distinct if source not in self._features]
        fresh: dict[str | bytes, Tensor] = {}
        if missing:
            images = [self.image(source) for source in missing]
            pixels = torch.cat([image.pixel_values for image in images]).to(self.device, self.model.dtype)
            grids = torch.tensor([image.grid_thw for image in images], device=self.device)
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_vision):
                outputs = self.model.model.get_image_features(pixels, grids).pooler_output
            fresh = dict(zip(missing, outputs, strict=True))
            if self.freeze_vision:
                self._features.update(fresh)
        return [fresh[source] if source in fresh else self._features[source] for source in sources]

    def forget_features(self) -> None:
        """Drop kept vision outputs; call after the tower's weights were replaced."""
        self._features.clear()

    def embed(self, token_ids: Tensor, features: Sequence[Tensor]) -> Tensor:
        """Token embeddings with image features written over the placeholders in order: [T] -> [T, H]."""
        embeds = self.text_model.embed_tokens(token_ids)
        if not features:
            return embeds
        at = (token_ids == self.model.config.image_token_id).nonzero().squeeze(1)
        return embeds.index_copy(0, at, torch.cat(list(features)).to(embeds.dtype))

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        """Write model (safetensors), configuration, tokenizer and image processor; ``transformers`` loads them."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)


def load_policy(source: str | Path, config: PolicyConfig) -> Policy:
    """Load a model folder or hub name with its tokenizer and image processor.

    Raises:
        ConfigError: not a Qwen2.5-VL checkpoint, or nothing loadable there.
    """
    from transformers import Qwen2VLImageProcessorPil

    device = torch.device(config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    try:
        model_config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ConfigError(f"policy.model='{source}': no model configuration there ({error})") from None
    if model_config.model_type != "qwen2_5_vl":
        raise ConfigError(f"policy.model='{source}' is a '{model_config.model_type}'; this version trains 'qwen2_5_vl'")
    model: Any = AutoModelForImageTextToText.from_pretrained(source, dtype=getattr(torch, config.dtype))
    model.to(device)
    tokenizer = AutoTokenizer.from_pretrained(source)
    pixels = {"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels}
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(source, size=pixels)
    return assemble(model, tokenizer, image_processor, config.freeze_vision)


def assemble(model: Any, tokenizer: Any, image_processor: Any, freeze_vision: bool) -> Policy:
    """Put loaded parts together and prepare the model for packed forests."""
    AttentionInterface.register(ATTENTION, _attention)
    model.model.language_model.config._attn_implementation = ATTENTION
    _linear_patch_embedding(model.model.visual.patch_embed)
    model.model.visual.requires_grad_(not freeze_vision)
    model.eval()  # no dropout anywhere; rollouts and updates see the same function
    stop = {tokenizer.eos_token_id, *_as_list(getattr(model.generation_config, "eos_token_id", None))} - {None}
    banned = (model.config.image_token_id, model.config.video_token_id)
    return Policy(model, tokenizer, image_processor, freeze_vision, tuple(sorted(stop)), banned)


def read_image(source: str | bytes) -> Image.Image:
    """A picture as RGB, from a path or encoded bytes. Raises DataError."""
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
            return picture.convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        name = "picture given as bytes" if isinstance(source, bytes) else source
        raise DataError(f"{name}: cannot be read as an image ({error})") from None


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


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    mask = kwargs.pop("tree_mask", None)
    if mask is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return tree_attention(query, key, value, mask, kwargs["scaling"]).transpose(1, 2), None


def _linear_patch_embedding(patch_embed: Any) -> None:
    """The patch convolution's stride equals its kernel, so it is a matrix product; conv3d is far slower on most
    backends."""

    def forward(patches: Tensor) -> Tensor:
        weight = patch_embed.proj.weight.flatten(1)
        return functional.linear(patches.to(weight.dtype).view(-1, weight.shape[1]), weight)

    patch_embed.forward = forward


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
