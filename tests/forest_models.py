"""Tiny models of every family that takes packed forests, random forests, and the law they are held to."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLImageProcessorPil,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from rewardmap.policy import EncodedPrompt, Policy, assemble
from rewardmap.tiny import build_tiny, build_tokenizer
from rewardmap.train.forest import Answers
from rewardmap.transit.draw import draw_map, encode_png
from rewardmap.transit.generate import generate_network
from rewardmap.types import Problem

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen2", "qwen3")
PICTURES = [encode_png(draw_map(generate_network("tiny-middle", np.random.default_rng(i), f"a/{i}"))) for i in range(2)]


def build(family: str, freeze_vision: bool = True, dtype: torch.dtype = torch.float64) -> Policy:
    """Grouped-query heads, several layers, random weights."""
    if family == "qwen2_5_vl":
        policy = build_tiny(3, freeze_vision)
    else:
        tokenizer = build_tokenizer()
        torch.manual_seed(3)
        model = {"qwen3_vl": _qwen3_vl, "qwen2": _qwen2, "qwen3": _qwen3}[family](tokenizer)
        processor = Qwen2VLImageProcessorPil(
            patch_size=16, temporal_patch_size=2, merge_size=2, size={"shortest_edge": 4096, "longest_edge": 1 << 20}
        )
        policy = assemble(model, tokenizer, processor if family == "qwen3_vl" else None, freeze_vision)
    policy.model.to(dtype)
    return policy


def _text(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.2,
        "max_position_embeddings": 4096, "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"), "pad_token_id": 0,
        "tie_word_embeddings": False,
    }  # fmt: skip


def _qwen2(tokenizer: Any) -> Any:
    return Qwen2ForCausalLM(Qwen2Config(**_text(tokenizer)))


def _qwen3(tokenizer: Any) -> Any:
    return Qwen3ForCausalLM(Qwen3Config(**_text(tokenizer)))


def _qwen3_vl(tokenizer: Any) -> Any:
    token = tokenizer.convert_tokens_to_ids
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            text_config=_text(tokenizer)
            | {
                "rope_parameters": {
                    "rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True,
                }
            },
            vision_config={
                "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
                "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0, 2], "initializer_range": 0.2,
            },
            image_token_id=token("<|image_pad|>"),
            video_token_id=token("<|video_pad|>"),
            vision_start_token_id=token("<|vision_start|>"),
            vision_end_token_id=token("<|vision_end|>"),
            tie_word_embeddings=False,
        )
    )  # fmt: skip


def random_batch(policy: Policy, rng: np.random.Generator, prompts: int = 3) -> list[Answers]:
    """Prompts about one of two pictures or about none, each with 1 to 3 answers of 1 to 8 tokens; some answers begin
    alike, and some have a second turn, whose told tokens do not train."""
    batch: list[Answers] = []
    number = 0
    for place in range(prompts):
        text = "who? " * int(rng.integers(0, 3)) + "why"
        prompt, image = _prompt(policy, text, place, rng)
        answers, masks = [], []
        start = rng.integers(0, 200, 3).tolist()
        for _ in range(int(rng.integers(1, 4))):
            answer = start[: int(rng.integers(0, 4))] + rng.integers(0, 200, int(rng.integers(1, 5))).tolist()
            mask = [True] * len(answer)
            if rng.random() < 0.4:
                told, more = (rng.integers(0, 200, int(rng.integers(1, 4))).tolist() for _ in range(2))
                answer, mask = answer + told + more, mask + [False] * len(told) + [True] * len(more)
            answers.append(tuple(answer))
            masks.append(tuple(mask))
        numbers = tuple(range(number, number + len(answers)))
        number += len(answers)
        batch.append(Answers(prompt, image, tuple(answers), numbers, None, tuple(masks)))
    return batch


def _prompt(policy: Policy, text: str, place: int, rng: np.random.Generator) -> tuple[EncodedPrompt, bytes | None]:
    if policy.vision_tower is None or rng.random() < 0.2:
        return policy.encode_text(text, f"q{place}"), None
    image = PICTURES[int(rng.integers(2))]
    return policy.encode(Problem(f"q{place}", image, text, "TorF1", 1, "", "", "a/b", "easy")), image


def unshared_logprobs(policy: Policy, batch: list[Answers]) -> dict[int, torch.Tensor]:
    """The law: transformers' own forward on one sequence at a time. Log-probabilities of trained tokens, by sequence,
    in float32 at least."""
    rows = {}
    for item in batch:
        masks = item.loss_masks or [(True,) * len(response) for response in item.responses]
        for number, response, mask in zip(item.sequences, item.responses, masks, strict=True):
            ids = torch.tensor([[*item.prompt.token_ids, *response]], device=policy.device)
            seen: dict[str, Any] = {}
            if item.image is not None:
                image = policy.image(item.image)
                seen = {
                    "pixel_values": policy.pixel_values([image]),
                    "image_grid_thw": torch.tensor([image.grid_thw], device=policy.device),
                    "mm_token_type_ids": (ids == policy.model.config.image_token_id).int(),
                }
            logits = policy.model(input_ids=ids, **seen).logits[0, -len(response) - 1 : -1]
            if logits.dtype.itemsize == 2:
                logits = logits.float()
            target = torch.tensor(response, device=policy.device)[:, None]
            rows[number] = torch.log_softmax(logits, -1).gather(-1, target).squeeze(1)[torch.tensor(mask)]
    return rows


def gradients(policy: Policy) -> dict[str, torch.Tensor]:
    """Gradients by parameter, float64; they are cleared."""
    found = {name: p.grad.double() for name, p in policy.model.named_parameters() if p.grad is not None}
    policy.model.zero_grad()
    return found
