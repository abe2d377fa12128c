"""Servers as processes: ready, ended, restarted; and nothing outlives the trainer. A script stands in for SGLang."""

from __future__ import annotations

import io
import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from rewardmap.cli import app
from rewardmap.config import ConfigError, ServerConfig
from rewardmap.config_file import load_config
from rewardmap.rollout.engine import RolloutError
from rewardmap.rollout.process import GUARD
from rewardmap.rollout.sglang_server import VISION_CACHE_MB, Keys, Router, SGLangServer, need_sglang
from rewardmap.train.serve import serve

STAND_IN = """
    import http.server, os, subprocess, sys, time
    from pathlib import Path

    folder, port = Path.cwd(), int(sys.argv[sys.argv.index("--port") + 1])
    lives = folder / "lives"
    lives.write_text(lives.read_text() + "x" if lives.exists() else "x")
    (folder / "arguments").write_text("\\n".join(sys.argv))
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (folder / "pids").write_text(f"{os.getpid()} {child.pid}")
    plan = sys.argv[-1]
    if plan == "die":
        sys.exit("CUDA out of memory, says the stand-in")
    if plan == "taken" and len(lives.read_text()) == 1:
        sys.exit("[Errno 98] error while attempting to bind: address already in use")
    if plan == "slow":
        time.sleep(600)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if plan == "busy" and self.path == "/health_generate":
                time.sleep(6)
            self.send_response(200)
            self.end_headers()

    http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def python(tmp_path):
    script = tmp_path / "stand_in.py"
    script.write_text(textwrap.dedent(STAND_IN))
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')
    python.chmod(0o755)
    return python


def server_of(config, folder, keys, frozen_vision=True):
    return SGLangServer(config, 0, folder, folder, keys, "cpu", "float32", False, frozen_vision, banned=(261, 262))


@pytest.fixture
def make(tmp_path, python):
    servers = []

    def make(plan, **settings):
        config = ServerConfig(python=str(python), args=("--max-total-tokens", "9", plan), **settings)
        keys = Keys.create(tmp_path)
        servers.append(server_of(config, tmp_path, keys))
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


def pids(folder):
    return [int(pid) for pid in (folder / "pids").read_text().split()]


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def gone(processes, seconds=15.0):
    deadline = time.monotonic() + seconds
    while any(map(alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, processes))


def test_the_router_starts_and_its_key_is_not_on_the_command_line(python, tmp_path):
    keys = Keys("sample-key", "admin-key")
    router = Router(ServerConfig(python=str(python), router=True), ["http://127.0.0.1:1"], tmp_path, keys)
    try:
        router.start()
        processes = pids(tmp_path)
        line = Path(f"/proc/{processes[0]}/cmdline").read_text()
        assert "--worker-urls\0http://127.0.0.1:1\0" in line and "sample-key" not in line
    finally:
        router.stop()
    assert gone(processes)


def test_start_and_stop(make, tmp_path):
    server = make("serve")
    server.start()
    server.wait_ready()
    assert server.answers()
    processes = pids(tmp_path)
    assert all(map(alive, processes))
    server.stop()
    assert gone(processes) and not server.answers()
    server.stop()


def test_a_server_that_was_stopped_is_not_started_again(make, tmp_path):
    """By the thread that brings it up while the run ends."""
    server = make("serve")
    server.start()
    server.stop()
    with pytest.raises(RolloutError, match="server 0 was stopped"):
        server.start()
    assert server.ended


def test_a_busy_server_is_not_taken_for_dead(make, tmp_path):
    """It would be ended with all that it computes. SGLang waits for 20 seconds until it calls itself unhealthy."""
    server = make("busy")
    server.start()
    server.wait_ready()
    assert server.answers()


def test_each_replica_has_its_gpus_and_sees_the_trainers(tmp_path, monkeypatch):
    def seen(gpus, size=1, visible="", count=4, **settings):
        monkeypatch.setattr("torch.cuda.device_count", lambda: count)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        config = ServerConfig(gpus=gpus, tensor_parallel=size, replicas=2, **settings)
        servers = [
            SGLangServer(config, index, tmp_path, tmp_path, Keys(), "cuda", "bfloat16", False, True) for index in (0, 1)
        ]
        return [server._environment()["CUDA_VISIBLE_DEVICES"] for server in servers]

    assert seen(()) == ["0,1,2,3", "1,0,2,3"]
    assert seen((), size=2) == ["0,1,2,3", "2,3,0,1"]
    assert seen((), visible="GPU-a,GPU-b") == ["GPU-a,GPU-b", "GPU-b,GPU-a"]
    assert seen((6, 7), visible="4,5") == ["6,4,5", "7,4,5"]  # the trainer's own are there to be read from
    assert seen((0, 0), count=1) == ["0", "0"]
    with pytest.raises(ConfigError, match=r"replicas=2 of 1 GPUs each: this machine shows 1; name them"):
        seen((), count=1)


def test_a_colocated_server_keeps_its_weights_while_it_sleeps(tmp_path):
    options = server_of(ServerConfig(colocated=True), tmp_path, Keys())._options()
    assert {"--enable-memory-saver", "--enable-weights-cpu-backup"} <= set(options)


def test_a_server_is_no_rank_of_the_job_that_starts_it(tmp_path, monkeypatch):
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "ROLE_NAME", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
    ours = {*launcher, "PYTHONPATH", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
    for name in (*ours, "LOCAL_SETTING"):
        monkeypatch.setenv(name, "1")
    environment = server_of(ServerConfig(), tmp_path, Keys())._environment()
    assert not environment.keys() & ours and environment["LOCAL_SETTING"] == "1"
    assert environment["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] == "false"  # a router asks one that sleeps too


def test_a_server_has_the_environment_that_torchrun_was_started_in(tmp_path):
    """Else with its OMP_NUM_THREADS=1, which is meant for ranks."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import json, os\n"
        "if os.environ['RANK'] == '0':\n"
        "    from rewardmap.rollout.sglang_server import _foreign_environment\n"
        "    print(json.dumps(_foreign_environment()))\n"
    )
    before = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "PYTHONPATH")}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, env=before, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == before | {"PYTHONSAFEPATH": "1"}


