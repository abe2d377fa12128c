"""The rollout engine on servers, against a server without a model and a proxy that breaks what passes through it."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import sys
import threading
import time
from collections import Counter
from concurrent.futures import CancelledError
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from rewardmap import vision
from rewardmap.config import ConfigError, ServerConfig
from rewardmap.config_file import load_config
from rewardmap.rollout import sglang_engine
from rewardmap.rollout.engine import RolloutEngine, RolloutError
from rewardmap.rollout.sglang_engine import SGLangEngine, assign
from rewardmap.rollout.sglang_reply import MismatchError, read_json
from rewardmap.rollout.sglang_server import Keys
from rewardmap.tiny import WARM_START
from rewardmap.train.background import in_background
from rewardmap.train.engines import attach
from rewardmap.transit.draw import draw_map, encode_png
from rewardmap.transit.generate import generate_network
from rewardmap.types import Problem, SamplingParams

sys.path.append(str(Path(__file__).parent))
import sglang_fake as fake

KEYS = Keys("sample-key", "admin-key")
SAMPLING = SamplingParams(max_new_tokens=24)


@pytest.fixture(scope="module")
def problems():
    pictures = [
        encode_png(draw_map(generate_network("tiny-easy", np.random.default_rng(seed), f"a/{seed}"))) for seed in (0, 1)
    ]
    return [
        Problem(f"q-{i}", pictures[i % 2], f"How many lines? ({i})", "Counting3", 2, "", "", "a/0", "easy")
        for i in range(6)
    ]


@pytest.fixture
def make(policy):
    engines = []

    def make(*urls, **settings):
        config = ServerConfig(urls=urls, **({"request_timeout_s": 20.0} | settings))
        engines.append(SGLangEngine(policy, config, [], KEYS))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def test_groups_are_what_the_server_sampled(policy, problems, server, make):
    engine = make(server.url)
    assert isinstance(engine, RolloutEngine)
    seen = []
    groups = engine.generate(problems, 3, SAMPLING, lambda index, group: seen.append((index, group)))
    assert [group.problem for group in groups] == problems
    assert sorted(index for index, _ in seen) == list(range(6)) and all(groups[i] is group for i, group in seen)
    for group in groups:
        assert group.prompt_token_ids == policy.encode(group.problem).token_ids
        assert len(group.rollouts) == 3
        for rollout in group.rollouts:
            assert rollout.token_ids == tuple(fake.ANSWER) and rollout.rollout_logprobs == tuple(fake.NATS)
            assert rollout.text == r"\boxed{no}" and rollout.finish_reason == "stop"


def test_one_request_a_group_with_one_picture(policy, problems, server, make):
    make(server.url).generate(problems, 8, SamplingParams(temperature=0.7, top_p=0.9, top_k=5, max_new_tokens=9))
    assert len(server.bodies) == 6
    image_token = policy.model.config.image_token_id
    for body in server.bodies:
        assert body["input_ids"].count(image_token) == 1 and len(body["image_data"]) == 1
        asked = body["sampling_params"]
        assert (asked["n"], asked["temperature"], asked["top_p"], asked["top_k"]) == (8, 0.7, 0.9, 5)
        assert asked["max_new_tokens"] == 9 and asked["stop_token_ids"] == list(policy.stop_token_ids)
        assert {int(token) for token in asked["logit_bias"]} == set(policy.banned_token_ids)
    assert len({tuple(body["image_data"]) for body in server.bodies}) == 2  # two pictures
    assert server.keys["Bearer sample-key"] == 7 and not server.keys["Bearer admin-key"]


def test_top_k_of_0_takes_all_tokens_at_a_server_too(problems, server, make):
    """Which SGLang writes -1, and refuses 0."""
    make(server.url).generate(problems[:1], 1, SamplingParams(top_k=0))
    assert [body["sampling_params"]["top_k"] for body in server.bodies] == [-1]


@pytest.mark.parametrize("setting", ["enable_deterministic_inference", "rl_on_policy_target"])
def test_a_deterministic_server_gets_a_seed_for_each_answer(setting, problems, server, make):
    """It samples by the seed in a request, and by 42 without one: all answers of a group would be the same."""
    server.info[setting] = True
    asked = []
    for seed in (5, 5, 6):
        server.bodies.clear()
        groups = make(server.url).generate(problems, 3, SamplingParams(max_new_tokens=24, seed=seed))
        assert [len(group.rollouts) for group in groups] == [3] * len(problems)
        assert all("n" not in one for body in server.bodies for one in body["sampling_params"])
        asked.append(sorted(one["sampling_seed"] for body in server.bodies for one in body["sampling_params"]))
    assert asked[0] == asked[1] and len({*asked[0], *asked[2]}) == 2 * 3 * len(problems)


def test_pictures_are_encoded_while_others_are_asked_about(problems, server, make, monkeypatch):
    engine, plain, seen = make(server.url), SGLangEngine.picture, []
    engine.check()

    def slow(self, source):
        if source == problems[1].image:
            while not server.bodies:
                time.sleep(0.01)
        seen.append(source)
        return plain(self, source)

    monkeypatch.setattr(SGLangEngine, "picture", slow)
    assert len(in_background(lambda: engine.generate(problems, 2, SAMPLING), "sampling").result(20)) == 6
    assert sorted(seen) == sorted({problem.image for problem in problems})  # once for all groups that waited


def test_resized_picture_gives_the_processor_its_own_pixels(policy, make, server, tmp_path):
    noise = torch.randint(0, 256, (95, 133, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "odd.png"
    Image.fromarray(noise.numpy()).save(path)
    uri = make(server.url).picture(str(path))
    sent = base64.b64decode(uri.partition(",")[2])
    assert torch.equal(policy.image(sent).pixels, policy.image(str(path)).pixels)
    with Image.open(io.BytesIO(sent)) as picture:
        assert picture.size != (133, 95) and picture.width % 28 == picture.height % 28 == 0


def test_requests_in_flight_are_bounded(problems, server, make):
    server.delay = 0.05
    make(server.url, concurrency=2).generate(problems, 2, SAMPLING)
    assert server.most_running == 2


def test_closing_ends_what_another_thread_waits_for(problems, server, make):
    """As when a step fails while the next one's answers are sampled."""
    server.delay = 60.0
    engine = make(server.url)
    sampling = in_background(lambda: engine.generate(problems, 2, SAMPLING), "sampling")
    while not server.running_now and not sampling.done():
        time.sleep(0.01)
    engine.close()
    with pytest.raises(CancelledError):
        sampling.result(10)


