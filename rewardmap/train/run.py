"""A whole run: data, policy, curriculum, evaluation before and after, report. Every part of it survives a kill."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from rewardmap import tiny
from rewardmap.config import Config, ConfigError, PolicyConfig, StageConfig, dump_toml, load_config, stage_reward
from rewardmap.curriculum import Curriculum
from rewardmap.evaluate import Evaluation
from rewardmap.files import write_text
from rewardmap.policy import Policy, load_policy, pick_device
from rewardmap.profiling import PhaseTimer, device_peak_flops, peak_rss_bytes, speed
from rewardmap.report import MetricsLog, draw_curriculum, draw_curves, draw_samples, read_metrics, write_report
from rewardmap.rewards import Networks
from rewardmap.train.checkpoint import Checkpoints, load_training_state, newest_intact
from rewardmap.train.engines import make_engine
from rewardmap.train.examine import (
    CHECKPOINTS,
    EVALUATION,
    Examiner,
    answers_before,
    data_folder,
    make_examiner,
    networks_for,
    progress_bar,
)
from rewardmap.train.faults import Stopped, stop_request
from rewardmap.train.identity import changes, identity, random_state, restore_random_state
from rewardmap.train.parallel import needs_sharding, prepare_policy, shard_policy
from rewardmap.train.ranks import ALONE, Ranks, SharedRollouts, join_ranks, restarted
from rewardmap.train.reference import make_reference
from rewardmap.train.trainer import Trainer
from rewardmap.transit.reasonmap import MapData, load_dataset, write_dataset
from rewardmap.types import DataError, Problem

FAULTS = "faults"


def train(config: Config, run_dir: Path, *, console: Console) -> Path:
    """Run a configuration from its beginning in a new folder, on all ranks of the job; returns the folder.

    A job that its launcher restarted goes on with the run it began.

    Raises:
        ConfigError: the folder already holds a run, or the configuration cannot be run.
        DataError: the data set is empty or malformed.
        Stopped: a signal asked for it; a checkpoint was saved.
        RefusedUpdatesError: too many updates in a row were refused.
    """
    with _ranks(config) as ranks:
        run_dir = Path(ranks.gather(str(run_dir))[0])
        if restarted() and (run_dir / "config.toml").exists():
            return _run(load_config(run_dir / "config.toml"), run_dir, ranks, console)
        ranks.first(lambda: _begin(config, run_dir))
        try:
            return _run(config, run_dir, ranks, console)
        except (ConfigError, DataError):
            if ranks.is_first and not (run_dir / CHECKPOINTS).exists():
                shutil.rmtree(run_dir, ignore_errors=True)  # nothing of a run that could not begin stays behind
            raise


def resume(run_dir: Path, *, console: Console) -> Path:
    """Go on after the newest intact checkpoint of a run, or from its beginning when there is none yet."""
    if not (run_dir / "config.toml").is_file():
        raise ConfigError(f"{run_dir} is not a run folder: it has no config.toml")
    config = load_config(run_dir / "config.toml")
    with _ranks(config) as ranks:
        return _run(config, run_dir, ranks, console)


def _ranks(config: Config) -> AbstractContextManager[Ranks]:
    parallel = config.parallel
    return join_ranks(parallel.timeout_seconds, alone=needs_sharding(parallel, ALONE, config.policy.dtype))


def _begin(config: Config, run_dir: Path) -> None:
    if (run_dir / "config.toml").exists():
        remedy = f"resume it with --resume {run_dir}, or choose another --run-dir"
        raise ConfigError(f"{run_dir} already holds a run; {remedy}")
    if run_dir.exists() and any(run_dir.iterdir()):
        raise ConfigError(f"{run_dir} is not empty; choose another --run-dir")
    write_text(run_dir / "config.toml", dump_toml(config))


def _run(config: Config, run_dir: Path, ranks: Ranks, console: Console) -> Path:
    """From where the newest intact checkpoint left it to the report."""
    if not ranks.is_first:
        console = Console(quiet=True)
    trainer, examiner, itself = _set_up(config, run_dir, console, ranks)
    try:
        writer = Checkpoints(run_dir / CHECKPOINTS, config.train.keep_checkpoints, config.train.keep_best, ranks)
        with _own_folder(run_dir, ranks) as out:  # what ranks other than the first write there is thrown away
            with MetricsLog(out, last_step=trainer.curriculum.step) as log, writer as checkpoints:
                _train_loop(_Job(trainer, examiner, checkpoints, log, itself, run_dir, out, console))
            _close(trainer, examiner, out)
    finally:
        trainer.engine.close()
    console.print(f"run folder: {run_dir}", highlight=False)
    return run_dir


def _set_up(
    config: Config, run_dir: Path, console: Console, ranks: Ranks = ALONE
) -> tuple[Trainer, Examiner, dict[str, Any]]:
    """Trainer and examiner as the newest intact checkpoint left them, and what identifies the run."""
    timer = PhaseTimer()
    with timer.phase("data"):
        training, testing = _load_data(config, run_dir, ranks, console)
    examiner = make_examiner(config, testing, training, console)
    itself = identity(config, {"train": training.problems, "test": examiner.problems}, ranks)
    with timer.phase("load"):
        newest = ranks.first(lambda: newest_intact(run_dir / CHECKPOINTS, partial(_warn, console)))
    asked = (*training.problems, *examiner.problems)
    trainer = _make_trainer(config, training, testing, asked, newest, run_dir, ranks, timer, console)
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
    training = load_dataset(folder, config.data.train_split, on_bad_row=config.data.on_bad_row)
    testing = load_dataset(folder, config.data.test_split, on_bad_row=config.data.on_bad_row)
    for skipped in (*training.skipped, *testing.skipped):
        console.print(f"skipped: {skipped}", style="yellow", highlight=False)
    return training, testing


def _make_trainer(
    config: Config,
    training: MapData,
    testing: MapData,
    asked: Sequence[Problem],
    newest: str | None,
    run_dir: Path,
    ranks: Ranks,
    timer: PhaseTimer,
    console: Console,
) -> Trainer:
    """Policy, engine and trainer over the ranks, with the weights of the newest checkpoint if there is one."""
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    modes = {config.reward.mode, *(stage_reward(config.reward, stage).mode for stage in config.train.stages)}
    networks: dict[str, Networks] = {mode: networks_for(mode, training, testing) for mode in modes}
    curriculum = Curriculum(training.problems, config.train.stages, config.train.prompts_per_step, config.train.seed)
    sharded = needs_sharding(config.parallel, ranks, config.policy.dtype)
    if sharded and config.rollout.engine != "local":
        raise ConfigError(
            f"rollout.engine='{config.rollout.engine}' trains on one process, with parallel.compute_dtype unset and "
            "without parallel.offload: its weights are not pushed from shards yet"
        )
    settings = replace(config.policy, device="cpu") if sharded else config.policy  # split before they go to the GPU
    with timer.phase("load"):
        # Adapters lie beside the weights they began with.
        begin = newest is None or config.policy.lora_rank
        policy = initial_policy(config, settings) if begin else load_policy(str(newest), settings)
        initial = None
        if config.train.kl_coef and not config.policy.lora_rank:
            _reference_is_named(config)
            initial = initial_policy(config) if newest or sharded else policy
        reference = make_reference(policy, config, initial)
        prepare_policy(policy, config)
        forward = shard_policy(policy, config.parallel, ranks, pick_device(config.policy)) if sharded else None
    with timer.phase("servers"):
        engine = make_engine(config, policy, run_dir, asked, partial(console.print, highlight=False))
        engine = SharedRollouts(engine, ranks, policy.whole_weights) if sharded else engine
    try:
        return Trainer(
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
        )
    except BaseException:
        engine.close()
        raise


def _restore(trainer: Trainer, itself: Mapping[str, Any], newest: Path, console: Console) -> None:
    """Take over the rest of a checkpoint, and say what is no longer as it was."""
    state = load_training_state(newest, trainer.policy, trainer.optimizer)
    for line in changes(state["identity"], itself):
        _warn(console, f"changed since {newest.name}: {line}")
    trainer.load_state_dict(state)
    restore_random_state(state["random"])
    console.print(f"resuming after step {trainer.curriculum.step} of {trainer.curriculum.total_steps}", highlight=False)


def _warn(console: Console, line: str) -> None:
    console.print(line, style="yellow", highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class _Job:
    """What the loop works with."""

    trainer: Trainer
    examiner: Examiner
    checkpoints: Checkpoints
    log: MetricsLog
    identity: Mapping[str, Any]
    run_dir: Path
    out: Path
    """Where this rank's logs and answers go."""
    console: Console


