"""The picture of a curriculum: what was asked when, read back from the pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageColor

from rewardmap.report import draw_curriculum
from rewardmap.report.timeline import COLOURS, MOST_BINS, bins


def row(step: int, stage: str, asked: dict[str, int], **more: Any) -> dict[str, Any]:
    base = {"step": step, "stage": stage, "asked": asked, "reward_mode": "reference", "group_size": 8}
    return base | {"learning_rate": 1e-4} | more


def share(path: Path, kind: str) -> float:
    """Pixels of a kind's colour among those of all kinds."""
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    counts = {
        name: int((np.abs(picture - ImageColor.getrgb(colour)).max(-1) <= 3).sum()) for name, colour in COLOURS.items()
    }
    return counts[kind] / max(1, sum(counts.values()))


def test_replay_and_stages_show_in_the_picture(tmp_path: Path) -> None:
    plain = [row(n, "a" if n <= 50 else "b", {"TorF1" if n <= 50 else "planning": 8}) for n in range(1, 101)]
    replay = [
        row(n, "a" if n <= 50 else "b", {"TorF1": 8} if n <= 50 else {"planning": 4, "TorF1": 4}) for n in range(1, 101)
    ]
    for name, rows in (("plain", plain), ("replay", replay)):
        draw_curriculum(rows, tmp_path / f"{name}.png")
    assert share(tmp_path / "plain.png", "planning") == pytest.approx(0.5, abs=0.03)
    assert share(tmp_path / "replay.png", "planning") == pytest.approx(0.25, abs=0.03)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain.png", "replay.png"]


def test_gates_pools_and_settings_each_change_the_picture(tmp_path: Path) -> None:
    base = [row(n, "a", {"TorF1": 8}) for n in range(1, 41)]
    gated = [line | {"gate": line["step"] / 50, "advance_at": 0.75} for line in base]
    pooled = [line | {"pools": {f"TorF1/{i}": 1 / 11 for i in range(11)}} for line in base]
    other = [line | {"reward_mode": "graph"} for line in base]
    pictures = {}
    for name, rows in (("base", base), ("gated", gated), ("pooled", pooled), ("other", other)):
        draw_curriculum(rows, tmp_path / f"{name}.png")
        pictures[name] = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB"))
    heights = {name: picture.shape[0] for name, picture in pictures.items()}
    assert heights["base"] == heights["other"] < heights["gated"] < heights["pooled"]
    assert (pictures["base"] != pictures["other"]).any()


@pytest.mark.parametrize(
    "rows",
    [
        [row(1, "a", {"TorF1": 1})],
        [{"step": 1, "stage": "sft", "asked": {"TorF1": 3}, "learning_rate": 1e-3}],
        [row(n, f"a very long name of stage {n}", {"Counting3": 1}, gate=None, advance_at=0.5) for n in range(1, 9)],
        [row(1, "$x_1$ & 阶段", {"TorF1": 1})],
    ],
)
@pytest.mark.filterwarnings("ignore:Glyph")
def test_hardly_anything_can_be_drawn(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    draw_curriculum(rows, tmp_path / "c.png")
    assert (tmp_path / "c.png").is_file()


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    draw_curriculum([], tmp_path / "c.png")
    assert not list(tmp_path.iterdir())


def test_bars_keep_to_their_stage() -> None:
    rows = [row(n, "a" if n <= 301 else "b", {}) for n in range(1, 1001)]
    groups = bins(rows)
    assert [line for group in groups for line in group] == rows
    assert len(groups) <= MOST_BINS + 2
    assert all(len({line["stage"] for line in group}) == 1 for group in groups)
