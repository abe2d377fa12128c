"""Servers that end while they are asked, engines closed meanwhile: nothing is lost, doubled or stale, nobody waits."""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from collections import Counter
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace

import numpy as np
import pytest

from rewardmap.config import ServerConfig
from rewardmap.rollout.engine import RolloutError
from rewardmap.rollout.sglang_client import TRIES, EventLoop
from rewardmap.rollout.sglang_engine import CUTS, RESTARTS, SGLangEngine
from rewardmap.rollout.sglang_server import Keys
from rewardmap.train.background import in_background
from rewardmap.train.synced import SyncedEngine
from rewardmap.train.weight_sync import WeightSync
from rewardmap.transit.draw import draw_map, encode_png
from rewardmap.transit.generate import generate_network
from rewardmap.types import Problem, SamplingParams

sys.path.append(str(Path(__file__).parent))
import sglang_fake as fake

SAMPLING = SamplingParams(max_new_tokens=24)


@pytest.fixture(scope="module")
def problems():
    picture = encode_png(draw_map(generate_network("tiny-easy", np.random.default_rng(0), "a/0")))
    return [Problem(f"q-{i}", picture, f"How many? ({i})", "Counting3", 2, "", "", "a/0", "easy") for i in range(4)]


class Process:
    """A server process of our own, as its engine sees it."""

    index = 0

    def __init__(self, url, server):
        self.url, self.server, self.starts, self.ended = url, server, 0, False
        self.asked = 0

    def end(self):
        self.ended = True

    def answers(self):
        self.asked += 1
        return not self.ended

    def start(self):
        self.starts, self.ended = self.starts + 1, False
        self.server.version = "default"  # its weights are those it starts with

    def wait_ready(self, progress=None):
        pass

    def last_lines(self):
        return "its last words"

    def stop(self):
        pass


@pytest.fixture
def make(policy, proxy, server, monkeypatch):
    """An engine on one server of our own behind the proxy, which is tried once before it counts as unreachable."""
    monkeypatch.setattr("rewardmap.rollout.sglang_client.TRIES", 1)
    engines = []

    def make(seconds=0.0, **settings):
        engine = SGLangEngine(policy, ServerConfig(urls=(proxy.url,), **settings), [], Keys())
        engine.replicas[0].server = Process(proxy.url, server)
        engine.on_restart = lambda replica: (time.sleep(seconds), setattr(server, "version", "0"))
        engine.check()
        server.version = "0"
        engine.update_weights(0)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


def test_a_restarted_server_is_asked_nothing_before_it_has_the_weights(problems, proxy, make):
    """By a group that waits to try again."""
    engine = make(seconds=1.5)
    proxy.break_next("/generate", "reset", engine.replicas[0].server.end)
    for _ in problems[1:]:
        proxy.break_next("/generate", "503")
    groups = engine.generate(problems, 2, SAMPLING)
    assert {rollout.policy_version for group in groups for rollout in group.rollouts} == {0}
    assert engine.replicas[0].server.starts == 1


def test_a_server_that_ends_again_is_restarted_again(problems, proxy, make):
    engine = make()
    process = engine.replicas[0].server
    for _ in range(RESTARTS):
        proxy.break_next("/generate", "reset", process.end)
    assert len(engine.generate(problems[:1], 2, SAMPLING)) == 1
    assert process.starts == RESTARTS
    for _ in range(RESTARTS + 1):  # what was answered before counts no more, in a run of days
        proxy.break_next("/generate", "reset", process.end)
    with pytest.raises(RolloutError, match=f"server 0 ended again after {RESTARTS} restarts; its last words"):
        engine.generate(problems[:1], 2, SAMPLING)


def test_a_server_that_ends_at_the_comparison_after_a_sync_is_restarted(policy, problems, proxy, server, tmp_path):
    config = ServerConfig(urls=(proxy.url,), drift_alarm=100.0)
    engine = SyncedEngine(policy, config, tmp_path, print)
    [replica] = engine._engine.replicas
    try:
        engine.generate(problems[:1], 2, SAMPLING)
        replica.server = Process(proxy.url, server)
        proxy.break_next("/generate", "reset", replica.server.end)
        for _ in range(TRIES - 1):
            proxy.break_next("/generate", "reset")
        engine.update_weights(1)
        assert "sync_drift_mean" in engine.metrics() and replica.server.starts == 1
        assert server.version == "1"  # again, for it started without
    finally:
        engine.close()


