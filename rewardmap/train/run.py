"""A whole run: data, policy, curriculum, evaluation before and after, report. Every part of it survives a kill."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.progress import Progress, TaskID

from rewardmap.config import Config, ConfigError
from rewardmap.config_file import load_config, to_dict, with_absolute_paths
from rewardmap.evaluate import Evaluation
from rewardmap.profiling import device_peak_flops, peak_rss_bytes, speed
from rewardmap.report import MetricsLog, draw_curriculum, draw_curves, draw_samples, read_metrics, write_report
from rewardmap.train.checkpoint import Checkpoints
from rewardmap.train.examine import CHECKPOINTS, EVALUATION, Examiner, answers_named, progress_bar
from rewardmap.train.faults import Stopped, interrupts_say, stop_request
from rewardmap.train.identity import random_state
from rewardmap.train.parallel import computes_in
from rewardmap.train.ranks import Ranks, restarted
from rewardmap.train.scoring import stage_rubric
from rewardmap.train.shared_pictures import share_pictures
from rewardmap.train.start import begin_folder, join, set_up
from rewardmap.train.trackers import need_trackers, open_trackers
from rewardmap.train.trainer import Trainer
from rewardmap.types import DataError

ALONG = "step-{:06}"
"""Of ``evaluation``: the held-out answers after a step of ``eval.every``."""
LOCK = ".lock"


def train(config: Config, run_dir: Path, *, console: Console) -> Path:
    """Run a configuration from its beginning in a new folder, on all ranks of the job; returns the folder.

    A job that its launcher restarted goes on with the run it began.

    Raises:
        ConfigError: the folder already holds a run, or the configuration cannot be run.
        DataError: the data set is empty or malformed.
        Stopped: a signal asked for it; a checkpoint was saved.
        RefusedUpdatesError: too many updates in a row were refused.
    """
    config = with_absolute_paths(config)
    with join(config) as ranks:
        run_dir = Path(ranks.gather(str(run_dir))[0])
        if restarted() and (run_dir / "config.toml").exists():
            return _run(load_config(run_dir / "config.toml"), run_dir, ranks, console)
        ranks.first(lambda: begin_folder(config, run_dir))
        return _run(config, run_dir, ranks, console, new=True)


def resume(run_dir: Path, *, console: Console) -> Path:
    """Go on after the newest intact checkpoint of a run, or from its beginning when there is none yet."""
    if not (run_dir / "config.toml").is_file():
        raise ConfigError(f"{run_dir} is not a run folder: it has no config.toml")
    config = load_config(run_dir / "config.toml")
    with join(config) as ranks:
        return _run(config, run_dir, ranks, console)


def _run(config: Config, run_dir: Path, ranks: Ranks, console: Console, new: bool = False) -> Path:
    """From where the newest intact checkpoint left it to the report. ``new``: the folder was made for this run."""
    if not ranks.is_first:
        console = Console(quiet=True)
    shared = share_pictures(ranks, config.policy.image_cache_bytes)
    with interrupts_say(_how_to_go_on(run_dir)), _alone_in(run_dir, ranks), shared as pictures:
        try:
            need_trackers(config.train.trackers)
            for stage in config.train.stages:  # what is wrong with one is said before maps are drawn
                stage_rubric(config, stage)
            trainer, examiner, itself = set_up(config, run_dir, console, ranks, pictures)
        except (ConfigError, DataError):
            if new and ranks.is_first:
                shutil.rmtree(run_dir, ignore_errors=True)  # nothing of a run that could not begin stays behind
            raise
        _train_and_close(trainer, examiner, itself, run_dir, ranks, console)
    console.print(f"run folder: {run_dir}", highlight=False, soft_wrap=True)
    return run_dir


def _how_to_go_on(run_dir: Path) -> str:
    return f"go on with: rewardmap train --resume {run_dir}"


@contextmanager
def _alone_in(run_dir: Path, ranks: Ranks) -> Iterator[None]:
    """No other job trains this run meanwhile. Raises ConfigError where one does."""
    held: list[int] = []

    def hold() -> None:
        # A file of its own: an editor that saves config.toml puts another, unlocked, in its place. NFS locks only what
        # may be written.
        held.append(os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o666))
        try:
            fcntl.flock(held[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{run_dir}: another process trains this run; wait for it or stop it") from None
        except OSError:
            pass  # a file system without locks

    try:
        ranks.first(hold)
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)


def _train_and_close(
    trainer: Trainer, examiner: Examiner, itself: Mapping[str, Any], run_dir: Path, ranks: Ranks, console: Console
) -> None:
    config = trainer.config
    try:
        writer = Checkpoints(run_dir / CHECKPOINTS, config.train.keep_checkpoints, config.train.keep_best, ranks)
        with _own_folder(run_dir, ranks) as out:  # what ranks other than the first write there is thrown away
            trackers = open_trackers(config.train.trackers, run_dir, to_dict(config)) if ranks.is_first else []
            with MetricsLog(out, trainer.step, trackers) as log, writer as checkpoints:
                job = _Job(trainer, examiner, checkpoints, log, itself, run_dir, out, console)
                for step in _asked_along(job):
                    if step > trainer.step:  # of weights that are gone, as the rows of those steps are
                        (out / EVALUATION / f"{ALONG.format(step)}.jsonl").unlink()
                _train_loop(job)
                after = _held_out(job, "after")
            _close(job, after)
    finally:
        trainer.engine.close()


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
    first_rl = _first_rl(config)
    with progress_bar(job.console) as bar:
        task = bar.add_task("train", total=curriculum.total_steps, completed=trainer.step)
        for pause in _pauses(config, first_rl, trainer.step, curriculum.total_steps):
            _make_steps(job, bar, task, pause)
            if trainer.step == pause < curriculum.total_steps:
                before = config.eval.before and pause == first_rl
                right = _held_out(job, "before" if before else ALONG.format(pause), bar).weighted_accuracy
                bar.console.print(f"step {pause}: {right:.1%} right on held-out maps, weighted", highlight=False)
        _make_steps(job, bar, task, curriculum.total_steps)


def _first_rl(config: Config) -> int:
    """Steps before reinforcement learning."""
    return sum(stage.steps for stage in takewhile(lambda stage: stage.kind == "sft", config.train.stages))


def _pauses(config: Config, first_rl: int, step: int, total: int) -> list[int]:
    """Steps from ``step`` on after which held-out questions are asked, the last one apart."""
    every = config.eval.every
    steps = {*(range(every, total, every) if every else ()), *([first_rl] if config.eval.before else ())}
    return sorted(one for one in steps if step <= one < total)


def _held_out(job: _Job, name: str, bar: Progress | None = None) -> Evaluation:
    trainer = job.trainer
    with trainer.timer.phase("evaluate"):
        found = job.examiner.examine(trainer.engine, _weights(job), name, job.out / EVALUATION, bar)
    numbers = {metric: found.estimate(metric).value for metric in ("weighted_accuracy", *found.groups)}
    job.log.held_out(trainer.step, numbers)
    return found


def _make_steps(job: _Job, bar: Progress, task: TaskID, end: int) -> None:
    """Train up to step ``end``, or to the curriculum's last where gates bring it before that, and save. A signal stops
    all ranks after the step in progress, saved."""
    trainer, curriculum = job.trainer, job.trainer.curriculum
    accuracy: list[float] = []

    def at_end() -> bool:
        return trainer.step >= min(end, curriculum.total_steps)

    with stop_request("stopping after the step in progress", bar.console.print) as stop:
        while not at_end():
            row = timed_step(trainer)
            accuracy += [row["accuracy"]] if "accuracy" in row else []
            job.log.append(row)
            bar.update(task, completed=trainer.step, total=curriculum.total_steps, description=_describe(row))
            signal = trainer.ranks.most(stop.number)  # what one rank is asked all do
            due = trainer.step % trainer.config.train.checkpoint_every == 0 or trainer.stage_ended
            with trainer.timer.phase("checkpoint"):
                job.checkpoints.check()
                if due or signal or at_end():
                    _save(job, row["stage"], accuracy)
                    accuracy.clear()
                if signal or at_end():
                    job.checkpoints.wait()
                    signal = trainer.ranks.most(stop.number)
                if signal:
                    raise Stopped(f"saved after step {trainer.step}; {_how_to_go_on(job.run_dir)}", signal)


def timed_step(trainer: Trainer) -> dict[str, Any]:
    """One step's row of metrics, with its ``seconds`` by phase and its ``speed`` (``profiling.speed``)."""
    row, config = trainer.train_step(), trainer.config
    seconds = trainer.timer.end_step()
    fast = speed(
        seconds,
        packed_tokens=row["packed_tokens"],
        logical_tokens=row["logical_tokens"],
        slots=row["micro_batches"] * config.train.max_tokens_per_micro_batch,
        flop=row["train_flop"],
        slowest_flop=row["slowest_flop"],
        model_flop=row["model_flop"],
        peak_flops=device_peak_flops(computes_in(config)),
    )
    return row | {"seconds": seconds, "speed": fast}


