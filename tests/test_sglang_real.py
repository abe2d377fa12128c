"""The rollout engine against real SGLang servers on the CPU: one version without and one with weight-update sessions.

Environments are built once by ``tests/sglang_env.py``. ``REWARDMAP_SGLANG`` names other versions, divided by commas.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from rewardmap.config import ServerConfig
from rewardmap.config_file import load_config
from rewardmap.report import read_metrics
from rewardmap.rollout.engine import RolloutError
from rewardmap.train.run import train
from rewardmap.train.synced import SyncedEngine
from rewardmap.train.weight_sync import WeightSync
from rewardmap.transit.draw import draw_map, encode_png
from rewardmap.transit.generate import generate_network
from rewardmap.types import Problem, SamplingParams

sys.path.append(str(Path(__file__).parent))
import forest_models
import sglang_env

pytestmark = pytest.mark.sglang
VERSIONS = os.environ.get("REWARDMAP_SGLANG", "0.5.20,0.5.23").split(",")
CASES = [(version, family) for version in VERSIONS for family in ("qwen2_5_vl", "qwen3_vl")]
SAMPLING = SamplingParams(max_new_tokens=12)


@pytest.fixture(scope="module")
def problems():
    pictures = [
        encode_png(draw_map(generate_network("tiny-easy", np.random.default_rng(seed), f"a/{seed}"))) for seed in (0, 1)
    ]
    return [
        Problem(f"q-{i}", pictures[i % 2], f"How many lines? ({i})", "Counting3", 2, "", "", "a/0", "easy")
        for i in range(6)
    ]


def interpreter(version):
    """Of this SGLang; what a server of ours need not load on its way up is left out."""
    python = sglang_env.environment(version)
    os.environ["SGLANG_DISABLED_MODEL_ARCHS"] = sglang_env.other_models(python)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or each of three processes compiles SGLang at each start
    return str(python)


def start(version, family, folder, **settings):
    policy = forest_models.build(family, freeze_vision=False, dtype=torch.float32)
    python = interpreter(version)
    config = ServerConfig(python=python, args=("--max-total-tokens", "16384"), bucket_mb=1, **settings)
    return SyncedEngine(policy, config, folder, lambda line: None)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def engine(request, tmp_path_factory):
    engine = start(*request.param, tmp_path_factory.mktemp("servers"))
    yield engine
    engine.close()


def reference(policy, group, rollout):
    """[R] log-probabilities by transformers' own forward of one whole sequence, placeholders banned."""
    ids = torch.tensor([[*group.prompt_token_ids, *rollout.token_ids]])
    image = policy.image(group.problem.image)
    with torch.no_grad():
        logits = policy.model(
            input_ids=ids,
            pixel_values=policy.pixel_values([image]),
            image_grid_thw=torch.tensor([image.grid_thw]),
            mm_token_type_ids=(ids == policy.model.config.image_token_id).int(),
        ).logits[0, len(group.prompt_token_ids) - 1 : -1]
    logits[:, list(policy.banned_token_ids)] = -torch.inf
    return torch.log_softmax(logits, -1).gather(-1, ids[0, len(group.prompt_token_ids) :, None]).squeeze(1)


def check(engine, groups, version):
    for group in groups:
        assert group.prompt_token_ids == engine._policy.encode(group.problem).token_ids
        for rollout in group.rollouts:
            assert rollout.policy_version == version
            expected = reference(engine._policy, group, rollout)
            np.testing.assert_allclose(rollout.rollout_logprobs, expected, atol=1e-4)


def shake(policy, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))


def test_tokens_and_logprobs_are_exact(engine, problems):
    groups = engine.generate(problems, 4, SAMPLING)
    assert [group.problem.uid for group in groups] == [problem.uid for problem in problems]
    check(engine, groups, engine._engine.version)
    assert len({rollout.token_ids for rollout in groups[0].rollouts}) > 1  # sampled, not repeated
    swapped = dataclasses.replace(groups[0], problem=problems[1])
    rollout = groups[0].rollouts[0]
    gap = reference(engine._policy, swapped, rollout) - torch.tensor(rollout.rollout_logprobs)
    assert gap.abs().max() > 1e-2  # another picture is another distribution: pictures are really seen


