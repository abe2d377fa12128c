"""A server that speaks as much of SGLang's protocol as the client uses, without a model; a proxy that breaks things.

Both run in threads of the test. ``tests/test_sglang_real.py`` holds the real server to the same tests.
"""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import json
import math
import os
import pickle
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import aiohttp
import torch
import torch.distributed as dist
from aiohttp import web

ANSWER = [287, 289, 92, 256]
"""``\\boxed{no}`` and the stop token of the tiny model."""
NATS = [-0.1, -0.2, -0.3, -0.4]


class Threaded:
    """An aiohttp application in a thread of its own."""

    def __init__(self) -> None:
        self.app = web.Application(client_max_size=1 << 30)
        self.url = ""

    @contextmanager
    def running(self) -> Iterator[Any]:
        loop, ready = asyncio.new_event_loop(), threading.Event()

        async def start() -> None:
            self.runner = web.AppRunner(self.app, handler_cancellation=True, shutdown_timeout=0.1)
            await self.runner.setup()
            site = web.TCPSite(self.runner, "127.0.0.1", 0)
            await site.start()
            self.url = f"http://127.0.0.1:{self.runner.addresses[0][1]}"
            ready.set()

        loop.create_task(start())
        thread = threading.Thread(target=loop.run_forever, daemon=True)
        thread.start()
        assert ready.wait(10)
        try:
            yield self
        finally:
            asyncio.run_coroutine_threadsafe(self.runner.cleanup(), loop).result(10)
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()