def _save(job: _Job, stage: str, accuracy: Sequence[float]) -> None:
    score = sum(accuracy) / len(accuracy) if accuracy else None
    state = {"stage": stage, "score": score, "identity": job.identity, "random": random_state()}
    trainer = job.trainer
    job.log.sync()
    job.checkpoints.save(trainer.step, trainer.policy, trainer.optimizer, trainer.state_dict() | state)


def _close(job: _Job, after: Evaluation) -> None:
    """Evaluate the trained policy once more with maps swapped, and write everything a person looks at."""
    trainer, examiner, run_dir, config = job.trainer, job.examiner, job.out, job.trainer.config
    with trainer.timer.phase("evaluate"):
        text_only = examiner.examine_text_only(trainer.engine, _weights(job), run_dir / EVALUATION)
    if not trainer.ranks.is_first:
        return
    before = answers_named("before", run_dir, after)
    rows = read_metrics(run_dir)
    along = _held_out_along(job, before, after)
    with trainer.timer.phase("report"):
        named = {"before": before, "after": after, "text_only": text_only}
        draw_curves(rows, {name: result for name, result in named.items() if result}, run_dir / "curves.png", along)
        draw_curriculum(rows, run_dir / "curriculum.png")
        if config.eval.samples:
            draw_samples(after, examiner.problems, run_dir / "samples", config.eval.samples, before)
    phases = _total_phases(rows, trainer.timer.end_step())
    sampled = 0 if config.rollout.staleness else sum(row.get("rollout_tokens", 0) for row in rows)
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
        steps=trainer.step,
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


