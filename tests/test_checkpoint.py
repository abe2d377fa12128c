"""Checkpoints: what is kept, what is noticed, and that what is read is what was written."""

import errno
import json
import os
import re
import shutil
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import small_run
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForImageTextToText

from rewardmap.config import Config
from rewardmap.config_file import load_config
from rewardmap.policy import Policy
from rewardmap.report import read_metrics
from rewardmap.tiny import build_tiny
from rewardmap.train import checkpoint, run
from rewardmap.train.checkpoint import (
    Checkpoints,
    find_damage,
    list_checkpoints,
    load_training_state,
    newest_intact,
    read_state,
)
from rewardmap.train.identity import changes, identity, random_state, restore_random_state
from rewardmap.train.parallel import prepare_policy
from rewardmap.train.ranks import ALONE
from rewardmap.transit.reasonmap import load_dataset
from rewardmap.types import DataError

SMALL = [
    *small_run.SMALL,
    "eval.before=false",
    "eval.text_only=false",
    "eval.max_problems=2",
    "eval.samples=0",
    "train.stages=[{name='warm', kind='sft', steps=0, checkpoint='shipped'}, {name='yes or no', steps=5, "
    "question_kinds=['TorF1', 'TorF2']}]",
]


@pytest.fixture
def config(data) -> Config:
    return load_config("tiny", [*SMALL, f"data.path={data}"])


@pytest.fixture
def console() -> Console:
    return Console(record=True, width=400)


@pytest.fixture
def policy() -> Policy:
    return build_tiny(0, True)


@pytest.fixture
def optimizer(policy) -> torch.optim.Optimizer:
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    for parameter in trained:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def without_times(run_dir: Path) -> list[dict]:
    return [
        {key: value for key, value in row.items() if key not in ("seconds", "speed")} for row in read_metrics(run_dir)
    ]


def test_what_is_read_is_what_was_written(tmp_path, policy, optimizer):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(7, policy, optimizer, {"step": 7})
        with torch.no_grad():  # the copy was taken before: the weights may move on while it is written
            for parameter in policy.model.parameters():
                parameter += 1
    (path,) = list_checkpoints(tmp_path)
    files = [file for file in path.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".jinja", ".txt"}
    model = AutoModelForImageTextToText.from_pretrained(path)
    for name, tensor in policy.model.state_dict().items():
        assert torch.equal(model.state_dict()[name] + 1, tensor), name
    fresh = torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad], lr=1e-3)
    load_training_state(path, policy, fresh)
    assert read_state(path) == {"step": 7}
    assert fresh.state.keys() == optimizer.state.keys()
    for parameter, state in optimizer.state.items():
        assert all(torch.equal(fresh.state[parameter][key], value) for key, value in state.items())


@pytest.mark.parametrize("offload", [False, True], ids=["rests on the host", "copied from a GPU"])
def test_weights_are_copied_once(tmp_path, policy, optimizer, monkeypatch, offload):
    """To host memory, which may not hold a large model twice."""
    whole, gathered, written = checkpoint.get_model_state_dict, dict[str, torch.Tensor](), dict[str, torch.Tensor]()

    def gather(*arguments, **named):
        gathered.update(whole(*arguments, **named))
        if offload:
            gathered.update({name: tensor.clone() for name, tensor in gathered.items()})
        return dict(gathered)

    monkeypatch.setattr(checkpoint, "get_model_state_dict", gather)
    monkeypatch.setattr(Policy, "save", lambda self, folder, weights: written.update(weights))
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(7, policy, optimizer, {})
    same = {name for name, tensor in written.items() if tensor.data_ptr() == gathered[name].data_ptr()}
    assert written.keys() == policy.model.state_dict().keys()
    assert same == (set(written) if offload else set())


def test_shards_of_one_rank_are_copied_too(tmp_path):
    """Gathering them moves nothing, and the weights go on."""
    policy, kept = build_tiny(0, True), build_tiny(0, True)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        fully_shard(policy.model, mesh=init_device_mesh("cpu", (1,)))
        optimizer = torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad], lr=1e-3)
        with Checkpoints(tmp_path, keep=2) as checkpoints:
            checkpoints.save(7, policy, optimizer, {})
            with torch.no_grad():
                for parameter in policy.model.parameters():
                    parameter += 1
    finally:
        torch.distributed.destroy_process_group()
    (path,) = list_checkpoints(tmp_path)
    written = AutoModelForImageTextToText.from_pretrained(path).state_dict()
    assert all(torch.equal(written[name], tensor) for name, tensor in kept.model.state_dict().items())


