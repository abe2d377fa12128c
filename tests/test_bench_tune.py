"""The sweep over launches of the tree-attention kernels, with times that the test makes up, on the CPU."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

sys.path.append(str(Path(__file__).parent.parent / "bench"))
import kernel_times
import routes
import tune_tree

from rewardmap_kernels import tree_op
from rewardmap_kernels.tree_op import Blocks, Plan

KEY = (False, 16)
USUAL = tree_op.PLANS[KEY]
FAST = Plan(Blocks(64, 32, 4, 3), Blocks(64, 32, 4, 2), Blocks(32, 64, 8, 3))
LURE = Plan(Blocks(16, 16, 4, 2), Blocks(16, 16, 4, 2), Blocks(64, 64, 8, 2))
"""Its forward is the fastest, but not with the dq that its tiles bind it to; its dkv is slow."""
SECONDS = {
    USUAL: (3.0, 4.0, 5.0), FAST: (2.0, 3.0, 1.0), LURE: (1.0, 9.0, 8.0),
}  # fmt: skip


def events(run: Callable[[], Any]) -> list[tuple[str, float, float]]:
    """As a GPU would take them: five runs by the plan that is set while they run."""
    seen: list[Plan] = []
    plain = tune_tree.tree_attention
    tune_tree.tree_attention = lambda *args: (seen.append(tree_op.PLANS[KEY]), plain(*args))[1]
    try:
        run()
    finally:
        tune_tree.tree_attention = plain
    assert len(seen) == tune_tree.ROUNDS and len(set(seen)) == 1
    found, now = [], 0.0
    for plan in seen:
        for name, took in zip(("tree_forward_kernel", "tree_dq_kernel", "tree_dkv_kernel"), SECONDS[plan], strict=True):
            found.append((name, now, now + took))
            now += took
    return found


def measured(*plans: Plan, early: Callable[[dict[str, Any]], None] = lambda row: None) -> dict[str, Any]:
    return tune_tree.measure(routes.CASES["cpu"]["answers"], plans, "cpu", torch.float32, events, early)


def test_the_best_plan_is_named_and_the_usual_one_stays() -> None:
    told: list[dict[str, Any]] = []
    row = measured(FAST, LURE, early=told.append)
    assert row["ok"] and row["failed"] == {} and tree_op.PLANS[KEY] == USUAL
    assert [len(each["seconds"]["dkv"]) for each in told] == [1, 2, 3] and told[-1] == row  # none is lost to a kill
    assert row["best"] == {name: tune_tree.told(blocks) for name, blocks in zip(routes.PASSES, FAST, strict=True)}
    assert row["usual"]["dkv"] == "32 x 32, 4 warps, 2 stages" and row["best_times_faster"] == 12.0 / 6.0
    assert row["seconds"]["forward"]["16 x 16, 4 warps, 2 stages"] == 1.0


def test_what_is_wrong_or_does_not_launch_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tune_tree.tree_attention

    def attention(*args: Any) -> torch.Tensor:
        if tree_op.PLANS[KEY] == LURE:
            raise RuntimeError("out of resource: shared memory")
        return plain(*args) * (1.02 if tree_op.PLANS[KEY] == FAST else 1.0)

    monkeypatch.setattr(tune_tree, "tree_attention", attention)
    row = measured(FAST, LURE)
    assert row["best"] == row["usual"] and len(row["seconds"]["dkv"]) == 1 and tree_op.PLANS[KEY] == USUAL
    wrong, refused = row["failed"].values()
    assert "from the usual plan's results" in wrong and refused == "RuntimeError: out of resource: shared memory"


def test_where_the_usual_plan_has_no_time_the_row_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    row = tune_tree.measure(routes.CASES["cpu"]["answers"], [FAST], "cpu", torch.float32, lambda run: [])
    assert not row["ok"] and len(row["failed"]) == 2


def test_every_candidate_is_tried() -> None:
    plans = tune_tree.candidates()
    assert len(plans) == len(tune_tree.COLUMNS) * len(tune_tree.STAGES)
    assert {(*plan.forward[:2], plan.forward.warps) for plan in plans} == set(tune_tree.ROWS)
    assert {(*plan.dkv[:2], plan.dkv.warps) for plan in plans} == set(tune_tree.COLUMNS)
    assert all(plan.forward == plan.dq for plan in plans)
    assert {plan.forward.stages for plan in plans} == {plan.dkv.stages for plan in plans} == set(tune_tree.STAGES)


def test_the_summary_of_a_trace() -> None:
    found = kernel_times.summary([("a", 1.0, 2.0), ("b", 2.0, 5.0), ("a", 6.0, 6.5)], 1)
    assert found == {"launches": 3, "seconds": 4.5, "span_seconds": 5.5, "kernels": {"b": [1, 3.0, 3.0]}}
    assert kernel_times.summary([], 3) == {"launches": 0, "seconds": 0.0, "span_seconds": 0.0, "kernels": {}}


@pytest.mark.parametrize(
    ("case", "flop"),
    [
        (routes.Case((3, 2), (2,), heads=(2, 1), head_dim=16), 14.0 * (6 + 2 * (3 + 3 + 3)) * 2 * 16),
        (routes.Case((3,), trees=2, heads=(2, 2), head_dim=16, segments=True), 14.0 * 18 * 2 * 16),
    ],
    ids=["tree", "segments"],
)
def test_useful_arithmetic_is_that_of_the_visible_pairs(case: routes.Case, flop: float) -> None:
    assert routes.useful_flop(case) == flop
