"""``rewardmap plan``: counted memory is what a run allocates; what cannot fit is an error that says what would."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5_VLConfig

from rewardmap.config import Config, ConfigError, ParallelConfig, PolicyConfig, load_config
from rewardmap.tiny import build_tiny
from rewardmap.train.parallel import prepare_policy, shard_policy
from rewardmap.train.plan import Workload, build_meta, memory_parts, plan, table
from rewardmap.train.ranks import join_ranks

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
    )
    policy = build_tiny(0, freeze_vision)
    parts = memory_parts(config, build_meta(config, policy.model.config), 1)
    prepare_policy(policy, config)
    with join_ranks(60, alone=True) as ranks:
        shard_policy(policy, config.parallel, ranks, torch.device("cpu"))
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


@pytest.mark.parametrize(("name", "text", "billions"), [("3b", TEXT_3B, 3.75), ("7b", TEXT_7B, 8.29)])
@pytest.mark.parametrize(("nodes", "shard"), [(1, 0), (4, 8)])
def test_recipes_plan_on_one_node_and_on_four(name, text, billions, nodes, shard):
    config = load_config(CONFIGS / f"rewardmap_qwen2_5_vl_{name}.toml", [f"parallel.shard={shard}"])
    shapes = qwen(text)
    model = build_meta(config, shapes)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)
    found = plan(config, shapes, 8 * nodes, "H100", Workload())
    assert 16 * billions / 8 < found.total / 1e9 < 80
    assert found.logical_tokens_per_second > found.computed_tokens_per_second
    assert "assumed" in table(found, 8 * nodes, "H100")


def test_what_cannot_fit_is_an_error_with_a_remedy():
    config = load_config(CONFIGS / "rewardmap_qwen2_5_vl_7b.toml")
    with pytest.raises(ConfigError, match=r"needs 1\d\d\.\d GB per GPU, H100 has 80 GB.*optimizer.*fit: .*4 GPUs"):
        plan(config, qwen(TEXT_7B), 1, "H100", Workload())
    kept = replace(config, parallel=replace(config.parallel, activation_checkpointing=False))
    with pytest.raises(ConfigError, match=r"activation_checkpointing=true"):
        plan(kept, qwen(TEXT_7B), 8, "H100", Workload())
    with pytest.raises(ConfigError, match=r"parallel\.shard=3 does not divide 8 GPUs"):
        plan(replace(config, parallel=ParallelConfig(shard=3)), qwen(TEXT_7B), 8, "H100", Workload())
