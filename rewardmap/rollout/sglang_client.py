"""Talks HTTP to one SGLang server: sampling with retries, control calls, and an event loop of its own to do it on."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import aiohttp

from rewardmap.rollout.engine import RolloutError
from rewardmap.rollout.sglang_reply import read_json
from rewardmap.rollout.sglang_server import Keys

Json = Any
Result = TypeVar("Result")
TRIES = 5
"""Attempts to reach a server that refuses or drops connections, about seven seconds in all."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 8.0
_BUSY = (429, 502, 503, 504)
_FLUSH_S = 30
_IDLE_S = 2.0


class UnreachableError(RolloutError):
    """No connection, or connections that break: the server may be dead."""


class EventLoop:
    """An asyncio loop in a thread, for synchronous callers."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollouts", daemon=True)
        self._thread.start()
        self._closed, self._lock = False, threading.Lock()

    def start(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        """Begin and go on. Raises RolloutError on a loop that is closed."""
        with self._lock:
            if not self._closed:
                return asyncio.run_coroutine_threadsafe(work, self._loop)
        work.close()
        raise RolloutError("the rollout engine is closed")

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run to the end and return the result; an interrupt cancels the work."""
        future = self.start(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self, last: Callable[[], Coroutine[Any, Any, None]] | None = None) -> None:
        """Cancel what runs, so that nobody waits for it, then do ``last``. A second call does nothing."""

        async def end() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            if last is not None:
                await last()

        with self._lock:
            if self._closed:
                return
            self._closed = True  # from here on nothing begins
        asyncio.run_coroutine_threadsafe(end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class SGLangClient:
    """One server. Every coroutine runs on the loop that ``session`` was made on."""

    def __init__(self, url: str, keys: Keys, timeout_s: float) -> None:
        self.url, self._keys, self._timeout_s = url.rstrip("/"), keys, timeout_s
        self._session: aiohttp.ClientSession | None = None
        self.asleep: set[str] = set()
        """Kinds of memory that the server gave up and has not taken back."""
        self.starting = False
        """Whether the server is being started again: until it has the current weights, it is asked for no answer."""

    async def generate(self, body: Json | bytes, what: str) -> Json:
        """POST /generate. Sampling has no effect that lasts, so whatever may pass is tried again.

        Args:
            body: what JSON can say, or the JSON itself.
            what: whom the request is for, in messages: the problem's uid.

        Raises:
            UnreachableError: no connection after ``TRIES``, or the server is being started again.
            RolloutError: the server refuses the request, or the deadline passed.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._retrying("/generate", body, what)
        except TimeoutError:
            raise RolloutError(
                f"{what}: no answer from {self.url} within rollout.server.request_timeout_s={self._timeout_s:g}"
            ) from None

    async def call(
        self, path: str, body: Json = None, *, method: str = "POST", admin: bool = True, timeout_s: float | None = None
    ) -> Json:
        """One call, not repeated. Text where the reply is not JSON.

        Args:
            admin: use the key for the control plane; else that for sampling.

        Raises:
            UnreachableError, RolloutError: naming server and call.
        """
        status, text = await self._within(timeout_s or self._timeout_s, method, path, body, admin)
        if status != 200:
            raise self._refused(path, status, text)
        try:
            reply = json.loads(text)
        except ValueError:
            return text
        if isinstance(reply, dict) and reply.get("success") is False:
            raise RolloutError(f"{self.url}{path}: {reply.get('message', text)}")
        return reply

    async def has(self, path: str, timeout_s: float | None = None) -> bool:
        """Whether the server knows a POST endpoint: a GET there is the wrong method (405), and has no effect."""
        status, _ = await self._within(timeout_s or self._timeout_s, "GET", path, None, admin=False)
        return status == 405

    async def flush(self, timeout_s: float | None = None) -> None:
        """Forget all prompts. Raises RolloutError while anything runs, once ``_FLUSH_S`` have passed."""
        await self.call(f"/flush_cache?timeout={_FLUSH_S}", {}, timeout_s=timeout_s)

    async def sleep(self, kinds: Sequence[str]) -> None:
        """The server gives up these kinds of its GPU memory, ``weights`` or ``kv_cache``. Raises RolloutError."""
        due = [kind for kind in kinds if kind not in self.asleep]
        if due:
            # Waits until nothing runs, as what was sent again after a broken connection may: then its scheduler ends.
            await self.flush()
            await self.call("/release_memory_occupation", {"tags": due})
            self.asleep.update(due)

    async def wake(self, kinds: Sequence[str], timeout_s: float | None = None) -> None:
        """It takes back those that it gave up; asked for another, SGLang's scheduler ends. Raises RolloutError."""
        due = [kind for kind in kinds if kind in self.asleep]
        if due:
            await self.call("/resume_memory_occupation", {"tags": due}, timeout_s=timeout_s)
            self.asleep.difference_update(due)

    async def _within(self, limit: float, method: str, path: str, body: Json, admin: bool) -> tuple[int, str]:
        """Status and text. Raises UnreachableError, and RolloutError when the time is up."""
        try:
            async with asyncio.timeout(limit):
                return await self._once(method, path, body, self._keys.admin if admin else self._keys.api)
        except TimeoutError:
            raise RolloutError(f"{self.url}{path}: no answer within {limit:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise UnreachableError(
                f"{self.url}{path}: {_describe(error)}; is that server running, and reachable from here?"
            ) from None

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _retrying(self, path: str, body: Json, what: str) -> Json:
        failures, pause = 0, _FIRST_PAUSE_S
        while True:
            if self.starting:
                raise UnreachableError(f"{what}: {self.url}{path}: that server is being started again")
            try:
                status, text = await self._once("POST", path, body, self._keys.api)
                if status == 200:
                    return read_json(text)
                if status not in _BUSY:
                    raise self._refused(path, status, text, what)
            except (aiohttp.ClientError, OSError, ValueError) as error:  # ValueError: JSON that breaks off
                failures += 1
                if failures == TRIES:
                    raise UnreachableError(
                        f"{what}: {self.url}{path}: {_describe(error)}; tried {TRIES} times"
                    ) from None
            # Jitter: many requests that failed together do not come back together.
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    async def _once(self, method: str, path: str, body: Json, key: str | None) -> tuple[int, str]:
        if self._session is None:
            # Idle connections are closed from here: SGLang closes them after 5 s, and a POST that meets that breaks.
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_S)
            self._session = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        if isinstance(body, bytes):
            sent: dict[str, Any] = {"data": body, "headers": headers | {"Content-Type": "application/json"}}
        else:
            sent = {"json": body, "headers": headers}
        async with self._session.request(method, self.url + path, **sent) as reply:
            return reply.status, await reply.text()

    def _refused(self, path: str, status: int, text: str, what: str = "") -> RolloutError:
        about = f"{what}: " if what else ""
        if status in (401, 403):
            return RolloutError(f"{about}{self.url}{path}: the key is refused (HTTP {status}); check keys_file")
        return RolloutError(f"{about}{self.url}{path}: HTTP {status}: {' '.join(text.split())[:500]}")


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
