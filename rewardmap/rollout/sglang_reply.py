"""What SGLang's ``/generate`` is asked and what it answers: the request's body, and every check of the reply."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

from rewardmap.rollout.engine import RolloutError
from rewardmap.types import FinishReason, Problem, Rollout, RolloutGroup, SamplingParams

Json = Any
_BAN = -1e9
"""Added to a banned token's logit."""
_ECHO = '"prompt_token_ids":'
"""Not inside a string of JSON, where quotes have a backslash before them."""


class MismatchError(RolloutError):
    """A reply that does not fit what was asked: training on it would be wrong."""


def bans(tokens: Sequence[int]) -> dict[str, float]:
    """SGLang's ``logit_bias`` under which none of ``tokens`` is sampled."""
    return {str(token): _BAN for token in tokens}


def generate_body(
    prompt: Sequence[int],
    image_token: int,
    picture: str,
    group_size: int,
    sampling: SamplingParams,
    stop: Sequence[int],
    banned: Sequence[int],
    adapter: str | None = None,
    seeds: Sequence[int] | None = None,
) -> bytes:
    """The body of one request for a whole group, JSON.

    Args:
        prompt: [P] tokens with the image expanded; the server gets one placeholder and expands it itself.
        adapter: name of the one to sample with, at a server that holds adapters.
        picture: data URI. No key of ours comes with it (``mm_hashes``): 0.5.20 and 0.5.23 pad a Qwen3-VL prompt with
            their own key, look for ours in it, and crash.
        seeds: one for each answer, for a server that samples by them; None: it draws from a generator of its own.
    """
    tokens = collapse_image(prompt, image_token)
    asked = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,  # SGLang knows no 0
        "max_new_tokens": sampling.max_new_tokens,
        "stop_token_ids": list(stop),
        "logit_bias": bans(banned),
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "no_stop_trim": True,
    }
    body: dict[str, Json] = {"return_logprob": True, "return_prompt_token_ids": True, **_named(adapter)}
    if seeds is None:
        return _with_picture(body | {"input_ids": tokens, "sampling_params": asked | {"n": group_size}}, picture)
    # n answers of one prompt would have one seed, and be the same answer.
    each = [asked | {"sampling_seed": seed} for seed in seeds]
    return _with_picture(body | {"input_ids": [tokens] * group_size, "sampling_params": each}, picture, of_all=True)


def score_body(
    prompt: Sequence[int], response: Sequence[int], image_token: int, picture: str, adapter: str | None = None
) -> bytes:
    """The body of a request for the log-probabilities of a given answer at temperature 1. Arguments as above."""
    body = {
        # One token more than is asked for: SGLang fails on a text whose last token is <|vision_start|>.
        "input_ids": [*collapse_image(prompt, image_token), *response, prompt[-1]],
        "sampling_params": {"temperature": 1.0, "max_new_tokens": 0},
        "return_logprob": True,
        "logprob_start_len": len(prompt) - 1,
        **_named(adapter),
    }
    return _with_picture(body, picture)


def _with_picture(body: dict[str, Json], picture: str, of_all: bool = False) -> bytes:
    """JSON of ``body`` and its picture: megabytes that need no escapes, so that nothing looks through them.

    Args:
        of_all: that of each of several prompts.
    """
    form = b'{"image_data":"%b",%b' if of_all else b'{"image_data":["%b"],%b'
    return form % (picture.encode("ascii"), json.dumps(body).encode()[1:])


def _named(adapter: str | None) -> dict[str, Json]:
    """SGLang's field is for a path or a name."""
    return {} if adapter is None else {"lora_path": adapter}


def read_scores(reply: Json, prompt: Sequence[int], response: Sequence[int], vocabulary: int, uid: str) -> list[float]:
    """[R] nats in the reply to ``score_body``; NaN for the vocabulary's last token, which SGLang scores as token 0.

    Raises:
        MismatchError: the server scored other tokens.
    """
    try:
        entries = reply["meta_info"]["input_token_logprobs"][-len(response) - 1 : -1]
        counted = reply["meta_info"]["prompt_tokens"]
        tokens, nats = [int(entry[1]) for entry in entries], [float(entry[0]) for entry in entries]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise MismatchError(f"{uid}: no such reply to a scoring request is known ({error!r})") from None
    last = vocabulary - 1
    if tokens != [0 if token == last else token for token in response] and tokens != list(response):
        raise MismatchError(f"{uid}: the server scored tokens {tokens}; it was sent {list(response)}")
    sent = len(prompt) + len(response) + 1
    if counted != sent:
        raise MismatchError(f"{uid}: the server scored {counted} tokens; it was sent {sent}")
    return [math.nan if token == last else value for token, value in zip(response, nats, strict=True)]


def collapse_image(prompt: Sequence[int], image_token: int) -> list[int]:
    """``prompt`` with the run of image tokens made one."""
    first = prompt.index(image_token)
    return [*prompt[: first + 1], *(token for token in prompt[first + 1 :] if token != image_token)]


