"""``rewardmap plan``: what a configuration needs per GPU and how long its phases take, before a GPU is asked for.

Weights, gradients and optimizer are counted on a model without memory (the meta device). Activations and times are
arithmetic on the shapes. Nothing in here is fitted to a measurement; a test holds memory to the peak of a run on a CPU.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from rewardmap.config import Config, ConfigError
from rewardmap.families import head_dim
from rewardmap.policy import read_model_config
from rewardmap.profiling import PEAK_FLOPS
from rewardmap.rollout.decoder import ROOM
from rewardmap.tiny import build_tiny
from rewardmap.train.balance import CostModel
from rewardmap.train.parallel import computes_in, freeze_matching
from rewardmap_kernels._head import CHUNK_BYTES

HFU, BANDWIDTH_SHARE = 0.4, 0.6
"""Assumed: shares of a device's arithmetic in training and of its memory bandwidth in decoding."""
ADAM_STATES = 2


@dataclass(frozen=True)
class Device:
    """Data-sheet numbers: bytes, dense bf16 FLOP/s, bytes/s."""

    memory: float
    flops: float
    bandwidth: float


DEVICES = {
    "H100": Device(80e9, PEAK_FLOPS["H100"], 3.35e12),
    "H200": Device(141e9, PEAK_FLOPS["H200"], 4.8e12),
    "A100": Device(80e9, PEAK_FLOPS["A100"], 2.04e12),
}


@dataclass(frozen=True)
class Workload:
    """What a step is assumed to look like."""

    prompt_tokens: int = 6_000
    answer_tokens: int = 500


@dataclass(frozen=True)
class Plan:
    """Bytes per GPU by part, seconds of a step by phase, and what was assumed."""

    memory: dict[str, float]
    """In the update."""
    sampling: dict[str, float]
    """While the local engine samples; empty for servers, which are processes of their own."""
    seconds: dict[str, float]
    computed_tokens_per_second: float
    """Of the training phase, all GPUs."""
    logical_tokens_per_second: float
    assumptions: tuple[str, ...]

    @property
    def total(self) -> float:
        return sum(self.memory.values())


def plan(config: Config, model_config: Any, gpus: int, device: str, work: Workload, nodes: int = 1) -> Plan:
    """Plan a run that trains on ``gpus`` devices in all, of so many nodes.

    Raises:
        ConfigError: ``parallel.shard`` does not divide the GPUs, a sequence is more than a micro-batch takes, or the
            run does not fit; what would make it fit is named.
    """
    budget, longest = config.train.max_tokens_per_micro_batch, work.prompt_tokens + work.answer_tokens
    if longest > budget:
        raise ConfigError(
            f"a prompt of {work.prompt_tokens} tokens with an answer of {work.answer_tokens} is more than "
            f"train.max_tokens_per_micro_batch={budget}; raise it, or lower policy.max_pixels or rollout.max_new_tokens"
        )
    if gpus % (config.parallel.shard or gpus):
        raise ConfigError(f"parallel.shard={config.parallel.shard} does not divide {gpus} GPUs; choose a divisor, or 0")
    model = build_meta(config, model_config)
    memory = memory_parts(config, model, gpus, work)
    sampling = sampling_parts(config, model, memory, gpus, work)
    room = DEVICES[device].memory
    for when, parts in (("", memory), (" while it samples by the local engine", sampling)):
        if sum(parts.values()) > room:
            largest = max(parts, key=lambda part: parts[part])
            remedies = "; ".join(_remedies(config, model_config, gpus, work, room))
            raise ConfigError(
                f"needs {sum(parts.values()) / 1e9:.1f} GB per GPU{when}, {device} has {room / 1e9:.0f} GB; most of it "
                f"{largest} ({parts[largest] / 1e9:.1f} GB). What makes it fit: "
                f"{remedies or 'no single change: take more GPUs'}"
            )
    return _timed(config, model, memory, sampling, gpus, nodes, DEVICES[device], work)


