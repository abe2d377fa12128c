"""Adapters sent alone: when that can work, what travels, in what order, and what a failure leaves."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from rewardmap.config import ConfigError, PolicyConfig, ServerConfig
from rewardmap.config_file import load_config
from rewardmap.policy import load_policy
from rewardmap.rollout.engine import RolloutError
from rewardmap.rollout.sglang_adapters import Adapters
from rewardmap.rollout.sglang_engine import SGLangEngine
from rewardmap.rollout.sglang_reply import MismatchError
from rewardmap.rollout.sglang_server import Keys
from rewardmap.tiny import WARM_START
from rewardmap.train import examine
from rewardmap.train.adapter_sync import AdapterSync
from rewardmap.train.engines import attach
from rewardmap.train.examine import EvalRequest, Examiner
from rewardmap.train.lora import add_lora
from rewardmap.train.synced import SyncedEngine
from rewardmap.train.weights import whole_weights
from rewardmap.transit.draw import draw_map, encode_png
from rewardmap.transit.generate import generate_network
from rewardmap.types import Problem, SamplingParams

sys.path.append(str(Path(__file__).parent))
import sglang_fake as fake

pytest.importorskip("peft")
LORA = PolicyConfig(lora_rank=2, lora_alpha=6)
ADAPTERS = Adapters(2, 6, LORA.lora_targets)
SAMPLING = SamplingParams(max_new_tokens=24)
LOAD = [
    "/pause_generation",
    "/load_lora_adapter_from_tensors",
    "/update_weight_version",
    "/flush_cache",
    "/continue_generation",
]
CYCLE = [LOAD[0], "/unload_lora_adapter", *LOAD[1:]]


@pytest.fixture(scope="module")
def plain():
    return load_policy(WARM_START, PolicyConfig())


@pytest.fixture
def policy():
    policy = load_policy(WARM_START, LORA)
    add_lora(policy, LORA)
    shake(policy)
    return policy


def shake(policy):
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)


@pytest.fixture(scope="module")
def problem():
    picture = encode_png(draw_map(generate_network("tiny-easy", np.random.default_rng(0), "a/0")))
    return Problem("q-0", picture, "How many lines?", "Counting3", 2, "", "", "a/0", "easy")


@pytest.fixture
def server(plain):
    with fake.FakeServer(plain.tokenizer, plain.model.config.image_token_id).running() as running:
        running.enable_lora(2, list(LORA.lora_targets))
        yield running


@pytest.fixture
def make(policy, tmp_path):
    engines = []

    def make(url, **settings):
        config = ServerConfig(urls=(url,), request_timeout_s=20.0, **settings)
        engines.append(SGLangEngine(policy, config, [], Keys("sample-key", "admin-key"), adapters=ADAPTERS))
        return AdapterSync(policy, engines[-1], tmp_path, ADAPTERS)

    yield make
    for engine in engines:
        engine.close()


def check(server, policy, plain, name):
    """Its weights are those before adapters, and with its only adapter they are the trainer's."""
    before, expected = dict(whole_weights(plain.model)), dict(whole_weights(policy.model))
    assert server.weights.keys() == before.keys()
    assert all(torch.equal(server.weights[name], weight) for name, weight in before.items())
    assert list(server.adapters) == [name] and server.version == name
    adapter, config = server.adapters[name], server.adapter_config
    assert config["peft_type"] == "LORA" and set(config["target_modules"]) == set(LORA.lora_targets)
    adapted = set()
    for name, down in adapter.items():
        if ".lora_A." in name:
            base = name.removeprefix("base_model.model.").replace(".lora_A.", ".")
            adapted.add(base)
            change = config["lora_alpha"] / config["r"] * adapter[name.replace("lora_A", "lora_B")] @ down
            torch.testing.assert_close(server.weights[base] + change, expected[base])
    assert len(adapted) * 2 == len(adapter)
    assert adapted == {name for name in before if not torch.equal(before[name], expected[name])} != set()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["policy.lora_rank=0"], r"policy.lora_rank=0 trains none; give a rank, or set lora_sync='merged'"),
        (["policy.freeze_vision=false"], r"policy.freeze_vision=false trains the vision tower's weights"),
        (["policy.lora_targets=['qkv']"], r"SGLang serves none of 'qkv'; take policy.lora_targets from q_proj, "),
        (["policy.lora_targets=['q_proj']"], r"serves one of 'q_proj' only together with 'v_proj'; add it"),
        (["policy.lora_targets=['o_proj','up_proj']"], r"serves one of 'up_proj' only together with 'gate_proj'"),
    ],
)
def test_what_adapters_alone_cannot_do_is_named(settings, message):
    asked = ["policy.lora_rank=2", "rollout.server.lora_sync=adapter", *settings]
    with pytest.raises(ConfigError, match=message):
        Adapters.of(load_config("tiny", asked))
    assert Adapters.of(load_config("tiny", [*asked, "rollout.server.lora_sync=merged"])) is None


