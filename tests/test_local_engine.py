"""The local engine samples what the model says, records the log-probabilities it sampled with, and repeats itself by
seed."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from rewardmap.config import ConfigError, PolicyConfig
from rewardmap.families import mrope_positions
from rewardmap.policy import load_policy
from rewardmap.rollout.engine import RolloutEngine
from rewardmap.rollout.local import LocalEngine, sample
from rewardmap.tiny import WARM_START
from rewardmap.transit.draw import draw_map, encode_png
from rewardmap.transit.generate import generate_network
from rewardmap.transit.questions import Balance, make_questions
from rewardmap.types import DataError, Problem, SamplingParams
from rewardmap_kernels import last_path, native, use_implementation

sys.path.append(str(Path(__file__).parent))
import forest_models


@pytest.fixture(scope="module")
def policy():
    return load_policy(WARM_START, PolicyConfig())


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    folder = tmp_path_factory.mktemp("maps")
    found = []
    for seed in range(2):
        rng = np.random.default_rng(seed)
        network = generate_network("tiny-hard", rng, f"a/{seed}")
        path = folder / f"{seed}.png"
        draw_map(network).save(path)
        found += [
            Problem(
                row["uid"],
                str(path),
                row["question"],
                row["type"],
                row["answer"],
                "",
                "",
                f"a/{seed}",
                "hard",
            )
            for row in make_questions(network, "tiny", rng, Balance())
        ]
    return found


def model_logprobs(policy, problem, prompt, response):
    """Log-probabilities [R, V] by transformers' own forward on one whole sequence."""
    ids = torch.tensor([[*prompt, *response]])
    image = policy.image(problem.image)
    with torch.no_grad():
        logits = policy.model(
            input_ids=ids,
            pixel_values=policy.pixel_values([image]),
            image_grid_thw=torch.tensor([image.grid_thw]),
            mm_token_type_ids=(ids == policy.model.config.image_token_id).int(),
        ).logits[0]
    return torch.log_softmax(logits[len(prompt) - 1 : -1], -1)


def test_logprobs_and_stops(policy, problems):
    engine = LocalEngine(policy, batch_sequences=24)
    assert isinstance(engine, RolloutEngine)
    engine.update_weights(7)
    groups = engine.generate(problems[5:13], 4, SamplingParams(temperature=0.7, max_new_tokens=12, seed=3))
    assert [group.problem.uid for group in groups] == [problem.uid for problem in problems[5:13]]
    reasons = set()
    for group in groups:
        assert len(group.rollouts) == 4
        for rollout in group.rollouts:
            logprobs = model_logprobs(policy, group.problem, group.prompt_token_ids, rollout.token_ids)
            tempered = torch.log_softmax(logprobs / 0.7, -1).gather(-1, torch.tensor(rollout.token_ids)[:, None])
            np.testing.assert_allclose(rollout.rollout_logprobs, tempered.squeeze(1), atol=2e-4)
            stopped = rollout.token_ids[-1] in policy.stop_token_ids
            assert (rollout.finish_reason == "stop") == stopped
            assert stopped or len(rollout.token_ids) == 12
            assert not set(rollout.token_ids[:-1]) & set(policy.stop_token_ids)
            assert rollout.policy_version == 7
            reasons.add(rollout.finish_reason)
    assert reasons == {"stop", "length"}  # routes with a transfer are longer than 12 tokens


def test_greedy_is_the_argmax(policy, problems):
    for group in LocalEngine(policy, 512).generate(problems, 1, SamplingParams(temperature=0, max_new_tokens=24)):
        (rollout,) = group.rollouts
        logprobs = model_logprobs(policy, group.problem, group.prompt_token_ids, rollout.token_ids)
        logprobs[:, list(policy.banned_token_ids)] = -torch.inf
        chosen = logprobs.gather(-1, torch.tensor(rollout.token_ids)[:, None]).squeeze(1)
        assert (logprobs.max(-1).values - chosen).max() < 1e-4


