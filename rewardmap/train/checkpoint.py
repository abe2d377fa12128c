"""Checkpoints: folders of safetensors and JSON, written in the background under a temporary name and renamed when
complete.

``step-000100/`` holds the model as ``transformers`` and SGLang load it, ``trainer.json``, the optimizer's shards in
``training/`` (torch.distributed.checkpoint: any number of ranks reads what any other wrote) and ``checksums.json``.
No pickle in any file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from rewardmap.policy import Policy
from rewardmap.train.background import current_device
from rewardmap.train.lora import has_adapters, merged_state
from rewardmap.train.ranks import ALONE, OtherRankError, Ranks
from rewardmap.types import DataError

Tensor = torch.Tensor
# It says so whenever a run has one process, which is no news.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
_PREFIX, _SUMS, _STATE, _TRAINING = "step-", "checksums.json", "trainer.json", "training"
_GOING = ".going-"


class Checkpoints:
    """Writes a run's checkpoints, one at a time. Every rank calls every method.

    Kept are the ``keep`` newest and, of the newest one's stage, the ``keep_best`` with the highest score: scores of
    different stages are answers to different questions.

    Example:
        with Checkpoints(run_dir / "checkpoints", keep=2) as checkpoints:
            checkpoints.save(step, policy, optimizer, state)
    """

    def __init__(self, folder: Path, keep: int, keep_best: int = 0, ranks: Ranks = ALONE) -> None:
        self._folder, self._keep, self._keep_best, self._ranks = folder, keep, keep_best, ranks
        self._thread = ThreadPoolExecutor(1, "checkpoint", current_device())
        self._writing: Future[None] | None = None
        self._writers = ranks.apart()  # their collectives must not meet the trainer's
        if ranks.is_first:
            for left in (*folder.glob(f".{_PREFIX}*"), *folder.glob(f"{_GOING}*")):
                shutil.rmtree(left)  # of a run killed while it wrote or removed

    def save(self, step: int, policy: Policy, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        """Copy everything to host memory and begin to write ``step-NNNNNN``; waits for the one before.

        Args:
            state: JSON values; ``stage`` and ``score`` decide what is kept.

        Raises:
            OSError: the one before could not be written.
        """
        self.wait()
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        whole: dict[str, Any] = get_model_state_dict(policy.model, options=options)
        if has_adapters(policy.model) and self._ranks.is_first:
            whole = merged_state(policy.model, whole)
        # Only what came from a GPU or from several ranks is a copy already: a second one may not fit beside it.
        held = (*policy.model.parameters(), *policy.model.buffers())
        live = {_storage(tensor) for tensor in held if tensor.device.type == "cpu"}
        weights = {name: tensor.clone() if _storage(tensor) in live else tensor for name, tensor in whole.items()}
        shards = {name: _to_host(tensor) for name, tensor in _training_state(policy, optimizer).items()}
        text = json.dumps(state)
        self._writing = self._thread.submit(self._write, step, policy, weights, shards, text)

    def check(self) -> None:
        """Raises OSError when a checkpoint written in the background has failed."""
        if self._ranks.any(self._writing is not None and self._writing.done() and bool(self._writing.exception())):
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            OSError: naming the folder, e.g. when the disk is full; older checkpoints are untouched.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            # After an error a peer may be gone, and with it the end of what is being written.
            if kind is None or self._ranks.size == 1:
                self.wait()
        finally:
            self._thread.shutdown(wait=False)

    def _write(
        self, step: int, policy: Policy, weights: dict[str, Tensor], shards: dict[str, Tensor], state: str
    ) -> None:
        final = self._folder / f"{_PREFIX}{step:06d}"
        temporary = self._folder / f".{final.name}"
        failure: BaseException | None = None
        try:
            self._writers.first(lambda: (temporary / _TRAINING).mkdir(parents=True))
            writer = HuggingFaceStorageWriter(str(temporary / _TRAINING), save_distributed=True)
            group = self._writers.group
            dcp.save(shards, storage_writer=writer, process_group=group, no_dist=group is None)

            def complete() -> None:
                policy.save(temporary, weights)
                (temporary / _STATE).write_text(state, encoding="utf-8")
                _seal(temporary)
                if final.exists():
                    _remove(final)
                os.rename(temporary, final)
                _sync(self._folder)
                self._remove_old(final)

            self._writers.first(complete)
        except OtherRankError:
            pass  # which says itself below that it failed
        except (OSError, SafetensorError, CheckpointException) as error:
            failure = error
        if self._ranks.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        if self._writers.any(failure is not None):
            if isinstance(failure, CheckpointException) and failure.failures:
                failure = next(iter(failure.failures.values()))[0]  # what a rank met, without its traceback
            code = getattr(failure, "errno", None) or errno.EIO
            reason = "on another rank" if failure is None else failure
            full = any(sign in str(reason) for sign in ("No space left", "quota exceeded"))
            remedy = "free space and resume" if full else "mend that and resume"
            raise OSError(code, f"the checkpoint could not be written ({reason}); {remedy}", str(final)) from failure

    def _remove_old(self, newest: Path) -> None:
        # Later ones are damaged: the run went back behind them.
        found = list_checkpoints(self._folder)
        present = found[: found.index(newest) + 1]
        keep = set(present[-self._keep :])
        if self._keep_best:
            states: dict[Path, dict[str, Any]] = {}
            for path in present:
                with suppress(OSError, ValueError):  # damaged: it is no best one
                    states[path] = read_state(path)
            stage = states[newest].get("stage")
            rivals = [p for p, one in states.items() if one.get("stage") == stage and one.get("score") is not None]
            keep |= set(sorted(rivals, key=lambda path: states[path]["score"])[-self._keep_best :])
        for old in found:
            if old not in keep:
                _remove(old)


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first. A copy under a name of one's own, as ``step-000100-good``, is none."""
    named = [path for path in folder.glob(f"{_PREFIX}*") if (path / _SUMS).is_file() and _number(path).isdecimal()]
    return sorted(named, key=lambda path: int(_number(path)))


