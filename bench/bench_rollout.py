"""Sampling and weight syncs, timed. Writes ``bench/results/rollout-<machine>.json``; prints it too.

    python bench/bench_rollout.py                       # the local engine beside transformers' generate
    python bench/bench_rollout.py --python ENV/bin/python   # SGLang as well: our client, SGLang's own, syncs

All on the tiny model with pictures and answers of a fixed length, so that every contender samples the same number of
tokens. SGLang's benchmark client (``rollout_peer.py``; it needs the package ``datasets`` in that environment) sends
one request an answer, as it always does; the bare requests are our client's own bodies, one a group, whose replies are
thrown away unread: no client can be faster.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.append(str(Path(__file__).parent))
from records import RESULTS, commit, processor, slug
from step_tiny import make_problems

from rewardmap.config import PolicyConfig, ServerConfig
from rewardmap.policy import Policy, load_policy
from rewardmap.rollout.local import LocalEngine
from rewardmap.rollout.sglang_server import KEYS_FILE, Keys
from rewardmap.tiny import WARM_START
from rewardmap.types import Problem, SamplingParams

GROUP, REPEATS = 8, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="interpreter of an environment with SGLang; without it only the local engine")
    parser.add_argument("--problems", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="per answer")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--print", action="store_true", help="one line of JSON, no file: for bench/gpu.py")
    arguments = parser.parse_args()
    policy = load_policy(WARM_START, PolicyConfig(device=arguments.device))
    # Nothing that ends an answer is ever sampled, by anyone: answers end at the limit.
    banned = (*policy.banned_token_ids, *policy.stop_token_ids)
    policy = replace(policy, stop_token_ids=policy.banned_token_ids[1:], banned_token_ids=banned)
    problems = make_problems(arguments.problems)[0][:: max(1, len(make_problems(1)[0]))][: arguments.problems]
    row: dict[str, Any] = {
        "machine": torch.cuda.get_device_name() if arguments.device == "cuda" else processor(),
        "commit": commit(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "transformers": transformers.__version__,
        "problems": len(problems),
        "group_size": GROUP,
        "tokens_per_answer": arguments.tokens,
    }
    row["local"] = local(policy, problems, arguments.tokens)
    if arguments.python:
        row["sglang"] = servers(policy, problems, arguments.tokens, arguments.python)
    if arguments.print:
        print(json.dumps({"ok": True} | row))
        return
    text = json.dumps(row, indent=1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"rollout-{slug(row['machine'])}.json").write_text(text + "\n", encoding="utf-8")
    print(text)


def local(policy: Policy, problems: Sequence[Problem], tokens: int) -> dict[str, float]:
    """Tokens a second of the local engine, and of transformers' generate with all prompts in one batch and with one
    prompt at a time; whichever is faster is what we compare with."""
    engine = LocalEngine(policy, batch_sequences=GROUP * len(problems))
    sampling = SamplingParams(max_new_tokens=tokens)
    total = GROUP * len(problems) * tokens
    ours, batch, single = (
        total / one
        for one in race(
            lambda: engine.generate(problems, GROUP, sampling),
            lambda: generate(policy, problems, tokens),
            lambda: [generate(policy, [problem], tokens) for problem in problems],
        )
    )
    return {
        "tokens_per_second": ours,
        "generate_batch_tokens_per_second": batch,
        "generate_single_tokens_per_second": single,
        "times_generate": ours / max(batch, single),
    }


@torch.no_grad()
def generate(policy: Policy, problems: Sequence[Problem], tokens: int) -> Any:
    """``GROUP`` answers to each problem by transformers, prompts padded on the left."""
    prompts = [policy.encode(problem).token_ids for problem in problems]
    length = max(map(len, prompts))
    device = policy.device
    ids = torch.tensor([[0] * (length - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    images = [policy.image(problem.image) for problem in problems]
    config = policy.model.config
    return policy.model.generate(
        input_ids=ids,
        attention_mask=mask,
        pixel_values=policy.pixel_values(images),
        image_grid_thw=torch.tensor([image.grid_thw for image in images], device=device),
        mm_token_type_ids=(ids == config.image_token_id).int(),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=GROUP,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        pad_token_id=0,
    )


def servers(policy: Policy, problems: Sequence[Problem], tokens: int, python: str) -> dict[str, Any]:
    """Tokens a second through our client, SGLang's and by bare requests, counters of the server, seconds of each sync
    route."""
    from rewardmap.train.synced import SyncedEngine
    from rewardmap.train.weight_sync import WeightSync

    sampling = SamplingParams(max_new_tokens=tokens)
    total = GROUP * len(problems) * tokens
    with tempfile.TemporaryDirectory() as folder:
        config = ServerConfig(python=python, args=("--max-total-tokens", "65536"))
        engine = SyncedEngine(policy, config, Path(folder), lambda line: print(line, file=sys.stderr))
        try:
            inner = engine._engine
            client = inner.replicas[0].client
            bodies: list[Any] = []
            replies: list[Any] = []
            plain = client.generate

            async def recorded(body: Any, what: str) -> Any:
                bodies.append(body)
                replies.append(await plain(body, what))
                return replies[-1]

            client.generate = recorded  # type: ignore[method-assign]
            inner.control("/flush_cache", {})
            engine.generate(problems, GROUP, sampling)
            client.generate = plain  # type: ignore[method-assign]
            counts = [sample["meta_info"] for reply in replies for sample in reply]

            async def bare() -> None:
                await asyncio.gather(*(plain(body, "bench") for body in bodies))

            through, lower = (
                total / one
                for one in race(lambda: engine.generate(problems, GROUP, sampling), lambda: inner.loop.run(bare()))
            )
            requests = Path(folder) / "requests.json"
            requests.write_text(json.dumps([json.loads(body) for body in bodies]))
            environment = os.environ | {"OPENAI_API_KEY": Keys.read(Path(folder) / KEYS_FILE).api or ""}
            peer = subprocess.run(
                (python, str(Path(__file__).with_name("rollout_peer.py")), client.url, str(requests), str(REPEATS)),
                check=True,
                stdout=subprocess.PIPE,
                env=environment,
            )
            own = total / json.loads(peer.stdout.splitlines()[-1])["seconds"]
            info = inner.loop.run(client.call("/server_info", method="GET", admin=False))
            row: dict[str, Any] = {
                "version": info["version"],
                "client_tokens_per_second": through,
                "bare_tokens_per_second": lower,
                "client_share_of_bare": through / lower,
                "sglang_client_tokens_per_second": own,
                "client_share_of_sglang_client": through / own,
                "prompt_tokens": sum(meta["prompt_tokens"] for meta in counts),
                "cached_tokens": sum(meta["cached_tokens"] for meta in counts),
                "requests": len(bodies),
                "weights_bytes": sum(p.nbytes for p in policy.model.parameters()),
            }
            for number, route in enumerate(("tensor", "distributed", "disk"), 1):
                engine._config = inner.config = replace(config, sync=route)  # type: ignore[arg-type]
                engine._sync.close()
                engine._sync = WeightSync(policy, inner, Path(folder))
                times = []
                for repeat in range(REPEATS + 1):
                    engine.update_weights(10 * number + repeat)
                    times.append(engine.metrics())
                row[f"sync_{route}_seconds"] = statistics.median(one["sync_seconds"] for one in times[1:])
                row[f"sync_{route}_drift_max"] = max(one["sync_drift_max"] for one in times)
            return row
        finally:
            engine.close()


def race(*contenders: Callable[[], Any]) -> list[float]:
    """Median seconds of each, in turns, after a turn to warm up."""
    times: list[list[float]] = [[] for _ in contenders]
    for turn in range(REPEATS + 1):
        for work, taken in zip(contenders, times, strict=True):
            begin = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                taken.append(time.perf_counter() - begin)
    return [statistics.median(taken) for taken in times]


if __name__ == "__main__":
    main()
