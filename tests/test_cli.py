"""The command line: what reaches the rooms below, and how mistakes and failures end."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import rewardmap
from rewardmap.cli import app
from rewardmap.config import Config
from rewardmap.rollout.engine import RolloutError
from rewardmap.train import examine
from rewardmap.train import run as runs
from rewardmap.train.examine import EvalRequest
from rewardmap.types import DataError

Call = tuple[tuple[Any, ...], dict[str, Any]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """What ``rewardmap.train.run`` was called with; nothing is trained."""
    made: list[Call] = []

    def record(name: str) -> Callable[..., Path]:
        def called(*arguments: Any, **options: Any) -> Path:
            made.append(((name, *arguments), options))
            return Path("somewhere")

        return called

    for name in ("train", "resume"):
        monkeypatch.setattr(runs, name, record(name))
    monkeypatch.setattr(examine, "evaluate_target", record("evaluate_target"))
    return made


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def failing(*arguments: Any, **options: Any) -> Path:
        raise error

    monkeypatch.setattr(runs, "train", failing)


def test_train_without_arguments_is_the_tiny_run(calls: list[Call]) -> None:
    assert invoke("train").exit_code == 0
    ((name, config, run_dir), _) = calls[0]
    assert (name, config.policy.model, run_dir.parent) == ("train", "tiny", Path("runs"))
    assert run_dir.name.startswith("tiny-")


def test_train_with_a_file_and_overrides(calls: list[Call], tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[train]\nseed = 5\nprompts_per_step = 3\n", encoding="utf-8")
    result = invoke("train", str(path), "train.seed=6", "rollout.group_size=2", "--run-dir", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    ((_, config, run_dir), _) = calls[0]
    assert (config.train.seed, config.train.prompts_per_step, config.rollout.group_size) == (6, 3, 2)
    assert run_dir == tmp_path / "out"


def test_train_with_overrides_alone(calls: list[Call]) -> None:
    assert invoke("train", "train.seed=6").exit_code == 0
    config = calls[0][0][1]
    assert isinstance(config, Config) and config.train.seed == 6 and config.policy.model == "tiny"


def test_resume(calls: list[Call], tmp_path: Path) -> None:
    assert invoke("train", "--resume", str(tmp_path)).exit_code == 0
    assert calls[0][0] == ("resume", tmp_path)
    result = invoke("train", "train.seed=1", "--resume", str(tmp_path))
    assert result.exit_code == 2 and "own config.toml" in result.stderr
    assert len(calls) == 1


def test_eval(calls: list[Call], tmp_path: Path) -> None:
    assert invoke("eval", str(tmp_path), "--data", "maps", "--split", "val").exit_code == 0
    assert invoke("eval", str(tmp_path)).exit_code == 0
    answers = ("--responses", "a.jsonl", "--data", "maps", "--normaliser", "training", "--extraction", "lenient")
    assert invoke("eval", *answers, "--questions", "long", "--no-map-scores").exit_code == 0
    assert invoke("eval", "eval.max_problems=3", "--responses", "a.jsonl").exit_code == 0
    assert [call[0][1] for call in calls] == [
        EvalRequest(str(tmp_path), data=Path("maps"), split="val", settings=[]),
        EvalRequest(str(tmp_path), settings=[]),
        EvalRequest(
            None,
            Path("a.jsonl"),
            data=Path("maps"),
            questions="long",
            normaliser="training",
            extraction="lenient",
            map_scores=False,
            settings=[],
        ),
        EvalRequest(None, Path("a.jsonl"), settings=["eval.max_problems=3"]),
    ]
    result = invoke("eval", str(tmp_path), "--normaliser", "strict")
    assert result.exit_code == 2 and "--normaliser strict: choose one of training, evaluation" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train", "train.sed=3"], "'train.sed'; did you mean 'train.seed'"),
        (["train", "train.seed=a"], "train.seed"),
        (["train", "no_such_config"], "no_such_config"),
        (["train", "tiny", "extra"], "key=value"),
    ],
)
def test_a_wrong_setting_ends_in_one_line(arguments: list[str], named: str, calls: list[Call]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert named in result.stderr
    assert len(result.stderr.splitlines()) == 1 and "Traceback" not in result.stderr
    assert not calls


@pytest.mark.parametrize(
    ("error", "code", "named"),
    [
        (DataError("data/x.json, row 3: field 'type'"), 2, "data/x.json, row 3: field 'type'"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "maps/oslo.png"), 1, "maps/oslo.png"),
        (
            OSError(errno.ENOSPC, "No space left on device", "run/model.safetensors"),
            1,
            "run/model.safetensors",
        ),
        (RuntimeError("IoError(Os { code: 28, kind: StorageFull })"), 1, "no space left"),
        (torch.OutOfMemoryError("CUDA out of memory."), 1, "train.max_tokens_per_micro_batch"),
        (RuntimeError("the gradient\nis nan"), 1, "RuntimeError: the gradient is nan"),
        (RolloutError("http://x: the key is refused"), 1, "error: http://x: the key is refused\n"),
        (KeyboardInterrupt("saved after step 7"), 130, "saved after step 7"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_a_failure_ends_in_one_line_and_its_own_code(
    error: BaseException, code: int, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(monkeypatch, error)
    result = invoke("train")
    assert result.exit_code == code
    assert named in result.stderr
    assert len(result.stderr.splitlines()) == 1 and "Traceback" not in result.stderr


def test_a_run_folder_given_as_a_configuration_is_told_what_it_is(calls: list[Call], tmp_path: Path) -> None:
    (tmp_path / "config.toml").touch()
    result = invoke("train", str(tmp_path))
    assert result.exit_code == 2 and f"go on with --resume {tmp_path}" in result.stderr and not calls


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, DataError("a row"))
    result = invoke("train", "--debug")
    assert result.exit_code == 1
    assert isinstance(result.exception, DataError)


def test_a_full_disk_has_the_remedy_of_its_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fail_with(monkeypatch, OSError(errno.ENOSPC, "No space left on device", "runs/a/model.safetensors"))
    assert invoke("train").stderr == (
        "error: no space left on device: runs/a/model.safetensors; free some, then go on with --resume, or begin "
        "elsewhere with --run-dir\n"
    )

    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")  # a write names no file

    monkeypatch.setattr(Path, "write_bytes", full)
    result = invoke("generate", str(tmp_path / "maps"), "--level", "tiny")
    assert result.exit_code == 1 and result.stderr == (
        f"error: no space left on device: {tmp_path / 'maps'}; free some, then run the command again, or write to "
        "another folder\n"
    )
    assert not list(tmp_path.iterdir())


def test_generate_writes_what_train_reads(tmp_path: Path) -> None:
    from rewardmap.transit import load_dataset

    out = tmp_path / "maps"
    settings = ("--level", "tiny", "--seed", "4")
    assert invoke("generate", str(out), "--maps", "5", "--test-maps", "2", *settings).exit_code == 0
    train, test = load_dataset(out, "train"), load_dataset(out, "test")
    assert (len(train.networks), len(test.networks)) == (3, 2)
    again = invoke("generate", str(out))
    assert again.exit_code == 2 and "exists" in again.stderr
    none_left = invoke("generate", str(tmp_path / "other"), "--maps", "2", "--test-maps", "2")
    assert none_left.exit_code == 2 and "--test-maps 2 leaves no maps" in none_left.stderr
    nonsense = invoke("generate", str(tmp_path / "other"), "--level", "huge")
    assert nonsense.exit_code == 2 and "huge" in nonsense.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["maps"]


def test_help_is_quick_and_names_the_commands() -> None:
    code = (
        "import sys; from rewardmap.cli import main; sys.argv = ['rewardmap', '--help']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numba', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert all(command in result.stdout for command in ("train", "eval", "serve", "generate", "score"))


def test_a_signal_while_maps_are_drawn_is_said_and_leaves_nothing_half_made(tmp_path: Path) -> None:
    code = "from rewardmap.cli import main; main()"
    settings = ["data.train_maps=100000", "--run-dir", str(tmp_path / "run")]
    command = [sys.executable, "-P", "-c", code, "train", *settings]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("run/.data.partial-*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 143
    assert told.splitlines() == [
        "SIGTERM: leaving",
        f"interrupted; go on with: rewardmap train --resume {tmp_path / 'run'}",
    ]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "config.toml"]


def test_what_a_killed_generate_left_is_removed_by_the_next_and_nothing_that_is_being_written(tmp_path: Path) -> None:
    """Nor what only has such a name."""
    other = tmp_path / ".maps.partial-notes"
    other.mkdir()
    small = ("generate", str(tmp_path / "maps"), "--level", "tiny", "--maps", "2")
    command = [sys.executable, "-P", "-c", "from rewardmap.cli import main; main()", *small[:-1], "100000"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        partial = tmp_path / f".maps.partial-{process.pid}"
        deadline = time.monotonic() + 120
        try:
            while not (partial / "maps").is_dir() and time.monotonic() < deadline:
                time.sleep(0.05)
            assert invoke(*small).exit_code == 0 and partial.is_dir()
        finally:
            process.kill()
    shutil.rmtree(tmp_path / "maps")
    assert partial.is_dir() and invoke(*small).exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "maps"]
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == [
        "README.md", "data", "geometry", "maps", "stations",
    ]  # fmt: skip


def test_a_signal_ends_a_rank_that_waits_for_another_with_its_own_code(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys, time\n"
        "from rewardmap.exits import errors\n"
        "from rewardmap.train.ranks import join_ranks\n"
        "with errors(debug=False), join_ranks(timeout_seconds=120) as ranks:\n"
        "    pathlib.Path(sys.argv[1], str(ranks.rank)).touch()\n"
        "    time.sleep(120) if ranks.is_first else ranks.wait()\n"
    )
    # They meet here, as torchrun's ranks meet at its own store: no port is let go of before it is used.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    first, second = (
        subprocess.Popen(
            [sys.executable, "-P", "-c", code, str(tmp_path)],
            env={**os.environ, **meeting, "WORLD_SIZE": "2", "RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    )
    with first, second:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        for process, number in ((second, signal.SIGTERM), (first, signal.SIGUSR1)):
            process.send_signal(number)
            _, told = process.communicate(timeout=60)
            assert process.returncode == 128 + number
            rank = "1" if process is second else "0"
            assert told.splitlines()[-1] == f"rank {rank}: {number.name}: leaving"


def test_tables_are_printed_where_the_terminal_lacks_some_of_their_signs(tmp_path: Path) -> None:
    from rewardmap.transit import gold_response, load_dataset, write_dataset

    write_dataset(tmp_path / "maps", maps={"train": 1, "test": 1})
    test = load_dataset(tmp_path / "maps", "test").problems
    rows = [json.dumps({"uid": problem.uid, "response": gold_response(problem)}) for problem in test]
    (tmp_path / "answers.jsonl").write_text("\n".join(rows), encoding="utf-8")
    command = [sys.executable, "-P", "-c", "from rewardmap.cli import main; main()", "eval"]
    command += ["--responses", str(tmp_path / "answers.jsonl"), "--data", str(tmp_path / "maps")]
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "?" in done.stdout


def test_version() -> None:
    assert invoke("--version").output.strip() == f"rewardmap {rewardmap.__version__}"


def test_score_a_file(tmp_path: Path) -> None:
    (tmp_path / "city.json").write_text(json.dumps({"Red Line": ["A Station", "B Station"]}), encoding="utf-8")
    row = {"type": "TorF1", "answer": 1, "difficulty_city": "easy", "json": "city.json"}
    answers, out = tmp_path / "answers.jsonl", tmp_path / "scores.jsonl"
    lines = [json.dumps(row | {"response": f"\\boxed{{{word}}}"}) for word in ("yes", "no")]
    answers.write_text("\n".join(lines), encoding="utf-8")
    result = invoke("score", str(answers), "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "TorF1" in result.output and "50.0%" in result.output
    assert [json.loads(line)["score"] for line in out.read_text(encoding="utf-8").splitlines()] == [10.0, 0.0]

    wrong = invoke("score", str(answers), "--mode", "best")
    assert wrong.exit_code == 2 and "graph" in wrong.stderr
    missing = invoke("score", str(tmp_path / "none.jsonl"))
    assert missing.exit_code == 2 and "none.jsonl" in missing.stderr
