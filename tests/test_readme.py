"""What the README and the docs show works as written."""

from __future__ import annotations

import copy
import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from small_run import SMALL
from typer.testing import CliRunner

from rewardmap.cli import app
from rewardmap.config import Config
from rewardmap.config_file import load_config
from rewardmap.report import read_metrics
from rewardmap.rewards import Rubric
from rewardmap.train import run
from rewardmap.transit import gold_response, load_dataset, reasonmap, write_dataset

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=["step", "kernels"])
def test_python_blocks_run(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_dataset("maps", maps={"train": 2})
    names: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), names)
    parameter = names["policy"].model.lm_head.weight if "policy" in names else names["weight"]  # type: ignore[attr-defined]
    assert parameter.grad is not None and parameter.grad.abs().sum() > 0  # type: ignore[attr-defined]


def test_a_trainer_of_one_s_own_has_the_gradient_of_plain_torch() -> None:
    """Of the whole batch in float64: what the docs' micro-batches add up to."""
    text = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8").split("## In your own trainer")[1]
    block, _ = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0].split("optimizer.step()")
    names: dict[str, Any] = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(compile(block, "kernels.md", "exec"), names)
    rewards, mask, groups = names["rewards"].double(), names["loss_mask"][:, 1:], ([0, 1, 3], [2, 4, 5])
    advantages = torch.zeros(6, dtype=torch.float64)
    for group in groups:
        advantages[group] = (rewards[group] - rewards[group].mean()) / (rewards[group].std() + 1e-6)
    plain = copy.deepcopy(names["policy"].lm).double()
    plain.zero_grad()
    logits = plain(names["ids"]).logits[:, :-1] / 0.9
    logprobs = logits.log_softmax(-1).gather(-1, names["ids"][:, 1:, None])[..., 0]
    torch.testing.assert_close(names["old_logprobs"].double(), logprobs, rtol=1e-5, atol=1e-5)
    (-(logprobs - logprobs.detach()).exp() * advantages[:, None])[mask].sum().div(mask.sum()).backward()
    for mine, theirs in zip(names["policy"].parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-7)


def test_the_data_that_the_docs_write_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for city in ("oslo", "bergen"):
        (tmp_path / "own/maps/norway").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (56, 56)).save(f"own/maps/norway/{city}.png")
    exec(compile(block, "data.md", "exec"), {})
    for split in ("train", "test"):
        data = load_dataset("own", split)
        gold = [gold_response(problem) for problem in data.problems]
        assert Rubric().score(data.problems, gold, data.networks).correct.all()
    source = inspect.getsource(reasonmap).replace("'", '"')
    read = set(re.findall(r"row\.\w+\(\"(\w+)\"|\"(\w+)\" in row", source))
    columns = {name for pair in read for name in pair if name} - {"question_short"}
    named = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", text, re.MULTILINE))))
    assert columns | {"question", "fine_grained_answer"} == named


def test_commands_exist() -> None:
    named = set(re.findall(r"^rewardmap (\w+)", TEXT, re.MULTILINE))
    assert named >= {"train", "eval", "generate"}
    for command in named:
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0, command


def headings(page: Path) -> set[str]:
    """Of a page, as links name them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text(encoding="utf-8")):
        file, _, heading = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not heading or heading in headings(target), link


def test_paths_exist() -> None:
    for path in re.findall(r"configs/\w+\.toml", TEXT):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_settings_named_are_settings(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    sections = "|".join(field.name for field in fields(Config))
    for name in re.findall(rf"`((?:{sections})\.[a-z_.]+)", text):
        value: object = Config()
        for part in name.split("."):
            assert hasattr(value, part) or name == "train.steps", name  # of an order of stages, in a file alone
            value = getattr(value, part, None)


def test_settings_shown_are_settings() -> None:
    for line in re.findall(r"^rewardmap train (.*?)(?:#|$)", TEXT, re.MULTILINE):
        load_config("tiny", [word for word in line.split() if "=" in word])


def test_every_fault_of_the_docs_has_its_test() -> None:
    table = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8").split("## What can go wrong")[1]
    rows = [line for line in table.splitlines() if line.startswith("| ") and not line.startswith("| ---")][1:]
    assert len(rows) >= 11
    for row in rows:
        file, named = "", re.findall(r"`(test_\w+\.py)?::(test_\w+)`", row)
        assert named, row
        for module, test in named:
            file = module or file
            assert f"def {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file}::{test}"


def test_the_docs_name_every_metric_of_a_step_and_no_other(data: Path, tmp_path: Path) -> None:
    """``speed`` and ``seconds`` hold metrics of their own; what stands under kinds and pools has names of the data."""
    stages = (
        "{name='warm', kind='sft', steps=0, checkpoint='shipped'}, "
        "{name='all', steps=2, pools='adaptive', advance_at=1.0}"
    )
    settings = ["train.kl_coef=0.1", "rollout.staleness=1", "rollout.importance_correction=truncate"]
    small = [*SMALL, f"data.path={data}", "eval.max_problems=2", "eval.samples=0", "eval.text_only=false"]
    config = load_config("tiny", [*small, *settings, f"train.stages=[{stages}]"])
    rows = read_metrics(run.train(config, tmp_path / "run", console=Console(quiet=True)))
    written = {key for row in rows for key in (*row, *row["seconds"], *row["speed"])} - {"seconds", "speed"}
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", text, re.MULTILINE))))
    elsewhere = {"refused", "bad_groups", "mfu", "hfu", "clip_fraction"}  # of other runs
    servers = {"sync_seconds", "sync_drift_mean", "sync_drift_max", "server_restarts"}
    assert written | elsewhere | servers == named


def test_the_place_of_the_table_is_marked() -> None:
    assert TEXT.index("<!-- tiny-table:start -->") < TEXT.index("<!-- tiny-table:end -->")