class FakeServer(Threaded):
    """Expands pictures to ``image_tokens``, answers every question with ``ANSWER``."""

    def __init__(self, tokenizer: Any, image_token: int, *, sessions: bool = True, image_tokens: int = 25) -> None:
        super().__init__()
        self.tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
        self.image_token, self.image_tokens = image_token, image_tokens
        self.version, self.weights = "default", dict[str, Any]()
        self.paused, self.session, self.asleep = False, False, set[str]()
        self.calls, self.bodies, self.keys, self.peers = list[str](), list[Any](), Counter[str](), list[int | None]()
        self.flushed, self.group, self.queued_s, self.receiving = True, None, 0.0, set[Any]()
        self.running_now, self.most_running, self.delay, self.cut = 0, 0, 0.0, 0
        self.info: dict[str, Any] = {"version": "0.5.23", "max_total_num_tokens": 4096}
        self.model_info: dict[str, Any] = {"model_type": "qwen2_5_vl", "model_path": "/elsewhere"}
        self.adapters, self.adapter_config = dict[str, dict[str, Any]](), dict[str, Any]()
        routes: dict[str, Callable[[Any], Any]] = {
            "/generate": self._generate,
            "/tokenize": self._tokenize,
            "/pause_generation": self._pause,
            "/continue_generation": self._continue,
            "/flush_cache": self._flush,
            "/update_weights_from_tensor": self._update,
            "/init_weights_update_group": self._join,
            "/update_weights_from_distributed": self._receive,
            "/destroy_weights_update_group": self._leave,
            "/load_lora_adapter_from_tensors": self._load_adapter,
            "/unload_lora_adapter": self._unload_adapter,
            "/update_weight_version": self._update_version,
            "/release_memory_occupation": self._release,
            "/resume_memory_occupation": self._resume,
        }
        if sessions:
            routes |= {"/begin_weight_update": self._begin, "/end_weight_update": self._end}
        self._sessions = sessions
        for path, handler in routes.items():
            self.app.router.add_post(path, self._handled(handler))
        self.app.router.add_get("/health", self._health)
        self.app.router.add_get("/health_generate", self._health_generate)
        self.app.router.add_get("/server_info", self._server_info)
        self.app.router.add_get("/model_info", self._model_info)
        self.app.router.add_get("/v1/models", self._models)

    def enable_lora(self, rank: int, targets: list[str]) -> None:
        """As ``--enable-lora --max-lora-rank RANK --lora-target-modules TARGETS``."""
        self.info |= {"enable_lora": True, "max_lora_rank": rank, "lora_target_modules": targets}

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _health_generate(self, request: web.Request) -> web.Response:
        return web.Response(status=500 if self.asleep else 200, text="without its memory the real one ends")

    async def _server_info(self, request: web.Request) -> web.Response:
        return web.json_response(self.info)

    async def _model_info(self, request: web.Request) -> web.Response:
        return web.json_response(self.model_info | {"weight_version": self.version})

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": name} for name in ("/elsewhere", *self.adapters)]})

    def _handled(self, handler: Callable[[Any], Any]) -> Any:
        async def handle(request: web.Request) -> web.Response:
            body = await request.json()
            self.calls.append(request.path)
            self.peers.append(request.transport.get_extra_info("peername")[1] if request.transport else None)
            self.keys[request.headers.get("Authorization", "")] += 1
            reply = handler(body)
            if asyncio.iscoroutine(reply):
                reply = await reply
            return reply if isinstance(reply, web.Response) else web.json_response(reply)

        return handle

    async def _generate(self, body: Any) -> Any:
        self.bodies.append(body)
        if isinstance(body["sampling_params"], list):
            [tokens] = {tuple(tokens) for tokens in body["input_ids"]}
            assert len(body["input_ids"]) == len(body["sampling_params"]) and isinstance(body["image_data"], str)
            several = {"n": len(body["sampling_params"])}
            body = body | {"input_ids": list(tokens), "sampling_params": body["sampling_params"][0] | several}
            replies = await self._answer(body)
            return replies if isinstance(replies, list) else [replies]
        return await self._answer(body)

    async def _answer(self, body: Any) -> Any:
        self.flushed = False
        if body.get("lora_path") is not None and body["lora_path"] not in self.adapters:
            return web.Response(status=400, text="an adapter that has never been loaded")
        self.running_now += 1
        self.most_running = max(self.most_running, self.running_now)
        await asyncio.sleep(self.delay)
        self.running_now -= 1
        place = body["input_ids"].index(self.image_token)
        prompt = body["input_ids"][:place] + [self.image_token] * self.image_tokens + body["input_ids"][place + 1 :]
        if self.tokenizer.id_to_token(prompt[-1]) == "<|vision_start|>":
            raise IndexError("the real server looks at the token after each <|vision_start|>")
        meta = {"prompt_tokens": len(prompt), "weight_version": self.version}
        if body["sampling_params"]["max_new_tokens"] == 0:
            scored = prompt[body["logprob_start_len"] + 1 :]
            entries = [[None, prompt[body["logprob_start_len"]], None], *([-0.5, token, None] for token in scored)]
            return {"output_ids": [], "meta_info": meta | {"input_token_logprobs": entries}}
        sample = {
            "output_ids": ANSWER,
            "prompt_token_ids": prompt,
            "meta_info": meta
            | {
                "finish_reason": {"type": "stop", "matched": 256},
                "completion_tokens": len(ANSWER),
                "output_token_logprobs": [[nats, token, None] for nats, token in zip(NATS, ANSWER, strict=True)],
                "weight_versions": [{"version": self.version, "start": 0, "end": len(ANSWER)}],
            },
        }
        if self.cut > 0:
            self.cut -= 1
            sample["meta_info"]["finish_reason"] = {"type": "abort", "message": "Abort in waiting queue"}
        count = body["sampling_params"]["n"]
        return sample if count == 1 else [sample] * count

    def _tokenize(self, body: Any) -> Any:
        return {"tokens": self.tokenizer.encode(body["prompt"], add_special_tokens=False).ids, "max_model_len": 4096}

    def _pause(self, body: Any) -> Any:
        self.paused = True
        return {"status": "ok"}

    def _continue(self, body: Any) -> Any:
        self.paused = False
        return {"status": "ok"}

    def _begin(self, body: Any) -> Any:
        if self.session:
            return {"success": False, "message": "a weight-update session is already open"}
        self.session = True
        return {"success": True}

    def _end(self, body: Any) -> Any:
        if not self.session:
            return {"success": False, "message": "no weight-update session is open"}
        self.session = False
        return {"success": True}

    def _update(self, body: Any) -> Any:
        if self._sessions and not self.session:
            return {"success": False, "message": "must run between begin_weight_update() and end_weight_update()"}
        self.weights |= unpacked(body)
        self.version = body["weight_version"]
        return {"success": True}

    async def _join(self, body: Any) -> Any:
        def join() -> Any:
            timeout, name = timedelta(seconds=20), body["group_name"]
            store: Any = dist.TCPStore(
                body["master_address"], body["master_port"], body["world_size"], False, timeout, wait_for_workers=False
            )
            for prefix in (name, f"{name}/", "cpu/"):  # those of torch's process groups
                store = dist.PrefixStore(prefix, store)
            return dist.ProcessGroupGloo(store, body["rank_offset"], body["world_size"], timeout)

        self.group = await asyncio.to_thread(join)
        return {"success": True}

    async def _receive(self, body: Any) -> Any:
        """As over NCCL where ``queued_s``: it answers at once, and has the weights so much later."""
        entries, end = list[Any](), 0
        for name, dtype, shape in zip(body["names"], body["dtypes"], body["shapes"], strict=True):
            start, end = end, end + math.prod(shape) * getattr(torch, dtype).itemsize
            entries.append((name, getattr(torch, dtype), shape, start, end))
        flat, group = torch.empty(end, dtype=torch.uint8), self.group

        async def receive() -> None:
            await asyncio.sleep(self.queued_s)
            await asyncio.to_thread(lambda: group.broadcast(flat, 0).wait())
            self.weights |= {n: flat[a:b].view(dtype).reshape(shape).clone() for n, dtype, shape, a, b in entries}

        task = asyncio.create_task(receive())
        self.receiving.add(task)
        if not self.queued_s:
            await task
        self.version = body["weight_version"]
        return {"success": True}

    def _leave(self, body: Any) -> Any:
        self.group = None
        return {"success": True}

    def _load_adapter(self, body: Any) -> Any:
        name = body["lora_name"]
        if not self.info.get("enable_lora") or name in self.adapters:
            return web.Response(status=400, text="LoRA is not enabled, or it is loaded already")
        self.adapters[name], self.adapter_config = unpacked(body), body["config_dict"]
        return {"success": True}

    def _unload_adapter(self, body: Any) -> Any:
        if body["lora_name"] not in self.adapters:
            return web.Response(status=400, text="it does not exist")
        del self.adapters[body["lora_name"]]
        return {"success": True}

    def _update_version(self, body: Any) -> Any:
        self.version = body["new_version"]
        return {"success": True}

    def _flush(self, body: Any) -> Any:
        self.flushed = True
        return web.Response(text="Cache flushed.\n")

    def _release(self, body: Any) -> Any:
        if not self.flushed:
            return web.Response(status=500, text="the real one ends if anything runs, and only a flush waits for that")
        self.asleep.update(body["tags"])
        return None

    def _resume(self, body: Any) -> Any:
        if not self.asleep.issuperset(body["tags"]):
            return web.Response(status=500, text="the real one ends")
        self.asleep.difference_update(body["tags"])
        return None


