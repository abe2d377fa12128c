"""``rewardmap plan``: counted memory is what a run allocates; what cannot fit is an error that says what would."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity
from transformers import Qwen2_5_VLConfig

from rewardmap.config import Config, ConfigError, ParallelConfig, PolicyConfig, TrainConfig
from rewardmap.config_file import load_config
from rewardmap.curriculum import Curriculum
from rewardmap.families import TOWER_ATTENTION, mrope_positions
from rewardmap.policy import EncodedPrompt, assemble, cast_weights, load_policy
from rewardmap.rollout.local import LocalEngine
from rewardmap.tiny import WARM_START, build_tiny
from rewardmap.train.forest import Answers, pack_forest
from rewardmap.train.forward import gather_rows
from rewardmap.train.parallel import prepare_policy, shard_policy
from rewardmap.train.plan import Workload, build_meta, memory_parts, plan, sampling_parts, table
from rewardmap.train.ranks import join_ranks
from rewardmap.train.reference import make_reference
from rewardmap.train.trainer import Trainer
from rewardmap.transit.reasonmap import load_dataset, write_dataset
from rewardmap.types import SamplingParams
from rewardmap_kernels import PolicyObjective, linear_policy_loss, use_implementation
from rewardmap_kernels.tree_attention import tree_mask

CONFIGS = Path(__file__).parents[1] / "configs"
TEXT_3B = {
    "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
    "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip
TEXT_7B = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
}  # fmt: skip


def qwen(text: dict) -> Qwen2_5_VLConfig:
    """Qwen2.5-VL as published (arXiv 2502.13923, table 1)."""
    tower = {"hidden_size": 1280, "out_hidden_size": text["hidden_size"], "intermediate_size": 3420, "depth": 32}
    return Qwen2_5_VLConfig(text_config=text, vision_config=tower, tie_word_embeddings=text["tie_word_embeddings"])


@pytest.mark.parametrize("freeze_vision", [True, False])
def test_counted_bytes_are_those_of_a_sharded_policy(freeze_vision):
    config = Config(
        policy=PolicyConfig(device="cpu", freeze_vision=freeze_vision),
        parallel=ParallelConfig(compute_dtype="bfloat16"),
        train=TrainConfig(kl_coef=0.1),
    )
    policy, initial = build_tiny(0, freeze_vision), build_tiny(0, freeze_vision)
    cast_weights(initial.model, torch.bfloat16)
    parts = memory_parts(config, build_meta(config, policy.model.config), 1, Workload())
    with join_ranks(60, alone=True) as ranks:
        shard = partial(shard_policy, parallel=config.parallel, ranks=ranks, device=torch.device("cpu"))
        make_reference(policy, config, initial, shard)
        prepare_policy(policy, config)
        shard(policy)
        tower = {id(p) for p in policy.vision_tower.parameters()} if freeze_vision else set()
        split = [p for p in policy.model.parameters() if id(p) not in tower]
        trained = [p for p in split if p.requires_grad]
        optimizer = torch.optim.AdamW(trained)
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        assert parts["weights"] == sum(p.to_local().nbytes for p in split)
        assert parts["gradients"] == sum(p.grad.to_local().nbytes for p in trained)
        moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
        assert parts["optimizer"] == sum(moment.to_local().nbytes for moment in moments)
        assert parts["frozen tower"] == sum(p.nbytes for p in policy.vision_tower.parameters() if id(p) in tower)
        theirs = {id(p) for p in initial.vision_tower.parameters()}
        split = [p for p in initial.model.parameters() if id(p) not in theirs]
        assert parts["reference"] == sum(p.to_local().nbytes for p in split)
        own = sum(p.nbytes for p in initial.vision_tower.parameters() if id(p) not in tower)
        assert parts.get("reference tower", 0) == own


def peak_bytes(work) -> int:
    """The most that tensors made inside ``work`` held at once, by torch's own record of its allocations."""
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(sizes))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("freeze_vision", [True, False])
def test_planned_memory_is_the_measured_peak_of_the_tiny_job(tmp_path, monkeypatch, freeze_vision, checkpointing):
    """Within 15 %, with nothing fitted: weights and optimizer, and what forward and backward allocate on top."""
    write_dataset(tmp_path / "maps", maps={"train": 6, "test": 3}, seed=1)
    settings = [
        "train.prompts_per_step=48", "train.skip_equal_groups=false", "train.max_tokens_per_micro_batch=2048",
        f"policy.freeze_vision={freeze_vision}".lower(), f"parallel.activation_checkpointing={checkpointing}".lower(),
        "train.stages=[{name='all', steps=9, question_kinds=['planning'], maps_per_step=6}]",
    ]  # fmt: skip
    config = load_config("tiny", settings)
    data = load_dataset(tmp_path / "maps", "train")
    policy = load_policy(WARM_START, config.policy)
    prepare_policy(policy, config)
    curriculum = Curriculum(data.problems, config.train.stages, config.train.prompts_per_step, seed=0)
    trainer = Trainer(config, policy, LocalEngine(policy, 512), {"reference": data.networks}, curriculum)
    trainer.train_step()  # makes the optimizer's state
    backward, seen = trainer._backward, {}

    def measured(forests, *rest):
        out = {}
        seen.update(forests=forests, peak=peak_bytes(lambda: out.update(backward(forests, *rest))))
        return out

    monkeypatch.setattr(trainer, "_backward", measured)
    trainer.train_step()
    resting = sum(parameter.nbytes for parameter in policy.model.parameters())
    resting += sum(tensor.nbytes for state in trainer.optimizer.state.values() for tensor in state.values())
    [forest] = seen["forests"]
    config = replace(config, train=replace(config.train, max_tokens_per_micro_batch=len(forest.input_ids)))
    prompt = np.mean([len(policy.encode(problem).token_ids) for problem in data.problems])
    answer = len(forest.target) / (48 * 8)
    parts = memory_parts(config, build_meta(config, policy.model.config), 1, Workload(round(prompt), round(answer)))
    assert sum(parts.values()) == pytest.approx(resting + seen["peak"], rel=0.15)


