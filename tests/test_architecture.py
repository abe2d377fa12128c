"""The house rules: floors, no import circles, torch-free rooms, and the traps of the name ``kernels``."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {"rewardmap": ROOT / "rewardmap", "rewardmap_kernels": ROOT / "kernels" / "rewardmap_kernels"}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

FLOORS = {
    "rewardmap_kernels": 0,
    "rewardmap": 1,
    "rewardmap.types": 1,
    "rewardmap.config": 1,
    "rewardmap.config_file": 1,
    "rewardmap.config_numbers": 1,
    "rewardmap.files": 1,
    "rewardmap.transit": 2,
    "rewardmap.families": 2,
    "rewardmap.policy": 2,
    "rewardmap.vision": 2,
    "rewardmap.rewards": 3,
    "rewardmap.blind": 3,
    "rewardmap.curriculum": 3,
    "rewardmap.rollout": 3,
    "rewardmap.profiling": 3,
    "rewardmap.tiny": 3,
    "rewardmap.evaluate": 4,
    "rewardmap.report": 4,
    "rewardmap.show": 4,
    "rewardmap.exits": 4,
    "rewardmap.train": 5,
    "rewardmap.cli": 6,
}
"""Every room and its floor; a new room must be entered here."""
NEIGHBOURS = {
    ("rewardmap.config", "rewardmap.types"),
    ("rewardmap.config", "rewardmap.config_numbers"),
    ("rewardmap.config_file", "rewardmap.config"),
    ("rewardmap.policy", "rewardmap.families"),
    ("rewardmap.policy", "rewardmap.vision"),
    ("rewardmap.blind", "rewardmap.rewards"),
    ("rewardmap.report", "rewardmap.evaluate"),
}
"""Rooms of one floor do not know each other, but for these."""


def module_names() -> dict[str, Path]:
    found = {}
    for package, folder in SOURCES.items():
        for file in sorted(folder.rglob("*.py")):
            parts = [package, *file.relative_to(folder).with_suffix("").parts]
            found[".".join(part for part in parts if part != "__init__")] = file
    return found


MODULES = module_names()


def room(module: str) -> str:
    parts = module.split(".")
    return parts[0] if parts[0] == "rewardmap_kernels" else ".".join(parts[:2])


def imports(module: str) -> Iterator[tuple[str, int]]:
    """(imported module, line) of every import statement, also those inside functions."""
    file = MODULES[module]
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield (inner if inner in MODULES else base), node.lineno


OURS = {name: [(to, line) for to, line in imports(name) if to in MODULES] for name in MODULES}


def test_every_room_has_a_floor() -> None:
    assert {room(module) for module in MODULES} == set(FLOORS)


def test_imports_point_down() -> None:
    wrong = []
    for module, targets in OURS.items():
        for target, line in targets:
            here, there = room(module), room(target)
            allowed = here == there or (here, there) in NEIGHBOURS or FLOORS[there] < FLOORS[here]
            if not allowed:
                wrong.append(f"{MODULES[module].relative_to(ROOT)}:{line}: {here} must not import {there}")
    assert not wrong, "\n".join(wrong)


def test_kernels_import_torch_and_triton_only() -> None:
    allowed = {"torch", "triton", "rewardmap_kernels"} | sys.stdlib_module_names
    wrong = [
        f"{module}:{line} imports {target}"
        for module in MODULES
        if room(module) == "rewardmap_kernels" and ".integrations" not in module
        for target, line in imports(module)
        if target.split(".")[0] not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_no_import_circles() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for target in sorted({target for target, _ in OURS[module] if target != module}):
                visit(target, (*path, module))
            done.add(module)

    for module in OURS:
        visit(module, ())


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter without the working folder on its path."""
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize("name", ["types", "config", "transit", "rewards", "blind", "evaluate", "cli"])
def test_torch_stays_out(name: str) -> None:
    code = f"import rewardmap.{name}, sys; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr


def test_kernels_work_with_torch_alone() -> None:
    code = """
import sys
for name in ("triton", "rewardmap", "transformers", "numba", "datasets"):
    sys.modules[name] = None
import torch, rewardmap_kernels as kernels
for name in kernels.__all__:
    assert getattr(kernels, name) is not None
rewards = torch.tensor([1.0, 0.0, 2.0, 2.0])
advantages = kernels.group_advantage(rewards, torch.tensor([0, 2, 4])).advantages
assert advantages[0] > 0 > advantages[1] and not advantages[2:].any(), advantages
"""
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr


def test_transformers_is_not_misled_by_our_folder_kernels() -> None:
    code = "import transformers.utils.import_utils as u; u.is_kernels_available()"
    result = run_python("-P", "-c", code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("folder", ["kernels", "tests", "bench"])
def test_these_folders_are_no_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


def test_no_root_conftest() -> None:
    """It would put the checkout on sys.path, where ``kernels`` shadows nothing but confuses transformers."""
    assert not (ROOT / "conftest.py").exists()
    assert "--import-mode=importlib" in PYPROJECT["tool"]["pytest"]["ini_options"]["addopts"]


def test_listed_packages_are_the_folders() -> None:
    packages = {module for module, file in MODULES.items() if file.name == "__init__.py"}
    sources = {"rewardmap_kernels.csrc"}  # data for the compiler, not importable
    assert packages | sources == set(PYPROJECT["tool"]["setuptools"]["packages"])
