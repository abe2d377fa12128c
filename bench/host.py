"""CPU milliseconds that a training step spends on the host, stage by stage, at real lengths; no model computes.

    python bench/host.py                  # prints the table of docs/scaling.md
    python bench/host.py --cases 64x8x6000 --repeat 5

A case is prompts x answers to each x image tokens. Answers have 100 to 2,000 tokens of a vocabulary of 151,936, with
log-probabilities; four drawn maps, resized to the case's size. Processor time of this process, the least of several
tries; what is remembered from one step to the next (pictures, prompts) has rows of its own. Of a stage that ranks
share, rank 0's part.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from records import processor
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

from rewardmap.config import StageConfig
from rewardmap.curriculum import Curriculum
from rewardmap.policy import Policy, assemble
from rewardmap.report import MetricsLog
from rewardmap.rewards import Rubric
from rewardmap.rewards.rubric import MODES
from rewardmap.rollout.sglang_reply import read_group, read_json
from rewardmap.tiny import build_tokenizer, model_config
from rewardmap.train.balance import CostModel
from rewardmap.train.examine import networks_for
from rewardmap.train.forest import Answers, pack_forest
from rewardmap.train.ranks import groups_from_bytes, groups_to_bytes
from rewardmap.train.scoring import GroupScores, join
from rewardmap.train.sound import fault_of
from rewardmap.train.step_metrics import batch_flop, batch_sums, step_metrics
from rewardmap.transit.questions import gold_response
from rewardmap.transit.reasonmap import MapData, load_dataset, write_dataset
from rewardmap.types import KINDS, Problem, Rollout, RolloutGroup
from rewardmap_kernels import group_advantage
from rewardmap_kernels.tree_attention import tree_mask
from rewardmap_kernels.tree_tiles import build_tiles

CASES = ("64x8x6000", "64x8x16000")
MAPS, VOCABULARY, BUDGET, RANKS = 4, 151_936, 40_960, (1, 2, 8)
COST = CostModel(token=6e9, pair=4 * 36 * 2048, row=6 * 2048 * VOCABULARY)
"""Of about a 3B."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES, help="PROMPTSxANSWERSxIMAGE_TOKENS")
    parser.add_argument("--repeat", type=int, default=3)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(f"{folder}/data", maps={"train": MAPS}, preset="full")
        data = load_dataset(f"{folder}/data")
        columns = [dict(measure(data, *map(int, case.split("x")), chosen.repeat)) for case in chosen.cases]
    print(f"| on {processor()} | {' | '.join(case.replace('x', ' x ') for case in chosen.cases)} |")
    print("| --- |" + " ---: |" * len(columns))
    for stage in columns[0]:
        print(f"| {stage} | {' | '.join(f'{column[stage]:,.1f}' for column in columns)} |")