def test_a_trainable_tower_holds_the_pictures_of_one_update(tmp_path):
    settings = ["policy.freeze_vision=false", "train.prompts_per_step=24", "train.stages=paper", "data.path=maps"]
    model_config = load_policy(WARM_START, PolicyConfig()).model.config
    found = {}
    for updates in (1, 4):
        config = load_config("tiny", [*settings, f"train.updates_per_step={updates}"])
        parts = memory_parts(config, build_meta(config, model_config), 1, Workload(480, 40))
        found[updates] = parts["activations of the tower"]
    assert found[1] == pytest.approx(4 * found[4], rel=0.05) and found[4] > 0


@pytest.mark.parametrize(("prompts", "tokens"), [(8, 64), (24, 120)])
def test_planned_memory_of_the_local_engine_is_the_measured_peak(tmp_path, prompts, tokens):
    """Within 15 %, on the path of a GPU, where each answer has its prompt's keys and values."""
    write_dataset(tmp_path / "maps", maps={"train": 6, "test": 3}, seed=1)
    config = load_config("tiny", [f"train.prompts_per_step={prompts}"])
    problems = load_dataset(tmp_path / "maps", "train").problems[:prompts]
    policy = load_policy(WARM_START, config.policy)
    policy = replace(policy, stop_token_ids=policy.banned_token_ids[1:])  # no answer ends before the limit
    engine = LocalEngine(policy, config.rollout.batch_sequences, config.rollout.batch_tokens)

    def sample():
        engine.generate(problems, config.rollout.group_size, SamplingParams(max_new_tokens=tokens))

    with use_implementation("torch"):
        sample()  # pictures are read and seen
        peak = peak_bytes(sample)
    length = max(len(policy.encode(problem).token_ids) for problem in problems)
    model, work = build_meta(config, policy.model.config), Workload(length, tokens)
    parts = sampling_parts(config, model, memory_parts(config, model, 1, work), 1, work)
    assert parts["keys and values"] + parts["sampling a token"] == pytest.approx(peak, rel=0.15)
    servers = replace(config, rollout=replace(config.rollout, engine="sglang"))
    assert not sampling_parts(servers, model, memory_parts(servers, model, 1, work), 1, work)


RECIPES = [("3b", TEXT_3B, 3.75), ("7b", TEXT_7B, 8.29)]
LAYOUTS = [
    ("one_node_colocated", 8, 1, 8),
    ("one_node_disaggregated", 4, 1, 4),
    ("four_nodes_colocated", 32, 4, 32),
    ("four_nodes_disaggregated", 24, 3, 8),
]
"""Of ``configs/layouts``, with the GPUs that train, their nodes, and the GPUs that sample."""


def test_every_layout_is_tested():
    assert sorted(name for name, *_ in LAYOUTS) == sorted(path.stem for path in (CONFIGS / "layouts").iterdir())


