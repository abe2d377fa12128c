"""The real TRL on a tiny model: fused and unfused trainers take the same steps. Skipped where trl is not
installed."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if importlib.util.find_spec("trl") is None:
    pytest.skip("trl is not installed", allow_module_level=True)
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch.distributed as dist
import trl
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PromptTuningConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from rewardmap_kernels import PolicyObjective, last_path
from rewardmap_kernels.integrations import trl as integration
from rewardmap_kernels.integrations.trl import fuse_grpo

WORDS = ["<pad>", "<eos>", *(f"w{i}" for i in range(30))]


def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def model(seed: int = 0) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    return Qwen2ForCausalLM(config)


def distinct(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs within a group: the number of different words."""
    return [float(len(set(text.split()))) for text in completions]


def build(folder: Path, adapter: PeftConfig | None = None, **options: Any) -> Any:
    """A trainer of the tiny model for two steps; the seed makes every run sample the same completions."""
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 2,
        "learning_rate": 0.05,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_accumulation_steps": 2,
        "save_strategy": "no",
        "seed": 3,
        "disable_tqdm": True,
        "temperature": 0.9,
        "optim": "sgd",
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
    }
    # From a folder: TRL loads the reference model by the name of the policy's.
    if not (folder / "model").exists():  # of several ranks, once they know each other, only the first would write
        model().save_pretrained(folder / "model")
    policy = Qwen2ForCausalLM.from_pretrained(folder / "model")
    rows = Dataset.from_dict({"prompt": [f"w{i} w{i + 1}" for i in range(8)]})
    return trl.GRPOTrainer(
        model=policy,
        reward_funcs=distinct,
        args=trl.GRPOConfig(**{**settings, **options}),
        train_dataset=rows,
        processing_class=tokenizer(),
        peft_config=adapter,
    )


