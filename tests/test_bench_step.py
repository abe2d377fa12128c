"""The step bench: its arithmetic against torch's FLOP counter, what its arms compute, its error measure."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))
import step_cases
import step_run
from step_cases import ARMS, Case, flop

from rewardmap.config import Config, PolicyConfig, RolloutConfig, TrainConfig

SMALL = Case("small", 90, 7, group=3, questions=2, maps=2, timed=0)


@pytest.mark.parametrize("freeze_vision", [False, True])
def test_linear_arithmetic_is_that_of_torch_s_counter(freeze_vision: bool) -> None:
    """One padded batch by transformers alone, its attention uncounted on both sides."""
    case = dataclasses.replace(SMALL, freeze_vision=freeze_vision, questions=1)
    model, tokenizer, processor = step_cases.build_model(case, "cpu", torch.float32)
    model.model.visual.requires_grad_(not freeze_vision)
    step_run.assemble(model, tokenizer, processor, freeze_vision)  # the patch embedding as a matrix product
    model.set_attn_implementation("sdpa")  # which torch's counter leaves out on the CPU
    policy = step_run.assemble(model, tokenizer, processor, freeze_vision)
    problems = step_cases.build_problems(case, tokenizer)
    ids = torch.tensor([policy.encode(one).token_ids for one in problems for _ in range(case.group)])
    ids = torch.cat([ids, torch.full((len(ids), case.response - 1), 5)], 1)
    images = [policy.image(one.image) for one in problems for _ in range(case.group)]
    with FlopCounterMode(display=False) as counter:
        out = model(
            input_ids=ids,
            pixel_values=policy.pixel_values(images),
            image_grid_thw=torch.tensor([image.grid_thw for image in images]),
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
            logits_to_keep=case.response,
        )
        out.logits.sum().backward()
    parts = flop(case, ARMS["TRL"])
    patches = case.image_grid[0] * case.image_grid[1] * 4
    tower_attention = 4 * 128 * (patches**2 + patches * 64) * case.sequences * (1 if freeze_vision else 3)
    expected = parts["total"] - parts["attention"] - tower_attention
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.002)


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != "TRL"])
def test_arms_compute_the_same_step(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Vision", "pack_forest", "linear_policy_loss"):
        monkeypatch.setattr(step_run.trainer_module, name, getattr(step_run.trainer_module, name))
    row = step_run.run_ours(SMALL, ARMS[arm], "cpu", torch.float32, lambda: None)
    monkeypatch.undo()
    ours = step_run.run_ours(SMALL, ARMS["ours"], "cpu", torch.float32, lambda: None)
    import step

    assert step.error(row["probe"], ours["probe"]) < 1e-4
    assert row["phase_seconds"]["train"] > 0
    shared = ARMS[arm].shared
    question = 90 - step_cases._own_before(SMALL)
    packed = 2 * (90 - question) + 4 * question + 12 * 6
    assert row["computed_tokens"] == pytest.approx(packed if shared else 12 * 96, abs=12)


def test_the_error_estimate_sees_a_wrong_gradient() -> None:
    import step

    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(40, 40) for _ in range(30)))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    right = step_run.probe(model)
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad += 0.1 * torch.randn_like(parameter)
    assert 0.05 < step.error(step_run.probe(model), right) < 0.2


def test_a_step_stands_beside_its_plan() -> None:
    case = step_cases.CASES["cuda"]["6000+500"]
    model, _, _ = step_cases.build_model(case, "meta", torch.bfloat16)
    train = TrainConfig(prompts_per_step=1, max_tokens_per_micro_batch=8 * 6500)
    config = Config(policy=PolicyConfig(freeze_vision=False), rollout=RolloutConfig(group_size=8), train=train)
    found = step_run.planned(config, case, torch.bfloat16, model.config, "H100")
    assert found is not None
    assert found["memory"]["weights"] == sum(parameter.nbytes for parameter in model.parameters())
    # The bench's own arithmetic at the share of the data sheet that plan assumes; a checkpointed part runs once more.
    without_recomputing = flop(case, ARMS["ours"])["total"] / 989.4e12 / 0.4
    assert 1 < found["seconds"]["train"] / without_recomputing < 4 / 3
    assert "refused" in step_run.planned(config, case, torch.float32, model.config, "H100")
    assert step_run.planned(config, case, torch.bfloat16, model.config, None) is None


def test_an_arm_that_says_much_holds_nothing_up_and_one_that_fails_ends_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import step

    script = tmp_path / "bench" / "step_run.py"
    script.parent.mkdir()
    monkeypatch.setattr(step, "ROOT", tmp_path)
    turns = "for _ in range(2): print('ready', flush=True); sys.stdin.readline()\n"
    script.write_text(f"import sys\nsys.stderr.write(200_000 * 'x')\n{turns}print('{{\"ok\": true}}', flush=True)\n")
    assert step.run("160+40", sys.executable) == {arm: {"ok": True} for arm in step.arms_of("cpu", "160+40")}
    pids = tmp_path / "pids"
    script.write_text(
        f"import os, sys, time\nopen({str(pids)!r}, 'a').write(f'{{os.getpid()}} ')\n"
        f"if 'TRL' in sys.argv: sys.exit('no such module')\nprint('ready', flush=True)\ntime.sleep(60)\n"
    )
    with pytest.raises(RuntimeError, match="TRL failed"):
        step.run("160+40", sys.executable)
    assert "no such module" in capfd.readouterr().err
    for pid in map(int, pids.read_text().split()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
