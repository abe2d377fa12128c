"""Weights on their way to servers: what is sent, in what order, and what a failure leaves."""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
import pickle
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from aiohttp import web
from safetensors.torch import load_file
from torch import nn
from torch.distributed.distributed_c10d import _world
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import reductions

from rewardmap.config import ConfigError, PolicyConfig, ServerConfig
from rewardmap.policy import load_policy
from rewardmap.rollout.engine import RolloutError
from rewardmap.rollout.sglang_engine import SGLangEngine
from rewardmap.rollout.sglang_server import Keys
from rewardmap.tiny import WARM_START
from rewardmap.train.synced import SyncedEngine
from rewardmap.train.weight_sync import WeightSync, check_here, check_nccl
from rewardmap.train.weights import Bucket, Entry, buckets, payloads, whole_weights
from rewardmap.transit.draw import draw_map, encode_png
from rewardmap.transit.generate import generate_network
from rewardmap.types import Problem, SamplingParams

sys.path.append(str(Path(__file__).parent))
import sglang_fake as fake

CYCLE = [
    "/pause_generation",
    "/begin_weight_update",
    "/update_weights_from_tensor",
    "/end_weight_update",
    "/flush_cache",
    "/continue_generation",
]


@pytest.fixture(scope="module")
def problem():
    picture = encode_png(draw_map(generate_network("tiny-easy", np.random.default_rng(0), "a/0")))
    return Problem("q-0", picture, "How many lines?", "Counting3", 2, "", "", "a/0", "easy")


@pytest.fixture(params=[True, False], ids=["sessions", "no-sessions"])
def server(request, policy):
    image_token = policy.model.config.image_token_id
    with fake.FakeServer(policy.tokenizer, image_token, sessions=request.param).running() as running:
        yield running


@pytest.fixture
def sync(policy, proxy, tmp_path):
    config = ServerConfig(urls=(proxy.url,), request_timeout_s=20.0)
    engine = SGLangEngine(policy, config, [], Keys("sample-key", "admin-key"))
    yield WeightSync(policy, engine, tmp_path)
    engine.close()


def collected(model, dtype=torch.float32, limit=1 << 30):
    pieces = buckets(model, dtype, limit)
    return {name: weight.clone() for bucket in pieces for name, weight in bucket.tensors().items()}


def test_names_and_values_are_those_of_a_checkpoint(policy):
    saved = load_file(WARM_START / "model.safetensors")
    sent = collected(policy.model)
    assert set(sent) == set(saved)
    for name, weight in saved.items():
        assert torch.equal(sent[name], weight), name


def test_buckets_keep_to_their_limit_whatever_it_is(policy):
    whole = collected(policy.model)
    largest = max(weight.nbytes for weight in whole.values())
    for limit in (1, 100_000, largest, 1 << 30):
        held = list(buckets(policy.model, torch.float32, limit))  # a server may still read one when the next is filled
        sizes = [len(bucket.flat) for bucket in held]
        assert all(len(bucket.entries) == 1 or len(bucket.flat) <= limit for bucket in held)
        found = {name: weight for bucket in held for name, weight in bucket.tensors().items()}
        assert all(torch.equal(found[name], weight) for name, weight in whole.items()) and len(found) == len(whole)
        assert max(sizes) <= max(limit, largest)
        assert limit > 1 or len(sizes) == len(whole)
    half = collected(policy.model, torch.bfloat16)
    assert all(torch.equal(half[name], weight.bfloat16()) for name, weight in whole.items())


class OnGPU(torch.Tensor):
    is_cuda, device = True, torch.device("cuda", 1)


@pytest.fixture
def shared(monkeypatch):
    """What torch says of GPU memory that it shares: its version and a letter before CUDA's handle, which differ."""
    counters = itertools.count()

    def reduce(tensor):
        args = [torch.Tensor, tensor.size(), tensor.stride(), 0, torch.storage.TypedStorage, tensor.dtype]
        args += [1, shared.version + shared.kind + bytes(range(64)), len(tensor), 0, False, b"file", next(counters)]
        return reductions.rebuild_cuda_tensor, (*args, b"event", True)

    shared = SimpleNamespace(version=b"\x03", kind=b"c")
    monkeypatch.setattr("rewardmap.train.weights.reduce_tensor", reduce)
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: None)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda number: SimpleNamespace(uuid=f"uuid-{number}"))
    return shared