def _train_loop(job: _Job) -> None:
    trainer, config, curriculum = job.trainer, job.trainer.config, job.trainer.curriculum
    first_rl = sum(stage.steps for stage in _leading_sft(config))
    accuracy: list[float] = []
    with stop_request() as stop, progress_bar(job.console) as bar:
        task = bar.add_task("train", total=curriculum.total_steps, completed=curriculum.step)
        while curriculum.step < curriculum.total_steps:
            if curriculum.step == first_rl and config.eval.before:
                with trainer.timer.phase("evaluate"):
                    _examine(trainer, job.examiner, "before", job.out, bar)
            row = trainer.train_step()
            accuracy += [row["accuracy"]] if "accuracy" in row else []
            seconds = trainer.timer.end_step()
            job.log.append(row | {"seconds": seconds, "speed": _speed(trainer, row, seconds)})
            bar.update(task, completed=curriculum.step, total=curriculum.total_steps, description=_describe(row))
            signal = trainer.ranks.most(stop.number)  # what one rank is asked all do
            due = curriculum.step % config.train.checkpoint_every == 0 or curriculum.stage_ended
            with trainer.timer.phase("checkpoint"):
                job.checkpoints.check()
                if due or signal or curriculum.step == curriculum.total_steps:
                    _save(job, row["stage"], accuracy)
                    accuracy.clear()
                if signal:
                    job.checkpoints.wait()
                    go_on = f"go on with: rewardmap train --resume {job.run_dir}"
                    raise Stopped(f"saved after step {curriculum.step}; {go_on}", signal)