def measure(data: MapData, prompts: int, size: int, tokens: int, repeat: int) -> Iterator[tuple[str, float]]:
    """(stage, milliseconds), in the order of a step."""

    def timed(work: Callable[[], Any], times: int = repeat) -> tuple[float, Any]:
        least, result = float("inf"), None
        for _ in range(times):
            start = time.process_time()
            result = work()
            least = min(least, time.process_time() - start)
        return 1e3 * least, result

    policy, rng, questions = build(tokens), np.random.default_rng(0), data.problems
    stage = StageConfig(name="all", steps=100, question_kinds=KINDS, maps_per_step=MAPS)
    curriculum = Curriculum(questions, [stage], prompts, seed=0)
    curriculum.sample()
    yield "draw and look ahead", timed(lambda: (curriculum.peek(), curriculum.sample()))[0]
    problems = [questions[number * len(questions) // prompts] for number in range(prompts)]
    pictures = list(dict.fromkeys(problem.image for problem in problems))
    yield "decode a new picture", timed(lambda: [policy.image(one) for one in pictures], 1)[0] / len(pictures)
    yield "a new prompt: template, tokens, mRoPE", timed(lambda: list(map(policy.encode, problems)), 1)[0] / prompts
    groups = answer(policy, problems, size, rng)
    replies = [as_reply(group) for group in groups]

    def read() -> list[RolloutGroup]:
        stop, banned = policy.stop_token_ids, policy.banned_token_ids
        return [
            read_group(read_json(text), g.problem, g.prompt_token_ids, size, 0, stop, banned, policy.decode)
            for text, g in zip(replies, groups, strict=True)
        ]

    yield "read the servers' replies", timed(read)[0]
    share = groups_to_bytes(groups[: prompts // 8])
    yield "ranks tell each other answers, 8 ranks", (
        timed(lambda: groups_to_bytes(groups[: prompts // 8]))[0] + 8 * timed(lambda: groups_from_bytes(share))[0]
    )
    for mode in MODES:
        rubric, networks = Rubric(mode=mode, weight_on="advantage"), networks_for(mode, data)

        def score(some: Any, rubric: Rubric = rubric, networks: Any = networks) -> Any:
            asked = [group.problem for group in some for _ in group.rollouts]
            return rubric.score(asked, [r.text for group in some for r in group.rollouts], networks)

        def score_all(score: Any = score) -> Any:
            with GroupScores(score) as scores:
                for index, group in enumerate(groups):
                    scores(index, group)
            return join(scores.take())

        score_all()  # compiles
        cost, rewards = timed(score_all)
        yield f"score, {mode}", cost
    yield "check the answers", timed(lambda: [fault_of(group, policy, BUDGET) for group in groups])[0]
    offsets = torch.arange(0, prompts * size + 1, size)
    cost, advantage = timed(lambda: group_advantage(torch.from_numpy(rewards.score).float(), offsets))
    yield "advantages", cost
    batch = [
        Answers(
            policy.encode(group.problem),
            group.problem.image,
            tuple(one.token_ids for one in group.rollouts),
            tuple(range(place * size, (place + 1) * size)),
            tuple(one.rollout_logprobs for one in group.rollouts),
        )
        for place, group in enumerate(groups)
    ]
    forests: dict[int, Any] = {}
    for ranks in RANKS:
        cost, forests[ranks] = timed(lambda ranks=ranks: pack_forest(batch, BUDGET, ranks=ranks, cost=COST))
        yield f"pack and balance, {ranks} rank{'s' * (ranks > 1)}", cost
    mine = forests[RANKS[-1]]
    ends = [forest.subtree_end for forest in mine]
    masks = timed(lambda: [build_tiles(tree_mask(one).subtree_end, (128, 64), (64, 128)) for one in ends])[0]
    yield f"masks and tiles, {RANKS[-1]} ranks", masks
    with tempfile.TemporaryDirectory() as folder, MetricsLog(Path(folder)) as log:

        def note() -> None:
            row = step_metrics(groups, rewards, advantage) | batch_sums(mine) | {"train_flop": batch_flop(mine, COST)}
            log.append({"step": 1, "stage": "all"} | row)

        yield "metrics and their logs", timed(note)[0]


def build(tokens: int) -> Policy:
    """The tiny policy with the vocabulary of a real one; pictures take about so many tokens."""
    tokenizer = build_tokenizer()
    config = model_config(tokenizer)
    config.text_config.vocab_size = VOCABULARY
    limits = {"shortest_edge": tokens * 28**2 * 9 // 10, "longest_edge": tokens * 28**2}
    pictures = Qwen2VLImageProcessorPil(patch_size=14, temporal_patch_size=2, merge_size=2, size=limits)
    return assemble(Qwen2_5_VLForConditionalGeneration(config), tokenizer, pictures, freeze_vision=True)


def answer(policy: Policy, problems: list[Problem], size: int, rng: np.random.Generator) -> list[RolloutGroup]:
    """Right answers in every second place; tokens are drawn, with the policy's stop token last."""

    def rollout(text: str) -> Rollout:
        count = int(rng.integers(100, 2001))
        ids = (*rng.integers(300, VOCABULARY, count - 1).tolist(), policy.stop_token_ids[0])
        return Rollout(ids, tuple((-rng.exponential(0.3, count)).tolist()), text, "stop", 0)

    groups = []
    for problem in problems:
        text = gold_response(problem)
        answers = tuple(rollout(text[: len(text) >> number % 2]) for number in range(size))
        groups.append(RolloutGroup(problem, policy.encode(problem).token_ids, answers))
    return groups


def as_reply(group: RolloutGroup) -> str:
    """What a server says of a group."""
    prompt, samples = group.prompt_token_ids, []
    for one in group.rollouts:
        scored = [[nat, token, None] for nat, token in zip(one.rollout_logprobs, one.token_ids, strict=True)]
        about = {"finish_reason": {"type": "stop"}, "weight_version": "0", "output_token_logprobs": scored}
        about |= {"prompt_tokens": len(prompt), "completion_tokens": len(one.token_ids)}
        samples.append({"output_ids": one.token_ids, "prompt_token_ids": prompt, "meta_info": about})
    return json.dumps(samples)


if __name__ == "__main__":
    main()
