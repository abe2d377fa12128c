"""Generated data in the forms of ReasonMap and ReasonMap-Plus: the released fields, and the same problems again."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from rewardmap.cli import app
from rewardmap.transit import gold_response, load_dataset, write_dataset
from rewardmap.transit.forms import FORMS

MAPS = {"train": 3, "test": 2}
RELEASED = {
    "ReasonMap": {
        "country", "city", "station_1", "station_2", "figure", "json", "question_short", "question_long", "routes",
        "difficulty_question", "difficulty_city", "city_line_count", "city_transfer_count", "question_transfer_count",
    },
    "ReasonMap-Plus": {
        "country", "city", "station_1", "station_2", "figure", "json", "question", "answer", "type",
        "difficulty_city", "city_line_count", "city_transfer_count",
    },
}  # fmt: skip
"""The released data sets' fields."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("forms")
    for form in FORMS:
        write_dataset(root / form, maps=MAPS, preset="tiny", seed=4, form=form)
    return {form: root / form for form in FORMS}


@pytest.mark.parametrize("form", list(RELEASED))
def test_rows_have_the_released_fields(folders: dict[str, Path], form: str) -> None:
    for split in MAPS:
        table = pq.read_table(folders[form] / "data" / f"{split}-00000-of-00001.parquet")
        assert set(table.column_names) >= RELEASED[form]
        assert set(table.column_names) - RELEASED[form] <= {"uid", "fine_grained_answer"}
        if form == "ReasonMap":
            row = table.to_pylist()[0]
            picture = folders[form] / "maps" / row["country"] / f"{row['city']}.png"
            assert base64.b64decode(row["figure"]) == picture.read_bytes()
            assert isinstance(row["json"], dict) and isinstance(row["routes"], dict)
            assert (
                pq.ParquetFile(folders[form] / "data" / f"{split}-00000-of-00001.parquet").num_row_groups == MAPS[split]
            )


@pytest.mark.parametrize("split", list(MAPS))
def test_the_forms_hold_the_same_problems(folders: dict[str, Path], split: str) -> None:
    every = {problem.uid: problem for problem in load_dataset(folders["ReasonMap-Train"], split).problems}
    seen: set[str] = set()
    for form in RELEASED:
        data = load_dataset(folders[form], split)
        for problem in data.problems:
            whole = every[problem.uid]
            for name in (
                "question", "kind", "answer", "station_1", "station_2", "network_id", "map_difficulty",
                "transfers_required", "fine_grained_answer",
            ):  # fmt: skip
                assert getattr(problem, name) == getattr(whole, name), f"{form}: {problem.uid}: {name}"
            assert (problem.kind == "planning") == (form == "ReasonMap")
            seen.add(problem.uid)
        for network_id, lists in data.networks.items():
            assert lists == json.loads((folders[form] / "stations" / f"{network_id}.json").read_text("utf-8"))
            assert data.topology(network_id).metro_data() == lists
    assert seen == set(every)


def test_long_questions_ask_for_counts_or_lists_and_have_gold_answers(folders: dict[str, Path]) -> None:
    problems = load_dataset(folders["ReasonMap"], planning_question="long").problems
    asked = ["Number of Via Stops: x" in problem.question for problem in problems]
    assert 0 < sum(asked) < len(asked)
    for problem, counts in zip(problems, asked, strict=True):
        label = "Number of Via Stops: " if counts else "Via Stops: "
        legs = problem.fine_grained_answer[0]
        told = [leg["num_via_stops"] if counts else ", ".join(leg["via_stops"]) or "None" for leg in legs]
        assert [f"{label}{value}" in gold_response(problem) for value in told] == [True] * len(legs)


@pytest.mark.parametrize("form", FORMS)
def test_same_seed_same_bytes(folders: dict[str, Path], form: str, tmp_path: Path) -> None:
    write_dataset(tmp_path / "again", maps=MAPS, preset="tiny", seed=4, form=form)
    files = sorted(path.relative_to(folders[form]) for path in folders[form].rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path / "again") for path in tmp_path.rglob("*") if path.is_file())
    for file in files:
        assert (folders[form] / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


@pytest.mark.parametrize("form", FORMS)
def test_the_card_makes_the_data_set_again(folders: dict[str, Path], form: str, tmp_path: Path) -> None:
    card = (folders[form] / "README.md").read_text("utf-8")
    assert f"in the schema of {form}. " in card
    code = card.split("```python\n")[1].split("```")[0]
    exec(code.replace('"FOLDER"', repr(str(tmp_path / "made"))), {})
    assert (tmp_path / "made" / "README.md").read_text("utf-8") == card


def test_the_command_chooses_the_form(tmp_path: Path) -> None:
    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, [*arguments])

    made = run("generate", str(tmp_path / "x"), "--maps", "4", "--level", "tiny", "--form", "ReasonMap")
    assert made.exit_code == 0, made.output
    problem = load_dataset(tmp_path / "x", "test").problems[0]
    assert problem.kind == "planning"
    picture = str(tmp_path / "x" / "maps" / f"{problem.network_id}.png")
    shown = run("show", picture, "--question", problem.uid, "--out", str(tmp_path / "shown.png"))
    assert shown.exit_code == 0, shown.output
    wrong = run("generate", str(tmp_path / "y"), "--level", "tiny", "--form", "Reasonmap")
    assert wrong.exit_code == 2 and "unknown form 'Reasonmap'; known forms: ReasonMap-Train" in wrong.stderr
    assert not (tmp_path / "y").exists()
