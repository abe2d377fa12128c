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


@pytest.mark.parametrize("name", ["floor", "big"])
def test_a_provider_that_fails_at_a_later_call_costs_no_row(name: str) -> None:
    calls = iter(range(9))

    def later() -> Any:
        if next(calls):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return (torch.ones(4),)

    row = kernel_run.measure(case((name,), **{name: later}), "cpu", 2)
    assert row["failed"][name] == "OutOfMemoryError: CUDA out of memory" and row["counts"]
    assert set(row["times_faster_than"]) == {"torch eager"}
    with pytest.raises(torch.OutOfMemoryError):
        kernel_run.measure(case(ours=later), "cpu", 2)


def test_times_are_told_before_the_looks_that_a_gpu_alone_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A profiler that fails costs its column only; what fails after the times costs no times."""
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(kernel_run.kernel_cases, "launched", dict)
    monkeypatch.setattr(kernel_run.kernel_times, "ceilings", dict)

    def refused(run: Any) -> Any:
        raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES\nmore")

    monkeypatch.setattr(kernel_run.kernel_times, "kernel_events", refused)
    told: list[dict[str, Any]] = []
    row = kernel_run.measure(case(), "cuda", 2, lambda row: told.append(dict(row)))
    assert set(told[0]["fastest_s"]) == {"ours", "torch eager"} and "host_s" not in told[0]
    assert [len(row) for row in told] == sorted(len(row) for row in told) and told[-1].keys() == row.keys()
    why = {"failed": "RuntimeError: CUPTI_ERROR_INSUFFICIENT_PRIVILEGES"}
    assert row["on_device"] == {"ours": why, "torch eager": why} and row["peak_bytes"]["ours"] == 0
    assert row["failed"] == {"absent": "no wheel"}
    assert kernel_tables._launches(row)[-1].startswith("| torch eager | – | – | ")
    short = kernel_tables._cells({**told[0], "path": None}, ["torch eager"], True)
    assert "–" in short and kernel_tables._launches(told[0]) == []


def test_a_nan_in_a_later_tensor_is_no_small_error() -> None:
    good, bad = torch.ones(4), torch.full((4,), torch.nan)
    for found in ((good, bad), (bad, good)):
        assert math.isnan(kernel_problem.relative_error(found, (good, good)))
        runs = {"ours": lambda found=found: found, "torch eager": lambda: (good, good)}
        row = kernel_run.measure(kernel_problem.Case("made up", runs, (good.double(),) * 2, 1.0, 1.0), "cpu", 1)
        assert not row["error"]["ours"] <= kernel_run.allowed_error(row)


def test_launches_of_the_policy_kernel_are_tried_on_logits_as_a_model_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    import kernel_cases

    from rewardmap_kernels import triton_launch

    seen: list[torch.dtype] = []

    def fused(operation: str, logits: torch.Tensor, *rest: Any, in_place: bool) -> tuple[torch.Tensor, ...]:
        seen.append(logits.dtype)
        return logits[:, 0], logits[:, 1], logits, logits

    monkeypatch.setattr(triton_launch, "statistics", lambda *arguments: None)
    monkeypatch.setattr(triton_launch, "fused", fused)
    made = kernel_cases.tune_case("POLICY_ROW", 512, 8, "cpu", torch.bfloat16)
    assert seen == [torch.bfloat16] and made.bytes == 2 * 2 * 512 * 8


def test_attention_beside_its_definition_and_the_unshared_sequences() -> None:
    import kernel_cases
    import routes

    made = kernel_cases.attention_case(routes.Case((9, 4), (3,), heads=(4, 2), head_dim=16), "cpu", torch.float32)
    assert all(kernel_problem.errors(made, name) < 1e-5 for name in made.providers) and len(made.exact) == 4


class Guard:
    """The gate of ``bench_kernels`` on rows that the test makes up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        import bench_kernels

        self.bench, self.path = bench_kernels, tmp_path / "kernels-some-cpu.json"
        self.again = 2.0
        monkeypatch.setattr(bench_kernels, "BASELINE", self.path)
        monkeypatch.setattr(bench_kernels, "CASES", {"head": lambda: None, "rows": lambda: None})
        monkeypatch.setattr(bench_kernels, "ROWS", {})
        monkeypatch.setattr(bench_kernels.kernel_run, "measure", lambda *_: self.row(self.again))

    def row(self, ratio: float) -> dict[str, Any]:
        return {"times_faster_than": {"torch eager": ratio}}

    def check(self) -> None:
        self.bench.test_no_ratio_is_worse_than_this_device_s_baseline()


def test_the_guard_fails_by_name_where_a_kernel_is_slower_twice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    guard = Guard(monkeypatch, tmp_path)
    guard.path.write_text(json.dumps({"torch": "0", "rows": {"head": guard.row(2.0), "rows": guard.row(2.0)}}))
    guard.bench.ROWS |= {"head": guard.row(1.0), "rows": guard.row(1.9)}
    guard.check()  # at the second measurement it was not
    guard.again = 1.2
    with pytest.raises(AssertionError, match=r"^head: 1.20 x torch eager, was 2.00\n *\(baseline: torch 0, here"):
        guard.check()


def test_a_device_without_a_baseline_is_told_how_to_store_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    guard = Guard(monkeypatch, tmp_path)
    told = "nothing is guarded: there is no baseline of .*REWARDMAP_BENCH_WRITE=1"
    with pytest.warns(UserWarning, match=told), pytest.raises(pytest.skip.Exception, match=told):
        guard.check()
    monkeypatch.setenv("REWARDMAP_BENCH_WRITE", "1")
    guard.bench.ROWS["head"] = guard.row(2.0)
    with pytest.raises(AssertionError, match="no baseline without rows: run all"):  # which failed, or was not run
        guard.check()
    assert not guard.path.exists()
    guard.bench.ROWS["rows"] = guard.row(2.0)
    guard.check()
    assert set(json.loads(guard.path.read_text())["rows"]) == {"head", "rows"}


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
    both = row(**{"torch eager": 1.4, "floor": 0.5})
    assert kernel_run.slower_than(both, before, 1.35) == "1.40 x torch eager, was 2.00; 0.50 x floor, was 0.80"
    assert kernel_run.slower_than(row(**{"torch eager": 1.4, "floor": 0.7}), before, 1.35) is None
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
    with (tmp_path / "kernels-gpu.jsonl").open("a") as file:
        file.write('{"item": "cut')  # by a kill
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


def test_launches_are_told_where_the_profiler_may_not_look() -> None:
    device = {"launches": 0, "seconds": 0.0}
    row = {"host_s": {"ours": 1e-5, "eager": 3e-5}, "on_device": {"ours": device, "eager": device}}
    assert kernel_tables._launches(row)[-1] == "| eager | 0 | – | 3.00 |"
