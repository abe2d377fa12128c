"""Stages in order, random order inside a stage, no repeats before a pool is through, exact resumption."""

from collections import Counter

import pytest

from rewardmap.config import ConfigError, StageConfig
from rewardmap.curriculum import Curriculum
from rewardmap.types import KINDS, Problem

PROBLEMS = [Problem(f"{kind}-{index}", "", "", kind, 1, "", "", "a/b", "easy") for kind in KINDS for index in range(10)]
STAGES = (
    StageConfig(name="one", steps=5, question_kinds=("TorF1", "TorF2")),
    StageConfig(name="two", steps=6, question_kinds=("planning",), replay=0.5),
)


def make(seed: int = 0) -> Curriculum:
    return Curriculum(PROBLEMS, STAGES, batch=4, seed=seed)


def walk(curriculum: Curriculum, steps: int) -> list[tuple[str, list[str]]]:
    drawn = []
    for _ in range(steps):
        stage, problems = curriculum.sample()
        drawn.append((stage.name, [problem.uid for problem in problems]))
    return drawn


def test_stages_and_kinds():
    drawn = walk(make(), 11)
    assert [name for name, _ in drawn] == ["one"] * 5 + ["two"] * 6
    first = [uid for _, uids in drawn[:5] for uid in uids]
    assert sorted(first) == sorted(p.uid for p in PROBLEMS if p.kind in ("TorF1", "TorF2"))  # 20 draws, each once
    assert first != sorted(first)
    for _, uids in drawn[5:]:
        assert all(uid.startswith("planning") for uid in uids[:2])
    replayed = Counter(uid for _, uids in drawn[5:] for uid in uids[2:])
    assert max(replayed.values()) == 1
    assert len({uid.split("-")[0] for uid in replayed}) > 3
    planning = Counter(uid for _, uids in drawn[5:] for uid in uids[:2])
    assert sorted(planning.values()) == [1] * 8 + [2] * 2  # 12 draws from 10: a second lap began


def test_seeds():
    assert walk(make(1), 11) == walk(make(1), 11)
    assert walk(make(1), 11) != walk(make(2), 11)


@pytest.mark.parametrize("stop", [0, 3, 5, 8])
def test_resumes_exactly(stop):
    whole = walk(make(), 11)
    first, second = make(), make()
    walk(first, stop)
    second.load_state_dict(first.state_dict())
    assert second.step == stop
    assert walk(second, 11 - stop) == whole[stop:]


def test_positions():
    curriculum = make()
    assert curriculum.total_steps == 11
    assert (curriculum.position(4).stage.name, curriculum.position(4).step_in_stage) == ("one", 4)
    assert (curriculum.position(5).stage.name, curriculum.position(5).step_in_stage) == ("two", 0)


def test_a_kind_the_data_lacks_is_named():
    with pytest.raises(ConfigError, match=r"stage 'two' asks for planning, but the data has only: TorF1"):
        Curriculum([p for p in PROBLEMS if p.kind == "TorF1"], STAGES, batch=4, seed=0)


def test_no_stages():
    with pytest.raises(ConfigError, match=r"train\.stages is empty"):
        Curriculum(PROBLEMS, (), batch=4, seed=0)


def test_a_checkpoint_of_other_stages_is_refused():
    with pytest.raises(ConfigError, match="made with 3 stages"):
        make().load_state_dict({"step": 1, "drawn": [0, 0, 0], "replayed": 0})