def run(folder: Path, fused: str | None, **options: Any) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Two optimizer steps; the final parameters and the log."""
    trainer = build(folder, **options)
    if fused is not None:
        fuse_grpo(trainer, fused_loss=fused == "loss")
    trainer.train()
    return {k: v.detach().clone() for k, v in trainer.model.named_parameters()}, trainer.state.log_history


def combinations(kind: str) -> Iterator[dict[str, Any]]:
    """Every combination of options that TRL's loss and ours both have for a loss type. At sequence level ours wants one
    factor a sequence; the others raise."""
    clipped = kind not in ("cispo", "sapo")
    for level, beta, bias, delta, engine, old, tools, per_token in itertools.product(
        ("token", "sequence") if clipped else ("token",), (0.0, 0.1), (False, True),
        (None, 1.5) if clipped else (None,),
        (None, "token", "sequence"), (True, False), (False, True), (False, True),
    ):  # fmt: skip
        by_token = per_token or engine == "token"
        if not (bias and beta == 0.0) and not (level == "sequence" and (bias or by_token)):
            yield {
                "level": level, "beta": beta, "bias": bias, "delta": delta, "engine": engine, "old": old,
                "tools": tools, "per_token": per_token,
            }  # fmt: skip


def batch(trainer: Any, choice: dict[str, Any]) -> dict[str, Any]:
    """Four answers to prompts of different lengths, log-ratios of about 0.3, some tokens masked."""
    g = torch.Generator().manual_seed(5)
    size, prompt, length = 4, 3, 7

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    mask = (torch.arange(length) < torch.tensor([7, 4, 1, 6])[:, None]).long()
    inputs = {
        "prompt_ids": torch.randint(2, 32, (size, prompt), generator=g),
        "prompt_mask": (torch.arange(prompt) >= torch.tensor([0, 1, 2, 0])[:, None]).long(),
        "completion_ids": torch.randint(2, 32, (size, length), generator=g),
        "completion_mask": mask,
        "advantages": normal(size, length) if choice["per_token"] else normal(size),
        "num_items_in_batch": torch.tensor(31.0),
    }
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    on = torch.cat([inputs["prompt_mask"], mask], 1)
    if not hasattr(trainer, "first_scores"):  # the weights do not change
        with torch.no_grad():
            trainer.first_scores = trainer._get_per_token_logps_and_entropies(trainer.model, ids, on, length)[0]
    current = trainer.first_scores
    inputs["ref_per_token_logps"] = current + 0.3 * normal(size, length)
    if choice["old"]:
        inputs["old_per_token_logps"] = current + 0.3 * normal(size, length)
    if choice["tools"]:
        inputs["tool_mask"] = (torch.rand(size, length, generator=g) > 0.3).long()
    if choice["engine"]:
        inputs["importance_sampling_ratio"] = normal(size, length if choice["engine"] == "token" else 1).exp()
    return inputs


def loss_and_gradients(trainer: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    loss = trainer._compute_loss(trainer.model, inputs)
    return loss.detach(), *torch.autograd.grad(loss, list(trainer.model.parameters()))


@pytest.mark.parametrize("kind", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"])
def test_every_combination_has_trl_s_loss_and_gradients(kind: str, tmp_path: Path) -> None:
    trainer = build(tmp_path, loss_type=kind, epsilon_high=2.0 if kind == "cispo" else 0.28, beta=0.1)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 2
    count = 0
    for choice in combinations(kind):
        trainer.importance_sampling_level, trainer.beta = choice["level"], choice["beta"]
        trainer.args.delta, trainer.args.use_bias_correction_kl = choice["delta"], choice["bias"]
        trainer.use_vllm = trainer.vllm_importance_sampling_correction = choice["engine"] is not None
        trainer.vllm_importance_sampling_mode = f"{choice['engine']}_truncate"
        inputs = batch(trainer, choice)
        expected = loss_and_gradients(trainer, inputs)
        fuse_grpo(trainer)
        got = loss_and_gradients(trainer, inputs)
        del trainer._compute_loss, trainer._get_per_token_logps_and_entropies  # TRL's own again
        for mine, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-6, msg=lambda m, c=choice: f"{c}: {m}")
        count += 1
    assert count == (176 if kind not in ("cispo", "sapo") else 72)


def test_factors_by_token_at_sequence_level_raise(tmp_path: Path) -> None:
    trainer = build(tmp_path, loss_type="grpo", importance_sampling_level="sequence")
    choice = {"per_token": True, "old": True, "tools": False, "engine": None}
    inputs = batch(trainer, choice)
    fuse_grpo(trainer)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    with pytest.raises(ValueError, match=r"advantages by token, \(4, 7\), at importance_sampling_level='sequence'"):
        trainer._compute_loss(trainer.model, inputs)
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    trainer.vllm_importance_sampling_mode = "token_mask"
    inputs |= {"advantages": torch.ones(4), "importance_sampling_ratio": torch.ones(4, 7)}
    with pytest.raises(ValueError, match="token-level vllm_importance_sampling_mode"):
        trainer._compute_loss(trainer.model, inputs)


CASES: dict[str, dict[str, Any]] = {
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "grpo, reference": {"loss_type": "grpo", "beta": 0.1},
    "dapo, plain reference": {"loss_type": "dapo", "beta": 0.1, "use_bias_correction_kl": False},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-2},
    "cispo": {"loss_type": "cispo", "epsilon_high": 2.0},
    "sapo": {"loss_type": "sapo"},
    "dr_grpo, delta": {"loss_type": "dr_grpo", "delta": 1.5},
    "bnpo, two epochs": {"loss_type": "bnpo", "num_iterations": 2},
    "a generation for two updates, answers cut short masked": {
        "steps_per_generation": 4,
        "num_iterations": 2,
        "max_steps": 4,
        "mask_truncated_completions": True,
        "scale_rewards": "none",
        "beta": 0.1,
    },
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    "Liger's layers": {
        "use_liger_kernel": True,
        "liger_kernel_config": {"rope": False, "rms_norm": False, "swiglu": False},
    },
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_a_fused_trainer_takes_trl_s_steps(options: dict[str, Any], tmp_path: Path) -> None:
    if options.get("use_liger_kernel"):
        pytest.importorskip("liger_kernel")
    plain, plain_log = run(tmp_path / "a", None, **options)
    fused, fused_log = run(tmp_path / "b", "loss", **options)
    assert last_path("linear_policy_loss") is not None
    start = dict(model().named_parameters())
    for name, value in plain.items():
        torch.testing.assert_close(fused[name], value, rtol=2e-4, atol=2e-6)
    assert any(not torch.equal(plain[name], start[name]) for name in plain)
    for a, b in zip(plain_log, fused_log, strict=True):
        for key in a.keys() & {"loss", "grad_norm", "entropy", "kl", "clip_ratio/region_mean", "reward"}:
            assert b[key] == pytest.approx(a[key], rel=2e-3, abs=2e-5), key


@pytest.mark.parametrize("fused_loss", [True, False])
def test_a_scaler_of_float16_gradients_takes_and_skips_trl_s_steps(fused_loss: bool, tmp_path: Path) -> None:
    """At a scale that float16 holds, and at one whose gradients overflow: the step is left out and the scale halved."""
    found = []
    for fused in (False, True):
        trainer = build(tmp_path, loss_type="dapo")
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        inputs = batch(trainer, PLAIN)
        if fused:
            fuse_grpo(trainer, fused_loss=fused_loss)
        optimizer, scaler = torch.optim.SGD(trainer.model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", 2.0**24)
        scales = []
        for _ in range(12):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = trainer._compute_loss(trainer.model, inputs)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        found.append((scales, [value.detach() for value in trainer.model.parameters()]))
    (plain, weights), (ours, got) = found
    assert plain == ours and plain[0] == 2.0**23 and plain[-1] == plain[-2]  # some were skipped, the last was not
    for mine, theirs in zip(got, weights, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=2e-4)


RANKS = """
import os, pathlib, sys
import torch
import test_kernels_trl as cases
folder = pathlib.Path(sys.argv[1]) / os.environ["RANK"]
options = {"loss_type": "dapo", "beta": 0.1, "num_generations": 8, "steps_per_generation": 4}
(plain, plain_log), (fused, fused_log) = (cases.run(folder, how, **options) for how in (None, "loss"))
assert torch.distributed.get_world_size() == 2
torch.testing.assert_close(fused, plain, rtol=2e-4, atol=2e-6)
assert abs(fused_log[0]["grad_norm"] / plain_log[0]["grad_norm"] - 1) < 2e-3
os._exit(0)  # gloo's threads
"""


@pytest.mark.slow
def test_two_ranks_take_trl_s_steps(tmp_path: Path) -> None:
    """A group's answers on both of them, two batches an update, two updates a generation."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    common |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANKS, str(tmp_path)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()