def read_json(text: str) -> Json:
    """A reply to ``/generate``. A group repeats its prompt, of thousands of tokens, in every sample: it is read once
    and is one list. Raises ValueError for what is not JSON."""
    echoes: dict[str, int] = {}
    start, *rest = text.split(_ECHO)
    parts = [start]
    for part in rest:
        end = part.find("]") + 1 if part.lstrip().startswith("[") else 0
        number = str(echoes.setdefault(part[:end], len(echoes))) if end else ""
        parts += (_ECHO, number, part[end:])
    reply = json.loads("".join(parts))
    prompts = [json.loads(echo) for echo in echoes]
    for sample in reply if isinstance(reply, list) else [reply]:
        if isinstance(sample, dict) and isinstance(sample.get("prompt_token_ids"), int):
            sample["prompt_token_ids"] = prompts[sample["prompt_token_ids"]]
    return reply


def read_group(
    reply: Json,
    problem: Problem,
    prompt: tuple[int, ...],
    group_size: int,
    version: int | None,
    stop: Sequence[int],
    banned: Sequence[int],
    texts: Any,
    adapter: str | None = None,
) -> RolloutGroup:
    """The group in a reply.

    Args:
        prompt: [P] our tokens, image expanded.
        version: of the weights that must have sampled; None accepts any and stamps 0.
        texts: callable from token ids to text.
        adapter: what the server calls that version; None: by its number.

    Raises:
        MismatchError: naming the problem's uid and what differs.
    """
    samples = reply if isinstance(reply, list) else [reply]
    if len(samples) != group_size:
        raise MismatchError(f"{problem.uid}: asked for {group_size} answers, the server sent {len(samples)}")
    rollouts, echoes = [], list[Any]()
    for number, sample in enumerate(samples):
        try:
            rollouts.append(_read_sample(sample, prompt, echoes, version, stop, banned, texts, adapter))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            detail = str(error) if isinstance(error, _DifferenceError) else f"no such reply is known ({error!r})"
            raise MismatchError(f"{problem.uid}: answer {number + 1} of {group_size}: {detail}") from None
    return RolloutGroup(problem, prompt, tuple(rollouts))


class _DifferenceError(ValueError):
    pass


def _read_sample(
    sample: Mapping[str, Json],
    prompt: tuple[int, ...],
    echoes: list[Any],
    version: int | None,
    stop: Sequence[int],
    banned: Sequence[int],
    texts: Any,
    adapter: str | None,
) -> Rollout:
    """``echoes``: lists of the reply that are known to be the prompt."""
    meta = sample["meta_info"]
    reason = meta["finish_reason"]["type"]
    if reason not in ("stop", "length", "abort"):
        raise _DifferenceError(f"finish reason {reason!r}, known are stop, length and abort")
    entries = meta["output_token_logprobs"] if "output_token_logprobs" in meta or reason != "abort" else []
    logprobs, tokens = [float(entry[0]) for entry in entries], [int(entry[1]) for entry in entries]
    if reason == "abort" and not tokens:  # it never began: nothing else in the reply is about our prompt
        return Rollout((), (), "", "abort", version or 0)
    if meta["prompt_tokens"] != len(prompt):
        raise _DifferenceError(
            f"the server counts {meta['prompt_tokens']} prompt tokens, the trainer {len(prompt)}: their image "
            "processors or chat templates differ"
        )
    echoed = sample.get("prompt_token_ids")
    if echoed is not None and not any(echoed is one for one in echoes):
        if tuple(echoed) != prompt:
            place = next(index for index, pair in enumerate(zip(echoed, prompt, strict=True)) if pair[0] != pair[1])
            there, here = echoed[place], prompt[place]
            raise _DifferenceError(f"prompt token {place} is {there} at the server, {here} at the trainer")
        echoes.append(echoed)
    if tokens != list(sample["output_ids"]) or len(tokens) != meta["completion_tokens"]:
        raise _DifferenceError(
            f"{len(sample['output_ids'])} tokens, {len(tokens)} log-probabilities, {meta['completion_tokens']} counted"
        )
    if not tokens:
        raise _DifferenceError("an answer without tokens")
    if not all(math.isfinite(value) and value <= 1e-4 for value in logprobs):
        raise _DifferenceError("a log-probability that is not a finite number below 0")
    if reason == "stop" and tokens[-1] not in stop:
        raise _DifferenceError(f"it stopped at token {tokens[-1]}, which is no stop token")
    wrong = set(banned).intersection(tokens)
    if wrong:
        raise _DifferenceError(f"token {min(wrong)} is a picture's placeholder and was banned")
    if version is not None:
        _check_version(meta, adapter or str(version))
    # Rounding can put a certain token's log-probability a hair above 0.
    nats = tuple(min(value, 0.0) for value in logprobs)
    return Rollout(tuple(tokens), nats, texts(tokens), cast(FinishReason, reason), version or 0)


def _check_version(meta: Mapping[str, Json], version: str) -> None:
    spans = meta.get("weight_versions") or [{"version": meta["weight_version"]}]
    seen = sorted({str(span["version"]) for span in spans} | {str(meta["weight_version"])})
    if seen != [version]:
        raise _DifferenceError(f"sampled with weights {', '.join(seen)}; the trainer's are version {version}")
