"""The tiny policy: Qwen2.5-VL's own classes in a size that learns on a laptop, with a tokenizer made for our questions.

Everything that follows (processor, forest, engine, trainer) treats it as any other Qwen2.5-VL checkpoint.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, pre_tokenizers
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
)

from rewardmap.policy import Policy, assemble
from rewardmap.transit.questions import gold_response, question_text
from rewardmap.types import KINDS, Problem

WARM_START = Path(__file__).parent / "assets" / "tiny"
"""The shipped warm start: a complete checkpoint folder."""

_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_WORDS = ("yes", "no", "Red Line", "Blue Line", "Green Line", "user\n", "assistant\n")
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SLOT = "\0"


def build_tiny(seed: int, freeze_vision: bool) -> Policy:
    """A randomly initialised tiny policy; ``seed`` decides its weights."""
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(model_config(tokenizer))
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=14,
        temporal_patch_size=2,
        merge_size=2,
        size={"shortest_edge": 3136, "longest_edge": 12_845_056},
    )
    return assemble(model, tokenizer, image_processor, freeze_vision)


def model_config(tokenizer: Any) -> Qwen2_5_VLConfig:
    """About 0.9 M parameters: 3 layers of width 128, a vision tower of one layer of width 64, an untied head."""
    token = tokenizer.convert_tokens_to_ids
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 4096,
            "initializer_range": 0.08,
            "bos_token_id": None,
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "out_hidden_size": 128,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [0],
            "initializer_range": 0.08,
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=False,
    )


def build_tokenizer() -> Qwen2Tokenizer:
    """Qwen's byte-level tokenizer without merges: any text encodes, and the phrases of our templates are one token
    each."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(
        vocab={symbol: index for index, symbol in enumerate(alphabet)},
        merges=[],
        unk_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(_SPECIAL),
    )
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in phrases()])
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def phrases() -> list[str]:
    """The fixed text between the slots of every question and every ideal answer, and the words that fill slots."""
    texts = [question_text(kind, f"{_SLOT} Station", _slot_2(kind), [_SLOT] * 4) for kind in KINDS]  # type: ignore[list-item]
    texts += [re.sub(r"(?<={)\w+(?=})", _SLOT, gold_response(_problem(kind))) for kind in KINDS]
    return sorted({piece for text in texts for piece in text.split(_SLOT) if len(piece) > 1} | set(_WORDS))


def _slot_2(kind: str) -> str:
    return _SLOT if kind == "TorF2" else f"{_SLOT} Station"


def _problem(kind: str) -> Problem:
    leg = {"route_name": _SLOT, "departure_stop": f"{_SLOT} Station", "arrival_stop": f"{_SLOT} Station"}
    return Problem("", "", "", kind, 1, "", "", "", "easy", fine_grained_answer=[[leg, leg]])
