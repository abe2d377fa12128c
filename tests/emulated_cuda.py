"""A CUDA device made of the CPU: torch's CPU build computes on tensors that say ``cuda:0``, with real numbers.

Import it before torch, then ``with emulated():``. Each tensor of the device wraps one of the CPU. An operator that a
GPU would refuse for tensors on two devices is refused here, and each time that the host would wait for the GPU is
counted with the function that asks for it. Kernels in Triton run by its interpreter (``TRITON_INTERPRET=1``), operators
of ours by their own bodies. It says nothing of speed, and nothing of what a kernel compiles to.
"""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock


def _give_torch_a_device() -> None:
    """Compiled and loaded before torch asks, once, for the devices there are."""
    assert "torch" not in sys.modules, "import emulated_cuda before torch"
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.submodule_search_locations
    torch_folder = Path(spec.submodule_search_locations[0])
    library = Path(tempfile.mkdtemp(prefix="emulated-cuda-")) / "cuda.so"
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{torch_folder / 'include'}"]
    command += [str(Path(__file__).with_suffix(".cpp")), "-o", str(library), f"-L{torch_folder / 'lib'}"]
    subprocess.run([*command, f"-Wl,-rpath,{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu"], check=True)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    library.unlink()
    library.parent.rmdir()


_give_torch_a_device()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch._library.custom_ops import OPDEFS  # noqa: E402
from torch.distributed.fsdp._fully_shard import _fsdp_init, _fsdp_param  # noqa: E402
from torch.utils._device import _device_constructors  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_flatten, tree_map  # noqa: E402
from triton.runtime.interpreter import GridExecutor  # noqa: E402

import rewardmap  # noqa: E402
import rewardmap_kernels  # noqa: E402
from rewardmap_kernels import tree_varlen  # noqa: E402

CUDA = torch.device("cuda", 0)


class Stream:
    """Everything on it has been done when it was asked for."""

    device = CUDA

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or Event()

    def synchronize(self) -> None:
        _wait("stream")


class Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, *_: Any) -> None: ...
    def wait(self, *_: Any) -> None: ...

    def synchronize(self) -> None:
        _wait("event")


class Device:
    """``torch.cuda.device``: where Triton launches, which does not ask where the arguments are."""

    entered = 0

    def __init__(self, device: Any) -> None:
        assert torch.device(device) == CUDA

    def __enter__(self) -> None:
        Device.entered += 1

    def __exit__(self, *_: Any) -> None:
        Device.entered -= 1


WAITS: Counter[str] = Counter()
"""Where the host waited: ``file function (operator)`` -> how often."""
_PACKAGES = tuple(str(Path(package.__file__ or "").parent) for package in (rewardmap, rewardmap_kernels))
_STREAM = Stream()
_FAKED: dict[str, Any] = {
    "Event": Event,
    "Stream": Stream,
    "_lazy_init": lambda: None,
    "current_device": lambda: 0,
    "current_stream": lambda device=None: _STREAM,
    "device": Device,
    "device_count": lambda: 1,
    "empty_cache": lambda: None,
    "get_device_capability": lambda device=None: (9, 0),
    "get_device_name": lambda device=None: "NVIDIA H100 80GB HBM3",
    "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
    "is_available": lambda: True,
    "is_initialized": lambda: False,
    "manual_seed_all": lambda seed: None,
    "max_memory_allocated": lambda device=None: 0,
    "set_device": lambda device: None,
    "set_rng_state": lambda state, device=None: None,
    "stream": lambda stream: nullcontext(),
    "synchronize": lambda device=None: _wait("synchronize"),
}
"""Of ``torch.cuda``."""


