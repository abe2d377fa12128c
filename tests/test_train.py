"""A run from end to end on a handful of maps: what it leaves behind, resuming, stopping, and what can go wrong."""

import errno
import fcntl
import io
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from small_run import SMALL, changed, stages
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForImageTextToText

from rewardmap.config import Config, ConfigError
from rewardmap.config_file import load_config
from rewardmap.evaluate import ask
from rewardmap.exits import errors
from rewardmap.report import read_metrics
from rewardmap.train import checkpoint, examine, run
from rewardmap.train.examine import EvalRequest, evaluate_target
from rewardmap.train.faults import Stopped
from rewardmap.train.ranks import ALONE
from rewardmap.train.trainer import Trainer
from rewardmap.transit.questions import question_text
from rewardmap.transit.reasonmap import write_rows
from rewardmap.types import DataError

REAL = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture
def config(data) -> Config:
    return load_config("tiny", [*SMALL, f"data.path={data}"])


@pytest.fixture
def console() -> Console:
    return Console(quiet=True)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(run_dir: Path) -> list[dict]:
    return [
        {key: value for key, value in row.items() if key not in ("seconds", "speed")} for row in read_metrics(run_dir)
    ]


def test_a_run_leaves_everything_behind(tmp_path, console):
    out = run.train(load_config("tiny", SMALL), tmp_path / "run", console=console)
    rows = read_metrics(out)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["stage"] for row in rows] == ["yes or no"] * 2 + ["routes"] * 3
    assert set(rows[0]["accuracy_by_kind"]) <= {"TorF1", "TorF2"}
    assert all(row["logical_tokens"] >= row["packed_tokens"] and row["rollout_drift"] < 1e-4 for row in rows)
    report = json.loads((out / "report.json").read_text())
    assert set(report["weighted_accuracy"]) >= {"before", "after", "text_only"}
    assert all(0 <= value <= 1 for value in report["weighted_accuracy"].values())
    assert set(report["kinds"]) == {"TorF1", "TorF2", "Counting1", "Counting2", "Counting3", "planning"}
    assert report["kinds"]["planning"].keys() == {"before", "after", "n"}
    assert report["format_valid"].keys() == {"before", "after"}
    assert report["seconds"] > 0 and report["tokens_per_second"] > 0
    for name in (
        "curves.png",
        "samples/samples-1.png",
        "report.md",
        "config.toml",
        "evaluation/before.jsonl",
    ):
        assert (out / name).stat().st_size > 0
    assert list((out / "tensorboard").glob("events*"))
    assert load_config(out / "config.toml") == load_config("tiny", SMALL)
    last = checkpoint.list_checkpoints(out / "checkpoints")
    assert [path.name for path in last] == ["step-000004", "step-000005"]
    model = AutoModelForImageTextToText.from_pretrained(last[-1])
    assert model.config.model_type == "qwen2_5_vl"
    again = evaluate_target(EvalRequest(str(out)), console)
    repeated = json.loads((again / "report.json").read_text())
    assert repeated["weighted_accuracy"]["after"] == report["weighted_accuracy"]["after"]
    assert repeated["weighted_accuracy"]["before"] == report["weighted_accuracy"]["before"]
    elsewhere = evaluate_target(EvalRequest(str(out), data=out / "data"), console)
    assert json.loads((elsewhere / "report.json").read_text())["kinds"] == report["kinds"]
    with pytest.raises(ConfigError, match="already holds a run"):
        run.train(load_config("tiny", SMALL), out, console=console)
    with (out / run.LOCK).open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process trains this run"):
            run.resume(out, console=console)
    weights = last[-1] / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(DataError, match=r"step-000005: model\.safetensors does not match its checksum; resume"):
        evaluate_target(EvalRequest(str(out)), console)


