"""Which rank computes what: equal counts, nothing lost or cut without need, ranks that finish together."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewardmap.policy import EncodedPrompt
from rewardmap.tiny import build_tokenizer, model_config
from rewardmap.train.balance import CostModel, balance
from rewardmap.train.forest import Answers, pack_forest
from rewardmap.train.trees import grow

QWEN_7B = CostModel(
    token=6.53e9 * 8, pair=28 * 4 * 3584 * 4, row=545e6 * 6, patch=0.63e9 * 8, patch_pair=4 * 5120 * 4, merge=4
)


def prompt(length: int, image_tokens: int = 0, first: int = 0, uid: str = "p") -> EncodedPrompt:
    ids = (*range(image_tokens), *range(first, first + length - image_tokens))
    return EncodedPrompt(ids, np.tile(np.arange(length), (3, 1)), image_tokens, uid)


def make_batch(seed: int, maps: int, questions: int, group: int, scale: int = 1) -> list[Answers]:
    """Maps of 1,000 to 6,000 tokens, log-normal answers up to 2,000: as one sees them in such runs."""
    rng, batch, number = np.random.default_rng(seed), [], 0
    for picture in range(maps):
        image = int(rng.integers(1000, 6000)) // scale
        for question in range(questions):
            text = int(rng.integers(60, 200)) // scale + 1
            lengths = np.clip(rng.lognormal(np.log(400), 0.7, group), 20, 2000).astype(int) // scale + 1
            responses = tuple(tuple(rng.integers(10_000, 20_000, length).tolist()) for length in lengths)
            own = prompt(image + text, image, 30_000 * (question + 1), f"m{picture}q{question}")
            batch.append(Answers(own, f"map{picture}", responses, tuple(range(number, number + group))))
            number += group
    return batch


@pytest.mark.parametrize("vision", [True, False], ids=["trainable-tower", "frozen-tower"])
@pytest.mark.parametrize(("maps", "questions"), [(128, 1), (64, 2), (32, 4)])
def test_ranks_finish_together(maps, questions, vision):
    """The slowest of 8 ranks within 10 % of the mean, also where ranks wait for each other at every micro-batch."""
    cost = QWEN_7B if vision else CostModel(QWEN_7B.token, QWEN_7B.pair, QWEN_7B.row)
    for seed in range(3):
        trees = grow(make_batch(seed, maps, questions, 8))
        plan = balance(trees, 65_536, 8, cost)
        work = np.array([[sum(map(cost, trees)) for trees in rows] for rows in plan])
        mean = work.sum(1).mean()
        assert work.sum(1).max() <= 1.02 * mean
        assert work.max(0).sum() <= 1.10 * mean, "micro-batch by micro-batch"


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(0, 9), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5))
def test_nothing_is_lost_and_counts_are_equal(seed, maps, questions, group, ranks):
    trees = grow(make_batch(seed, maps, questions, group, scale=50))
    budget = random.Random(seed).choice([200, 400, 5000])
    budget = max([budget, *(branch.num_inputs for tree in trees for branch in tree.branches)])
    plan = balance(trees, budget, ranks, QWEN_7B)
    assert len(plan) == ranks and len({len(rows) for rows in plan}) == 1
    for rows in plan:
        assert all(sum(tree.tokens for tree in trees) <= budget for trees in rows)
        filled = [bool(trees) for trees in rows]
        assert filled == sorted(filled, reverse=True)
    pieces = [tree for rows in plan for trees in rows for tree in trees]
    sequences = [branch.sequence for tree in pieces for branch in tree.branches]
    assert sorted(sequences) == list(range(maps * questions * group))
    whole = {tree.image for tree in trees if tree.tokens <= budget}
    assert sum(piece.image in whole for piece in pieces) == len(whole), "a tree that fits was cut"
    assert plan == balance(trees, budget, ranks, QWEN_7B)


def test_a_tree_is_cut_into_the_fewest_even_pieces():
    responses = tuple((1000 + i, *range(2000, 2099)) for i in range(8))
    (tree,) = grow([Answers(prompt(500), "a", responses, tuple(range(8)))])
    assert tree.tokens == 500 + 8 * 99
    assert [len(piece.branches) for piece in (row[0] for row in balance([tree], 1000)[0])] == [4, 4]
    with pytest.raises(ValueError, match=r"p: one prompt with one answer takes 599 tokens.*micro_batch=598"):
        balance([tree], 598)


def test_every_rank_packs_its_part_of_the_same_plan():
    batch = make_batch(0, 3, 2, 4, scale=50)
    ranks = [pack_forest(batch, 400, ranks=5, rank=rank, cost=QWEN_7B) for rank in range(5)]
    assert len({len(forests) for forests in ranks}) == 1
    forests = [forest for forests in ranks for forest in forests]
    found = np.concatenate([forest.sequence[forest.loss_mask > 0].numpy() for forest in forests])
    expected = [
        n for item in batch for n, response in zip(item.sequences, item.responses, strict=True) for _ in response
    ]
    assert sorted(found) == expected
    fillers = [forest for forest in forests if not forest.loss_mask.any()]
    assert all(len(forest.input_ids) == len(forest.target) == 1 and not forest.images for forest in fillers)
    assert sum(forest.logical_tokens for forest in fillers) == 0


def test_an_empty_batch_has_no_micro_batches():
    assert balance([], 100, 3) == [[], [], []]
    assert pack_forest([], 100) == []


def test_the_cost_model_counts_a_configuration():
    config = model_config(build_tokenizer())
    cost = CostModel.of(config, freeze_vision=False)
    layer = 4 * 128 * 128 + 3 * 128 * 384
    assert cost.token == 3 * 2 * 3 * layer
    assert cost.pair == 3 * 4 * 3 * 128
    assert cost.row == 6 * 128 * config.text_config.vocab_size
    assert cost.patch == 3 * 2 * (4 * 64**2 + 3 * 64 * 128) and cost.merge == 4
    assert CostModel.of(config, freeze_vision=True).patch == 0
    adapters, both = (
        CostModel.of(config, freeze_vision=False, adapters=True, reference=reference) for reference in (False, True)
    )
    assert (adapters.token, adapters.pair, adapters.row) == (cost.token * 2 / 3, cost.pair, cost.row * 2 / 3)
    assert (both.token, both.pair, both.row) == (cost.token, cost.pair * 4 / 3, cost.row)
    assert both.patch == adapters.patch == cost.patch
    assert CostModel.of(config, freeze_vision=True, checkpointing=True).token == cost.token * 4 / 3
