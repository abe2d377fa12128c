"""The rollout engine that a configuration asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rewardmap.config import Config, ConfigError
from rewardmap.policy import Policy, load_policy
from rewardmap.rollout.engine import RolloutEngine
from rewardmap.rollout.local import LocalEngine
from rewardmap.rollout.sglang_adapters import PREFIX, Adapters
from rewardmap.rollout.sglang_server import Keys, need_sglang
from rewardmap.train.parallel import Forward, computes_in
from rewardmap.train.ranks import ALONE, Ranks, SharedRollouts
from rewardmap.types import Problem

SERVERS = "servers"
"""Folder of a run with the servers' logs, keys and model files."""


def make_engine(
    config: Config,
    policy: Policy,
    folder: Path,
    problems: Sequence[Problem],
    progress: Callable[[str], None],
    ranks: Ranks = ALONE,
    forward: Forward | None = None,
) -> RolloutEngine:
    """The engine of ``config.rollout``; its servers, if any, are running, hold the policy's weights and fit it.

    Args:
        folder: of the run.
        problems: all that will be asked; each must fit into the servers' context.
        progress: told what is going on while servers start.
        ranks: of the job; every rank makes this call.
        forward: of a sharded policy.

    Raises:
        ConfigError: aiohttp is not installed, a server does not fit, or adapters cannot be sent alone.
        RolloutError: servers that cannot be reached or started.
        OtherRankError: either of them, on another rank.
    """
    if config.rollout.engine == "local":
        engine = LocalEngine(policy, config.rollout.batch_sequences, config.rollout.batch_tokens)
        return engine if forward is None else SharedRollouts(engine, ranks, policy.whole_weights)
    need_client()
    from rewardmap.train.synced import SyncedEngine

    servers = SyncedEngine(
        policy,
        config.rollout.server,
        folder / SERVERS,
        progress,
        dtype=computes_in(config),
        ranks=ranks,
        forward=forward,
        ahead=config.rollout.staleness > 0,
        adapters=Adapters.of(config),
    )
    try:
        servers.check(problems, config.rollout.max_new_tokens)
    except BaseException:
        servers.close()
        raise
    return servers


def attach(config: Config, url: str, problems: Sequence[Problem]) -> tuple[RolloutEngine, str]:
    """An engine on a running server, whose weights stay as they are, with the adapter that a run left there, and what
    identifies them.

    The tokenizer, the image processor and the configuration are read from ``policy.model`` or, where that is not set,
    from the folder that the server serves.

    Raises:
        ConfigError: no such folder here, or a server that does not fit it or its questions.
        RolloutError: it cannot be reached, or refuses the key.
    """
    need_client()
    from rewardmap.rollout.sglang_client import EventLoop, SGLangClient
    from rewardmap.rollout.sglang_engine import SGLangEngine

    server = replace(config.rollout.server, urls=(url,), router=False)
    keys = Keys.read(server.keys_file) if server.keys_file else Keys()
    loop, client = EventLoop(), SGLangClient(url, keys, server.request_timeout_s)

    async def ask() -> dict[str, str]:
        try:
            answer: dict[str, str] = await client.call("/model_info", method="GET", admin=False)
            return answer
        finally:
            await client.close()

    try:
        served = loop.run(ask())
    finally:
        loop.close()
    folder = served["model_path"] if config.policy.model == "tiny" else config.policy.model
    if config.policy.model == "tiny" and not Path(folder).is_dir():
        raise ConfigError(f"{url} serves '{folder}', which is not here; name that model with policy.model=FOLDER")
    engine = SGLangEngine(load_policy(folder, config.policy), server, [], keys)
    if served["weight_version"].startswith(PREFIX):
        engine.adapter = served["weight_version"]
    try:
        engine.check(problems, config.rollout.max_new_tokens)
    except BaseException:
        engine.close()
        raise
    return engine, f"{url} {served['model_path']} version {served['weight_version']}"


def need_engine(config: Config, ranks: Ranks = ALONE) -> None:
    """Asks for what the engine cannot start without, before anything is drawn or loaded. Every rank makes this call.

    Raises:
        ConfigError: aiohttp, or the SGLang of our own servers, is not installed, or adapters cannot be sent alone.
        OtherRankError: either of them, on another rank.
    """

    def ask() -> None:
        Adapters.of(config)
        need_client()
        if not config.rollout.server.urls and ranks.local_rank == 0:
            need_sglang(config.rollout.server)

    if config.rollout.engine == "sglang":
        ranks.patiently(ask)


def need_client() -> None:
    """Raises ConfigError where the client's only dependency is missing."""
    try:
        import aiohttp  # noqa: F401
    except ModuleNotFoundError:
        raise ConfigError("SGLang servers are spoken to with aiohttp: pip install 'rewardmap[sglang]'") from None
