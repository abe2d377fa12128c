"""The Hopper kernel as far as a machine without a GPU can judge it: its pipeline on host threads under thread
sanitizer, and what the compiler made of it. With a GPU (``-m gpu``): its results."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from rewardmap_kernels import PolicyObjective, last_path, logits_policy_loss, native, native_cuda

TESTS = Path(__file__).parent
TABLE = TESTS / "native_resources.json"


def have(part: native.Part) -> str | None:
    try:
        native.compiler(part)
    except native.NativeUnavailableError as reason:
        return str(reason)
    return None


def emulate(folder: Path, edit: tuple[str, str] | None = None, seconds: int = 120) -> subprocess.CompletedProcess[str]:
    """Build and run the emulation, of an edited pipeline.h if asked."""
    root = folder / "copy"
    for name in ("objective.h", "cuda/pipeline.h"):
        text = (native.sources() / name).read_text()
        if edit is not None and name == "cuda/pipeline.h":
            assert edit[0] in text
            text = text.replace(*edit)
        (root / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "csrc" / name).write_text(text)
    (root / "tests").mkdir(exist_ok=True)
    (root / "tests/pipeline.cpp").write_text((TESTS / "native_pipeline.cpp").read_text())
    program = folder / "pipeline"
    flags = ("-std=c++20", "-O1", "-g1", "-Wall", "-Werror", "-fsanitize=thread", "-pthread")
    build = [native.compiler("cpu"), *flags, str(root / "tests/pipeline.cpp"), "-o", str(program)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    if "cannot find" in done.stderr and "tsan" in done.stderr:
        pytest.skip("this compiler has no thread sanitizer")
    assert done.returncode == 0, done.stderr
    return subprocess.run([str(program), "64"], capture_output=True, text=True, check=False, timeout=seconds)


@pytest.mark.skipif(have("cpu") is not None, reason="no C++ compiler")
def test_the_pipeline_neither_races_nor_deadlocks_and_gives_the_definition(tmp_path: Path) -> None:
    done = emulate(tmp_path)
    assert done.returncode == 0 and "64 shapes equal the definition" in done.stdout, done.stdout + done.stderr[-3000:]
    assert not done.stderr


@pytest.mark.skipif(have("cpu") is not None, reason="no C++ compiler")
@pytest.mark.parametrize(
    "edit",
    [
        ("wait_stores_read<kStages - kAhead>", "wait_stores_read<kStages>"),  # a stage is loaded while it is stored
        ("static_cast<uint32_t>(i / kStages & 1)", "static_cast<uint32_t>(i & 1)"),  # a wait that returns too early
        ("return static_cast<int>(i & 1);", "return static_cast<int>(i & 0);"),  # one slot: overwritten while read
    ],
    ids=["stores", "phase", "slots"],
)
def test_the_emulation_sees_what_is_wrong(edit: tuple[str, str], tmp_path: Path) -> None:
    try:
        done = emulate(tmp_path, edit, 10)
    except subprocess.TimeoutExpired:
        return  # it hangs: seen too
    assert done.returncode != 0, done.stdout


@pytest.mark.skipif(have("cuda") is not None, reason="no nvcc")
def test_registers_shared_memory_spills_and_instructions(tmp_path: Path) -> None:
    triton = pytest.importorskip("triton")
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    built = tmp_path / "hopper.so"
    native.build_cuda(built, ("-Xptxas", "-warn-spills"))
    usage = subprocess.run(
        [tools / "cuobjdump", "--dump-resource-usage", built], capture_output=True, text=True, check=True
    ).stdout
    line = next(line for line in usage.splitlines() if "REG:" in line)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
    table = json.loads(TABLE.read_text())
    assert found["STACK"] == found["LOCAL"] == 0  # nothing spilled
    assert found["REG"] <= table["registers"] and found["SHARED"] <= table["shared"], found
    # With the stages of the largest part it fits a multiprocessor.
    assert found["SHARED"] + native_cuda.STAGES * native_cuda.STAGE_BYTES <= 232_448 + 1_024
    code = subprocess.run([tools / "cuobjdump", "-sass", built], capture_output=True, text=True, check=True).stdout
    for instruction in table["instructions"]:
        assert instruction in code, instruction
    assert not re.search(r"\b(STL|LDL)\b", code)
    # Loads without a GPU; both sides agree about the arguments' layout.
    assert ctypes.CDLL(str(built)).rewardmap_arguments_bytes() == ctypes.sizeof(native_cuda.Arguments)
    if not torch.cuda.is_available():  # as with an old driver: in CUDA's words, before any launch
        with pytest.raises(native.NativeUnavailableError, match=r"CUDA says: .*(driver|device)"):
            native.load_cuda(built)


@pytest.mark.parametrize(
    ("vocab", "size"),
    [(152_064, 4), (151_936, 4), (32_768, 1), (65_536, 2), (262_144, 8), (32_769, None), (400_000, None)],
)  # fmt: skip
def test_a_row_is_shared_by_the_fewest_blocks(vocab: int, size: int | None) -> None:
    assert native_cuda.cluster_size(vocab) == size
    if size is not None:
        assert vocab // size * 2 <= native_cuda.STAGE_BYTES and vocab // size * 2 % 16 == 0


def test_what_it_cannot_take_is_named() -> None:
    logits = torch.zeros(2, 64, dtype=torch.bfloat16)
    assert "in place" in str(native_cuda.refusal(logits, False))
    assert "bfloat16" in str(native_cuda.refusal(logits.float(), True))
    assert "V = 63" in str(native_cuda.refusal(logits[:, :63], True))
    assert "aligned" in str(native_cuda.refusal(logits[:, 1:57], True))
    assert not native_cuda.wanted(logits, True)  # off by default
    if not torch.cuda.is_available():
        assert native_cuda.refusal(logits, True) == "there is no CUDA device"


@pytest.mark.gpu
@pytest.mark.parametrize("cluster", native_cuda.CLUSTERS)
def test_on_a_gpu_every_cluster_gives_triton_s_result(cluster: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On rows that need no cluster: small enough for compute-sanitizer."""
    monkeypatch.setattr(native_cuda, "cluster_size", lambda vocab: cluster)
    compare_with_triton(512, PolicyObjective("grpo", kl_coef=0.05, entropy_coef=0.01))


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [64, 32_768, 65_536, 152_064, 262_144])
@pytest.mark.parametrize(
    "objective",
    [PolicyObjective("dapo", clip_eps_high=0.28), PolicyObjective("grpo", kl_coef=0.05, entropy_coef=0.01)],
    ids=["dapo", "grpo"],
)
def test_on_a_gpu_it_gives_triton_s_result(vocab: int, objective: PolicyObjective) -> None:
    compare_with_triton(vocab, objective)


