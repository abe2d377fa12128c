"""group_advantage against the float64 definition and hand-computed groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rewardmap_kernels import group_advantage, reference

OFFSETS = [0, 8, 9, 9, 12, 20, 22]


def rewards_and_weights() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    rewards = torch.rand(OFFSETS[-1], generator=g, dtype=torch.float64)
    rewards[9:12] = 0.1  # equal rewards whose float mean differs from them
    return rewards, torch.rand(OFFSETS[-1], generator=g, dtype=torch.float64) + 0.5


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "batch_mean", "none"])
@pytest.mark.parametrize("scale", ["group", "batch", "none", "max_min", "mad"])
def test_matches_the_definition(scale: str, baseline: str, ddof: int) -> None:
    rewards, weights = rewards_and_weights()
    for w, inside in ((None, False), (weights, scale in ("group", "batch"))):
        options: dict[str, Any] = {
            "scale": scale, "ddof": ddof, "eps": 1e-4, "baseline": baseline, "weights": w,
            "eps_inside": inside,
        }  # fmt: skip
        expected = reference.group_advantage(rewards, OFFSETS, **options)
        got = group_advantage(rewards, torch.tensor(OFFSETS), **options)
        for mine, theirs in zip(got[:4], expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_a_group_by_hand() -> None:
    out = group_advantage(torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([0, 4]), eps=0.0, ddof=0)
    assert out.advantages.tolist() == [1, -1, -1, 1]
    assert out.mean.item() == 0.5 and out.std.item() == 0.5 and not out.degenerate.item()
    out = group_advantage(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0, 3]), scale="none", baseline="leave_one_out")
    torch.testing.assert_close(out.advantages, torch.tensor([1, -0.5, -0.5]))


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e8 + 1, -7.3])
def test_equal_rewards_give_exactly_zero(value: float) -> None:
    for size in (1, 3, 7):
        out = group_advantage(torch.full((size,), value), torch.tensor([0, size]), eps=0.0)
        assert (out.advantages == 0).all() and out.degenerate.all()


def test_the_weight_does_not_cancel() -> None:
    rewards, weights = rewards_and_weights()
    offsets = torch.tensor(OFFSETS)
    plain = group_advantage(rewards, offsets).advantages
    assert torch.equal(group_advantage(rewards, offsets, weights=weights).advantages, plain * weights)


def test_adding_a_constant_or_permuting_a_group_changes_nothing_else() -> None:
    rewards, _ = rewards_and_weights()
    offsets = torch.tensor(OFFSETS)
    base = group_advantage(rewards, offsets).advantages
    torch.testing.assert_close(group_advantage(rewards + 5, offsets).advantages, base, rtol=1e-6, atol=1e-9)
    order = torch.cat([torch.randperm(8), torch.arange(8, 22)])
    torch.testing.assert_close(group_advantage(rewards[order], offsets).advantages, base[order], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "none"])
@pytest.mark.parametrize("scale", ["group", "max_min", "mad"])
def test_a_bad_reward_stays_in_its_group(scale: str, baseline: str, dtype: torch.dtype) -> None:
    """float32 is the C++ code's where there is a compiler."""
    rewards = rewards_and_weights()[0].to(dtype)
    options = {"scale": scale, "baseline": baseline}
    base = group_advantage(rewards, torch.tensor(OFFSETS), **options).advantages
    rewards[3] = float("nan")
    got = group_advantage(rewards, torch.tensor(OFFSETS), **options).advantages
    assert got[:8].isnan().all() and torch.equal(got[8:], base[8:])


def test_components_are_summed_before_or_after_normalising() -> None:
    g = torch.Generator().manual_seed(4)
    rewards = torch.rand(22, 3, generator=g, dtype=torch.float64)
    rewards[9:12, :2] = 0.25
    parts = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    offsets = torch.tensor(OFFSETS)
    summed = group_advantage(rewards, offsets, component_weights=parts)
    expected = group_advantage(rewards @ parts, offsets)
    for mine, theirs in zip(summed[:4], expected[:4], strict=True):
        assert torch.equal(mine, theirs)
    after = group_advantage(rewards, offsets, component_weights=parts, combine="normalize_then_sum")
    each = [group_advantage(rewards[:, k], offsets) for k in range(3)]
    wanted = sum(w * e.advantages for w, e in zip(parts, each, strict=True))
    torch.testing.assert_close(after.advantages, wanted, rtol=1e-12, atol=1e-12)
    assert after.degenerate.tolist() == [False, True, True, False, False, False]
    assert each[0].degenerate.tolist() == [False, True, True, True, False, False]


