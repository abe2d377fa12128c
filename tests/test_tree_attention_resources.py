"""Registers, spills, shared memory and waits of the tree-attention kernels on four kinds of GPU, without one."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton

sys.path.append(str(Path(__file__).parent))
import tree_resources

MEASURED = json.loads(tree_resources.TABLE.read_text())
BUILDS = {build.name: build for build in tree_resources.builds()}
SHARED_LIMIT = {80: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Bytes a block may use; what runs on sm_80 also runs on sm_86 and sm_89, which have less."""


def test_the_table_names_every_kernel() -> None:
    assert set(MEASURED["kernels"]) == set(BUILDS)


def test_nothing_in_the_table_spills_or_waits() -> None:
    for name, targets in MEASURED["kernels"].items():
        for target, row in targets.items():
            assert row["spilled"] == 0 and row["serialized"] == 0, (name, target)
            assert row["shared"] <= SHARED_LIMIT[int(target.removeprefix("sm_"))], (name, target)


# A compilation takes seconds: every kernel on Hopper, the other targets where the table is made.
@pytest.mark.parametrize("name", [name for name in BUILDS if name.endswith("bf16.d128")])
def test_resources_stay_within_the_table(name: str) -> None:
    got = tree_resources.resources(BUILDS[name], 90)
    wanted = MEASURED["kernels"][name]["sm_90"]
    assert_within(got, wanted, 90)


def assert_within(got: dict[str, int], wanted: dict[str, int], capability: int) -> None:
    assert got["spilled"] == 0 and got["serialized"] == 0
    if triton.__version__ == MEASURED["triton"]:
        assert got["registers"] <= wanted["registers"] and got["shared"] <= wanted["shared"]
    else:  # another compiler allocates differently: what it needs must be there
        assert got["registers"] <= 255 and got["shared"] <= SHARED_LIMIT[capability]


@pytest.mark.slow
@pytest.mark.parametrize("capability", tree_resources.CAPABILITIES)
@pytest.mark.parametrize("name", BUILDS)
def test_every_build_stays_within_the_table(name: str, capability: int) -> None:
    got = tree_resources.resources(BUILDS[name], capability)
    wanted = MEASURED["kernels"][name][f"sm_{capability}"]
    assert_within(got, wanted, capability)
