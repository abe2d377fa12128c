"""A packed forest computes what the sequences compute one by one: loss, log-probabilities and every gradient, for every
family of models, whatever the forest and however it is split."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewardmap import families
from rewardmap.config import ConfigError
from rewardmap.policy import assemble
from rewardmap.tiny import build_tokenizer
from rewardmap.train.balance import CostModel
from rewardmap.train.forest import pack_forest
from rewardmap.train.forward import Vision, gather_rows, response_hidden

sys.path.append(str(Path(__file__).parent))
import forest_models as models

CASES = [(family, frozen) for family in models.FAMILIES for frozen in ((True, False) if "vl" in family else (True,))]
NAMES = [f"{family}-{'frozen' if frozen else 'trainable'}" for family, frozen in CASES]
POLICIES = {}


def policy_of(family, frozen):
    if (family, frozen) not in POLICIES:
        POLICIES[family, frozen] = models.build(family, frozen)
    return POLICIES[family, frozen]


def weight_of(sequence):
    """One weight per sequence, so that gradients do not average out."""
    return 0.5 + 0.25 * (sequence.double() % 7)


def law(policy, batch):
    """(logprobs by sequence, loss, gradients) of the unshared sequences."""
    rows = models.unshared_logprobs(policy, batch)
    loss = sum(weight_of(torch.tensor(number)) * row.sum() for number, row in rows.items())
    loss.backward()
    return {number: row.detach() for number, row in rows.items()}, loss.item(), models.gradients(policy)


def packed(policy, batch, budget, ranks=1, share=True):
    """The same by packed forests, gradients summed over the ranks of a data-parallel group."""
    rows, total = {}, 0.0
    cost = CostModel.of(policy.model.config, freeze_vision=policy.freeze_vision)
    for rank in range(ranks):
        forests = pack_forest(batch, budget, ranks=ranks, rank=rank, cost=cost, share=share)
        vision = Vision(policy, forests)
        for forest in forests:
            hidden = response_hidden(policy, forest, vision)
            logits = policy.model.lm_head(hidden)
            logits = logits.float() if logits.dtype.itemsize == 2 else logits
            logprobs = torch.log_softmax(logits, -1).gather(-1, forest.target[:, None]).squeeze(1)
            loss = (weight_of(forest.sequence) * forest.loss_mask * logprobs).sum()
            loss.backward()
            total += loss.item()
            for number in forest.sequence[forest.loss_mask > 0].unique().tolist():
                assert number not in rows
                rows[number] = logprobs.detach()[forest.sequence == number]
        vision.backward()
    return rows, total, models.gradients(policy)


def assert_equal(found, expected, bound):
    """Gradients by the largest entry of each parameter's."""
    assert found[1] == pytest.approx(expected[1], rel=bound, abs=bound)
    assert found[0].keys() == expected[0].keys()
    for number, row in expected[0].items():
        torch.testing.assert_close(found[0][number].double(), row.double(), rtol=bound, atol=bound)
    assert found[2].keys() == expected[2].keys()
    for name, gradient in expected[2].items():
        scale = max(float(gradient.abs().max()), 1e-6)
        assert (found[2][name] - gradient).abs().max() <= bound * scale, name


@pytest.mark.parametrize(("family", "frozen"), CASES, ids=NAMES)
@settings(max_examples=8, deadline=None, database=None, derandomize=True)
@given(seed=st.integers(0, 10_000), split=st.booleans(), ranks=st.integers(1, 3), share=st.booleans())
def test_random_forests_in_float64(family, frozen, seed, split, ranks, share):
    policy = policy_of(family, frozen)
    batch = models.random_batch(policy, np.random.default_rng(seed))
    longest = max(len(item.prompt.token_ids) + max(map(len, item.responses)) for item in batch)
    found = packed(policy, batch, longest if split else 10_000, ranks, share)
    assert_equal(found, law(policy, batch), 1e-6)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_float32(family):
    policy = models.build(family, False, torch.float32)
    batch = models.random_batch(policy, np.random.default_rng(1), prompts=4)
    exact = models.build(family, False)
    exact.model.load_state_dict(policy.model.state_dict())
    assert_equal(packed(policy, batch, 10_000), law(exact, batch), 1e-5)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_bfloat16_errs_at_most_twice_as_much_as_eager(family):
    policy = models.build(family, False, torch.bfloat16)
    batch = models.random_batch(policy, np.random.default_rng(2), prompts=6)
    exact = models.build(family, False)
    exact.model.load_state_dict(policy.model.state_dict())
    expected, eager, found = law(exact, batch), law(policy, batch), packed(policy, batch, 10_000)

    def errors(got):
        logprobs = torch.cat([got[0][n].double() - row for n, row in expected[0].items()])
        gradient = torch.cat([(got[2][name] - value).flatten() for name, value in expected[2].items()])
        return float(logprobs.norm()), float(gradient.norm())

    for ours, theirs in zip(errors(found), errors(eager), strict=True):
        assert ours <= 2 * theirs


@pytest.mark.parametrize(("family", "frozen"), CASES, ids=NAMES)
@pytest.mark.parametrize("reentrant", [False, True], ids=["checkpointed", "checkpointed-reentrant"])
def test_activation_checkpointing(family, frozen, reentrant):
    policy = models.build(family, frozen)
    batch = models.random_batch(policy, np.random.default_rng(5))
    expected = law(policy, batch)
    policy.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    policy.model.enable_input_require_grads()
    policy.model.train()
    assert_equal(packed(policy, batch, 10_000), expected, 1e-6)


