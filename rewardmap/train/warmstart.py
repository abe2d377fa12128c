"""The recipe of the shipped warm start of the tiny policy: ``python -m rewardmap.train.warmstart OUT``.

Three lessons on maps of its own (seeds that no generated data set uses). Look: the vision tower learns to name what
is in each cell, through a probe that is thrown away. Survey: the whole model writes down all lines and all stations
of a map, two answers dense in facts about one picture. Answer: ideal answers to questions of all kinds, cut short while
there is much to learn, so that the warm start knows the form of every answer and reads maps only moderately well.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch.nn import functional

from rewardmap.policy import Policy
from rewardmap.tiny import build_tiny
from rewardmap.train.forest import Answers
from rewardmap.train.supervised import gold_answers, supervised_backward
from rewardmap.transit.draw import draw_map, encode_png
from rewardmap.transit.generate import TINY_CELL_PX, TINY_CELLS, TINY_COLOURS, TINY_LEVELS, generate_network
from rewardmap.transit.graph import Network
from rewardmap.transit.questions import Balance, as_problem, gold_response, make_questions
from rewardmap.types import Problem

Tensor = torch.Tensor
RECIPE: dict[str, float] = {
    "seed": 20_251_002,
    "maps": 3000,
    "look_steps": 400,
    "look_images": 32,
    "look_rate": 3e-3,
    "survey_steps": 600,
    "survey_maps": 12,
    "answer_steps": 500,
    "answer_maps": 8,
    "answer_questions": 6,
    "rate": 2e-3,
    "warmup_steps": 30,
    "decay_share": 0.4,
    "weight_decay": 0.01,
}
"""Everything the warm start depends on beside the code; ``recipe.json`` in the asset folder repeats it."""
_HEADINGS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))
_LETTERS = 26


@dataclass(frozen=True)
class StudyMap:
    """One map to learn from."""

    network: Network
    problems: tuple[Problem, ...]


def make_warm_start(out: Path, console: Console, recipe: Mapping[str, float] | None = None) -> Policy:
    """Run the recipe and save a complete checkpoint folder in ``out``."""
    recipe = {**RECIPE, **(recipe or {})}
    maps = draw_study_maps(int(recipe["maps"]), int(recipe["seed"]), console)
    policy = build_tiny(int(recipe["seed"]), freeze_vision=False)
    rng = np.random.default_rng(int(recipe["seed"]))
    look(policy, maps, recipe, rng, console)
    policy.freeze_vision = True
    policy.model.model.visual.requires_grad_(False)
    read(policy, maps, recipe, rng, console)
    policy.save(out)
    (out / "recipe.json").write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")
    return policy


def draw_study_maps(count: int, seed: int, console: Console) -> list[StudyMap]:
    """Maps with their pictures and questions, in memory. [count]"""
    rng, balance, maps = np.random.default_rng(seed), Balance(), []
    for index in track(range(count), "draw maps", console=console):
        network = generate_network(TINY_LEVELS[index % len(TINY_LEVELS)], rng, f"study/{index:05d}")
        picture = encode_png(draw_map(network))
        rows = make_questions(network, "tiny", rng, balance)
        maps.append(StudyMap(network, tuple(as_problem(row, picture, network.network_id) for row in rows)))
    return maps


def look(
    policy: Policy,
    maps: Sequence[StudyMap],
    recipe: Mapping[str, float],
    rng: np.random.Generator,
    console: Console,
) -> float:
    """Teach the vision tower each cell's letter, colours and headings. Returns the last steps' share of perfect
    stations."""
    tower = policy.model.model.visual
    letters, marks = (torch.from_numpy(np.stack(part)) for part in zip(*(_cells(m.network) for m in maps), strict=True))
    probe = torch.nn.Linear(policy.model.config.text_config.hidden_size, _LETTERS + 1 + marks.shape[-1])
    steps, count = int(recipe["look_steps"]), int(recipe["look_images"])
    optimizer = torch.optim.AdamW([*tower.parameters(), *probe.parameters()], fused=True)
    perfect = []
    for step in track(range(steps), "look", console=console):
        for group in optimizer.param_groups:
            group["lr"] = recipe["look_rate"] * min(1, (step + 1) / 20) * (1 - step / steps)
        chosen = rng.integers(len(maps), size=count)
        features = torch.stack(
            [seen.merged for seen in policy.image_features([maps[i].problems[0].image for i in chosen])]
        )
        said = probe(features)  # [images, cells, letters + 1 + marks]
        letter, mark = letters[chosen], marks[chosen]
        name, rest = said[..., : _LETTERS + 1], said[..., _LETTERS + 1 :]
        importance = torch.where(letter == _LETTERS, 0.3, 1.0)  # most cells are empty
        loss = (
            functional.cross_entropy(name.flatten(0, 1), letter.flatten(), reduction="none") * importance.flatten()
        ).mean()
        (loss + 5 * functional.binary_cross_entropy_with_logits(rest, mark)).backward()
        optimizer.step()
        optimizer.zero_grad()
        station = letter != _LETTERS
        right = (name.argmax(-1) == letter) & ((rest > 0) == (mark > 0)).all(-1)
        perfect.append(float(right[station].float().mean()))
    share = float(np.mean(perfect[-20:]))
    console.print(f"stations seen perfectly: {share:.1%}", highlight=False)
    return share


def read(
    policy: Policy,
    maps: Sequence[StudyMap],
    recipe: Mapping[str, float],
    rng: np.random.Generator,
    console: Console,
) -> float:
    """Surveys, then surveys and questions. Returns the last steps' loss in nats per token."""
    trainable = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, betas=(0.9, 0.98), weight_decay=recipe["weight_decay"], fused=True)
    steps = int(recipe["survey_steps"] + recipe["answer_steps"])
    losses = []
    for step in track(range(steps), "read", console=console):
        decay = min(1.0, max(0.03, (1 - step / steps) / recipe["decay_share"]))
        for group in optimizer.param_groups:
            group["lr"] = recipe["rate"] * decay * min(1, (step + 1) / recipe["warmup_steps"])
        surveys_only = step < recipe["survey_steps"]
        count = int(recipe["survey_maps" if surveys_only else "answer_maps"])
        questions = 0 if surveys_only else int(recipe["answer_questions"])
        batch: list[Answers] = []
        for index in rng.integers(len(maps), size=count):
            for problem, text in _lessons(maps[index], questions, rng):
                batch.append(gold_answers(policy, problem, text, len(batch)))
        loss, _ = supervised_backward(policy, batch, max_tokens=sys.maxsize)
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    loss = float(np.mean(losses[-50:]))
    console.print(f"loss {loss:.3f} nats per token", highlight=False)
    return loss