def _speed(trainer: Trainer, row: Mapping[str, Any], seconds: Mapping[str, float]) -> dict[str, float]:
    config = trainer.config
    computes_in = getattr(torch, config.parallel.compute_dtype or config.policy.dtype)
    return speed(
        seconds,
        packed_tokens=row["packed_tokens"],
        logical_tokens=row["logical_tokens"],
        slots=row["micro_batches"] * config.train.max_tokens_per_micro_batch,
        flop=row["train_flop"],
        peak_flops=device_peak_flops(computes_in),
    )


def _save(job: _Job, stage: str, accuracy: Sequence[float]) -> None:
    score = sum(accuracy) / len(accuracy) if accuracy else None
    state = {"stage": stage, "score": score, "identity": job.identity, "random": random_state()}
    trainer = job.trainer
    job.checkpoints.save(trainer.curriculum.step, trainer.policy, trainer.optimizer, trainer.state_dict() | state)


def _close(trainer: Trainer, examiner: Examiner, run_dir: Path) -> None:
    """Evaluate the trained policy and write everything a person looks at."""
    config = trainer.config
    with trainer.timer.phase("evaluate"):
        after = _examine(trainer, examiner, "after", run_dir)
        text_only = examiner.examine_text_only(trainer.engine, _weights(trainer), run_dir / EVALUATION)
    if not trainer.ranks.is_first:
        return
    before = answers_before(run_dir, after)
    rows = read_metrics(run_dir)
    with trainer.timer.phase("report"):
        named = {"before": before, "after": after, "text_only": text_only}
        draw_curves(rows, {name: result for name, result in named.items() if result}, run_dir / "curves.png")
        draw_curriculum(rows, run_dir / "curriculum.png")
        if config.eval.samples:
            draw_samples(after, examiner.problems, run_dir / "samples", config.eval.samples, before)
    phases = _total_phases(rows, trainer.timer.totals)
    sampled = sum(row.get("rollout_tokens", 0) for row in rows)
    report = write_report(
        run_dir,
        after=after,
        before=before,
        text_only=text_only,
        prior=examiner.prior,
        seconds=sum(phases.values()),
        tokens_per_second=sampled / phases["rollout"] if sampled else None,
        phases=phases,
        peak_rss_bytes=peak_rss_bytes(),
        seed=config.train.seed,
        steps=trainer.version,
        console=examiner.console,
    )
    examiner.write_page(
        run_dir,
        f"rewardmap: {run_dir.name}",
        report,
        after,
        before,
        text_only,
        {"Training, and held-out accuracy": "curves.png", "What was trained when": "curriculum.png"},
    )