def compare_with_triton(vocab: int, objective: PolicyObjective) -> None:
    reason = native.unavailable_reason("cuda")
    if reason is not None:
        pytest.skip(reason)
    g = torch.Generator("cuda").manual_seed(vocab)
    n = 700  # more than the clusters hold at once, several times
    logits = 3 * torch.randn(n, vocab, generator=g, device="cuda").bfloat16()
    targets = torch.randint(0, vocab, (n,), generator=g, device="cuda")
    keep = torch.arange(n, device="cuda") % 7 != 3
    logits[~keep] = float("nan")
    vectors = {
        name: torch.randn(n, generator=g, device="cuda") * 0.1 - 3.0
        for name in ("advantages", "old_logprobs", "ref_logprobs")
    }
    rows: dict[str, Any] = {**vectors, "normalizer": 5.0, "loss_mask": keep, "objective": objective, "temperature": 0.8}

    def run(hopper: bool) -> tuple[torch.Tensor, ...]:
        leaf = logits.clone().requires_grad_()
        with native_cuda.experimental_hopper(hopper):
            out = logits_policy_loss(leaf * 1, targets, inplace=True, **rows)
        path = last_path("logits_policy_loss")
        assert path is not None and ("hopper" in path[1]) == hopper
        (gradient,) = torch.autograd.grad(out.loss, leaf)
        return out.logprobs, out.entropy, gradient

    for got, wanted, tolerance in zip(run(True), run(False), (1e-5, 1e-5, 2**-7), strict=True):
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=1e-5 if tolerance < 1e-3 else 1e-7)