def test_other_trained_parameters_are_named(tmp_path, policy, optimizer):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(7, policy, optimizer, {})
    policy.model.lm_head.requires_grad_(False)
    fewer = torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad])
    with pytest.raises(DataError, match=r"trained other parameters.*exp_avg\.lm_head\.weight"):
        load_training_state(list_checkpoints(tmp_path)[0], policy, fewer)


def test_adapters_are_saved_beside_their_product(tmp_path):
    pytest.importorskip("peft")

    def adapted(*settings: str) -> tuple[Policy, torch.optim.Optimizer]:
        policy = build_tiny(0, True)
        prepare_policy(policy, load_config("tiny", ["policy.lora_rank=4", *settings]))
        return policy, torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad], lr=1e-2)

    policy, optimizer = adapted()
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, policy, optimizer, {})
    (path,) = list_checkpoints(tmp_path)
    ids = torch.arange(20)[None]
    merged = AutoModelForImageTextToText.from_pretrained(path).eval()
    with torch.no_grad():
        wanted, plain = policy.model(input_ids=ids).logits, build_tiny(0, True).model(input_ids=ids).logits
        torch.testing.assert_close(merged(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, wanted, atol=1e-3)
    fresh, other = adapted()
    load_training_state(path, fresh, other)
    with torch.no_grad():
        assert torch.equal(fresh.model(input_ids=ids).logits, wanted)
    with pytest.raises(DataError, match=r"other parameters .*lora_A\.default\.weight'; put policy\.lora_rank"):
        load_training_state(path, *adapted("policy.lora_rank=8"))


def test_adapters_begin_by_the_seed_alone():
    pytest.importorskip("peft")

    def begun(seed: int, drawn_before: int) -> list[torch.Tensor]:
        policy = build_tiny(0, True)
        torch.rand(drawn_before)
        prepare_policy(policy, load_config("tiny", ["policy.lora_rank=4", f"train.seed={seed}"]))
        return [p.detach() for name, p in policy.model.named_parameters() if ".lora_A." in name]

    first, again, other = begun(3, 1), begun(3, 2), begun(4, 1)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))


def test_adapters_of_frozen_weights_do_not_train():
    pytest.importorskip("peft")
    policy = build_tiny(0, True)
    prepare_policy(policy, load_config("tiny", ["policy.lora_rank=4", "policy.freeze=['*.layers.0.*', '*.q_proj.*']"]))
    trained = {name for name, parameter in policy.model.named_parameters() if parameter.requires_grad}
    adapters = {name for name, _ in policy.model.named_parameters() if ".lora_" in name}
    assert trained == {name for name in adapters if ".layers.0." not in name and ".q_proj." not in name} != set()


def test_the_newest_and_the_best_are_kept(tmp_path, policy, optimizer):
    scores = {1: ("a", 0.9), 2: ("b", 0.5), 3: ("b", 0.7), 4: ("b", 0.6), 5: ("b", None), 6: ("b", 0.1)}
    with Checkpoints(tmp_path, keep=2, keep_best=1) as checkpoints:
        for step, (stage, score) in scores.items():
            checkpoints.save(step, policy, optimizer, {"stage": stage, "score": score})
    assert names(tmp_path) == ["step-000003", "step-000005", "step-000006"]


def test_copies_under_other_names_are_no_checkpoints_and_stay(tmp_path, policy, optimizer):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, policy, optimizer, {})
        checkpoints.wait()
        for name in ("step-000001-good", "step-000001.keep", "step-best"):
            shutil.copytree(tmp_path / "step-000001", tmp_path / name)
        for step in (999_999, 1_000_000):
            checkpoints.save(step, policy, optimizer, {})
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-1000000"]
    assert names(tmp_path) == ["step-000001-good", "step-000001.keep", "step-1000000", "step-best"]


def test_a_damaged_one_that_the_run_went_back_behind_is_not_the_newest(tmp_path, policy, optimizer):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (4, 6):
            checkpoints.save(step, policy, optimizer, {})
    (tmp_path / "step-000006/trainer.json").write_bytes(b"")
    with Checkpoints(tmp_path, keep=1, keep_best=1) as checkpoints:
        checkpoints.save(5, policy, optimizer, {})
    assert names(tmp_path) == ["step-000005"]