def test_adapters_are_those_of_the_configuration():
    asked = ["policy.lora_rank=2", "policy.lora_alpha=6", "rollout.server.lora_sync=adapter"]
    assert Adapters.of(load_config("tiny", asked)) == ADAPTERS
    few = Adapters.of(load_config("tiny", [*asked, "policy.lora_targets=['q_proj','v_proj','gate_proj']"]))
    assert few.options()[-4:] == ["--lora-target-modules", "q_proj", "v_proj", "gate_proj"]


def test_nothing_else_may_train(policy, server, make):
    policy.model.lm_head.weight.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"sends adapters alone, and lm_head.weight trains beside them; freeze it"):
        make(server.url)


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"version": "0.5.21"}, r"SGLang 0.5.21 hangs when an adapter goes .*; use 0.5.22 or newer, or "),
        ({"enable_lora": None}, r"does not serve these adapters; start it with --enable-lora --max-lora-rank 2 "),
        ({"max_lora_rank": 1}, "does not serve these adapters"),
        ({"lora_target_modules": ["q_proj", "v_proj"]}, "does not serve these adapters"),
    ],
)
def test_a_server_that_cannot_take_them_is_named(info, message, server, make):
    engine = make(server.url)._engine
    engine.check()
    server.info |= {"lora_target_modules": ["all"]}
    engine.check()
    server.info |= info
    with pytest.raises(ConfigError, match=message):
        engine.check()


def test_weights_travel_once_and_then_adapters_alone(policy, plain, server, make):
    sync = make(server.url)
    sync.push(0)
    assert server.calls[-5:] == LOAD and "/update_weights_from_tensor" in server.calls
    check(server, policy, plain, sync.adapter(0))
    first = sync.adapter(0)
    shake(policy)
    server.calls.clear()
    sync.push(1)
    assert server.calls == CYCLE and not server.paused
    assert sync.adapter(1) != first and sync.adapter(1).endswith("-1")
    check(server, policy, plain, sync.adapter(1))
    assert server.keys["Bearer sample-key"] == 0


@pytest.mark.parametrize("route", ["tensor", "distributed", "disk"])
def test_adapters_travel_by_value_whatever_the_weights_do(route, policy, plain, server, make, tmp_path):
    sync = make(server.url)
    sync.push(0)
    sync._config = dataclasses.replace(sync._config, sync=route)
    shake(policy)
    sync.push(1)
    check(server, policy, plain, sync.adapter(1))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", CYCLE)
@pytest.mark.parametrize("fault", ["reset", "hang", "400"])
def test_a_push_that_breaks_off_is_made_again(path, fault, policy, plain, server, proxy, make):
    sync = make(proxy.url)
    sync.push(0)
    if fault == "hang":
        sync._engine.replicas[0].client._timeout_s = 1.5
    shake(policy)
    proxy.break_next(path, fault)
    sync.push(1)
    assert proxy.spoiled == 1 and not server.paused and not server.session
    check(server, policy, plain, sync.adapter(1))


def test_a_first_push_that_breaks_off_sends_the_weights_again(policy, plain, server, proxy, make):
    for path in ("/update_weights_from_tensor", "/load_lora_adapter_from_tensors"):
        server.version, server.weights, server.adapters = "default", {}, {}
        sync = make(proxy.url, bucket_mb=1)
        proxy.break_next("/update_weights_from_tensor", "slow")  # the first bucket arrives
        proxy.break_next(path, "reset")
        sync.push(0)
        check(server, policy, plain, sync.adapter(0))
    for _ in range(2):
        proxy.break_next("/load_lora_adapter_from_tensors", "400")
    with pytest.raises(RolloutError, match=r"weights version 1 did not reach .*_adapter_from_tensors: HTTP 400"):
        sync.push(1)
    assert not server.paused


