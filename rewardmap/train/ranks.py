"""The processes of one job: who this one is, and the few things ranks tell each other. Rank 0 of 1 without torchrun.

Every rank holds the same curriculum, the same answers and the same advantages; they differ in the answers they
sample and in the micro-batches they train on. Messages are JSON in tensors: no pickle crosses the network.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from rewardmap.rollout.engine import OnGroup, RolloutEngine, RolloutError
from rewardmap.train.background import in_background
from rewardmap.types import Problem, Rollout, RolloutGroup, SamplingParams

T = TypeVar("T")
_BEAT_S = 1.0


class OtherRankError(RuntimeError):
    """Another rank could not do what all wait for; it says why itself."""


class LostRankError(RuntimeError):
    """Another rank does not answer any more."""


@dataclass(frozen=True)
class Ranks:
    """This process's place in the job.

    Example:
        with join_ranks(timeout_seconds=600) as ranks:
            totals = ranks.sum({"loss": 0.25})
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    timeout_seconds: float = 600.0
    group: Any = None
    """The process group that messages travel in; None: that of the job."""

    def apart(self) -> Ranks:
        """The same ranks, whose messages never meet those sent from other threads. Every rank makes this call."""
        if self.size == 1:
            return self
        # Without a timeout of its own it would wait for half an hour, whatever the job's is.
        timeout = timedelta(seconds=self.timeout_seconds)
        return replace(self, group=dist.new_group(backend="gloo", timeout=timeout))

    @property
    def is_first(self) -> bool:
        """The rank that writes files and talks."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's run of consecutive items; sizes differ by one at most."""
        count = len(items)
        return items[self.rank * count // self.size : (self.rank + 1) * count // self.size]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON value, in rank order, on every rank. Floats arrive bit for bit."""
        if self.size == 1:
            return [value]
        return [json.loads(text) for text in self.gather_bytes(json.dumps(value).encode())]

    def gather_bytes(self, value: bytes) -> list[bytes]:
        """Every rank's bytes, in rank order, on every rank."""
        message = torch.frombuffer(bytearray(value), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(message)]), group=self.group)
        longest = int(max(lengths))
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(message)] = message
        everyone = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(everyone, padded, group=self.group)
        return [bytes(text[: int(length)].numpy()) for text, length in zip(everyone, lengths, strict=True)]

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums over ranks by key, in float64; every rank passes the same keys in the same order."""
        if self.size == 1:
            return dict(values)
        total = torch.tensor(list(values.values()), dtype=torch.float64)
        dist.all_reduce(total, group=self.group)
        return dict(zip(values, total.tolist(), strict=True))

    def any(self, flag: bool) -> bool:
        """True on every rank when it is on one."""
        return bool(self.sum({"flag": float(flag)})["flag"])

    def most(self, number: int) -> int:
        """The largest over ranks."""
        return int(max(self.gather(number)))

    def wait(self) -> None:
        """Until every rank is here."""
        self.any(False)

    def agree(self, error: BaseException | None) -> None:
        """Every rank goes on, or none does.

        Raises:
            ``error`` where there is one, else OtherRankError when there is one elsewhere.
        """
        said = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, text in enumerate(said):
            if text is not None:
                raise OtherRankError(f"stopped with rank {rank}: {text}")

    def first(self, work: Callable[[], T]) -> T:
        """``work()`` on rank 0 while the others wait, ``patiently``; its JSON value on every rank.

        Raises:
            What ``work`` raises on rank 0, OtherRankError elsewhere.
        """
        value = self.patiently(lambda: work() if self.is_first else None)
        return self.gather(value)[0]  # type: ignore[no-any-return]

    def patiently(self, work: Callable[[], T], at_each_beat: Callable[[], None] = lambda: None) -> T:
        """``work()`` on every rank, however much longer it takes on one than a collective waits: in a thread, while the
        ranks hear of each other. The first error ends it for all.

        Args:
            at_each_beat: called by all ranks together, about once a second; here collectives are in order.

        Raises:
            What ``work`` raises here, OtherRankError when it raises elsewhere.
        """
        if self.size == 1:
            return work()
        task = in_background(work, "patient work")
        while True:
            wait([task], _BEAT_S)
            ended = task.done()
            self.agree(task.exception() if ended else None)
            at_each_beat()
            if all(self.gather(ended)):
                return task.result()


ALONE = Ranks()


def restarted() -> bool:
    """Whether torchrun started the job anew after a rank died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def launched() -> bool:
    """Whether a launcher such as torchrun started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextmanager
def join_ranks(timeout_seconds: float, alone: bool = False) -> Iterator[Ranks]:
    """Meet the other processes of the job; leave them when the block ends.

    Without a launcher there is nobody to meet; ``alone`` then makes a process group of this process only, which
    sharding needs for mixed precision and offload, without opening a port. CPU tensors travel by gloo, CUDA tensors by
    NCCL; a collective that waits longer than ``timeout_seconds`` raises.

    Raises:
        LostRankError: in the block, another rank hangs or is gone.
    """
    cuda = torch.cuda.is_available()
    backend, timeout = "cpu:gloo,cuda:nccl" if cuda else "gloo", timedelta(seconds=timeout_seconds)
    if launched():
        ranks = Ranks(
            int(os.environ["RANK"]),
            int(os.environ["WORLD_SIZE"]),
            int(os.environ.get("LOCAL_RANK", 0)),
            timeout_seconds,
        )
        if cuda:
            torch.cuda.set_device(ranks.local_rank)
        store, *_ = next(dist.rendezvous("env://", timeout=timeout))
        # torchrun keeps one store over its restarts: what the ranks before wrote there must not be read again.
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.size, timeout=timeout)
    elif alone:
        ranks = Ranks()
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        yield Ranks()
        return
    try:
        yield ranks
    except RuntimeError as error:
        ours = isinstance(error, (RolloutError, OtherRankError))
        if not ours and ("imed out" in str(error) or "closed by peer" in str(error)):  # as gloo and the store say it
            raise LostRankError(
                f"another rank hangs or is gone (parallel.timeout_seconds={timeout_seconds:g}); its own lines say why; "
                "resume when it can run again"
            ) from error
        raise
    finally:
        dist.destroy_process_group()


class SharedRollouts:
    """A ``RolloutEngine`` over ranks: each rank samples its share of the problems with an engine of its own, then
    all ranks hold all groups.

    ``whole_weights``: an engine that calls the trainer's own model does so inside this context, which every rank
    enters, also with nothing to sample.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        ranks: Ranks,
        whole_weights: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._engine, self._whole_weights = engine, whole_weights
        self._ranks = ranks.apart()  # answers may be gathered while the trainer's collectives run

    def generate(
        self,
        problems: Sequence[Problem],
        group_size: int,
        sampling: SamplingParams,
        on_group: OnGroup | None = None,
    ) -> list[RolloutGroup]:
        """As the engine's; every rank passes the same problems and gets the same groups, in the problems' order.
        ``on_group`` sees them after the last was gathered."""
        seed = sampling.seed  # rank 0's, so that one rank samples as the engine alone does
        if not self._ranks.is_first:
            seed = int(np.random.SeedSequence([seed, self._ranks.rank]).generate_state(1)[0])
        mine = self._ranks.share(problems)
        with self._whole_weights():
            groups = self._engine.generate(mine, group_size, replace(sampling, seed=seed)) if mine else []
        return gather_groups(self._ranks, problems, groups, on_group)

    def metrics(self) -> dict[str, float]:
        """The engine's of this rank."""
        return self._engine.metrics()

    def update_weights(self, version: int) -> None:
        self._engine.update_weights(version)

    def close(self) -> None:
        self._engine.close()


