"""Stages in order, random order inside a stage, no repeats before a pool is through; gates, replay, adaptive pools;
exact resumption."""

import json
from collections import Counter

import pytest

from rewardmap.config import ORDERS, ConfigError, StageConfig, ordered_stages
from rewardmap.config_file import load_config
from rewardmap.curriculum import Curriculum, _Pool
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


def test_length_and_ends():
    curriculum = make()
    ended = []
    for _ in range(11):
        assert curriculum.total_steps == 11
        curriculum.sample()
        ended.append(curriculum.stage_ended)
    assert curriculum.step == 11
    assert [step for step, over in enumerate(ended, 1) if over] == [5, 11]


def gated(**gate: object) -> Curriculum:
    first = StageConfig(name="one", steps=20, question_kinds=("TorF1", "TorF2"), replay=0.5, **gate)  # type: ignore
    return Curriculum(PROBLEMS, (first, STAGES[1]), batch=4, seed=0)


def names_until_end(curriculum: Curriculum, rates) -> list[str]:
    """Stage of each step, where answers to the kinds of stage one are right at the given rates, others never."""
    names, rates = [], iter(rates)
    while curriculum.step < curriculum.total_steps:
        stage, problems = curriculum.sample()
        rate = next(rates, 0.0)
        curriculum.update(stage, problems, [rate if problem.kind.startswith("TorF") else 0.0 for problem in problems])
        names.append(stage.name)
    return names


def test_a_gate_opens_at_its_success_rate_and_not_before_its_steps():
    rising = [0.1 * step for step in range(11)]
    count = {
        "no gate": names_until_end(gated(), rising).count("one"),
        # Mean of the last 3 rates at least 0.6: steps with 0.5, 0.6, 0.7, that is the eighth.
        "gate": names_until_end(gated(advance_at=0.6, advance_window=3), rising).count("one"),
        "patient": names_until_end(gated(advance_at=0.6, advance_window=3, min_steps=10), rising).count("one"),
        "out of reach": names_until_end(gated(advance_at=0.6, advance_window=3), [0.59] * 30).count("one"),
    }
    assert count == {"no gate": 20, "gate": 8, "patient": 10, "out of reach": 20}


def test_a_gate_needs_its_whole_window():
    assert names_until_end(gated(advance_at=0.5, advance_window=4), [1.0] * 9).count("one") == 4


def test_total_steps_shrink_when_a_gate_opens():
    curriculum = gated(advance_at=0.5, advance_window=2)
    assert curriculum.total_steps == 26
    names_until_end(curriculum, [1.0] * 30)
    assert curriculum.step == curriculum.total_steps == 8


def test_replay_of_earlier_stages_only():
    second = StageConfig(name="two", steps=6, question_kinds=("planning",), replay=0.5, replay_from="earlier")
    drawn = walk(Curriculum(PROBLEMS, (STAGES[0], second), batch=4, seed=0), 11)
    replayed = [uid for _, uids in drawn[5:] for uid in uids[2:]]
    assert len(set(replayed)) == len(replayed) == 12
    assert {uid.split("-")[0] for uid in replayed} == {"TorF1", "TorF2"}


def test_the_first_stage_has_nothing_to_replay():
    stages = (StageConfig(name="warm", kind="sft", steps=0), StageConfig(name="a", replay=0.5, replay_from="earlier"))
    with pytest.raises(ConfigError, match="stage 'a' replays earlier stages, but none before it"):
        Curriculum(PROBLEMS, stages, batch=4, seed=0)


def adaptive() -> Curriculum:
    stage = StageConfig(name="all", steps=200, pools="adaptive")
    return Curriculum(PROBLEMS, (stage,), batch=12, seed=0)


def walk_adaptive(curriculum: Curriculum, steps: int) -> list[list[str]]:
    """Planning is always right, TorF1 never, the rest half of the time: only the rest teaches."""
    drawn = []
    for _ in range(steps):
        stage, problems = curriculum.sample()
        rates = [{"planning": 1.0, "TorF1": 0.0}.get(problem.kind, 0.5) for problem in problems]
        curriculum.update(stage, problems, rates)
        drawn.append([problem.uid for problem in problems])
    return drawn


def test_adaptive_pools_turn_to_what_teaches():
    curriculum = adaptive()
    [stage] = curriculum.stages
    shares = curriculum.pool_shares(stage)
    assert shares == pytest.approx(dict.fromkeys(shares, 1 / 6))
    drawn = walk_adaptive(curriculum, 100)
    late = Counter(uid.split("-")[0] for uids in drawn[-40:] for uid in uids)
    assert all(late[kind] < 0.3 * late["Counting2"] for kind in ("planning", "TorF1"))
    assert all(late[kind] > 0 for kind in KINDS)  # never forgotten for good
    shares = curriculum.pool_shares(stage)
    assert shares["planning/easy/0"] == pytest.approx(0.1 / 4.6, rel=0.3)


