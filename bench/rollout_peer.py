"""SGLang's own benchmark client on requests of ours: run by ``bench_rollout.py`` in SGLang's environment.

    API_KEY=... ENV/bin/python bench/rollout_peer.py URL REQUESTS.json REPEATS

Each request of n answers is sent as that client sends load: n requests of one answer, all at once, answers streamed.
Prints the median of the seconds that all of them took.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from sglang.benchmark import serving  # type: ignore[import-not-found]


async def round_trip(url: str, requests: list[dict[str, Any]]) -> float:
    """Seconds until the last answer is there."""
    calls = []
    for request in requests:
        body = dict(request)
        prompt, pictures = body.pop("input_ids"), body.pop("image_data")
        sampling = body["sampling_params"] = dict(body["sampling_params"])
        for _ in range(sampling.pop("n")):
            calls.append(
                serving.RequestFuncInput(
                    prompt=prompt,
                    api_url=f"{url}/generate",
                    prompt_len=len(prompt),
                    output_len=sampling["max_new_tokens"],
                    model="",
                    lora_name="",
                    image_data=pictures,
                    extra_request_body=body,
                )
            )
    begin = time.perf_counter()
    replies = await asyncio.gather(*(serving.async_request_sglang_generate(call) for call in calls))
    seconds = time.perf_counter() - begin
    failed = [reply.error for reply in replies if not reply.success]
    if failed:
        raise SystemExit(f"{len(failed)} of {len(replies)} requests failed, the first with: {failed[0]}")
    return seconds


async def main() -> None:
    url, requests, repeats = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), int(sys.argv[3])
    serving.set_global_args(
        Namespace(
            temperature=1.0,
            top_p=1.0,
            disable_ignore_eos=False,
            disable_stream=False,
            return_logprob=True,
            logprob_start_len=-1,
            top_logprobs_num=0,
            token_ids_logprob=None,
            return_routed_experts=False,
        )
    )
    times = [await round_trip(url, requests) for _ in range(repeats + 1)]
    print(json.dumps({"seconds": statistics.median(times[1:])}))


if __name__ == "__main__":
    asyncio.run(main())
