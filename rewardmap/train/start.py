"""What a run needs before its first step: data, policy, engine, trainer, as the newest intact checkpoint left them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from rewardmap import tiny
from rewardmap.config import Config, ConfigError, PolicyConfig
from rewardmap.config_file import dump_toml
from rewardmap.curriculum import Curriculum
from rewardmap.files import write_text
from rewardmap.policy import Policy, cast_weights, load_policy, pick_device
from rewardmap.profiling import PhaseTimer
from rewardmap.rewards import Networks, Rubric
from rewardmap.rewards.rubric import Mode
from rewardmap.rewards.stations import unanswerable
from rewardmap.train.ahead import OneStepOff
from rewardmap.train.checkpoint import load_training_state, newest_intact, read_state
from rewardmap.train.engines import make_engine, need_engine
from rewardmap.train.examine import (
    CHECKPOINTS,
    Examiner,
    data_folder,
    make_examiner,
    networks_for,
    progress_bar,
)
from rewardmap.train.identity import changes, identity, restore_random_state
from rewardmap.train.parallel import Forward, computes_in, needs_sharding, prepare_policy, shard_policy
from rewardmap.train.ranks import ALONE, Ranks, join_ranks
from rewardmap.train.reference import Reference, make_reference
from rewardmap.train.scoring import stage_reward
from rewardmap.train.shared_pictures import SharedPictures
from rewardmap.train.trainer import Trainer
from rewardmap.transit.export import remove_partial
from rewardmap.transit.questions import gold_response
from rewardmap.transit.reasonmap import MapData, load_dataset, write_dataset
from rewardmap.types import DataError, Problem

FAULTS, ANSWERS = "faults", "answers"


def join(config: Config) -> AbstractContextManager[Ranks]:
    """The ranks of the job, as the configuration needs them."""
    parallel = config.parallel
    return join_ranks(parallel.timeout_seconds, alone=needs_sharding(parallel, ALONE, config.policy.dtype))


def begin_folder(config: Config, run_dir: Path) -> None:
    """A new run folder with its ``config.toml``. Raises ConfigError where anything is there already, or another job
    begins there."""
    claim = run_dir / ".begins"
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        claim.mkdir()  # by one job alone, on every file system
    except FileExistsError:
        remedy = f"choose another --run-dir, or remove {claim} where none does"
        raise ConfigError(f"{run_dir}: another job begins a run there; {remedy}") from None
    try:
        if (run_dir / "config.toml").exists():
            remedy = f"resume it with --resume {run_dir}, or choose another --run-dir"
            raise ConfigError(f"{run_dir} already holds a run; {remedy}")
        if any(path != claim for path in run_dir.iterdir()):
            raise ConfigError(f"{run_dir} is not empty; choose another --run-dir")
        write_text(run_dir / "config.toml", dump_toml(config))
    finally:
        claim.rmdir()


def set_up(
    config: Config,
    run_dir: Path,
    console: Console,
    ranks: Ranks = ALONE,
    pictures: SharedPictures | None = None,
) -> tuple[Trainer, Examiner, dict[str, Any]]:
    """Trainer and examiner as the newest intact checkpoint left them, and what identifies the run.

    Args:
        pictures: of this node's ranks.
    """
    need_engine(config, ranks)
    timer = PhaseTimer()
    with timer.phase("data"):
        training, testing = _load_data(config, run_dir, ranks, console)
    examiner = make_examiner(config, testing, training, console)
    itself = identity(config, {"train": training.problems, "test": examiner.problems}, ranks)
    with timer.phase("load"):
        newest = ranks.first(lambda: newest_intact(run_dir / CHECKPOINTS, partial(_warn, console)))
    asked = (*training.problems, *examiner.problems)
    trainer = _make_trainer(config, training, testing, asked, newest, run_dir, ranks, pictures, timer, console)
    try:
        if newest:
            _restore(trainer, itself, Path(newest), console)
    except BaseException:
        trainer.engine.close()
        raise
    return trainer, examiner, itself


def _load_data(config: Config, run_dir: Path, ranks: Ranks, console: Console) -> tuple[MapData, MapData]:
    ranks.first(lambda: _prepare_data(config, run_dir, console))
    folder = data_folder(config, run_dir)
    training = _answerable(config, load_dataset(folder, config.data.train_split, on_bad_row=config.data.on_bad_row))
    testing = load_dataset(folder, config.data.test_split, on_bad_row=config.data.on_bad_row)
    for skipped in (*training.skipped, *testing.skipped):
        _warn(console, f"skipped: {skipped}")
    if shared := sorted(training.networks.keys() & testing.networks.keys()):
        _warn(console, f"{folder}: {len(shared)} maps are in both splits, so not held out; the first: {shared[0]}")
    if config.data.path is not None:  # the routes of maps drawn here are right
        for data in (training, testing):
            ranks.first(partial(_warn_of_routes, config, data, console))
    return training, testing


def _warn_of_routes(config: Config, data: MapData, console: Console) -> None:
    """Say which gold routes the reward takes for wrong: they lead supervised stages and map scores astray."""
    mode: Mode = "graph" if "graph" in _modes(config) else "reference"
    planning = [problem for problem in data.problems if problem.kind == "planning" and problem.fine_grained_answer]
    routed = [replace(problem, question="") for problem in planning]  # its text would ask for more than the legs
    texts = [gold_response(problem) for problem in routed]
    right = Rubric(mode=mode).score(routed, texts, networks_for(mode, data)).correct
    wrong = [problem.uid for problem, correct in zip(routed, right, strict=True) if not correct]
    if wrong:
        others = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        _warn(
            console,
            f"{data.root}, row '{wrong[0]}'{others}, field 'fine_grained_answer': the reward in mode {mode} takes this "
            "route for wrong; compare its lines and stations with the stations file",
        )


def _answerable(config: Config, data: MapData) -> MapData:
    """The data without planning questions that no route answers: their maps lack a station, or it is one station.

    Raises DataError for the first, unless bad rows are skipped.
    """
    graph = "graph" in _modes(config)
    bad = {}
    for problem, wrong in unanswerable(data.problems, networks_for("graph" if graph else "reference", data), graph):
        where = f"{data.root}, split {config.data.train_split!r}, row {problem.uid!r}, {wrong}"
        if config.data.on_bad_row == "raise":
            raise DataError(f"{where}; correct it, or leave such rows out with data.on_bad_row=skip")
        bad[problem.uid] = where
    kept = [problem for problem in data.problems if problem.uid not in bad]
    if not kept:
        raise DataError(f"{data.root}: nothing to train on: all rows are bad; the first: {next(iter(bad.values()))}")
    return replace(data, problems=kept, skipped=(*data.skipped, *bad.values()))


def _modes(config: Config) -> set[str]:
    """Of the rewards that the stages use."""
    return {config.reward.mode, *(stage_reward(config.reward, stage).mode for stage in config.train.stages)}


def _make_trainer(
    config: Config,
    training: MapData,
    testing: MapData,
    asked: Sequence[Problem],
    newest: str | None,
    run_dir: Path,
    ranks: Ranks,
    pictures: SharedPictures | None,
    timer: PhaseTimer,
    console: Console,
) -> Trainer:
    """Policy, engine and trainer over the ranks, with the weights of the newest checkpoint if there is one."""
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    networks: dict[str, Networks] = {mode: networks_for(mode, training, testing) for mode in _modes(config)}
    curriculum = Curriculum(training.problems, config.train.stages, config.train.prompts_per_step, config.train.seed)
    with timer.phase("load"):
        policy, forward, reference = _make_policy(config, newest, ranks, pictures)
    console.print(policy.describe_attention(computes_in(config)), highlight=False, soft_wrap=True)
    with timer.phase("servers"):
        say = partial(console.print, highlight=False, soft_wrap=True)
        engine = make_engine(config, policy, run_dir, asked, say, ranks, forward)
    try:
        return (OneStepOff if config.rollout.staleness else Trainer)(
            config,
            policy,
            engine,
            networks,
            curriculum,
            timer,
            ranks=ranks,
            forward=forward,
            reference=reference,
            faults=run_dir / FAULTS,
            answers=run_dir / ANSWERS,
        )
    except BaseException:
        engine.close()
        raise


def _make_policy(
    config: Config, newest: str | None, ranks: Ranks, pictures: SharedPictures | None
) -> tuple[Policy, Forward | None, Reference | None]:
    """The policy as it trains, split over the ranks where it must be, with its forward pass then and its reference."""
    sharded = needs_sharding(config.parallel, ranks, config.policy.dtype)
    settings = replace(config.policy, device="cpu") if sharded else config.policy  # split before they go to the GPU
    # Adapters lie beside the weights they began with.
    begin = newest is None or config.policy.lora_rank
    policy = initial_policy(config, settings) if begin else load_policy(str(newest), settings)
    initial = None
    if config.train.kl_coef and not config.policy.lora_rank:
        _reference_is_named(config)
        computing = replace(settings, dtype=config.parallel.compute_dtype or config.policy.dtype)
        initial = initial_policy(config, computing) if newest or sharded else policy
    if pictures is not None:
        for one in (policy, initial or policy):
            one.share_pictures(pictures.keep, pictures.place / pictures.ranks)
    device = pick_device(config.policy)
    shard = partial(shard_policy, parallel=config.parallel, ranks=ranks, device=device) if sharded else None
    reference = make_reference(policy, config, initial, shard)
    prepare_policy(policy, config)
    return policy, None if shard is None else shard(policy), reference


def _restore(trainer: Trainer, itself: Mapping[str, Any], newest: Path, console: Console) -> None:
    """Take over the rest of a checkpoint, and say what is no longer as it was.

    Raises ConfigError where the next step's answers wait there for a trainer that would leave them out: its curriculum
    would be a step ahead of it for ever.
    """
    state = read_state(newest)
    if state.get("ahead") is not None and not trainer.config.rollout.staleness:
        raise ConfigError(f"{newest} holds the next step's answers already; resume with rollout.staleness=1")
    for line in changes(state["identity"], itself):
        _warn(console, f"changed since {newest.name}: {line}")
    load_training_state(newest, trainer.policy, trainer.optimizer)
    trainer.load_state_dict(state)
    restore_random_state(state["random"])
    console.print(f"resuming after step {trainer.step} of {trainer.curriculum.total_steps}", highlight=False)


def _warn(console: Console, line: str) -> None:
    console.print(line, style="yellow", highlight=False, soft_wrap=True)


def _prepare_data(config: Config, run_dir: Path, console: Console) -> None:
    folder = data_folder(config, run_dir)
    if config.data.path is None and not folder.exists():
        remove_partial(folder)
        with progress_bar(console) as bar:
            task = bar.add_task("draw maps", total=config.data.train_maps + config.data.test_maps)
            write_dataset(
                folder,
                maps={
                    config.data.train_split: config.data.train_maps,
                    config.data.test_split: config.data.test_maps,
                },
                preset=config.data.level,
                seed=config.data.seed,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )


def initial_policy(config: Config, settings: PolicyConfig | None = None) -> Policy:
    """The policy before the first step: named weights, the shipped warm start, or a new tiny model."""
    sources = [stage.checkpoint for stage in config.train.stages if stage.checkpoint is not None]
    if len(sources) > 1 or (sources and config.train.stages[0].checkpoint is None):
        raise ConfigError("only the first stage may name a checkpoint")
    settings = settings or config.policy
    if sources and config.policy.model != "tiny":
        raise ConfigError(
            f"stage '{config.train.stages[0].name}' begins with checkpoint='{sources[0]}', so that "
            f"policy.model='{config.policy.model}' would not be trained; take another configuration "
            "(configs/rewardmap_qwen2_5_vl_7b.toml has stages for such a model), or leave one of the two out"
        )
    if sources:
        return load_policy(tiny.WARM_START if sources[0] == "shipped" else sources[0], settings)
    if config.policy.model == "tiny":
        policy = tiny.build_tiny(config.train.seed, config.policy.freeze_vision)
        policy.model.to(pick_device(settings))
        cast_weights(policy.model, getattr(torch, settings.dtype))
        return policy
    return load_policy(config.policy.model, settings)


def _reference_is_named(config: Config) -> None:
    """Raises ConfigError where the KL term's reference would be weights that this run makes."""
    made = [stage.name for stage in config.train.stages if stage.kind == "sft" and stage.steps]
    if made:
        raise ConfigError(
            f"train.kl_coef keeps the policy near the weights the run begins with, but stage '{made[0]}' trains them "
            "first; run that stage alone and name its checkpoint as policy.model"
        )