def shapes_of(config: Config) -> Any:
    """The transformers configuration of ``policy.model``. Raises ConfigError when there is none."""
    if config.policy.model == "tiny":
        return build_tiny(0, config.policy.freeze_vision).model.config
    return read_model_config(config.policy.model)


def table(found: Plan, gpus: int, device: str) -> str:
    """For people."""
    lines = [f"per GPU, of {DEVICES[device].memory / 1e9:.0f} GB ({gpus} x {device})"]
    lines += [f"  {part:<26}{size / 1e9:8.2f} GB" for part, size in found.memory.items() if size]
    lines += [f"  {'in all':<26}{found.total / 1e9:8.2f} GB"]
    if found.sampling:
        lines += [f"  {'while it samples':<26}{sum(found.sampling.values()) / 1e9:8.2f} GB, of that"]
        lines += [f"    {part:<24}{size / 1e9:8.2f} GB" for part, size in found.sampling.items() if size]
    lines += ["a step"]
    lines += [f"  {phase:<26}{seconds:8.2f} s" for phase, seconds in found.seconds.items()]
    lines += [
        f"  {'trained tokens, computed':<26}{found.computed_tokens_per_second:8,.0f} /s",
        f"  {'trained tokens, logical':<26}{found.logical_tokens_per_second:8,.0f} /s",
        "assumed",
    ]
    return "\n".join([*lines, *(f"  {line}" for line in found.assumptions)])


def build_meta(config: Config, model_config: Any) -> nn.Module:
    """The model without memory, with what the configuration freezes frozen."""
    # A policy on a GPU has named an attention of its own in its configuration, which no new model may ask for.
    described, dtype = copy.deepcopy(model_config), getattr(torch, config.policy.dtype)
    with torch.device("meta"):
        model: nn.Module = AutoModelForImageTextToText.from_config(described, attn_implementation="sdpa", dtype=dtype)
    if config.policy.freeze_vision:
        model.model.visual.requires_grad_(False)  # type: ignore[union-attr,operator]
    freeze_matching(model, config.policy.freeze)
    return model


def memory_parts(config: Config, model: Any, gpus: int, work: Workload) -> dict[str, float]:
    """Bytes per GPU. A trained model's parts are split over ``parallel.shard`` ranks, rounded up to whole rows."""
    shard = config.parallel.shard or gpus
    master = getattr(torch, config.policy.dtype).itemsize
    compute = computes_in(config).itemsize
    text, tower = model.model.language_model, model.model.visual
    frozen_tower = {id(p) for p in tower.parameters()} if config.policy.freeze_vision else set()
    split = [p for p in model.parameters() if id(p) not in frozen_tower]
    trained = [p for p in split if p.requires_grad]
    resting = 0.0 if config.parallel.offload else 1.0
    own = sum(_rows(p, shard) for p in trained) * master
    block = _size(text.layers[0].parameters())
    inside = {id(p) for module in (text.layers, tower) for p in module.parameters()}
    ends = _size(p for p in split if id(p) not in inside)
    parts = {
        "weights": resting * sum(_rows(p, shard) for p in split) * master,
        "gradients": resting * own,
        "optimizer": resting * own * ADAM_STATES,
        "frozen tower": float(_size(tower.parameters()) * compute) if frozen_tower else 0.0,
    }
    if config.train.kl_coef and not config.policy.lora_rank:
        beside = {id(p) for p in tower.parameters()}
        parts["reference"] = resting * sum(_rows(p, shard) for p in model.parameters() if id(p) not in beside) * compute
        if not frozen_tower:
            parts["reference tower"] = float(_size(tower.parameters()) * compute)
    if gpus > 1 or compute != master or config.parallel.offload:
        parts["gathered ends and head"] = float(ends * compute)
        parts["gathered blocks"] = float(2 * block * compute)
        parts["whole gradients"] = float((ends + block) * compute + block * master)
        if not frozen_tower:
            parts["gathered tower"] = float(_size(tower.parameters()) * compute)
    return parts | _activations(config, model, compute, gpus, work)


