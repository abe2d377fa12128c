"""What a run does when something goes wrong: refused updates, requests to stop, ranks that die.

The table of faults, with what is lost in each, is in ``docs/scaling.md``.
"""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rewardmap.config import GuardConfig
from rewardmap.exits import SIGNALS, on_signals
from rewardmap.files import write_text
from rewardmap.types import Problem, RolloutGroup


class RefusedUpdatesError(RuntimeError):
    """One update after the other was refused: training on would not help."""


class Stopped(KeyboardInterrupt):
    """A signal asked the run to save and stop. A request, not an error: ``except Exception`` lets it by."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number
        """What a shell reports for a process that the signal ended: 130 for SIGINT, 143 for SIGTERM."""


@contextmanager
def interrupts_say(text: str) -> Iterator[None]:
    """An interrupt that has no message leaves with this one."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if not str(stop):
            stop.args = (text,)
        raise


@dataclass
class Guard:
    """Decides whether an update may touch the weights, from numbers that all ranks share."""

    config: GuardConfig
    streak: int = 0
    """Updates refused in a row."""
    refused: int = 0
    """Updates refused in all."""

    def check(self, loss: float, grad_norm: float, kl: float) -> str | None:
        """Why the update is refused, or None. ``kl`` in nats per token."""
        reason = self._reason(loss, grad_norm, kl)
        self.streak = 0 if reason is None else self.streak + 1
        self.refused += reason is not None
        return reason

    @property
    def ends(self) -> bool:
        """Whether ``guard.max_streak`` updates in a row were refused."""
        return self.streak >= self.config.max_streak

    def stop_after_streak(self, step: int, reason: str) -> None:
        """Raises RefusedUpdatesError when the refused update is the last of ``guard.max_streak`` in a row."""
        if self.ends:
            raise RefusedUpdatesError(
                f"step {step}: {reason}; {self.streak} updates in a row were refused (guard.max_streak), the weights "
                "are those of before; see the batches in the run's faults folder, lower train.learning_rate and resume"
            )

    def _reason(self, loss: float, grad_norm: float, kl: float) -> str | None:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"the gradient norm is {grad_norm}"
        if self.config.max_grad_norm and grad_norm > self.config.max_grad_norm:
            return f"the gradient norm is {grad_norm:.4g}, over guard.max_grad_norm={self.config.max_grad_norm:g}"
        if self.config.max_kl and not kl <= self.config.max_kl:
            return f"the KL divergence is {kl:.4g} nats per token, over guard.max_kl={self.config.max_kl:g}"
        return None


def dump_batch(
    folder: Path, step: int, problems: Sequence[Problem], groups: Sequence[RolloutGroup], numbers: dict[str, Any]
) -> Path:
    """Write what a refused step trained on as ``folder/step-NNNNNN.json``: the problems, every answer's tokens and
    log-probabilities, and ``numbers``."""
    path = folder / f"step-{step:06d}.json"
    answers = [
        [{"token_ids": r.token_ids, "rollout_logprobs": r.rollout_logprobs, "text": r.text} for r in group.rollouts]
        for group in groups
    ]
    # NaN and Infinity are what this file is about: Python's own spelling of them stays.
    write_text(path, json.dumps({"problems": [p.uid for p in problems], "answers": answers, **numbers}) + "\n")
    return path


@dataclass
class StopRequest:
    """Which signal asked for a stop; 0 for none."""

    number: int = 0


@contextmanager
def stop_request(then: str, say: Callable[[str], object]) -> Iterator[StopRequest]:
    """A signal asks for a stop, which is said at once together with what happens ``then``; a second one raises."""
    stop = StopRequest()

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.number:
            raise Stopped("", number)
        stop.number = number
        with suppress(RuntimeError):  # what it writes to may be in the middle of writing
            say(f"{signal.Signals(number).name}: {then}; a second signal stops at once")

    with on_signals(SIGNALS, ask):
        yield stop
