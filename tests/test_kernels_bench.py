"""What the kernel bench makes of its peers, and the page that its results are put on."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))
import kernel_problem
import kernel_run
import kernel_tables


def case(required: tuple[str, ...] = (), **providers: Any) -> kernel_problem.Case:
    gold = (torch.ones(4, dtype=torch.float64),)
    runs = {"ours": lambda: (torch.ones(4),), "torch eager": lambda: (torch.full((4,), 1.5),), **providers}
    return kernel_problem.Case("made up", runs, gold, 8e9, 4e9, missing={"absent": "no wheel"}, required=required)


def test_a_row_has_errors_ratios_and_the_reasons_of_peers_that_fail() -> None:
    def full() -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")

    row = kernel_run.measure(case(("big",), big=full), "cpu", 2)
    assert row["error"] == {"ours": 0.0, "torch eager": pytest.approx(0.5)}
    assert row["failed"] == {
        "absent": "no wheel", "big": "OutOfMemoryError: CUDA out of memory. Tried to allocate"
    }  # fmt: skip
    assert set(row["times_faster_than"]) == {"torch eager"} and row["counts"]
    assert not kernel_run.measure(case(("absent",)), "cpu", 1)["counts"]


def test_a_nan_in_a_later_tensor_is_no_small_error() -> None:
    good, bad = torch.ones(4), torch.full((4,), torch.nan)
    for found in ((good, bad), (bad, good)):
        assert math.isnan(kernel_problem.relative_error(found, (good, good)))
        runs = {"ours": lambda found=found: found, "torch eager": lambda: (good, good)}
        row = kernel_run.measure(kernel_problem.Case("made up", runs, (good.double(),) * 2, 1.0, 1.0), "cpu", 1)
        assert not row["error"]["ours"] <= kernel_run.allowed_error(row)


def test_the_providers_of_the_native_bench_give_one_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    import bench_native

    if bench_native.native.unavailable_reason() is not None:
        pytest.skip(str(bench_native.native.unavailable_reason()))
    monkeypatch.setattr(bench_native, "ROWS", 6)
    monkeypatch.setattr(bench_native, "VOCAB", 96)
    providers, before = bench_native.row_providers(torch.float32)
    (wanted,) = providers["torch eager"]()
    for name in ("plain torch", "C++", "C++ in place", "C++ in place"):
        before.get(name, lambda: None)()
        torch.testing.assert_close(providers[name]()[0], wanted)


def test_a_fallen_ratio_is_named() -> None:
    def row(**ratios: float) -> dict[str, Any]:
        return {"times_faster_than": ratios}

    before = row(**{"torch eager": 2.0, "floor": 0.8})
    assert kernel_run.slower_than(row(**{"torch eager": 1.6}), before, 1.35) is None
    assert kernel_run.slower_than(row(**{"torch eager": 1.4}), before, 1.35) == "1.40 x torch eager, was 2.00"
    assert kernel_run.slower_than(row(floor=0.4), before, 1.35) == "0.40 x floor, was 0.80"
    assert kernel_run.slower_than(row(), before, 1.35) is None


def test_rows_that_leave_the_products_are_told_from_the_work_of_peers() -> None:
    import kernel_cases

    made = kernel_cases.linear_case(2048, 64, 8, "cpu", torch.float32, response=0.5, zero=0.5)
    assert made.about["scored_rows"] == 1024 and made.about["contributing_rows"] == 512
    assert made.useful == 6 * 512 * 64 * 8 == made.flop["ours"] and made.flop["torch eager"] == 2 * made.useful
    for name in ("ours", "torch eager", "linear_logprobs"):
        assert kernel_problem.errors(made, name) < 1e-5
    varying = kernel_cases.varying_case(1024, 64, 8, "cpu", torch.float32)
    lengths = [len(varying.providers["ours"]()[0]) for _ in range(3)]
    assert lengths == [1022, 1020, 1018] and kernel_problem.errors(varying, "torch eager") < 1e-5


def test_the_page_shows_the_stored_results() -> None:
    done = subprocess.run([sys.executable, str(Path(kernel_tables.__file__)), "--check"], check=False)
    assert done.returncode == 0, "run python bench/kernel_tables.py"


def test_a_gpu_s_rows_count_with_their_peers_only(tmp_path: Path) -> None:
    row: dict[str, Any] = {
        "item": "linear.7b", "operation": "linear_policy_loss", "ok": True, "counts": True, "device": "cuda",
        "gpu": "GPU", "driver": "1", "torch": "2", "triton": "3", "commit": None, "times_faster_than": {"TRL": 2.0},
        "fastest_s": {"ours": 0.5}, "useful_gflop_per_s": {"ours": 5e5}, "gbyte_per_s": 3.0,
        "peak_bytes": {"ours": 2e9}, "error": {"ours": 1e-3}, "failed": {"eager": "OutOfMemoryError: full"},
        "path": ["triton", ["exponentials_kernel"]],
    }  # fmt: skip
    groups = {
        **row, "item": "advantage", "operation": "group_advantage", "host_s": {"ours": 1e-5, "eager": 3e-5},
        "on_device": {"ours": {"launches": 1, "seconds": 2e-6}, "eager": {"launches": 6, "seconds": 1.2e-5}},
    }  # fmt: skip
    rows = [groups, {**row, "fastest_s": {"ours": 9.0}}, row, {**row, "item": "alone", "ok": False, "counts": False}]
    (tmp_path / "kernels-gpu.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    text = kernel_tables.section(tmp_path)
    assert "| linear.7b | triton | 500 ms | 2.00 | – | 500 | 3 | 2.00 | 1.0e-03 | – |" in text
    assert "| ours | 1 | 1.00 | 1.00 |" in text and "| eager | 6 | 6.00 | 3.00 |" in text
    assert "alone" not in text and "9e+03" not in text and "Not timed: eager: OutOfMemoryError: full." in text


def test_a_slow_provider_is_left_after_three_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def takes(amount: float) -> kernel_problem.Run:
        def run() -> tuple[torch.Tensor, ...]:
            now[0] += amount
            return ()

        return run

    monkeypatch.setattr(kernel_run, "_clock", lambda device: now[0])
    times = kernel_run.take_turns({"ours": takes(0.1), "slow": takes(6.0)}, "cpu", 15)
    assert times["ours"] == pytest.approx([0.1] * 15) and times["slow"] == pytest.approx([6.0] * 3)
