"""A packed forest computes what the unshared sequences compute: log-probabilities and every gradient."""

import numpy as np
import pytest
import torch

from rewardmap.policy import EncodedPrompt
from rewardmap.tiny import build_tiny
from rewardmap.train.forest import Answers, pack_forest
from rewardmap.train.forward import response_hidden
from rewardmap.transit.draw import draw_map
from rewardmap.transit.generate import generate_network
from rewardmap.types import Problem
from rewardmap_kernels.tree_attention import tree_mask


def picture(seed: int, folder) -> str:
    path = folder / f"{seed}.png"
    draw_map(generate_network("tiny-middle", np.random.default_rng(seed), f"a/{seed}")).save(path)
    return str(path)


@pytest.fixture(params=[True, False], ids=["frozen-tower", "trainable-tower"])
def policy(request):
    policy = build_tiny(3, freeze_vision=request.param)
    policy.model.double()
    return policy


def make_batch(policy, folder, questions=((0, "who?"), (0, "what is there on this map?"), (1, "why"))):
    """Three questions about two maps, with answers of 1 to 7 tokens."""
    rng, batch, number = np.random.default_rng(0), [], 0
    stop = policy.stop_token_ids[0]
    for place, (image, text) in enumerate(questions):
        problem = Problem(f"q{place}", picture(image, folder), text, "TorF1", 1, "", "", "a/b", "easy")
        responses = tuple((*map(int, rng.integers(0, 200, length)), stop) for length in rng.integers(0, 7, 4))
        numbers = tuple(range(number, number + len(responses)))
        number += len(responses)
        batch.append(Answers(policy.encode(problem), problem.image, responses, numbers))
    return batch


def logprobs_of(policy, hidden, targets):
    return torch.log_softmax(policy.model.lm_head(hidden), -1).gather(-1, targets[:, None]).squeeze(1)


def gradients(policy):
    return {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}


def unshared(policy, batch):
    """The law: transformers' own forward, one sequence at a time. Log-probabilities by sequence."""
    rows = {}
    for item in batch:
        for number, response in zip(item.sequences, item.responses, strict=True):
            ids = torch.tensor([[*item.prompt.token_ids, *response]])
            image = policy.image(item.image)
            out = policy.model(
                input_ids=ids,
                pixel_values=policy.pixel_values([image]).double(),
                image_grid_thw=torch.tensor([image.grid_thw]),
                mm_token_type_ids=(ids == policy.model.config.image_token_id).int(),
            )
            length = len(response)
            logprobs = torch.log_softmax(out.logits[0, -length - 1 : -1], -1)
            rows[number] = logprobs.gather(-1, torch.tensor(response)[:, None]).squeeze(1)
    return rows


@pytest.mark.parametrize("budget", [10_000, 110, 75], ids=["one-row", "rows", "cut-trees"])
def test_equals_the_unshared_sequences(policy, tmp_path, budget):
    batch = make_batch(policy, tmp_path)
    weight = torch.linspace(0.5, 2.0, 12, dtype=torch.float64)  # one per sequence: gradients do not average out
    expected = unshared(policy, batch)
    sum(weight[number] * row.sum() for number, row in expected.items()).backward()
    expected_gradients = gradients(policy)
    policy.model.zero_grad()

    forests = pack_forest(batch, budget)
    assert all(len(forest.input_ids) <= budget for forest in forests)
    assert (len(forests) == 1) == (budget == 10_000)
    for forest in forests:
        got = logprobs_of(policy, response_hidden(policy, forest), forest.target)
        for number in forest.sequence.unique().tolist():
            torch.testing.assert_close(got[forest.sequence == number], expected[number], rtol=0, atol=1e-6)
        (weight[forest.sequence] * got).sum().backward()
    found = gradients(policy)
    assert found.keys() == {name for name, p in policy.model.named_parameters() if p.requires_grad}
    for name, gradient in found.items():
        scale = expected_gradients[name].abs().max()
        assert (gradient - expected_gradients[name]).abs().max() <= 1e-6 * scale + 1e-12, name


def test_every_prefix_stands_once(tmp_path):
    policy = build_tiny(0, freeze_vision=True)
    batch = make_batch(policy, tmp_path)
    (forest,) = pack_forest(batch, 10_000)
    image_tokens = int((forest.input_ids == policy.model.config.image_token_id).sum())
    assert image_tokens == 25 * len({item.image for item in batch})
    assert len(forest.images) == 2
    answers = sum(len(response) for item in batch for response in item.responses)
    assert len(forest.target) == answers
    prompts = sum(len(item.prompt.token_ids) * len(item.responses) for item in batch)
    assert forest.logical_tokens == prompts + answers - 12


def test_without_the_subtree_bound_answers_see_each_other(tmp_path):
    """The mask matters: a plain causal mask over the packed row gives other numbers."""
    policy = build_tiny(0, freeze_vision=True)
    (forest,) = pack_forest(make_batch(policy, tmp_path), 10_000)
    right = response_hidden(policy, forest)
    object.__setattr__(forest, "subtree_end", torch.full_like(forest.subtree_end, len(forest.input_ids)))
    assert (response_hidden(policy, forest) - right).abs().max() > 0.01


def prompt(length: int) -> EncodedPrompt:
    return EncodedPrompt(tuple(range(length)), np.tile(np.arange(length), (3, 1)))


def test_too_small_a_budget_is_named():
    with pytest.raises(ValueError, match=r"takes 53 tokens.*max_tokens_per_micro_batch=40"):
        pack_forest([Answers(prompt(50), "a", ((1, 2, 3, 4), (1, 2)), (0, 1))], 40)


def test_an_empty_answer_is_refused():
    with pytest.raises(ValueError, match="no tokens"):
        pack_forest([Answers(prompt(5), "a", ((), (1,)), (0, 1))], 40)


def test_mask_of_a_small_forest():
    # prompt of 2 tokens, answers of 2 and 1 tokens; then a lone token
    mask = tree_mask(torch.tensor([5, 5, 4, 4, 5, 6]))
    assert mask.trees == ((0, 5), (5, 6))
    expected = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]])
    assert torch.equal(mask.visible[0].int(), expected)


@pytest.mark.parametrize("ends", [[3, 2], [0, 2], [2, 3, 3]])
def test_a_broken_forest_is_refused(ends):
    with pytest.raises(ValueError, match="subtree_end"):
        tree_mask(torch.tensor(ends))
