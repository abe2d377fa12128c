"""The frame of ``bench/gpu.py`` without a GPU: rows, provenance, resuming, the deadline, honest refusals."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "bench" / "gpu.py"
PROVENANCE = {"gpu": "Some GPU", "torch": "2", "triton": "3", "driver": "1", "sources": "abc", "commit": None}


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_gpu", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def stages(gpu: ModuleType) -> ModuleType:
    return sys.modules["gpu_stages"]


def item(gpu: ModuleType, name: str, code: str) -> Any:
    return gpu.Item(name, (sys.executable, "-c", code), sys.modules["gpu_stages"].read_json)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    """As a newcomer calls it, from elsewhere and without a path to our packages."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        cwd="/",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def test_a_row_per_item_and_only_the_rest_when_called_again(gpu: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "step-some-gpu.jsonl"
    count = tmp_path / "count"
    good = item(
        gpu, "good", f"open({str(count)!r}, 'a').write('x'); print('{{\"ok\": true, \"seconds\": 2}}')"
    )
    bad = item(gpu, "bad", "print('{\"ok\": false}')")
    broken = item(gpu, "broken", "print('about to fail'); raise SystemExit(3)")
    assert gpu.run([good, bad, broken], path, PROVENANCE, time.monotonic() + 60) == gpu.FAILED
    first = rows(path)
    assert [(row["item"], row["ok"]) for row in first] == [("good", True), ("bad", False), ("broken", False)]
    assert first[0]["seconds"] == 2 and first[2]["exit_code"] == 3 and first[2]["tail"] == ["about to fail"]
    assert all(row["gpu"] == "Some GPU" and row["date"] for row in first)

    assert gpu.run([good, bad], path, PROVENANCE, time.monotonic() + 60) == gpu.FAILED
    assert [row["item"] for row in rows(path)[3:]] == ["bad"]
    other = PROVENANCE | {"sources": "changed"}
    assert gpu.run([good], path, other, time.monotonic() + 60) == gpu.PASSED
    assert count.read_text() == "xx"


