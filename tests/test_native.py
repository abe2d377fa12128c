"""The C++ operators of the CPU: equal to the definition on every instruction set and under sanitizers, registered with
torch, built once by many processes, and missed in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rewardmap_kernels import (
    PolicyObjective,
    group_advantage,
    last_path,
    logits_policy_loss,
    native,
    policy_loss,
    use_implementation,
)
from rewardmap_kernels.dispatch import choose

sys.path.append(str(Path(__file__).parent))
import kernels_cases as cases

SCRIPT = Path(__file__).parent / "native_operators.py"
try:
    native.compiler("cpu")
except native.NativeUnavailableError as reason:
    pytest.skip(str(reason), allow_module_level=True)

# With a compiler there is no excuse: a library that does not build is a failure, not a skip.
assert native.unavailable_reason() is None, native.unavailable_reason()
from rewardmap_kernels import native_rows  # noqa: E402


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(("capability", "products"), [
    ("default", "ALL"), ("avx2", "ALL"), ("avx512", "ALL"), ("avx512", "AVX512_CORE")
])  # fmt: skip
def test_operators_equal_the_definition(capability: str, products: str) -> None:
    if capability == "avx512" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("torch itself dies of AVX-512 that is asked for where there is none")
    lowered = {"ATEN_CPU_CAPABILITY": capability, "ONEDNN_MAX_CPU_ISA": products}
    done = python(str(SCRIPT), str(native.library()), **lowered)
    assert done.returncode == 0, done.stderr
    ran = done.stdout.split(":")[0]
    assert ran == {"default": "scalar"}.get(capability, capability) or ran in ("avx2", "scalar"), done.stdout
    if products == "AVX512_CORE":
        assert done.stdout.endswith("products by avx512 and avx512\n"), done.stdout


@pytest.mark.parametrize("objective", [o for o in cases.OBJECTIVES if not o.needs_sequence], ids=cases.objective_id)
@pytest.mark.parametrize("spread", [0.3, 15.0])
def test_the_objective_is_that_of_policy_loss(objective: PolicyObjective, spread: float) -> None:
    """The coefficient of each row: near the policy, and beyond every bound and clamp."""
    n = 512
    g = torch.Generator().manual_seed(5)
    logits, targets = torch.randn(n, 9, generator=g), torch.randint(0, 9, (n,), generator=g)
    logprobs = torch.log_softmax(logits, 1).gather(1, targets[:, None])[:, 0]
    rows = cases.row_inputs(n, dtype=torch.float32)
    for name in ("old_logprobs", "ref_logprobs", "rollout_logprobs"):
        rows[name] = logprobs + spread * torch.randn(n, generator=g)
    for old in (rows["old_logprobs"], None):
        rows["old_logprobs"] = old
        inputs = {k: v for k, v in rows.items() if k not in ("loss_mask", "sequence")} | {"objective": objective}
        choose("logits_policy_loss", logits)
        done = native_rows.fused(
            "logits_policy_loss", logits, targets, 1.0, rows["loss_mask"], inputs, None, False
        )
        exact = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        wanted = policy_loss(
            done.logprobs.double(), entropy=done.entropy.double(), loss_mask=rows["loss_mask"], **exact
        )
        # Differences of log-probabilities near 45 are rounded to 2^-20, their exponentials r by as much, and sapo has
        # an exponential of that: r^2 e^-r at most times as much.
        absolute = 4e-6 if objective.name == "sapo" else 1e-9
        torch.testing.assert_close(done.d_logprob.double(), wanted.d_logprob, rtol=4e-6, atol=absolute)


def test_nan_that_a_row_reads_reaches_its_coefficient() -> None:
    logits, targets = torch.randn(20, 9, generator=torch.Generator().manual_seed(5)), torch.arange(20) % 9
    for objective in (o for o in cases.OBJECTIVES if not o.needs_sequence):
        for name in cases.read_by_derivative(objective):
            rows = cases.row_inputs(20, dtype=torch.float32)
            rows[name][7], keep = float("nan"), rows.pop("loss_mask") | True
            inputs = {"objective": objective, **rows}
            choose("logits_policy_loss", logits)
            done = native_rows.fused("logits_policy_loss", logits, targets, 1.0, keep, inputs, None, False)
            assert done.d_logprob.isnan().nonzero().tolist() == [[7]], (objective, name)


def test_no_rows_are_no_error() -> None:
    objective = PolicyObjective("grpo", kl_coef=0.1, importance_correction="truncate")
    logits = torch.empty(0, 9, requires_grad=True)
    none = torch.empty(0)
    with use_implementation("native"):
        out = logits_policy_loss(
            logits, none.long(), advantages=none, old_logprobs=none, ref_logprobs=none, rollout_logprobs=none,
            normalizer=1.0, objective=objective,
        )  # fmt: skip
    out.loss.backward()
    assert out.loss == 0 and logits.grad is not None and logits.grad.shape == (0, 9)


def operator_calls() -> dict[str, tuple[Any, ...]]:
    """Arguments of every operator."""
    g = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(6, 21, generator=g), torch.tensor([0, 3, 20, 5, 6, 7])
    ones, keep = torch.rand(6, generator=g) + 0.5, torch.tensor([True, True, False, True, True, True])
    statistics = (logits, targets, 1.0, ones, keep)
    gradient = (logits, targets, 0.7, None, ones, ones, ones, ones)
    policy = (
        logits, targets, 0.7, None, keep, ones, ones, ones, ones, torch.tensor(6.0), "clipped", 0.8, 1.2, 1.5, None,
        "k3", 0.1, False, 0.02, "truncate", 0.0, 2.0, 1.0, 1.05,
    )  # fmt: skip
    advantage = (ones, torch.tensor([0, 2, 6]), "group", 1, 1e-6, False, "mean", None)
    row, cache = torch.randn(2, 16, generator=g), torch.randn(2, 1, 4, 16, generator=g)
    decoding = (
        row, row, row, row, row, cache, cache, torch.tensor([0, 1]), torch.tensor([0, 1]), cache.clone(), cache.clone(),
        1, 0.3, None, None, 0.0,
    )  # fmt: skip
    return {
        "decode_attention": decoding, "add_norm_": (row.clone(), row, row[0], 1e-6),
        "row_statistics": statistics, "row_gradient": (*gradient, torch.float32), "row_gradient_": gradient,
        "row_exponentials": (*statistics, torch.zeros(6, 21)), "row_exponentials_": statistics,
        "policy_rows": policy, "policy_rows_": policy, "group_advantage": advantage,
        **({"product_": (logits, torch.randn(6, 4), torch.randn(21, 4).t(), True)} if native_rows.PRODUCT else {}),
    }  # fmt: skip


@pytest.mark.parametrize("name", operator_calls())
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.rewardmap, name).default, operator_calls()[name])


def test_row_statistics_are_differentiable_through_every_output() -> None:
    logits, targets, _, temperatures, keep = operator_calls()["row_statistics"]
    logits = logits.clone().requires_grad_()
    operator = torch.ops.rewardmap.row_statistics
    torch.library.opcheck(operator.default, (logits, targets, 1.0, temperatures, keep))
    g = torch.Generator().manual_seed(3)
    weights = torch.randn(3, 6, generator=g)
    for on in (keep, None):
        outputs = operator(logits, targets, 1.0, temperatures, on)
        (got,) = torch.autograd.grad(sum((w * o).sum() for w, o in zip(weights, outputs, strict=True)), logits)
        z = logits.detach().double().requires_grad_()
        y = z / temperatures.double()[:, None]
        log_p = torch.log_softmax(y, 1)
        wanted = (
            torch.logsumexp(y, 1), log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)
        )  # fmt: skip
        mask = torch.ones(6, dtype=torch.bool) if on is None else on
        total = sum((w.double() * o * mask).sum() for w, o in zip(weights, wanted, strict=True))
        torch.testing.assert_close(got.double(), torch.autograd.grad(total, z)[0], rtol=1e-5, atol=1e-6)


def test_compiled_code_calls_the_operators() -> None:
    logits, targets = torch.randn(6, 33), torch.randint(0, 33, (6,))
    rows = {"advantages": torch.randn(6), "normalizer": 6.0, "objective": PolicyObjective("dapo")}

    def loss(z: torch.Tensor) -> torch.Tensor:
        return logits_policy_loss(z * 2.0, targets, **rows).loss

    z = logits.requires_grad_()
    (wanted,) = torch.autograd.grad(loss(z), z)
    (got,) = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(z), z)
    torch.testing.assert_close(got, wanted)
    assert last_path("logits_policy_loss")[0] == "native"


def test_a_whole_step_runs_where_it_is_asked_for() -> None:
    logits, targets = torch.randn(6, 33, requires_grad=True), torch.randint(0, 33, (6,))
    rows = {"advantages": torch.randn(6), "normalizer": 6.0, "objective": PolicyObjective("dapo")}
    gradients = []
    for implementation in ("native", "torch"):
        with use_implementation(implementation):
            (made,) = torch.autograd.grad(2.0 * logits_policy_loss(logits, targets, **rows).loss, logits)
        gradients.append(made)
    torch.testing.assert_close(*gradients)


def test_results_do_not_depend_on_threads_or_neighbours() -> None:
    logits, targets = torch.randn(40, 999), torch.randint(0, 999, (40,))
    operator, before = torch.ops.rewardmap.row_statistics, torch.get_num_threads()
    try:
        outputs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outputs.append(torch.stack(operator(logits, targets, 1.0, None, None)))
    finally:
        torch.set_num_threads(before)
    alone = torch.stack(operator(logits[7:8], targets[7:8], 1.0, None, None))
    assert all(torch.equal(out, outputs[0]) for out in outputs)
    assert torch.equal(alone[:, 0], outputs[0][:, 7])


def test_group_advantage_runs_by_it_and_can_be_made_not_to() -> None:
    rewards, offsets = torch.rand(24), torch.tensor([0, 8, 16, 24])
    for implementation in ("native", "torch"):
        with use_implementation(implementation):
            out = group_advantage(rewards, offsets, scale="mad")
        assert last_path("group_advantage")[0] == implementation
        assert out.advantages.shape == (24,) and out.degenerate.dtype == torch.bool
    with use_implementation("native"), pytest.raises(ValueError, match=r"cannot run by native: torch\.float64 has no"):
        group_advantage(rewards.double(), offsets)


BUILD = "import rewardmap_kernels.native as n; print(n.unavailable_reason(), n.library())"


def test_many_processes_build_once(tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", BUILD], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    outputs = [child.communicate() for child in children]
    assert all(child.returncode == 0 for child in children), outputs
    assert len({out for out, _ in outputs}) == 1 and outputs[0][0].startswith("None ")
    assert sum("building the cpu kernels" in err for _, err in outputs) == 1
    found = sorted(file.suffix for file in (tmp_path / "rewardmap/native").iterdir())
    assert found == [".lock", ".so"]
    # Ahead of time, by the command: what is there is not built again.
    done = python("-m", "rewardmap_kernels.native", XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0 and done.stdout.strip() == outputs[0][0].split()[1] and not done.stderr


USE = """
import torch, rewardmap_kernels as rk
for _ in range(2):
    rk.selective_log_softmax(torch.randn(2, 5), torch.tensor([0, 1]))
    rk.group_advantage(torch.rand(4), torch.tensor([0, 4]))