def unpacked(body: Any) -> dict[str, Any]:
    """The weights in a body with one flattened bucket."""
    (payload,) = body["serialized_named_tensors"]
    assert body["load_format"] == "flattened_bucket"
    bucket = pickle.load(io.BytesIO(base64.b64decode(payload)))
    parts = [(entry, bucket["flattened_tensor"][entry.start_idx : entry.end_idx]) for entry in bucket["metadata"]]
    return {entry.name: flat.view(entry.dtype).reshape(entry.shape).clone() for entry, flat in parts}


class Proxy(Threaded):
    """Passes requests on to ``target``; ``break_next(path, fault)`` spoils the next one to that path."""

    def __init__(self, target: str) -> None:
        super().__init__()
        self.target, self._faults = target, list[tuple[str, str, Callable[[], None] | None]]()
        self.spoiled = 0
        self.app.router.add_route("*", "/{path:.*}", self._pass)

    def break_next(self, path: str, fault: str, also: Callable[[], None] | None = None) -> None:
        """``fault``: hang, 503, 400, 401, slow, reset, truncate, prompt, version. ``also`` is called before."""
        self._faults.append((path, fault, also))

    async def _pass(self, request: web.Request) -> web.StreamResponse:
        match = next((fault for fault in self._faults if fault[0] == request.path), None)
        fault = ""
        if match is not None:
            self._faults.remove(match)
            self.spoiled += 1
            fault = match[1]
            if match[2] is not None:
                match[2]()
        if fault == "hang":
            await asyncio.sleep(3600)
        if fault == "slow":
            await asyncio.sleep(0.5)
        if fault.isdigit():
            return web.Response(status=int(fault), text="broken on purpose")
        if fault == "reset":
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        headers = {"Authorization": request.headers.get("Authorization", "")}
        async with (
            aiohttp.ClientSession() as session,
            session.request(
                request.method, self.target + request.path_qs, data=await request.read(),
                headers=headers | {"Content-Type": "application/json"},
            ) as reply,
        ):  # fmt: skip
            text, status = await reply.text(), reply.status
        if fault == "truncate":
            text = text[: len(text) // 2]
        elif fault in ("prompt", "version"):
            samples = json.loads(text)
            for sample in samples if isinstance(samples, list) else [samples]:
                if fault == "prompt":
                    sample["meta_info"]["prompt_tokens"] += 1
                else:
                    sample["meta_info"]["weight_version"] = "stale"
            text = json.dumps(samples)
        return web.Response(status=status, text=text, content_type="application/json")


def serve() -> None:
    """``python sglang_fake.py OPTIONS``, those of ``sglang.launch_server``: the server in a process of its own. With
    ``--die-once FILE`` it ends at its first question, if nobody has before; with ``--die-at-probe FILE`` at the first
    answer that it is to score."""
    from tokenizers import Tokenizer  # without the seconds that transformers takes

    options = dict(zip(sys.argv, sys.argv[1:], strict=False))
    with Path("pids").open("a") as pids:
        print(os.getpid(), file=pids)
    model = Path(options["--model-path"])
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    server = FakeServer(tokenizer, json.loads((model / "config.json").read_text())["image_token_id"])
    if "--enable-lora" in sys.argv:
        after = sys.argv[sys.argv.index("--lora-target-modules") + 1 :]
        targets = list(itertools.takewhile(lambda word: not word.startswith("--"), after))
        server.enable_lora(int(options["--max-lora-rank"]), targets)
    answer = server._generate

    async def generate(body: Any) -> Any:
        first = body["sampling_params"] if isinstance(body["sampling_params"], dict) else body["sampling_params"][0]
        died = options.get("--die-once" if first["max_new_tokens"] else "--die-at-probe")
        if died is not None:
            with suppress(FileExistsError):
                Path(died).touch(exist_ok=False)
                os._exit(9)
        return await answer(body)

    route = next(r for r in server.app.router.routes() if r.resource and r.resource.canonical == "/generate")
    route._handler = server._handled(generate)
    web.run_app(server.app, host=options["--host"], port=int(options["--port"]), print=None)


if __name__ == "__main__":
    serve()
