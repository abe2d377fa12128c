"""The worked example of docs/rewards.md: its numbers are what the code gives."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rewardmap.rewards import FAILURES, Rubric
from rewardmap.transit.graph import Line, Network
from rewardmap.types import Problem

PAGE = Path(__file__).parents[1] / "docs" / "rewards.md"
pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="the docs are not here")

NETWORK = Network(
    "made/up",
    "easy",
    (
        Line("Red Line", "#d00000", ("Alpha", "Bravo", "Charlie", "Delta", "Echo")),
        Line("Blue Line", "#0000d0", ("Foxtrot", "Charlie", "Golf", "Hotel")),
    ),
    {},
)
ASKED = Problem(
    "example", b"", "", "planning", -1, "Alpha", "Hotel", "made/up", "easy", transfers_required=1
)  # fmt: skip


def test_the_page_shows_what_the_code_gives() -> None:
    page = PAGE.read_text("utf-8")
    answers = re.findall(r"^```text\n(.*?)\n```$", page, flags=re.MULTILINE | re.DOTALL)
    assert len(answers) == 6
    batches = {
        mode: Rubric(mode=mode).score([ASKED] * 6, answers, {"made/up": NETWORK})  # type: ignore[arg-type]
        for mode in ("reference", "paper", "graph")
    }
    for i in range(6):
        scores = " | ".join(f"{batch.score[i]:.2f}" for batch in batches.values())
        row = f"| {i + 1} | {scores} | {FAILURES[batches['graph'].failure[i]]} |"
        assert row in page, row


def test_the_reward_of_ones_own_that_the_page_shows_works() -> None:
    (block,) = re.findall(r"^```python\n(# my_rewards\.py\n.*?)^```$", PAGE.read_text("utf-8"), re.M | re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    asked = replace(ASKED, kind="Counting2", answer=3)
    assert [names["near"](asked, text) for text in (r"\boxed{3}", r"\boxed{4}", "three")] == [10, 5, 0]
