"""A whole run: data, policy, curriculum, evaluation before and after, report. Every part of it survives a kill."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from rewardmap import tiny
from rewardmap.config import Config, ConfigError, StageConfig, dump_toml, load_config
from rewardmap.curriculum import Curriculum
from rewardmap.evaluate import Evaluation, TextPrior, evaluate, swap_maps, text_prior
from rewardmap.files import write_text
from rewardmap.policy import Policy, load_policy
from rewardmap.profiling import PhaseTimer, peak_rss_bytes
from rewardmap.report import MetricsLog, draw_curves, draw_samples, read_metrics, write_report
from rewardmap.rewards import Rubric
from rewardmap.rollout.local import LocalEngine
from rewardmap.train.checkpoint import list_checkpoints, load_trainer_state, save_checkpoint
from rewardmap.train.trainer import Trainer
from rewardmap.transit.reasonmap import load_dataset, write_dataset
from rewardmap.types import DataError, MetroData, Problem, SamplingParams

CHECKPOINTS = "checkpoints"
EVALUATION = "evaluation"


def train(config: Config, run_dir: Path, *, console: Console) -> Path:
    """Run a configuration from its beginning in a new folder; returns the folder.

    Raises:
        ConfigError: the folder already holds a run, or the configuration cannot be run.
        DataError: the data set is empty or malformed.
        KeyboardInterrupt: after a checkpoint was saved.
    """
    if (run_dir / "config.toml").exists():
        remedy = f"resume it with --resume {run_dir}, or choose another --run-dir"
        raise ConfigError(f"{run_dir} already holds a run; {remedy}")
    if run_dir.exists() and any(run_dir.iterdir()):
        raise ConfigError(f"{run_dir} is not empty; choose another --run-dir")
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        write_text(run_dir / "config.toml", dump_toml(config))
        trainer, examiner = _set_up(config, run_dir, console)
    except (ConfigError, DataError):
        shutil.rmtree(run_dir)  # nothing of a run that could not begin stays behind
        raise
    return _run(trainer, examiner, run_dir, console)


def resume(run_dir: Path, *, console: Console) -> Path:
    """Go on after the newest complete checkpoint of a run, or from its beginning when there is none yet."""
    if not (run_dir / "config.toml").is_file():
        raise ConfigError(f"{run_dir} is not a run folder: it has no config.toml")
    trainer, examiner = _set_up(load_config(run_dir / "config.toml"), run_dir, console)
    return _run(trainer, examiner, run_dir, console)


def evaluate_run(run_dir: Path, data: Path | None, split: str | None, *, console: Console) -> Path:
    """Evaluate a run's newest checkpoint again and write the closing table into ``run_dir/eval-<split>``."""
    if not (run_dir / "config.toml").is_file():
        raise ConfigError(f"{run_dir} is not a run folder: it has no config.toml")
    config = load_config(run_dir / "config.toml")
    checkpoints = list_checkpoints(run_dir / CHECKPOINTS)
    if not checkpoints:
        raise ConfigError(f"{run_dir / CHECKPOINTS} holds no complete checkpoint; train or resume the run first")
    split = split or config.data.test_split
    folder = data or _data_folder(config, run_dir)
    loaded = load_dataset(folder, split, on_bad_row=config.data.on_bad_row)
    seen = loaded if data else load_dataset(folder, config.data.train_split, on_bad_row=config.data.on_bad_row)
    problems = _first(loaded.problems, config.eval.max_problems)
    examiner = _Examiner(config, problems, seen.problems, {**seen.networks, **loaded.networks}, console)
    out = run_dir / f"eval-{split}" if data is None else run_dir / f"eval-{data.resolve().name}-{split}"
    timer = PhaseTimer()
    policy = load_policy(checkpoints[-1], config.policy)
    with timer.phase("evaluate"):
        after = examiner.examine(policy, "after", out)
    with timer.phase("evaluate, maps swapped"):
        text_only = examiner.examine_text_only(policy, out)
    write_report(
        out,
        after=after,
        before=_answers_before(run_dir, after),
        text_only=text_only,
        prior=examiner.prior(),
        seconds=sum(timer.totals.values()),
        tokens_per_second=after.num_tokens / timer.totals["evaluate"],
        phases=timer.totals,
        peak_rss_bytes=peak_rss_bytes(),
        seed=config.train.seed,
        steps=int(checkpoints[-1].name.removeprefix("step-")),
        console=console,
    )
    return out


