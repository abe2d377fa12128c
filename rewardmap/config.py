"""The configuration: a tree of frozen dataclasses read from TOML, with ``key=value`` overrides.

Every key is checked: an unknown one is an error that names the nearest known key. Defaults here are the paper's recipe
(arXiv 2510.02240) where it states one; the file shipped for small machines is ``rewardmap/configs/tiny.toml``.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from rewardmap.types import KINDS

_STRICT = ConfigDict(extra="forbid")
PACKAGE_CONFIGS = Path(__file__).parent / "configs"


class ConfigError(ValueError):
    """A wrong configuration: names the key, the value and the remedy."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DataConfig:
    path: str | None = None
    """Folder of a ReasonMap-Train data set. None: a seeded one is generated into the run folder."""
    train_split: str = "train"
    test_split: str = "test"
    level: Literal["tiny", "full"] = "tiny"
    """Size of generated maps; ignored with ``path``."""
    train_maps: int = 300
    test_maps: int = 150
    seed: int = 0
    """Seed of the generated maps and questions."""
    on_bad_row: Literal["raise", "skip"] = "raise"
    """What a malformed row does: stop before training, or be skipped and counted."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class PolicyConfig:
    model: str = "tiny"
    """``tiny``: the small Qwen2.5-VL built here. Else a folder or hub name, e.g. ``Qwen/Qwen2.5-VL-7B-Instruct``."""
    device: str = "auto"
    """``auto``: cuda where there is one, else cpu."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    freeze_vision: bool = True
    """The vision tower does not train: its outputs are computed once per map and run."""
    min_pixels: int = 3136
    """Smallest picture the processor makes, in pixels."""
    max_pixels: int = 12_845_056
    """Largest picture the processor makes, in pixels (16,384 visual tokens of 28 x 28)."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class RolloutConfig:
    engine: Literal["local"] = "local"
    group_size: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_new_tokens: int = 512
    batch_sequences: int = 256
    """Answers decoded side by side."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class RewardConfig:
    mode: Literal["reference", "paper", "graph"] = "reference"
    weight_on: Literal["reward", "advantage"] = "advantage"
    """Where the difficulty weight acts. On the reward, division by the group's deviation cancels it exactly."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class StageConfig:
    name: str
    kind: Literal["sft", "rl"] = "rl"
    steps: int = 100
    question_kinds: tuple[str, ...] = KINDS
    replay: float = 0.0
    """Share of each batch drawn from all kinds instead of ``question_kinds`` (0..1)."""
    learning_rate: float | None = None
    """Overrides ``train.learning_rate`` inside the stage."""
    checkpoint: str | None = None
    """Only for ``sft``: load these weights instead of training (``shipped``: the tiny warm start in the package)."""

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.question_kinds if kind not in KINDS]
        if unknown or not self.question_kinds:
            raise ValueError(f"question_kinds={list(self.question_kinds)}: choose from {', '.join(KINDS)}")
        if not 0 <= self.replay <= 1:
            raise ValueError(f"replay={self.replay}: a share between 0 and 1")
        if self.checkpoint is not None and self.kind != "sft":
            raise ValueError("checkpoint is only for a stage of kind 'sft'")


def _default_stages() -> tuple[StageConfig, ...]:
    return (
        StageConfig(name="true-false", question_kinds=("TorF1", "TorF2")),
        StageConfig(name="counting", question_kinds=("Counting2", "Counting3")),
        StageConfig(name="local-counting", question_kinds=("Counting1",)),
        StageConfig(name="planning", question_kinds=("planning",)),
    )


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TrainConfig:
    seed: int = 0
    stages: tuple[StageConfig, ...] = dataclasses.field(default_factory=_default_stages)
    prompts_per_step: int = 16
    learning_rate: float = 1e-6
    warmup_steps: int = 0
    """Steps of linear warm-up at the start of the run's optimizer."""
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    objective: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo", "sapo", "reinforce"] = "grpo"
    clip_eps_low: float = 0.2
    clip_eps_high: float = 0.2
    entropy_coef: float = 0.0
    advantage_scale: Literal["group", "batch", "none"] = "group"
    """Divide mean-centred rewards by the group's or the batch's standard deviation, or not at all (Dr.GRPO)."""
    advantage_control: Literal["none", "zero", "shuffle"] = "none"
    """A control experiment: advantages set to zero, or shuffled within the batch. Learning must vanish."""
    skip_equal_groups: bool = True
    """Groups whose rewards are all equal give no gradient and are left out (they still count in the normaliser)."""
    max_tokens_per_micro_batch: int = 16_384
    checkpoint_every: int = 100
    """Steps between checkpoints; also one at each stage's end."""
    keep_checkpoints: int = 2
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class EvalConfig:
    before: bool = True
    """Evaluate the warm start on the held-out maps before reinforcement learning."""
    text_only: bool = True
    """Evaluate the trained model once more with maps swapped between questions."""
    max_problems: int = 0
    """Evaluate the first so many problems of the test split; 0 for all."""
    samples: int = 24
    """Answers shown beside their maps in the run folder."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Config:
    """Everything one run depends on; written to the run folder as ``config.toml``."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    policy: PolicyConfig = dataclasses.field(default_factory=PolicyConfig)
    rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    reward: RewardConfig = dataclasses.field(default_factory=RewardConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)


