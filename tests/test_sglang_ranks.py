"""Several ranks with SGLang servers: weights gathered from shards, answers shared, failures that end all ranks."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from rewardmap.config import PolicyConfig
from rewardmap.report import read_metrics
from rewardmap.train.checkpoint import list_checkpoints
from rewardmap.train.weights import whole_weights

sys.path.append(str(Path(__file__).parent))
import sglang_fake as fake

JOB = Path(__file__).parent / "sglang_ranks_job.py"
PUSHED = {
    "plain": {},
    "bfloat16": {"parallel": {"compute_dtype": "bfloat16"}},
    "offload": {"parallel": {"offload": True}, "policy": {"freeze_vision": False}},
    "lora": {"policy": {"lora_rank": 4}},
}


@pytest.fixture
def make(policy):
    """Servers, and proxies before them."""
    with ExitStack() as stack:

        def make():
            server = fake.FakeServer(policy.tokenizer, policy.model.config.image_token_id)
            stack.enter_context(server.running())
            proxy = fake.Proxy(server.url)
            stack.enter_context(proxy.running())
            return server, proxy

        yield make


@pytest.fixture(scope="module")
def run_jobs(tmp_path_factory):
    """Runs jobs, and says what each rank of each saw. The process that forks the ranks imports once."""
    log = tmp_path_factory.mktemp("ranks") / "stderr"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    process = None

    def start():
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log.open("a"), "text": True}
        return subprocess.Popen([sys.executable, str(JOB)], env=environment, **pipes)

    def run_jobs(folder, jobs, timeout=400):
        nonlocal process
        if process is None or process.poll() is not None:
            process = start()
        (folder / "jobs.json").write_text(json.dumps(jobs))
        print(folder, file=process.stdin, flush=True)
        ready, _, _ = select.select([process.stdout], [], [], timeout)
        assert ready and process.stdout.readline(), log.read_text()[-4000:]
        seen = {name: sorted((folder / name).glob("[0-9].json")) for name in jobs}
        return {name: [json.loads(path.read_text()) for path in paths] for name, paths in seen.items()}

    yield run_jobs
    if process is not None:
        process.kill()
        process.communicate()


def pushing(url, size=2, **settings):
    return {"scenario": "push", "size": size, "server": {"urls": [url], "bucket_mb": 1}, **settings}


def test_two_ranks_push_what_one_does_and_hold_one_weight_at_a_time(policy, run_jobs, make, tmp_path):
    servers = {(variant, size): make()[0] for variant in PUSHED for size in (1, 2)}
    jobs = {f"{v}-{n}": pushing(server.url, n, **PUSHED[v]) for (v, n), server in servers.items()}
    seen = run_jobs(tmp_path, jobs)
    for (variant, size), server in servers.items():
        assert server.version == "3" and not server.paused and not server.session
        assert server.calls.count("/update_weights_from_tensor") > 1
        ranks = seen[f"{variant}-{size}"]
        assert len(ranks) == size
        # Beside the shards a rank has the weight being gathered at most; adapters are gathered with theirs.
        assert variant == "lora" or all(rank["held"] == rank["largest"] > 0 for rank in ranks)
    loaded = dict(whole_weights(policy.model))
    for variant in PUSHED:
        one, two = (servers[variant, size].weights for size in (1, 2))
        assert one.keys() == two.keys() == loaded.keys()
        assert all(torch.equal(two[name], weight) for name, weight in one.items())
        dtype = torch.bfloat16 if variant == "bfloat16" else torch.float32
        for name, weight in one.items():
            merged = variant == "lora" and "_proj.weight" in name and "visual" not in name
            assert weight.dtype == dtype and torch.equal(weight, loaded[name].to(dtype)) != merged, name


def test_two_ranks_push_the_adapters_that_one_does(policy, run_jobs, make, tmp_path):
    """And two whose first attempt breaks off after the weights."""
    settings = {"policy": PUSHED["lora"]["policy"], "versions": [3, 4]}
    servers, jobs = {name: make() for name in ("one", "two", "again")}, {}
    for name, (server, proxy) in servers.items():
        server.enable_lora(4, list(PolicyConfig().lora_targets))
        jobs[name] = pushing(proxy.url, 2 - (name == "one"), **settings)
        jobs[name]["server"]["lora_sync"] = "adapter"
    servers["again"][1].break_next("/load_lora_adapter_from_tensors", "reset")
    seen = run_jobs(tmp_path, jobs)
    assert not any("error" in rank for ranks in seen.values() for rank in ranks)
    loaded = dict(whole_weights(policy.model))
    [expected] = servers["one"][0].adapters.values()
    for server, _ in servers.values():
        assert all(torch.equal(server.weights[name], weight) for name, weight in loaded.items())
        [(name, adapter)] = server.adapters.items()
        assert name == server.version and name.endswith("-4") and not server.paused and not server.session
        assert adapter.keys() == expected.keys() and any(weight.any() for weight in adapter.values())
        assert all(torch.equal(adapter[name], weight) for name, weight in expected.items())


def test_a_push_that_fails_is_made_again_by_all_ranks_or_ends_all_with_one_error(run_jobs, make, tmp_path):
    refused = {name: make() for name in ("/pause_generation", "/update_weights_from_tensor", "/flush_cache")}
    for path, (_, proxy) in refused.items():
        for _ in range(2):
            proxy.break_next(path, "400")
    (once, broken), (_, hanging) = make(), make()
    broken.break_next("/update_weights_from_tensor", "reset")
    for _ in range(2):
        hanging.break_next("/update_weights_from_tensor", "hang")
    jobs = {path.strip("/"): pushing(proxy.url) for path, (_, proxy) in refused.items()}
    jobs |= {"once": pushing(broken.url), "hangs": pushing(hanging.url, timeout_seconds=8)}
    seen = run_jobs(tmp_path, jobs)
    for path, (server, _) in refused.items():
        first, second = seen[path.strip("/")]
        assert first["error"] == "RolloutError" and path in first["says"] and "HTTP 400" in first["says"]
        says = "stopped with rank 0: RolloutError: weights version 3 did not reach the servers"
        assert second["error"] == "OtherRankError" and second["says"].startswith(says)
        assert max(first["seconds"], second["seconds"]) < 20
        assert not server.paused and not server.session
    assert len(seen["once"]) == 2 and not any("error" in rank for rank in seen["once"])
    assert broken.spoiled == 1 and once.version == "3"
    first, second = seen["hangs"]  # given up before the ranks that wait for it are
    assert "no answer within 4 s" in first["says"] and second["error"] == "OtherRankError"


def test_all_ranks_hold_the_answers_that_rank_0_asked_for(run_jobs, make, tmp_path):
    server, _ = make()
    settings = {"urls": [server.url], "colocated": True, "drift_alarm": 100.0}
    first, second = run_jobs(tmp_path, {"job": {"scenario": "sample", "size": 2, "server": settings}})["job"]
    assert first == second | {"restarts": [0]} and first["sharded"]
    assert first["uids"] == [f"q-{n}" for n in range(5)] and first["calls"] == [0, 1, 2, 3, 4]
    assert set(first["metrics"]) == {"sync_drift_mean", "sync_drift_max"}
    versions = [rollout[-1] for group in first["groups"] for rollout in group[1]]
    assert versions == [0] * 10 + [1] * 2
    asked = [body for body in server.bodies if body["sampling_params"]["max_new_tokens"]]
    assert len(asked) == 6 and len({tuple(body["input_ids"]) for body in asked}) == 5
    # Servers take memory only when every rank is there.
    awake, asleep, come = "/resume_memory_occupation", "/release_memory_occupation", "/tokenize"
    order = [call for call in server.calls if call in (awake, asleep, come, "/generate")]
    expected = [come, awake, *["/generate"] * 5, asleep, come, awake, awake, "/generate", "/generate", asleep, awake]
    assert order[-len(expected) :] == expected


@pytest.fixture
def python(tmp_path):
    """Starts the stand-in as a server of our own."""
    python = tmp_path / "python"
    asked = '[ "$1" = -c ] && exit  # yes, it has SGLang'
    python.write_text(f'#!/bin/sh\n{asked}\nshift 2\nexec "{sys.executable}" "{fake.__file__}" "$@"\n')
    python.chmod(0o755)
    return str(python)


def check_that_servers_are_gone(folder, count):
    pids = [int(pid) for pid in (folder / "pids").read_text().split()]
    assert len(pids) == count and not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_servers_that_end_while_they_are_asked_come_back(run_jobs, python, tmp_path):
    """Two ranks that take themselves for two nodes: each one's server ends at its first question, is started again, and
    gets the weights of both ranks' shards while the other may still sample; or at the comparison after a sync. And one
    step off, when there is another server to ask until the next sync."""
    settings = {"python": python, "drift_alarm": 100.0, "args": ["--die-once", "died"]}
    nodes = {"scenario": "sample", "size": 2, "server": settings, "nodes": 2}
    ahead = {"scenario": "sample", "size": 2, "server": {**settings, "replicas": 2}, "ahead": True}
    adapters = {**nodes, "server": {**settings, "lora_sync": "adapter"}, "policy": {"lora_rank": 4}}
    probed = {**nodes, "server": {**settings, "args": ["--die-at-probe", "died"]}}
    seen = run_jobs(tmp_path, {"nodes": nodes, "adapters": adapters, "ahead": ahead, "probed": probed})
    for first, second in (seen["nodes"], seen["adapters"], seen["probed"]):
        assert first == second and first["restarts"] == [1] and first["metrics"]["sync_drift_mean"] > 0
    assert seen["ahead"][0] == seen["ahead"][1] | {"restarts": seen["ahead"][0]["restarts"]}
    assert sorted(seen["ahead"][0]["restarts"]) == [0, 1]
    counted = {name: ranks[0]["metrics"].get("server_restarts") for name, ranks in seen.items()}
    assert counted == {"nodes": 2, "adapters": 2, "ahead": 1, "probed": None}  # which the next step's row counts
    for ranks in seen.values():
        assert ranks[0]["uids"] == [f"q-{n}" for n in range(5)] and ranks[0]["calls"] == [0, 1, 2, 3, 4]
        assert [rollout[-1] for group in ranks[0]["groups"] for rollout in group[1]] == [0] * 10 + [1] * 2
        assert ranks[0]["sharded"]
    ended = [(f"{name}/servers{rank}", 2) for name in ("nodes", "adapters", "probed") for rank in ("", "/rank-1")]
    for folder, count in (*ended, ("ahead/servers", 3)):
        assert (tmp_path / folder / "died").exists()
        check_that_servers_are_gone(tmp_path / folder, count)


def test_runs_on_two_ranks_train_stop_and_go_on(run_jobs, make, python, tmp_path):
    """At each step, and one step off; and one with servers of its own that a signal to one rank stops."""
    shared = [
        *("data.train_maps=3", "data.test_maps=3", "train.prompts_per_step=5", "rollout.group_size=2"),
        *("train.checkpoint_every=1", "eval.max_problems=3", "eval.samples=0", "eval.text_only=false"),
        *("rollout.engine=sglang", "rollout.server.drift_alarm=100.0", "rollout.importance_correction=truncate"),
        *("policy.device=cpu", "parallel.compute_dtype=bfloat16", "parallel.timeout_seconds=60"),
        *("train.skip_equal_groups=false", "train.keep_checkpoints=9"),
        "train.stages=[{name='warm', kind='sft', steps=0, checkpoint='shipped'}, {name='all', steps=3}]",
    ]
    servers, jobs = {"together": make()[0], "ahead": make()[0]}, {}
    own = [f"rollout.server.python='{python}'", "rollout.server.replicas=2"]
    jobs["stopped"] = {"scenario": "run", "size": 2, "stop": True, "overrides": [*shared, *own]}
    for name, server in servers.items():
        own = [f"rollout.server.urls=['{server.url}']", f"rollout.staleness={int(name == 'ahead')}"]
        jobs[name] = {"scenario": "run", "size": 2, "overrides": [*shared, *own]}
    first, second = run_jobs(tmp_path, jobs)["stopped"]
    assert first == second and first["code"] == 143 and first["says"].startswith("saved after step ")
    check_that_servers_are_gone(tmp_path / "stopped" / "run" / "servers", 2)
    for name, server in servers.items():
        out = tmp_path / name / "run"
        rows = read_metrics(out)
        assert [row["step"] for row in rows] == [1, 2, 3] and server.version == "3"
        assert all("sync_drift_mean" in row and len(row["train_flop"]) == 2 for row in rows)
        assert [row["staleness"] for row in rows] == [0, 1, 1] if name == "ahead" else "staleness" not in rows[0]
        saved = list_checkpoints(out / "checkpoints")
        assert [path.name for path in saved] == ["step-000001", "step-000002", "step-000003"]
        for newest in saved[1:]:
            shutil.rmtree(newest)
        server.weights = {}
    run_jobs(tmp_path, {name: {"scenario": "run", "size": 2, "resume": True} for name in servers})
    for name, server in servers.items():
        out = tmp_path / name / "run"
        assert [row["step"] for row in read_metrics(out)] == [1, 2, 3] and server.version == "3"
        assert next(iter(server.weights.values())).dtype == torch.bfloat16
        assert (out / "report.json").is_file()