def test_a_server_that_lost_its_weights_gets_them_again(policy, plain, server, make):
    """Started anew by whom it belongs to, or used by another run meanwhile, whose adapter goes too."""
    sync, other = make(server.url), make(server.url)
    sync.push(0)
    server.version, server.weights, server.adapters = "default", {}, {}
    sync.push(1)
    check(server, policy, plain, sync.adapter(1))
    other.push(7)
    server.weights["lm_head.weight"] = torch.zeros(())
    sync.push(2)
    check(server, policy, plain, sync.adapter(2))


def test_every_request_names_the_adapter_and_every_reply_proves_it(policy, problem, server, tmp_path):
    config = ServerConfig(urls=(server.url,), request_timeout_s=20.0, drift_alarm=100.0)
    engine = SyncedEngine(policy, config, tmp_path, print, adapters=ADAPTERS)
    try:
        for version in (0, 1):
            if version:
                engine.update_weights(version)
            [name] = server.adapters
            assert name == server.version == engine._sync.adapter(version)
            server.bodies.clear()
            [group] = engine.generate([problem], 2, SAMPLING)
            assert group.rollouts[0].policy_version == version
            engine.probe(problem, fake.ANSWER)
            assert [body["lora_path"] for body in server.bodies] == [name, name]
        server.version = "1"
        with pytest.raises(MismatchError, match=rf"sampled with weights 1; the trainer's are version {name}"):
            engine.generate([problem], 2, SAMPLING)
        server.adapters.clear()
        with pytest.raises(RolloutError, match=r"q-0: .*HTTP 400: an adapter that has never been loaded"):
            engine.generate([problem], 2, SAMPLING)
    finally:
        engine.close()


def test_a_server_of_ours_that_ends_gets_weights_and_adapter(policy, problem, tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nshift 2\nexec "{sys.executable}" "{fake.__file__}" "$@"\n')
    python.chmod(0o755)
    config = ServerConfig(python=str(python), drift_alarm=100.0, args=("--die-once", str(tmp_path / "died")))
    engine = SyncedEngine(policy, config, tmp_path, print, adapters=ADAPTERS)
    try:
        [group] = engine.generate([problem], 2, SAMPLING)  # its adapter is known there, or it refused
        assert engine._engine.replicas[0].restarts == 1 and group.rollouts[0].policy_version == 0
        engine.update_weights(1)
        assert engine.generate([problem], 2, SAMPLING)[0].rollouts[0].policy_version == 1
    finally:
        engine.close()


def test_an_evaluation_of_a_running_server_uses_the_adapter_left_there(policy, plain, problem, server, make, tmp_path):
    plain.save(tmp_path / "served")
    server.model_info["model_path"] = str(tmp_path / "served")
    config = load_config("tiny", ["rollout.engine=sglang"])
    for label in (None, "3"):  # no adapter where a run with merged weights came after
        sync = make(server.url)
        sync.push(5)
        server.version = label or server.version
        server.bodies.clear()
        engine, identity = attach(config, server.url, [problem])
        try:
            engine.generate([problem], 2, SAMPLING)
        finally:
            engine.close()
        assert server.bodies[0].get("lora_path") == (None if label else sync.adapter(5))
        assert identity.endswith(server.version)


def test_a_run_that_sent_adapters_alone_is_evaluated_by_its_merged_weights(plain, problem, server, tmp_path):
    checkpoint = tmp_path / "step-000001"
    plain.save(checkpoint)
    rollout = [f"rollout.server.urls=['{server.url}']", "rollout.engine=sglang", "rollout.server.lora_sync=adapter"]
    config = load_config("tiny", [*rollout, "policy.lora_rank=2", "policy.lora_alpha=6"])
    networks = {"a/0": {"Red": ["A", "B"], "Blue": ["B", "C"]}}
    examiner = Examiner(config, [problem], [], networks, {}, Console(quiet=True))
    engine, _ = examine._engine(EvalRequest(str(tmp_path)), checkpoint, config, examiner, tmp_path / "eval")
    try:
        engine.generate([problem], 1, SAMPLING)
    finally:
        engine.close()
    assert not server.adapters and "lora_path" not in json.dumps(server.bodies)
    assert all(torch.equal(server.weights[name], weight) for name, weight in whole_weights(plain.model))


def test_merged_requests_name_no_adapter(plain, problem, server, tmp_path):
    config = ServerConfig(urls=(server.url,), request_timeout_s=20.0, drift_alarm=100.0)
    engine = SyncedEngine(plain, config, tmp_path, print)
    try:
        engine.generate([problem], 2, SAMPLING)
        assert "lora_path" not in json.dumps(server.bodies) and not server.adapters
    finally:
        engine.close()
