"""The real verl: our registered loss beside its own, and our head behind its switch. Skipped where verl is not
installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any

import pytest
import torch

try:
    algos = importlib.import_module("verl.trainer.ppo.core_algos")
except ImportError as missing:
    pytest.skip(f"verl cannot be imported: {missing}", allow_module_level=True)

from rewardmap_kernels import PolicyObjective, reference
from rewardmap_kernels.integrations.verl import register


class Config:
    """What a policy loss reads of verl's ActorConfig."""

    clip_ratio, clip_ratio_low, clip_ratio_high = 0.2, 0.1, 0.28
    global_batch_info: dict[str, Any] = {}  # noqa: RUF012

    def get(self, name: str, default: Any = None) -> Any:
        return {"clip_ratio_c": 1.5}.get(name, default)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "token-sum"])
@pytest.mark.parametrize("corrected", [False, True])
def test_our_loss_is_verl_s(mode: str, corrected: bool) -> None:
    register(head=False)
    g = torch.Generator().manual_seed(0)
    log_prob = (-torch.rand(4, 9, generator=g) * 2).requires_grad_()
    old = log_prob.detach() + 0.3 * torch.randn(4, 9, generator=g)
    advantages = torch.randn(4, 9, generator=g)
    mask = (torch.rand(4, 9, generator=g) > 0.3).float()
    weights = torch.rand(4, 9, generator=g) if corrected else None
    results = []
    for name in ("vanilla", "rewardmap"):
        loss, metrics = algos.get_policy_loss_fn(name)(old, log_prob, advantages, mask, mode, Config(), weights)
        results.append((loss, torch.autograd.grad(loss, log_prob)[0]))
        assert metrics
    torch.testing.assert_close(results[1], results[0])


def test_options_that_are_verl_s_own_raise() -> None:
    with pytest.raises(ValueError, match="verl's own options"):
        register(objective=PolicyObjective(kl_coef=0.1))


def test_our_head_is_behind_the_fused_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
    earlier: Any = types.ModuleType("verl.models.mcore.model_forward_fused")  # as if imported before: it needs Megatron
    earlier.linear_cross_entropy = module.linear_cross_entropy
    monkeypatch.setitem(sys.modules, earlier.__name__, earlier)
    register()
    head = module.linear_cross_entropy
    assert earlier.linear_cross_entropy is head
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 3, 4, generator=g), torch.randn(7, 4, generator=g)
    labels = torch.randint(0, 7, (2, 3), generator=g)
    got = head(hidden, weight, labels, 0.8, "none")
    torch.testing.assert_close(got, reference.linear_logprobs(hidden.view(6, 4), weight, labels.view(6), 0.8))
    with pytest.raises(ValueError, match="only 'none'"):
        head(hidden, weight, labels, 1.0, "mean")
