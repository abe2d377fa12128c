"""The rollout engine on SGLang servers: one request for each group, spread over replicas, every reply checked."""

from __future__ import annotations

import asyncio
import base64
import io
import zlib
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np
from PIL import Image

from rewardmap.config import ServerConfig
from rewardmap.policy import Policy
from rewardmap.rollout.engine import OnGroup, RolloutError
from rewardmap.rollout.sglang_adapters import Adapters
from rewardmap.rollout.sglang_check import Server, check_length, check_server
from rewardmap.rollout.sglang_client import EventLoop, SGLangClient, UnreachableError
from rewardmap.rollout.sglang_reply import generate_body, read_group, read_scores, score_body
from rewardmap.rollout.sglang_server import Keys, SGLangServer, stop_all
from rewardmap.types import Problem, RolloutGroup, SamplingParams
from rewardmap.vision import Bounded, read_image

PICTURE_BYTES = 1 << 30
"""Encoded pictures kept at most."""
PICTURE_THREADS = 4
"""Encode pictures that are not kept."""
MEMORY = ("weights", "kv_cache")
"""What colocated servers give up while the trainer works."""
CUTS = 3
"""Times that a group is asked for again because a server cut its answers off unasked."""
RESTARTS = 3
"""Times that one server is started again until it has answered all that it was asked; then a run gives up."""


