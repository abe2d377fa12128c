"""Checkpoints: folders of safetensors and JSON, written under a temporary name and renamed when complete.

``step-000100/`` holds the model as ``transformers`` loads it, ``optimizer.safetensors`` and ``trainer.json``. No
pickle anywhere.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rewardmap.policy import Policy
from rewardmap.types import DataError

_PREFIX = "step-"


def save_checkpoint(
    folder: Path,
    step: int,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write ``folder/step-NNNNNN`` atomically and remove all but the ``keep`` newest.

    Raises:
        OSError: naming the folder, e.g. when the disk is full; older checkpoints are untouched.
    """
    final = folder / f"{_PREFIX}{step:06d}"
    temporary = folder / f".{final.name}.{os.getpid()}"
    try:
        temporary.mkdir(parents=True)
        policy.save(temporary)
        _save_optimizer(optimizer, temporary / "optimizer.safetensors")
        (temporary / "trainer.json").write_text(json.dumps(state), encoding="utf-8")
        for file in temporary.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        if final.exists():
            shutil.rmtree(final)
        os.rename(temporary, final)
    except (OSError, SafetensorError) as error:
        code = getattr(error, "errno", None) or 5
        raise OSError(
            code, f"the checkpoint could not be written ({error}); free space and resume", str(final)
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if (path / "trainer.json").is_file())


def load_trainer_state(checkpoint: Path, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore the optimizer and return the loop's state. Raises DataError when a file is broken."""
    try:
        state: dict[str, Any] = json.loads((checkpoint / "trainer.json").read_text(encoding="utf-8"))
        tensors = load_file(checkpoint / "optimizer.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(
            f"{checkpoint}: broken checkpoint ({error}); delete the folder to resume from the one before"
        ) from None
    entries: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        entries.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
    return state


def _save_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    state = optimizer.state_dict()["state"]
    save_file(
        {f"{index}.{name}": tensor.contiguous() for index, entry in state.items() for name, tensor in entry.items()},
        path,
    )