LORA = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"]}
ADAPTERS: dict[str, PeftConfig] = {
    "lora": LoraConfig(**LORA),
    "lora and the head": LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_fused_trainer_takes_trl_s_steps_of_an_adapter(name: str, tmp_path: Path) -> None:
    """Against the reference that TRL gets by switching the adapter off."""
    found = []
    for fused in (None, "loss"):
        torch.manual_seed(1)  # an adapter's weights are drawn when the trainer is built
        options = {"adapter": copy.deepcopy(ADAPTERS[name]), "loss_type": "grpo", "beta": 0.1, "max_steps": 3}
        found.append(run(tmp_path / str(fused), fused, **options))
    (plain, plain_log), (fused, fused_log) = found
    for key, value in plain.items():
        torch.testing.assert_close(fused[key], value, rtol=2e-4, atol=2e-6)
    for a, b in zip(plain_log, fused_log, strict=True):
        for key in a.keys() & {"loss", "grad_norm", "kl"}:
            assert b[key] == pytest.approx(a[key], rel=2e-3, abs=2e-5), key
    assert plain_log[-2]["kl"] > 0  # the adapter has moved


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["dapo", "gspo", "grpo, reference"])
def test_a_fused_trainer_takes_trl_s_steps_on_a_gpu(name: str, tmp_path: Path) -> None:
    plain, _ = run(tmp_path / "a", None, use_cpu=False, **CASES[name])
    fused, _ = run(tmp_path / "b", "loss", use_cpu=False, **CASES[name])
    path = last_path("linear_policy_loss")
    assert path is not None and path[0] == "triton"
    for key, value in plain.items():
        torch.testing.assert_close(fused[key], value, rtol=2e-4, atol=2e-5)