def test_threads_that_the_user_chose_are_the_servers_too(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    server = SGLangServer(ServerConfig(), 0, tmp_path, tmp_path, Keys(), "cuda", "bfloat16", False, True)
    for threads, launched in (("1", False), ("3", False), ("3", True)):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        if launched:
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        assert server._environment()["OMP_NUM_THREADS"] == threads


def test_keys_are_private_and_on_no_command_line(make, tmp_path):
    server = make("serve")
    server.start()
    server.wait_ready()
    keys = Keys.read(tmp_path / "keys.json")
    assert keys == Keys.create(tmp_path) and keys.api != keys.admin and len(keys.api) >= 32
    assert set(keys.api + keys.admin) <= set("0123456789abcdef")  # SGLang's own reader takes "-…" for an option
    for name in ("keys.json", "server-0.yaml"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    arguments = (tmp_path / "arguments").read_text()
    assert keys.api not in arguments and keys.admin not in arguments
    assert keys.api in (tmp_path / "server-0.yaml").read_text()
    options = arguments.split("\n")
    assert options[options.index("--host") + 1] == "127.0.0.1"
    assert options[options.index("--load-format") + 1] == "dummy"
    preferred = json.loads(options[options.index("--preferred-sampling-params") + 1])
    assert preferred == {"logit_bias": {"261": -1e9, "262": -1e9}}


def test_a_server_that_ends_is_an_error_with_its_last_words(make):
    server = make("die")
    server.start()
    with pytest.raises(RolloutError, match=r"server 0 ended with code 1 before it was ready(.|\n)*CUDA out of memory"):
        server.wait_ready()


def test_a_taken_port_is_changed_for_another(make, tmp_path):
    server = make("taken")
    server.start()
    server.wait_ready()
    assert (tmp_path / "lives").read_text() == "xx" and server.answers()


def test_a_server_that_does_not_get_ready_is_ended(make, tmp_path):
    server = make("slow", start_timeout_s=1.5)
    server.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "pids").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    with pytest.raises(RolloutError, match=r"was not ready within rollout.server.start_timeout_s=1.5"):
        server.wait_ready()
    assert gone(pids(tmp_path))


def test_an_interpreter_without_sglang_is_told_what_to_do(tmp_path):
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "$@"\n')  # no site-packages
    bare.chmod(0o755)
    config = ServerConfig(python=str(bare))
    remedy = r"^/.*/bare has no SGLang: install it .* rollout.server.python="
    with pytest.raises(ConfigError, match=remedy):
        need_sglang(config)
    server = server_of(config, tmp_path, Keys.create(tmp_path))
    server.start()
    with pytest.raises(ConfigError, match=remedy):
        server.wait_ready()


def test_a_relative_interpreter_is_found_from_the_servers_folder(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    server = make("serve")
    server.config = replace(server.config, python=f"{tmp_path.name}/python")
    server.start()
    server.wait_ready()
    assert server.answers()


def test_an_interpreter_that_does_not_exist_is_named(tmp_path):
    config = ServerConfig(python="/no/such/python")
    server = server_of(config, tmp_path, Keys("a", "b"))
    with pytest.raises(ConfigError, match=r"rollout.server.python='/no/such/python'"):
        server.start()


def test_outputs_of_a_trained_tower_are_not_kept(tmp_path, monkeypatch):
    name = "SGLANG_VLM_CACHE_SIZE_MB"
    frozen, trained = (server_of(ServerConfig(), tmp_path, Keys("a", "b"), frozen) for frozen in (True, False))
    assert (frozen._environment()[name], trained._environment()[name]) == (VISION_CACHE_MB, "0")
    monkeypatch.setenv(name, "77")
    assert (frozen._environment()[name], trained._environment()[name]) == ("77", "0")


def test_keys_of_given_servers(tmp_path):
    with pytest.raises(ConfigError, match=r"rollout.server.keys_file='\S+none.json'"):
        Keys.read(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"api_key": "x"}')
    with pytest.raises(ConfigError, match=r"half\.json"):
        Keys.read(tmp_path / "half.json")


def start_guard(tmp_path):
    """A parent with a guarded command that has a child: the parent, the guard's pid, those of command and child."""
    command = "import os, subprocess, sys, time\n" + (
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(tmp_path / 'pids')!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        "time.sleep(600)"
    )
    parent = f"""
import sys, time
from pathlib import Path
from rewardmap.rollout.process import GuardedProcess
import io
import os
process = GuardedProcess([sys.executable, "-c", {command!r}], Path({str(tmp_path / "log")!r}), os.environ)
print(process._guard.pid, flush=True)
time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    guard = int(process.stdout.readline())
    deadline = time.monotonic() + 20
    while not (tmp_path / "pids").exists() or len((tmp_path / "pids").read_text().split()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process, guard, pids(tmp_path)


def test_nothing_outlives_a_killed_trainer(tmp_path):
    parent, guard, processes = start_guard(tmp_path)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert gone([guard, *processes])


def test_a_killed_guard_takes_the_command_along(tmp_path):
    parent, guard, processes = start_guard(tmp_path)
    os.kill(guard, signal.SIGKILL)
    assert gone(processes[:1])
    parent.kill()
    parent.wait()
    os.kill(processes[1], signal.SIGKILL)  # SGLang's children watch their parent themselves


def test_the_guard_needs_nothing_but_python():
    command = [sys.executable, "-I", "-S", str(GUARD), sys.executable, "-c", "import sys; sys.exit(7)"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as guard:
        assert guard.wait(timeout=30) == 7


def serve_config(python, plan, *settings):
    options = [f"rollout.server.python='{python}'", f"rollout.server.args=['{plan}']", "policy.device=cpu"]
    return load_config("tiny", [*options, *settings])


def test_serve_says_where_everything_is_and_ends_on_a_signal(python, tmp_path):
    folder = tmp_path / "servers"

    def stop_when_ready():
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and "a run uses them" not in console.export_text(clear=False):
            time.sleep(0.1)
        time.sleep(0.3)  # into the loop that waits for it
        os.kill(os.getpid(), signal.SIGTERM)

    console = Console(record=True, file=io.StringIO(), width=200)
    thread = threading.Thread(target=stop_when_ready)
    thread.start()
    adapters = ("policy.lora_rank=2", "rollout.server.lora_sync=adapter")
    serve(serve_config(python, "serve", *adapters), folder, console=console)
    thread.join()
    text = console.export_text()
    assert f"keys: {folder / 'keys.json'}" in text and "server 0: http://127.0.0.1:" in text
    assert Keys.read(folder / "keys.json").api not in text
    assert (folder / "model" / "model.safetensors").stat().st_size and "dummy" not in (folder / "arguments").read_text()
    assert "--enable-lora" in (folder / "arguments").read_text()
    assert gone(pids(folder))


def test_serve_ends_with_an_error_when_a_server_does(python, tmp_path):
    with pytest.raises(RolloutError, match=r"SGLang server 0 ended(.|\n)*CUDA out of memory"):
        serve(serve_config(python, "die"), tmp_path / "servers", console=Console(quiet=True))


def test_serve_says_what_is_wrong_with_its_settings_before_it_asks_for_sglang(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for setting, said in (
        ("rollout.server.urls=['http://x']", "rollout.server.urls=['http://x'] names servers that run already"),
        ("rollout.server.lora_sync=adapter", "policy.lora_rank=0 trains none"),
        ("rollout.server.lora_sync=merged", "rollout.server.python='nowhere': no such program"),
    ):
        result = CliRunner().invoke(app, ["serve", "rollout.server.python=nowhere", setting])
        assert result.exit_code == 2 and said in result.stderr
    assert not list(tmp_path.iterdir())
