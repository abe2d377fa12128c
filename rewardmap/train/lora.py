"""Low-rank adapters (LoRA, arXiv 2106.09685) through peft: the base is frozen and is the reference policy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from rewardmap.config import ConfigError, PolicyConfig
from rewardmap.policy import Policy

Tensor = torch.Tensor
_ADAPTER = "default"


def add_lora(policy: Policy, config: PolicyConfig) -> None:
    """Put adapters into the decoder's linear layers named in ``config.lora_targets``, in place; all else is frozen,
    but the vision tower where ``freeze_vision`` is false. The adapter of a weight that was frozen before is frozen too.

    Raises:
        ConfigError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ConfigError(f"policy.lora_rank={config.lora_rank} needs peft: pip install 'rewardmap[lora]'") from None
    master = policy.model.lm_head.weight.dtype
    frozen = {name for name, parameter in policy.text_model.named_parameters() if not parameter.requires_grad}
    policy.model.lm_head.requires_grad_(False)
    lora = LoraConfig(
        r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=list(config.lora_targets), lora_dropout=0.0
    )
    inject_adapter_in_model(lora, policy.text_model, adapter_name=_ADAPTER)
    for name, parameter in policy.text_model.named_parameters():
        layer, adapter, _ = name.partition(".lora_")
        parameter.requires_grad_(bool(adapter) and f"{layer}.weight" not in frozen)
        if adapter:
            parameter.data = parameter.data.to(master)


def has_adapters(model: Any) -> bool:
    return any(".lora_" in name for name, _ in model.named_parameters())


@contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """The base model alone."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merged_state(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A whole state dict with the adapters multiplied out and the base model's own names."""
    from peft.tuners.lora import LoraLayer

    merged = dict(state)
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        down = merged.pop(f"{name}.lora_A.{_ADAPTER}.weight")
        up = merged.pop(f"{name}.lora_B.{_ADAPTER}.weight")
        base = merged.pop(f"{name}.base_layer.weight")
        wide = torch.promote_types(base.dtype, torch.float32)
        change = module.scaling[_ADAPTER] * (up.to(wide) @ down.to(wide))
        merged[f"{name}.weight"] = (base.to(wide) + change).to(base.dtype)
        if f"{name}.base_layer.bias" in merged:
            merged[f"{name}.bias"] = merged.pop(f"{name}.base_layer.bias")
    return merged