def test_prompts_that_are_many_tokens_decode_in_smaller_batches(policy, problems, monkeypatch):
    greedy = SamplingParams(temperature=0, max_new_tokens=24)
    whole = LocalEngine(policy, 512).generate(problems, 2, greedy)
    longest = max(len(group.prompt_token_ids) for group in whole)
    sizes, prefill = [], LocalEngine._prefill

    def noted(self, asked, prompts, group_size):
        sizes.append((len(asked), group_size * max(len(prompt.token_ids) for prompt in prompts)))
        return prefill(self, asked, prompts, group_size)

    monkeypatch.setattr(LocalEngine, "_prefill", noted)
    limit = 7 * longest
    parts = LocalEngine(policy, 512, batch_tokens=limit).generate(problems, 2, greedy)
    assert [[r.token_ids for r in g.rollouts] for g in parts] == [[r.token_ids for r in g.rollouts] for g in whole]
    assert sum(count for count, _ in sizes) == len(problems) and len(sizes) < len(problems) / 2
    assert all(count * tokens <= limit for count, tokens in sizes)
    sizes.clear()
    LocalEngine(policy, 512, batch_tokens=1).generate(problems[:3], 2, greedy)
    assert [count for count, _ in sizes] == [1, 1, 1]


def test_limits_of_a_published_processor_give_way_to_the_configuration_s(tmp_path):
    shutil.copytree(WARM_START, tmp_path / "model")
    [named] = [p for p in (tmp_path / "model").glob("*processor*.json") if "size" in json.loads(p.read_text())]
    published = json.loads(named.read_text()) | {"min_pixels": 3136, "max_pixels": 12_845_056}
    named.write_text(json.dumps({key: value for key, value in published.items() if key != "size"}))
    loaded = load_policy(str(tmp_path / "model"), PolicyConfig(min_pixels=3136, max_pixels=100_000))
    _, rows, columns = loaded.image(encode_png(Image.new("RGB", (1000, 1000)))).grid_thw
    patch = loaded.image_processor.patch_size
    assert 80_000 < rows * columns * patch * patch <= 100_000


def without_layer(folder):
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if ".layers.1." not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def without_shard(folder):
    (folder / "model.safetensors").unlink()
    places = {"lm_head.weight": "model-00001-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def cut_short(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_layer, r"lacks 12 of the model's weights, the first 'model\.language_model\.layers\.1\."),
        (without_shard, r"cannot be loaded \(.*model-00001-of-00002\.safetensors"),
        (cut_short, r"cannot be loaded \(Error while deserializing header"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"cannot be loaded \(.*no file named model"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), r"cannot be loaded \(.*image processor"),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"'<\|image_pad\|>' is not its tokenizer's token 261"),
    ],
    ids=["layer", "shard", "half", "weights", "processor", "tokenizer"],
)
def test_a_checkpoint_that_is_not_whole_is_refused(damage, message, tmp_path):
    shutil.copytree(WARM_START, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(ConfigError, match=rf"policy\.model='.*model'.*{message}.*whole checkpoint"):
        load_policy(str(tmp_path / "model"), PolicyConfig())


def test_same_seed_same_answers(policy, problems):
    engine = LocalEngine(policy, 64)
    sampling = SamplingParams(max_new_tokens=8, seed=5)
    first, second = (engine.generate(problems[:6], 4, sampling) for _ in range(2))
    assert first == second
    other = engine.generate(problems[:6], 4, SamplingParams(max_new_tokens=8, seed=6))
    assert [g.rollouts for g in other] != [g.rollouts for g in first]


def test_sampling_follows_the_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 5.0]]).repeat(20_000, 1)
    generator = torch.Generator().manual_seed(0)
    token, logprob = sample(logits, SamplingParams(temperature=2.0), [4], generator)
    full = torch.log_softmax(logits[0] / 2, -1)
    torch.testing.assert_close(logprob, full[token])  # of the full distribution, banned token included
    allowed = torch.softmax(logits[0, :4] / 2, -1)
    frequency = torch.bincount(token, minlength=5) / len(token)
    assert frequency[4] == 0
    torch.testing.assert_close(frequency[:4], allowed, atol=0.015, rtol=0)


