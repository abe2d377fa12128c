"""New weights to the servers, in place: paused, sent by one of three routes, caches flushed, resumed, confirmed.

``tensor``: CUDA IPC handles of a bucket, for servers on this machine's GPUs; by value where the trainer is on a CPU.
``distributed``: each bucket broadcast in a process group of trainer and servers (NCCL, gloo on a CPU).
``disk``: safetensors in a folder that the servers see too.

Under several ranks all gather each weight together, and those that have servers send it.
"""

from __future__ import annotations

import asyncio
import ipaddress
import shutil
import socket
import time
import uuid
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.distributed_c10d import Backend, _abort_process_group, _new_process_group_helper, _world

from rewardmap.config import ConfigError, ServerConfig
from rewardmap.policy import Policy
from rewardmap.rollout.engine import RolloutError
from rewardmap.rollout.process import free_port
from rewardmap.rollout.sglang_client import SGLangClient
from rewardmap.rollout.sglang_engine import Replica, SGLangEngine
from rewardmap.rollout.sglang_server import nccl_of
from rewardmap.train.ranks import ALONE, Ranks
from rewardmap.train.weights import Bucket, buckets, payloads, whole_weights

Tensor = torch.Tensor
Json = dict[str, Any]
_BEGIN = "/begin_weight_update"


