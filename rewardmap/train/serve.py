"""Servers alone, for runs and evaluations elsewhere: ``rewardmap serve CONFIG``."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from rewardmap.config import Config, ConfigError
from rewardmap.rollout.engine import RolloutError
from rewardmap.rollout.sglang_adapters import Adapters
from rewardmap.rollout.sglang_server import KEYS_FILE, Router, need_sglang, stop_all
from rewardmap.train.engines import need_client
from rewardmap.train.faults import stop_request
from rewardmap.train.parallel import computes_in
from rewardmap.train.start import initial_policy

_POLL_S = 1.0


def serve(config: Config, folder: Path, *, console: Console) -> None:
    """Start the servers of ``rollout.server`` with the configuration's first weights, print where they are, and keep
    them until a signal ends this process.

    Args:
        folder: for keys, logs and the weights that are served; used again, its keys stay valid.

    Raises:
        ConfigError: settings that describe running servers, adapters that SGLang does not serve, or no SGLang to serve
            with: in this order, for a mistake in the settings is no reason to install anything.
        RolloutError: a server that does not get ready, or ended.
    """
    server = config.rollout.server
    if server.urls:
        raise ConfigError(f"rollout.server.urls={list(server.urls)} names servers that run already; leave it out")
    say = partial(console.print, highlight=False, soft_wrap=True)
    adapters = Adapters.of(config)
    need_client()
    need_sglang(server)

    from rewardmap.train.synced import start_servers

    policy = initial_policy(config, replace(config.policy, device="cpu"))  # a GPU's memory is the server's
    dtype = computes_in(config)
    servers, keys = start_servers(policy, server, folder, say, load_weights=True, dtype=dtype, adapters=adapters)
    del policy  # the servers have loaded it
    router: Router | None = None
    try:
        if server.router:
            router = Router(server, [one.url for one in servers], folder, keys)
            router.start()
            say(f"router: {router.url} (for sampling; weights go to the servers themselves)")
        for one in servers:
            say(f"server {one.index}: {one.url}")
        urls = ", ".join(f'"{one.url}"' for one in servers)
        say(f"keys: {(folder / KEYS_FILE).absolute()}")
        say(f"a run uses them with rollout.engine=sglang 'rollout.server.urls=[{urls}]' rollout.server.keys_file=KEYS")
        with stop_request("ending the servers", say) as stop:
            while not stop.number:
                time.sleep(_POLL_S)
                ended = next((one for one in servers if one.ended), None)
                if ended is not None:
                    raise RolloutError(f"SGLang server {ended.index} ended; {ended.last_lines()}")
        say("servers ended")
    finally:
        if router is not None:
            router.stop()
        stop_all(servers)
