"""``rewardmap profile``: a trace with the phases, a table, a roofline of the matrix products."""

from __future__ import annotations

import gzip
import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.profiler import ProfilerActivity
from typer.testing import CliRunner

from rewardmap import cli, exits
from rewardmap.config_file import load_config
from rewardmap.train import profile as profile_module
from rewardmap.train.profile import Product, ceilings, draw_roofline, matrix_products

SETTINGS = [
    "tiny", "data.train_maps=3", "data.test_maps=3", "train.prompts_per_step=4", "rollout.group_size=2",
    "train.threads=1",
]  # fmt: skip


def test_a_profile_holds_trace_table_and_picture(tmp_path):
    out = tmp_path / "profile"
    done = CliRunner().invoke(cli.app, ["profile", *SETTINGS, "--steps", "2", "--out", str(out)])
    assert done.exit_code == 0, done.output
    with gzip.open(out / "trace-rank0.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"rollout", "reward", "train", "sync", "aten::mm"} <= names
    text = (out / "profile.md").read_text()
    assert text.startswith("Mean of 2 steps") and text in done.output
    shares = [int(line.split("|")[3].strip()[:-1]) for line in text.splitlines() if line.endswith("% |")]
    assert len(shares) >= 4 and sum(shares) == pytest.approx(100, abs=len(shares))
    assert "as `rewardmap plan` counts it, at 40% of the" in text
    assert "| logical_tokens_per_second |" in text and "mm " in text
    with Image.open(out / "roofline.png") as picture:
        assert picture.size == (1080, 648) and len(picture.getcolors(1 << 20)) > 50
    again = CliRunner().invoke(cli.app, ["profile", *SETTINGS, "--out", str(out)])
    assert again.exit_code == exits.USER_ERROR and "already holds a run" in again.output


def test_work_of_a_known_matrix_product():
    a, b, bias = torch.ones(30, 40), torch.ones(40, 50), torch.ones(50)
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], record_shapes=True, with_flops=True) as profiler:
        for _ in range(3):
            a @ b
        torch.addmm(bias, a, b)
        torch.bmm(a.expand(2, 30, 40), b.expand(2, 40, 50))
        a + a
    found = {product.name: product for product in matrix_products(profiler.key_averages(True), itemsize=4)}
    assert set(found) == {"mm 30×40 by 40×50", "addmm 30×40 by 40×50", "bmm 2×30×40 by 2×40×50"}
    plain, batched = found["mm 30×40 by 40×50"], found["bmm 2×30×40 by 2×40×50"]
    assert plain.count == 3 and plain.flop == 3 * 2 * 30 * 40 * 50
    assert plain.bytes == 3 * 4 * (30 * 40 + 40 * 50 + 30 * 50) and batched.bytes == 4 * 2 * (1200 + 2000 + 1500)
    assert plain.intensity == plain.flop / plain.bytes and plain.rate > 0


def test_the_ceiling_of_products_is_that_of_random_numbers(monkeypatch):
    """Equal numbers multiply faster on a GPU than those of a model."""
    made = []
    monkeypatch.setattr(profile_module, "_best", lambda work: made.append(work()) or 1.0)
    ceilings(torch.device("cpu"), load_config("tiny"))
    assert len(made[0].unique()) > made[0].numel() / 2


def test_a_device_without_products_still_has_its_ceilings(tmp_path):
    flops, bandwidth = ceilings(torch.device("cpu"), load_config("tiny"))
    assert flops > 1e8 and bandwidth > 1e7
    assert list(matrix_products([SimpleNamespace(key="aten::mm", input_shapes=[], self_cpu_time_total=1)], 4)) == []
    draw_roofline([], flops, bandwidth, tmp_path / "empty.png")
    draw_roofline([Product("one", 1e9, 1e8, 0.1, 1)], flops, bandwidth, tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "empty.png").read_bytes()