def _activations(config: Config, model: Any, compute: int, gpus: int, work: Workload) -> dict[str, float]:
    """Of one micro-batch at its budget of tokens, whose response rows are at most all of them, and of the pictures of
    a step, which a tower that trains keeps until the last micro-batch."""
    text = model.config.text_config
    tokens, hidden = config.train.max_tokens_per_micro_batch, text.hidden_size
    width = head_dim(text)
    queries, keys = width * text.num_attention_heads, width * text.num_key_value_heads
    kept = config.parallel.activation_checkpointing
    parts = {
        "activations": _kept(
            tokens, hidden, queries, keys, text.intermediate_size, text.num_hidden_layers, compute, kept
        ),
        "logits of a chunk": float(min(CHUNK_BYTES, tokens * text.vocab_size * 4)),
        "head gradient in float32": float(text.vocab_size * hidden * 4),
    }
    if not config.policy.freeze_vision:
        tower = model.config.vision_config
        questions = ceil(config.train.prompts_per_step / config.train.updates_per_step)
        pictures = max(min(stage.maps_per_step or questions, questions) for stage in config.train.stages)
        pictures = ceil(pictures / gpus)
        patches, width = pictures * work.prompt_tokens * tower.spatial_merge_size**2, tower.hidden_size
        parts["activations of the tower"] = _kept(
            patches, width, width, width, tower.intermediate_size, tower.depth, compute, kept
        )
    return parts


def _kept(
    tokens: int, hidden: int, queries: int, keys: int, inner: int, layers: int, compute: int, checkpointing: bool
) -> float:
    """Bytes that ``layers`` blocks keep for their backward pass."""
    # Saved by one block: its input, both norms (in and out, one copy in float32), q k v before and after rotation, the
    # attention's output, the residual, and gate, up, their activation and product.
    one = tokens * ((4 * hidden + 3 * queries + 4 * keys + 4 * inner) * compute + 2 * hidden * 4)
    return float(layers * tokens * hidden * compute + one if checkpointing else layers * one)


