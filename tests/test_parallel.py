"""One, two and four processes compute the same training: losses, gradients, weights, whatever the split."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rewardmap.report import read_metrics
from rewardmap.train.checkpoint import list_checkpoints
from rewardmap.train.ranks import groups_from_bytes, groups_to_bytes
from rewardmap.types import Problem, Rollout, RolloutGroup

JOB = Path(__file__).parent / "parallel_job.py"
FAST = ("plain", "exact", "updates", "everything", "reference")
SLOW = (*FAST, "hybrid", "checkpointing", "offload", "lora", "reference tower", "tower", "tower checkpointing")
WIDE = {"lora": "lora wide", "tower": "tower wide", "tower checkpointing": "tower wide"}
"""The same training in float64, on one process; of the other variants in float32 it is ``plain wide``."""


def run_job(folder: Path, variants: tuple[str, ...], sizes: tuple[int, ...]) -> Path:
    environment = {**os.environ, "VARIANTS": ",".join(variants), "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    command = [sys.executable, str(JOB), str(folder), *map(str, sizes)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def fast(tmp_path_factory) -> Path:
    return run_job(tmp_path_factory.mktemp("ranks"), (*FAST, "plain wide", "sampling", "ahead"), (1, 2))


@pytest.fixture(scope="module")
def slow(tmp_path_factory) -> Path:
    return run_job(tmp_path_factory.mktemp("ranks"), (*SLOW, "plain wide", *sorted(set(WIDE.values()))), (1, 2, 4))


def compare(folder: Path, variant: str, size: int) -> None:
    expected, got = (load_file(folder / f"{variant}-{n}.safetensors") for n in (1, size))
    assert json.loads((folder / f"{variant}-1.json").read_text()) == json.loads(
        (folder / f"{variant}-{size}.json").read_text()
    )
    assert got.keys() == expected.keys()
    exact = expected["weight.lm_head.weight"].dtype == torch.float64
    wide = {} if exact else load_file(folder / f"{WIDE.get(variant, 'plain wide')}-1.safetensors")
    # AdamW divides small gradients by their own size, so that in float32 its weights are compared through the losses
    # and gradients of later steps alone.
    compared = {name: value for name, value in expected.items() if exact or not name.startswith("weight.")}
    sizes = {name: float(value.abs().max().clamp(min=1e-30)) for name, value in compared.items()}
    # In float32 another split may be as far from one process as twice what rounding does to that one process, in the
    # tensor of that kind (loss, gradients) that it changes most: one tensor's rounding is a single draw.
    rounding = dict.fromkeys((name.split(".")[0] for name in compared), 5e-11 if exact else 6e-8)
    for name in wide.keys() & compared.keys():
        kind = name.split(".")[0]
        error = float((compared[name].double() - wide[name]).abs().max()) / sizes[name]
        rounding[kind] = max(rounding[kind], error)
    for name, value in compared.items():
        assert value.dtype == got[name].dtype
        error, limit = float((got[name] - value).abs().max()) / sizes[name], 2 * rounding[name.split(".")[0]]
        assert error <= limit, f"{variant} on {size}: {name} off by {error:.2g}, rounding {limit / 2:.2g}"


@pytest.mark.parametrize("variant", FAST)
def test_two_ranks_train_as_one(fast, variant):
    compare(fast, variant, 2)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("variant", SLOW)
def test_ranks_train_as_one_in_every_mode(slow, variant, size):
    compare(slow, variant, size)


@pytest.mark.slow
def test_the_modes_do_not_change_the_training(slow):
    """Hybrid sharding, checkpointing and offload change where weights lie and when they are computed, nothing else."""
    same = {"hybrid": "plain", "checkpointing": "plain", "offload": "plain", "tower checkpointing": "tower"}
    for name, other in same.items():
        mine, theirs = (load_file(slow / f"{one}-4.safetensors")["loss"] for one in (name, other))
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


def test_ranks_sample_on_sharded_weights_and_agree(fast):
    """Also when only one of them has a question; the policy that sampled is the policy that trains."""
    first, second = json.loads((fast / "sampling-2.json").read_text())
    assert first == second and len(first) == 3
    assert all(row["rollout_drift"] < 1e-4 for row in first)
    assert all(row["grad_norm"] > 0 for row in first)


def test_ranks_gather_the_next_answers_while_they_train(fast):
    first, second = json.loads((fast / "ahead-2.json").read_text())
    assert first == second and len(first) == 5
    assert all(row["grad_norm"] > 0 for row in first)


def test_a_checkpoint_of_two_ranks_is_read_by_one_and_that_by_three(tmp_path):
    run_job(tmp_path, ("checkpoint",), (2, 1, 3))
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3


def test_a_whole_run_on_two_ranks(tmp_path):
    run_job(tmp_path, ("run",), (2,))
    out = tmp_path / "run"
    rows = read_metrics(out)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["rollout_drift"] < 1e-4 and len(row["train_flop"]) == 2 for row in rows)
    assert abs(rows[0]["reference_kl"]) < 1e-6 < rows[1]["reference_kl"]
    assert [path.name for path in list_checkpoints(out / "checkpoints")] == ["step-000001", "step-000002"]
    assert (out / "report.json").is_file() and (out / "evaluation" / "before.jsonl").is_file()


def test_groups_travel_bit_for_bit():
    problem = Problem("p", "", "", "TorF1", 1, "", "", "a/b", "easy")
    nats = (-0.0, -1e-310, -0.1, float("-inf"))
    answers = (Rollout((1, 151_935, 7, 0), nats, "é\ud800\n", "stop", 3), Rollout((), (), "", "abort", 0))
    uneven = (Rollout((5, 6), (-0.5,), "said by one that reads the groups", "length", 1),)
    groups = [RolloutGroup(problem, (9, 8), answers), RolloutGroup(problem, (), uneven)]
    back = [RolloutGroup(problem, *one) for one in groups_from_bytes(groups_to_bytes(groups))]
    assert repr(back) == repr(groups)  # tells -0.0 from 0.0
    assert groups_from_bytes(groups_to_bytes([])) == []