def _set_up(config: Config, run_dir: Path, console: Console) -> tuple[Trainer, _Examiner]:
    """Data, policy and trainer, as the newest checkpoint left them."""
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    timer = PhaseTimer()
    with timer.phase("data"):
        folder = _prepare_data(config, run_dir, console)
        training = load_dataset(folder, config.data.train_split, on_bad_row=config.data.on_bad_row)
        testing = load_dataset(folder, config.data.test_split, on_bad_row=config.data.on_bad_row)
        for skipped in (*training.skipped, *testing.skipped):
            console.print(f"skipped: {skipped}", style="yellow", highlight=False)
    networks = {**training.networks, **testing.networks}
    problems = _first(testing.problems, config.eval.max_problems)
    examiner = _Examiner(config, problems, training.problems, networks, console)
    curriculum = Curriculum(training.problems, config.train.stages, config.train.prompts_per_step, config.train.seed)
    checkpoints = list_checkpoints(run_dir / CHECKPOINTS)
    with timer.phase("load"):
        policy = load_policy(checkpoints[-1], config.policy) if checkpoints else _initial_policy(config)
    engine = LocalEngine(policy, config.rollout.batch_sequences)
    rubric = Rubric(mode=config.reward.mode, weight_on=config.reward.weight_on)
    trainer = Trainer(config, policy, engine, rubric, networks, curriculum, timer)
    if checkpoints:
        trainer.load_state_dict(load_trainer_state(checkpoints[-1], trainer.optimizer))
        console.print(f"resuming after step {curriculum.step} of {curriculum.total_steps}", highlight=False)
    return trainer, examiner


def _run(trainer: Trainer, examiner: _Examiner, run_dir: Path, console: Console) -> Path:
    with MetricsLog(run_dir, last_step=trainer.curriculum.step) as log:
        _train_loop(trainer, log, examiner, run_dir, console)
    _close(trainer, examiner, run_dir)
    console.print(f"run folder: {run_dir}", highlight=False)
    return run_dir


def _train_loop(trainer: Trainer, log: MetricsLog, examiner: _Examiner, run_dir: Path, console: Console) -> None:
    config, curriculum = trainer.config, trainer.curriculum
    first_rl = sum(stage.steps for stage in _leading_sft(config))
    with _stop_request() as stop, _progress(console) as bar:
        task = bar.add_task("train", total=curriculum.total_steps, completed=curriculum.step)
        while curriculum.step < curriculum.total_steps:
            if curriculum.step == first_rl and config.eval.before:
                with trainer.timer.phase("evaluate"):
                    examiner.examine(trainer.policy, "before", run_dir / EVALUATION, bar)
            row = trainer.train_step()
            log.append(row | {"seconds": trainer.timer.end_step()})
            bar.update(task, completed=curriculum.step, description=_describe(row))
            stage_ends = curriculum.position(curriculum.step).step_in_stage == 0
            due = curriculum.step % config.train.checkpoint_every == 0 or stage_ends
            if due or stop.requested or curriculum.step == curriculum.total_steps:
                with trainer.timer.phase("checkpoint"):
                    save_checkpoint(
                        run_dir / CHECKPOINTS,
                        curriculum.step,
                        trainer.policy,
                        trainer.optimizer,
                        trainer.state_dict(),
                        config.train.keep_checkpoints,
                    )
            if stop.requested:
                raise KeyboardInterrupt(
                    f"saved after step {curriculum.step}; go on with: rewardmap train --resume {run_dir}"
                )


def _close(trainer: Trainer, examiner: _Examiner, run_dir: Path) -> None:
    """Evaluate the trained policy and write everything a person looks at."""
    config = trainer.config
    with trainer.timer.phase("evaluate"):
        after = examiner.examine(trainer.policy, "after", run_dir / EVALUATION)
        text_only = examiner.examine_text_only(trainer.policy, run_dir / EVALUATION)
    before = _answers_before(run_dir, after)
    rows = read_metrics(run_dir)
    with trainer.timer.phase("report"):
        named = {"before": before, "after": after, "text_only": text_only}
        draw_curves(rows, {name: result for name, result in named.items() if result}, run_dir / "curves.png")
        if config.eval.samples:
            draw_samples(after, examiner.problems, run_dir / "samples", config.eval.samples, before)
    phases = _total_phases(rows, trainer.timer.totals)
    sampled = sum(row.get("rollout_tokens", 0) for row in rows)
    write_report(
        run_dir,
        after=after,
        before=before,
        text_only=text_only,
        prior=examiner.prior(),
        seconds=sum(phases.values()),
        tokens_per_second=sampled / phases["rollout"] if sampled else None,
        phases=phases,
        peak_rss_bytes=peak_rss_bytes(),
        seed=config.train.seed,
        steps=trainer.version,
        console=examiner.console,
    )