def opened(text):
    """A payload as a server reads it, but for the memory: the arguments that say where it is."""

    class Reader(pickle.Unpickler):
        def find_class(self, module, name):
            if name == "rebuild_cuda_tensor":
                return lambda *arguments: arguments
            # Of SGLang's list, in each of its versions.
            assert module in ("torch", "torch.storage", "types") and name != "_utils", (module, name)
            return super().find_class(module, name)

    return Reader(io.BytesIO(base64.b64decode(text))).load()


def test_gpu_memory_is_handed_to_each_process_by_a_handle_of_its_own(shared):
    bucket = Bucket(torch.zeros(8, dtype=torch.uint8).as_subclass(OnGPU), (Entry("w", torch.bfloat16, (2, 2), 0, 8),))
    for shared.version in (b"\x02", b"\x03"):
        seen = [opened(text) for text in payloads(bucket, 4)]
        assert {one["metadata"][0].name for one in seen} == {"w"}
        assert {one["flattened_tensor"][6] for one in seen} == {"uuid-1"}
        assert {one["flattened_tensor"][7] for one in seen} == {bytes(range(64))}  # whatever torch the server has
        assert len({one["flattened_tensor"][12] for one in seen}) == 4  # counters of who still reads
    shared.kind = b"e"
    with pytest.raises(ConfigError, match=r"PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True; leave that out"):
        payloads(bucket, 1)


def test_each_gpu_of_each_server_gets_a_payload(policy, tmp_path, monkeypatch):
    urls, seen = ("http://one", "http://two"), []
    engine = SGLangEngine(policy, ServerConfig(urls=urls, tensor_parallel=2), [], Keys())
    sync = WeightSync(policy, engine, tmp_path)
    monkeypatch.setattr("rewardmap.train.weight_sync.payloads", lambda bucket, count: [str(n) for n in range(count)])
    monkeypatch.setattr(sync, "_post", lambda replicas, path, body: seen.extend(body(r.client) for r in replicas))
    sync._by_tensor(3, engine.replicas, buckets(policy.model, torch.float32, 1 << 30))
    assert [body["serialized_named_tensors"] for body in seen] == [["0", "1"], ["2", "3"]]
    engine.close()


def test_a_tied_head_is_sent_once():
    model = nn.Module()
    model.embed, model.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    model.head.weight = model.embed.weight
    assert [name for name, _ in whole_weights(model)] == ["embed.weight"]


class Adapted(nn.Module):
    """What peft makes of a linear layer."""

    def __init__(self, base: nn.Linear, rank: int, scaling: float) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})
        self.scaling = {"default": scaling}

    def forward(self, x):
        return self.base_layer(x) + self.scaling["default"] * self.lora_B["default"](self.lora_A["default"](x))


def test_adapters_are_merged_under_the_base_names():
    torch.manual_seed(0)
    model = nn.Module()
    model.proj = Adapted(nn.Linear(7, 5), 2, 0.5)
    merged = dict(whole_weights(model))
    assert list(merged) == ["proj.weight", "proj.bias"]
    x = torch.randn(3, 7)
    torch.testing.assert_close(nn.functional.linear(x, merged["proj.weight"], merged["proj.bias"]), model.proj(x))


def test_wrappers_leave_no_trace_in_names():
    model = nn.Module()
    model.inner = nn.Module()
    model.inner.add_module("_orig_mod", nn.Module())
    model.inner._orig_mod.add_module("_checkpoint_wrapped_module", nn.Linear(2, 2, bias=False))
    assert [name for name, _ in whole_weights(model)] == ["inner.weight"]


def test_shards_are_gathered():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = load_policy(WARM_START, PolicyConfig()).model
        expected = collected(model)
        for layer in model.model.language_model.layers:
            fully_shard(layer)
        fully_shard(model)
        assert any("DTensor" in type(p).__name__ for p in model.parameters())
        sent = collected(model, limit=100_000)
        assert set(sent) == set(expected)
        assert all(torch.equal(sent[name], weight) for name, weight in expected.items())
    finally:
        torch.distributed.destroy_process_group()


def test_a_push_in_order(policy, sync, server):
    sync.push(7)
    assert server.calls == [call for call in CYCLE if server._sessions or "_weight_update" not in call]
    assert server.version == "7" and not server.paused and not server.session
    assert server.keys["Bearer admin-key"] == len(server.calls)
    assert all(torch.equal(server.weights[name], weight) for name, weight in collected(policy.model).items())
    assert sync.seconds > 0


