"""Work in a thread that nothing waits for at the end of the process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from threading import Thread
from typing import TypeVar

import torch

T = TypeVar("T")


def current_device() -> Callable[[], None]:
    """To be called in a new thread, whose GPU would else be the first, whatever this rank's is."""
    if not torch.cuda.is_initialized():
        return lambda: None
    return partial(torch.cuda.set_device, torch.cuda.current_device())


def in_background(work: Callable[[], T], name: str) -> Future[T]:
    """Begin ``work()`` in a daemon thread: a run that stops at once does not wait for what nobody will use."""
    future: Future[T] = Future()
    take_device = current_device()

    def run() -> None:
        try:
            take_device()
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, name=name, daemon=True).start()
    return future