def test_the_deadline_ends_a_stage_and_its_children(gpu: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "slow.jsonl"
    slow = item(gpu, "slow", f"import time; time.sleep(3); open({str(tmp_path / 'late')!r}, 'w')")
    start = time.monotonic()
    assert gpu.run([slow], path, PROVENANCE, start + 0.5) == gpu.UNFINISHED
    assert gpu.run([slow], path, PROVENANCE, start) == gpu.UNFINISHED
    assert not path.exists()
    time.sleep(max(0.0, start + 3.5 - time.monotonic()))
    assert not (tmp_path / "late").exists()


def test_an_item_that_hangs_costs_its_limit_and_one_that_fails_says_why(gpu: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "slow.jsonl"
    code = "import sys, time; print('begun'); print('stuck', file=sys.stderr, flush=True); time.sleep(60)"
    slow = item(gpu, "slow", code)
    dead = item(gpu, "dead", "raise SystemExit('out of memory')")
    chatty = item(gpu, "chatty", "print('{\"ok\": true}'); print('{goodbye}'); print('{\"bye\": 1}')")
    assert gpu.run([slow, dead, chatty], path, PROVENANCE, time.monotonic() + 50, 5.0) == gpu.FAILED
    first, second, third = rows(path)
    assert first["timed_out"] and not first["ok"] and first["stderr"] == ["stuck"]
    assert second["stderr"] == ["out of memory"] and second["exit_code"] == 1
    assert first["tail"] == ["begun"]
    assert third["ok"] and "stderr" not in third
    log = path.with_suffix(".log").read_text()
    said = '{"ok": true}\n{goodbye}\n{"bye": 1}\n'
    assert log == f"--- slow\nstuck\nbegun\n--- dead\nout of memory\n--- chatty\n{said}"


@pytest.mark.parametrize(
    ("end", "limit", "cut"),
    [
        ("time.sleep(60)", 60.0, "its time was up"),  # at the deadline
        ("time.sleep(60)", 3.0, "its time was up"),  # at its own limit
        ("os.abort()", 60.0, "exit code -6"),
        ("raise RuntimeError('no profiler here')", 60.0, "exit code 1"),
    ],
)
def test_an_item_that_has_said_its_times_keeps_them_however_it_ends(
    gpu: ModuleType, tmp_path: Path, end: str, limit: float, cut: str
) -> None:
    code = "import os, time; print('{\"ok\": true, \"seconds\": 2}', flush=True); print('looks closer', flush=True); "
    path = tmp_path / "kernels.jsonl"
    one = item(gpu, "one", code + end)
    late = limit > 3 and "sleep" in end
    code = gpu.run([one], path, PROVENANCE, time.monotonic() + (4 if late else 60), limit)
    assert code == (gpu.UNFINISHED if late else gpu.FAILED) and gpu.passed(path, PROVENANCE) == set()
    (row,) = rows(path)
    assert row["ok"] and row["seconds"] == 2 and row["cut_short"] == cut
    assert row.get("timed_out", False) == ("time" in cut) and ("stderr" in row) == ("1" in cut)


def test_a_stage_that_cannot_be_set_up_costs_the_others_nothing(
    gpu: ModuleType, stages: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def broken(device: str) -> list[Any]:
        raise ImportError("cannot import name 'Processor'")

    good = item(gpu, "good", "print('{\"ok\": true}')")
    monkeypatch.setitem(gpu.STAGE_ITEMS, "step", broken)
    monkeypatch.setitem(gpu.STAGE_ITEMS, "kernels", lambda device: [good])
    monkeypatch.setattr(gpu, "FIRST", (stages.Part("step", "", 60), stages.Part("kernels", "^good$", 60)))
    monkeypatch.setattr(gpu, "probe", lambda device: PROVENANCE)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--stage", "first", "--out", str(tmp_path)])
    assert gpu.main() == gpu.IMPOSSIBLE
    assert [row["item"] for row in rows(tmp_path / "kernels-some-gpu.jsonl")] == ["good"]
    assert "stage step: cannot import name 'Processor'" in capsys.readouterr().err


def test_a_grandchild_that_lives_on_holds_nothing_up(stages: ModuleType) -> None:
    code = "import subprocess; subprocess.Popen(['sleep', '20'], start_new_session=True); print('done', flush=True)"
    assert stages.run_child((sys.executable, "-c", code), 10) == ("done\n", 0)


def test_a_stage_that_is_ended_leaves_no_child(tmp_path: Path) -> None:
    """A child has a session of its own, where no Ctrl-C reaches it: it would keep the GPU. By SIGTERM, which is handled
    alike and is never ignored in a job of the background."""
    code = """
import os, runpy, sys
sys.path.insert(0, BENCH)
import gpu_stages
said = "import os, time; open(FILE, 'w').write(str(os.getpid())); time.sleep(60)"
slow = gpu_stages.Item("slow", (sys.executable, "-c", said), gpu_stages.read_json)
gpu_stages.STAGE_ITEMS["tests"] = lambda device: [slow]
sys.argv = [SCRIPT, "--stage", "tests", "--device", "cpu", "--out", OUT]
runpy.run_path(SCRIPT, run_name="__main__")
"""
    file = tmp_path / "pid"
    for name, value in {"BENCH": SCRIPT.parent, "SCRIPT": SCRIPT, "OUT": tmp_path}.items():
        code = code.replace(name, repr(str(value)))
    code = code.replace("FILE", f"{str(file)!r}")
    stage = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (file.exists() and file.read_text()) and stage.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        child = int(file.read_text())
        stage.terminate()
        stage.wait(20)
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
    finally:
        stage.kill()


def test_items_that_are_not_timed_run_at_once_and_each_keeps_its_own_errors(gpu: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "tests.jsonl"
    meet = f"""
import pathlib, sys, time
mine, other = (pathlib.Path({str(tmp_path)!r}, name) for name in NAMES)
mine.touch()
while not other.exists(): time.sleep(0.01)
print(mine.name, file=sys.stderr)
raise SystemExit(1)
"""
    items = [item(gpu, a, meet.replace("NAMES", repr((a, b)))) for a, b in (("left", "right"), ("right", "left"))]
    assert gpu.run(items, path, PROVENANCE, time.monotonic() + 60, together=True) == gpu.FAILED
    assert {row["item"]: row["stderr"] for row in rows(path)} == {"left": ["left"], "right": ["right"]}


def test_what_the_gpu_reads_while_an_item_runs(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\necho "$*" >>"$0.log"; echo "1980, 3201, [N/A], 61, 0, 0x04"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    path = tmp_path / "kernels.jsonl"
    assert gpu.run([item(gpu, "a", "print('{\"ok\": true}')")], path, PROVENANCE, time.monotonic() + 60) == gpu.PASSED
    (row,) = rows(path)
    assert row["readings"] == {
        "clocks.sm": [1980.0] * 3, "clocks.mem": [3201.0] * 3, "temperature.gpu": [61.0] * 3, "memory.used": [0.0] * 3,
        gpu.MASK: ["0x04"],
    }  # fmt: skip
    asked = Path(f"{program}.log").read_text(encoding="utf-8")
    assert f"--query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu,memory.used,{gpu.MASK}" in asked
    lines = ["300, 3201, 90.5, 40, 1, 0x01\n", "1980, 3201, 701.5, 60, 9, 0x00\n", "1755, 3201, 700.0, 61, 9, 0x04\n"]
    assert gpu.readings_of(lines)["power.draw"] == [90.5, 700.0, 701.5]
    assert gpu.readings_of(lines)[gpu.MASK] == ["0x00", "0x01", "0x04"] and gpu.readings_of(["cut off, "]) == {}


def test_the_first_stage_names_items_that_there_are(stages: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "missing", lambda *modules: [])
    for part in stages.FIRST:
        names = [item.name for item in stages.STAGE_ITEMS[part.stage]("cuda") if re.search(part.items, item.name)]
        assert len(names) == 1 + part.items.count("|"), part
    result = call("--stage", "first", "--device", "cpu")
    assert result.returncode == 2 and "no dry run" in result.stderr


def test_only_the_items_that_were_asked_for(tmp_path: Path) -> None:
    result = call("--stage", "kernels", "--device", "cpu", "--out", str(tmp_path), "--items", "^advantage$")
    assert result.returncode == 0, result.stderr
    assert [row["item"] for row in rows(tmp_path / "kernels-cpu.jsonl")] == ["advantage"]
    result = call("--stage", "kernels", "--device", "cpu", "--items", "nothing")
    assert result.returncode == 2 and "no item that matches 'nothing'" in result.stderr


def test_programs_that_are_not_there(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("REWARDMAP_COMMIT", "abc")
    assert gpu.said("git", "--version") == "" and gpu.source()["commit"] == "abc"


def test_a_line_cut_off_by_a_kill_is_dropped(gpu: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "cut.jsonl"
    gpu.append(path, {"item": "a", "ok": True} | PROVENANCE)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"item": "b", "o')
    assert gpu.passed(path, PROVENANCE) == {"a"}
    gpu.append(path, {"item": "c", "ok": True} | PROVENANCE)
    assert [row["item"] for row in rows(path)] == ["a", "c"]


@pytest.mark.parametrize(
    ("last", "code", "ok", "counts"),
    [
        ("3 passed in 1.02s", 0, True, (3, 0, 0)),
        ("2 passed, 1 skipped, 4 deselected in 1s", 0, True, (2, 0, 1)),
        ("1 failed, 2 passed in 1s", 1, False, (2, 1, 0)),
        ("5 skipped in 0.1s", 0, False, (0, 0, 5)),
        ("", 4, False, (0, 0, 0)),
    ],
)
def test_reading_pytest(
    stages: ModuleType, last: str, code: int, ok: bool, counts: tuple[int, int, int]
) -> None:
    row = stages.read_pytest(f"...\n{last}\n", code)
    assert row["ok"] is ok
    assert (row["passed"], row["failed"], row["skipped"]) == counts


def test_reading_a_pytest_that_was_killed(stages: ModuleType) -> None:
    said = "collected 3 items\ntests/a.py::one PASSED [ 33%]\ntests/a.py::two[a b] FAILED [ 66%]\ntests/a.py::three "
    row = stages.read_pytest(said, None)
    assert not row["ok"] and (row["passed"], row["failed"], row["skipped"]) == (1, 1, 0) and "three" in row["tail"][-1]


def test_the_digest_follows_the_sources(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "bench" / "results")
    for name in ("rewardmap/a.py", "bench/results/step.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    before = gpu.source()["sources"]
    (tmp_path / "bench/results/step.jsonl").write_text("2")
    assert gpu.source()["sources"] == before
    (tmp_path / "rewardmap/a.py").write_text("2")
    assert gpu.source()["sources"] != before


def test_versions_of_peers_stand_in_the_row(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = tmp_path / "liger_kernel-9.8.7.dist-info" / "METADATA"
    found.parent.mkdir()
    found.write_text("Metadata-Version: 2.1\nName: liger_kernel\nVersion: 9.8.7\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    packages = gpu.probe("cpu")["packages"]
    assert packages["liger-kernel"] == "9.8.7" and "sglang" not in packages and set(packages) <= set(gpu.PACKAGES)


def test_what_is_missing_is_named(stages: ModuleType) -> None:
    stages.need("json", "pathlib")
    with pytest.raises(stages.CannotRunError, match=r"no_such_module_1, no_such_module_2;.*PYTHONPATH"):
        stages.need("json", "no_such_module_1", "no_such_module_2")


def test_the_hopper_stage_has_no_dry_run_and_reads_what_the_sanitizer_says(
    gpu: ModuleType, stages: ModuleType
) -> None:
    result = call("--stage", "csrc", "--device", "cpu")
    assert result.returncode == gpu.IMPOSSIBLE
    assert "needs a GPU" in result.stderr and not result.stdout
    said = "========= COMPUTE-SANITIZER\n2 passed, 21 deselected in 9.00s\n========= ERROR SUMMARY: 0 errors\n"
    assert stages.read_sanitizer(said, 0) == {"passed": 2, "failed": 0, "skipped": 0, "ok": True}
    assert not stages.read_sanitizer(said, 9)["ok"]


def test_without_a_gpu_it_says_so(gpu: ModuleType) -> None:
    if __import__("torch").cuda.is_available():
        pytest.skip("there is a GPU")
    result = call("--stage", "step")
    assert result.returncode == gpu.IMPOSSIBLE
    assert "no GPU here" in result.stderr and "--device cpu" in result.stderr
    assert "Traceback" not in result.stderr


def test_dry_run_of_a_training_step(tmp_path: Path) -> None:
    """Real step, real row; nothing lands in ``bench/results``."""
    result = call("--stage", "step", "--device", "cpu", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    (row,) = rows(tmp_path / "step-cpu.jsonl")
    assert row["ok"] and row["gradient_error"] <= row["gradient_tolerance"]
    assert row["step_seconds"] > 0 and row["rollout_tokens"] > 0 and row["answers_per_step"] == 128
    assert row["gpu"] is None and row["torch"] and len(row["sources"]) == 16


def test_the_kernel_stage_measures_a_case_beside_its_peers(
    gpu: ModuleType, stages: ModuleType, tmp_path: Path
) -> None:
    items = stages.kernel_items("cpu")
    assert [item.name for item in items] == [
        "linear", "linear.frozen", "linear.response-50", "linear.zero-50", "logits", "log_softmax", "advantage",
        "attention", "routes.answers", "routes.tower",
    ]  # fmt: skip
    assert gpu.run([items[-4]], tmp_path / "kernels.jsonl", PROVENANCE, time.monotonic() + 240) == gpu.PASSED
    (row,) = rows(tmp_path / "kernels.jsonl")
    assert row["ok"] and row["failed"] == {}
    assert set(row["times_faster_than"]) == {"torch eager", "loop per prompt", "floor"}
    assert row["error"]["ours"] <= row["allowed_error"]


def test_the_routes_of_attention_are_measured_and_their_table_written(
    gpu: ModuleType, stages: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = stages.kernel_items("cpu")[-2:]
    assert gpu.run(items, tmp_path / "kernels.jsonl", PROVENANCE, time.monotonic() + 240) == gpu.PASSED
    forest, tower = rows(tmp_path / "kernels.jsonl")
    assert forest["calls"] == 2 and tower["calls"] == 0
    assert set(forest["seconds"]) == {"tree_attention", "plain"} and set(tower["seconds"]) == {"sdpa", "plain"}
    import routes

    monkeypatch.setattr(routes, "TABLE", tmp_path / "table.json")
    with (tmp_path / "kernels.jsonl").open("a") as file:
        file.write('{"item": "cut')  # by a kill
    routes.write_table(tmp_path / "kernels.jsonl")
    table = json.loads((tmp_path / "table.json").read_text())["Some GPU"]
    assert table["torch"] == "2" and [row["seconds"] for row in table["rows"]] == [forest["seconds"], tower["seconds"]]


def test_a_route_that_fails_or_is_wrong_is_told(stages: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import routes

    stages.kernel_items("cpu")
    plain, case = routes.tree_attention, routes.CASES["cpu"]["answers"]

    def attention(q: Any, k: Any, v: Any, mask: Any, scale: float, route: str) -> Any:
        if route != routes.KERNELS:
            raise RuntimeError("no such kernel on this GPU")
        return plain(q, k, v, mask, scale, route)

    monkeypatch.setattr(routes, "tree_attention", attention)
    row = routes.measure(case, "cpu")
    assert row["ok"] and set(row["seconds"]) == {routes.KERNELS}
    assert row["absent"] == {"plain": "RuntimeError: no such kernel on this GPU"}

    def lost(q: Any, k: Any, v: Any, *rest: Any) -> Any:
        k.register_hook(lambda gradient: gradient * float("nan"))
        return plain(q, k, v, *rest)

    monkeypatch.setattr(routes, "tree_attention", lost)
    assert not routes.measure(case, "cpu")["ok"]


def test_a_dry_run_of_the_rollout_stage(tmp_path: Path) -> None:
    result = call("--stage", "rollout", "--device", "cpu", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    (row,) = rows(tmp_path / "rollout-cpu.jsonl")
    assert row["ok"] and row["item"] == "tiny-local"
    speeds = row["local"]
    fastest = max(speeds["generate_batch_tokens_per_second"], speeds["generate_single_tokens_per_second"])
    assert fastest > 0 and speeds["times_generate"] * fastest == pytest.approx(speeds["tokens_per_second"])
