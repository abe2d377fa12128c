"""What a run depends on besides its weights: configuration, data, software and random states. Kept in every
checkpoint, compared at resume."""

from __future__ import annotations

import hashlib
import json
import platform
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers

from rewardmap.config import Config
from rewardmap.config_file import to_dict
from rewardmap.train.ranks import Ranks
from rewardmap.types import Problem


def identity(config: Config, splits: Mapping[str, Sequence[Problem]], ranks: Ranks) -> dict[str, Any]:
    """Config, a digest of each split's questions and pictures, versions. JSON values."""
    return {
        "config": to_dict(config),
        "data": {name: _fingerprint(problems) for name, problems in splits.items()},
        "software": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "ranks": ranks.size,
        },
    }


def changes(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two trees of JSON values, a line for each key: ``config.train.seed: 0, now 1``."""
    lines: list[str] = []
    for key in sorted({*before, *now}):
        old, new, name = before.get(key), now.get(key), f"{prefix}{key}"
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += changes(old, new, f"{name}.")
        elif _tables(old) and _tables(new):
            lines += changes(_numbered(old), _numbered(new), f"{name}.")
        elif old != new:
            lines.append(f"{name}: {json.dumps(old)}, now {json.dumps(new)}")
    return lines


def random_state() -> dict[str, Any]:
    """Of every library's global generator, as JSON values."""
    version, words, gauss = random.getstate()
    kind, keys, place, has_gauss, cached = cast(tuple[Any, ...], np.random.get_state())
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [kind, keys.tolist(), place, has_gauss, cached],
        "torch": bytes(torch.get_rng_state().tolist()).hex(),
    }
    if torch.cuda.is_available():
        state["cuda"] = bytes(torch.cuda.get_rng_state().tolist()).hex()
    return state


def restore_random_state(state: Mapping[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, place, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), place, has_gauss, cached))
    torch.set_rng_state(torch.tensor(list(bytes.fromhex(state["torch"])), dtype=torch.uint8))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(list(bytes.fromhex(state["cuda"])), dtype=torch.uint8))


def _tables(value: Any) -> bool:
    return isinstance(value, Sequence) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _numbered(tables: Any) -> dict[str, Any]:
    return {str(number): table for number, table in enumerate(tables)}


def _fingerprint(problems: Sequence[Problem]) -> dict[str, Any]:
    questions, pictures = hashlib.blake2b(digest_size=8), hashlib.blake2b(digest_size=8)
    seen: dict[str | bytes, bytes] = {}
    for problem in problems:
        if problem.image not in seen:
            data = problem.image if isinstance(problem.image, bytes) else Path(problem.image).read_bytes()
            seen[problem.image] = hashlib.blake2b(data, digest_size=8).digest()
        pictures.update(seen[problem.image])
        fields = {key: value for key, value in asdict(problem).items() if key != "image"}
        questions.update(json.dumps(fields, sort_keys=True, default=str).encode())
    return {"problems": len(problems), "questions": questions.hexdigest(), "pictures": pictures.hexdigest()}
