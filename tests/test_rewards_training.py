"""What the trainer and the evaluation hand to the rubric: flat lists as published, or networks with branches."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from rewardmap.blind import blind_policies
from rewardmap.config_file import load_config
from rewardmap.rewards import FAILURES, Rubric
from rewardmap.rewards.rubric import Mode
from rewardmap.train.examine import networks_for
from rewardmap.train.start import set_up
from rewardmap.transit.graph import Network
from rewardmap.transit.reasonmap import MapData, write_dataset
from rewardmap.types import Problem

LISTS = {
    "Line 3": ["A", "B (Branch-starting Station)", "C", "D", "通世泰站", "F"],
    "Line 1": ["A", "G", "F"],
}
ASKED = Problem("q", b"", "", "planning", -1, "A", "F", "made/up", "easy")
ACROSS = "Route Name: Line 3\nDeparture Stop: A\nArrival Stop: F"


@pytest.mark.parametrize(("mode", "failure"), [("reference", "none"), ("paper", "none"), ("graph", "wrong_branch")])
def test_only_graph_mode_sees_branches(tmp_path: Path, mode: Mode, failure: str) -> None:
    networks = networks_for(mode, MapData([], {"made/up": LISTS}, tmp_path))
    batch = Rubric(mode=mode).score([ASKED], [ACROSS], networks)
    assert FAILURES[batch.failure[0]] == failure


def test_the_trainer_and_the_examiner_get_them(tmp_path: Path) -> None:
    write_dataset(tmp_path / "maps", maps={"train": 2, "test": 2}, seed=1)
    stages = "[{name='w', kind='sft', steps=0, checkpoint='shipped'}, {name='a'}, {name='b', reward_mode='paper'}]"
    settings = [f"data.path={tmp_path / 'maps'}", "reward.mode=graph", f"train.stages={stages}"]
    trainer, examiner, _ = set_up(load_config("tiny", settings), tmp_path / "run", Console(quiet=True))
    assert set(trainer.networks) == {"graph", "paper"}
    for mode, networks in trainer.networks.items():
        assert len(networks) == 4
        assert all(isinstance(network, Network) == (mode == "graph") for network in networks.values())
    # Whatever is trained, an answer is judged by one rule, on the flat lists; what a train could ride stands beside it.
    assert len(examiner.networks) == 4 and not any(isinstance(lists, Network) for lists in examiner.networks.values())
    assert all(isinstance(network, Network) for network in examiner.topologies.values())
    asked = [problem for problem in examiner.problems if problem.kind == "planning"]
    assert blind_policies("planning", asked, asked, trainer.networks["graph"], Rubric(mode="graph"))
    assert examiner.prior is not None