@pytest.mark.parametrize("path", CYCLE)
@pytest.mark.parametrize("fault", ["reset", "hang", "400"])
def test_a_push_that_breaks_off_is_made_again_from_its_beginning(path, fault, policy, sync, server, proxy):
    never = path == "/end_weight_update" and not server._sessions  # a version without them is not asked to end one
    if fault == "hang":
        sync._engine.replicas[0].client._timeout_s = 1.5
    proxy.break_next(path, fault)
    sync.push(3)
    assert proxy.spoiled == (not never)
    assert server.version == "3" and not server.paused and not server.session
    assert all(torch.equal(server.weights[name], weight) for name, weight in collected(policy.model).items())


@pytest.mark.parametrize("queued_s", [0.0, 0.6], ids=["gloo", "as-nccl"])
@pytest.mark.parametrize("fault", [None, "400"])
def test_a_broadcast_is_complete_when_it_is_not_when_a_server_answers(queued_s, fault, policy, server, proxy, tmp_path):
    config = ServerConfig(urls=(proxy.url,), request_timeout_s=20.0, sync="distributed", bucket_mb=64)
    engine = SGLangEngine(policy, config, [], Keys())
    sync = WeightSync(policy, engine, tmp_path)
    server.queued_s = queued_s
    if fault:
        proxy.break_next("/update_weights_from_distributed", fault)
    for version in (3, 4):
        sync.push(version)
    sync.close()
    engine.close()
    assert server.version == "4" and not server.paused and not server.session
    assert all(torch.equal(server.weights[name], weight) for name, weight in collected(policy.model).items())


def test_a_group_that_a_server_fails_to_join_is_left_by_all(policy, server, tmp_path):
    engine = SGLangEngine(policy, ServerConfig(urls=(server.url,), sync="distributed"), [], Keys())
    sync, join = WeightSync(policy, engine, tmp_path), server._join
    route = next(r for r in server.app.router.routes() if r.resource.canonical == "/init_weights_update_group")
    failed = []

    async def fail_once(body):
        reply = await join(body)
        return reply if failed else failed.append(reply) or web.Response(status=500, text="out of memory")

    route._handler = server._handled(fail_once)
    before = set(_world.pg_map)
    sync.push(1)
    assert server.version == "1" and failed
    assert set(_world.pg_map) - before == {sync._group._group}
    assert server.calls.count("/destroy_weights_update_group") == 1
    sync.close()
    assert set(_world.pg_map) == before
    engine.close()


def test_a_server_without_its_memory_is_not_asked_to_compute(sync, server, proxy):
    """It would end. One that the first attempt could not even pause sleeps still."""
    [replica] = sync._engine.replicas
    replica.server = SimpleNamespace(ended=False, answers=lambda: pytest.fail("it sleeps"))
    sync._engine.sleep()
    proxy.break_next("/pause_generation", "400")
    sync.push(3)
    assert server.version == "3" and not server.asleep
    replica.server = None


def test_a_server_that_ended_is_quoted(sync, proxy):
    [replica] = sync._engine.replicas
    replica.server = SimpleNamespace(ended=True, answers=lambda: True, index=1, last_lines=lambda: "CUDA error")
    for _ in range(2):
        proxy.break_next("/update_weights_from_tensor", "reset")
    with pytest.raises(RolloutError, match=r"did not reach the servers: .*\. Server 1 ended; CUDA error"):
        sync.push(3)
    replica.server = None