print(rk.last_path("group_advantage"))
"""


FIRST_USE = """
import threading, time
import rewardmap_kernels.native as native

def slow(path):
    time.sleep(0.2)
    load(path)

load, native.load, found = native.load, slow, []
threads = [threading.Thread(target=lambda: found.append(native.unavailable_reason())) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(found)
"""


def test_threads_that_begin_together_load_once() -> None:
    done = python("-c", FIRST_USE)
    assert done.stdout == "[None, None, None, None]\n", done.stderr


@pytest.mark.parametrize("lack", ["compiler", "cache", "sources"])
def test_what_is_missing_is_said_once_and_plain_torch_runs(lack: str, tmp_path: Path) -> None:
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    if lack == "compiler":
        environment |= {"PATH": str(tmp_path), "CXX": ""}
        said = "no C++ compiler (c++, g++ or clang++) is on PATH"
    elif lack == "cache":
        (tmp_path / "file").touch()
        environment["XDG_CACHE_HOME"] = str(tmp_path / "file")
        said = "cannot write"
    else:
        fake = tmp_path / "c++"
        fake.write_text("#!/bin/sh\necho 'operators.cpp:1: error: this compiler is broken' >&2; exit 1\n")
        fake.chmod(0o755)
        environment["CXX"] = str(fake)
        said = "c++ failed: operators.cpp:1: error: this compiler is broken"
    done = python("-c", USE, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "('torch', ())"
    lines = [line for line in done.stderr.splitlines() if "building" not in line]
    assert len(lines) == 1 and said in lines[0] and "plain torch" in lines[0], done.stderr


def test_without_a_home_directory_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(native.NativeUnavailableError, match="name a folder in XDG_CACHE_HOME"):
        native.library()


def test_operators_under_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1", "-O1")
    runtime = subprocess.run(
        [native.compiler("cpu"), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("this compiler has no address sanitizer")
    library = tmp_path / "sanitized.so"
    native.build_cpu(library, flags)
    # Leaks are Python's; the interpreter itself has no instrumentation, so its runtime comes first.
    # The C++ library too, or exceptions are thrown before the sanitizer has found it.
    environment = {
        "LD_PRELOAD": f"{runtime} libstdc++.so.6", "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }  # fmt: skip
    done = python(str(SCRIPT), str(library), **environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "all equal the definition" in done.stdout
    # The sanitizer does see an operator that reads beyond its rows.
    broken = python("-c", OVERRUN, str(library), **environment)
    assert broken.returncode != 0 and "heap-buffer-overflow" in broken.stderr, broken.stderr[-2000:]


OVERRUN = """
import sys, torch
from pathlib import Path
from rewardmap_kernels import native
native.load(Path(sys.argv[1]))
logits = torch.randn(4, 64)
lying = torch.as_strided(logits, (4, 64), (64, 1))
lying.untyped_storage().resize_(64 * 4)
torch.ops.rewardmap.row_statistics(lying, torch.zeros(4, dtype=torch.long), 1.0, None, None)
"""