def test_a_group_with_a_bad_reward_can_be_dropped_or_refused() -> None:
    rewards, _ = rewards_and_weights()
    offsets = torch.tensor(OFFSETS)
    base = group_advantage(rewards, offsets)
    for value in (float("nan"), float("inf")):
        rewards[13] = value
        got = group_advantage(rewards, offsets, non_finite="drop_group")
        assert (got.advantages[12:20] == 0).all() and got.degenerate[4]
        assert torch.equal(got.advantages[:12], base.advantages[:12])
        with pytest.raises(ValueError, match=r"rewards\[13\] = (nan|inf) is not finite"):
            group_advantage(rewards, offsets, non_finite="raise")


def test_advantages_reach_their_tokens() -> None:
    rewards, weights = rewards_and_weights()
    lengths = torch.arange(22) % 5
    tokens = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    out = group_advantage(rewards, torch.tensor(OFFSETS), weights=weights, token_offsets=tokens)
    assert out.token_advantages is not None
    assert torch.equal(out.token_advantages, out.advantages.repeat_interleave(lengths))
    assert group_advantage(rewards, torch.tensor(OFFSETS)).token_advantages is None


def test_nothing_at_all() -> None:
    out = group_advantage(torch.zeros(0), torch.tensor([0]))
    assert out.advantages.shape == (0,) and out.mean.shape == (0,)
    out = group_advantage(torch.zeros(0), torch.tensor([0, 0]), scale="mad")
    assert out.degenerate.tolist() == [True] and out.std.tolist() == [0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": torch.tensor([0, 3])}, r"run from 0 to len\(rewards\) = 4, got 0 to 3"),
        ({"offsets": torch.tensor([0, 3, 2, 4])}, r"must not fall, got offsets\[1\] = 3, offsets\[2\] = 2"),
        ({"offsets": torch.tensor([0.0, 4.0])}, "offsets must be"),
        ({"offsets": [0, 4]}, "offsets must be a torch.Tensor, got list"),
        ({"rewards": torch.ones(4, dtype=torch.long)}, "rewards must be floating point"),
        ({"rewards": torch.ones(2, 2, 2)}, "rewards must have 1"),
        ({"rewards": [1.0, 0.0]}, "rewards must be a torch.Tensor, got list"),
        ({"token_offsets": [0, 1, 2, 3, 4]}, "token_offsets must be a torch.Tensor, got list"),
        ({"token_offsets": torch.arange(5), "num_tokens": 4.0}, "num_tokens must be an integer, got 4.0"),
        ({"weights": torch.ones(3)}, r"weights must have shape \(4,\), got \(3,\)"),
        ({"scale": "std"}, "'std' is not one of group, batch"),
        ({"baseline": "median"}, "'median' is not one of mean"),
        ({"ddof": 2}, "ddof must be 0 or 1, got 2"),
        ({"ddof": 1.0}, "ddof must be 0 or 1, got 1.0"),
        ({"eps": -1.0}, "eps must be >= 0"),
        ({"eps": "1e-6"}, "eps must be >= 0, got '1e-6'"),
        ({"eps_inside": True, "scale": "none"}, "scale 'none' has no variance"),
        ({"rewards": torch.ones(4, 2)}, r"\[B, K\] and component_weights \[K\] go together"),
        ({"combine": "normalize_then_sum"}, "needs rewards"),
        ({"non_finite": "drop_group", "scale": "batch"}, "batch statistics"),
        ({"token_offsets": torch.tensor([0, 2, 4])}, r"token_offsets must have shape \(5,\), got \(3,\)"),
        ({"token_offsets": torch.tensor([0, 2, 1, 4, 6])}, r"token_offsets\[1\] = 2, token_offsets\[2\] = 1"),
        ({"token_offsets": torch.arange(5), "num_tokens": 9}, "run from 0 to num_tokens = 9, got 0 to 4"),
        ({"num_tokens": 9}, "num_tokens = 9 needs token_offsets"),
    ],
)
def test_bad_input_raises(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"rewards": torch.ones(4), "offsets": torch.tensor([0, 4]), **change}
    with pytest.raises(ValueError, match=message):
        group_advantage(arguments.pop("rewards"), arguments.pop("offsets"), **arguments)