def test_a_damaged_old_one_does_not_stop_the_next(tmp_path, policy, optimizer):
    with Checkpoints(tmp_path, keep=2, keep_best=1) as checkpoints:
        checkpoints.save(1, policy, optimizer, {"stage": "a", "score": 0.9})
    (tmp_path / "step-000001" / "trainer.json").write_text("{")
    with Checkpoints(tmp_path, keep=2, keep_best=1) as checkpoints:
        for step in (2, 3, 4):
            checkpoints.save(step, policy, optimizer, {"stage": "a", "score": 1 / step})
    assert names(tmp_path) == ["step-000002", "step-000003", "step-000004"]


def test_a_kill_while_an_old_one_is_removed_leaves_no_half_of_it(tmp_path, policy, optimizer, monkeypatch):
    class Killed(BaseException):
        pass

    def some_of_it(folder, **ignore_errors):
        (folder / "trainer.json").unlink(missing_ok=True)
        raise Killed

    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, policy, optimizer, {"step": 1})
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("rewardmap.train.checkpoint.shutil.rmtree", some_of_it)
        with Checkpoints(tmp_path, keep=1) as checkpoints:
            checkpoints.save(2, policy, optimizer, {"step": 2})
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000002"]
    Checkpoints(tmp_path, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]


def test_what_a_killed_writer_left_is_swept(tmp_path, policy, optimizer):
    (tmp_path / ".step-000003").mkdir()
    (tmp_path / ".step-000003" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "step-000004").mkdir()  # no checksums: never finished
    assert newest_intact(tmp_path, print) is None
    Checkpoints(tmp_path, keep=2)
    assert names(tmp_path) == ["step-000004"]


@pytest.mark.parametrize("file", ["model.safetensors", "trainer.json", "training", "checksums.json"])
def test_damage_is_found(tmp_path, policy, optimizer, file):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(7, policy, optimizer, {"step": 7})
    (path,) = list_checkpoints(tmp_path)
    assert find_damage(path) is None
    victim = path / file if file != "training" else next((path / file).iterdir())
    whole = bytearray(victim.read_bytes())
    whole[len(whole) // 2] ^= 1  # one bit
    victim.write_bytes(whole)
    assert find_damage(path)
    victim.unlink()
    assert file == "checksums.json" or "cannot be read" in str(find_damage(path))


def test_a_bad_sector_is_damage(tmp_path, policy, optimizer, monkeypatch):
    def unreadable(file, digest):
        raise OSError(errno.EIO, os.strerror(errno.EIO))  # names no file, as read(2) does not

    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(7, policy, optimizer, {})
    (path,) = list_checkpoints(tmp_path)
    monkeypatch.setattr(checkpoint.hashlib, "file_digest", unreadable)
    assert re.fullmatch(r"\S+ cannot be read \(Input/output error\)", find_damage(path))


def test_a_run_goes_on_with_the_checkpoint_before_a_broken_one(tmp_path, config, console):
    out = run.train(config, tmp_path / "run", console=console)
    before = without_times(out)
    path = out / "checkpoints" / "step-000005" / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}  # the file itself is mapped
    path.write_bytes(path.read_bytes()[:1000])
    run.resume(out, console=console)
    said = console.export_text()
    assert "step-000005: model.safetensors does not match its checksum; the checkpoint before it is used" in said
    assert "resuming after step 4 of 5" in said and "changed since" not in said
    assert without_times(out) == before
    assert all(torch.equal(load_file(path)[name], tensor) for name, tensor in weights.items())
    for folder in list_checkpoints(out / "checkpoints"):
        (folder / "trainer.json").write_text("{}")
    with pytest.raises(DataError, match="every checkpoint is broken"):
        run.resume(out, console=console)


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, config, console, monkeypatch):
    save = Policy.save

    def full(self, folder, *arguments):
        if "step-000004" in str(folder):
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        save(self, folder, *arguments)

    monkeypatch.setattr(Policy, "save", full)
    with pytest.raises(OSError, match=r"No space left.*free space and resume.*step-000004") as error:
        run.train(config, tmp_path / "run", console=console)
    assert error.value.errno == errno.ENOSPC
    assert names(tmp_path / "run" / "checkpoints") == ["step-000002"]
    monkeypatch.undo()
    run.resume(tmp_path / "run", console=console)
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_a_full_disk_while_the_shards_are_written(tmp_path, policy, optimizer, monkeypatch):
    def full(*arguments, **named):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.dcp, "save", full)
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(3, policy, optimizer, {})
    with pytest.raises(OSError, match="No space left"):
        checkpoints.wait()
    assert names(tmp_path) == []