def test_two_servers_share_the_work_and_stand_in_for_each_other(policy, problems, server, make):
    with fake.FakeServer(policy.tokenizer, policy.model.config.image_token_id).running() as other:
        engine = make(server.url, other.url)
        engine.generate(problems, 2, SAMPLING)
        assert len(server.bodies) == len(other.bodies) == 3
        for one in (server, other):  # each map at one server
            assert len({tuple(body["image_data"]) for body in one.bodies}) == 1
    assert len(engine.generate(problems, 2, SAMPLING)) == 6  # the other is gone
    assert len(server.bodies) == 9


def test_assignment_is_even_and_keeps_maps_together():
    homes = assign(["a", "b", "a", "c", "b", "a", "d", "a"], 2)
    assert sorted(Counter(homes).values()) == [4, 4]
    assert len({homes[i] for i in (0, 2, 5, 7)}) == 1
    assert Counter(assign(["a"] * 5, 2)) == {0: 3, 1: 2}  # one map alone is spread
    assert assign([], 3) == []


@pytest.mark.parametrize("fault", ["503", "slow", "reset", "truncate"])
def test_what_may_pass_is_tried_again(fault, problems, proxy, server, make):
    for _ in range(2):
        proxy.break_next("/generate", fault)
    seen = []
    groups = make(proxy.url).generate(problems, 2, SAMPLING, lambda index, group: seen.append(index))
    assert proxy.spoiled == 2
    assert [group.problem.uid for group in groups] == [problem.uid for problem in problems]  # none lost
    assert sorted(seen) == list(range(6))  # none doubled


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("hang", RolloutError, r"q-\d: no answer from http://\S+ within rollout.server.request_timeout_s=1"),
        ("400", RolloutError, r"q-\d: \S+/generate: HTTP 400: broken on purpose"),
        ("401", RolloutError, "the key is refused"),
        ("prompt", MismatchError, r"q-\d: answer 1 of 2: the server counts 49 prompt tokens, the trainer 48"),
        ("version", MismatchError, r"q-\d: answer 1 of 2: sampled with weights .*stale.*version 0"),
    ],
)
def test_what_is_wrong_is_one_error_within_its_deadline(fault, error, message, problems, proxy, server, make):
    engine = make(proxy.url, request_timeout_s=1.0)
    server.version = "0"
    engine.update_weights(0)
    proxy.break_next("/generate", fault)
    begin = time.monotonic()
    short = [dataclasses.replace(problem, question="How many lines?") for problem in problems]
    with pytest.raises(error, match=message):
        engine.generate(short, 2, SAMPLING)
    assert time.monotonic() - begin < 5