@pytest.mark.parametrize("route", ["tensor", "distributed", "disk"])
def test_each_route_changes_the_answers(route, engine, problems, tmp_path):
    engine._config = engine._engine.config = dataclasses.replace(engine._config, sync=route)
    engine._sync.close()
    engine._sync = WeightSync(engine._policy, engine._engine, tmp_path)
    [before] = engine.generate(problems[:1], 2, SAMPLING)
    shake(engine._policy, len(route))
    version = engine._engine.version + 1
    engine.update_weights(version)
    metrics = engine.metrics()
    assert metrics["sync_drift_max"] < 1e-4 and metrics["sync_seconds"] > 0
    groups = engine.generate(problems, 2, SAMPLING)
    check(engine, groups, version)
    changed = reference(engine._policy, before, before.rollouts[0])
    assert (changed - torch.tensor(before.rollouts[0].rollout_logprobs)).abs().max() > 1e-3


@pytest.mark.parametrize("length", ["short", "as long as fits"])
def test_an_answer_cut_at_a_vision_start_is_scored(length, engine, problems):
    policy, inner = engine._policy, engine._engine
    room = inner._limit - len(policy.encode(problems[0]).token_ids)
    answer = [*range(40, 80)] * (room // 40 + 1)
    response = [*answer[: (4 if length == "short" else room) - 1], policy.model.config.vision_start_token_id]
    for scores in inner.logprobs(problems[0], response):
        expected = engine._own_logprobs(problems[0], response)
        np.testing.assert_allclose(scores, expected, atol=1e-4)


def test_a_groups_prompt_and_picture_are_computed_once(engine, problems):
    inner = engine._engine
    inner.control("/flush_cache", {})
    client, raw = inner.replicas[0].client, []
    plain = client.generate

    async def recorded(body, what):
        raw.append(await plain(body, what))
        return raw[-1]

    client.generate = recorded
    try:
        [group] = engine.generate(problems[:1], 8, SAMPLING)
    finally:
        client.generate = plain
    [samples] = raw
    for sample in samples:  # all eight found the whole prompt but its last token in the cache
        assert sample["meta_info"]["cached_tokens"] == len(group.prompt_token_ids) - 1
        assert sample["meta_info"]["image_tokens"] == group.prompt_token_ids.count(
            engine._policy.model.config.image_token_id
        )


def long_request(engine, problem, tokens):
    """A request that goes on for ``tokens``, begun in a thread: (thread, list that will hold the reply)."""
    inner, replies = engine._engine, []
    prompt = engine._policy.encode(problem).token_ids
    image_token = engine._policy.model.config.image_token_id
    place = prompt.index(image_token)
    body = {
        "input_ids": [*prompt[: place + 1], *(token for token in prompt[place:] if token != image_token)],
        "image_data": [inner.picture(problem.image)],
        "sampling_params": {"max_new_tokens": tokens, "ignore_eos": True, "temperature": 1.0},
    }
    client = inner.replicas[0].client
    thread = threading.Thread(target=lambda: replies.append(inner.loop.run(client.generate(body, "long"))))
    thread.start()
    wait_until_sampling(inner)
    return thread, replies


def wait_until_sampling(inner):
    """Until every server has a request among those it decodes."""

    async def running():
        replies = [await replica.client.call("/v1/loads", method="GET", admin=False) for replica in inner.replicas]
        return [sum(load["num_running_reqs"] for load in reply["loads"]) for reply in replies]

    deadline = time.monotonic() + 300
    while not all(inner.loop.run(running())):
        assert time.monotonic() < deadline, "nothing runs"
        time.sleep(0.05)


def test_memory_is_given_up_and_taken_back_once(engine, problems):
    """Asked twice for the same, the server's scheduler would end."""
    inner = engine._engine
    for change in (inner.wake, inner.sleep, inner.sleep, inner.wake, inner.wake, inner.sleep):
        change()
    engine.update_weights(inner.version + 1)
    check(engine, engine.generate(problems[:2], 2, SAMPLING), inner.version)


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_pause_holds_a_generation_and_continue_ends_it(mode, engine, problems):
    thread, replies = long_request(engine, problems[0], 800)
    engine._engine.control("/pause_generation", {"mode": mode})
    try:
        if mode == "in_place":  # the request's keys are still there; retracted ones are not, and 0.5.23 flushes then
            with pytest.raises(RolloutError, match="HTTP 400"):
                engine._engine.control("/flush_cache", {})
        time.sleep(3.0)
        assert thread.is_alive()
    finally:
        engine._engine.control("/continue_generation", {})
        thread.join(300)
    [reply] = replies
    assert reply["meta_info"]["completion_tokens"] == 800
    assert reply["meta_info"]["finish_reason"]["type"] == "length"


def test_abort_keeps_what_was_sampled(engine, problems):
    policy, banned = engine._policy, engine._policy.banned_token_ids
    policy.banned_token_ids = (*banned, *policy.stop_token_ids)  # go on to the limit
    groups = []
    thread = threading.Thread(
        target=lambda: groups.extend(engine.generate(problems[:2], 2, SamplingParams(max_new_tokens=3000)))
    )
    thread.start()
    try:
        wait_until_sampling(engine._engine)
        engine._engine.abort()
        thread.join(300)
    finally:
        policy.banned_token_ids = banned
    assert len(groups) == 2
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    cut = [rollout for rollout in rollouts if rollout.finish_reason == "abort"]
    assert cut and all(len(rollout.token_ids) < 3000 for rollout in cut)
    assert any(rollout.token_ids for rollout in cut)
    assert all(len(rollout.token_ids) == len(rollout.rollout_logprobs) for rollout in rollouts)
    check(engine, engine.generate(problems, 2, SAMPLING), engine._engine.version)  # and it goes on


def test_a_killed_server_comes_back_and_nothing_is_lost(engine, problems):
    inner = engine._engine
    server = inner.replicas[0].server
    seen = []

    def kill():
        wait_until_sampling(inner)
        os.killpg(child_of(server._process._guard.pid), 9)

    killer = threading.Thread(target=kill)
    killer.start()
    groups = engine.generate(problems, 4, SamplingParams(max_new_tokens=400), lambda index, group: seen.append(index))
    killer.join()
    assert inner.replicas[0].restarts == 1
    assert sorted(seen) == list(range(len(problems)))
    short = engine.generate(problems, 2, SAMPLING)
    check(engine, [*groups[:1], *short], inner.version)


def test_a_server_killed_during_a_sync_gets_the_weights_after_all(engine, problems):
    sync, server = engine._sync, engine._engine.replicas[0].server
    post, first = sync._post, server._process

    def kill_then_post(replicas, path, body):
        sync._post = post
        os.killpg(child_of(server._process._guard.pid), 9)
        post(replicas, path, body)

    sync._post = kill_then_post
    shake(engine._policy, 11)
    version = engine._engine.version + 1
    engine.update_weights(version)
    assert server._process is not first and first.exit_code is not None
    assert engine.metrics()["sync_drift_max"] < 1e-4
    check(engine, engine.generate(problems, 2, SAMPLING), version)


def child_of(pid):
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def test_two_replicas_behind_the_router(problems, tmp_path):
    engine = start(VERSIONS[0], "qwen2_5_vl", tmp_path, replicas=2, router=True)
    try:
        groups = engine.generate(problems * 2, 2, SAMPLING)
        check(engine, groups, 0)
        shake(engine._policy, 3)
        engine.update_weights(1)  # probes each replica
        assert engine.metrics()["sync_drift_max"] < 1e-4
        check(engine, engine.generate(problems, 2, SAMPLING), 1)
        versions = [
            engine._engine.loop.run(replica.client.call("/model_info", method="GET", admin=False))["weight_version"]
            for replica in engine._engine.replicas
        ]
        assert versions == ["1", "1"]
    finally:
        engine.close()


def test_the_tiny_job_on_servers_does_what_it_does_locally(tmp_path):
    """The same held-out answers before, by greedy decoding of equal weights, and a closing table within its
    intervals after a few steps."""
    settings = [
        *("data.train_maps=6", "data.test_maps=6", "train.prompts_per_step=8", "eval.samples=0", "policy.device=cpu"),
        "train.stages=[{name='warm start', kind='sft', steps=1, checkpoint='shipped'}, {name='counting', steps=4}]",
    ]
    servers = [
        *("rollout.engine=sglang", "rollout.server.args=['--max-total-tokens', '16384']"),
        f"rollout.server.python='{interpreter(VERSIONS[-1])}'",
    ]
    answers, reports = {}, {}
    for name, own in (("local", []), ("sglang", servers)):
        run = tmp_path / name
        train(load_config("tiny", [*settings, *own]), run, console=Console(quiet=True))
        rows = (run / "evaluation" / "before.jsonl").read_text().splitlines()
        answers[name] = [(row["uid"], row["response"]) for row in map(json.loads, rows)]
        reports[name] = json.loads((run / "report.json").read_text())
    assert answers["sglang"] == answers["local"] and len(answers["local"]) > 20
    here, there = (reports[name]["intervals"]["after"]["weighted_accuracy"] for name in ("local", "sglang"))
    assert max(here[0], there[0]) <= min(here[1], there[1])
    rows = read_metrics(tmp_path / "sglang")
    assert len(rows) == 5 and all(row["seconds"]["sync"] > 0 and row["sync_seconds"] > 0 for row in rows)
    assert all(row["rollout_drift"] < 1e-4 for row in rows[1:])  # sampled as the trainer scores: float32 at both
    assert all(row["sync_drift_max"] < 1e-4 for row in rows[1:])
    log = (tmp_path / "sglang" / "servers" / "server-0.log").read_text()
    _, ready, served = log.partition("ready to roll")  # before, 0.5.23 may ask itself something too early, and say so
    assert ready and "Traceback" not in served


@pytest.mark.parametrize(("route", "staleness", "lora"), [("tensor", 0, 0), ("distributed", 1, 0), ("tensor", 0, 4)])
def test_the_tiny_job_on_two_ranks_with_a_server(route, staleness, lora, tmp_path):
    """By torchrun, weights split over both ranks: the server holds what they hold after every step. It resumes."""
    settings = [
        *("data.train_maps=6", "data.test_maps=6", "train.prompts_per_step=8", "eval.samples=0", "policy.device=cpu"),
        *("eval.text_only=false", "eval.max_problems=6", "train.checkpoint_every=2", "train.keep_checkpoints=9"),
        "train.stages=[{name='warm start', kind='sft', steps=1, checkpoint='shipped'}, {name='counting', steps=4}]",
        *("rollout.engine=sglang", "rollout.server.args=['--max-total-tokens', '16384']", "rollout.server.bucket_mb=1"),
        *(f"policy.lora_rank={lora}", f"rollout.server.lora_sync={'adapter' if lora else 'merged'}"),
        *(f"rollout.server.sync={route}", f"rollout.staleness={staleness}", "rollout.importance_correction=truncate"),
        f"rollout.server.python={interpreter(VERSIONS[-1])}",
    ]
    out = tmp_path / "run"

    def launch(*arguments):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        job = [*command, "rewardmap.cli", "train", *arguments]
        done = subprocess.run(job, env=environment, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        rows = read_metrics(out)
        assert [row["step"] for row in rows] == [1, 2, 3, 4, 5] and all(len(row["train_flop"]) == 2 for row in rows)
        assert all(row["sync_drift_max"] < 1e-4 for row in rows[1:])
        lag = [row.get("staleness", 0) for row in rows[1:]]
        assert all(row["rollout_drift"] < 1e-4 or late for row, late in zip(rows[1:], lag, strict=True))
        assert max(lag) == staleness
        log = (out / "servers" / "server-0.log").read_text()
        _, ready, served = log.rpartition("ready to roll")  # of the last one started
        assert ready and "Traceback" not in served and not (out / "servers" / "rank-1").exists()

    launch("tiny", *settings, "--run-dir", str(out))
    for name in ("step-000004", "step-000005"):
        shutil.rmtree(out / "checkpoints" / name)
    launch("--resume", str(out))


def test_a_wrong_key_is_refused(engine, problems):
    from rewardmap.rollout.sglang_client import SGLangClient
    from rewardmap.rollout.sglang_server import Keys

    inner = engine._engine
    stranger = SGLangClient(inner.replicas[0].client.url, Keys("wrong", "wrong"), 10.0)

    async def try_both():
        for call in (stranger.call("/model_info", method="GET", admin=False), stranger.call("/flush_cache", {})):
            with pytest.raises(RolloutError, match="the key is refused"):
                await call
        await stranger.close()

    inner.loop.run(try_both())