def test_adaptive_pools_resume_exactly():
    whole = walk_adaptive(adaptive(), 60)
    first, second = adaptive(), adaptive()
    walk_adaptive(first, 23)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert walk_adaptive(second, 37) == whole[23:]
    assert walk_adaptive(Curriculum(PROBLEMS, first.stages, 12, seed=1), 60) != whole


def test_adaptive_pools_repeat_nothing_before_all_were_seen():
    uids = [uid for uids in walk_adaptive(adaptive(), 30) for uid in uids if uid.startswith("Counting3")]
    assert len(uids) > 20
    assert len(set(uids[:10])) == len(set(uids[10:20])) == 10


def test_a_gate_resumes_with_its_window():
    whole = gated(advance_at=0.6, advance_window=3)
    rates = [0.9, 0.1, 0.9, 0.9, 0.0]
    expected = names_until_end(whole, rates)
    first, second = (gated(advance_at=0.6, advance_window=3) for _ in range(2))
    for rate in rates[:2]:
        stage, problems = first.sample()
        first.update(stage, problems, [rate if problem.kind.startswith("TorF") else 0.0 for problem in problems])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert names_until_end(second, rates[2:]) == expected[2:]


def test_an_answer_that_comes_late_does_not_open_the_next_gate():
    stages = [StageConfig(name=name, steps=2, advance_at=0.1, advance_window=1) for name in ("one", "two")]
    curriculum = Curriculum(PROBLEMS, stages, batch=4, seed=0)
    late, problems = [curriculum.sample() for _ in range(2)][-1]
    assert curriculum.sample()[0].name == "two"
    curriculum.update(late, problems, [1.0] * 4)
    assert not curriculum.stage_ended


def test_an_answer_that_comes_late_does_not_shut_the_last_gate_again():
    curriculum = Curriculum(PROBLEMS, [StageConfig(name="one", steps=9, advance_at=0.5, advance_window=1)], 4, seed=0)
    first, second = curriculum.sample(), curriculum.sample()
    curriculum.update(*first, [1.0] * 4)
    assert curriculum.total_steps == 2
    curriculum.update(*second, [0.0] * 4)
    assert curriculum.stage_ended and curriculum.total_steps == 2


@pytest.mark.parametrize("order", sorted(ORDERS))
def test_orders_of_the_paper(order):
    stages = ordered_stages(order, 97)
    assert sum(stage.steps for stage in stages) == 97
    kinds = [kind for stage in stages for kind in stage.question_kinds]
    assert sorted(kinds) == sorted(KINDS) and kinds[-1] == "planning"
    config = load_config("tiny", [f"train.stages={order}", "train.steps=97"])
    assert config.train.stages == stages


def test_an_unknown_order_is_named():
    with pytest.raises(ConfigError, match=r"train\.stages='finest'.*paper, coarse, fine"):
        load_config("tiny", ["train.stages=finest"])


def test_a_kind_the_data_lacks_is_named():
    with pytest.raises(ConfigError, match=r"stage 'two' asks for planning, but the data has only: TorF1"):
        Curriculum([p for p in PROBLEMS if p.kind == "TorF1"], STAGES, batch=4, seed=0)


def test_no_stages():
    with pytest.raises(ConfigError, match=r"train\.stages is empty"):
        Curriculum(PROBLEMS, (), batch=4, seed=0)


def test_a_checkpoint_of_other_stages_is_refused():
    with pytest.raises(ConfigError, match="made with 3 stages"):
        make().load_state_dict({"stages": 3})


@pytest.mark.parametrize("make_one", [make, adaptive, lambda: gated(advance_at=0.5, advance_window=2)])
def test_a_look_ahead_sees_the_next_draw_and_changes_none(make_one):
    looked, plain = make_one(), make_one()
    while looked.step < looked.total_steps:
        ahead = looked.peek()
        assert looked.peek() == ahead
        for curriculum in (looked, plain):
            stage, problems = curriculum.sample()
            assert problems == ahead
            curriculum.update(stage, problems, [curriculum.step % 2] * len(problems))
    assert looked.peek() == [] and looked.state_dict() == plain.state_dict()


@pytest.mark.parametrize("maps", [0, 2])
def test_a_pass_is_ordered_once(maps, monkeypatch):
    """Also where each draw is looked at before; passes gone by are forgotten."""
    problems = tuple(Problem(f"{i}", "", "", "TorF1", 1, "", "", f"a/{i % 5}", "easy") for i in range(30))
    pool, fresh = (_Pool("p", problems, (7,), maps, 4) for _ in range(2))
    ordered, order = [], _Pool._order
    monkeypatch.setattr(_Pool, "_order", lambda self, lap: (ordered.append(lap), order(self, lap))[1])
    drawn = [pool.draw(start, 4) for start in range(0, 120, 4) for _ in range(2)]
    assert ordered == [0, 1, 2, 3] and len(pool._walks) <= 2
    assert drawn[::2] == drawn[1::2] == [fresh.draw(start, 4) for start in range(0, 120, 4)]
    assert pool.draw(0, 4) == drawn[0]  # as after a resume from an older state
