"""The policy: a Hugging Face vision-language model, its tokenizer and image processor, and what it has seen.

Works on Qwen2.5-VL and Qwen3-VL checkpoints, the tiny ones of ``rewardmap.tiny`` included, and takes packed forests
of Qwen2 and Qwen3 text models. torchvision is not needed: the image processor is loaded by itself and image tokens are
expanded here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.utils import logging as transformers_logging

from rewardmap.config import ConfigError, PolicyConfig
from rewardmap.families import VISION_MODELS, head_dim, mrope_positions, take_forests
from rewardmap.types import DataError, Problem
from rewardmap.vision import (
    Bounded,
    EncodedImage,
    FeatureCache,
    ImageFeatures,
    ImageInfo,
    ImageStore,
    Keep,
    to_device,
)
from rewardmap_kernels.tree_routes import describe

transformers_logging.disable_progress_bar()  # its bars for loading and saving would cut through ours

Tensor = torch.Tensor
IMAGE_TOKEN = "<|image_pad|>"
"""The placeholder of a picture in prompts of all known families."""
PATCHES_AT_ONCE = 65_536
"""Patches of pictures that go through a trainable tower side by side, unless one picture has more."""


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A problem as the model sees it. P tokens, image tokens expanded."""

    token_ids: tuple[int, ...]
    """[P]"""
    position_ids: np.ndarray
    """[3, P] int64, Qwen's mRoPE (temporal, height, width)."""
    image_tokens: int = 0
    """How many of them the picture takes."""
    uid: str = ""
    """The problem's; errors name it."""


