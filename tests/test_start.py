"""What a run begins with: its data, its policy and its device, or one error that names what is wrong."""

import io
import json
import re
import shutil
import sys

import pytest
import torch
from datasets import load_from_disk
from rich.console import Console

from rewardmap.config import Config, ConfigError, PolicyConfig
from rewardmap.config_file import load_config
from rewardmap.policy import pick_device
from rewardmap.tiny import WARM_START
from rewardmap.train import examine, run, start
from rewardmap.train.examine import data_folder
from rewardmap.train.ranks import ALONE
from rewardmap.transit.reasonmap import DATA_FOLDER, write_dataset, write_rows
from rewardmap.types import DataError


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"data\.path='nowhere': no such folder \(/.*/nowhere\)"):
        data_folder(load_config("tiny", ["data.path=nowhere"]), None)
    with pytest.raises(DataError, match="no such folder"):
        run.train(load_config("tiny", ["data.path=nowhere"]), tmp_path / "run", console=Console(quiet=True))
    assert not (tmp_path / "run").exists()


def test_of_two_jobs_that_begin_one_folder_one_has_it(tmp_path, monkeypatch):
    """The second begins between the first's look and its writing, and again once that has written."""
    out, config, write = tmp_path / "run", load_config("tiny"), start.write_text

    def meanwhile(path, text):
        with pytest.raises(ConfigError, match="another job begins a run there; choose another --run-dir"):
            start.begin_folder(load_config("tiny", ["train.seed=1"]), out)
        write(path, text)

    monkeypatch.setattr(start, "write_text", meanwhile)
    start.begin_folder(config, out)
    assert load_config(out / "config.toml") == config
    with pytest.raises(ConfigError, match="already holds a run"):
        start.begin_folder(config, out)
    assert [path.name for path in out.iterdir()] == ["config.toml"]


def test_questions_about_stations_off_their_maps_are_refused_or_skipped(tmp_path):
    folder, console = tmp_path / "maps", Console(quiet=True)
    write_dataset(folder, maps={"train": 2, "test": 2}, seed=1)
    rows = [dict(row) for row in load_from_disk(str(folder / DATA_FOLDER))["train"]]
    train = [{**row, "station_2": row["station_2"].upper()} if row["type"] == "planning" else row for row in rows]
    at = next(index for index, row in enumerate(rows) if row["type"] == "planning")
    shutil.rmtree(folder / DATA_FOLDER / "train")
    for mode in ("reference", "graph"):
        settings = [f"data.path={folder}", f"reward.mode={mode}", "data.on_bad_row=skip"]
        for name, known in ((rows[at]["station_1"].lower(), True), (rows[at]["station_1"] + "xq", False)):
            train[at] = {**rows[at], "station_1": name}
            write_rows(folder, train, "train")
            training, _ = start._load_data(load_config("tiny", settings), tmp_path / "run", ALONE, console)
            assert len(training.problems) == len(rows) - (not known)
            assert all("'station_1'" in line and rows[at]["uid"] in line for line in training.skipped)
            if not known:
                row = rows[at]
                found = rf"{re.escape(str(folder))}, .*{row['uid']}.*xq' is no station of .*'{row['station_1']}'"
                with pytest.raises(DataError, match=found):
                    run.train(load_config("tiny", settings[:2]), tmp_path / "run", console=console)
            shutil.rmtree(folder / DATA_FOLDER / "train")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mode", ["reference", "graph"])
def test_a_question_whose_start_is_its_goal_is_refused_or_skipped(mode, data, tmp_path):
    folder, console = tmp_path / "own", Console(quiet=True)
    shutil.copytree(data, folder)
    rows = [dict(row) for row in load_from_disk(str(folder / DATA_FOLDER))["test"]]
    at = next(index for index, row in enumerate(rows) if row["type"] == "planning")
    rows[at]["station_2"] = rows[at]["station_1"].lower() + " (Transfer Station)"
    shutil.rmtree(folder / DATA_FOLDER)
    write_rows(folder, rows, None)
    settings = [f"data.path={folder}", f"reward.mode={mode}"]
    named = re.escape(f"field 'station_2': {rows[at]['station_2']!r} is the station of 'station_1'")
    with pytest.raises(DataError, match=rf"row '{rows[at]['uid']}', {named}"):
        start._load_data(load_config("tiny", settings), tmp_path / "run", ALONE, console)
    skipping = load_config("tiny", [*settings, "data.on_bad_row=skip"])
    training, _ = start._load_data(skipping, tmp_path / "run", ALONE, console)
    assert len(training.problems) == len(rows) - 1


