"""Ranks of jobs with SGLang servers, started by ``test_sglang_ranks.py``, which writes folders to its stdin.

``FOLDER/jobs.json``: name -> size, scenario, settings of ``rollout.server`` and what else the scenario reads. Imports
once, then forks the ranks of one job after the other; what each saw comes back in ``FOLDER/NAME/RANK.json``. After the
last job of a folder it prints a line.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import urllib.request
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

sys.path.append(str(Path(__file__).parent))
from parallel_job import fork_ranks

from rewardmap.config import Config, ParallelConfig, PolicyConfig, RolloutConfig, ServerConfig
from rewardmap.config_file import load_config
from rewardmap.policy import Policy, load_policy
from rewardmap.rollout.engine import RolloutError
from rewardmap.rollout.sglang_adapters import Adapters
from rewardmap.rollout.sglang_engine import SGLangEngine
from rewardmap.rollout.sglang_server import Keys
from rewardmap.tiny import WARM_START
from rewardmap.train import run, weights
from rewardmap.train.adapter_sync import AdapterSync
from rewardmap.train.faults import Stopped
from rewardmap.train.parallel import Forward, prepare_policy, shard_policy
from rewardmap.train.ranks import OtherRankError, Ranks, group_to_json, join_ranks
from rewardmap.train.synced import SyncedEngine
from rewardmap.train.weight_sync import WeightSync
from rewardmap.transit.draw import draw_map, encode_png
from rewardmap.transit.generate import generate_network
from rewardmap.types import Problem, SamplingParams

SAMPLING = SamplingParams(max_new_tokens=24)
Settings = dict[str, Any]


def make_config(settings: Settings) -> Config:
    return Config(
        policy=PolicyConfig(device="cpu", **settings.get("policy", {})),
        parallel=ParallelConfig(**settings.get("parallel", {})),
        rollout=RolloutConfig(server=ServerConfig(**settings["server"])),
    )


def make_policy(settings: Settings, ranks: Ranks) -> tuple[Policy, Forward, torch.dtype]:
    """The tiny policy, split over the ranks, adapters filled."""
    config = make_config(settings)
    policy = load_policy(WARM_START, config.policy)
    torch.manual_seed(0)
    prepare_policy(policy, config)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    forward = shard_policy(policy, config.parallel, ranks, torch.device("cpu"))
    return policy, forward, getattr(torch, config.parallel.compute_dtype or "float32")


def make_problems(count: int) -> list[Problem]:
    pictures = [encode_png(draw_map(generate_network("tiny-easy", np.random.default_rng(n), f"a/{n}"))) for n in (0, 1)]
    return [
        Problem(f"q-{n}", pictures[n % 2], f"How many lines? ({n})", "Counting3", 2, "", "", "a/0", "easy")
        for n in range(count)
    ]


def push(folder: Path, settings: Settings, ranks: Ranks) -> Settings:
    """Weights alone: what is gathered at once, and how a push ends."""
    policy, _, dtype = make_policy(settings, ranks)
    gathered: list[weakref.ref[torch.Tensor]] = []
    whole, seen = weights._whole, {"held": 0, "largest": 0}

    def counted(weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        before = sum(known.nbytes for ref in gathered if (known := ref()) is not None)
        result = whole(weight, *rest)
        gathered.append(weakref.ref(result))
        seen["held"] = max(seen["held"], before + result.nbytes)
        seen["largest"] = max(seen["largest"], result.nbytes)
        return result

    weights._whole = counted
    config = ServerConfig(**settings["server"] if ranks.is_first else {})
    engine = SGLangEngine(policy, config, [], Keys("sample-key", "admin-key"))
    adapters = Adapters.of(make_config(settings))
    if adapters is None:
        sync = WeightSync(policy, engine, folder, dtype, ranks)
    else:
        sync = AdapterSync(policy, engine, folder, adapters, dtype, ranks)
    begin = time.monotonic()
    try:
        for version in settings.get("versions", [3]):
            sync.push(version)
        return seen
    except (RolloutError, OtherRankError) as error:
        return {"error": type(error).__name__, "says": str(error), "seconds": time.monotonic() - begin}
    finally:
        sync.close()
        engine.close()


def sample(folder: Path, settings: Settings, ranks: Ranks) -> Settings:
    """Answers, a push, more answers; the other rank comes late to each."""
    policy, forward, dtype = make_policy(settings, ranks)
    config = ServerConfig(**settings["server"])
    named: Settings = {"dtype": dtype, "ranks": ranks, "forward": forward, "ahead": settings.get("ahead", False)}
    named["adapters"] = Adapters.of(make_config(settings))
    engine = SyncedEngine(policy, config, folder / "servers", print, **named)
    calls: list[int] = []

    def late() -> None:
        if ranks.rank == 1 and config.urls:
            time.sleep(0.5)
            request = urllib.request.Request(
                f"{config.urls[0]}/tokenize", b'{"prompt": "I come"}', {"Content-Type": "application/json"}
            )
            urllib.request.urlopen(request, timeout=10).close()

    try:
        problems = make_problems(settings.get("problems", 5))
        late()
        groups = engine.generate(problems, 2, SAMPLING, lambda index, group: calls.append(index))
        late()
        engine.update_weights(1)
        metrics = engine.metrics()
        later = engine.generate(problems[:1], 2, SAMPLING)
        sharded = all(type(parameter).__name__ == "DTensor" for parameter in policy.text_model.parameters())
        return {
            "groups": [group_to_json(group) for group in (*groups, *later)],
            "uids": [group.problem.uid for group in groups],
            "calls": calls,
            "metrics": {name: value for name, value in metrics.items() if name != "sync_seconds"},
            "restarts": [replica.restarts for replica in engine._engine.replicas],
            "sharded": sharded,
        }
    finally:
        engine.close()


def whole_run(folder: Path, settings: Settings) -> None:
    """Its exit code where a signal stops it, which rank 1 gets after the first step if ``stop`` asks for that."""
    out, rank = folder / "run", int(os.environ["RANK"])
    if settings.get("stop") and rank == 1:
        threading.Thread(target=stop_after_first_step, args=(out / "metrics.jsonl",), daemon=True).start()
    try:
        if settings.get("resume"):
            run.resume(out, console=Console(quiet=True))
        else:
            run.train(load_config("tiny", settings["overrides"]), out, console=Console(quiet=True))
    except Stopped as stopped:
        (folder / f"{rank}.json").write_text(json.dumps({"says": str(stopped), "code": stopped.exit_code}))


def stop_after_first_step(metrics: Path) -> None:
    while not metrics.exists() or not metrics.read_text():
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)


def one_rank(folder: Path, settings: Settings) -> None:
    torch.set_num_threads(1)
    os.dup2(2, 1)  # stdout is for the line after the last job
    if settings.get("nodes"):
        os.environ["LOCAL_RANK"] = "0"
    if settings["scenario"] == "run":
        whole_run(folder, settings)
        return
    scenarios: dict[str, Callable[[Path, Settings, Ranks], Settings]] = {"push": push, "sample": sample}
    with join_ranks(settings.get("timeout_seconds", 60)) as ranks:
        seen = scenarios[settings["scenario"]](folder, settings, ranks)
        (folder / f"{ranks.rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    for line in sys.stdin:
        place = Path(line.rstrip("\n"))
        for name, job in json.loads((place / "jobs.json").read_text()).items():
            (place / name).mkdir(exist_ok=True)
            fork_ranks(job["size"], lambda folder=place / name, job=job: one_rank(folder, job))
        print("done", flush=True)
