"""How a command ends: one line on stderr and an exit code, for mistakes, failures and signals.

A user's mistake has exit code 2, a failure 1, SIGINT (Ctrl-C) 130, SIGTERM 143, SIGUSR1 138.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import typer

USER_ERROR, FAILURE, INTERRUPTED = 2, 1, 130
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""SIGUSR1 is what Slurm is told to send some minutes before the end of a job."""


@contextmanager
def errors(debug: bool, user_errors: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turns what a command raises, and signals, into one line and an exit code."""
    code = INTERRUPTED

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        nonlocal code
        code = 128 + number
        os.write(2, f"{signal.Signals(number).name}: leaving\n".encode())
        raise KeyboardInterrupt

    # A rank that waits for others in a collective could not leave by an exception: signals end it as they are.
    caught = SIGNALS if _alone() and threading.current_thread() is threading.main_thread() else ()
    with on_signals(caught, leave):
        try:
            yield
        except (typer.Exit, typer.BadParameter):
            raise
        except KeyboardInterrupt as stop:
            # A run that a signal stopped brings that signal's own code.
            code = getattr(stop, "exit_code", code)
            _fail(code, f"interrupted; {stop}" if str(stop) else "interrupted")
        except Exception as error:
            if debug:
                raise
            from rewardmap.config import ConfigError
            from rewardmap.rollout.engine import RolloutError
            from rewardmap.types import DataError

            if isinstance(error, (ConfigError, DataError, *user_errors)):
                _fail(USER_ERROR, f"error: {error}")
            if isinstance(error, RolloutError):
                _fail(FAILURE, f"error: {error}")
            _fail(FAILURE, f"error: {explain(error)}")


@contextmanager
def on_signals(numbers: Sequence[signal.Signals], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """``handler`` takes these signals inside, and what took them before takes them again behind."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _alone() -> bool:
    """Whether this process is not one of several ranks."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1


def explain(error: BaseException) -> str:
    """One line about a failure, with the remedy where the disk or the GPU's memory is the cause."""
    if _disk_is_full(error):
        place = f": {error.filename}" if isinstance(error, OSError) and error.filename else ""
        return (
            f"no space left on device{place}; free some and run the command again, or write to another folder (a "
            "run goes on with --resume, or begins elsewhere with --run-dir)"
        )
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which need not be imported for it
        return (
            f"{error}; lower train.max_tokens_per_micro_batch, or rollout.batch_sequences where the local engine "
            "samples; docs/scaling.md, 'Out of memory', has more"
        )
    return f"{type(error).__name__}: {error} (--debug shows where)"


def _disk_is_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # Writers in other languages report the same as text.
    return "No space left on device" in str(error) or "StorageFull" in str(error)


def _fail(code: int, line: str) -> NoReturn:
    sys.stdout.flush()
    if not _alone():
        line = f"rank {os.environ.get('RANK')}: {line}"
    typer.echo(" ".join(line.split()), err=True)
    raise typer.Exit(code)