@pytest.mark.parametrize(("name", "text", "billions"), RECIPES)
@pytest.mark.parametrize(("layout", "gpus", "nodes", "samplers"), LAYOUTS)
def test_recipes_plan_in_every_layout(name, text, billions, layout, gpus, nodes, samplers):
    recipe = CONFIGS / f"rewardmap_qwen2_5_vl_{name}.toml"
    config, alone = load_config(recipe, [str(CONFIGS / "layouts" / f"{layout}.toml")]), load_config(recipe)
    budget = alone.train.max_tokens_per_micro_batch  # how a batch is split does not change what is learned
    assert replace(config.train, max_tokens_per_micro_batch=budget) == alone.train and config.policy == alone.policy
    shapes = qwen(text)
    model = build_meta(config, shapes)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)
    found = plan(config, shapes, gpus, "H100", Workload(), nodes)
    assert 16 * billions / 8 < found.total / 1e9 < 0.9 * 80  # a tenth stays for what is not counted
    assert found.logical_tokens_per_second > found.computed_tokens_per_second
    assert f"of the memory bandwidth on {samplers} GPUs" in table(found, gpus, "H100")
    embedded = replace(alone, policy=replace(alone.policy, freeze_vision=True))  # samples where it trains
    decode = plan(embedded, shapes, samplers, "H100", Workload()).seconds["rollout: decode"]
    assert found.seconds["rollout: decode"] == pytest.approx(decode, rel=1e-12)


@pytest.mark.parametrize(("name", "text", "billions"), RECIPES)
def test_recipes_make_a_step_on_weights_without_memory(name, text, billions):
    """The published shapes go through packing, checkpointed blocks, fused head, loss and backward."""
    config, shapes = load_config(CONFIGS / f"rewardmap_qwen2_5_vl_{name}.toml"), qwen(text)
    model = build_meta(config, shapes).to(getattr(torch, config.parallel.compute_dtype))
    policy = assemble(model, SimpleNamespace(eos_token_id=0), None, config.policy.freeze_vision)
    prepare_policy(policy, config)
    prompt = EncodedPrompt((1, *[shapes.image_token_id] * 64, 2), mrope_positions(66, 1, (1, 8, 8)), 64, "a")
    answers = tuple(tuple(range(3, 3 + length)) for length in (5, 9, 7, 4))
    nats = tuple((-1.0,) * len(answer) for answer in answers)
    [forest] = pack_forest(
        [Answers(prompt, b"", answers, tuple(range(4)), nats)], config.train.max_tokens_per_micro_batch
    )
    mask = replace(tree_mask(forest.subtree_end), device=torch.device("meta"))
    with torch.device("meta"):
        hidden = policy.text_model(
            inputs_embeds=torch.empty(
                1, len(forest.input_ids), text["hidden_size"], dtype=model.dtype
            ).requires_grad_(),
            position_ids=forest.position_ids[:, None].to("meta"),
            attention_mask=torch.empty(1, 1, 0, 0),
            use_cache=False,
            tree_mask=mask,
        ).last_hidden_state[0]
        rows = gather_rows(hidden, forest.hidden_index)
        out = linear_policy_loss(
            rows,
            model.lm_head.weight,
            forest.target.to("meta"),
            advantages=torch.empty(len(forest.target)),
            normalizer=25.0,
            objective=PolicyObjective(config.train.objective, entropy_coef=config.train.entropy_coef),
        )
        assert out.logprobs.shape == (25,)
        out.loss.backward()
    trained = [*policy.text_model.layers.parameters(), model.lm_head.weight]
    assert all(parameter.grad.shape == parameter.shape for parameter in trained)


def test_what_cannot_fit_is_an_error_with_a_remedy():
    config = load_config(CONFIGS / "rewardmap_qwen2_5_vl_7b.toml")
    with pytest.raises(ConfigError, match=r"needs 2\d\d\.\d GB per GPU, H100 has 80 GB.*optimizer.*fit: .*8 GPUs"):
        plan(config, qwen(TEXT_7B), 1, "H100", Workload())
    kept = replace(config, parallel=replace(config.parallel, activation_checkpointing=False))
    with pytest.raises(ConfigError, match=r"activation_checkpointing=true"):
        plan(kept, qwen(TEXT_7B), 8, "H100", Workload())
    long = replace(config, rollout=replace(config.rollout, batch_sequences=2048, batch_tokens=1 << 21))
    many = replace(long, train=replace(long.train, prompts_per_step=1024))
    frozen = replace(many, policy=replace(many.policy, freeze_vision=True))
    with pytest.raises(ConfigError, match=r"it samples by the local.*most of it keys.*fit: .*rollout\.engine=sglang"):
        plan(frozen, qwen(TEXT_7B), 8, "H100", Workload())
    with pytest.raises(ConfigError, match=r"parallel\.shard=3 does not divide 8 GPUs"):
        plan(replace(config, parallel=ParallelConfig(shard=3)), qwen(TEXT_7B), 8, "H100", Workload())


def test_a_policy_that_runs_on_a_gpu_can_be_planned(monkeypatch):
    """Its tower's configuration names an attention that no new model may ask for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    policy = build_tiny(0, freeze_vision=True)
    assert policy.vision_tower.config._attn_implementation == TOWER_ATTENTION
    config = load_config("tiny")
    assert sum(parameter.numel() for parameter in build_meta(config, policy.model.config).parameters()) == sum(
        parameter.numel() for parameter in policy.model.parameters()
    )
    assert policy.vision_tower.config._attn_implementation == TOWER_ATTENTION