@pytest.mark.parametrize(("cut", "kept"), [({"top_k": 2}, {0, 1}), ({"top_p": 0.6}, {0}), ({"top_p": 0.85}, {0, 1})])
def test_cuts_keep_the_most_likely(cut, kept):
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(2000, 1)  # probabilities 0.64, 0.24, 0.09, 0.03
    token, _ = sample(logits, SamplingParams(**cut), [], torch.Generator().manual_seed(0))
    assert set(token.tolist()) == kept


def test_positions_are_those_of_transformers(policy, problems):
    encoded = policy.encode(problems[0])
    ids = torch.tensor([encoded.token_ids])
    expected, _ = policy.model.model.get_rope_index(
        ids,
        (ids == policy.model.config.image_token_id).int(),
        image_grid_thw=torch.tensor([policy.image(problems[0].image).grid_thw]),
    )
    np.testing.assert_array_equal(encoded.position_ids, expected[:, 0])
    wide = mrope_positions(12, 2, (1, 2, 3))
    assert wide[:, 8].tolist() == [5, 5, 5]  # 2 + the longer side


def test_shared_prefix_ends_with_the_image(policy, problems):
    first, second = policy.encode(problems[0]), policy.encode(problems[5])
    end = policy.tokenizer.convert_tokens_to_ids("<|vision_end|>")
    shared = first.token_ids.index(end) + 1
    assert first.token_ids[:shared] == second.token_ids[:shared]
    assert first.token_ids.count(policy.model.config.image_token_id) == first.image_tokens == 25


def test_placeholder_in_a_question_is_refused(policy, problems):
    bad = Problem("bad-1", problems[0].image, "what is <|image_pad|>?", "TorF1", 1, "", "", "a/0", "easy")
    with pytest.raises(DataError, match=r"bad-1.*2 image placeholders"):
        policy.encode(bad)


def test_broken_picture_is_named(policy, tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"not a picture")
    bad = Problem("bad-2", str(path), "who?", "TorF1", 1, "", "", "a/0", "easy")
    with pytest.raises(DataError, match=r"broken\.png"):
        policy.encode(bad)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("by", ["native", "torch"])
def test_decoding_is_the_models_forward_pass(family, by, problems):
    """With padded prompts, answers that end early, and answers beyond the first room for keys and values. In float32,
    where alone there is C++, at most twice as far from float64 as transformers' own pass."""
    if by == "native" and native.unavailable_reason():
        pytest.skip(native.unavailable_reason())
    exact = forest_models.build(family)
    policy = forest_models.build(family, dtype=torch.float32) if by == "native" else exact
    asked = [replace(problem, question=problem.question[: 20 + 9 * i]) for i, problem in enumerate(problems[:6])]
    with use_implementation(by):
        groups = LocalEngine(policy, 64).generate(asked, 4, SamplingParams(max_new_tokens=80, seed=1))
    if by == "native":
        assert last_path("decode_attention") == ("native", ("decode_attention",))
    lengths = [len(rollout.token_ids) for group in groups for rollout in group.rollouts]
    assert min(lengths) < 64 and max(lengths) == 80 and len({len(group.prompt_token_ids) for group in groups}) > 1
    ours = eager = 0.0
    for group in groups:
        for rollout in group.rollouts:
            index = torch.tensor(rollout.token_ids)[:, None]
            wanted, plain = (
                model_logprobs(one, group.problem, group.prompt_token_ids, rollout.token_ids).gather(-1, index)[:, 0]
                for one in (exact, policy)
            )
            ours = max(ours, float((torch.tensor(rollout.rollout_logprobs) - wanted).abs().max()))
            eager = max(eager, float((plain - wanted).abs().max()))
    assert ours <= 2 * eager + 2e-6  # what is recorded is float32