@contextmanager
def emulated() -> Iterator[Counter[str]]:
    """One GPU, named as an H100. Yields ``WAITS``, empty."""
    WAITS.clear()
    plain_launch = GridExecutor.__call__
    _device_constructors()  # torch remembers them at the first call, which must not be when one is replaced

    def copied(make: Any, data: Any, *, device: Any = None, **named: Any) -> Any:
        """As torch does, where no mode would see it."""
        value = make(data, **named)
        return value if device is None else value.to(device)

    def launch(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        there = any(isinstance(arg, EmulatedTensor) for arg in args)
        assert Device.entered or not there, "this kernel would run on the current GPU, not on that of its tensors"
        args, kwargs = tree_map(_bare, (args, kwargs))
        return plain_launch(kernel, *args, **kwargs)

    with ExitStack() as stack:
        for name, value in _FAKED.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        for name in ("tensor", "as_tensor"):
            stack.enter_context(mock.patch.object(torch, name, partial(copied, getattr(torch, name))))
        stack.enter_context(mock.patch.object(GridExecutor, "__call__", launch))
        # Collectives by gloo; storage is the CPU's to free.
        started = partial(_init_process_group, dist.init_process_group)
        stack.enter_context(mock.patch.object(dist, "init_process_group", started))
        stack.enter_context(mock.patch.object(_fsdp_init, "_move_states_to_device", _move))
        for name in ("free_storage", "alloc_storage"):
            stack.enter_context(mock.patch.object(_fsdp_param, name, lambda tensor: None))
        # A module's parameters change their class with their device, so that they must change places with new ones.
        swaps = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swaps)
        stack.enter_context(_Mode())
        yield WAITS


def _init_process_group(init: Any, backend: str, **named: Any) -> None:
    init(backend.replace("nccl", "gloo"), **named)


def _move(parameters: Sequence[Any], buffers: Sequence[Any], device: torch.device) -> None:
    """As FSDP does: in place."""
    for tensor in (*parameters, *buffers):
        if tensor.device.type not in (device.type, "meta"):
            moved: Any = tensor.detach().to(device)
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            torch.utils.swap_tensors(tensor, torch.nn.Parameter(moved, tensor.requires_grad) if is_parameter else moved)


class EmulatedTensor(torch.Tensor):
    """On ``cuda:0``; its values are those of ``inner``, on the CPU."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls: Any, inner: torch.Tensor) -> Any:
        layout: dict[str, Any] = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        made = torch.Tensor._make_wrapper_subclass(cls, inner.size(), dtype=inner.dtype, device=CUDA, **layout)
        made.inner = inner
        return made

    def __init__(self, inner: torch.Tensor) -> None: ...

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"cuda {self.inner!r}"

    def __deepcopy__(self, memo: Any) -> Any:
        copied: Any = EmulatedTensor(self.inner.detach().clone())
        if getattr(self, "_is_param", False):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    def tolist(self) -> Any:
        _wait("tolist")
        return self.inner.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


_PLAIN = (torch.Tensor, torch.nn.Parameter, EmulatedTensor)


class _Mode(TorchDispatchMode):
    """Sees what makes tensors of the device out of none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    leaves = tree_flatten((args, kwargs))[0]
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if any(type(tensor) not in _PLAIN for tensor in tensors):
        return NotImplemented  # DTensor and its like make operators on what they hold
    here = [tensor for tensor in tensors if isinstance(tensor, EmulatedTensor)]
    asked = next((leaf for leaf in leaves if isinstance(leaf, torch.device)), None)
    target = asked.type if asked is not None else "cuda" if here else "cpu"
    if not here and target != "cuda":
        return func(*args, **kwargs)
    name = func.overloadpacket.__name__
    if func.namespace == "rewardmap_kernels":
        return _own(func, args, kwargs)
    if name.startswith("_flash_attention_"):
        return _flash_attention(name, *tree_map(_bare, args), scale=kwargs["scale"])
    if name in ("mm", "addmm") and func._overloadname.startswith("dtype"):
        return _wide_product(tensors, args[-1], kwargs.get("out"))
    if name == "_fused_sdp_choice":
        return 0  # by plain operators: the CPU's flash attention has another name than the GPU's
    _check(name, args, kwargs, tensors, target)
    if name == "_local_scalar_dense":
        target = "number"
    known = {id(tensor.inner): tensor for tensor in here}
    dropped = ("pin_memory", "non_blocking") if name == "_to_copy" else ("pin_memory",)
    bare_args, bare_kwargs = tree_map(_bare, (args, {k: v for k, v in kwargs.items() if k not in dropped}))
    made = func(*bare_args, **bare_kwargs)
    if name == "copy_" and not isinstance(args[0], EmulatedTensor):
        return args[0]

    def wrapped(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or target != "cuda":
            return value
        return known[id(value)] if id(value) in known else EmulatedTensor(value)

    return tree_map(wrapped, made)


def _bare(leaf: Any) -> Any:
    if isinstance(leaf, torch.device) and leaf.type == "cuda":
        return torch.device("cpu")
    return leaf.inner if isinstance(leaf, EmulatedTensor) else leaf


def _check(name: str, args: Any, kwargs: Any, tensors: Sequence[torch.Tensor], target: str) -> None:
    """Notes a wait. Refuses, as CUDA does, tensors of the host beside some of the device, but for single numbers."""
    if name in ("_to_copy", "copy_"):
        source = args[0] if name == "_to_copy" else args[1]
        target = target if name == "_to_copy" else args[0].device.type
        quick = kwargs.get("non_blocking", False) or (name == "copy_" and len(args) > 2 and args[2])
        # One number comes along with the kernel; of more the host's memory must be pinned, on either side.
        pinned = source.numel() == 1 or source.is_pinned() if target == "cuda" else False
        if source.device.type != target and not (quick and pinned):
            _wait(f"{name} {source.device.type} -> {target}")
        return
    if name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"):
        _wait(name)
    foreign = [tensor for tensor in tensors if not isinstance(tensor, EmulatedTensor) and tensor.dim()]
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        indices = [index for index in args[1] if index is not None]
        if foreign or any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            _wait(name)  # an index of the host is copied; of a mask the host must know how many it picks
    elif foreign and len(foreign) < len(tensors):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({name})"
        )


