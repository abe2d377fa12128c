"""What the step bench trains on, equal for every arm: a seeded model, maps, questions, answers and rewards.

Also the arithmetic a step needs, by a formula of our own over visible pairs (``tests/test_bench_step.py`` holds its
linear part to torch's FLOP counter).
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

from rewardmap.policy import cast_weights
from rewardmap.tiny import build_tokenizer
from rewardmap.types import Problem, Rollout, RolloutGroup

PATCH, MERGE = 14, 2
SIDE = PATCH * MERGE
"""Pixels of one image token."""


@dataclass(frozen=True)
class Shape:
    """A Qwen2.5-VL of random weights."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    vision_layers: int
    vision_hidden: int
    vision_intermediate: int
    vision_full: tuple[int, ...]
    tied: bool = False


SHAPES = {
    "small": Shape(256, 4, 768, 4, 2, 4096, 2, 128, 256, (1,)),
    # Qwen2.5-VL-3B's published configuration.
    "3b": Shape(2048, 36, 11_008, 16, 2, 151_936, 32, 1280, 3420, (7, 15, 23, 31), tied=True),
}


@dataclass(frozen=True)
class Case:
    """``maps`` pictures, ``questions`` about each, ``group`` answers of ``response`` tokens to every question."""

    shape: str
    prompt: int
    response: int
    group: int = 8
    questions: int = 1
    maps: int = 1
    freeze_vision: bool = False
    checkpointing: bool = False
    timed: int = 3
    """Steps that are timed, after one that is not."""

    @property
    def image_grid(self) -> tuple[int, int]:
        """Image tokens (height, width): about 85 % of the prompt, whole rows."""
        width = int((0.85 * self.prompt) ** 0.5)
        return int(0.85 * self.prompt) // width, width

    @property
    def sequences(self) -> int:
        return self.maps * self.questions * self.group


CASES = {
    # Prompts, answers and their ratio of the cases below, scaled down by 12.5.
    "cpu": {
        "480+40": Case("small", 480, 40, maps=2),
        "160+40": Case("small", 160, 40),
        "1280+40": Case("small", 1280, 40, timed=2),
        "480+8": Case("small", 480, 8),
        "480+160": Case("small", 480, 160),
        "480+40, groups of 16": Case("small", 480, 40, group=16),
        "480+40, four questions a map": Case("small", 480, 40, questions=4, timed=2),
        "480+40, frozen tower": Case("small", 480, 40, freeze_vision=True),
    },
    "cuda": {
        f"{prompt}+{response}{f', groups of {group}' * (group != 8)}"
        f"{', four questions a map' * (questions > 1)}{', frozen tower' * frozen}":
        Case("3b", prompt, response, group, questions, freeze_vision=frozen, checkpointing=True)
        for prompt, response, group, questions, frozen in (
            (6000, 500, 8, 1, False), (6000, 500, 8, 1, True), (6000, 500, 8, 4, False), (2000, 500, 8, 1, False),
            (6000, 100, 8, 1, False), (16_000, 500, 8, 1, False), (6000, 2000, 8, 1, False), (6000, 500, 16, 1, False),
        )
    },
}  # fmt: skip


def arms_of(device: str, case: str) -> tuple[str, ...]:
    """All arms on the first case of a device; on the others ours, ours without sharing, and TRL."""
    return tuple(ARMS) if case == next(iter(CASES[device])) else ("ours", "without shared prefixes", "TRL")


def build_model(case: Case, device: str, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """(model, tokenizer, image processor), transformers' own classes; random weights, of seed 0 on that device."""
    shape = SHAPES[case.shape]
    tokenizer: Any = build_tokenizer()
    token: Any = tokenizer.convert_tokens_to_ids
    half = shape.hidden // shape.heads // 2
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": shape.vocab, "hidden_size": shape.hidden, "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads, "max_position_embeddings": 32_768, "bos_token_id": None,
            "eos_token_id": token("<|im_end|>"), "pad_token_id": token("<|endoftext|>"),
            "tie_word_embeddings": shape.tied,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e6, "mrope_section": [half // 4, half // 8 * 3, half // 8 * 3],
            },
        },
        vision_config={
            "depth": shape.vision_layers, "hidden_size": shape.vision_hidden,
            "intermediate_size": shape.vision_intermediate, "num_heads": shape.vision_hidden // 80 or 1,
            "out_hidden_size": shape.hidden, "patch_size": PATCH, "spatial_merge_size": MERGE,
            "temporal_patch_size": 2, "window_size": 112, "fullatt_block_indexes": list(shape.vision_full),
        } | ({"num_heads": 2} if case.shape == "small" else {}),
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=shape.tied,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = Qwen2_5_VLForConditionalGeneration(config)
    cast_weights(model, dtype)
    pixels = {"shortest_edge": SIDE**2, "longest_edge": 1 << 24}
    processor = Qwen2VLImageProcessorPil(patch_size=PATCH, temporal_patch_size=2, merge_size=MERGE, size=pixels)
    return model, tokenizer, processor


