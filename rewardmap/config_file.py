"""Configurations from TOML and back, with ``key=value`` overrides.

Every key is checked: an unknown one is an error that names the nearest known key.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import TypeAdapter, ValidationError

from rewardmap.config import Config, ConfigError, StageConfig, ordered_stages

PACKAGE_CONFIGS = Path(__file__).parent / "configs"
_ADAPTER = TypeAdapter(Config)


def load_config(source: str | Path | None = "tiny", overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file (a path, or the name of a shipped one such as ``tiny``; None: the defaults) and apply
    ``key.path=value`` overrides, in order; one that is the path of another TOML file lays that file over the first.

    Override values are TOML (``train.seed=3``, ``data.path="maps"``); a bare word is taken as a string.

    Raises:
        ConfigError: no such file, not TOML, an unknown key (the nearest known one is named), a value of the wrong type.
    """
    tree: dict[str, Any] = {}
    where = "configuration"
    if source is not None:
        path = _find(source)
        where = str(path)
        tree = _read(path)
    for override in overrides:
        if override.endswith(".toml") and "=" not in override:
            where += f" with {override}"
            _lay_over(tree, _read(_find(override)))
        else:
            _apply_override(tree, override)
    return from_dict(tree, where=where)


def from_dict(tree: dict[str, Any], where: str = "configuration") -> Config:
    """Build and check a ``Config`` from nested dictionaries. Raises ConfigError."""
    train = tree.get("train")
    if isinstance(train, dict) and isinstance(train.get("stages"), str):
        train = dict(train)
        steps = train.pop("steps", 203)
        if type(steps) is not int or steps < 1:
            raise ConfigError(f"{where}: train.steps={steps!r}: a number of steps, at least 1")
        stages = ordered_stages(train["stages"], steps)
        tree = {**tree, "train": {**train, "stages": [_without_none(dataclasses.asdict(stage)) for stage in stages]}}
    try:
        return _ADAPTER.validate_python(tree)
    except ValidationError as error:
        raise ConfigError(f"{where}: " + "; ".join(map(_explain, _different(error.errors())))) from None


def to_dict(config: Config) -> dict[str, Any]:
    """Nested dictionaries without the keys that are None (TOML has no null)."""
    return _without_none(dataclasses.asdict(config))


def dump_toml(config: Config) -> str:
    """The resolved configuration as TOML; ``load_config`` reads it back to an equal ``Config``."""
    return tomli_w.dumps(to_dict(config))


def with_absolute_paths(config: Config) -> Config:
    """Paths from the working directory made absolute, so that a run goes on from any other."""
    server, path = config.rollout.server, config.data.path
    changed = replace(
        server,
        keys_file=server.keys_file and os.path.abspath(server.keys_file),
        # A bare name is looked for in PATH. Links stay: they tell an interpreter its environment.
        python=os.path.abspath(server.python) if server.python and os.sep in server.python else server.python,
    )
    stages = tuple(replace(stage, checkpoint=_folder(stage.checkpoint)) for stage in config.train.stages)
    return replace(
        config,
        data=replace(config.data, path=path if path is None or "://" in path else os.path.abspath(path)),
        policy=replace(config.policy, model=_folder(config.policy.model) or "tiny"),
        rollout=replace(config.rollout, server=changed),
        train=replace(config.train, stages=stages),
    )


def _folder(name: str | None) -> str | None:
    """Absolute where it is a folder, and not a name in the package or on the hub."""
    return os.path.abspath(name) if name and os.path.isdir(name) else name


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 ({error}); save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def _lay_over(tree: dict[str, Any], other: dict[str, Any]) -> None:
    """Set every value of ``other`` in ``tree``."""
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _lay_over(tree[key], value)
        else:
            tree[key] = value


def _find(source: str | Path) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    shipped = PACKAGE_CONFIGS / f"{source}.toml"
    if shipped.is_file():
        return shipped
    if (path / "config.toml").is_file():
        raise ConfigError(f"{path} is a run: go on with --resume {path}, or repeat it with {path / 'config.toml'}")
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


def _different(items: Sequence[Any]) -> list[Any]:
    """Of the values that one list lacks the last alone, whose place says how many are wanted."""
    lacking = {item["loc"][:-1]: item for item in items if _lacks(item)}
    return [item for item in items if not _lacks(item) or item is lacking[item["loc"][:-1]]]


def _lacks(item: Any) -> bool:
    return item["type"] == "missing" and isinstance(item["loc"][-1], int)


def _explain(item: Any) -> str:
    location = [str(part) for part in item["loc"]]
    key = ".".join(location)
    if item["type"] == "value_error":  # of several settings together: it names those that matter
        return ": ".join(filter(None, (key, str(item["ctx"]["error"]))))
    if _lacks(item):
        return f"{'.'.join(location[:-1])}={item['input']!r}: {item['loc'][-1] + 1} values are wanted"
    if item["type"] == "too_long":
        return f"{key}={item['input']!r}: {item['ctx']['max_length']} values are wanted"
    if item["type"] == "missing":
        return f"{key} is missing"
    if item["type"] == "tuple_type":
        return f"{key}={item['input']!r}: not a list in TOML; write it in brackets"
    if item["type"] == "dataclass_type":
        return f"{key}={item['input']!r}: a section; set keys of it: {', '.join(_known_keys(location))}"
    if item["type"] == "string_type":
        value = f"{item['input']!s:.80}"
        return f"{key}={value}: not text in TOML; write it in quotes, in a shell as '\"{value}\"'"
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