def _lessons(study: StudyMap, questions: int, rng: np.random.Generator) -> Iterator[tuple[Problem, str]]:
    """Two surveys of a map and some of its questions, each with its ideal answer."""
    name, first = study.network.network_id, study.problems[0]
    yield replace(first, uid=f"{name}/lines", question="list"), survey_lines(study.network)
    yield replace(first, uid=f"{name}/stations", question="read"), survey_stations(study.network)
    for index in rng.permutation(len(study.problems))[:questions]:
        problem = study.problems[index]
        yield problem, gold_response(problem)


def survey_lines(network: Network) -> str:
    """Every line with its stops in order: ``Red Line: K B D``."""
    return "\n".join(f"{line.name}: {' '.join(map(_letter, line.stations))}" for line in network.lines)


def survey_stations(network: Network) -> str:
    """Every station in reading order with its lines: ``KRed Line BRed LineBlue Line``."""
    order = sorted(network.positions, key=lambda stop: network.positions[stop][::-1])
    return " ".join(_letter(stop) + "".join(network.lines_through(stop)) for stop in order)


def _letter(station: str) -> str:
    return station.removesuffix(" Station")


def _cells(network: Network) -> tuple[np.ndarray, np.ndarray]:
    """What is in each cell: letter [25] (26 where empty), and marks [25, 27]: 3 colours, then 3 colours in 8
    headings."""
    names = list(TINY_COLOURS)
    letter = np.full(TINY_CELLS**2, _LETTERS)
    colours = np.zeros((TINY_CELLS**2, len(names)), dtype=np.float32)
    headings = np.zeros((TINY_CELLS**2, len(_HEADINGS), len(names)), dtype=np.float32)
    at = {
        stop: (math.floor(y / TINY_CELL_PX), math.floor(x / TINY_CELL_PX)) for stop, (x, y) in network.positions.items()
    }
    for stop, (row, column) in at.items():
        letter[row * TINY_CELLS + column] = ord(_letter(stop)) - ord("A")
    for line in network.lines:
        colour = names.index(line.name)
        for stop in line.stations:
            row, column = at[stop]
            colours[row * TINY_CELLS + column, colour] = 1
        for pair in zip(line.stations, line.stations[1:], strict=False):
            for here, there in (pair, pair[::-1]):
                (row, column), (to_row, to_column) = at[here], at[there]
                heading = _HEADINGS.index((to_row - row, to_column - column))
                headings[row * TINY_CELLS + column, heading, colour] = 1
    return letter, np.concatenate([colours, headings.reshape(TINY_CELLS**2, -1)], axis=1)


if __name__ == "__main__":
    make_warm_start(Path(sys.argv[1]), Console())
