"""Configuration: every shipped file parses, every mistake is named with its remedy."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterator
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pytest

from rewardmap.config import Config, ConfigError, StageConfig
from rewardmap.config_file import PACKAGE_CONFIGS, dump_toml, from_dict, load_config, to_dict

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted([*PACKAGE_CONFIGS.glob("*.toml"), *(ROOT / "configs").glob("*.toml")])


def test_there_are_shipped_files() -> None:
    assert {"tiny", "rewardmap_qwen2_5_vl_7b", "rewardmap_qwen2_5_vl_3b"} <= {path.stem for path in SHIPPED}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_file_parses_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    copy = tmp_path / "config.toml"
    copy.write_text(dump_toml(config), encoding="utf-8")
    assert load_config(copy) == config


def test_a_file_is_laid_over_another_and_settings_over_both(tmp_path: Path) -> None:
    layout = tmp_path / "layout.toml"
    layout.write_text("[rollout]\nengine = 'sglang'\n[rollout.server]\nreplicas = 4\n", encoding="utf-8")
    config = load_config("tiny", [str(layout), "rollout.group_size=3"])
    assert config.rollout.engine == "sglang" and config.rollout.server.replicas == 4 and config.rollout.group_size == 3
    assert config.train == load_config("tiny").train and config.rollout.max_new_tokens == 24
    layout.write_text("[rollout]\nengin = 'sglang'\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"tiny\.toml with .*layout\.toml: unknown key .rollout\.engin"):
        load_config("tiny", [str(layout)])
    with pytest.raises(ConfigError, match=r"nowhere\.toml"):
        load_config("tiny", ["nowhere.toml"])


def test_every_field_survives_a_round_trip(tmp_path: Path) -> None:
    """A value other than the default in every scalar field: none is lost or read back as another."""
    tree = to_dict(Config())
    changed = {
        section: {key: other_value(value) for key, value in fields.items()}
        for section, fields in tree.items()
    }
    changed["data"]["path"] = "maps of Oslo"
    changed["rollout"]["importance_correction"] = "mask"  # staleness=1 needs one
    changed["train"]["stages"] = [{"name": "s", "kind": "sft", "steps": 3, "checkpoint": "shipped"}]
    config = from_dict(changed)
    copy = tmp_path / "config.toml"
    copy.write_text(dump_toml(config), encoding="utf-8")
    again = load_config(copy)
    assert again == config
    for section, fields in tree.items():
        for key, value in fields.items():
            if other_value(value) != value:
                assert getattr(getattr(again, section), key) != getattr(getattr(Config(), section), key), key


CHOICES = {"tiny", "raise", "auto", "float32", "local", "reference", "advantage", "grpo", "group", "none", "k3"}
"""Defaults of fields with fixed choices: kept, the parser checks these."""


def other_value(value: object) -> object:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 + 0.125
    if isinstance(value, list):
        return [other_value(entry) for entry in value]
    if isinstance(value, dict) or value in CHOICES:
        return value
    return f"{value} too"


def test_paper_recipe() -> None:
    """Hyper-parameters of arXiv 2510.02240."""
    config = load_config(ROOT / "configs" / "rewardmap_qwen2_5_vl_7b.toml")
    assert (config.train.learning_rate, config.train.prompts_per_step) == (1e-6, 16)
    assert (config.rollout.group_size, config.rollout.max_new_tokens) == (8, 2048)
    assert [stage.name for stage in config.train.stages] == [
        "true-false",
        "counting",
        "local-counting",
        "planning",
    ]
    assert sum(stage.steps for stage in config.train.stages) == 203
    small = load_config(ROOT / "configs" / "rewardmap_qwen2_5_vl_3b.toml")
    model = dataclasses.replace(config.policy, model=small.policy.model)
    assert dataclasses.replace(config, policy=model) == small != config


def test_overrides() -> None:
    config = load_config(
        "tiny",
        [
            "train.seed=3",
            "data.path=some folder",
            "rollout.temperature=0.5",
            'train.stages=[{name="a", steps=2}]',
        ],
    )
    assert config.train.seed == 3
    assert config.data.path == "some folder"
    assert config.rollout.temperature == 0.5
    assert config.train.stages == (StageConfig(name="a", steps=2),)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.sed=3", ["train.sed", "train.seed"]),
        ("trian.seed=3", ["trian", "train"]),
        ("rollout.group_sise=4", ["rollout.group_size"]),
        ("train.seed=abc", ["train.seed", "abc"]),
        ("reward.mode=best", ["reward.mode", "best", "reference"]),
        ("train.seed", ["train.seed", "key=value"]),
        ("=3", ["key=value"]),
        ("train.seed.deep=3", ["train.seed", "integer"]),
        ('train.stages=[{name="a", question_kind=["planning"]}]', ["question_kind", "question_kinds"]),
        ('train.stages=[{name="a", question_kinds=["routes"]}]', ["routes", "planning"]),
        ('train.stages=[{name="a", replay=2}]', ["replay"]),
        ('train.stages=[{name="a", checkpoint="shipped"}]', ["checkpoint", "sft"]),
        ('train.stages=[{name="a", advance_at=2.0}]', ["advance_at", "2.0"]),
        ('train.stages=[{name="a", steps=3, min_steps=4}]', ["min_steps", "steps=3"]),
        ('train.stages=[{name="a", group_size=0}]', ["group_size"]),
        ('train.stages=[{name="a", kind="sft", pools="adaptive"}]', ["adaptive", "rl"]),
        ("train.advantage_baseline=greedy", ["advantage_baseline", "advantage_scale"]),
        ("rollout.group_size=0", ["rollout.group_size=0", "1"]),
        ("rollout.group_size=1", ["group_size=1", "stage 'true/false'", "advantage_baseline"]),
        ("train.prompts_per_step=1", ["replay=0.5 in stage 'true/false'", "prompts_per_step=1 questions it is 0"]),
        ('train.stages=[{name="a", replay=0.999}]', ["replay=0.999 in stage 'a'", "64 questions it is 64"]),
        ("rollout.temperature=-1", ["rollout.temperature=-1", "0"]),
        ("rollout.top_p=2", ["rollout.top_p=2"]),
        ("rollout.top_k=-5", ["rollout.top_k=-5"]),
        ("train.max_grad_norm=-1", ["train.max_grad_norm=-1"]),
        ("train.max_grad_norm=0", ["train.max_grad_norm=0"]),
        ("train.keep_checkpoints=-1", ["train.keep_checkpoints=-1"]),
        ("train.checkpoint_every=0", ["train.checkpoint_every=0"]),
        ("train.prompts_per_step=0", ["train.prompts_per_step=0"]),
        ("train.learning_rate=nan", ["train.learning_rate=nan", "finite"]),
        ("train.betas=[0.9, 1.5]", ["train.betas.1=1.5"]),
        ("reward.alpha=nan", ["reward.alpha=nan", "finite"]),
        ("eval.max_problems=-5", ["eval.max_problems=-5"]),
        ("policy.max_pixels=100", ["min_pixels=3136", "max_pixels=100"]),
        ("data.path=2024-01-01", ["data.path=2024-01-01", "in quotes", """'"2024-01-01"'"""]),
        ("policy.model=7", ["policy.model=7", "in quotes"]),
        ("parallel.shard=-1", ["parallel.shard=-1"]),
    ],
)
def test_a_wrong_setting_is_named_with_its_remedy(override: str, named: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("tiny", [override])
    assert all(word in str(caught.value) for word in named), str(caught.value)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("rollout.group_size=1", "tiny.toml: group_size=1 in stage 'true/false': "),
        ("policy.freeze=lm_head", "tiny.toml: policy.freeze='lm_head': not a list in TOML; write it in brackets"),
        ("train.stages=[{steps=3}]", "tiny.toml: train.stages.0.name is missing"),
        ("rollout.server=3", "tiny.toml: rollout.server=3: a section; set keys of it: urls, keys_file, "),
        ("rollout.staleness=1", "tiny.toml: rollout: staleness=1 trains on answers "),
        ('train.stages=[{name="a", steps=3, min_steps=4}]', "tiny.toml: train.stages.0: min_steps=4: not more than"),
    ],
)
def test_a_line_begins_with_what_is_wrong(override: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("tiny", [override])
    assert str(caught.value).startswith(f"{PACKAGE_CONFIGS}/{line}")


@pytest.mark.parametrize("steps", ["x", -3])
def test_the_length_of_a_named_order_is_a_number_of_steps(steps: object) -> None:
    with pytest.raises(ConfigError, match=rf"train\.steps={steps!r}: a number of steps, at least 1"):
        load_config("tiny", ["train.stages=paper", f"train.steps={steps}"])


@pytest.mark.parametrize("values", ["[]", "[1.0]", "[1.0, 1.0, 1.0, 1.0]"])
def test_a_list_of_another_length_is_told_once_how_many_are_wanted(values: str) -> None:
    with pytest.raises(ConfigError, match=rf"{re.escape(f': reward.map_weights={values}: 3 values are wanted')}$"):
        load_config("tiny", [f"reward.map_weights={values}"])


def test_no_number_is_read_from_a_truth_value() -> None:
    tree = to_dict(Config())
    own = {"advance_at": 0.5, "learning_rate": 1.0, "group_size": 2, "alpha": 1.0, "transfer_weight": 1.0}
    tree["train"]["stages"] = [{"name": "a", **own, "map_weights": [1.0, 1.0, 1.0]}]
    tree["rollout"]["server"]["gpus"] = [0]
    from_dict(tree)
    for *parents, key in numbers(tree):
        changed = copy.deepcopy(tree)
        reduce(getitem, parents, changed)[key] = True
        name = ".".join(map(str, [*parents, key]))
        with pytest.raises(ConfigError, match=f": {name}=True: Input should be a number$"):
            from_dict(changed)


def numbers(node: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if isinstance(value, (dict, list)):
            yield from numbers(value, (*path, key))
        elif type(value) in (int, float):
            yield (*path, key)


def test_a_missing_file_names_the_shipped_ones() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml.*tiny"):
        load_config("nowhere.toml")


def test_a_file_that_is_no_toml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text("[train\nseed = 1", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"broken\.toml.*TOML"):
        load_config(path)
    path.write_text("[train]\nseed = 1", encoding="utf-16")
    with pytest.raises(ConfigError, match=r"broken\.toml: not UTF-8.*save it as UTF-8"):
        load_config(path)
    path.write_text("[train]\nseed = 1", encoding="utf-8-sig")
    assert load_config(path).train.seed == 1


def test_colocated_servers_are_not_sent_weights_by_nccl():
    with pytest.raises(ConfigError, match=r"rollout.server.*NCCL takes one process a GPU; choose sync='tensor' or"):
        load_config("tiny", ["rollout.server.colocated=true", "rollout.server.sync=distributed"])