@pytest.mark.parametrize("mode", ["reference", "graph"])
def test_wrong_gold_routes_and_maps_in_both_splits_are_said_and_nothing_of_good_data(mode, data, tmp_path):
    def told(folder):
        console = Console(record=True, file=io.StringIO())
        start._load_data(load_config("tiny", [f"data.path={folder}", f"reward.mode={mode}"]), tmp_path, ALONE, console)
        return console.export_text().splitlines()

    assert told(data) == []
    folder = tmp_path / "own"
    shutil.copytree(data, folder)
    rows = [dict(row) for row in load_from_disk(str(folder / DATA_FOLDER))["test"]]
    wrong = [row for row in rows if row["type"] == "planning"][:2]
    for row, name in zip(wrong, ("route_name", "arrival_stop"), strict=True):
        plans = json.loads(row["fine_grained_answer"])
        plans[0][0][name] = "Nowhere"
        row["fine_grained_answer"] = json.dumps(plans)
    shutil.rmtree(folder / DATA_FOLDER)
    write_rows(folder, rows, None)  # without splits: taken whole for both
    both, *routes = told(folder)
    assert f"{folder}: 4 maps are in both splits, so not held out; the first: tiny_test/" in both
    for line in routes:
        assert f"{folder}, row '{wrong[0]['uid']}' and 1 more, field 'fine_grained_answer': the reward in mode" in line
    assert len(routes) == 2


def test_relative_paths_are_those_of_the_folder_where_the_run_began(tmp_path, monkeypatch):
    (tmp_path / "weights").mkdir()
    begun = []
    monkeypatch.setattr(run, "_run", lambda config, *_, **__: begun.append(config))
    monkeypatch.chdir(tmp_path)
    server = ["rollout.server.python=env/bin/python", "rollout.server.keys_file=keys.json"]
    stage = "train.stages=[{name='a', kind='sft', checkpoint='shipped'}, {name='b'}]"
    config = load_config(None, ["data.path=maps", "policy.model=weights", *server, stage])
    run.train(config, tmp_path / "a", console=None)
    run.train(load_config("tiny", ["rollout.server.python=python3"]), tmp_path / "b", console=None)
    monkeypatch.chdir("/")
    run.resume(tmp_path / "a", console=None)
    first, plain, resumed = begun
    assert first == resumed and first.data.path == str(tmp_path / "maps")
    assert first.policy.model == str(tmp_path / "weights") and first.train.stages[0].checkpoint == "shipped"
    assert first.rollout.server.python == str(tmp_path / "env/bin/python")
    assert first.rollout.server.keys_file == str(tmp_path / "keys.json")
    assert (plain.data.path, plain.policy.model, plain.rollout.server.python) == (None, "tiny", "python3")


def test_a_model_that_another_checkpoint_would_replace_is_refused(tmp_path):
    config = load_config("tiny", ["data.train_maps=6", "data.test_maps=4", "policy.model=Qwen/Qwen2.5-VL-7B-Instruct"])
    with pytest.raises(ConfigError, match=r"checkpoint='.*' *, so that policy\.model='Qwen/.*' would not be trained"):
        run.train(config, tmp_path / "run", console=Console(quiet=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("server", "line"),
    [
        ("rollout.server.python={bare}", r"^/.*/bare has no SGLang: install it .* rollout\.server\.python="),
        ("rollout.server.python=nowhere", r"^rollout\.server\.python='nowhere': no such program"),
        ("rollout.server.lora_sync=adapter", r"policy\.lora_rank=0 trains none; give a rank"),
    ],
)
def test_what_servers_lack_is_said_before_maps_are_drawn_and_weights_loaded(server, line, data, tmp_path, monkeypatch):
    pytest.importorskip("aiohttp")
    for module, name in ((start, "_load_data"), (examine, "load_dataset")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("asked too late"))
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "$@"\n')  # no site-packages
    bare.chmod(0o755)
    settings = ["rollout.engine=sglang", server.format(bare=bare)]
    console = Console(quiet=True)
    with pytest.raises(ConfigError, match=line):
        run.train(load_config("tiny", settings), tmp_path / "run", console=console)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=line):
        examine.evaluate_target(examine.EvalRequest(str(WARM_START), data=data, settings=settings), console)


def test_maps_that_a_killed_process_drew_in_part_are_removed_by_the_next(tmp_path):
    (tmp_path / ".data.partial-1" / "maps").mkdir(parents=True)
    (tmp_path / ".data.partial-22").mkdir()
    config = load_config("tiny", ["data.train_maps=2", "data.test_maps=2"])
    start._load_data(config, tmp_path, ALONE, Console(quiet=True))
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_device_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"policy\.device='gpu': .*choose auto, cpu or cuda"):
        pick_device(PolicyConfig(device="gpu"))


def test_a_new_tiny_model_is_where_and_in_what_was_asked_for(monkeypatch):
    monkeypatch.setattr(start, "pick_device", lambda settings: torch.device("meta"))  # stands for a GPU
    policy = start.initial_policy(Config(policy=PolicyConfig(model="tiny", dtype="bfloat16")))
    assert policy.device.type == "meta" and policy.model.dtype == torch.bfloat16