def _number(path: Path) -> str:
    return path.name.removeprefix(_PREFIX)


def newest_intact(folder: Path, say: Callable[[str], None]) -> str | None:
    """The newest checkpoint whose files are what was written; ``say`` is told about broken ones. None: there is none.

    Raises:
        DataError: there are checkpoints, and all are broken.
    """
    present = list_checkpoints(folder)
    for path in reversed(present):
        broken = find_damage(path)
        if broken is None:
            return str(path)
        say(f"{path}: {broken}; the checkpoint before it is used")
    if present:
        raise DataError(f"{folder}: every checkpoint is broken; delete the folder to begin anew")
    return None


def find_damage(checkpoint: Path, training: bool = True) -> str | None:
    """What is wrong with a checkpoint's files, None when they match their checksums. ``training``: also with those that
    only a resumed run reads, the larger part."""
    try:
        sums: dict[str, str] = json.loads((checkpoint / _SUMS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{_SUMS} cannot be read ({error})"
    if not training:
        sums = {name: digest for name, digest in sums.items() if not name.startswith(f"{_TRAINING}/")}
    try:
        found = _digests(checkpoint, sums)
    except OSError as error:
        return f"{Path(error.filename).relative_to(checkpoint)} cannot be read ({error.strerror})"
    odd = [name for name in sums if found[name] != sums[name]]
    return f"{odd[0]} does not match its checksum" if odd else None


def load_training_state(checkpoint: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    """Restore optimizer and adapters, however many ranks wrote them.

    Raises:
        DataError: what is trained is not what the checkpoint's run trained.
    """
    reader = HuggingFaceStorageReader(str(checkpoint / _TRAINING))
    saved = reader.read_metadata().state_dict_metadata if any((checkpoint / _TRAINING).iterdir()) else {}
    wanted: dict[str, Tensor] = {}
    states: dict[Tensor, dict[str, Tensor]] = {}
    for name, parameter in _trained(policy, optimizer):
        if has_adapters(policy.model):
            wanted[f"weight.{name}"] = parameter.detach()
        if f"exp_avg.{name}" in saved:
            state = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            states[parameter] = state | {"step": torch.zeros(1, device=parameter.device)}
            wanted |= {f"{key}.{name}": tensor for key, tensor in states[parameter].items()}
    odd = sorted(saved.keys() ^ wanted.keys())
    odd = odd or [name for name, tensor in wanted.items() if saved[name].size != tensor.shape]  # type: ignore[union-attr]
    if odd:
        raise DataError(
            f"{checkpoint}: its run trained other parameters than this one, e.g. '{odd[0]}'; put policy.lora_rank, "
            "policy.lora_targets and policy.freeze in config.toml back to what they were"
        )
    if wanted:
        dcp.load(wanted, storage_reader=reader, no_dist=not dist.is_initialized())
    for parameter, state in states.items():
        optimizer.state[parameter] = state | {"step": state["step"].squeeze()}


def _training_state(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors by kind and parameter name, and the adapters, of which the whole weights hold only the
    product."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in _trained(policy, optimizer):
        if has_adapters(policy.model):
            tensors[f"weight.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = value.view(1) if value.dim() == 0 else value
    return tensors


def _trained(policy: Policy, optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    mine = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [(name, parameter) for name, parameter in policy.model.named_parameters() if id(parameter) in mine]


def _to_host(tensor: Tensor) -> Tensor:
    return tensor.detach().clone() if tensor.device.type == "cpu" else tensor.detach().cpu()


def _storage(tensor: Tensor) -> int:
    """Where the memory begins that a tensor, or this rank's part of it, is a view of."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.untyped_storage().data_ptr()


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What ``save`` was given."""
    state: dict[str, Any] = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    return state


def _seal(folder: Path) -> None:
    """Everything on the disk, then the checksums, which make it complete."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        _sync(path)
    sums = _digests(folder, [str(path.relative_to(folder)) for path in files])
    (folder / _SUMS).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")
    for path in (folder / _SUMS, folder / _TRAINING, folder):
        _sync(path)


def _remove(checkpoint: Path) -> None:
    """All of it or, when killed meanwhile, nothing that looks like a checkpoint."""
    going = checkpoint.with_name(f"{_GOING}{checkpoint.name}")
    os.rename(checkpoint, going)
    shutil.rmtree(going)


def _digests(folder: Path, names: Collection[str]) -> dict[str, str]:
    """Checksums by name. Files are read side by side: a large model's take one reader minutes."""

    def digest(name: str) -> str:
        try:
            with (folder / name).open("rb") as file:
                return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        except OSError as error:  # of a read, which does not say of what
            raise OSError(error.errno, error.strerror, str(folder / name)) from None

    with ThreadPoolExecutor(8) as readers:
        return dict(zip(names, readers.map(digest, names), strict=True))


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