@pytest.mark.parametrize(
    ("family", "backend"),
    [
        pytest.param("qwen2_5_vl", "aot_eager", marks=pytest.mark.slow),
        ("qwen3_vl", "aot_eager"),
        pytest.param("qwen3_vl", "inductor", marks=pytest.mark.slow),
    ],
)
def test_compiled_layers(family, backend):
    policy = models.build(family, False)
    batch = models.random_batch(policy, np.random.default_rng(6))
    expected = law(policy, batch)
    for layer in policy.text_model.layers:
        layer.compile(backend=backend, dynamic=True, fullgraph=True)
    assert_equal(packed(policy, batch, 10_000), expected, 1e-6)


def test_other_forests_are_not_compiled_again():
    """What depends on the forest is made before the compiled layers run: only sizes differ, and they are dynamic."""
    policy = models.build("qwen2", True)
    counters = torch._dynamo.utils.counters
    for layer in policy.text_model.layers:
        layer.compile(backend="eager", dynamic=True, fullgraph=True)
    seen = []
    for seed in range(6):
        batch = models.random_batch(policy, np.random.default_rng(seed), prompts=3 + seed)
        (forest,) = pack_forest(batch, 10_000)
        response_hidden(policy, forest, Vision(policy, [forest]))
        seen.append(counters["stats"]["unique_graphs"])
    assert seen[1:] == seen[1:2] * 5


@pytest.mark.parametrize(("family", "frozen"), CASES, ids=NAMES)
def test_the_route_by_flash_attention(family, frozen, monkeypatch):
    """Its calls and their merging in plain torch, the tower's segments too."""
    policy = policy_of(family, frozen)
    batch = models.random_batch(policy, np.random.default_rng(8), prompts=4)
    expected = law(policy, batch)
    called = []

    def through(function):
        def call(*arguments, **options):
            called.append(function.__name__)
            return function(*arguments, **options, route="plain")

        return call

    for function in (families.tree_attention, families.segment_attention):
        monkeypatch.setattr(families, function.__name__, through(function))
    families.AttentionInterface.register(families.TOWER_ATTENTION, families._tower_attention)
    if policy.vision_tower is not None:
        policy._features._kept.clear()
        monkeypatch.setattr(policy.vision_tower.config, "_attn_implementation", families.TOWER_ATTENTION)
    assert_equal(packed(policy, batch, 10_000), expected, 1e-6)
    assert set(called) == {"tree_attention", *(("segment_attention",) if "vl" in family else ())}


def test_positions_of_qwen3_vl_are_those_of_transformers():
    policy = policy_of("qwen3_vl", True)
    rng = np.random.default_rng(0)
    item = next(x for x in models.random_batch(policy, rng, 9) if x.image is not None)
    ids = torch.tensor([item.prompt.token_ids])
    expected, _ = policy.model.model.get_rope_index(
        ids,
        (ids == policy.model.config.image_token_id).int(),
        image_grid_thw=torch.tensor([policy.image(item.image).grid_thw]),
    )
    np.testing.assert_array_equal(item.prompt.position_ids, expected[:, 0])


def test_padding_is_masked_in_a_plain_batch():
    """The attention function is the model's own where no forest is given, padding included."""
    policy = policy_of("qwen2", True)
    ids = torch.tensor([[1, 2, 3, 4]])
    alone = policy.model(input_ids=ids).logits[0]
    padded = policy.model(
        input_ids=torch.tensor([[9, 9, 1, 2, 3, 4]]),
        attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1]]),
        position_ids=torch.tensor([[0, 0, 0, 1, 2, 3]]),
    ).logits[0, 2:]
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-9)


def test_repeated_rows_sum_in_float32_and_in_order():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 5, generator=generator).bfloat16().requires_grad_()
    index = torch.tensor([3, 3, 0, 6, 3, 0, 3, 3])
    grad = torch.randn(8, 5, generator=generator).bfloat16()
    out = gather_rows(hidden, index)
    assert torch.equal(out, hidden[index])
    out.backward(grad)
    expected = torch.zeros(7, 5)
    for row, value in zip(index.tolist(), grad.float(), strict=True):
        expected[row] += value
    assert torch.equal(hidden.grad, expected.bfloat16())
    torch.autograd.gradcheck(
        lambda x: gather_rows(x, index), torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    )


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"use_sliding_window": True, "max_window_layers": 0}, "'qwen2' with sliding_attention"),
        ({"layer_types": ["full_attention", "linear_attention", "full_attention"]}, "'qwen2' with linear_attention"),
    ],
)
def test_attention_that_cannot_share_is_refused(change, name):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = build_tokenizer()
    config = models._text(tokenizer)
    if "layer_types" in change:
        model = Qwen2ForCausalLM(Qwen2Config(**config))
        model.config.layer_types = change["layer_types"]
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**config, **change))
    with pytest.raises(ConfigError, match=f"{name}: prefixes can be shared under full attention only"):
        assemble(model, tokenizer, None, True)


def test_a_linear_attention_family_is_refused():
    from transformers import Qwen3NextConfig

    config = Qwen3NextConfig(num_hidden_layers=4)
    model = type("Model", (), {"config": config})()
    with pytest.raises(ConfigError, match="'qwen3_next' with linear_attention"):
        assemble(model, build_tokenizer(), None, True)


def test_a_text_model_does_not_pretend_to_see():
    from rewardmap.types import Problem

    with pytest.raises(ConfigError, match=r"p7: a 'qwen2' cannot see the map"):
        policy_of("qwen2", True).encode(Problem("p7", "map.png", "who?", "TorF1", 1, "", "", "a/b", "easy"))
