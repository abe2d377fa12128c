"""Whether a server fits the trainer, asked before the first step: version, model, tokenizer, context length."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rewardmap.config import ConfigError
from rewardmap.policy import Policy
from rewardmap.rollout.sglang_adapters import Adapters
from rewardmap.rollout.sglang_client import SGLangClient

OLDEST, NEWEST, TOO_NEW = (0, 5, 17), (0, 5, 23), (0, 6)
"""Oldest version that works, newest one tried, and the first that nobody can know anything about."""
_RESERVE = 8
"""What a context must hold besides a prompt and its answer for the server to score them: SGLang keeps 7 tokens free of
an input, and a scoring request has one more."""
_VOLATILE = {"transformers_version", "torch_dtype", "dtype", "_name_or_path", "use_cache", "architectures"}
_TOKENIZER_SAMPLE = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Zürich 地铁 Line 2?<|im_end|>\n"


class Server(NamedTuple):
    """What there is to know about one that fits."""

    limit: int
    """The longest sequence it can sample and score, in tokens."""
    seeded: bool
    """Whether it samples by the seed in a request: without one all answers to a prompt are the same."""


async def check_server(client: SGLangClient, policy: Policy, adapters: Adapters | None = None) -> Server:
    """What a server that fits can do.

    Args:
        adapters: that it must be able to apply.

    Raises:
        ConfigError: a version, a model or a tokenizer that does not fit, by name.
        RolloutError: unreachable, or a key that is refused.
    """
    server = await client.call("/server_info", method="GET", admin=False)
    model = await client.call("/model_info", method="GET", admin=False)
    version = _check_version(client.url, str(server.get("version")))
    if adapters is not None:
        adapters.check(client.url, server, version)
    _check_model(client.url, model, policy)
    tokens = await client.call("/tokenize", {"prompt": _TOKENIZER_SAMPLE, "add_special_tokens": False}, admin=False)
    ours = policy.tokenizer(_TOKENIZER_SAMPLE, add_special_tokens=False).input_ids
    if tokens["tokens"] != ours:
        raise ConfigError(
            f"{client.url}: its tokenizer differs from the trainer's ({len(tokens['tokens'])} tokens of a sample text "
            f"against {len(ours)}); serve the folder that policy.model names"
        )
    limit = int(min(tokens["max_model_len"], server["max_total_num_tokens"])) - _RESERVE
    return Server(limit, bool(server.get("enable_deterministic_inference") or server.get("rl_on_policy_target")))


def check_length(prompt_tokens: int, max_new_tokens: int, limit: int, uid: str) -> None:
    """Raises ConfigError when a prompt and its longest answer do not fit into the server's context."""
    if prompt_tokens + max_new_tokens > limit:
        raise ConfigError(
            f"{uid}: {prompt_tokens} prompt tokens and rollout.max_new_tokens={max_new_tokens} exceed the {limit} "
            "tokens that the server takes; lower policy.max_pixels or max_new_tokens, or give the server more memory"
        )


def _check_version(url: str, version: str) -> tuple[int, ...]:
    numbers = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    found = tuple(int(number or 0) for number in numbers.groups()) if numbers else (0,)
    if not OLDEST <= found < TOO_NEW:
        tried = f"{'.'.join(map(str, OLDEST))} to {'.'.join(map(str, NEWEST))}"
        raise ConfigError(f"{url}: SGLang {version} is not supported; versions {tried} are known to work")
    return found


def _check_model(url: str, model: Mapping[str, Any], policy: Policy) -> None:
    ours = policy.model.config
    if model.get("model_type") not in (None, ours.model_type):
        raise ConfigError(f"{url} serves a model of type '{model['model_type']}', the trainer's is '{ours.model_type}'")
    path = Path(str(model.get("model_path"))) / "config.json"
    if not path.is_file():  # on another machine, or a hub's name: the weights' names and shapes will tell
        return
    served, expected = json.loads(path.read_text(encoding="utf-8")), json.loads(ours.to_json_string())
    different = sorted(_differences(served, expected))
    if different:
        raise ConfigError(f"{url} serves {path.parent}, whose configuration differs from the trainer's: {different[0]}")


def _differences(served: Any, expected: Any, where: str = "") -> list[str]:
    """Keys that both have with different values; a key that one lacks may be a newer version's default."""
    if isinstance(served, dict) and isinstance(expected, dict):
        both = (served.keys() & expected.keys()) - _VOLATILE
        return [text for key in both for text in _differences(served[key], expected[key], f"{where}.{key}".lstrip("."))]
    return [] if served == expected else [f"{where} is {served!r} there, {expected!r} here"]