def test_one_nccl_on_both_sides(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.nccl.version", lambda: (2, 28, 9))
    python = tmp_path / "python"
    for says, fits in (("echo 2.28.9", True), ("echo 2.30.7", False), ("echo no torch >&2; exit 1", False)):
        python.write_text(f"#!/bin/sh\n{says}\n")
        python.chmod(0o755)
        refused = pytest.raises(ConfigError, match=r"trainer has 2.28.9, .* has (2.30.7|no torch); choose versions")
        with nullcontext() if fits else refused:
            check_nccl(ServerConfig(python=str(python)))
    with pytest.raises(ConfigError, match="'/no/such/python': no such program"):
        check_nccl(ServerConfig(python="/no/such/python"))


def test_a_server_that_keeps_ending_is_given_up(sync, proxy):
    class Ended:
        index, url, starts = 0, proxy.url, 0

        def answers(self):
            return False

        def start(self):
            Ended.starts += 1

        def wait_ready(self, progress=None):
            pass

        def last_lines(self):
            return "its last words"

        def stop(self):
            pass

    [replica] = sync._engine.replicas
    replica.server = Ended()
    for version in range(3):
        proxy.break_next("/pause_generation", "reset")
        sync.push(version)
        assert Ended.starts == version + 1
    proxy.break_next("/pause_generation", "reset")
    with pytest.raises(RolloutError, match="server 0 ended again after 3 restarts; its last words"):
        sync.push(4)
    assert Ended.starts == 3


def test_a_refused_flush_is_an_error(sync, server, proxy):
    for _ in range(2):
        proxy.break_next("/flush_cache", "400")
    with pytest.raises(RolloutError, match=r"weights version 4 did not reach the servers: \S+/flush_cache\S* HTTP 400"):
        sync.push(4)
    assert not server.paused and not server.session  # not left behind


def test_a_wrong_admin_key_is_an_error(sync, proxy):
    for _ in range(2):
        proxy.break_next("/pause_generation", "401")
    with pytest.raises(RolloutError, match="the key is refused"):
        sync.push(4)


def test_a_version_that_did_not_arrive_is_an_error(sync, server):
    route = next(r for r in server.app.router.routes() if r.resource.canonical == "/update_weights_from_tensor")
    route._handler = server._handled(lambda body: {"success": True})
    with pytest.raises(RolloutError, match="holds weights default after a push of version 5"):
        sync.push(5)


def test_the_engine_pushes_probes_and_raises_the_alarm(policy, problem, proxy, server, tmp_path):
    config = ServerConfig(urls=(proxy.url,), request_timeout_s=20.0, drift_alarm=100.0)
    engine = SyncedEngine(policy, config, tmp_path, print)
    try:
        assert server.version == "0" and set(engine.metrics()) == {"sync_seconds"}
        [group] = engine.generate([problem], 2, SamplingParams(max_new_tokens=24))
        assert group.rollouts[0].policy_version == 0
        engine.update_weights(1)
        metrics = engine.metrics()
        own = engine._own_logprobs(problem, fake.ANSWER)
        gaps = (own + 0.5).abs()  # the server without a model says -0.5 of every token
        assert metrics["sync_drift_mean"] == pytest.approx(float(gaps.mean()), rel=1e-5)
        assert metrics["sync_drift_max"] == pytest.approx(float(gaps.max()), rel=1e-5)
        assert engine.metrics() == {}
        engine._config = dataclasses.replace(config, drift_alarm=0.01)
        with pytest.raises(RolloutError, match=r"differ from the trainer's by .*drift_alarm=0.01"):
            engine.update_weights(2)
    finally:
        engine.close()
        engine.close()


def test_colocated_servers_sleep_while_the_trainer_works(policy, problem, server, tmp_path):
    config = ServerConfig(urls=(server.url,), request_timeout_s=20.0, drift_alarm=100.0, colocated=True)
    engine = SyncedEngine(policy, config, tmp_path, print)
    memory = {"/release_memory_occupation", "/resume_memory_occupation"}

    def since(mark):
        return [call for call in server.calls[mark:] if call in memory | {"/generate", "/update_weights_from_tensor"}]

    try:
        assert not memory & set(server.calls[: server.calls.index("/release_memory_occupation")])  # it was awake
        mark = len(server.calls)
        engine.generate([problem], 2, SamplingParams(max_new_tokens=24))
        engine.generate([problem], 2, SamplingParams(max_new_tokens=24))  # as an evaluation does: no push between
        assert since(mark) == ["/resume_memory_occupation", "/generate", "/release_memory_occupation"] * 2
        mark = len(server.calls)
        engine.update_weights(1)
        awake = ["/resume_memory_occupation", "/update_weights_from_tensor", "/resume_memory_occupation"]
        assert since(mark) == [*awake, "/generate"]  # awake for the next questions, as for the probe
        mark = len(server.calls)
        engine.update_weights(2)  # after a supervised step: nothing was asked
        assert since(mark) == ["/update_weights_from_tensor", "/generate", "/release_memory_occupation"]
        assert server.asleep == {"weights", "kv_cache"}
        engine.generate([problem], 1, SamplingParams(temperature=0.0, max_new_tokens=24))  # an evaluation between them
        mark = len(server.calls)
        engine.update_weights(3)
        assert since(mark) == [*awake, "/generate", "/release_memory_occupation"]
        assert server.asleep == {"weights", "kv_cache"}  # so that the supervised steps after it have the GPU
    finally:
        engine.close()
    assert not server.asleep


def test_memory_is_not_handed_to_another_machine(monkeypatch):
    check_here(["http://127.0.1.1:1", "http://localhost:2"])
    monkeypatch.setattr("rewardmap.train.weight_sync.own_address", lambda url: "192.0.2.9")
    check_here(["http://192.0.2.9:1"])
    with pytest.raises(ConfigError, match=r"sync='tensor'.*http://192.0.2.1:1 is on another.*'distributed' or 'disk'"):
        check_here(["http://192.0.2.9:1", "http://192.0.2.1:1"])
