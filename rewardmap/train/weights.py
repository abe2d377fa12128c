"""The trainer's weights as a server wants them: whole, merged, in its dtype, in buckets of bounded size; or the
adapters alone. And such a bucket as its memory is handed over."""

from __future__ import annotations

import base64
import io
import pickle
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import reduce_tensor

from rewardmap.config import ConfigError

Tensor = torch.Tensor
_RENAMED = {
    "_orig_mod.": "",  # torch.compile
    "_checkpoint_wrapped_module.": "",
    "base_model.model.": "",  # peft
    ".base_layer.": ".",
    "model.language_model.": "model.",  # transformers' name in memory: that in published checkpoints
    "model.visual.": "visual.",
}
"""Parts of names in the trainer's memory, and what stands there in a published Qwen checkpoint, whose names every
version of SGLang loads."""
_CUDA_HANDLE_BYTES = 64


@dataclass(frozen=True, slots=True)
class Entry:
    """One weight in a bucket."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """First byte."""
    end: int


@dataclass(frozen=True, slots=True)
class Bucket:
    flat: Tensor
    """[bytes] uint8: the weights one after the other."""
    entries: tuple[Entry, ...]

    def tensors(self) -> dict[str, Tensor]:
        """Views by name."""
        return {e.name: self.flat[e.start : e.end].view(e.dtype).view(e.shape) for e in self.entries}


def buckets(
    model: Any, dtype: torch.dtype, limit: int, device: torch.device | None = None, *, merged: bool = True
) -> Iterator[Bucket]:
    """All weights of ``model`` in ``dtype``, one after the other in buckets of at most ``limit`` bytes; a larger
    weight has one for itself.

    Each has memory of its own: a server's GPUs may still read from it when the next one is filled. With a sharded
    model every rank must take every bucket: each weight is gathered as it is reached.

    Args:
        device: of the buckets, wherever the weights rest; None: theirs.
        merged: see ``whole_weights``.
    """
    yield from _packed(whole_weights(model, dtype, device, merged=merged), dtype, limit, device)


def adapter_bucket(model: Any, dtype: torch.dtype, device: torch.device) -> Bucket:
    """All low-rank adapters of ``model`` on ``device``, under the names peft saves them with: shards gathered, so every
    rank makes this call."""
    weights = {
        f"base_model.model.{published_name(name).replace('.default.', '.')}": _whole(parameter.detach(), dtype, device)
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }
    size = sum(weight.numel() for weight in weights.values()) * dtype.itemsize
    [bucket] = _packed(weights.items(), dtype, size, device)
    return bucket


def _packed(
    weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype, limit: int, device: torch.device | None
) -> Iterator[Bucket]:
    entries: list[Entry] = []
    flat: Tensor | None = None
    end = 0
    for name, weight in weights:
        size = weight.numel() * dtype.itemsize
        if entries and end + size > limit:
            assert flat is not None
            yield Bucket(flat[:end], tuple(entries))
            entries, flat, end = [], None, 0
        if flat is None:
            flat = torch.empty(max(size, limit), dtype=torch.uint8, device=device or weight.device)
        flat[end : end + size].view(dtype).copy_(weight.detach().reshape(-1))
        entries.append(Entry(name, dtype, tuple(weight.shape), end, end + size))
        end += size
        del weight  # or it lives while the next one is gathered
    if entries:
        assert flat is not None
        yield Bucket(flat[:end], tuple(entries))


def payloads(bucket: Bucket, count: int) -> list[str]:
    """What ``/update_weights_from_tensor`` takes as ``flattened_bucket``, base64: by value from a CPU, else a handle to
    GPU memory for each of ``count`` processes. Torch counts the readers of a handle down from one, and keeps memory for
    ever whose count a second one took below zero.

    The format is a pickle by SGLang's protocol, which its server reads with a list of allowed names; we only write.

    Raises:
        ConfigError: memory that cannot be handed over.
    """
    described = [
        SimpleNamespace(
            name=e.name, shape=e.shape, dtype=e.dtype, start_idx=e.start, end_idx=e.end, numel=e.end - e.start
        )
        for e in bucket.entries
    ]

    def pickled(flat: Tensor) -> str:
        file = io.BytesIO()
        _Pickler(file).dump({"flattened_tensor": flat, "metadata": described})
        return base64.b64encode(file.getvalue()).decode()

    if bucket.flat.is_cuda:
        return [pickled(bucket.flat) for _ in range(count)]
    return [pickled(bucket.flat.clone())] * count  # a CPU storage travels whole


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if not (isinstance(value, Tensor) and value.is_cuda):
            return NotImplemented
        torch.cuda.synchronize(value.device)
        rebuild, arguments = reduce_tensor(value)
        # Argument 6 is the device's number here; its UUID means the same to the server, whatever GPUs it sees.
        name = str(torch.cuda.get_device_properties(arguments[6]).uuid)
        return rebuild, (*arguments[:6], name, _bare(arguments[7]), *arguments[8:])


def _bare(handle: bytes) -> bytes:
    """CUDA's own handle. Torch writes its version and a letter before it, and refuses those of a newer torch; one
    without them every version reads."""
    if len(handle) == _CUDA_HANDLE_BYTES:
        return handle
    if handle[1:2] != b"c" or len(handle) != 2 + _CUDA_HANDLE_BYTES:
        raise ConfigError(
            "rollout.server.sync='tensor' hands over GPU memory, which another process cannot open with "
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True; leave that out, or set sync to 'distributed' or 'disk'"
        )
    return handle[2:]


def whole_weights(
    model: Any, dtype: torch.dtype | None = None, device: torch.device | None = None, *, merged: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) of every parameter, under a checkpoint's names: shards gathered, a shared parameter once, low-rank
    adapters multiplied into the weights they belong to.

    Args:
        dtype: what a shard is rounded to before it is gathered, which moves less; others stay as they are.
        device: where a shard is gathered.
        merged: False: the weights that adapters belong to come without them.
    """
    adapted = {}
    for name, module in model.named_modules():
        if merged and hasattr(module, "base_layer") and hasattr(module, "lora_A"):
            adapted[f"{name}.base_layer.weight"] = module
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        weight = parameter.detach()
        weight = _merged(weight, adapted[name], device) if name in adapted else _whole(weight, dtype, device)
        yield published_name(name), weight


def published_name(name: str) -> str:
    """A parameter's name in a published checkpoint."""
    for part, other in _RENAMED.items():
        name = name.replace(part, other)
    return name


def _whole(weight: Tensor, dtype: torch.dtype | None, device: torch.device | None) -> Tensor:
    if not isinstance(weight, DTensor):
        return weight
    shard: Any = weight.to(device=device or weight.device, dtype=dtype or weight.dtype)
    return shard.full_tensor()  # type: ignore[no-any-return]


def _merged(weight: Tensor, module: Any, device: torch.device | None) -> Tensor:
    """W + scaling B A of peft's layers, computed at least in fp32."""
    wide = _whole(weight, None, device)
    wide = wide.to(torch.promote_types(wide.dtype, torch.float32))
    for adapter in module.lora_A:
        down, up = (_whole(one[adapter].weight.detach(), None, device) for one in (module.lora_A, module.lora_B))
        wide = wide + module.scaling[adapter] * (up.to(wide.dtype) @ down.to(wide.dtype))
    return wide