def _answers_before(run_dir: Path, after: Evaluation) -> Evaluation | None:
    """The warm start's answers, if there are any to the same questions."""
    path = run_dir / EVALUATION / "before.jsonl"
    if not path.is_file():
        return None
    before = Evaluation.from_jsonl(path)
    same = [record.uid for record in before.records] == [record.uid for record in after.records]
    return before if same else None


def _total_phases(rows: Sequence[Mapping[str, Mapping[str, float]]], now: Mapping[str, float]) -> dict[str, float]:
    """Seconds by phase over all sittings of a run: those of logged steps, and this sitting's others."""
    logged: dict[str, float] = {}
    for row in rows:
        for phase, seconds in row["seconds"].items():
            logged[phase] = logged.get(phase, 0.0) + seconds
    return {**now, **{phase: max(seconds, now.get(phase, 0.0)) for phase, seconds in logged.items()}}


@dataclass
class _Examiner:
    """Greedy evaluation of a policy on the held-out problems."""

    config: Config
    problems: Sequence[Problem]
    seen: Sequence[Problem]
    """Problems that the text-only prior is fitted on."""
    networks: Mapping[str, MetroData]
    console: Console

    @property
    def rubric(self) -> Rubric:
        return Rubric(mode=self.config.reward.mode)

    def prior(self) -> TextPrior:
        """What the best answers that ignore the picture score."""
        return text_prior(self.seen, self.problems, self.networks, self.rubric)

    def examine_text_only(self, policy: Policy, out: Path) -> Evaluation | None:
        """Every question with another map's picture; None where the configuration or a lone map rules it out."""
        if not self.config.eval.text_only or len({problem.network_id for problem in self.problems}) < 2:
            return None
        swapped = replace(self, problems=swap_maps(self.problems, self.config.train.seed))
        return swapped.examine(policy, "text_only", out)

    def examine(self, policy: Policy, name: str, out: Path, bar: Progress | None = None) -> Evaluation:
        """Answer every held-out problem and write ``out/name.jsonl``."""
        rollout, problems = self.config.rollout, self.problems
        sampling = SamplingParams(temperature=0.0, max_new_tokens=rollout.max_new_tokens)
        engine = LocalEngine(policy, rollout.batch_sequences)
        own = bar is None
        bar = bar or _progress(self.console)
        if own:
            bar.start()
        task = bar.add_task(f"evaluate: {name}", total=len(problems))
        try:
            result = evaluate(
                engine,
                problems,
                self.networks,
                self.rubric,
                sampling,
                lambda done, _: bar.update(task, completed=done),
            )
        finally:
            if own:
                bar.stop()
        result.to_jsonl(out / f"{name}.jsonl")
        return result


def _prepare_data(config: Config, run_dir: Path, console: Console) -> Path:
    folder = _data_folder(config, run_dir)
    if config.data.path is None and not folder.exists():
        with _progress(console) as bar:
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
    return folder


def _data_folder(config: Config, run_dir: Path) -> Path:
    if config.data.path is None:
        return run_dir / "data"
    folder = Path(config.data.path)
    if not folder.is_dir():
        raise DataError(
            f"data.path='{folder}': no such folder; give a ReasonMap-Train folder, or leave it out to generate one"
        )
    return folder


def _leading_sft(config: Config) -> list[StageConfig]:
    stages: list[StageConfig] = []
    for stage in config.train.stages:
        if stage.kind != "sft":
            break
        stages.append(stage)
    return stages


def _initial_policy(config: Config) -> Policy:
    """The policy before the first step: named weights, the shipped warm start, or a new tiny model."""
    sources = [stage.checkpoint for stage in config.train.stages if stage.checkpoint is not None]
    if len(sources) > 1 or (sources and config.train.stages[0].checkpoint is None):
        raise ConfigError("only the first stage may name a checkpoint")
    if sources:
        return load_policy(tiny.WARM_START if sources[0] == "shipped" else sources[0], config.policy)
    if config.policy.model == "tiny":
        return tiny.build_tiny(config.train.seed, config.policy.freeze_vision)
    return load_policy(config.policy.model, config.policy)


def _first(problems: Sequence[Problem], count: int) -> Sequence[Problem]:
    return problems[:count] if count else problems


def _describe(row: Mapping[str, object]) -> str:
    if "reward" in row:
        return f"{row['stage']}: reward {row['reward']:.2f}, right {row['accuracy']:.0%}"
    return f"{row['stage']}: loss {row['loss']:.3f}"


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<48}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


@dataclass
class _StopRequest:
    requested: bool = False


@contextmanager
def _stop_request() -> Iterator[_StopRequest]:
    """Ctrl-C and SIGTERM ask for a stop after the step in progress; a second one stops at once."""
    stop = _StopRequest()

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