_ADAPTER = TypeAdapter(Config)


def load_config(source: str | Path = "tiny", overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file (a path, or the name of a shipped one such as ``tiny``) and apply ``key.path=value`` overrides.

    Override values are TOML (``train.seed=3``, ``data.path="maps"``); a bare word is taken as a string.

    Raises:
        ConfigError: no such file, not TOML, an unknown key (the nearest known one is named), a value of the wrong type.
    """
    path = _find(source)
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    for override in overrides:
        _apply_override(tree, override)
    return from_dict(tree, where=str(path))


def from_dict(tree: dict[str, Any], where: str = "configuration") -> Config:
    """Build and check a ``Config`` from nested dictionaries. Raises ConfigError."""
    try:
        return _ADAPTER.validate_python(tree)
    except ValidationError as error:
        raise ConfigError(f"{where}: " + "; ".join(_explain(item) for item in error.errors())) from None


def to_dict(config: Config) -> dict[str, Any]:
    """Nested dictionaries without the keys that are None (TOML has no null)."""
    return _without_none(dataclasses.asdict(config))


def dump_toml(config: Config) -> str:
    """The resolved configuration as TOML; ``load_config`` reads it back to an equal ``Config``."""
    return tomli_w.dumps(to_dict(config))


def _find(source: str | Path) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    shipped = PACKAGE_CONFIGS / f"{source}.toml"
    if shipped.is_file():
        return shipped
    known = sorted(file.stem for file in PACKAGE_CONFIGS.glob("*.toml"))
    raise ConfigError(f"no configuration '{source}': give a path to a TOML file or one of: {', '.join(known)}")


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key.strip():
        raise ConfigError(f"override '{override}': write it as key=value, e.g. train.seed=3")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, leaf = key.strip().split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override '{override}': '{parent}' is a value, not a section")
    node[leaf] = value


def _explain(item: Any) -> str:
    location = [str(part) for part in item["loc"]]
    key = ".".join(location)
    if item["type"] not in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{key}={item['input']!r}: {item['msg']}"
    near = difflib.get_close_matches(location[-1], _known_keys(location[:-1]), n=1, cutoff=0.0)
    return f"unknown key '{key}'; did you mean '{'.'.join([*location[:-1], *near])}'?"


def _known_keys(section: Sequence[str]) -> list[str]:
    node: Any = Config
    for part in section:
        if part.isdigit():
            node = StageConfig
            continue
        hint = {field.name: field for field in dataclasses.fields(node)}[part]
        node = hint.default_factory() if callable(hint.default_factory) else hint.default
        node = StageConfig if isinstance(node, tuple) else type(node)
    return [field.name for field in dataclasses.fields(node)]


def _without_none(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _without_none(value) for key, value in node.items() if value is not None}
    if isinstance(node, (list, tuple)):
        return [_without_none(value) for value in node]
    return node