def build_problems(case: Case, tokenizer: Any) -> list[Problem]:
    """``maps`` times ``questions`` problems whose prompts take exactly ``case.prompt`` tokens."""
    height, width = case.image_grid
    template = tokenizer.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ""}]}],
        tokenize=False,
        add_generation_prompt=True,
    )
    own = len(tokenizer(template, add_special_tokens=False).input_ids) - 1 + height * width
    rng = np.random.default_rng(1)
    problems = []
    for place in range(case.maps):
        noise = rng.integers(0, 256, (height * SIDE, width * SIDE, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).save(file, format="PNG", compress_level=1)
        for number in range(case.questions):
            # One token a byte, and no phrase of the tokenizer's.
            text = "".join(rng.choice(list("qxzjk"), case.prompt - own))
            problems.append(
                Problem(f"map-{place}/{number}", file.getvalue(), text, "TorF1", 1, "", "", f"m/{place}", "easy")
            )
    return problems


def build_answers(case: Case, problems: list[Problem], stop: int) -> tuple[list[RolloutGroup], np.ndarray]:
    """(groups without prompts or log-probabilities worth the name, rewards [sequences])."""
    rng = np.random.default_rng(2)
    groups = []
    for problem in problems:
        rollouts = []
        for _ in range(case.group):
            tokens = (*rng.integers(0, 256, case.response - 1).tolist(), stop)
            rollouts.append(Rollout(tokens, (0.0,) * len(tokens), "", "stop", 0))
        groups.append(RolloutGroup(problem, (), tuple(rollouts)))
    return groups, rng.random(case.sequences)


@dataclass(frozen=True)
class Work:
    """What of a step is computed how often."""

    shared: bool
    """Every prefix once, else every sequence by itself."""
    tower_per_sample: bool
    head_on_all: bool
    old_pass: bool
    """A forward for log-probabilities of the sampling policy before the update."""


ARMS = {
    "ours": Work(True, False, False, False),
    "without shared prefixes": Work(False, False, False, False),
    "without response rows": Work(True, False, True, False),
    "without the on-policy shortcut": Work(True, False, False, True),
    "without shared prefixes, tower per sample": Work(False, True, False, False),
    "without any": Work(False, True, True, True),
    "TRL": Work(False, True, False, False),
}
"""Ours, ours with less, and without any saving: the way verl and EasyR1 compute a step."""


def flop(case: Case, work: Work) -> dict[str, float]:
    """FLOP of a step: 2 per multiply-add, visible pairs only, backward twice the forward (once the part that leads to
    no trainable weight), recomputation one forward more.

    Returns:
        decoder, attention, head, vision and their sum, total.
    """
    shape = SHAPES[case.shape]
    dim = shape.hidden // shape.heads
    groups = case.maps * case.questions
    inputs = case.response - 1  # the last token of an answer is only ever a target
    image = case.image_grid[0] * case.image_grid[1]
    # Everything before the question's own tokens is shared by the questions about a map.
    question = case.prompt - _own_before(case)
    if work.shared:
        tokens = case.maps * (case.prompt - question) + groups * question + case.sequences * inputs
        pairs = (
            case.maps * _causal(case.prompt - question)
            + groups * (_causal(case.prompt) - _causal(case.prompt - question))
            + case.sequences * (_causal(case.prompt + inputs) - _causal(case.prompt))
        )
    else:
        tokens = case.sequences * (case.prompt + inputs)
        pairs = case.sequences * _causal(case.prompt + inputs)
    layer = shape.hidden * dim * 2 * (shape.heads + shape.kv_heads) + 3 * shape.hidden * shape.intermediate
    passes = 3 + case.checkpointing + work.old_pass
    rows = tokens if work.head_on_all else case.sequences * case.response
    patches = image * MERGE**2
    width = shape.vision_hidden
    windowed = shape.vision_layers - len(shape.vision_full)
    embedding = 2 * patches * 3 * 2 * PATCH**2 * width
    blocks = 2 * patches * shape.vision_layers * (4 * width**2 + 3 * width * shape.vision_intermediate)
    blocks += 4 * width * (len(shape.vision_full) * patches**2 + windowed * patches * 64)
    wide = width * MERGE**2
    tower = embedding + blocks + 2 * image * (wide * wide + wide * shape.hidden)
    if case.freeze_vision:
        vision = tower * case.sequences * (1 + work.old_pass) if work.tower_per_sample else 0
    else:
        # Pixels have no gradient: the embedding's backward is one product.
        times = case.sequences if work.tower_per_sample else case.maps
        vision = times * (3 * tower - embedding + blocks * case.checkpointing + tower * work.old_pass)
    parts = {
        "decoder": 2.0 * shape.layers * layer * tokens * passes,
        "attention": 4.0 * shape.layers * shape.hidden * pairs * passes,
        "head": 2.0 * rows * shape.hidden * shape.vocab * (3 + work.old_pass),
        "vision": float(vision),
    }
    return parts | {"total": sum(parts.values())}


def _causal(tokens: int) -> int:
    return tokens * (tokens + 1) // 2


def _own_before(case: Case) -> int:
    """Tokens of a prompt up to the first of its question: a start, its role, the picture between two marks."""
    return 2 + 1 + case.image_grid[0] * case.image_grid[1] + 1
