"""``bench/claims.py``: its arms are what they say, rows survive a kill, and its statistics are right."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rewardmap.config_file import load_config
from rewardmap.train.scoring import stage_reward

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture(scope="module")
def claims() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCH))
    try:
        yield importlib.import_module("claims")
    finally:
        sys.path.remove(str(BENCH))


def row(arm: str, seed: int, planning: float, plus: float = 0.5, world: str = "transit") -> dict[str, Any]:
    both = {"weighted_accuracy": (planning + plus) / 2}
    parts = {
        "all": both,
        "ReasonMap": {"weighted_accuracy": planning, "verified": planning, "map_score": 20 * planning},
        **{name: {"weighted_accuracy": plus} for name in ("ReasonMap-Plus", "Plus, counting", "Plus, true/false")},
    }
    return {"arm": arm, "seed": seed, "trained_on": world, "tested": {world: parts}, "seconds": 1.0}


def test_intervals_and_paired_differences_by_hand(claims: ModuleType) -> None:
    report = claims.report
    found = report.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776 * np.sqrt(2.5 / 5)
    assert (found.value, found.low, found.high) == pytest.approx((3.0, 3 - half, 3 + half))
    assert np.isnan(report.interval([1.0]).low) and report.interval([1.0]).text() == "1.0"
    # Seeds of very different difficulty, and one better by 10, 12 and 11 points in each: pairing finds it.
    rows = [row("RL on planning", s, base) for s, base in enumerate((0.1, 0.5, 0.8))]
    rows += [row("RewardMap", s, base) for s, base in enumerate((0.2, 0.62, 0.91))]
    rows.append(row("RewardMap", 9, 1.0))  # a seed that the other arm lacks
    claim = next(c for c in report.CLAIMS if c.better == "RewardMap" and c.about is report.PLANNING)
    found = report.difference(rows, claim, report.PLANNING)
    assert (found.value, found.seeds, found.verdict) == (pytest.approx(11.0), 3, "holds")
    assert found.high - found.value == pytest.approx(4.303 * 1.0 / np.sqrt(3))
    assert report.difference(rows[:1], claim, report.PLANNING) is None


def test_the_paragraph_keeps_null_and_negative_results(claims: ModuleType) -> None:
    report = claims.report
    rows = [row("base", s, 0.3 + 0.01 * s) for s in range(3)]
    rows += [row("RL on planning", s, 0.6 + 0.01 * s + 0.003 * (s == 1)) for s in range(3)]
    rows += [row("RewardMap", s, 0.5 + 0.01 * s, plus=(0.6, 0.75, 0.6)[s]) for s in range(3)]
    text = report.paragraph(rows)
    holds, rest = text.split("The reverse holds")
    reverse, open_ = rest.split("Not resolved")
    assert "RL teaches planning" in holds
    assert "RewardMap beats RL on planning, at planning" in reverse
    assert "RewardMap beats RL on planning, on everything" in open_
    tables = report.markdown(rows)
    assert "| RL on planning | 61.1 [" in tables and "the reverse holds" in tables and text in tables
    assert report.paragraph(rows[:1]) == "One seed tells nothing about what holds."


def test_every_claim_is_about_arms_that_are_run(claims: ModuleType) -> None:
    for claim in claims.report.CLAIMS:
        for name in (claim.better, claim.worse):
            assert claim.world in claims.worlds_of(name), claim
    wanted = {
        "base",
        "SFT",
        "SFT → RL",
        "RL on planning",
        "RL on all",
        "RL on all + reward",
        "RL in stages",
        "RewardMap",
    }
    assert wanted <= set(claims.ARMS)


def test_arms_are_what_they_say(claims: ModuleType) -> None:
    scale = claims.SCALES["full"]
    configs = {
        name: load_config(arguments[0], arguments[1:])
        for name, arm in claims.ARMS.items()
        if arm.stages
        for arguments in [claims.train_arguments(Path("runs"), scale, name, 3)]
    }
    for name, config in configs.items():
        steps = sum(stage.steps for stage in config.train.stages)
        assert steps == (200 if name.endswith("half the updates") else 400), name
        assert config.train.seed == 3 and config.train.threads == 1
        cold = name.startswith("cold ")
        start = config.train.stages[0]
        assert (start.checkpoint, start.steps) == (str(claims.cold_start(Path("runs"))) if cold else "shipped", 0)
        assert config.data.path == str(claims.data_path(Path("runs"), claims.ARMS[name].world, 3))
        if cold:  # all else is the warm arm's
            stages = (start, *configs[name.removeprefix("cold ")].train.stages[1:])
            assert replace(config, train=replace(config.train, stages=stages)) == config
        rewards = {stage_reward(config.reward, stage) for stage in config.train.stages}
        assert len(rewards) == 1
        [reward] = rewards
        warm = name.removeprefix("cold ")
        plain = warm in ("SFT → RL", "RL on planning", "RL on planning, half the updates", "RL on all")
        plain |= warm.startswith("RL in stages")
        assert (reward.alpha == 0) == plain
        assert (max(reward.map_weights) == 1.0 and reward.transfer_weight == 0) == plain
    mode = {name: (config.reward.mode, config.reward.weight_on) for name, config in configs.items()}
    assert mode.pop("RewardMap, paper reward") == ("paper", "advantage")
    assert mode.pop("RewardMap, graph reward") == ("graph", "advantage")
    assert mode.pop("RewardMap, weights on the reward") == ("reference", "reward")
    assert set(mode.values()) == {("reference", "advantage")}
    planning = {
        n: sum(s.steps for s in c.train.stages if s.question_kinds == ("planning",)) for n, c in configs.items()
    }
    assert planning["RewardMap"] == planning["RL on planning, half the updates"] == planning["SFT → RL"] == 200
    assert {stage.replay for stage in configs["RL in stages, no replay"].train.stages} == {0.0}


def test_a_stopped_experiment_goes_on_with_what_is_missing(
    claims: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[str, int]] = []

    def run_arm(runs: Path, scale: Any, name: str, seed: int, locks: Any) -> dict[str, Any]:
        ran.append((name, seed))
        if (name, seed) == ("RewardMap", 1) and len(ran) <= 6:
            raise RuntimeError("out of memory")
        return row(name, seed, 0.5)

    monkeypatch.setattr(claims, "run_arm", run_arm)
    scale, arms = claims.SCALES["mini"], ["base", "RL on all", "RewardMap"]
    with pytest.raises(RuntimeError, match="out of memory"):
        claims.run_all(tmp_path, scale, arms, jobs=1)
    assert ran == [("base", 0), ("RL on all", 0), ("RewardMap", 0), ("base", 1), ("RL on all", 1), ("RewardMap", 1)]
    rows = claims.read_rows(tmp_path)
    assert len(rows) == 5 and all(json.dumps(found) for found in rows)
    claims.run_all(tmp_path, scale, arms, jobs=2)
    assert ran[6:] == [("RewardMap", 1)]
    assert [(found["arm"], found["seed"]) for found in claims.read_rows(tmp_path)] == [
        (arm, seed) for arm in arms for seed in range(2)
    ]
    assert not [path for path in (tmp_path / "rows").iterdir() if path.suffix != ".json"]
    names = {claims.row_file(tmp_path, arm, 0).name for arm in claims.ARMS}
    assert len(names) == len(claims.ARMS)


def test_publishing_writes_between_the_marks(claims: ModuleType, tmp_path: Path) -> None:
    report = claims.report
    rows = [row(arm, seed, 0.1 * seed) for arm in ("base", "RewardMap", "RL on planning") for seed in range(2)]
    for name in ("README.md", "docs/claims.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"above\n{report.START}\nold\n{report.END}\nbelow\n", encoding="utf-8")
    report.publish(tmp_path, rows, {"command": "x"})
    saved = json.loads((tmp_path / "bench/results/claims.json").read_text(encoding="utf-8"))
    assert saved["command"] == "x" and saved["rows"] == rows
    picture = np.asarray(Image.open(tmp_path / "docs/claims/claims.png").convert("RGB"))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 10
    for name in ("README.md", "docs/claims.md"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert text.startswith("above\n") and text.endswith("\nbelow\n") and "\nold\n" not in text
        assert report.paragraph(rows, intervals=name == "docs/claims.md") in text
    (tmp_path / "README.md").write_text("no marks", encoding="utf-8")
    with pytest.raises(ValueError, match=r"README\.md: no"):
        report.publish(tmp_path, rows, {})


@pytest.mark.slow
def test_a_miniature_trains_tests_and_transfers(claims: ModuleType, tmp_path: Path) -> None:
    scale = claims.Scale(1, (3, 3), 6, 4, 2)
    arms = ["base", "SFT", "RewardMap", "RewardMap on the grid"]
    claims.run_all(tmp_path, scale, arms, jobs=1)
    rows = {found["arm"]: found for found in claims.read_rows(tmp_path)}
    assert {arm: list(found["tested"]) for arm, found in rows.items()} == {
        "base": ["transit", "grid"],
        "SFT": ["transit"],
        "RewardMap": ["transit", "grid"],
        "RewardMap on the grid": ["grid", "transit"],
    }
    assert all(0 <= found["tested"]["transit"]["all"]["weighted_accuracy"] <= 1 for found in rows.values())
    assert not list(tmp_path.glob("runs/*/checkpoints"))
    # What was trained and tested, but lost its row to a kill, is read again and not trained again.
    claims.row_file(tmp_path, "RewardMap", 0).unlink()
    claims.run_all(tmp_path, scale, arms, jobs=1)
    again = {found["arm"]: found for found in claims.read_rows(tmp_path)}
    assert again["RewardMap"]["tested"] == rows["RewardMap"]["tested"] and again["RewardMap"]["seconds"] < 5
    claims.report.draw(claims.read_rows(tmp_path), tmp_path / "claims.png")