def test_replies_that_do_not_fit(policy, problems, server, make):
    def spoil(change):
        async def generate(body, original=fake.FakeServer._generate):
            reply = await original(server, body)
            change(reply[0])
            return reply

        return generate

    changes = {
        "4 tokens, 3 log-probabilities": lambda s: s["meta_info"]["output_token_logprobs"].pop(),
        "finish reason 'tool'": lambda s: s["meta_info"]["finish_reason"].update(type="tool"),
        "which is no stop token": lambda s: s.update(_last(s, 92)),
        "was banned": lambda s: s.update(_first(s, 261)),
        "not a finite number": lambda s: s["meta_info"]["output_token_logprobs"][0].__setitem__(0, float("nan")),
        "prompt token 1 is 7": lambda s: s["prompt_token_ids"].__setitem__(1, 7),
        "no such reply is known": lambda s: s.pop("output_ids"),
    }

    def _entries(sample, place, token):
        entries = [list(entry) for entry in sample["meta_info"]["output_token_logprobs"]]
        entries[place][1] = token
        ids = list(sample["output_ids"])
        ids[place] = token
        return {"output_ids": ids, "meta_info": sample["meta_info"] | {"output_token_logprobs": entries}}

    def _last(sample, token):
        return _entries(sample, -1, token)

    def _first(sample, token):
        return _entries(sample, 0, token)

    engine = make(server.url)
    engine.check()
    route = next(r for r in server.app.router.routes() if r.resource.canonical == "/generate")
    for message, change in changes.items():
        route._handler = server._handled(spoil(change))
        with pytest.raises(MismatchError, match=message):
            engine.generate(problems[:1], 2, SAMPLING)


def test_prompts_that_a_reply_repeats_are_read_once():
    """Whatever else is said of them, in answers and beside them."""
    said = 'a "prompt_token_ids": [1, 2]'
    samples = [{"text": said, "prompt_token_ids": ids} for ids in ([1, 2], [1, 2], [3], [], None)]
    for text in (json.dumps(samples), json.dumps(samples, separators=(",", ":")), json.dumps(samples[0]), "[]", '"x"'):
        assert read_json(text) == json.loads(text)
    first, second, third, *_ = (one["prompt_token_ids"] for one in read_json(json.dumps(samples)))
    assert first is second and first is not third
    for broken in ('[{"prompt_token_ids": [1, 2', '{"prompt_token_ids":', '[{"prompt_token_ids": [1, 2]'):
        with pytest.raises(json.JSONDecodeError):
            read_json(broken)


def test_pictures_are_encoded_once_and_in_threads(problems, server, make, monkeypatch):
    engine, encoded, threads = make(server.url), [], set()

    def noted(source):
        encoded.append(source)
        threads.add(threading.current_thread().name)
        return vision.read_image(source)

    monkeypatch.setattr(sglang_engine, "read_image", noted)
    for _ in range(2):
        engine.generate(problems, 1, SAMPLING)
    assert sorted(encoded) == sorted({problem.image for problem in problems})
    assert all(name.startswith("pictures") for name in threads)