def _held_out_along(job: _Job, before: Evaluation | None, after: Evaluation) -> dict[int, Evaluation]:
    """By step, where ``eval.every`` asked for more than both ends, in this sitting or one before."""
    last = job.trainer.step
    named = {step: answers_named(ALONG.format(step), job.out, after) for step in _asked_along(job) if step < last}
    between = {step: found for step, found in named.items() if found is not None}
    ends = ({_first_rl(job.trainer.config): before} if before else {}) | {last: after}
    return dict(sorted((between | ends).items())) if between else {}


def _asked_along(job: _Job) -> list[int]:
    """Steps after which held-out questions were asked."""
    names = [path.stem.removeprefix("step-") for path in (job.out / EVALUATION).glob("step-*.jsonl")]
    return [int(name) for name in names if name.isdecimal()]  # not a copy under a name of one's own


def _weights(job: _Job) -> str:
    """What identifies the weights within a run, which may go back to a checkpoint and on with other settings, or with
    other answers of its servers: the row of the step that made them."""
    trainer = job.trainer

    def digest() -> str:
        what = [{**to_dict(trainer.config), "eval": None}, read_metrics(job.run_dir)[-1:]]
        return hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=8).hexdigest()

    return f"step {trainer.version} {trainer.ranks.first(digest)}"


def _total_phases(rows: Sequence[Mapping[str, Mapping[str, float]]], since: Mapping[str, float]) -> dict[str, float]:
    """Seconds by phase over all sittings of a run: those of logged steps, and this sitting's ``since`` its last one."""
    total = dict(since)
    for row in rows:
        for phase, seconds in row["seconds"].items():
            total[phase] = total.get(phase, 0.0) + seconds
    return total


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


def _describe(row: Mapping[str, object]) -> str:
    if "reward" in row:
        return f"{row['stage']}: reward {row['reward']:.2f}, right {row['accuracy']:.0%}"
    return f"{row['stage']}: loss {row['loss']:.3f}"
