"""The policy over the ranks of a job: FSDP2 (``fully_shard``) by block, hybrid sharding, mixed precision, activation
checkpointing, offload, compiled blocks.

Blocks are gathered one at a time. Embeddings, last norm and head are gathered once per micro-batch and stay until its
backward pass, so the fused loss reads the whole head without a second gather; the reduction is a sum in the weights'
own dtype, because losses are already divided by counts over all ranks. A frozen vision tower is not split: a rank fills
its feature cache alone. One that trains is one unit, gathered once for the step's pictures and once for their backward.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from rewardmap.config import Config, ConfigError, ParallelConfig
from rewardmap.policy import Policy, cast_weights
from rewardmap.train.forest import PackedForest
from rewardmap.train.forward import Vision, response_hidden
from rewardmap.train.lora import add_lora
from rewardmap.train.ranks import Ranks

Tensor = torch.Tensor
Forward = Callable[[PackedForest, Vision | None], Tensor]
"""A packed forest's response rows: hidden states [N, H] that predict them. Without the step's ``Vision`` the tower runs
for this forest."""


def computes_in(config: Config) -> torch.dtype:
    """Of the forward and backward pass, and of servers that sample."""
    dtype: torch.dtype = getattr(torch, config.parallel.compute_dtype or config.policy.dtype)
    return dtype


def needs_sharding(parallel: ParallelConfig, ranks: Ranks, dtype: str) -> bool:
    """Whether the policy must go through ``shard_policy``: several ranks, or a feature that FSDP brings to one."""
    return ranks.size > 1 or parallel.offload or parallel.compute_dtype not in (None, dtype)


def prepare_policy(policy: Policy, config: Config) -> None:
    """Freeze, add adapters, compile and checkpoint blocks as the configuration asks; before ``shard_policy``.

    Raises:
        ConfigError: a pattern of ``policy.freeze`` that no parameter has, patterns that leave nothing to train, or LoRA
            without peft.
    """
    freeze_matching(policy.model, config.policy.freeze)
    if config.policy.lora_rank:
        with torch.random.fork_rng(devices=[]):  # peft draws adapters on the host, from the global generator
            torch.default_generator.manual_seed(config.train.seed)
            add_lora(policy, config.policy)
    if not any(parameter.requires_grad for parameter in policy.model.parameters()):
        raise ConfigError(f"policy.freeze={list(config.policy.freeze)} leaves nothing to train; freeze less")
    blocks = list(policy.text_model.layers)
    if config.parallel.compile:
        for block in blocks:
            block.forward = torch.compile(block.forward, dynamic=True)
    if config.parallel.activation_checkpointing:
        # A tower that trains keeps all pictures of a step until its backward pass.
        for block in (*blocks, *([] if policy.freeze_vision else policy.vision_tower.blocks)):
            block.forward = partial(_recomputed, block.forward)


def freeze_matching(model: nn.Module, patterns: Sequence[str]) -> None:
    """Stop training the parameters whose names match a pattern (``fnmatch``), e.g. ``*.embed_tokens.*``."""
    for pattern in patterns:
        names = [name for name, _ in model.named_parameters() if fnmatch(name, pattern)]
        if not names:
            known = ", ".join(name for name, _ in model.named_children())
            raise ConfigError(f"policy.freeze='{pattern}' matches no parameter; names begin with {known}")
        for name in names:
            model.get_parameter(name).requires_grad_(False)


def shard_policy(policy: Policy, parallel: ParallelConfig, ranks: Ranks, device: torch.device) -> Forward:
    """Split the policy's weights over the ranks, in place. Returns the forward pass to train with.

    Every rank must call the forward pass equally often. Weights are whole again inside ``policy.whole_weights()``.

    Raises:
        ConfigError: ``parallel.shard`` does not divide the number of ranks.
    """
    model, tower, blocks = policy.model, policy.vision_tower, list(policy.text_model.layers)
    dtype = None if parallel.compute_dtype is None else getattr(torch, parallel.compute_dtype)
    master = next((parameter.dtype for parameter in model.parameters() if parameter.requires_grad), model.dtype)
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if parallel.offload else OffloadPolicy()
    shared: dict[str, Any] = {
        "mesh": device_mesh(parallel, ranks, device.type),
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=master),
        "offload_policy": offload,
    }
    whole: set[nn.Parameter] = set()
    if policy.freeze_vision:
        tower.to(device=device)
        if dtype is not None:
            cast_weights(tower, dtype)
        whole = set(tower.parameters())
    else:
        fully_shard(tower, reshard_after_forward=False, **shared)
        # Between its forward and its backward other modules run theirs: what came before it is no guide.
        tower.set_modules_to_backward_prefetch([tower])
    for block in blocks:
        fully_shard(block, **shared)
    model.packed_hidden = MethodType(lambda _, forest, vision: response_hidden(policy, forest, vision), model)
    fully_shard(model, ignored_params=whole, **shared)
    for before, block in zip([model, *blocks], blocks, strict=False):
        # Given, not observed: a rank may have called the model more often than another, to sample.
        block.set_modules_to_backward_prefetch([before])
    register_fsdp_forward_method(model, "packed_hidden")
    model.settle = MethodType(lambda _: None, model)
    register_fsdp_forward_method(model, "settle")
    model.settle()  # the first call decides which module is the root, and leaves that one gathered
    model.reshard()
    for module in _sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    policy.compute_device = device
    policy.whole_weights = partial(_whole_weights, model, {model, tower})
    return model.packed_hidden  # type: ignore[no-any-return]


def device_mesh(parallel: ParallelConfig, ranks: Ranks, device_type: str) -> DeviceMesh:
    """One dimension where all ranks share the weights; (replicas, shards) under hybrid sharding."""
    shard = parallel.shard or ranks.size
    if ranks.size % shard:
        raise ConfigError(
            f"parallel.shard={shard} does not divide the {ranks.size} ranks of the job; choose a divisor, "
            "such as the GPUs of one node, or 0 for all"
        )
    if shard == ranks.size:
        return init_device_mesh(device_type, (ranks.size,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (ranks.size // shard, shard), mesh_dim_names=("replicate", "shard"))


def each_micro_batch(policy: Policy, forests: Sequence[PackedForest]) -> Iterator[PackedForest]:
    """The step's micro-batches in order. Under hybrid sharding gradients cross between replicas with the last one."""
    for number, forest in enumerate(forests, 1):
        if isinstance(policy.model, FSDPModule):
            policy.model.set_requires_all_reduce(number == len(forests))
        yield forest


def split_again(policy: Policy) -> None:
    """After a forward pass that no backward pass follows: what it gathered is let go. Nothing for a whole policy."""
    for module in _sharded_modules(policy.model):
        module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered on every rank; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def _whole_weights(model: nn.Module, staying: Collection[nn.Module]) -> Iterator[None]:
    """All weights whole on every rank, in the compute dtype, so that ranks may call the model at their own pace.
    ``staying``: the modules that stay whole after their forward pass in training too."""
    modules = _sharded_modules(model)
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.reshard()
            module.set_reshard_after_forward(module not in staying, recurse=False)


def _sharded_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # No dropout anywhere: there is no random state to keep.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
