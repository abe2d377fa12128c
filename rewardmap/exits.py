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
AGAIN = "run the command again, or write to another folder"
"""What to do when there is room on the disk."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""SIGUSR1 is what Slurm is told to send some minutes before the end of a job."""


@contextmanager
def errors(debug: bool, user_errors: tuple[type[Exception], ...] = (), again: str = AGAIN) -> Iterator[None]:
    """Turns what a command raises, and signals, into one line and an exit code.

    Args:
        user_errors: mistakes too, besides wrong configurations and data.
        again: what to do when there is room on a full disk.
    """
    code = INTERRUPTED

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        nonlocal code
        code = 128 + number
        _say_leaving(number)
        raise KeyboardInterrupt

    with _signals_leave(leave):
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
            _fail(FAILURE, f"error: {explain(error, again)}")


@contextmanager
def _signals_leave(leave: Callable[[int, FrameType | None], NoReturn]) -> Iterator[None]:
    """Signals ``leave`` a process alone, and end one of several ranks at once: in a collective no exception reaches it.
    Nothing changes in another thread than the main one, which alone may take signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
    elif _alone():
        with on_signals(SIGNALS, leave):
            yield
    else:
        with _ended_by_signals():
            yield


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """A signal that nothing takes inside ends the process with its own exit code, whatever the main thread is at."""

    def nothing(number: int, frame: FrameType | None) -> None:
        """Python writes to the pipe only where there is a handler."""

    def watch() -> None:
        while number := os.read(told, 1):
            if signal.getsignal(number[0]) is nothing:
                _say_leaving(number[0])
                os._exit(128 + number[0])
        os.close(told)

    told, tell = os.pipe()
    os.set_blocking(tell, False)
    before = signal.set_wakeup_fd(tell)
    threading.Thread(target=watch, name="signals", daemon=True).start()
    try:
        with on_signals(SIGNALS, nothing):
            yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(tell)


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


def _say_leaving(number: int) -> None:
    os.write(2, f"{_who()}{signal.Signals(number).name}: leaving\n".encode())


def _who() -> str:
    """What a rank's lines begin with."""
    return "" if _alone() else f"rank {os.environ.get('RANK')}: "


def explain(error: BaseException, again: str = AGAIN) -> str:
    """One line about a failure, with the remedy where the disk or the GPU's memory is the cause."""
    if _disk_is_full(error):
        place = f": {error.filename}" if isinstance(error, OSError) and error.filename else ""
        return f"no space left on device{place}; free some, then {again}"
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
    typer.echo(_who() + " ".join(line.split()), err=True)
    raise typer.Exit(code)