def test_groups_of_a_server_that_is_gone_wait_for_a_place_at_another(policy, problems, server, monkeypatch):
    monkeypatch.setattr("rewardmap.rollout.sglang_client.TRIES", 1)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # refuses connections
        gone = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        engine = SGLangEngine(policy, ServerConfig(urls=(server.url, gone), concurrency=1), [], Keys())
        engine._limit = 4096  # not asked
        server.delay = 0.2
        try:
            assert len(engine.generate(problems, 2, SAMPLING)) == len(problems)
        finally:
            engine.close()
    assert server.most_running == 1


def test_all_groups_go_on_once_a_server_is_up_again(problems, proxy, make):
    """SGLang takes a second to say that it is well, and 64 groups would ask one after the other."""
    engine = make()
    process = engine.replicas[0].server
    for _ in problems:
        proxy.break_next("/generate", "reset", process.end)
    assert len(engine.generate(problems, 2, SAMPLING)) == len(problems)
    assert process.asked == process.starts <= RESTARTS


def test_connections_that_break_for_ever_are_one_error(problems, proxy, make):
    engine = make()
    for _ in range(50):
        proxy.break_next("/generate", "reset")
    with pytest.raises(RolloutError, match=r"q-0: .*/generate: .*its last words"):
        engine.generate(problems[:1], 2, SAMPLING)
    assert proxy.spoiled < 10


def test_a_loop_that_is_closed_leaves_nobody_waiting():
    loop = EventLoop()

    def persistent():
        for _ in range(2):
            try:
                loop.run(asyncio.sleep(60))
            except RolloutError:
                raise
            except Exception:
                time.sleep(0.2)  # what comes after a failure is asked of a loop that is closed by now

    waiting = in_background(persistent, "waiting")
    time.sleep(0.2)
    loop.close()
    with pytest.raises(RolloutError, match="closed"):
        waiting.result(5)
    loop.close()


def test_servers_are_stopped_together(policy, server):
    """A stopped job has seconds until it is killed, and each server may take twenty."""
    engine = SGLangEngine(policy, ServerConfig(urls=(server.url,) * 3), [], Keys())
    together = Barrier(3)
    for replica in engine.replicas:
        replica.server = SimpleNamespace(stop=lambda: together.wait(10))
    engine.close()
    assert not together.broken


def test_a_server_that_comes_up_after_the_end_is_not_waited_for(policy, server, tmp_path):
    engine = SyncedEngine(policy, ServerConfig(urls=(server.url,)), tmp_path, print)
    [replica] = engine._engine.replicas
    engine.close()
    late = in_background(lambda: engine._bring_up(replica), "bring up")
    with pytest.raises(RolloutError):
        late.result(5)


def test_servers_that_come_up_together_get_weights_one_after_the_other(policy, server, tmp_path):
    engine = SyncedEngine(policy, ServerConfig(urls=(server.url,)), tmp_path, print)
    [replica] = engine._engine.replicas
    now, most = Counter(), []

    def push(version, replicas):
        now["pushes"] += 1
        most.append(now["pushes"])
        time.sleep(0.2)
        now["pushes"] -= 1

    engine._sync.push = push
    tasks = [in_background(lambda: engine._bring_up(replica), "bring up") for _ in range(3)]
    for task in tasks:
        task.result(5)
    engine.close()
    assert max(most) == 1


def test_a_server_that_joins_late_does_not_cost_the_second_try(policy, server, proxy, tmp_path):
    with fake.FakeServer(policy.tokenizer, policy.model.config.image_token_id).running() as other:
        config = ServerConfig(urls=(proxy.url, other.url), request_timeout_s=20.0, sync="distributed")
        engine = SGLangEngine(policy, config, [], Keys())
        sync = WeightSync(policy, engine, tmp_path)
        sync.push(1)
        for version, replicas in ((1, engine.replicas[:1]), (2, None)):
            proxy.break_next("/update_weights_from_distributed", "400")
            sync.push(version, replicas)
        assert server.version == other.version == "2"
        sync.close()
        engine.close()


def test_answers_cut_off_unasked_are_asked_for_again(policy, problems, server):
    """Also those of another's abort: a part of an answer is none."""
    engine = SGLangEngine(policy, ServerConfig(urls=(server.url,), concurrency=1), [], Keys("sample-key", "admin-key"))
    try:
        server.cut = CUTS
        [group] = engine.generate(problems[:1], 2, SAMPLING)
        assert [rollout.finish_reason for rollout in group.rollouts] == ["stop", "stop"]
        assert len(server.bodies) == 1 + CUTS
        server.cut = 1 + CUTS
        with pytest.raises(RolloutError, match=r"q-0: the server cut off its answers 4 times, which nobody here asked"):
            engine.generate(problems[:1], 2, SAMPLING)
    finally:
        engine.close()
