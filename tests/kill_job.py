"""A job killed again and again: ``python kill_job.py FOLDER KILLS SEED``, started by ``test_kills.py``.

Imports once and forks each attempt, so that a kill costs no import. ``FOLDER/settings.json`` is the command line of a
run. One run goes to its end unbroken, ``FOLDER/whole``; then ``FOLDER/broken-N`` are killed and resumed, KILLS times
in all, each at a moment of its own; kills with odd numbers wait for a checkpoint in the making. An attempt that ends
before its kill is followed by a run that is killed earlier. Prints what it saw as JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch.utils.tensorboard  # noqa: F401

from rewardmap import cli
from rewardmap.train import run  # noqa: F401
from rewardmap.train.checkpoint import find_damage, list_checkpoints


def attempt(run_dir: Path) -> int:
    """Begins or resumes the run in a process of its own."""
    settings = json.loads((run_dir.parent / "settings.json").read_text())
    child = os.fork()
    if child == 0:
        code = 1
        try:
            log = os.open(run_dir.parent / f"{run_dir.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            begun = (run_dir / "config.toml").exists()
            cli.train(None if begun else settings, None if begun else run_dir, run_dir if begun else None, False)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def ended(child: int) -> int | None:
    """How it ended, None while it runs: 0, a positive exit code or the negative number of a signal."""
    pid, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None


def to_its_end(run_dir: Path) -> float:
    started, child = time.monotonic(), attempt(run_dir)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        raise SystemExit(f"{run_dir} ended with {code}: {run_dir.with_suffix('.log').read_text()[-3000:]}")
    return time.monotonic() - started


def being_saved(run_dir: Path) -> bool:
    return bool(list(run_dir.glob("checkpoints/.step-*")))


def kill(run_dir: Path, seconds: float, while_saving: bool) -> int:
    """Kill an attempt so many seconds after its beginning, or after it began to save. Returns how it ended."""
    child = attempt(run_dir)
    code, mark, left = None, time.monotonic(), being_saved(run_dir)
    waiting = while_saving
    while code is None and (waiting or time.monotonic() < mark + seconds):
        now = being_saved(run_dir)
        if waiting and now and not left:
            waiting, mark = False, time.monotonic()
        left = left and now  # what the kill before left behind goes first
        time.sleep(0.0005)
        code = ended(child)
    if code is None:
        os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code


def main(folder: Path, kills: int, seed: int) -> None:
    to_its_end(folder / "warm")  # compiles what is compiled once
    longest = to_its_end(folder / "whole")
    rng = random.Random(seed)
    done, number, reached, earlier, saving, moments = 0, 0, 0, 1.0, 0, []
    while done < kills:
        run_dir = folder / f"broken-{number}"
        while_saving = bool(done % 2)
        seconds = rng.uniform(0, 0.1 if while_saving else longest) * earlier
        code = kill(run_dir, seconds, while_saving)
        if code > 0 or code not in (0, -signal.SIGKILL):
            raise SystemExit(f"{run_dir} ended with {code}: {run_dir.with_suffix('.log').read_text()[-3000:]}")
        checkpoints = list_checkpoints(run_dir / "checkpoints")
        broken = [damage for damage in map(find_damage, checkpoints) if damage]
        step = int(checkpoints[-1].name.removeprefix("step-")) if checkpoints else 0
        if broken or step < reached:
            raise SystemExit(f"{run_dir}: step {step} after step {reached}, {broken}")
        reached = step
        if code:
            done, earlier = done + 1, 1.0
            saving += being_saved(run_dir)
            moments.append(["saving" if while_saving else "any", round(seconds, 3), step])
        else:
            number, reached, earlier = number + 1, 0, earlier / 2
    to_its_end(folder / f"broken-{number}")
    print(json.dumps({"longest": longest, "runs": number + 1, "kills": moments, "left_half_saved": saving}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
