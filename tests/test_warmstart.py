"""The shipped warm start is what its recipe makes, and it has never seen a map that a run is tested on."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from rewardmap.config import PolicyConfig
from rewardmap.evaluate import Judge, ask
from rewardmap.policy import load_policy
from rewardmap.rollout.local import LocalEngine
from rewardmap.tiny import WARM_START, build_tiny
from rewardmap.train import warmstart
from rewardmap.transit.reasonmap import load_dataset, write_dataset
from rewardmap.types import SamplingParams

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "maps"
    write_dataset(folder, maps={"train": 1, "test": 60}, seed=0)
    return load_dataset(folder, "test")


def examine(policy, data):
    answers = ask(LocalEngine(policy, 512), data.problems, SamplingParams(0.0, max_new_tokens=24))
    return Judge().evaluation(data.problems, answers, data.networks)


def test_ships_with_its_recipe():
    assert json.loads((WARM_START / "recipe.json").read_text()) == warmstart.RECIPE
    assert sum(path.stat().st_size for path in WARM_START.iterdir()) < 8_000_000
    shipped = load_policy(WARM_START, PolicyConfig())
    fresh = build_tiny(0, freeze_vision=True)
    assert fresh.tokenizer.get_vocab() == shipped.tokenizer.get_vocab()
    assert {n: p.shape for n, p in fresh.model.named_parameters()} == {
        n: p.shape for n, p in shipped.model.named_parameters()
    }


def test_knows_the_form_and_reads_moderately(held_out):
    result = examine(load_policy(WARM_START, PolicyConfig()), held_out)
    assert result.format_valid >= 0.95
    assert 0.45 < result.weighted_accuracy < 0.62


def test_its_maps_are_its_own(held_out):
    study = warmstart.draw_study_maps(300, warmstart.RECIPE["seed"], QUIET)
    seen = {hashlib.sha256(item.problems[0].image).hexdigest() for item in study}
    tested = {hashlib.sha256(Path(problem.image).read_bytes()).hexdigest() for problem in held_out.problems}
    assert len(seen) == 300 and not seen & tested


def test_cell_labels():
    study = warmstart.draw_study_maps(1, 3, QUIET)[0]
    letter, marks = warmstart._cells(study.network)
    stations = {chr(65 + code) for code in letter if code < 26}
    assert stations == {stop[0] for stop in study.network.positions}
    lines = {stop: len(study.network.lines_through(stop)) for stop in study.network.positions}
    at = {stop: int(y // 28) * 5 + int(x // 28) for stop, (x, y) in study.network.positions.items()}
    assert all(marks[at[stop], :3].sum() == count for stop, count in lines.items())
    edges = sum(len(line.stations) - 1 for line in study.network.lines)
    assert marks[:, 3:].sum() == 2 * edges and marks[letter == 26].sum() == 0
    assert warmstart.survey_lines(study.network).count("\n") == len(study.network.lines) - 1
    assert len(warmstart.survey_stations(study.network).split(" Line")[0]) >= 1


def test_a_short_recipe_learns_to_see():
    recipe = {**warmstart.RECIPE, "look_steps": 150, "look_images": 24}
    maps = warmstart.draw_study_maps(120, 1, QUIET)
    share = warmstart.look(build_tiny(0, freeze_vision=False), maps, recipe, np.random.default_rng(0), QUIET)
    assert share > 0.3  # blind guessing gets 0.00


@pytest.mark.slow
def test_the_recipe_makes_such_a_one(tmp_path, held_out):
    policy = warmstart.make_warm_start(tmp_path / "made", QUIET)
    made, shipped = examine(policy, held_out), examine(load_policy(WARM_START, PolicyConfig()), held_out)
    assert made.format_valid >= 0.95
    assert abs(made.weighted_accuracy - shipped.weighted_accuracy) < 0.08
