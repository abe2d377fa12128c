"""What a run begins with: its data, its policy and its device, or one error that names what is wrong."""

import pytest
import torch
from rich.console import Console

from rewardmap.config import Config, ConfigError, PolicyConfig
from rewardmap.config_file import load_config
from rewardmap.policy import pick_device
from rewardmap.train import run, start
from rewardmap.types import DataError


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"data\.path='nowhere': no such folder"):
        run.train(load_config("tiny", ["data.path=nowhere"]), tmp_path / "run", console=Console(quiet=True))
    assert not (tmp_path / "run").exists()


def test_a_model_that_another_checkpoint_would_replace_is_refused(tmp_path):
    config = load_config("tiny", ["data.train_maps=6", "data.test_maps=4", "policy.model=Qwen/Qwen2.5-VL-7B-Instruct"])
    with pytest.raises(ConfigError, match=r"checkpoint='.*' *, so that policy\.model='Qwen/.*' would not be trained"):
        run.train(config, tmp_path / "run", console=Console(quiet=True))
    assert not (tmp_path / "run").exists()


def test_a_device_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"policy\.device='gpu': .*choose auto, cpu or cuda"):
        pick_device(PolicyConfig(device="gpu"))


def test_a_new_tiny_model_is_where_and_in_what_was_asked_for(monkeypatch):
    monkeypatch.setattr(start, "pick_device", lambda settings: torch.device("meta"))  # stands for a GPU
    policy = start.initial_policy(Config(policy=PolicyConfig(model="tiny", dtype="bfloat16")))
    assert policy.device.type == "meta" and policy.model.dtype == torch.bfloat16