def _wait(what: str) -> None:
    ours = [frame for frame in traceback.extract_stack() if frame.filename.startswith(_PACKAGES)]
    where = f"{Path(ours[-1].filename).name} {ours[-1].name}" if ours else "elsewhere"
    WAITS[f"{where} ({what})"] += 1


def _own(func: Any, args: Any, kwargs: Any) -> Any:
    """The body that is registered for CUDA, on the device's tensors."""
    definition = OPDEFS[func.name().split(".")[0]]
    body = definition._backend_fns.get("cuda", definition._init_fn)
    with torch._C._AutoDispatchBelowAutograd(), _Mode():  # within an operator the mode around it is off
        return body(*args, **kwargs)


def _flash_attention(name: str, *args: Any, scale: float) -> Any:
    """torch's operators over variable lengths, by the definition of ours."""
    count = 6 if name == "_flash_attention_backward" else 3  # tensors; then lengths, the longest two, dropout
    cu_q, cu_k, _, _, _, causal = args[count : count + 6]
    call: Any = SimpleNamespace(cu_q=cu_q, cu_k=cu_k)
    if count == 6:
        return tuple(map(EmulatedTensor, tree_varlen._plain_backward(*args[:count], call, causal, scale)))
    state = torch.empty(2, dtype=torch.uint64)
    made = (*tree_varlen._plain_forward(*args[:count], call, causal, scale), state, state, torch.empty(0))
    return tuple(map(EmulatedTensor, made))


def _wide_product(tensors: Sequence[torch.Tensor], dtype: torch.dtype, out: Any) -> Any:
    """Products of 16-bit matrices, accumulated and kept in float32, which torch has for CUDA only."""
    *before, left, right = tree_map(_bare, tensors[:-1] if out is not None else tensors)
    made = left.to(dtype) @ right.to(dtype)
    if before:
        made += before[0]
    if out is None:
        return EmulatedTensor(made)
    assert out.dtype == dtype == torch.float32
    out.inner.copy_(made)
    return out