@dataclass
class Replica:
    """A server and how to talk to it. ``server`` is None for one that somebody else runs."""

    client: SGLangClient
    server: SGLangServer | None = None
    restarts: int = 0
    streak: int = 0
    """Restarts since all that it was asked was answered."""
    brought_up: int = 0
    """Restarts after which it has the current weights."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class SGLangEngine:
    """``RolloutEngine`` on servers. Someone must push weights: ``rewardmap.train.weight_sync`` does."""

    def __init__(
        self,
        policy: Policy,
        config: ServerConfig,
        servers: Sequence[SGLangServer],
        keys: Keys,
        router_url: str | None = None,
        adapters: Adapters | None = None,
    ) -> None:
        """
        Args:
            servers: our own, ready to answer; none where ``config.urls`` names others.
            router_url: where to send requests instead of to the servers themselves.
            adapters: that servers must be able to apply.
        """
        self.policy, self.config, self.loop = policy, config, EventLoop()
        own = [Replica(SGLangClient(server.url, keys, config.request_timeout_s), server) for server in servers]
        given = [Replica(SGLangClient(url, keys, config.request_timeout_s)) for url in config.urls]
        self.replicas = own or given
        self.version: int | None = None
        """Of the weights that the servers hold; None: as they started."""
        self.adapter: str | None = None
        """Name of the adapter that requests ask for; None: for the weights alone."""
        self.on_restart: Callable[[Replica], None] | None = None
        """Brings a server that was started again up to the current weights."""
        self._router = SGLangClient(router_url, keys, config.request_timeout_s) if router_url else None
        self._adapters = adapters
        self._limit, self._seeded, self._aborted = 0, False, False
        self._pictures: Bounded[str] = Bounded(PICTURE_BYTES, len)
        self._lock = Lock()
        self._threads = ThreadPoolExecutor(PICTURE_THREADS, "pictures")
        self._encoding: dict[str | bytes, asyncio.Future[str]] = {}

    def check(self, problems: Sequence[Problem] = (), max_new_tokens: int = 0) -> None:
        """Ask every server whether it fits, also the longest of ``problems``.

        Raises:
            ConfigError, RolloutError: see ``check_server`` and ``check_length``.
        """

        async def ask() -> list[Server]:
            return [await check_server(replica.client, self.policy, self._adapters) for replica in self.replicas]

        found = self.loop.run(ask())
        self._limit, self._seeded = min(server.limit for server in found), any(server.seeded for server in found)
        for problem in problems:
            if self.policy.bound(problem) + max_new_tokens > self._limit:  # else no map need be decoded to tell
                check_length(len(self.policy.encode(problem).token_ids), max_new_tokens, self._limit, problem.uid)

    def generate(
        self,
        problems: Sequence[Problem],
        group_size: int,
        sampling: SamplingParams,
        on_group: OnGroup | None = None,
    ) -> list[RolloutGroup]:
        """See ``RolloutEngine.generate``. ``sampling.seed`` acts at deterministic servers; others draw from their
        own generators.

        Raises:
            ConfigError: a prompt that does not fit into the servers' context.
            DataError: a picture that cannot be read.
            RolloutError: a server that cannot be reached or restarted, a reply that does not fit, a missed deadline.
        """
        self._aborted = False
        if not self._limit:
            self.check()
        prompts = [self.policy.encode(problem).token_ids for problem in problems]
        for problem, prompt in zip(problems, prompts, strict=True):
            check_length(len(prompt), sampling.max_new_tokens, self._limit, problem.uid)
        homes = assign([problem.image for problem in problems], len(self.replicas))
        groups = self.loop.run(self._generate(problems, prompts, homes, group_size, sampling, on_group))
        for replica in self.replicas:
            replica.streak = 0
        return groups

    def abort(self) -> None:
        """End a ``generate`` that another thread waits for: it returns with what was sampled so far, unfinished answers
        marked ``abort``, possibly without tokens."""

        self._aborted = True

        async def stop(client: SGLangClient) -> None:
            # Pausing in this mode aborts again and again until nothing runs; one abort_request would miss what
            # is being prepared.
            await client.call("/pause_generation", {"mode": "abort"})
            await client.call("/continue_generation", {})

        self._at_all(stop)

    def logprobs(self, problem: Problem, response: Sequence[int]) -> list[list[float]]:
        """Each server's log-probabilities [R] of a given answer at temperature 1; see ``read_scores``. A server of our
        own that ended is started again.

        Raises:
            RolloutError: see ``generate``.
        """
        prompt = self.policy.encode(problem).token_ids
        image_token = self.policy.model.config.image_token_id
        vocabulary = self.policy.model.config.get_text_config().vocab_size
        body = score_body(prompt, response, image_token, self.picture(problem.image), self.adapter)

        async def ask() -> list[list[float]]:
            replies = await asyncio.gather(*(self._ask_at(replica, body, problem.uid) for replica in self.replicas))
            return [read_scores(reply, prompt, response, vocabulary, problem.uid) for reply in replies]

        return self.loop.run(ask())

    def control(self, path: str, body: object) -> None:
        """One call of the control plane at every server. Raises RolloutError."""
        self._at_all(lambda client: client.call(path, body))

    def sleep(self) -> None:
        """Servers give up their GPU memory. Raises RolloutError."""
        self._at_all(lambda client: client.sleep(MEMORY))

    def wake(self) -> None:
        """Servers take back what they gave up. Raises RolloutError."""
        self._at_all(lambda client: client.wake(MEMORY))

    def _at_all(self, call: Callable[[SGLangClient], Coroutine[Any, Any, Any]]) -> None:
        async def call_all() -> None:
            await asyncio.gather(*(call(replica.client) for replica in self.replicas))

        self.loop.run(call_all())

    def update_weights(self, version: int, adapter: str | None = None) -> None:
        """Expect ``version`` in replies from now on; whoever calls has pushed it.

        Args:
            adapter: what the servers call it, where it is an adapter.
        """
        self.version, self.adapter = version, adapter

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        """End what another thread still waits for, servers of our own and connections to all. A second call does
        nothing."""

        async def disconnect() -> None:
            for client in (*(replica.client for replica in self.replicas), self._router):
                if client is not None:
                    await client.close()

        # First, or requests would be made again, and a server that is being stopped started for them.
        self.loop.close(disconnect)
        self._threads.shutdown(wait=False, cancel_futures=True)
        stop_all([replica.server for replica in self.replicas if replica.server is not None])
        self.replicas = []

    async def _generate(
        self,
        problems: Sequence[Problem],
        prompts: Sequence[tuple[int, ...]],
        homes: Sequence[int],
        group_size: int,
        sampling: SamplingParams,
        on_group: OnGroup | None,
    ) -> list[RolloutGroup]:
        slots = [asyncio.Semaphore(self.config.concurrency) for _ in self.replicas]
        image_token = self.policy.model.config.image_token_id
        stop, banned = self.policy.stop_token_ids, self.policy.banned_token_ids

        async def one(index: int) -> RolloutGroup:
            problem, prompt = problems[index], prompts[index]

            async def body() -> bytes:
                picture = await self._picture(problem.image)
                seeds = _seeds(sampling.seed, index, problem.uid, group_size) if self._seeded else None
                return generate_body(
                    prompt, image_token, picture, group_size, sampling, stop, banned, self.adapter, seeds
                )

            for _ in range(1 + CUTS):
                reply = await self._ask(homes[index], slots, body, problem.uid)
                group = read_group(
                    reply, problem, prompt, group_size, self.version, stop, banned, self.policy.decode, self.adapter
                )
                if self._aborted or all(rollout.finish_reason != "abort" for rollout in group.rollouts):
                    break
            else:  # a part of an answer must not be taken for one
                raise RolloutError(
                    f"{problem.uid}: the server cut off its answers {1 + CUTS} times, which nobody here asked for; "
                    "does another program pause its generation, abort its requests or change its weights?"
                )
            if on_group is not None:
                on_group(index, group)
            return group

        try:
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(one(index)) for index in range(len(problems))]
        except BaseExceptionGroup as several:
            raise several.exceptions[0] from None
        return [task.result() for task in running]

    async def _ask(
        self, home: int, slots: Sequence[asyncio.Semaphore], body: Callable[[], Coroutine[Any, Any, bytes]], uid: str
    ) -> object:
        """The reply of a problem's home, of a restarted home, or of another replica; each takes so many at a time."""
        if self._router is not None:
            async with slots[home]:
                return await self._router.generate(await body(), uid)
        failure = UnreachableError("")
        for step in range(len(self.replicas)):
            number = (home + step) % len(self.replicas)
            async with slots[number]:  # made inside: bodies with pictures are large, and all groups wait here
                try:
                    return await self._ask_at(self.replicas[number], await body(), uid)
                except UnreachableError as error:
                    failure = error
        raise failure

    async def _ask_at(self, replica: Replica, body: object, uid: str) -> object:
        """The reply of one replica, started again where it ended. Raises UnreachableError, RolloutError."""
        failure = ""
        for _ in range(1 + RESTARTS):
            before = replica.brought_up
            try:
                return await replica.client.generate(body, uid)
            except UnreachableError as error:
                said = f". The server ended; {replica.server.last_lines()}" if replica.server else ""
                failure = f"{error}{said}"
            if not await self._restarted(replica, before):
                break
        raise UnreachableError(failure)

    async def _restarted(self, replica: Replica, before: int) -> bool:
        """Start a server of our own again if it is gone. False: not ours, or nobody can bring it up to date.

        Args:
            before: ``replica.brought_up`` when it was asked in vain.
        """
        async with replica.lock:
            server = replica.server
            if server is None or self._router is not None:  # which would go on asking where the server was
                return False
            if replica.brought_up > before:  # for another group: to ask it for its health takes a second for each
                return True
            if await asyncio.to_thread(server.answers):
                return True  # only the connection broke
            if self.on_restart is None:
                return False
            replica.client.starting = True
            try:
                await asyncio.to_thread(self.restart, replica)
                await asyncio.to_thread(self.on_restart, replica)
                replica.brought_up += 1
            finally:
                replica.client.starting = False
            return True

    def restart(self, replica: Replica) -> None:
        """Start a replica's server again; it then lacks the current weights. Not from the event loop's thread.

        Raises:
            RolloutError: it does not get ready, or ended too often.
        """
        assert replica.server is not None, "not ours to restart"
        if replica.streak == RESTARTS:
            raise RolloutError(
                f"SGLang server {replica.server.index} ended again after {RESTARTS} restarts; "
                f"{replica.server.last_lines()}"
            )
        replica.restarts, replica.streak = replica.restarts + 1, replica.streak + 1
        replica.server.start()
        replica.server.wait_ready()
        replica.client.url = replica.server.url
        replica.client.asleep.clear()

    def picture(self, source: str | bytes) -> str:
        """A picture as our processor resizes it, as a data URI.

        The server's own resizing then does nothing, so its pixels are ours; two libraries resize a little differently.
        """
        grid, digest = self.policy.image_info(source)
        with self._lock:
            uri = self._pictures.get(digest)
        if uri is None:
            patch = self.policy.model.config.vision_config.patch_size
            size = (grid[2] * patch, grid[1] * patch)
            picture = read_image(source)
            if picture.size != size:
                picture = picture.resize(size, Image.Resampling.BICUBIC)
            file = io.BytesIO()
            picture.save(file, "PNG", compress_level=1)
            uri = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
            with self._lock:
                self._pictures.put(digest, uri)
        return uri

    async def _picture(self, source: str | bytes) -> str:
        """``picture`` in a thread, once for all groups that wait for it: a large one takes a second to encode."""
        making = self._encoding.get(source)
        if making is None:
            making = asyncio.get_running_loop().run_in_executor(self._threads, self.picture, source)
            making.add_done_callback(lambda _: self._encoding.pop(source, None))
            self._encoding[source] = making
        return await asyncio.shield(making)


def _seeds(seed: int, index: int, uid: str, count: int) -> list[int]:
    """Of the answers to one problem of a batch."""
    return np.random.SeedSequence([seed, index, zlib.crc32(uid.encode())]).generate_state(count).tolist()


def assign(images: Sequence[str | bytes], replicas: int) -> list[int]:
    """Which replica answers which problem: those about one map together, so that its picture is read once; evenly, so a
    map with more questions than a replica's share is spread."""
    share = -(-len(images) // replicas)
    load, homes, current = [0] * replicas, [0] * len(images), dict[str | bytes, int]()
    often = Counter(images)
    for index in sorted(range(len(images)), key=lambda index: (-often[images[index]], index)):
        home = current.get(images[index], -1)
        if home < 0 or load[home] >= share:
            home = load.index(min(load))
            current[images[index]] = home
        homes[index] = home
        load[home] += 1
    return homes
