"""The phase timer adds up."""

from __future__ import annotations

import time

import pytest

from rewardmap.profiling import PhaseTimer, peak_rss_bytes, speed


def test_phases_add_up_and_the_inner_one_is_charged() -> None:
    timer = PhaseTimer()
    start = time.perf_counter()
    with timer.phase("outer"):
        time.sleep(0.02)
        with timer.phase("inner"):
            time.sleep(0.05)
        time.sleep(0.02)
    whole = time.perf_counter() - start
    time.sleep(0.05)  # outside: charged to nobody
    step = timer.end_step()
    assert list(step) == ["outer", "inner"]
    assert sum(step.values()) == pytest.approx(whole, abs=0.002)
    assert step["inner"] >= 0.05 and 0.04 <= step["outer"] < whole - 0.05
    assert timer.totals == step


def test_steps_are_parts_of_the_totals() -> None:
    timer = PhaseTimer()
    steps = []
    for _ in range(3):
        with timer.phase("train"):
            time.sleep(0.002)
        steps.append(timer.end_step()["train"])
    assert timer.totals["train"] == pytest.approx(sum(steps))
    assert timer.end_step() == {}


def test_a_step_may_end_inside_a_phase() -> None:
    timer = PhaseTimer()
    with timer.phase("train"):
        time.sleep(0.01)
        first = timer.end_step()
        time.sleep(0.01)
    assert first["train"] >= 0.01
    assert timer.end_step()["train"] >= 0.01


def test_an_error_inside_a_phase_is_charged_and_passes() -> None:
    timer = PhaseTimer()
    with pytest.raises(ZeroDivisionError), timer.phase("outer"), timer.phase("inner"):
        raise ZeroDivisionError
    with timer.phase("next"):
        pass
    assert set(timer.end_step()) == {"outer", "inner", "next"}


def test_peak_memory_is_in_bytes_and_never_falls() -> None:
    before = peak_rss_bytes()
    held = bytes(range(256)) * 2**18
    during = peak_rss_bytes()
    assert during >= max(before, len(held))
    del held
    assert peak_rss_bytes() >= during


def test_speed_counts_shared_tokens_and_waiting_ranks() -> None:
    counts = {"packed_tokens": 600, "logical_tokens": 1800, "slots": 800, "flop": [4e9, 2e9], "model_flop": 5e9}
    counts["slowest_flop"] = 4e9
    row = speed({"rollout": 9.0, "train": 2.0}, **counts, peak_flops=1e10)
    assert row["computed_tokens_per_second"] == 300 and row["logical_tokens_per_second"] == 900
    assert row["sharing"] == 3 and row["padding"] == 0.25
    assert row["idle"] == 0.25  # the second rank waits half of the time
    turns = {**counts, "flop": [3e9, 3e9]}  # of two updates, in which one rank and then the other waits
    assert speed({"train": 2.0}, **turns, peak_flops=None)["idle"] == 0.25
    assert (row["mfu"], row["hfu"]) == pytest.approx((5e9 / 2 / 2e10, 6e9 / 2 / 2e10))
    assert not {"mfu", "hfu"} & speed({"train": 2.0}, **counts, peak_flops=None).keys()
    nothing = dict.fromkeys(counts, 0) | {"flop": [0.0]}
    assert speed({"train": 2.0}, **nothing, peak_flops=None).keys() == {"peak_memory_gb"}