def test_the_head_alone_serves_an_entropy_bonus(tmp_path: Path) -> None:
    options = {"loss_type": "dapo", "entropy_coef": 0.05}
    plain, _ = run(tmp_path / "a", None, **options)
    fused, _ = run(tmp_path / "b", "head", **options)
    for name, value in plain.items():
        torch.testing.assert_close(fused[name], value, rtol=2e-4, atol=2e-6)
    with pytest.raises(ValueError, match="no fused loss for an entropy bonus"):
        run(tmp_path / "c", "loss", **options)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"loss_type": "vespo"}, "loss_type='vespo'"),
        ({"top_entropy_quantile": 0.5}, "top_entropy_quantile"),
        ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold"),
        ({"loss_type": "sapo", "importance_sampling_level": "sequence"}, "importance_sampling_level"),
        ({"loss_type": "cispo"}, "loss_type='cispo' with epsilon_high=0.2 < 1"),
    ],
)
def test_an_option_without_a_fused_loss_raises(options: dict[str, Any], name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=name):
        run(tmp_path, "loss", **options)


class OwnLoss(trl.GRPOTrainer):
    """A subclass whose loss is the entropy of the completion."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        names = ("prompt", "completion")
        ids, on = (torch.cat([inputs[f"{n}_{what}"] for n in names], 1) for what in ("ids", "mask"))
        length = inputs["completion_ids"].shape[1]
        scored = self._get_per_token_logps_and_entropies(model, ids, on, length, compute_entropy=True)
        return scored[1].sum()


PLAIN = {"per_token": False, "old": True, "tools": False, "engine": None}


def test_a_trl_of_another_version_keeps_its_own_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build(tmp_path)
    monkeypatch.setattr(trl, "__version__", "1.17.0")
    with pytest.raises(ValueError, match=r"options of TRL 1\.16, got 1\.17\.0"):
        fuse_grpo(trainer)
    fuse_grpo(trainer, fused_loss=False)


class Earlier(torch.autograd.Function):
    """The head of TRL 1.10, which GRPOTrainer did not use."""

    @staticmethod
    def forward(
        ctx: Any, last_hidden: Any, weight: Any, targets: Any, temperature: Any, chunk_size: Any,
        final_logit_softcapping: Any = None, logit_scale: Any = 1.0,
    ) -> Any: ...  # fmt: skip


@pytest.mark.parametrize("fused_loss", [True, False])
@pytest.mark.parametrize("head", [None, Earlier], ids=["none", "another"])
def test_a_trl_with_another_head_is_refused(
    head: Any, fused_loss: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build(tmp_path)
    monkeypatch.setattr(trl, "__version__", "1.10.0")
    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", head)
    with pytest.raises(ValueError, match=r"the head of TRL 1\.16; TRL 1\.10\.0 has another or none"):
        fuse_grpo(trainer, fused_loss=fused_loss)


def test_a_subclass_keeps_its_own_loss(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    trainer.__class__ = OwnLoss
    trainer.model.train()
    inputs = batch(trainer, PLAIN)
    expected = loss_and_gradients(trainer, inputs)
    with pytest.raises(ValueError, match="no fused loss for OwnLoss, which has its own _compute_loss"):
        fuse_grpo(trainer)
    fuse_grpo(trainer, fused_loss=False)
    for mine, theirs in zip(loss_and_gradients(trainer, inputs), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-6)
    with pytest.raises(ValueError, match="replaced before"):
        fuse_grpo(trainer)
    with pytest.raises(ValueError, match=r"takes a trl\.GRPOTrainer, got object"):
        fuse_grpo(object())


def test_an_option_that_changes_during_training_is_followed(tmp_path: Path) -> None:
    trainer = build(tmp_path, loss_type="dapo", beta=0.1)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 2
    inputs, found = batch(trainer, PLAIN), []
    for fused in (False, True):
        if fused:
            fuse_grpo(trainer)
        for trainer.beta in (0.1, 0.4, 0.0):
            found.append(trainer._compute_loss(trainer.model, inputs).detach())
    torch.testing.assert_close(found[3:], found[:3], rtol=1e-4, atol=2e-6)
    trainer.top_entropy_quantile = 0.5
    with pytest.raises(ValueError, match="top_entropy_quantile"):
        trainer._compute_loss(trainer.model, inputs)


@pytest.mark.parametrize("fused_loss", [True, False])
def test_a_scaled_head_has_trl_s_loss_and_a_capped_one_raises(fused_loss: bool, tmp_path: Path) -> None:
    trainer = build(tmp_path, loss_type="dapo")
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 2

    def head(**config: float) -> None:
        trainer.model.config.update(config)
        trl.trainer.utils.add_fused_lm_head(trainer.model, trainer.temperature, outputs=("log_probs", "entropy"))

    head(logit_scale=0.25)
    inputs = batch(trainer, PLAIN)
    expected = loss_and_gradients(trainer, inputs)
    fuse_grpo(trainer, fused_loss=fused_loss)
    for mine, theirs in zip(loss_and_gradients(trainer, inputs), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-6)
    head(final_logit_softcapping=30.0)
    with pytest.raises(ValueError, match=r"soft-capping \(30\.0\)"):
        trainer._compute_loss(trainer.model, inputs)


def test_a_head_on_another_device_than_the_batch() -> None:
    """As of a model that device_map splits; fake tensors stand for those of two GPUs."""
    with FakeTensorMode():
        rows = {"advantages": torch.ones(2, 3), "normalizer": torch.ones(2, 3), "loss_mask": torch.ones(2, 3)}
        state = SimpleNamespace(
            objective=PolicyObjective(), rows=rows, scored=torch.ones(2, 3, dtype=torch.bool), loss=None
        )
        hidden, weight = torch.empty(6, 4, device="cuda:1"), torch.empty(8, 4, device="cuda:1")
        targets = torch.empty(6, dtype=torch.long, device="cuda:1")
        with integration._at_work(state):
            integration._Head.apply(hidden, weight, None, targets, 1.0, 8)
    assert state.loss.device == torch.device("cuda:1")


_KEPT: list[Any] = []
"""Wrapped models, until the process ends: gloo's thread may need the interpreter to let go of its last work, and the
destructor of its group waits for that thread with the interpreter held."""


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_the_loss_passes_a_wrapper_s_outputs(wrapper: str, tmp_path: Path) -> None:
    """DDP that looks for unused parameters, and FSDP2 that frees the root's after the forward, hook the outputs."""
    trainer = build(tmp_path, loss_type="dapo")
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 2
    inputs = batch(trainer, PLAIN)
    expected = loss_and_gradients(trainer, inputs)[1:]
    fuse_grpo(trainer)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        if wrapper == "ddp":
            wrapped: Any = DistributedDataParallel(trainer.model, find_unused_parameters=True)
        else:
            mesh = init_device_mesh("cpu", (1,))
            wrapped = fully_shard(trainer.model, mesh=mesh, reshard_after_forward=True)
        _KEPT.append(wrapped)
        (trainer._compute_loss(wrapped, inputs) * -3.0).backward()
        for parameter, theirs in zip(wrapped.parameters(), expected, strict=True):
            grad = parameter.grad.to_local() if wrapper == "fsdp2" else parameter.grad
            torch.testing.assert_close(grad, -3.0 * theirs, rtol=1e-4, atol=6e-6)
    finally:
        dist.destroy_process_group()
