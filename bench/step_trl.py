"""TRL's own GRPOTrainer on a case of the step bench: its padding, its pictures, its forward, loss and optimizer.

Only ``_generate`` is answered from the given completions. It runs at its best here: the aligned update without old
log-probabilities, its fused head on response rows, the patch embedding as a matrix product, one group a micro-batch
(one sequence where layers are recomputed), torchvision's image processor where it is installed, and on a GPU without
flash-attn the tower's attention in one call.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from step_cases import Case, build_answers, build_model, build_problems
from transformers import BatchFeature, ProcessorMixin, Qwen2VLImageProcessor, TrainerCallback
from transformers.utils import is_flash_attn_2_available, is_torchvision_available

from rewardmap.families import attend_at_once, linear_patch_embedding
from rewardmap.vision import read_image

os.environ.setdefault("HF_HUB_OFFLINE", "1")


class MapProcessor(ProcessorMixin):
    """Qwen's processor without its video half, which torchvision would be needed for."""

    def __init__(self, image_processor: Any, tokenizer: Any) -> None:
        self.image_processor, self.tokenizer = image_processor, tokenizer
        self.chat_template = tokenizer.chat_template

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]

    def __call__(self, images: Any = None, text: Any = None, **_: Any) -> BatchFeature:
        seen = self.image_processor(images=[image for row in images for image in row], return_tensors="pt")
        merge = self.image_processor.merge_size**2
        counts = [int(grid.prod()) // merge for grid in seen["image_grid_thw"]]
        pad = "<|image_pad|>"
        text = [one.replace(pad, pad * count) for one, count in zip(text, counts, strict=True)]
        out = self.tokenizer(text, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
        kinds = (out["input_ids"] == self.tokenizer.convert_tokens_to_ids(pad)).long()
        return BatchFeature({**out, **seen, "mm_token_type_ids": kinds})

    def save_pretrained(self, *_: Any, **__: Any) -> list[str]:
        return []


def run(
    case: Case,
    device: str,
    dtype: torch.dtype,
    warm_up: int,
    rate: float,
    probe: Callable[[torch.nn.Module], dict[str, list[float]]],
    now: Callable[[], float],
    memory: Callable[[str], int],
    peak: Callable[[str], int],
    turn: Callable[[], None],
) -> dict[str, Any]:
    import trl
    from datasets import Dataset

    class Trainer(trl.GRPOTrainer):
        answers: dict[str, Any]
        prepared: float = 0.0

        def _generate(self, prompts: list[Any]) -> Any:
            turn: dict[str, int] = {}
            prompt_ids, completion_ids = [], []
            for prompt in prompts:
                question = next(part["text"] for part in prompt[0]["content"] if part["type"] == "text")
                place = turn[question] = turn.get(question, -1) + 1
                ids, completions = self.answers[question]
                prompt_ids.append(ids)
                completion_ids.append(list(completions[place]))
            texts = [[{"role": "assistant", "content": ""}] for _ in prompts]
            self._metrics["train"]["num_tokens"] = [0]
            images = [[part["image"] for part in prompt[0]["content"] if part["type"] == "image"] for prompt in prompts]
            return prompt_ids, completion_ids, None, texts, None, {}, images, []

        def _prepare_inputs(self, batch: Any) -> Any:
            start = now()
            out = super()._prepare_inputs(batch)
            self.prepared += now() - start
            return out

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []
            self.prepared: list[float] = []
            self.probes: list[dict[str, list[float]]] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turn()
            trainer.prepared = 0.0
            self.start = now()

        def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
            if not self.probes:
                self.probes.append(probe(model))

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.times.append(now() - self.start)
            self.prepared.append(trainer.prepared)

    model, tokenizer, image_processor = build_model(case, device, dtype)
    linear_patch_embedding(model.model.visual.patch_embed)
    if device == "cuda" and is_flash_attn_2_available():
        model.set_attn_implementation("flash_attention_2")
    elif device == "cuda":  # else the tower would attend window by window
        attend_at_once(model.model.visual)
    model.model.visual.requires_grad_(not case.freeze_vision)
    if is_torchvision_available():  # which is what its users have
        pixels = {"size": image_processor.size, "patch_size": image_processor.patch_size}
        pixels |= {key: getattr(image_processor, key) for key in ("temporal_patch_size", "merge_size")}
        image_processor = Qwen2VLImageProcessor(**pixels)
    processor = MapProcessor(image_processor, tokenizer)
    problems = build_problems(case, tokenizer)
    groups, rewards = build_answers(case, problems, tokenizer.eos_token_id)
    rows = [
        {"prompt": [{"role": "user", "content": problem.question}], "image": read_image(problem.image)}
        for problem in problems
    ]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            reward_funcs=lambda prompts, **_: _rewards(prompts, table),
            args=trl.GRPOConfig(
                output_dir=str(Path(folder) / "out"),
                per_device_train_batch_size=1 if case.checkpointing else case.group,
                gradient_accumulation_steps=len(problems) * (case.group if case.checkpointing else 1),
                num_generations=case.group,
                max_completion_length=case.response,
                max_steps=warm_up + case.timed,
                learning_rate=rate,
                lr_scheduler_type="constant",
                weight_decay=0.01,
                max_grad_norm=1e9,
                beta=0.0,
                loss_type="grpo",
                temperature=1.0,
                gradient_checkpointing=case.checkpointing,
                gradient_checkpointing_kwargs={"use_reentrant": False},
                shuffle_dataset=False,
                logging_steps=1,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                use_cpu=device == "cpu",
                bf16=False,
                dataloader_pin_memory=False,
                model_init_kwargs=None,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=processor,
        )
        trainer.answers = {}
        table: dict[str, list[float]] = {}
        for group, row in zip(groups, rewards.reshape(-1, case.group).tolist(), strict=True):
            ids = _prompt_ids(processor, group.problem)
            assert len(ids) == case.prompt
            trainer.answers[group.problem.question] = ids, [rollout.token_ids for rollout in group.rollouts]
            table[group.problem.question] = row
        clock = Clock()
        trainer.add_callback(clock)
        before = memory(device)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "seconds": clock.times[warm_up:],
        "prepare_seconds": clock.prepared[warm_up:],
        "loss": losses[0],
        "computed_tokens": case.sequences * (case.prompt + case.response),
        "memory": peak(device) - before,
        "probe": clock.probes[0],
        "trl": trl.__version__,
        "image_processor": type(image_processor).__name__,
        "attention": [part.config._attn_implementation for part in (model.model.language_model, model.model.visual)],
    }


def _rewards(prompts: list[Any], table: dict[str, list[float]]) -> list[float]:
    turn: dict[str, int] = {}
    found = []
    for prompt in prompts:
        question = next(part["text"] for part in prompt[0]["content"] if part["type"] == "text")
        turn[question] = turn.get(question, -1) + 1
        found.append(table[question][turn[question]])
    return found


def _prompt_ids(processor: MapProcessor, problem: Any) -> list[int]:
    content = [{"type": "image"}, {"type": "text", "text": problem.question}]
    text = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    ids: list[int] = processor(images=[[read_image(problem.image)]], text=[text])["input_ids"][0].tolist()
    return ids