class WeightSync:
    """Pushes a policy's weights to the servers of an engine."""

    merged = True
    """Whether adapters are multiplied into the weights they belong to."""

    def __init__(
        self,
        policy: Policy,
        engine: SGLangEngine,
        folder: Path,
        dtype: torch.dtype | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        """
        Args:
            engine: on a rank without servers one without replicas.
            folder: where the disk route writes; servers must see it under the same path.
            dtype: what is sent; None: the model's own.
        """
        self._policy, self._engine, self._folder, self._ranks = policy, engine, folder, ranks
        self._config = engine.config
        self._dtype = dtype or policy.model.dtype
        self._group: _Group | None = None
        # A server that hangs is given up before the ranks that wait for it are.
        alone = ranks.size == 1
        self._limit = None if alone else min(engine.config.request_timeout_s, ranks.timeout_seconds / 2)
        self.seconds = 0.0
        """Duration of the last push."""

    def push(self, version: int, replicas: Sequence[Replica] | None = None) -> None:
        """Make all servers hold the current weights as ``version``. A push that breaks off is made once more, from its
        beginning, after servers of our own that ended were started again. Every rank makes this call.

        Args:
            replicas: of this rank that need them; None: all.

        Raises:
            RolloutError: naming the server and the call that failed twice, or the deadline that passed.
            OtherRankError: a push failed on another rank.
        """
        chosen = list(self._engine.replicas if replicas is None else replicas)
        begin = time.perf_counter()
        if self._ranks.any(self._attempt(version, chosen) is not None):
            self._forget_group()
            self._ranks.patiently(lambda: self._revive(chosen))
            cause, error = self._attempt(version, chosen), None
            if cause is not None:
                ended = [replica.server for replica in chosen if replica.server is not None and replica.server.ended]
                last = "".join(f". Server {server.index} ended; {server.last_lines()}" for server in ended)
                error = RolloutError(f"weights version {version} did not reach the servers: {cause}{last}")
                error.__cause__ = cause
            self._ranks.agree(error)
        self.seconds = time.perf_counter() - begin

    def adapter(self, version: int) -> str | None:
        """What servers call ``version`` where they hold it as an adapter; None where it is merged."""
        return None

    def close(self) -> None:
        """Leave the process group, remove files. A second call does nothing."""
        self._forget_group()
        for old in self._folder.glob("weights-*"):
            shutil.rmtree(old, ignore_errors=True)

    def _attempt(self, version: int | str, replicas: Sequence[Replica]) -> Exception | None:
        """None on success. Takes every weight also after a failure, and without servers: other ranks gather it too."""
        if not replicas:
            deque(whole_weights(self._policy.model, self._dtype, self._policy.device, merged=self.merged), maxlen=0)
            self._make_room()
            return None
        limit = self._config.bucket_mb << 20
        pieces = buckets(self._policy.model, self._dtype, limit, self._policy.device, merged=self.merged)
        send = {"tensor": self._by_tensor, "distributed": self._by_group, "disk": self._by_disk}[self._config.sync]
        try:
            self._do(replicas, self._open)
            send(version, replicas, pieces)
            self._make_room()
            self._do(replicas, lambda client: self._finish(client, version))
        except Exception as error:
            deque(pieces, maxlen=0)
            self._do(replicas, self._abandon)
            return error
        return None

    def _make_room(self) -> None:
        """For the rest of what colocated servers take back: no memory is kept that the weights lay in."""
        if self._config.colocated:
            torch.cuda.empty_cache()

    async def _pause(self, client: SGLangClient) -> None:
        """Nothing runs, and memory is there."""
        await self._call(client, "/pause_generation", {"mode": "abort"})
        await client.wake(["weights"], self._limit)

    async def _open(self, client: SGLangClient) -> None:
        """Paused, and a session is open where the version has them."""
        await self._pause(client)
        if self._config.sync != "disk" and await client.has(_BEGIN, self._limit):
            await self._call(client, _BEGIN, {"selector": "all"})

    async def _finish(self, client: SGLangClient, version: int | str) -> None:
        if self._config.sync != "disk" and await client.has(_BEGIN, self._limit):
            await self._call(client, "/end_weight_update", {})
        await self._go_on(client, version)

    async def _go_on(self, client: SGLangClient, version: int | str) -> None:
        """It samples again, with nothing kept from before."""
        await client.wake(["kv_cache"], self._limit)
        # Refused (HTTP 400) while anything runs: then old keys and values would serve new weights.
        await client.flush(self._limit)
        await self._call(client, "/continue_generation", {})
        found = (await self._call(client, "/model_info", method="GET", admin=False))["weight_version"]
        if str(found) != str(version):
            raise RolloutError(f"{client.url}: holds weights {found} after a push of version {version}")

    async def _abandon(self, client: SGLangClient) -> None:
        """After a failure, best effort: a server is not left paused with a session open."""
        for path in ("/end_weight_update", "/continue_generation"):
            with suppress(RolloutError):
                await client.call(path, {}, timeout_s=5)

    def _by_tensor(self, version: int | str, replicas: Sequence[Replica], pieces: Iterator[Bucket]) -> None:
        for bucket in pieces:
            body = {
                "load_format": "flattened_bucket",
                "flush_cache": False,
                "weight_version": str(version),
            }
            self._post(replicas, "/update_weights_from_tensor", self._with_payloads(body, bucket, replicas))
            del bucket  # or it lives while the next one is filled

    def _by_group(self, version: int | str, replicas: Sequence[Replica], pieces: Iterator[Bucket]) -> None:
        if self._group is not None and self._group.members != _members(replicas):
            self._forget_group()  # a server was started again, or was not there
        if self._group is None:
            limit = min(60.0, self._limit or self._config.request_timeout_s)
            device = self._policy.device.type
            self._group = _Group(self._engine, replicas, self._config.tensor_parallel, device, limit)
        for bucket in pieces:
            body = {
                "names": [entry.name for entry in bucket.entries],
                "dtypes": [str(entry.dtype).removeprefix("torch.") for entry in bucket.entries],
                "shapes": [list(entry.shape) for entry in bucket.entries],
                "group_name": self._group.name,
                "load_format": "flattened_bucket",
                "flush_cache": False,
                "weight_version": str(version),
            }
            calls = self._engine.loop.start(_all(replicas, lambda c, b=body: self._call(c, _DISTRIBUTED, b)))  # type: ignore[misc]
            self._group.broadcast(bucket.flat, calls)
            calls.result()
            del bucket

    def _by_disk(self, version: int | str, replicas: Sequence[Replica], pieces: Iterator[Bucket]) -> None:
        folder = self._folder / f"weights-{version}-{uuid.uuid4().hex[:6]}"
        folder.mkdir(parents=True)
        self._policy.model.config.save_pretrained(folder)
        for number, bucket in enumerate(pieces):
            weights = {name: weight.cpu() for name, weight in bucket.tensors().items()}
            save_file(weights, folder / f"part-{number:05d}.safetensors")
            del bucket, weights
        body = {
            "model_path": str(folder.absolute()),
            "load_format": "auto",
            "flush_cache": False,
            "weight_version": str(version),
        }
        self._post(replicas, "/update_weights_from_disk", lambda client: body)
        for old in self._folder.glob("weights-*"):
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)

    def _with_payloads(
        self, body: Json, bucket: Bucket, replicas: Sequence[Replica]
    ) -> Callable[[SGLangClient], Json]:
        """Each server's body, with one payload for each of its GPUs, whose processes read them."""
        each = self._config.tensor_parallel
        texts = payloads(bucket, each * len(replicas))
        parts = {replica.client: texts[each * n : each * (n + 1)] for n, replica in enumerate(replicas)}
        return lambda client: body | {"serialized_named_tensors": parts[client]}

    def _post(self, replicas: Sequence[Replica], path: str, body: Callable[[SGLangClient], Json]) -> None:
        self._do(replicas, lambda client: self._call(client, path, body(client)))

    async def _call(self, client: SGLangClient, path: str, body: Json | None = None, **named: Any) -> Any:
        return await client.call(path, body, timeout_s=self._limit, **named)

    def _do(self, replicas: Sequence[Replica], call: Callable[[SGLangClient], Coroutine[Any, Any, Any]]) -> None:
        self._engine.loop.run(_all(replicas, call))

    def _revive(self, replicas: Sequence[Replica]) -> None:
        for replica in replicas:
            server = replica.server
            # One without its memory would end if it were asked to compute.
            if server is not None and (server.ended if replica.client.asleep else not server.answers()):
                self._engine.restart(replica)

    def _forget_group(self) -> None:
        if self._group is not None:
            self._group.leave()
            self._group = None