@dataclass
class Policy:
    """A model with everything needed to read a problem. Mutable only through the optimizer and its caches."""

    model: Any
    tokenizer: Any
    image_processor: Any
    freeze_vision: bool
    stop_token_ids: tuple[int, ...]
    """The tokenizer's own, which ends a given answer, and those at which an engine stops besides."""
    banned_token_ids: tuple[int, ...]
    """Image and video placeholders: a sampled one would desynchronise tokens and features."""
    _images: ImageStore
    _features: FeatureCache
    _prompts: Bounded[EncodedPrompt] = field(
        default_factory=lambda: Bounded(1 << 30, lambda prompt: prompt.position_ids.nbytes * 2)
    )
    compute_device: torch.device | None = None
    """Where the model computes when its weights rest elsewhere (offload)."""
    whole_weights: Callable[[], AbstractContextManager[None]] = nullcontext
    """Inside it every weight is whole on every rank: for calls of the model that ranks make at their own pace."""

    @property
    def device(self) -> torch.device:
        return self.compute_device or self.model.device

    @property
    def text_model(self) -> Any:
        """The decoder without its head."""
        return getattr(self.model.model, "language_model", self.model.model)

    @property
    def head_dim(self) -> int:
        """Of the decoder's attention."""
        return head_dim(self.text_model.config)

    def describe_attention(self, dtype: torch.dtype) -> str:
        """One line for people: what computes attention in ``dtype`` on this policy's device."""
        tower = self.vision_tower
        return describe(self.device, dtype, self.head_dim, tower.config.hidden_size // tower.config.num_heads)

    @property
    def vision_tower(self) -> Any:
        """None for a text model."""
        return getattr(self.model.model, "visual", None)

    def image(self, source: str | bytes) -> EncodedImage:
        """Decode and resize one picture, once. Raises DataError with the path when it cannot be read."""
        return self._images.get(source)

    def image_info(self, source: str | bytes) -> ImageInfo:
        """Grid and digest of one picture, without its pixels. Raises as ``image``."""
        return self._images.info(source)

    def prefetch(self, problems: Sequence[Problem]) -> None:
        """Begin to decode the pictures of problems that come next, in threads; returns at once. What a frozen tower has
        seen is not decoded again."""
        self._images.prefetch([problem.image for problem in problems if not self._is_seen(problem.image)])

    def _is_seen(self, source: str | bytes) -> bool:
        known = self._images.known(source)
        return self.freeze_vision and known is not None and known.digest in self._features

    def share_pictures(self, keep: Keep, begin: float) -> None:
        """``ImageStore.share``."""
        self._images.share(keep, begin)

    def encode(self, problem: Problem) -> EncodedPrompt:
        """Chat template, image tokens expanded, mRoPE positions. Cached by uid, question and pixels.

        Raises:
            DataError: an unreadable picture, a question that holds an image placeholder.
            ConfigError: the policy is a text model; see ``encode_text``.
        """
        if self.vision_tower is None:
            raise ConfigError(
                f"{problem.uid}: a '{self.model.config.model_type}' cannot see the map; choose a policy.model of "
                f"{', '.join(VISION_MODELS)}"
            )
        key = (problem.uid, problem.question, self.image_info(problem.image).digest)
        found = self._prompts.get(key)
        if found is None:
            found = self._encode(problem)
            self._prompts.put(key, found)
        return found

    def bound(self, problem: Problem) -> int:
        """Tokens that ``encode`` makes of a problem at most, without pixels or tokenizer: those of the picture, by its
        header, and one for each byte of the text, which composing its characters at most makes three times as long.

        Raises:
            DataError: see ``encode``.
        """
        image = self._images.count(problem.image) // self.model.config.vision_config.spatial_merge_size**2
        return image + 3 * len(self._text(problem).encode())

    def encode_text(self, text: str, uid: str = "") -> EncodedPrompt:
        """A prompt without a picture, in the chat template."""
        message = [{"role": "user", "content": text}]
        whole = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(whole, add_special_tokens=False).input_ids
        positions = np.broadcast_to(np.arange(len(ids)), (3, len(ids)))
        return EncodedPrompt(tuple(ids), positions, uid=uid)

    def _encode(self, problem: Problem) -> EncodedPrompt:
        config = self.model.config
        merge = config.vision_config.spatial_merge_size
        info = self.image_info(problem.image)
        grid, image_tokens = info.grid_thw, info.patches // merge**2
        ids: list[int] = self.tokenizer(self._text(problem), add_special_tokens=False).input_ids
        place = ids.index(config.image_token_id)
        ids[place : place + 1] = [config.image_token_id] * image_tokens
        positions = mrope_positions(len(ids), place, (grid[0], grid[1] // merge, grid[2] // merge))
        return EncodedPrompt(tuple(ids), positions, image_tokens, problem.uid)

    def _text(self, problem: Problem) -> str:
        """In the chat template, with one placeholder for the picture."""
        content = [{"type": "image"}, {"type": "text", "text": problem.question}]
        message = [{"role": "user", "content": content}]
        text: str = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        if text.count(IMAGE_TOKEN) != 1:
            raise DataError(
                f"{problem.uid}: the prompt holds {text.count(IMAGE_TOKEN)} image placeholders, expected 1; "
                f"remove '{IMAGE_TOKEN}' from the question"
            )
        return text

    def image_features(self, sources: Sequence[str | bytes]) -> list[ImageFeatures]:
        """Vision-tower outputs, one per source, in order; a repeated source is computed once.

        With a frozen tower they are kept while its weights are the same; with a trainable one they carry gradients and
        are never kept.
        """
        infos = {source: self.image_info(source) for source in dict.fromkeys(sources)}
        if not infos:
            return []
        found: dict[str | bytes, ImageFeatures] = {}
        if self.freeze_vision:
            self._features.open(self.vision_tower)
            kept = {source: self._features.get(info.digest, self.device) for source, info in infos.items()}
            found = {source: features for source, features in kept.items() if features is not None}
        missing = {source: info.patches for source, info in infos.items() if source not in found}
        # What is kept must not depend, in its last bits, on which pictures happened to be missing together.
        for chosen in _side_by_side(missing, 0 if self.freeze_vision else PATCHES_AT_ONCE):
            images = [self.image(source) for source in chosen]  # no more pixels at a time than the tower takes
            fresh = self._see(images)
            found |= dict(zip(chosen, fresh, strict=True))
            if self.freeze_vision:
                for digest, features in zip([image.digest for image in images], fresh, strict=True):
                    self._features.put(digest, features)
        return [found[source] for source in sources]

    def blank_features(self) -> ImageFeatures:
        """The tower's outputs for the smallest blank picture: what a rank without pictures computes so that it takes
        part in the collectives of a sharded tower."""
        vision = self.model.config.vision_config
        merge = vision.spatial_merge_size
        pixels = torch.zeros(merge**2, vision.in_channels, vision.patch_size**2, dtype=torch.uint8)
        return self._see([EncodedImage(pixels, (1, merge, merge), b"")])[0]

    def pixel_values(self, images: Sequence[EncodedImage]) -> Tensor:
        """What the processor makes of pictures, end to end, as the tower takes it: [patches, ...] on its device."""
        pixels = torch.cat([to_device(image.pixels, self.device) for image in images])
        return self._images.patches.values(pixels, self.vision_tower.dtype)

    def _see(self, images: Sequence[EncodedImage]) -> list[ImageFeatures]:
        grids = to_device(torch.tensor([image.grid_thw for image in images]), self.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_vision):
            out = self.model.model.get_image_features(self.pixel_values(images), grids)
        sizes = [len(merged) for merged in out.pooler_output]
        # Picture by picture, or in older releases of transformers all of a level in one piece.
        deep = [
            level.split(sizes) if isinstance(level, Tensor) else level
            for level in getattr(out, "deepstack_features", None) or []
        ]
        return [ImageFeatures(merged, tuple(levels)) for merged, *levels in zip(out.pooler_output, *deep, strict=True)]

    def text_inputs(self, token_ids: Tensor, features: Sequence[ImageFeatures]) -> dict[str, Any]:
        """What the decoder takes of [B, T] tokens and their pictures, in the order of their placeholders:
        ``inputs_embeds`` [B, T, H] and, for Qwen3-VL, its deep features.

        Args:
            token_ids: on the host, where their placeholders are found without waiting for the device.

        Raises:
            ValueError: placeholders and features do not match.
        """
        embeds = self.text_model.embed_tokens(to_device(token_ids, self.device))
        if not features:
            return {"inputs_embeds": embeds}
        at = (token_ids.view(-1) == self.model.config.image_token_id).nonzero().squeeze(1)
        merged = torch.cat([one.merged for one in features])
        if len(at) != len(merged):
            raise ValueError(f"{len(at)} image placeholders for {len(merged)} image features")
        places, shape = to_device(at, self.device), embeds.shape
        inputs: dict[str, Any] = {
            "inputs_embeds": embeds.view(-1, shape[-1]).index_copy(0, places, merged.to(embeds.dtype)).view(shape)
        }
        if features[0].deep:
            inputs["visual_pos_masks"] = places  # for ``_add_deep_features``
            inputs["deepstack_visual_embeds"] = [
                torch.cat(level) for level in zip(*(seen.deep for seen in features), strict=True)
            ]
        return inputs

    def positions(self, mrope: Tensor) -> Tensor:
        """Positions [3, B, T] as the decoder takes them: a text model wants one axis, [B, T]."""
        return mrope[0] if self.vision_tower is None else mrope

    def frozen_copy(self) -> Policy:
        """The same policy with weights of its own that nothing trains; pictures are shared."""
        model = copy.deepcopy(self.model).requires_grad_(False)
        return replace(self, model=model, freeze_vision=True, _features=FeatureCache(self._features.limit))

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)

    def save(self, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        """Write model (safetensors), configuration, tokenizer and image processor; ``transformers`` loads them.

        Args:
            weights: by the names of the model's state; None: the model's own.
        """
        self.model.save_pretrained(folder, state_dict=weights)
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)


def load_policy(source: str | Path, config: PolicyConfig) -> Policy:
    """Load a model folder or hub name with its tokenizer and image processor.

    Raises:
        ConfigError: not a checkpoint of a family that can be trained on maps, or not a whole one.
    """
    from transformers import Qwen2VLImageProcessorPil

    name = f"policy.model='{source}'"
    model_config = read_model_config(source)
    if model_config.model_type not in VISION_MODELS:
        raise ConfigError(f"{name} is a '{model_config.model_type}'; maps are read by {', '.join(VISION_MODELS)}")
    device = pick_device(config)
    pixels = {"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels}
    remedy = "copy or download the whole checkpoint: weights, tokenizer and image processor"
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        # Published processors name the older pair too, which would go before ``size``.
        processor = Qwen2VLImageProcessorPil.from_pretrained(source, size=pixels, min_pixels=None, max_pixels=None)
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            source, dtype=getattr(torch, config.dtype), output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{name} cannot be loaded ({error}); {remedy}") from None
    model, report = loaded
    # transformers draws missing weights at random, and makes a tokenizer of its special tokens where there is none.
    if missing := sorted(report["missing_keys"]):
        raise ConfigError(f"{name} lacks {len(missing)} of the model's weights, the first '{missing[0]}'; {remedy}")
    image_token = model_config.image_token_id
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) != image_token:
        raise ConfigError(f"{name}: '{IMAGE_TOKEN}' is not its tokenizer's token {image_token}; {remedy}")
    return assemble(model.to(device), tokenizer, processor, config.freeze_vision, config.image_cache_bytes)


def read_model_config(source: str | Path) -> Any:
    """The transformers configuration of a model folder or hub name. Raises ConfigError when there is none."""
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ConfigError(f"policy.model='{source}': no model configuration there ({error})") from None


def pick_device(config: PolicyConfig) -> torch.device:
    """The configured device; ``auto`` is this process's GPU where there is one."""
    if config.device != "auto":
        try:
            device = torch.device(config.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"policy.device='{config.device}': {reason}; choose auto, cpu or cuda") from None
        return device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def assemble(
    model: Any, tokenizer: Any, image_processor: Any, freeze_vision: bool, cache_bytes: int = 8 << 30
) -> Policy:
    """Put loaded parts together and prepare the model for packed forests.

    Args:
        image_processor: None for a text model.
        cache_bytes: decoded pictures kept at most, and as many of vision outputs.

    Raises:
        ConfigError: a model that cannot take forests, see ``take_forests``.
    """
    take_forests(model)
    banned: tuple[int, ...] = ()
    if hasattr(model.model, "visual"):
        model.model.visual.requires_grad_(not freeze_vision)
        banned = (model.config.image_token_id, model.config.video_token_id)
    model.eval()  # no dropout anywhere; rollouts and updates see the same function
    others = _as_list(getattr(model.generation_config, "eos_token_id", None))
    stop = dict.fromkeys(one for one in (tokenizer.eos_token_id, *others) if one is not None)
    images, features = ImageStore(image_processor, cache_bytes), FeatureCache(cache_bytes)
    return Policy(model, tokenizer, image_processor, freeze_vision, tuple(stop), banned, images, features)


def cast_weights(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """The module's weights in ``dtype``. Its buffers stay as they are, as in a checkpoint that is loaded in ``dtype``:
    rounded rotary frequencies would turn positions by a multiple of their error."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


def _side_by_side(patches: dict[str | bytes, int], patches_at_once: int) -> list[list[str | bytes]]:
    """Split pictures into runs of at most so many patches, or of one picture."""
    runs: list[list[str | bytes]] = []
    used = 0
    for source, count in patches.items():
        used += count
        if not runs or used > patches_at_once:
            runs.append([])
            used = count
        runs[-1].append(source)
    return runs


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
