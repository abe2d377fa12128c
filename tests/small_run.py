"""Settings of a run on a handful of maps that takes seconds."""

import json

from rewardmap.config import Config
from rewardmap.config_file import load_config

SMALL = [
    "data.train_maps=6",
    "data.test_maps=4",
    "train.prompts_per_step=6",
    "rollout.group_size=4",
    "train.checkpoint_every=2",
    "train.warmup_steps=0",
    "eval.samples=2",
    "train.stages=[{name='warm', kind='sft', steps=0, checkpoint='shipped'}, {name='yes or no', steps=2, "
    "question_kinds=['TorF1', 'TorF2']}, {name='routes', steps=3, question_kinds=['planning'], replay=0.5}]",
]


def changed(config: Config, **train) -> Config:
    overrides = [f"train.{key}={json.dumps(value)}" for key, value in train.items()]
    return load_config("tiny", [*SMALL, f"data.path={config.data.path}", *overrides])


def stages(config: Config, *later: str, questions: int = 6) -> Config:
    text = ", ".join(["{name='w', kind='sft', steps=0, checkpoint='shipped'}", *later])
    settings = [f"data.path={config.data.path}", f"train.stages=[{text}]", f"train.prompts_per_step={questions}"]
    return load_config("tiny", [*SMALL, *settings])
