"""Training where every tensor of the model says ``cuda:0``: none of the host among those of the device, no needless
wait, the CPU's numbers. It takes no GPU; see ``emulated_cuda.py``."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rewardmap.report import read_metrics

JOB = Path(__file__).parent / "emulated_cuda_job.py"
MISSING = [
    reason
    for reason, missing in {
        "triton is not installed": importlib.util.find_spec("triton") is None,
        "there is no g++": shutil.which("g++") is None,
        "this torch has a CUDA device of its own": torch.version.cuda is not None,
    }.items()
    if missing
]
pytestmark = pytest.mark.skipif(bool(MISSING), reason="; ".join(MISSING))
VARIANTS = ("frozen", "tower", "reference", "sharded", "qwen3_vl", "half")
OURS = {
    "trainer.py _backward (tolist)",
    "trainer.py _update (_local_scalar_dense)",
    "vision.py checksum (tolist)",
    "vision.py keep (_to_copy cuda -> cpu)",
}
"""Where a step waits: its sums, the gradient's norm, that a frozen tower's weights are what they were, and a new
picture's outputs on their way to the host."""
TOWERS = ("policy.py _see", "elsewhere", "tree_attention.py segment_attention")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore::RuntimeWarning", str(JOB), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def test_the_emulation_refuses_and_counts_what_it_should(job):
    seen = json.loads((job / "refusals.json").read_text())
    assert "at least two devices" in seen["said"]
    assert not seen["quiet"] and seen["waits"] == 5


def test_the_kernel_library_never_waits(job):
    assert json.loads((job / "operations.json").read_text()) == {}


def test_divisors_that_are_not_positive_spoil_their_rows_and_no_others(job):
    *logprobs, by_row, hidden, logits = json.loads((job / "divisors.json").read_text())
    none = [[row for row, value in enumerate(values) if value is None] for values in (*logprobs, by_row)]
    # Masked rows are not read, where there is a mask: their temperature and divisor are anything.
    assert none == [[3, 4], [3, 4], [3, 4, 5], [3, 4, 5], [1, 2]]
    for gradient in (hidden, logits):
        assert [value is None for value in gradient] == [False, True, True, True, True, False] and gradient[5] == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_is_that_of_the_cpu(job, variant):
    seen = json.loads((job / f"{variant}.json").read_text())
    # The second step follows AdamW's first, which divides also what rounding left of a gradient by its own size.
    accuracy = 2e-2 if variant == "half" else 1e-4
    for mine, expected in zip(seen["cuda"], seen["cpu"], strict=True):
        assert mine["packed_tokens"] == expected["packed_tokens"]
        for name in ("loss", "grad_norm"):
            assert mine[name] == pytest.approx(expected[name], rel=accuracy), name
    assert seen["kernel"][0] == "triton"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_waits_for_the_gpu_only_where_it_must(job, variant):
    """transformers' tower waits by itself in our call of it, in its backward pass, and in float32 at its windows."""
    waits = json.loads((job / f"{variant}.json").read_text())["waits"]
    ours = {place: count for place, count in waits.items() if not place.startswith(TOWERS)}
    assert ours.keys() <= OURS and set(ours.values()) == {1}
    if variant == "frozen":  # its pictures were seen before
        assert waits == ours and len(ours) == 3
    if variant == "half":
        assert not any(place.startswith("tree_attention.py") for place in waits)


def test_a_whole_run_is_that_of_the_cpu(job):
    cpu, cuda = (read_metrics(job / f"run-{device}") for device in ("cpu", "cuda"))
    assert [row["step"] for row in cuda] == [1, 2]
    for mine, expected in zip(cuda, cpu, strict=True):
        for name in ("reward", "accuracy", "packed_tokens"):
            assert mine[name] == expected[name], name
        for name in ("loss", "grad_norm", "reference_kl"):
            assert mine[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name
    theirs, ours = (json.loads((job / f"run-{device}" / "report.json").read_text()) for device in ("cpu", "cuda"))
    assert ours["weighted_accuracy"] == theirs["weighted_accuracy"]
