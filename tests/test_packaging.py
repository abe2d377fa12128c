"""The source distribution and the wheel made of it: both import names, the shipped files, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the files that may enter it, so that the checkout stays clean."""
    pytest.importorskip("setuptools", minversion="77")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("sdist")
    for name in ("pyproject.toml", "README.md", "MANIFEST.in"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for folder in ("rewardmap", "kernels", "csrc", "tests"):
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                copy = source / file.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(file.read_bytes())
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    command = [sys.executable, "-c", build, str(out)]
    built = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return next(out.glob("rewardmap-*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(out), str(sdist)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return zipfile.ZipFile(next(out.glob("rewardmap-*.whl")))


def test_the_source_distribution_holds_what_the_wheel_is_made_of_and_no_part_of_the_tests(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        tops = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    metadata = {"PKG-INFO", "rewardmap.egg-info", "setup.cfg"}
    assert tops - metadata == {"pyproject.toml", "README.md", "MANIFEST.in", "rewardmap", "kernels", "csrc"}


def test_top_level_names(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"rewardmap", "rewardmap_kernels"}


def test_every_source_and_shipped_file_is_inside(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    for top, folder in (
        ("rewardmap", ROOT / "rewardmap"),
        ("rewardmap_kernels", ROOT / "kernels/rewardmap_kernels"),
        ("rewardmap_kernels/csrc", ROOT / "csrc"),
    ):
        for file in folder.rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                assert f"{top}/{file.relative_to(folder).as_posix()}" in names, file


def test_console_script(wheel: zipfile.ZipFile) -> None:
    entry = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "rewardmap = rewardmap.cli:main" in wheel.read(entry).decode()


def test_torch_is_needed_and_torchvision_is_not(wheel: zipfile.ZipFile) -> None:
    metadata = wheel.read(next(name for name in wheel.namelist() if name.endswith("METADATA"))).decode()
    needs = [
        line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line
    ]
    assert any(line.startswith("Requires-Dist: torch>=") for line in needs)
    assert not any("torchvision" in line or "sglang" in line for line in needs)
