"""Whole jobs in processes of their own: killed at random moments, over several ranks, with a rank that dies.

pytest -m slow tests/test_kills.py
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rewardmap.report import read_metrics
from rewardmap.train.checkpoint import list_checkpoints

pytestmark = pytest.mark.slow
JOB = Path(__file__).parent / "kill_job.py"
KILLS = 20
SETTINGS = [
    "train.prompts_per_step=6",
    "rollout.group_size=4",
    "train.checkpoint_every=2",
    "train.warmup_steps=0",
    "train.threads=1",
    "eval.text_only=false",
    "eval.max_problems=4",
    "eval.samples=0",
    "train.stages=[{name='warm', kind='sft', steps=0, checkpoint='shipped'}, {name='yes or no', steps=5, "
    "question_kinds=['TorF1', 'TorF2']}, {name='routes', steps=6, question_kinds=['planning'], replay=0.5}]",
]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]


def start(arguments: list[str], log: Path, ranks: int = 0, restarts: int = 0, **environment: str) -> subprocess.Popen:
    launcher = [*TORCHRUN, f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"] if ranks else []
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", **environment}
    with log.open("ab") as output:
        command = [sys.executable, *launcher, "-m", "rewardmap.cli", "train", *arguments]
        return subprocess.Popen(command, env=variables, stdout=output, stderr=output, start_new_session=True)


def finish(arguments: list[str], log: Path, **options) -> None:
    code = start(arguments, log, **options).wait(timeout=600)
    assert code == 0, log.read_text()[-3000:]


def numbers(run_dir: Path) -> list[dict]:
    return [
        {key: value for key, value in row.items() if key not in ("seconds", "speed")} for row in read_metrics(run_dir)
    ]


def begin(run_dir: Path, data: Path) -> list[str]:
    if (run_dir / "config.toml").exists():
        return ["--resume", str(run_dir)]
    return ["tiny", f"data.path={data}", *SETTINGS, "--run-dir", str(run_dir)]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(list_checkpoints(run_dir / "checkpoints")[-1] / "model.safetensors")


def test_kills_at_random_moments_change_nothing(tmp_path, data):
    """No step that a checkpoint holds is lost and none is half written: ``kill_job.py`` looks after every kill."""
    (tmp_path / "settings.json").write_text(json.dumps(["tiny", f"data.path={data}", *SETTINGS]))
    command = [sys.executable, str(JOB), str(tmp_path), str(KILLS), os.environ.get("KILL_SEED", "0")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    job = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    assert job.returncode == 0, job.stderr[-4000:]
    seen = json.loads(job.stdout.splitlines()[-1])
    print(json.dumps(seen))
    assert len(seen["kills"]) == KILLS and seen["left_half_saved"] > 0
    whole = tmp_path / "whole"
    for number in range(seen["runs"]):
        broken = tmp_path / f"broken-{number}"
        assert numbers(broken) == numbers(whole)
        expected, got = weights(whole), weights(broken)
        assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_a_job_of_two_ranks_resumes_with_one_and_with_three(tmp_path, data):
    """The optimizer's shards of two ranks are read by one and by three; the steps go on."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    process = start(begin(run_dir, data), log, ranks=2)
    deadline = time.monotonic() + 300
    while not list_checkpoints(run_dir / "checkpoints"):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.2)
    for child in (*children(process), process.pid):
        os.kill(child, signal.SIGKILL)
    process.wait()
    first = list_checkpoints(run_dir / "checkpoints")[-1]
    assert len(list((first / "training").glob("*.safetensors"))) == 2
    finish(["--resume", str(run_dir)], log, ranks=3)
    assert "changed since" in log.read_text() and "software.ranks: 2, now 3" in log.read_text()
    assert [row["step"] for row in read_metrics(run_dir)] == list(range(1, 12))
    newest = list_checkpoints(run_dir / "checkpoints")[-1]
    assert len(list((newest / "training").glob("*.safetensors"))) == 3
    finish(["--resume", str(run_dir)], log)
    assert "software.ranks: 3, now 1" in log.read_text()
    assert all(row["rollout_drift"] < 1e-4 for row in read_metrics(run_dir) if "rollout_drift" in row)


def test_two_ranks_stop_together_when_one_gets_a_signal(tmp_path, data):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    process = start(begin(run_dir, data), log, ranks=2)
    wait_for_steps(run_dir, process, log, 1)
    os.kill(children(process)[1], signal.SIGTERM)
    process.wait(timeout=120)
    assert "interrupted; saved after step" in log.read_text()
    assert list_checkpoints(run_dir / "checkpoints")


def test_a_dead_rank_ends_the_job_within_a_minute_and_a_restart_goes_on(tmp_path, data):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    process = start(begin(run_dir, data), log, ranks=2)
    wait_for_steps(run_dir, process, log, 3)
    os.kill(children(process)[1], signal.SIGKILL)
    started = time.monotonic()
    assert process.wait(timeout=60) != 0
    assert time.monotonic() - started < 60
    said = log.read_text()
    assert "rank      : 1" in said and "Signal 9 (SIGKILL)" in said
    again = tmp_path / "again"
    process = start(begin(again, data), log, ranks=2, restarts=1)
    wait_for_steps(again, process, log, 3)
    os.kill(children(process)[1], signal.SIGKILL)
    assert process.wait(timeout=300) == 0, log.read_text()[-3000:]
    assert [row["step"] for row in read_metrics(again)] == list(range(1, 12))
    assert "resuming after step" in log.read_text()


def test_a_rank_that_hangs_ends_the_job(tmp_path, data):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    process = start([*begin(run_dir, data), "parallel.timeout_seconds=20"], log, ranks=2)
    wait_for_steps(run_dir, process, log, 3)
    os.kill(children(process)[1], signal.SIGSTOP)
    assert process.wait(timeout=180) != 0  # torchrun waits half a minute before it ends a rank that does not listen
    assert "rank 0: error: LostRankError: another rank hangs or is gone" in log.read_text()


def wait_for_steps(run_dir: Path, process: subprocess.Popen, log: Path, steps: int) -> None:
    deadline = time.monotonic() + 300
    while not run_dir.exists() or len(read_metrics(run_dir)) < steps:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)


def children(process: subprocess.Popen) -> list[int]:
    """The ranks' processes, in the order of their start."""
    return sorted(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))