_DISTRIBUTED = "/update_weights_from_distributed"


class _Group:
    """A process group of the trainer, rank 0, and every GPU of the servers."""

    def __init__(
        self, engine: SGLangEngine, replicas: Sequence[Replica], tensor_parallel: int, device: str, limit: float
    ) -> None:
        """
        Args:
            limit: seconds that joining takes at most, or one broadcast.

        Raises:
            RolloutError: not every server joins.
        """
        self.name, self.replicas, self._engine = f"rewardmap-{uuid.uuid4().hex[:8]}", list(replicas), engine
        self.members = _members(replicas)
        self._limit = limit
        host = own_address(replicas[0].client.url)
        body = {
            "master_address": host,
            "master_port": free_port(host),
            "world_size": 1 + tensor_parallel * len(replicas),
            "group_name": self.name,
            "backend": "nccl" if device == "cuda" else "gloo",
        }

        async def join(client: SGLangClient) -> None:
            number = next(i for i, replica in enumerate(replicas) if replica.client is client)
            rank = {"rank_offset": 1 + tensor_parallel * number}
            await client.call("/init_weights_update_group", body | rank, timeout_s=limit)

        calls = engine.loop.start(_all(replicas, join))
        try:
            self._group = process_group(body, rank=0, timeout_s=limit)
        except (RuntimeError, ValueError) as error:  # ours timed out or was refused; theirs says more, if it failed
            calls.cancel() if not calls.done() else calls.result()
            urls = ", ".join(replica.client.url for replica in replicas)
            raise RolloutError(f"weight sync: no process group with {urls}: {error}") from None
        try:
            calls.result()
        except BaseException:  # over NCCL ours is there before theirs are
            self.leave()
            raise

    def broadcast(self, flat: Tensor, calls: Future[None]) -> None:
        """To all servers. Gives up when one of their calls fails; one that succeeds says nothing, because over NCCL a
        server answers once the transfer is queued."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        deadline = time.monotonic() + self._limit
        try:
            work = self._group.broadcast([flat], options)
            while not work.is_completed():
                if calls.done():
                    calls.result()
                if time.monotonic() > deadline:
                    raise RolloutError(f"weight sync: a broadcast is not complete within {self._limit:g} s")
                time.sleep(0.0005)
            work.wait()
        except RuntimeError as error:
            if isinstance(error, RolloutError):
                raise
            hint = ""
            if "NCCL" in str(error) and torch.cuda.is_available():  # of servers that others run, see check_nccl
                ours = ".".join(map(str, torch.cuda.nccl.version()))
                hint = f"; servers must have the trainer's NCCL, {ours}, or take rollout.server.sync='tensor' or 'disk'"
            raise RolloutError(f"weight sync: the broadcast broke off ({error}){hint}") from None

    def leave(self) -> None:
        """Best effort: servers that are gone have left already."""

        async def part(client: SGLangClient) -> None:
            with suppress(RolloutError):
                await client.call("/destroy_weights_update_group", {"group_name": self.name}, timeout_s=5)

        # At once: on one machine NCCL's sides wait for each other.
        calls = self._engine.loop.start(_all(self.replicas, part))
        if dist.get_backend(self._group) == "nccl":
            _abort_process_group(self._group)  # its destruction would wait for a broadcast that a server left
        else:
            dist.destroy_process_group(self._group)
        calls.result()


def _members(replicas: Sequence[Replica]) -> list[tuple[SGLangClient, int]]:
    """Whom a process group is of: a server that was started again is another one."""
    return [(replica.client, replica.restarts) for replica in replicas]


def process_group(body: Json, rank: int, timeout_s: float) -> Any:
    """The group that SGLang's servers make for themselves, beside whatever groups this process has.

    torch offers no public way to a second world; its own helper gives both sides the same keys in the store.
    """
    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore(
        body["master_address"], body["master_port"], body["world_size"], rank == 0, timeout, wait_for_workers=False
    )
    prefixed = dist.PrefixStore(body["group_name"], store)
    if body["backend"] == "nccl":
        timeout *= 2  # at its own one NCCL's watchdog ends the process; ours must come first
    group, _ = _new_process_group_helper(
        body["world_size"], rank, [], Backend(body["backend"]), prefixed, group_name=body["group_name"], timeout=timeout
    )
    _world.pg_group_ranks[group] = {number: number for number in range(body["world_size"])}  # for its destruction
    return group


def own_address(url: str) -> str:
    """The address by which the server at ``url`` reaches this machine."""
    host = urlsplit(url).hostname or "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing
        address: str = probe.getsockname()[0]
        return address


def check_here(urls: Sequence[str]) -> None:
    """Raises ConfigError for a server on another machine, which cannot open a handle to this one's GPU memory."""
    for url in urls:
        address = socket.gethostbyname(urlsplit(url).hostname or "127.0.0.1")
        if not ipaddress.ip_address(address).is_loopback and own_address(url) != address:
            raise ConfigError(
                f"rollout.server.sync='tensor' hands over memory of this machine's GPUs, and {url} is on another; "
                "set rollout.server.sync to 'distributed' or 'disk'"
            )


def check_nccl(config: ServerConfig) -> None:
    """Raises ConfigError where servers would run with another NCCL than the trainer: the two do not join, and may wait
    for each other for ever."""
    ours, theirs = ".".join(map(str, torch.cuda.nccl.version())), nccl_of(config)
    if theirs != ours:
        raise ConfigError(
            f"rollout.server.sync='distributed' needs one NCCL on both sides: the trainer has {ours}, "
            f"rollout.server.python='{config.python}' has {theirs}; choose versions of torch and SGLang that bring the "
            "same, or sync='tensor' or 'disk'"
        )


async def _all(replicas: Sequence[Replica], call: Callable[[SGLangClient], Coroutine[Any, Any, Any]]) -> None:
    """One call at every server, at once; the first failure after all have ended."""
    results = await asyncio.gather(*(call(replica.client) for replica in replicas), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