@pytest.mark.parametrize("dies_at", [1, 3, 4], ids=["before-a-checkpoint", "inside-a-stage", "between-checkpoints"])
def test_a_killed_run_resumes_to_the_same_numbers(tmp_path, config, console, monkeypatch, dies_at):
    whole = run.train(config, tmp_path / "whole", console=console)
    train_step = Trainer.train_step

    def dying(self):
        if self.curriculum.step + 1 == dies_at:
            raise RuntimeError("killed")
        return train_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", dying)
        with pytest.raises(RuntimeError, match="killed"):
            run.train(config, tmp_path / "killed", console=console)
    resumed = run.resume(tmp_path / "killed", console=console)
    assert without_times(resumed) == without_times(whole)
    expected, got = (weights(path / "checkpoints" / "step-000005") for path in (whole, resumed))
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    assert (resumed / "evaluation/after.jsonl").read_text() == (whole / "evaluation/after.jsonl").read_text()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)], ids=str
)
def test_a_signal_saves_and_stops(tmp_path, config, console, monkeypatch, number, code):
    train_step = Trainer.train_step

    def interrupted(self):
        if self.curriculum.step == 2:
            os.kill(os.getpid(), number)
        return train_step(self)

    screen = Console(file=io.StringIO(), width=100)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted)
        with pytest.raises(Stopped, match=r"saved after step 3; go on with: rewardmap train --resume") as stopped:
            run.train(config, tmp_path / "run", console=screen)
    assert stopped.value.exit_code == code
    assert f"{number.name}: stopping after the step in progress; a second signal" in screen.file.getvalue()
    assert checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "step-000003"
    run.resume(tmp_path / "run", console=console)
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_a_signal_while_the_last_checkpoint_is_written_waits_for_it(tmp_path, config, console, monkeypatch):
    write = checkpoint.Checkpoints._write

    def interrupted(self, step, *rest):
        if step == 5:
            os.kill(os.getpid(), signal.SIGUSR1)
        write(self, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "_write", interrupted)
        with pytest.raises(Stopped, match="saved after step 5"):
            run.train(config, tmp_path / "run", console=console)
    assert checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "step-000005"
    assert not (tmp_path / "run/evaluation/after.jsonl").exists()