def test_what_a_rank_met_is_said_as_it_is(tmp_path, policy, optimizer, monkeypatch):
    def refused(*arguments, **named):
        met = PermissionError(errno.EACCES, "Permission denied")
        raise checkpoint.CheckpointException("write", {0: (met, traceback.extract_stack())})

    monkeypatch.setattr(checkpoint.dcp, "save", refused)
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(3, policy, optimizer, {})
    with pytest.raises(OSError, match=r"written \(\[Errno 13\] Permission denied\); mend that and resume") as error:
        checkpoints.wait()
    assert error.value.errno == errno.EACCES


def test_a_changed_configuration_is_reported_key_by_key(tmp_path, config, console):
    out = run.train(config, tmp_path / "run", console=console)
    text = (out / "config.toml").read_text()
    (out / "config.toml").write_text(text.replace("max_grad_norm = 1.0", "max_grad_norm = 2.0", 1))
    run.resume(out, console=console)
    said = console.export_text()
    assert "changed since step-000005: config.train.max_grad_norm: 1.0, now 2.0" in said
    assert said.count("changed since") == 1
    (out / "config.toml").write_text(text.replace("freeze = []", 'freeze = ["lm_head.*"]', 1))
    with pytest.raises(DataError, match="other parameters"):
        run.resume(out, console=console)
    said = console.export_text()
    assert 'changed since step-000005: config.policy.freeze: [], now ["lm_head.*"]' in said  # which is why


def test_changed_data_is_reported_key_by_key(config, data):
    problems = load_dataset(data, "train").problems
    before = identity(config, {"train": problems}, ALONE)
    assert changes(before, json.loads(json.dumps(identity(config, {"train": list(problems)}, ALONE)))) == []
    asked = [replace(problems[0], question="Which?"), *problems[1:]]
    (line,) = changes(before, identity(config, {"train": asked}, ALONE))
    assert line.startswith("data.train.questions: ")
    other = Path(problems[0].image).read_bytes() + b" "
    (line,) = changes(before, identity(config, {"train": [replace(problems[0], image=other), *problems[1:]]}, ALONE))
    assert line.startswith("data.train.pictures: ")
    fewer = changes(before, identity(config, {"train": problems[1:]}, ALONE))
    assert any(line.startswith("data.train.problems: ") for line in fewer)


def test_changes_name_every_key():
    before = {"a": 1, "stages": [{"n": 1}, {"n": 2}], "list": [1, 2], "gone": 0, "same": [{"x": 1}]}
    now = {"a": 1, "stages": [{"n": 1}, {"n": 3}, {"n": 4}], "list": [1, 3], "new": None, "same": [{"x": 1}]}
    assert changes(before, now) == [
        "gone: 0, now null",
        "list: [1, 2], now [1, 3]",
        "stages.1.n: 2, now 3",
        'stages.2: null, now {"n": 4}',
    ]


def test_rows_are_on_the_disk_before_a_checkpoint_that_follows_them(tmp_path, config, console, monkeypatch):
    """Else a power cut may take rows of steps that the resumed run does not make again."""
    happened: list[str] = []
    fsync, rename = os.fsync, os.rename

    def noted_fsync(number):
        happened.append(Path(os.readlink(f"/proc/self/fd/{number}")).name)
        fsync(number)

    def noted_rename(old, new):
        happened.append(f"made {Path(new).name}")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    run.train(config, tmp_path / "run", console=console)
    for number, step in enumerate((2, 4, 5), 1):  # written in the background, while later steps are made
        assert happened[: happened.index(f"made step-{step:06d}")].count("metrics.jsonl") >= number


def test_random_states_come_back():
    import random

    import numpy as np

    state = json.loads(json.dumps(random_state()))
    first = (random.random(), float(np.random.rand()), torch.rand(3))
    restore_random_state(state)
    assert (random.random(), float(np.random.rand())) == first[:2] and torch.equal(torch.rand(3), first[2])
