"""The real TRL on a tiny vision-language model, one to three pictures a prompt. Skipped where trl is not installed."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if importlib.util.find_spec("trl") is None:
    pytest.skip("trl is not installed", allow_module_level=True)
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import trl
from datasets import Dataset
from PIL import Image
from transformers import (
    ProcessorMixin,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
)

from rewardmap.tiny import build_tokenizer, model_config
from rewardmap_kernels import last_path
from rewardmap_kernels.integrations.trl import fuse_grpo


class Processor(Qwen2_5_VLProcessor):
    """Without videos, whose processor needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def processor() -> Processor:
    tokenizer = build_tokenizer()
    tokenizer.padding_side = "left"
    pictures = Qwen2VLImageProcessorPil(
        patch_size=14, temporal_patch_size=2, merge_size=2, size={"shortest_edge": 3136, "longest_edge": 1 << 20}
    )
    return Processor(pictures, tokenizer, chat_template=tokenizer.chat_template)


def question(number: int, pictures: int) -> dict[str, Any]:
    g = np.random.default_rng(number)
    images = [Image.fromarray(g.integers(0, 255, (84, 56 + 28 * i, 3), dtype=np.uint8)) for i in range(pictures)]
    return {"prompt": [{"role": "user", "content": f"count {number}"}], "images": images}


def distinct(completions: list[Any], **_: Any) -> list[float]:
    return [float(len(set(completion[0]["content"]))) for completion in completions]


Parameters = list[torch.Tensor]


def run(folder: Path, fused: bool, **options: Any) -> tuple[Parameters, Parameters, list[dict[str, Any]]]:
    """The parameters before and after two optimizer steps, and the log."""
    torch.manual_seed(0)
    taker = processor()
    Qwen2_5_VLForConditionalGeneration(model_config(taker.tokenizer)).save_pretrained(folder / "model")
    trainer = trl.GRPOTrainer(
        model=Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "model"),
        reward_funcs=distinct,
        args=trl.GRPOConfig(
            output_dir=str(folder), per_device_train_batch_size=4, num_generations=2, max_completion_length=5,
            max_steps=2, learning_rate=0.05, logging_steps=1, report_to=[], use_cpu=True, bf16=False,
            gradient_accumulation_steps=2, save_strategy="no", seed=3, disable_tqdm=True, temperature=0.9, optim="sgd",
            gradient_checkpointing=False, dataloader_pin_memory=False, **options,
        ),
        train_dataset=Dataset.from_list([question(i, count) for i, count in enumerate((1, 2, 3, 1, 2, 2, 1, 1))]),
        processing_class=taker,
    )  # fmt: skip
    before = [p.detach().clone() for p in trainer.model.parameters()]
    if fused:
        fuse_grpo(trainer)
    trainer.train()
    return before, [p.detach() for p in trainer.model.parameters()], trainer.state.log_history


@pytest.mark.parametrize(
    "options", [{"loss_type": "dapo"}, {"loss_type": "grpo", "beta": 0.1}], ids=["dapo", "grpo, reference"]
)
def test_a_fused_trainer_takes_trl_s_steps_with_pictures(options: dict[str, Any], tmp_path: Path) -> None:
    start, plain, plain_log = run(tmp_path / "a", False, **options)
    _, fused, fused_log = run(tmp_path / "b", True, **options)
    assert last_path("linear_policy_loss") is not None
    torch.testing.assert_close(fused, plain, rtol=2e-4, atol=2e-6)
    assert all(not torch.equal(a, b) for a, b in zip(start, plain, strict=True))  # the vision tower's, too
    for a, b in zip(plain_log, fused_log, strict=True):
        for key in a.keys() & {"loss", "grad_norm", "entropy", "kl", "reward"}:
            assert b[key] == pytest.approx(a[key], rel=2e-3, abs=2e-5), key