def test_a_signal_leaves_an_evaluation_at_once_and_its_answers_are_kept(
    tmp_path, config, console, monkeypatch, capfd
):
    def interrupted(engine, problems, sampling, store, progress):
        ask(engine, problems[:3], sampling, store)
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("left already")

    with monkeypatch.context() as patch:
        patch.setattr(examine, "ask", interrupted)
        with pytest.raises(typer.Exit) as left, errors(debug=False):
            run.train(config, tmp_path / "run", console=console)
    assert left.value.exit_code == 143
    said = capfd.readouterr().err
    assert said == f"SIGTERM: leaving\ninterrupted; go on with: rewardmap train --resume {tmp_path / 'run'}\n"
    assert len((tmp_path / "run/evaluation/answers.jsonl").read_text().splitlines()) == 3
    run.resume(tmp_path / "run", console=console)
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5]

    def leave(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(examine, "ask", leave)
    with pytest.raises(KeyboardInterrupt, match=r"answers so far are kept in .*/eval-test; the same command goes on"):
        evaluate_target(EvalRequest(str(tmp_path / "run")), console)


def test_values_of_a_stage_that_do_not_go_together_are_named(config, console, tmp_path, monkeypatch):
    monkeypatch.delattr(run, "set_up")  # nothing is drawn or loaded
    wrong = stages(config, "{name='routes', steps=1, reward_mode='graph', alpha=3.0}")
    with pytest.raises(ConfigError, match=r"stage 'routes': alpha 3\.0"):
        run.train(wrong, tmp_path / "run", console=console)
    own = replace(config, reward=replace(config.reward, function="no_such_module:reward"))
    with pytest.raises(ConfigError, match=r"reward function 'no_such_module:reward': cannot be imported"):
        run.train(own, tmp_path / "run", console=console)
    assert not (tmp_path / "run").exists()


def test_a_gate_ends_a_stage_and_a_resumed_run_goes_on_inside_it(tmp_path, config, console, monkeypatch):
    """The gate of an easy stage opens after three steps; a kill in each stage changes nothing."""
    gated = stages(
        config,
        "{name='a', steps=9, question_kinds=['TorF1', 'TorF2'], advance_at=0.05, advance_window=2, min_steps=3}",
        "{name='b', steps=4, question_kinds=['planning'], replay=0.34, replay_from='earlier', pools='adaptive'}",
    )
    whole = run.train(gated, tmp_path / "whole", console=console)
    rows = read_metrics(whole)
    assert [row["stage"] for row in rows] == ["a"] * 3 + ["b"] * 4
    assert all(set(row["asked"]) <= {"TorF1", "TorF2"} for row in rows[:3])
    assert all(row["asked"]["planning"] == 4 for row in rows[3:])
    assert all(sum(row["pools"].values()) == pytest.approx(1) for row in rows[3:])
    assert rows[3]["pools"] != rows[6]["pools"]
    train_step = Trainer.train_step
    folder = tmp_path / "killed"
    for dies_at in (3, 6):

        def dying(self, at=dies_at):
            if self.curriculum.step + 1 == at:
                raise RuntimeError("killed")
            return train_step(self)

        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
            patch.setattr(Trainer, "train_step", dying)
            if folder.exists():
                run.resume(folder, console=console)
            else:
                run.train(gated, folder, console=console)
    run.resume(folder, console=console)
    assert without_times(folder) == without_times(whole)
    expected, got = (weights(path / "checkpoints" / "step-000007") for path in (whole, folder))
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_held_out_maps_are_asked_along_the_way_and_the_training_is_the_same(tmp_path, config, console, monkeypatch):
    plain = run.train(config, tmp_path / "plain", console=console)
    often = replace(config, eval=replace(config.eval, every=2))
    folder, examine_all, dead = tmp_path / "often", examine.Examiner.examine, []

    def dying(self, engine, model, name, out, bar=None):
        found = examine_all(self, engine, model, name, out, bar)
        if name == "step-000004" and not dead:
            dead.append(name)
            raise RuntimeError("killed")
        return found

    monkeypatch.setattr(examine.Examiner, "examine", dying)
    with pytest.raises(RuntimeError, match="killed"):
        run.train(often, folder, console=console)
    asked = len(json_lines(folder / "evaluation/answers.jsonl"))
    run.resume(folder, console=console)
    assert without_times(folder) == without_times(plain)
    count = len(json_lines(folder / "evaluation/before.jsonl"))
    assert asked == 3 * count  # what was answered after step 4 was not asked again
    in_all = [len(json_lines(path / "evaluation/answers.jsonl")) for path in (plain, folder)]
    assert in_all[1] == in_all[0] + 2 * count
    assert (folder / "evaluation/after.jsonl").read_text() == (plain / "evaluation/after.jsonl").read_text()
    assert sorted(path.stem for path in (folder / "evaluation").glob("step-*")) == ["step-000002", "step-000004"]
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    told = {event.step: event.value for event in events.Scalars("held_out/weighted_accuracy")}
    assert sorted(told) == [0, 2, 4, 5] and "held_out/planning" in events.Tags()["scalars"]
    report = json.loads((folder / "report.json").read_text())["weighted_accuracy"]
    assert (told[0], told[5]) == pytest.approx((report["before"], report["after"]))
    sizes = [Image.open(path / "curves.png").height for path in (plain, folder)]
    assert sizes[1] > 1.4 * sizes[0]
    shutil.copy(folder / "evaluation/step-000004.jsonl", folder / "evaluation/step-000008.jsonl")  # it went back
    text = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text(text.replace("\nevery = 2\n", "\nevery = 0\n"))
    run.resume(folder, console=console)
    assert Image.open(folder / "curves.png").height == sizes[1]  # what was measured is shown, whatever is asked now
    assert sorted(path.stem for path in (folder / "evaluation").glob("step-*")) == ["step-000002", "step-000004"]


def test_sampled_answers_are_kept_with_what_they_earned(tmp_path, config, console):
    out = run.train(changed(config, keep_answers_every=2, updates_per_step=2), tmp_path / "run", console=console)
    assert json.loads((out / "report.json").read_text())["steps"] == 5  # of two updates each
    files = sorted((out / "answers").iterdir())
    assert [path.name for path in files] == ["step-000002.jsonl", "step-000004.jsonl"]
    rows = {row["step"]: row for row in read_metrics(out)}
    for step, path in ((2, files[0]), (4, files[1])):
        answers = json_lines(path)
        assert len(answers) == 24 and sum(one["num_tokens"] for one in answers) == rows[step]["rollout_tokens"]
        for key, metric in (("reward", "reward"), ("correct", "accuracy"), ("format_valid", "format_valid")):
            assert sum(one[key] for one in answers) / 24 == pytest.approx(rows[step][metric])
        for group in (answers[first : first + 4] for first in range(0, 24, 4)):
            assert len({one["uid"] for one in group}) == 1
            assert sum(one["advantage"] for one in group) == pytest.approx(0, abs=1e-4)
    failed = [one for one in json_lines(files[1]) if not one["correct"]]
    assert failed and all(one["failure"] != "none" for one in failed)


def test_where_gates_end_a_run_early_nothing_is_asked_after_steps_that_never_come(tmp_path, config, console):
    gated = stages(config, "{name='g', steps=5, advance_at=0.01, advance_window=2}")
    out = run.train(replace(gated, eval=replace(config.eval, every=1)), tmp_path / "run", console=console)
    assert len(read_metrics(out)) == 2
    assert [path.stem for path in (out / "evaluation").glob("step-*")] == ["step-000001"]


def test_a_run_that_went_back_and_on_otherwise_is_evaluated_anew(tmp_path, config, console):
    folder = run.train(changed(config, keep_checkpoints=3), tmp_path / "run", console=console)
    answers = folder / "evaluation/answers.jsonl"
    asked = len(answers.read_text().splitlines())
    run.resume(folder, console=console)
    assert len(answers.read_text().splitlines()) == asked
    shutil.rmtree(folder / "checkpoints/step-000005")
    written = folder / "config.toml"
    written.write_text(written.read_text().replace("learning_rate = 0.0003", "learning_rate = 0.001"))
    run.resume(folder, console=console)
    assert len(answers.read_text().splitlines()) == 2 * asked - len(json_lines(folder / "evaluation/before.jsonl"))


def test_a_run_on_nfs_is_locked_too(tmp_path, monkeypatch):
    """There an exclusive lock on a file opened for reading is EBADF (flock(2))."""
    flock = fcntl.flock

    def nfs(number, operation):
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(number, operation)

    monkeypatch.setattr(run.fcntl, "flock", nfs)
    with (
        run._alone_in(tmp_path, ALONE),
        pytest.raises(ConfigError, match="another process trains this run"),
        run._alone_in(tmp_path, ALONE),
    ):
        pass


def test_a_run_whose_settings_are_edited_meanwhile_stays_locked(tmp_path):
    settings, other = tmp_path / "config.toml", tmp_path / "config.toml.new"
    settings.touch()
    with run._alone_in(tmp_path, ALONE):
        other.touch()
        other.replace(settings)  # as editors and sed -i save
        with pytest.raises(ConfigError, match="another process trains this run"), run._alone_in(tmp_path, ALONE):
            pass


def test_the_time_of_all_sittings_is_reported(tmp_path, config, console, monkeypatch):
    """The evaluations before and after may be of two."""
    out, examine_all, close, dead, closed = tmp_path / "run", examine.Examiner.examine, run._close, [], []

    def dying(self, engine, model, name, *rest):
        if name == "after" and not dead:
            dead.append(name)
            raise RuntimeError("killed")
        return examine_all(self, engine, model, name, *rest)

    monkeypatch.setattr(examine.Examiner, "examine", dying)
    monkeypatch.setattr(run, "_close", lambda job, after: (closed.append(job), close(job, after)))
    with pytest.raises(RuntimeError, match="killed"):
        run.train(config, out, console=console)
    run.resume(out, console=console)
    first = sum(row["seconds"].get("evaluate", 0.0) for row in read_metrics(out))
    second = closed[0].trainer.timer.totals["evaluate"]
    report = json.loads((out / "report.json").read_text())
    assert min(first, second) > 0
    assert report["seconds_by_phase"]["evaluate"] == pytest.approx(first + second)
    assert report["seconds"] == pytest.approx(sum(report["seconds_by_phase"].values()))


def test_an_error_after_the_start_leaves_what_was_there(console, tmp_path, monkeypatch):
    def broken(job):
        raise DataError("map 7 cannot be read")

    monkeypatch.setattr(run, "_train_loop", broken)
    with pytest.raises(DataError, match="map 7"):
        run.train(load_config("tiny", SMALL), tmp_path / "run", console=console)
    assert (tmp_path / "run" / "config.toml").is_file()
    monkeypatch.undo()
    assert (run.resume(tmp_path / "run", console=console) / "report.json").is_file()


def test_only_the_first_stage_names_a_checkpoint(config, console, tmp_path):
    text = "[{name='a', steps=1}, {name='b', kind='sft', steps=0, checkpoint='shipped'}]"
    wrong = load_config("tiny", [*SMALL, f"data.path={config.data.path}", f"train.stages={text}"])
    with pytest.raises(ConfigError, match="only the first stage"):
        run.train(wrong, tmp_path / "run", console=console)
    assert not (tmp_path / "run").exists()


def test_other_peoples_files_are_left_alone(config, console, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="is not empty"):
        run.train(config, tmp_path, console=console)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.skipif(not REAL.is_dir(), reason="the real networks and pictures are not here")
def test_real_maps_train_two_steps_and_evaluate(tmp_path, console):
    """Real Oslo and Jinan: networks, pictures and question templates through the whole loop."""
    rows = []
    for name, level in (("norway/oslo", "middle"), ("china/jinan", "easy")):
        country, city = name.split("/")
        for kind, suffix in (("maps", ".png"), ("stations", ".json")):
            target = tmp_path / "data" / kind / country / f"{city}{suffix}"
            target.parent.mkdir(parents=True, exist_ok=True)
            source = REAL / kind / (f"{city}{suffix}" if kind == "maps" else f"{name}{suffix}")
            shutil.copy(source, target)
        network = json.loads((REAL / "stations" / f"{name}.json").read_text(encoding="utf-8"))
        for index, (line, stops) in enumerate(network.items()):
            first, last = (stop.split(" (")[0].split("（")[0] for stop in (stops[0], stops[-1]))
            common = {
                "country": country,
                "city": city,
                "station_1": first,
                "station_2": last,
                "figure": f"./maps/{name}.png",
                "json": f"./stations/{name}.json",
                "difficulty_city": level,
                "city_line_count": len(network),
                "city_transfer_count": 4,
                "question_transfer_count": 0,
            }
            rows += [
                {**common, "type": "TorF1", "answer": 1, "question": question_text("TorF1", first, last)},
                {
                    **common,
                    "type": "planning",
                    "answer": -1,
                    "question": question_text("planning", first, last),
                },
                {
                    **common,
                    "type": "TorF2",
                    "answer": 1,
                    "station_2": line,
                    "question": question_text("TorF2", first, line),
                },
            ]
            if index == 0:
                rows.append(
                    {
                        **common,
                        "type": "Counting3",
                        "answer": len(network),
                        "question": question_text("Counting3"),
                    }
                )
    for split in ("train", "test"):
        write_rows(tmp_path / "data", rows, split)
    config = load_config(
        "tiny",
        [
            *SMALL,
            f"data.path={tmp_path / 'data'}",
            "policy.max_pixels=50176",
            "rollout.max_new_tokens=16",
            "train.stages=[{name='warm', kind='sft', steps=0, checkpoint='shipped'}, {name='real', steps=2}]",
        ],
    )
    out = run.train(config, tmp_path / "run", console=console)
    report = json.loads((out / "report.json").read_text())
    assert [row["step"] for row in read_metrics(out)] == [1, 2]
    assert set(report["kinds"]) == {"TorF1", "TorF2", "Counting3", "planning"}
    assert (out / "samples" / "samples-1.png").is_file()
