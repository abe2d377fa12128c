"""policy_loss and loss_normalizer against autograd of the definition, in float64."""

from __future__ import annotations

import pickle
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rewardmap_kernels import PolicyObjective, loss_normalizer, policy_loss, reference

sys.path.append(str(Path(__file__).parent))
import kernels_cases as cases


def logprobs_and_entropy(n: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    logprobs = torch.randn(n, generator=g, dtype=torch.float64) * 0.5 - 1.5
    return logprobs.requires_grad_(), torch.rand(n, generator=g, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("objective", cases.OBJECTIVES, ids=cases.objective_id)
def test_loss_and_derivatives_match_autograd(objective: PolicyObjective, masked: bool, on_policy: bool) -> None:
    rows = cases.row_inputs(97)
    if on_policy:
        rows["old_logprobs"] = None
    if not masked:
        rows["loss_mask"] = None
    logprobs, entropy = logprobs_and_entropy(97)
    expected = reference.policy_row_loss(logprobs, entropy=entropy, objective=objective, **rows)
    d_logprob, d_entropy = torch.autograd.grad(
        expected.sum(), (logprobs, entropy), allow_unused=True, materialize_grads=True
    )
    got = policy_loss(logprobs, entropy=entropy, objective=objective, **rows)
    torch.testing.assert_close(got.row_loss, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(got.d_logprob, d_logprob, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(got.d_entropy, d_entropy, rtol=1e-9, atol=1e-11)
    grads = torch.autograd.grad((got.row_loss * 3).sum(), (logprobs, entropy))
    torch.testing.assert_close(grads[0], 3 * d_logprob, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(grads[1], 3 * d_entropy, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("spread", [0.3, 15.0])
@pytest.mark.parametrize("objective", cases.OBJECTIVES, ids=cases.objective_id)
def test_float32_loses_no_more_than_the_rounding_of_its_inputs(objective: PolicyObjective, spread: float) -> None:
    """Near the policy, and beyond every bound and clamp: no large numbers cancel."""
    n = 400
    g = torch.Generator().manual_seed(4)
    logprobs = torch.randn(n, generator=g) - 2.0
    rows = cases.row_inputs(n, dtype=torch.float32)
    for name in ("old_logprobs", "ref_logprobs", "rollout_logprobs"):
        rows[name] = logprobs + spread * torch.randn(n, generator=g)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in rows.items()}
    entropy = torch.rand(n, generator=g)
    got = policy_loss(logprobs, entropy=entropy, objective=objective, **rows)
    wanted = policy_loss(logprobs.double(), entropy=entropy.double(), objective=objective, **wide)
    # Differences of log-probabilities near 45 are rounded to 2^-20, their exponentials r by as much, and sapo has an
    # exponential of that: r^2 e^-r at most times as much.
    absolute = 4e-6 if objective.name == "sapo" else 1e-9
    torch.testing.assert_close(got.d_logprob.double(), wanted.d_logprob, rtol=4e-6, atol=absolute)


@pytest.mark.parametrize("objective", cases.OBJECTIVES, ids=cases.objective_id)
def test_masked_rows_are_exactly_zero_whatever_they_hold(objective: PolicyObjective) -> None:
    rows = cases.row_inputs(31)
    logprobs, entropy = logprobs_and_entropy(31)
    clean = policy_loss(logprobs, entropy=entropy, objective=objective, **rows)
    off = ~rows["loss_mask"]
    poisoned: dict[str, Any] = {
        k: torch.where(off, float("nan"), v) if k not in ("sequence", "loss_mask") else v for k, v in rows.items()
    }
    logprobs = torch.where(off, float("nan"), logprobs)
    got = policy_loss(logprobs, entropy=torch.where(off, float("inf"), entropy), objective=objective, **poisoned)
    for mine, theirs in zip(got[:3], clean[:3], strict=True):
        assert torch.equal(mine, theirs)
        assert (mine[off] == 0).all()
    assert got.metrics.keys() == clean.metrics.keys()
    for name, value in got.metrics.items():
        assert torch.equal(value, clean.metrics[name]), name


def test_ratio_one_gives_the_reinforce_gradient() -> None:
    logprobs, _ = logprobs_and_entropy(40)
    rows = cases.row_inputs(40)
    rows.pop("old_logprobs")
    expected = policy_loss(logprobs, objective=PolicyObjective("reinforce"), **rows).d_logprob
    for name in ("grpo", "cispo", "gspo", "sapo"):
        objective = PolicyObjective(name)  # type: ignore[arg-type]
        for old in (None, logprobs.detach()):
            got = policy_loss(logprobs, objective=objective, old_logprobs=old, **rows)
            torch.testing.assert_close(got.d_logprob, expected, rtol=1e-12, atol=0)
            assert got.metrics["ratio_max"] == 1


def test_clipping_is_reported_and_stops_the_gradient() -> None:
    logprobs = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0]).log_softmax(0)
    old = logprobs - torch.tensor([0.5, 0.5, -0.5, -0.5, 0.0])
    adv = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    out = policy_loss(logprobs, advantages=adv, normalizer=1.0, objective=PolicyObjective(), old_logprobs=old)
    assert (out.d_logprob == 0).tolist() == [True, False, False, True, False]
    assert out.metrics["clip_fraction_high"].item() == pytest.approx(0.2)
    assert out.metrics["clip_fraction_low"].item() == pytest.approx(0.2)
    assert out.metrics["ratio_min"].item() == pytest.approx(2.718281828**-0.5, rel=1e-5)


def test_advantages_scale_the_policy_gradient_linearly() -> None:
    logprobs, _ = logprobs_and_entropy(50)
    rows = cases.row_inputs(50)
    one = policy_loss(logprobs, objective=PolicyObjective("dapo"), **rows).d_logprob
    rows["advantages"] = rows["advantages"] * 4
    assert torch.equal(policy_loss(logprobs, objective=PolicyObjective("dapo"), **rows).d_logprob, one * 4)


def test_extreme_ratios_stay_finite_and_nan_is_not_hidden() -> None:
    logprobs = torch.tensor([-1e4, -1.0, -1.0])
    old = torch.tensor([-1.0, -1e4, float("nan")])
    for objective in cases.OBJECTIVES:
        rows = cases.row_inputs(3, dtype=torch.float32)
        rows.update(old_logprobs=old, loss_mask=None, ref_logprobs=old.flip(0))
        out = policy_loss(
            logprobs, entropy=torch.ones(3), objective=replace(objective, kl_coef=0.0, kl_bias_correction=False), **rows
        )
        assert out.row_loss[:2].isfinite().all() and out.d_logprob[:2].isfinite().all()
        assert out.row_loss.dtype == torch.float32
        if objective.name not in ("reinforce",):
            assert out.row_loss[2].isnan()


@pytest.mark.parametrize("objective", cases.OBJECTIVES, ids=cases.objective_id)
def test_nan_that_a_row_reads_reaches_its_loss_and_its_derivative(objective: PolicyObjective) -> None:
    logprobs, entropy = logprobs_and_entropy(20)
    row = 7
    for name in cases.read_by_derivative(objective):
        for sign in (1.0, -1.0):
            rows = cases.row_inputs(20)
            rows["loss_mask"][row], rows["advantages"][row] = True, sign
            rows[name][row] = float("nan")
            out = policy_loss(logprobs, entropy=entropy, objective=objective, **rows)
            assert out.row_loss[row].isnan() and out.d_logprob[row].isnan(), name
            others = rows["sequence"] != rows["sequence"][row]
            assert out.row_loss[others].isfinite().all() and out.d_logprob[others].isfinite().all(), name


def test_no_rows_and_all_rows_masked() -> None:
    for n in (0, 5):
        rows = cases.row_inputs(n)
        rows["loss_mask"] = torch.zeros(n, dtype=torch.bool)
        out = policy_loss(torch.zeros(n, dtype=torch.float64), objective=PolicyObjective("gspo"), **rows)
        assert out.row_loss.sum() == 0 and (out.d_logprob == 0).all()
        assert all(value.isfinite() for value in out.metrics.values())


def test_normalizers() -> None:
    mask = torch.tensor([1, 1, 0, 1, 1, 1])
    sequence = torch.tensor([0, 0, 0, 1, 1, 3])
    for name in ("dapo", "bnpo", "cispo", "reinforce"):
        assert loss_normalizer(PolicyObjective(name), mask) == 5  # type: ignore[arg-type]
    assert loss_normalizer(PolicyObjective("dapo"), mask, total_tokens=torch.tensor(40)) == 40
    assert loss_normalizer(PolicyObjective("dr_grpo"), mask, num_sequences=4, max_length=7) == 28
    for name in ("grpo", "gspo", "sapo"):
        objective = PolicyObjective(name)  # type: ignore[arg-type]
        got = loss_normalizer(objective, mask, sequence=sequence, num_sequences=4)
        assert got.tolist() == [8, 8, 8, 8, 8, 4]
    assert loss_normalizer(PolicyObjective("dapo"), torch.zeros(3)) == 1
    # Mean over sequences of their token means.
    loss = torch.arange(6.0)
    weight = 1 / loss_normalizer(PolicyObjective("grpo"), mask, sequence=sequence, num_sequences=4)
    assert (loss * mask * weight).sum().item() == pytest.approx((0.5 + 3.5 + 0 + 5) / 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "ppo"}, "'ppo' is not one of"),
        ({"clip_eps_low": -0.1}, "clip_eps_low must be finite and >= 0, got -0.1"),
        ({"dual_clip": 0.5}, "dual_clip must be > 1, got 0.5"),
        ({"delta": 1.1}, "delta must be > 1"),
        ({"name": "cispo", "delta": 4.0}, "the objective cispo ignores them"),
        ({"name": "dapo", "sapo_temperature_pos": 2.0}, "the objective dapo ignores them"),
        ({"kl_bias_correction": True}, "kl_bias_correction needs kl_coef"),
        ({"importance_level": "sequence"}, "needs importance_correction"),
        ({"importance_min": 3.0}, "importance_min 3.0 is above importance_max 2.0"),
        ({"entropy_coef": float("nan")}, "entropy_coef must be finite"),
        ({"kl_coef": "1e-3"}, "kl_coef must be a number, got '1e-3'"),
        ({"clip_eps_high": None}, "clip_eps_high must be a number, got None"),
        ({"delta": torch.tensor(4.0)}, "delta must be a number, got tensor"),
        ({"kl_coef": 0.1, "kl_bias_correction": "False"}, "kl_bias_correction must be True or False, got 'False'"),
    ],
)
def test_a_bad_objective_raises(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolicyObjective(**options)


def test_an_objective_is_made_again_from_its_fields() -> None:
    for objective in cases.OBJECTIVES:
        for again in (PolicyObjective(**asdict(objective)), pickle.loads(pickle.dumps(objective))):
            assert again == objective and again.key == objective.key and hash(again) == hash(objective)


@pytest.mark.parametrize(
    ("objective", "change", "message"),
    [
        ({}, {"advantages": None}, r"advantages must be a \[N\] tensor, got None"),
        ({}, {"advantages": torch.zeros(3)}, r"advantages must have shape \(4,\), got \(3,\)"),
        (
            {},
            {"advantages": torch.zeros(4, dtype=torch.long)},
            "advantages must be floating point, got torch.int64",
        ),
        ({}, {"normalizer": 0.0}, "normalizer must be positive, got 0.0"),
        ({}, {"normalizer": torch.tensor([1.0, 1.0, -2.0, 1.0])}, "normalizer must be positive, got -2.0 in row 2"),
        ({}, {"normalizer": torch.ones(2)}, "normalizer must be 0-d"),
        ({"kl_coef": 0.1}, {}, "kl_coef = 0.1 needs ref_logprobs"),
        ({"entropy_coef": 0.1}, {}, "entropy_coef = 0.1 needs entropy"),
        ({"importance_correction": "mask"}, {}, "needs rollout_logprobs"),
        ({"name": "gspo"}, {}, "gspo needs sequence"),
        (
            {"name": "gspo"},
            {"sequence": torch.tensor([0, 1, 9, 2])},
            r"sequence\[2\] = 9 is outside \[0, 4\)",
        ),
        ({"name": "gspo"}, {"sequence": torch.zeros(4)}, "sequence must be int32 or int64"),
    ],
)
def test_bad_input_raises(objective: dict[str, Any], change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"advantages": torch.ones(4), "normalizer": 4.0, **change}
    with pytest.raises(ValueError, match=message):
        policy_loss(torch.zeros(4), objective=PolicyObjective(**objective), **arguments)


def test_forward_mode_is_refused() -> None:
    rows: dict[str, Any] = {"advantages": torch.ones(3), "normalizer": 1.0, "objective": PolicyObjective()}
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: policy_loss(x, **rows).row_loss, (torch.zeros(3),), (torch.ones(3),))


def test_bad_normalizer_arguments_raise() -> None:
    mask = torch.ones(4)
    for name, options, message in (
        ("grpo", {"num_sequences": 2}, "needs sequence"),
        ("grpo", {"sequence": torch.zeros(4, dtype=torch.long)}, "needs num_sequences"),
        ("dr_grpo", {"num_sequences": 2}, "needs max_length"),
        ("dapo", {"max_length": 4}, "ignores it"),
        ("grpo", {"total_tokens": 4}, "ignores it"),
        ("grpo", {"num_sequences": 2.0, "sequence": mask.long()}, "num_sequences must be an integer, got 2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            loss_normalizer(PolicyObjective(name), mask, **options)  # type: ignore[arg-type]