def sampling_parts(
    config: Config, model: Any, memory: dict[str, float], gpus: int, work: Workload
) -> dict[str, float]:
    """Bytes per GPU while the local engine samples, when there are no gradients: what rests there, the whole weights of
    a policy that is split, keys and values of all answers that it decodes at a time, and what sampling a token takes.
    Empty for servers, which are processes of their own. ``memory``: of ``memory_parts``."""
    if config.rollout.engine != "local":
        return {}
    compute, text, group = computes_in(config).itemsize, model.config.text_config, config.rollout.group_size
    at_once = min(config.rollout.batch_sequences // group, config.rollout.batch_tokens // (group * work.prompt_tokens))
    prompts = max(1, min(ceil(config.train.prompts_per_step / gpus), at_once))
    answers = prompts * group
    token = 2 * text.num_hidden_layers * head_dim(text) * text.num_key_value_heads * compute
    resting = ("weights", "optimizer", "frozen tower", "reference", "reference tower")
    parts = {part: memory[part] for part in resting if part in memory}
    if "gathered blocks" in memory:
        alone = model.model.visual.parameters() if config.policy.freeze_vision else ()
        parts["whole weights"] = float((_size(model.parameters()) - _size(alone)) * compute)
    # The prompts' own, from which each answer's are copied; room for the tokens to come; and what a layer's keys were
    # when room was made.
    length = work.prompt_tokens + ROOM * ceil(work.answer_tokens / ROOM)
    before = answers * (length - ROOM) / (2 * text.num_hidden_layers)
    parts["keys and values"] = token * (prompts * work.prompt_tokens + answers * length + before)
    # Logits as they are and in float32, log-probabilities, what is allowed of them, and its sums in float64.
    parts["sampling a token"] = float(answers * text.vocab_size * (compute + 4 + 4 + 4 + 8))
    return parts


def _timed(
    config: Config,
    model: Any,
    memory: dict[str, float],
    sampling: dict[str, float],
    gpus: int,
    nodes: int,
    device: Device,
    work: Workload,
) -> Plan:
    groups, size = config.train.prompts_per_step, config.rollout.group_size
    answers = groups * size
    packed = groups * (work.prompt_tokens + size * work.answer_tokens)
    logical = answers * (work.prompt_tokens + work.answer_tokens)
    prompt, answer = work.prompt_tokens, work.answer_tokens
    pairs = groups * (prompt**2 // 2 + size * (prompt * answer + answer**2 // 2))
    cost = CostModel.of(
        model.config,
        freeze_vision=config.policy.freeze_vision,
        checkpointing=config.parallel.activation_checkpointing,
        adapters=bool(config.policy.lora_rank),
        reference=bool(config.train.kl_coef),
    )
    flop = cost.flop(packed, pairs, answers * answer)
    flop += groups * cost.tower(prompt)
    train = flop / (gpus * device.flops * HFU)
    weights = _size(model.parameters()) * 2.0
    text = model.config.text_config
    cache = 2 * text.num_hidden_layers * head_dim(text) * text.num_key_value_heads * 2
    samplers, server = gpus, config.rollout.server
    if config.rollout.engine == "sglang":
        samplers = (len(server.urls) or nodes * server.replicas) * server.tensor_parallel
        weights /= server.tensor_parallel
    mine = ceil(answers / samplers)
    read = weights + cache * (mine * (prompt + answer / 2))
    prefill = 2 * _size(model.parameters()) * ceil(groups / samplers) * prompt / (device.flops * HFU)
    decode = answer * read / (device.bandwidth * BANDWIDTH_SHARE)
    return Plan(
        memory,
        sampling,
        {"rollout: prefill": prefill, "rollout: decode": decode, "train": train},
        packed / train,
        logical / train,
        (
            f"{groups} questions of {prompt:,} tokens with {size} answers of {answer:,}, no picture shared",
            f"training at {HFU:.0%} of the data sheet's bf16 arithmetic, communication hidden behind it",
            f"decoding in bf16 at {BANDWIDTH_SHARE:.0%} of the memory bandwidth on {samplers} GPUs, all answers of one "
            "side by side",
            "memory beside the parts (context, fragments, NCCL) is not counted: leave a tenth of the GPU",
            *(
                ["the servers of rollout.server.colocated keep a part of the GPU while they sleep: not counted"]
                if config.rollout.engine == "sglang" and config.rollout.server.colocated
                else []
            ),
            "memory is held to a measured run on a CPU, neither memory nor time to one on a GPU",
        ),
    )


def _remedies(config: Config, model_config: Any, gpus: int, work: Workload, room: float) -> list[str]:
    """Single changes under which the run fits."""
    tokens, prompts = config.train.max_tokens_per_micro_batch // 2, config.rollout.batch_tokens // 2
    changes: list[tuple[str, Config, int]] = [
        ("parallel.activation_checkpointing=true", _changed(config, "parallel", activation_checkpointing=True), gpus),
        ("parallel.shard=0", _changed(config, "parallel", shard=0), gpus),
        ("parallel.offload=true", _changed(config, "parallel", offload=True), gpus),
        (
            f"train.max_tokens_per_micro_batch={tokens}",
            _changed(config, "train", max_tokens_per_micro_batch=tokens),
            gpus,
        ),
        (f"rollout.batch_tokens={prompts}", _changed(config, "rollout", batch_tokens=prompts), gpus),
        ("rollout.engine=sglang", _changed(config, "rollout", engine="sglang"), gpus),
        *((f"{count} GPUs", config, count) for count in (2 * gpus, 4 * gpus, 8 * gpus)),
    ]
    found = []
    for name, other, count in changes:
        model = build_meta(other, model_config)
        memory = memory_parts(other, model, count, work)
        most = max(sum(memory.values()), sum(sampling_parts(other, model, memory, count, work).values()))
        if most <= room:
            found.append(name)
    return found


def _changed(config: Config, section: str, **changes: Any) -> Config:
    return replace(config, **{section: replace(getattr(config, section), **changes)})


def _size(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _rows(parameter: nn.Parameter, shard: int) -> int:
    """Elements of the first rank's shard: FSDP2 splits the first dimension into equal runs of rows."""
    rows = parameter.shape[0]
    return ceil(rows / shard) * (parameter.numel() // rows)