def gather_groups(
    ranks: Ranks, problems: Sequence[Problem], mine: Sequence[RolloutGroup], on_group: OnGroup | None
) -> list[RolloutGroup]:
    """The groups of all ``problems`` on every rank, of those that each rank has, which follow each other in rank order.
    ``on_group`` sees each."""
    shares = [groups_from_bytes(share) for share in ranks.gather_bytes(groups_to_bytes(mine))]
    everyone = [group for share in shares for group in share]
    result = [RolloutGroup(problem, *group) for problem, group in zip(problems, everyone, strict=True)]
    if on_group is not None:
        for index, group in enumerate(result):
            on_group(index, group)
    return result


def groups_to_bytes(groups: Sequence[RolloutGroup]) -> bytes:
    """Without their problems. Numbers as they lie in memory: as text, those of a large step take seconds to read."""
    told: list[Any] = []
    tokens, nats = array("q"), array("d")
    for group in groups:
        tokens.extend(group.prompt_token_ids)
        said: list[Any] = []
        for rollout in group.rollouts:
            ids, logprobs = rollout.token_ids, rollout.rollout_logprobs
            tokens.extend(ids)
            nats.extend(logprobs)
            said.append([len(ids), len(logprobs), rollout.text, rollout.finish_reason, rollout.policy_version])
        told.append([len(group.prompt_token_ids), said])
    head = json.dumps(told).encode()
    return b"".join((array("q", (len(head), len(tokens), len(nats))).tobytes(), head, tokens.tobytes(), nats.tobytes()))


def groups_from_bytes(data: bytes) -> list[tuple[tuple[int, ...], tuple[Rollout, ...]]]:
    """Prompt and answers of each group, floats bit for bit."""
    head, tokens, nats = np.frombuffer(data, np.int64, 3).tolist()
    start = 24 + head
    told: list[Any] = json.loads(data[24:start])
    ids = iter(np.frombuffer(data, np.int64, tokens, start).tolist())
    logprobs = iter(np.frombuffer(data, np.float64, nats, start + 8 * tokens).tolist())
    return [
        (
            tuple(islice(ids, prompt)),
            tuple(
                Rollout(tuple(islice(ids, size)), tuple(islice(logprobs, values)), text, reason, version)
                for size, values, text, reason, version in rollouts
            ),
        )
        for prompt, rollouts in told
    ]


def group_to_json(group: RolloutGroup) -> list[Any]:
    """Without its problem."""
    rollouts = [
        [rollout.token_ids, rollout.rollout_logprobs, rollout.text, rollout.finish_reason, rollout.policy_version]
        for rollout in group.rollouts
    ]
    return [group.prompt_token_ids, rollouts]


def group_from_json(problem: Problem, group: list[Any]) -> RolloutGroup:
    """Back from ``group_to_json``, floats bit for bit."""
    prompt, rollouts = group
    return RolloutGroup(
        problem,
        tuple(prompt),
        tuple(Rollout(tuple(ids), tuple(nats), text, reason, version) for ids, nats, text, reason, version in rollouts),
    )