def test_an_answer_cut_at_a_vision_start_is_scored(problems, server, make):
    start = make(server.url).policy.tokenizer.convert_tokens_to_ids("<|vision_start|>")
    assert make(server.url).logprobs(problems[0], (40, start)) == [[-0.5, -0.5]]


def test_a_prompt_longer_than_the_context_is_named_before_it_is_sent(problems, server, make):
    server.info["max_total_num_tokens"] = 58
    with pytest.raises(ConfigError, match=r"q-0: 52 prompt tokens and rollout.max_new_tokens=24 exceed the 50 tokens"):
        make(server.url).generate(problems, 2, SAMPLING)
    with pytest.raises(ConfigError, match="exceed the 50 tokens"):
        make(server.url).check(problems, 24)
    assert not server.bodies


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"info": {"version": "0.5.16"}}, "SGLang 0.5.16 is not supported; versions 0.5.17 to 0.5.23"),
        ({"info": {"version": "0.6.0rc1"}}, "SGLang 0.6.0rc1 is not supported"),
        ({"info": {"version": None}}, "SGLang None is not supported"),
        ({"model_info": {"model_type": "qwen3_vl"}}, "serves a model of type 'qwen3_vl', the trainer's is"),
    ],
)
def test_a_server_that_does_not_fit_is_named(change, message, server, make):
    for name, values in change.items():
        getattr(server, name).update(values)
    with pytest.raises(ConfigError, match=f"{server.url}.*{message}"):
        make(server.url).check()


def test_another_configuration_and_another_tokenizer_are_named(policy, server, make, tmp_path):
    config = json.loads((WARM_START / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 5
    (tmp_path / "config.json").write_text(json.dumps(config))
    server.model_info["model_path"] = str(tmp_path)
    with pytest.raises(ConfigError, match=r"text_config.num_hidden_layers is 5 there, 3 here"):
        make(server.url).check()
    server.model_info["model_path"] = str(WARM_START)
    make(server.url).check()
    server.tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: SimpleNamespace(ids=[1, 2, 3]))
    with pytest.raises(ConfigError, match="its tokenizer differs"):
        make(server.url).check()


def test_an_unreachable_url_is_named_at_once(make):
    begin = time.monotonic()
    with pytest.raises(RolloutError, match=r"http://127.0.0.1:9/server_info: ClientConnectorError"):
        make("http://127.0.0.1:9").check()
    assert time.monotonic() - begin < 5


def test_a_connection_that_was_idle_is_not_used_again(server, make, monkeypatch):
    """SGLang closes it after five seconds, perhaps while the next call is on its way."""
    monkeypatch.setattr("rewardmap.rollout.sglang_client._IDLE_S", 0.5)
    engine = make(server.url)
    for pause in (0.0, 0.0, 1.0):
        time.sleep(pause)
        engine.control("/flush_cache", {})
    first, second, third = server.peers
    assert first == second != third


def test_a_running_server_answers_with_the_weights_it_has(problems, server, tmp_path):
    (tmp_path / "keys.json").write_text('{"api_key": "sample-key", "admin_key": "admin-key"}')
    config = load_config(None, [f"rollout.server.keys_file='{tmp_path / 'keys.json'}'", "rollout.max_new_tokens=24"])
    with pytest.raises(ConfigError, match=r"serves '/elsewhere', which is not here; name that model with policy.model"):
        attach(config, server.url, problems)
    server.model_info["model_path"], server.version = str(WARM_START), "31"
    engine, weights = attach(config, server.url, problems)
    try:
        groups = engine.generate(problems, 1, SamplingParams(temperature=0.0, max_new_tokens=24))
    finally:
        engine.close()
    assert [group.rollouts[0].text for group in groups] == [r"\boxed{no}"] * 6
    assert weights == f"{server.url} {WARM_START} version 31"
    assert set(server.calls) == {"/tokenize", "/generate"}  # nothing that changes it
    assert server.keys["Bearer admin-key"] == 0 and server.keys["Bearer sample-key"] == len(server.calls)
