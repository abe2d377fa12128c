"""Adapters sent alone, against real SGLang servers on the CPU that apply them; see ``test_sglang_real.py``."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
from pathlib import Path

import pytest
import torch
from rich.console import Console

from rewardmap.config import PolicyConfig, ServerConfig
from rewardmap.config_file import load_config
from rewardmap.report import read_metrics
from rewardmap.rollout.engine import RolloutError
from rewardmap.rollout.sglang_adapters import OLDEST, Adapters
from rewardmap.train.lora import add_lora
from rewardmap.train.run import train
from rewardmap.train.synced import SyncedEngine
from rewardmap.types import SamplingParams

sys.path.append(str(Path(__file__).parent))
import forest_models
import test_sglang_real as real

pytestmark = pytest.mark.sglang
pytest.importorskip("peft")
VERSIONS = [one for one in real.VERSIONS if tuple(map(int, one.split("."))) >= OLDEST]
CASES = [(version, family) for version in VERSIONS for family in ("qwen2_5_vl", "qwen3_vl")]
LORA = PolicyConfig(lora_rank=4, lora_alpha=6)
ADAPTERS = Adapters(4, 6, LORA.lora_targets)
SAMPLING = real.SAMPLING
problems = real.problems


def start(version, family, folder, **settings):
    policy = forest_models.build(family, dtype=torch.float32)
    add_lora(policy, LORA)
    python = real.interpreter(version)
    config = ServerConfig(python=python, args=("--max-total-tokens", "16384"), bucket_mb=1, **settings)
    return SyncedEngine(policy, config, folder, lambda line: None, adapters=ADAPTERS)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def engine(request, tmp_path_factory):
    engine = start(*request.param, tmp_path_factory.mktemp("servers"))
    yield engine
    engine.close()


def shake(policy, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)


def loaded(engine):
    """Names of the adapters at the first server."""
    client = engine._engine.replicas[0].client
    models = engine._engine.loop.run(client.call("/v1/models", method="GET", admin=False))["data"]
    return [model["id"] for model in models if model["parent"] is not None]


def push(engine, seed):
    """Another adapter; the version it has."""
    shake(engine._policy, seed)
    version = engine._engine.version + 1
    engine.update_weights(version)
    assert loaded(engine) == [engine._engine.adapter]
    return version


def distance(policy, group):
    """Of a sampled answer's log-probabilities from the trainer's."""
    rollout = group.rollouts[0]
    return (real.reference(policy, group, rollout) - torch.tensor(rollout.rollout_logprobs)).abs().max()


@pytest.mark.parametrize("route", ["tensor", "distributed", "disk"])
def test_weights_by_each_route_and_then_adapters(route, engine, problems):
    engine._sync._config = dataclasses.replace(engine._config, sync=route)
    client = engine._engine.replicas[0].client
    engine._engine.loop.run(client.call("/update_weight_version", {"new_version": "another run's"}))
    with pytest.raises(RolloutError, match="sampled with weights another run's"):
        engine.generate(problems[:1], 2, SAMPLING)
    with torch.no_grad():  # as if the weights were another run's, too
        for parameter in engine._policy.text_model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    before = None
    for seed in (1, 2):
        version = push(engine, 10 * len(route) + seed)
        assert before is None or engine.metrics()["sync_drift_max"] < 1e-4
        groups = engine.generate(problems, 4, SAMPLING)
        real.check(engine, groups, version)
        assert before is None or distance(engine._policy, before) > 1e-2
        before = groups[0]


def test_a_prompt_is_computed_anew_for_each_adapter(engine, problems):
    """Without the flush: what another adapter left in the prefix cache is not used."""
    client = engine._engine.replicas[0].client
    plain, flushes = client.call, []

    async def unflushed(path, body=None, **named):
        if path.startswith("/flush_cache"):
            return flushes.append(path)
        return await plain(path, body, **named)

    client.call = unflushed
    try:
        engine.generate(problems, 4, SAMPLING)
        version = push(engine, 3)
        assert engine.metrics()["sync_drift_max"] < 1e-4
        real.check(engine, engine.generate(problems, 4, SAMPLING), version)
    finally:
        client.call = plain
    assert flushes


def test_an_adapter_goes_after_answers_that_were_cut(engine, problems):
    """SGLang waits with unloading until nobody uses an adapter: it must have counted groups and aborts rightly."""
    policy, banned = engine._policy, engine._policy.banned_token_ids
    policy.banned_token_ids = (*banned, *policy.stop_token_ids)  # go on to the limit
    thread = threading.Thread(
        target=lambda: engine.generate(problems[:2], 4, SamplingParams(max_new_tokens=3000))
    )
    thread.start()
    try:
        real.wait_until_sampling(engine._engine)
        engine._engine.abort()
        thread.join(300)
    finally:
        policy.banned_token_ids = banned
    version = push(engine, 4)
    real.check(engine, engine.generate(problems, 2, SAMPLING), version)


def test_a_killed_server_gets_weights_and_adapter(engine, problems):
    server = engine._engine.replicas[0].server

    def kill():
        real.wait_until_sampling(engine._engine)
        os.killpg(real.child_of(server._process._guard.pid), 9)

    killer = threading.Thread(target=kill)
    killer.start()
    engine.generate(problems, 4, SamplingParams(max_new_tokens=400))
    killer.join()
    assert engine._engine.replicas[0].restarts == 1 and loaded(engine) == [engine._engine.adapter]
    real.check(engine, engine.generate(problems, 2, SAMPLING), engine._engine.version)


def test_two_replicas_behind_the_router(problems, tmp_path):
    engine = start(VERSIONS[-1], "qwen2_5_vl", tmp_path, replicas=2, router=True)
    try:
        version = push(engine, 5)
        real.check(engine, engine.generate(problems * 2, 2, SAMPLING), version)
    finally:
        engine.close()


def test_the_tiny_job_trains_adapters(tmp_path):
    """Weights go once, and after every step the server samples as the trainer scores."""
    run = tmp_path / "run"
    settings = [
        *("data.train_maps=6", "data.test_maps=6", "train.prompts_per_step=8", "eval.samples=0", "policy.device=cpu"),
        "train.stages=[{name='warm start', kind='sft', steps=1, checkpoint='shipped'}, {name='counting', steps=4}]",
        *("rollout.engine=sglang", "rollout.server.args=['--max-total-tokens', '16384']"),
        *(f"rollout.server.python='{real.interpreter(VERSIONS[-1])}'", "rollout.server.lora_sync=adapter"),
        *("policy.lora_rank=4", "train.learning_rate=1e-3"),
    ]
    train(load_config("tiny", settings), run, console=Console(quiet=True))
    rows = read_metrics(run)
    assert len(rows) == 5 and all(row["rollout_drift"] < 1e-4 and row["sync_drift_max"] < 1e-4 for row in rows[1:])
    report = json.loads((run / "report.json").read_text())
    assert 0 <= report["weighted_accuracy"]["after"] <= 1
    log = (run / "servers" / "server-0.log").read_text()
    _, ready, served = log.partition("ready to roll")
    assert ready and "Traceback" not in served
    assert served.count("POST /unload_lora_adapter") >= 4 and served.count("POST /update_weights_from_tensor") == 1
