"""The real TRL on a tiny model: fused and unfused trainers take the same steps. Skipped where trl is not
installed."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("trl") is None:
    pytest.skip("trl is not installed", allow_module_level=True)
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from rewardmap_kernels import last_path
from rewardmap_kernels.integrations.trl import fuse_grpo

WORDS = ["<pad>", "<eos>", *(f"w{i}" for i in range(30))]


def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def model(seed: int = 0) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    return Qwen2ForCausalLM(config)


def distinct(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs within a group: the number of different words."""
    return [float(len(set(text.split()))) for text in completions]


def run(folder: Path, fused: str | None, **options: Any) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Two optimizer steps; the final parameters and the log. The seed makes both runs sample the same
    completions."""
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 2,
        "learning_rate": 0.05,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_accumulation_steps": 2,
        "save_strategy": "no",
        "seed": 3,
        "disable_tqdm": True,
        "temperature": 0.9,
        "optim": "sgd",
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
    }
    # From a folder: TRL loads the reference model by the name of the policy's.
    model().save_pretrained(folder / "model")
    policy = Qwen2ForCausalLM.from_pretrained(folder / "model")
    rows = Dataset.from_dict({"prompt": [f"w{i} w{i + 1}" for i in range(8)]})
    trainer = trl.GRPOTrainer(
        model=policy,
        reward_funcs=distinct,
        args=trl.GRPOConfig(**{**settings, **options}),
        train_dataset=rows,
        processing_class=tokenizer(),
    )
    if fused is not None:
        fuse_grpo(trainer, fused_loss=fused == "loss")
    trainer.train()
    return {k: v.detach().clone() for k, v in trainer.model.named_parameters()}, trainer.state.log_history


CASES: dict[str, dict[str, Any]] = {
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "grpo, reference": {"loss_type": "grpo", "beta": 0.1},
    "dapo, plain reference": {"loss_type": "dapo", "beta": 0.1, "use_bias_correction_kl": False},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-2},
    "cispo": {"loss_type": "cispo", "epsilon_high": 2.0},
    "sapo": {"loss_type": "sapo"},
    "dr_grpo, delta": {"loss_type": "dr_grpo", "delta": 1.5},
    "bnpo, two epochs": {"loss_type": "bnpo", "num_iterations": 2},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_a_fused_trainer_takes_trl_s_steps(options: dict[str, Any], tmp_path: Path) -> None:
    plain, plain_log = run(tmp_path / "a", None, **options)
    fused, fused_log = run(tmp_path / "b", "loss", **options)
    assert last_path("linear_policy_loss") is not None
    start = dict(model().named_parameters())
    for name, value in plain.items():
        torch.testing.assert_close(fused[name], value, rtol=2e-4, atol=2e-6)
    assert any(not torch.equal(plain[name], start[name]) for name in plain)
    for a, b in zip(plain_log, fused_log, strict=True):
        for key in a.keys() & {"loss", "grad_norm", "entropy", "kl", "clip_ratio/region_mean", "reward"}:
            assert b[key] == pytest.approx(a[key], rel=2e-3, abs=2e-5), key


def test_the_head_alone_serves_an_entropy_bonus(tmp_path: Path) -> None:
    options = {"loss_type": "dapo", "entropy_coef": 0.05}
    plain, _ = run(tmp_path / "a", None, **options)
    fused, _ = run(tmp_path / "b", "head", **options)
    for name, value in plain.items():
        torch.testing.assert_close(fused[name], value, rtol=2e-4, atol=2e-6)
    with pytest.raises(ValueError, match="no fused loss for an entropy bonus"):
        run(tmp_path / "c", "loss", **options)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"loss_type": "vespo"}, "loss_type='vespo'"),
        ({"top_entropy_quantile": 0.5}, "top_entropy_quantile"),
        ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold"),
        ({"loss_type": "sapo", "importance_sampling_level": "sequence"}, "importance_sampling_level"),
    ],
)
def test_an_option_without_a_fused_loss_raises(options: dict[str, Any], name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=name):
        run(tmp_path, "loss", **options)