def _examine(trainer: Trainer, examiner: Examiner, name: str, run_dir: Path, bar: Progress | None = None) -> Evaluation:
    return examiner.examine(trainer.engine, _weights(trainer), name, run_dir / EVALUATION, bar)


def _weights(trainer: Trainer) -> str:
    """What identifies the weights within a run."""
    return f"step {trainer.version}"


def _total_phases(rows: Sequence[Mapping[str, Mapping[str, float]]], now: Mapping[str, float]) -> dict[str, float]:
    """Seconds by phase over all sittings of a run: those of logged steps, and this sitting's others."""
    logged: dict[str, float] = {}
    for row in rows:
        for phase, seconds in row["seconds"].items():
            logged[phase] = logged.get(phase, 0.0) + seconds
    return {**now, **{phase: max(seconds, now.get(phase, 0.0)) for phase, seconds in logged.items()}}


@contextmanager
def _own_folder(run_dir: Path, ranks: Ranks) -> Iterator[Path]:
    """Where this rank writes logs and answers: the run folder, or a passing copy of what is read back from it."""
    if ranks.is_first:
        ranks.wait()
        yield run_dir
        return
    with TemporaryDirectory(prefix="rewardmap-") as folder:
        if (run_dir / EVALUATION).is_dir():
            shutil.copytree(run_dir / EVALUATION, Path(folder) / EVALUATION)
        ranks.wait()
        yield Path(folder)


def _prepare_data(config: Config, run_dir: Path, console: Console) -> None:
    folder = data_folder(config, run_dir)
    if config.data.path is None and not folder.exists():
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


def _leading_sft(config: Config) -> list[StageConfig]:
    stages: list[StageConfig] = []
    for stage in config.train.stages:
        if stage.kind != "sft":
            break
        stages.append(stage)
    return stages


def initial_policy(config: Config, settings: PolicyConfig | None = None) -> Policy:
    """The policy before the first step: named weights, the shipped warm start, or a new tiny model."""
    sources = [stage.checkpoint for stage in config.train.stages if stage.checkpoint is not None]
    if len(sources) > 1 or (sources and config.train.stages[0].checkpoint is None):
        raise ConfigError("only the first stage may name a checkpoint")
    settings = settings or config.policy
    if sources:
        return load_policy(tiny.WARM_START if sources[0] == "shipped" else sources[0], settings)
    if config.policy.model == "tiny":
        return tiny.build_tiny(config.train.seed, config.policy.freeze_vision)
    return load_policy(config.policy.model, settings)


def _reference_is_named(config: Config) -> None:
    """Raises ConfigError where the KL term's reference would be weights that this run makes."""
    made = [stage.name for stage in config.train.stages if stage.kind == "sft" and stage.steps]
    if made:
        raise ConfigError(
            f"train.kl_coef keeps the policy near the weights the run begins with, but stage '{made[0]}' trains them "
            "first; run that stage alone and name its checkpoint as policy.model"
        )


def _describe(row: Mapping[str, object]) -> str:
    if "reward" in row:
        return f"{row['stage']}: reward {row['reward']:.2f}, right {row['accuracy']:.0%}"
    return f"{row['stage']}: loss {row['loss']:.3f}"
