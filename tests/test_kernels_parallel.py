"""A head split over the ranks of a gloo group gives the losses and gradients of the whole head."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

RANK = Path(__file__).with_name("kernels_parallel.py")


def test_vocabulary_parallel(tmp_path: Path) -> None:
    size = 2
    command = [sys.executable, str(RANK)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(size), str(tmp_path / "store")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip
    try:
        results = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (out, err) in zip(ranks, results, strict=True):
        assert rank.returncode == 0 and out.strip().endswith("equal"), err[-3000:]
