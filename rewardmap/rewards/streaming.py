"""Scoring off the critical path: a queue for the rubric, and processes with a time limit for users' own
rewards."""

from __future__ import annotations

import importlib
import math
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Generic, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from rewardmap.types import Problem

Scores = TypeVar("Scores")


class ScoringQueue(Generic[Scores]):
    """Scores answers while others are still being generated: one thread, in the order of submission.

    Example:
        with ScoringQueue(lambda problems, texts: rubric.score(problems, texts, networks)) as queue:
            futures = [queue.submit(problems, texts) for problems, texts in arriving]
            batches = [future.result() for future in futures]
    """

    def __init__(self, score: Callable[[Sequence[Problem], Sequence[str]], Scores]) -> None:
        self._score = score
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rewards")

    def submit(self, problems: Sequence[Problem], responses: Sequence[str]) -> Future[Scores]:
        """Score ``responses[i]`` as answers to ``problems[i]`` soon; errors are raised by
        ``Future.result``."""
        return self._thread.submit(self._score, list(problems), list(responses))

    def __enter__(self) -> ScoringQueue[Scores]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=error is not None)


@dataclass(frozen=True, slots=True)
class SampleFailure:
    """Why a sample has no reward."""

    row: int
    uid: str
    reason: str


class RewardFunctionError(RuntimeError):
    """A user's reward function failed on some samples. ``scores`` [n] holds the others, NaN for these."""

    def __init__(self, function: str, failures: Sequence[SampleFailure], scores: NDArray[np.float64]) -> None:
        shown = "; ".join(f"row {one.row} ({one.uid!r}) {one.reason}" for one in failures[:5])
        more = f"; and {len(failures) - 5} more" if len(failures) > 5 else ""
        super().__init__(f"{function}: no reward for {len(failures)} of {len(scores)} samples: {shown}{more}")
        self.failures = tuple(failures)
        self.scores = scores


RewardFunction: TypeAlias = Callable[[Problem, str], float]
"""A user's: what a response to a problem is worth."""


def reward_function(name: str) -> RewardFunction:
    """The function that ``"module:function"`` names. Raises ValueError where it cannot be imported."""
    if name.count(":") != 1:
        raise ValueError(f"reward function {name!r}: name it as 'module:function'")
    module, _, attribute = name.partition(":")
    try:
        function: RewardFunction = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        why = f"cannot be imported ({type(error).__name__}: {error})"
        raise ValueError(f"reward function {name!r}: {why}; PYTHONPATH has to hold its folder") from error
    if not callable(function):
        raise ValueError(f"reward function {name!r}: is {type(function).__name__}, not a function")
    return function


def reward_of(function: RewardFunction, problem: Problem, response: str) -> float | str:
    """The finite number that it returns, or what went wrong."""
    try:
        value = function(problem, response)
        number = float(value) if isinstance(value, int | float | np.number) else math.nan
    except Exception as error:
        return f"raised {type(error).__name__}: {error}"
    return number if math.isfinite(number) else f"returned {value!r}, not a finite number"


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    row: int = -1
    deadline: float = math.inf


class RewardPool:
    """Runs a user's reward function, ``"module:function"``, in processes of its own.

    The function takes (Problem, response) and returns a finite number. A sample that takes longer than the
    limit ends its process, not the pool; no sample gets a reward that its function did not return.

    Example:
        with RewardPool("my_rewards:length_penalty", workers=4, time_limit_s=2.0) as pool:
            scores = pool.score(problems, responses)
    """

    def __init__(self, function: str, *, workers: int = 1, time_limit_s: float = 10.0) -> None:
        """Raises ValueError where the function cannot be imported."""
        if workers < 1 or not time_limit_s > 0:
            raise ValueError(f"workers {workers}, time_limit_s {time_limit_s}: at least 1, and above 0")
        self._function = function
        self._limit = time_limit_s
        # A server that has imported what is slow to import, and has no threads, forks the workers quickly.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])
        self._workers: list[_Worker] = []
        try:
            for _ in range(workers):
                self._workers.append(self._start())
            for worker in self._workers:
                self._await_ready(worker)
        except BaseException:
            self.close()
            raise

    def score(self, problems: Sequence[Problem], responses: Sequence[str]) -> NDArray[np.float64]:
        """[n] rewards. Raises RewardFunctionError, once all are tried, naming slow and failed samples."""
        if len(problems) != len(responses):
            raise ValueError(f"{len(problems)} problems but {len(responses)} responses: give one each")
        scores = np.full(len(problems), math.nan)
        failures: list[SampleFailure] = []
        todo = iter(range(len(problems)))
        for worker in self._workers:
            self._give(worker, next(todo, -1), problems, responses)
        while busy := {worker.pipe: worker for worker in self._workers if worker.row >= 0}:
            left = min(worker.deadline for worker in busy.values()) - time.monotonic()
            answered = wait(list(busy), max(left, 0.0))
            for pipe, worker in busy.items():
                if pipe in answered:
                    reason = self._take(worker, scores)
                elif worker.deadline <= time.monotonic():
                    reason = f"took longer than {self._limit} s"
                else:
                    continue
                row = worker.row
                if reason is not None:
                    failures.append(SampleFailure(row, problems[row].uid, reason))
                if pipe not in answered or not worker.process.is_alive():
                    worker = self._replace(worker)
                self._give(worker, next(todo, -1), problems, responses)
        if failures:
            failures.sort(key=lambda failure: failure.row)
            raise RewardFunctionError(self._function, failures, scores)
        return scores

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            _end(worker)
        self._workers.clear()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, self._function), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def _await_ready(self, worker: _Worker) -> None:
        try:
            problem = worker.pipe.recv()
        except EOFError:
            worker.process.join()
            problem = f"reward function {self._function!r}: its process ended with code {worker.process.exitcode}"
        if problem:
            raise ValueError(problem)

    def _replace(self, worker: _Worker) -> _Worker:
        _end(worker)
        fresh = self._start()
        self._workers[self._workers.index(worker)] = fresh
        self._await_ready(fresh)
        return fresh

    def _give(self, worker: _Worker, row: int, problems: Sequence[Problem], responses: Sequence[str]) -> None:
        worker.row, worker.deadline = row, math.inf
        if row >= 0:
            worker.pipe.send((problems[row], responses[row]))
            worker.deadline = time.monotonic() + self._limit

    def _take(self, worker: _Worker, scores: NDArray[np.float64]) -> str | None:
        """Store the worker's answer; the reason if there is none."""
        try:
            value = worker.pipe.recv()
        except EOFError:
            worker.process.join()
            return f"ended its process with code {worker.process.exitcode}"
        if isinstance(value, str):
            return value
        scores[worker.row] = value
        return None


def _end(worker: _Worker) -> None:
    worker.pipe.close()
    worker.process.kill()
    worker.process.join()


def _serve(pipe: Connection, name: str) -> None:
    """In the process: answer (problem, response) with a float, or with the text of what went wrong."""
    try:
        function = reward_function(name)
    except ValueError as error:
        pipe.send(str(error))
        return
    pipe.send(None)
    while True:
        try:
            problem, response = pipe.recv()
        except EOFError:
            return
        pipe.send(reward_of(function, problem, response))
