"""Held-out evaluation: of the policy in a run, and of what ``rewardmap eval`` names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from rewardmap.config import Config, ConfigError
from rewardmap.config_file import load_config
from rewardmap.evaluate import (
    Answer,
    AnswerStore,
    Evaluation,
    Judge,
    TextPrior,
    ask,
    digest_folder,
    read_responses,
    swap_maps,
    text_prior,
)
from rewardmap.evaluate.reading import Normaliser
from rewardmap.policy import load_policy
from rewardmap.profiling import PhaseTimer, peak_rss_bytes
from rewardmap.report import write_page, write_report
from rewardmap.rewards import Networks, Rubric
from rewardmap.rollout.engine import RolloutEngine
from rewardmap.train.checkpoint import find_damage, list_checkpoints
from rewardmap.train.engines import attach, make_engine, need_client, need_engine
from rewardmap.train.faults import interrupts_say
from rewardmap.transit.reasonmap import MapData, data_root, load_dataset
from rewardmap.types import DataError, Problem, SamplingParams

CHECKPOINTS = "checkpoints"
EVALUATION = "evaluation"
ANSWERS = "answers.jsonl"


@dataclass
class Examiner:
    """Greedy evaluation on the held-out problems. Raises what ``Judge.check`` raises before anything is asked."""

    config: Config
    problems: Sequence[Problem]
    seen: Sequence[Problem]
    """Problems that the text-only prior is fitted on; none: no prior."""
    networks: Networks
    """Flat lists, which the published rules read."""
    topologies: Networks
    console: Console
    judge: Judge = field(default_factory=Judge)

    def __post_init__(self) -> None:
        self.judge.check(self.problems, self.networks)

    @cached_property
    def prior(self) -> TextPrior | None:
        """What the best answers that ignore the picture score."""
        return text_prior(self.seen, self.problems, self.networks, Rubric()) if self.seen else None

    def examine_text_only(self, engine: RolloutEngine, model: str, out: Path) -> Evaluation | None:
        """Every question with another map's picture; None where the configuration or a lone map rules it out."""
        if not self.config.eval.text_only or len({problem.network_id for problem in self.problems}) < 2:
            return None
        swapped = replace(self, problems=swap_maps(self.problems, self.config.train.seed))
        return swapped.examine(engine, model, "text_only", out)

    def examine(
        self, engine: RolloutEngine, model: str, name: str, out: Path, bar: Progress | None = None
    ) -> Evaluation:
        """Answer every held-out problem and write ``out/name.jsonl``; answers given before are not asked for again.

        Args:
            model: what identifies the weights within ``out``.
            bar: where progress is shown meanwhile; None: in one of its own.
        """
        sampling = SamplingParams(temperature=0.0, max_new_tokens=self.config.rollout.max_new_tokens)
        policy = self.config.policy
        store = AnswerStore(out / ANSWERS, f"{model} {policy.dtype} {policy.min_pixels} {policy.max_pixels}")
        with progress_bar(self.console) if bar is None else nullcontext(bar) as shown:
            task = shown.add_task(f"evaluate: {name}", total=len(self.problems))
            answers = ask(engine, self.problems, sampling, store, lambda done, _: shown.update(task, completed=done))
            if bar is not None:
                shown.remove_task(task)
        return self.evaluation(answers, name, out)

    def write_page(
        self,
        out: Path,
        title: str,
        report: Mapping[str, Any],
        after: Evaluation,
        before: Evaluation | None = None,
        text_only: Evaluation | None = None,
        pictures: Mapping[str, str] | None = None,
    ) -> None:
        """Write ``out/report.html``; ``pictures``: caption -> file in ``out``, left out where there is none."""
        files = {caption: out / name for caption, name in (pictures or {}).items() if (out / name).is_file()}
        write_page(
            out / "report.html",
            title=title,
            report=report,
            after=after,
            before=before,
            text_only=text_only,
            prior=self.prior,
            problems=self.problems,
            topologies=self.topologies,
            pictures=files,
            samples=self.config.eval.samples,
        )

    def evaluation(self, answers: Sequence[Answer], name: str, out: Path) -> Evaluation:
        """Judge answers and write ``out/name.jsonl``."""
        result = self.judge.evaluation(self.problems, answers, self.networks, self.topologies)
        result.to_jsonl(out / f"{name}.jsonl")
        return result


def make_examiner(
    config: Config, testing: MapData, seen: MapData | None, console: Console, judge: Judge | None = None
) -> Examiner:
    """An examiner of the first ``eval.max_problems`` problems (0: all) of a split.

    Without a judge that of a run: training's normaliser, and map scores where the data has the routes for them.
    """
    count = config.eval.max_problems
    problems = testing.problems[:count] if count else testing.problems
    routes = all(problem.fine_grained_answer for problem in problems if problem.kind == "planning")
    data = [testing] if seen is None else [testing, seen]
    return Examiner(
        config,
        problems,
        [] if seen is None else seen.problems,
        networks_for("reference", *data),
        networks_for("graph", testing),
        console,
        judge or Judge(map_scores=routes),
    )


def networks_for(mode: str, *splits: MapData) -> Networks:
    """What answers are scored on: the flat lists as published or, for ``graph``, networks that know branches and
    rings."""
    names = {name: split for split in splits for name in split.networks}
    return {name: split.topology(name) if mode == "graph" else split.networks[name] for name, split in names.items()}


def answers_named(name: str, run_dir: Path, after: Evaluation) -> Evaluation | None:
    """A run's earlier answers, such as ``before``, if there are any to the same questions."""
    path = run_dir / EVALUATION / f"{name}.jsonl"
    if not path.is_file():
        return None
    found = Evaluation.from_jsonl(path)
    same = [(record.uid, record.weight) for record in found.records] == [(r.uid, r.weight) for r in after.records]
    return found if same else None


@dataclass(frozen=True)
class EvalRequest:
    """What ``rewardmap eval`` was asked to do."""

    target: str | None
    """A run folder, a folder of weights, or the URL of an SGLang server; with ``responses`` a run folder or None."""
    responses: Path | None = None
    """A file of answers to judge instead of asking a model."""
    data: Path | None = None
    """None: the run's own data."""
    split: str | None = None
    questions: Literal["short", "long"] = "short"
    normaliser: Normaliser | None = None
    """None: ``training`` for a run folder, as in its closing table; else ``evaluation``."""
    extraction: Literal["published", "lenient"] = "published"
    map_scores: bool = True
    out: Path | None = None
    settings: Sequence[str] = ()
    """``key=value`` overrides of the run's configuration, or of the defaults with 2,048 new tokens."""


def evaluate_target(request: EvalRequest, console: Console) -> Path:
    """Evaluate a run's newest checkpoint, a folder of weights, a server or a file of responses; returns the folder
    with the tables.

    Raises:
        ConfigError: a target that is none of these, or options that do not go with it.
        DataError: an unknown split, missing annotation, a response file that does not match: before anything runs.
    """
    run_dir = _run_folder(request)
    if run_dir:
        config = load_config(run_dir / "config.toml", request.settings)
    else:
        config = load_config(None, ["rollout.max_new_tokens=2048", *request.settings])
    if not request.responses:
        need_client() if _is_url(request) else need_engine(config)
    split = request.split or (config.data.test_split if run_dir else "test")
    testing, seen, folder = _load(request, config, run_dir, split)
    judge = Judge(
        normaliser=request.normaliser or ("training" if run_dir else "evaluation"),
        extraction=request.extraction,
        map_scores=request.map_scores,
    )
    examiner = make_examiner(config, testing, seen, console, judge)
    out = request.out or _default_out(request, run_dir, folder, split)
    timer, text_only, steps = PhaseTimer(), None, None
    if request.responses:
        with timer.phase("judge"):
            after = examiner.evaluation(read_responses(request.responses, examiner.problems), "after", out)
    else:
        checkpoint = newest_checkpoint(run_dir) if run_dir else Path(str(request.target))
        engine, model = _engine(request, checkpoint, config, examiner, out)
        try:
            with interrupts_say(f"answers so far are kept in {out}; the same command goes on"):
                with timer.phase("evaluate"):
                    after = examiner.examine(engine, model, "after", out)
                if run_dir:
                    steps = int(checkpoint.name.removeprefix("step-"))
                    with timer.phase("evaluate, maps swapped"):
                        text_only = examiner.examine_text_only(engine, model, out)
        finally:
            engine.close()
    before = answers_named("before", run_dir, after) if run_dir else None
    report = write_report(
        out,
        after=after,
        before=before,
        text_only=text_only,
        prior=examiner.prior,
        seconds=sum(timer.totals.values()),
        tokens_per_second=None,  # answers may have been kept from an earlier call
        phases=timer.totals,
        peak_rss_bytes=peak_rss_bytes(),
        seed=config.train.seed if run_dir else None,
        steps=steps,
        console=console,
    )
    examiner.write_page(out, f"rewardmap: {out.name}", report, after, before, text_only)
    console.print(f"report: {out / 'report.html'}", highlight=False, soft_wrap=True)
    return out


def _run_folder(request: EvalRequest) -> Path | None:
    """The run that the target names, None for other targets. Raises ConfigError for what is no target at all."""
    if request.responses is not None and not request.responses.is_file():
        raise ConfigError(f"--responses {request.responses}: no such file")
    if request.target is None:
        if request.responses is None:
            raise ConfigError("name a run folder, a folder of weights or a server's URL, or give --responses FILE")
        return None
    target = Path(request.target)
    if (target / "config.toml").is_file():
        return target
    if request.responses is not None:
        raise ConfigError(f"{target}: beside --responses only a run folder, for its data; or give --data instead")
    if _is_url(request) or (target / "config.json").is_file():
        return None
    if not target.exists():
        raise ConfigError(f"{target}: no such run folder or folder of weights; a file of answers goes to --responses")
    raise ConfigError(f"{target} is not a run folder: it has no config.toml; nor weights: it has no config.json")


def _is_url(request: EvalRequest) -> bool:
    return (request.target or "").startswith(("http://", "https://"))


def newest_checkpoint(run_dir: Path) -> Path:
    """Raises ConfigError where a run has no complete checkpoint, DataError where the newest is damaged."""
    checkpoints = list_checkpoints(run_dir / CHECKPOINTS)
    if not checkpoints:
        raise ConfigError(f"{run_dir / CHECKPOINTS} holds no complete checkpoint; train or resume the run first")
    damage = find_damage(checkpoints[-1], training=False)
    if damage:
        raise DataError(f"{checkpoints[-1]}: {damage}; resume the run, which goes back to the checkpoint before")
    return checkpoints[-1]


def _load(
    request: EvalRequest, config: Config, run_dir: Path | None, split: str
) -> tuple[MapData, MapData | None, Path]:
    """The split to evaluate, a run's training split, and their folder."""
    if request.data is None and run_dir is None:
        raise ConfigError("say what data to evaluate on with --data FOLDER")
    folder = request.data or data_folder(config, run_dir)
    bad_row = config.data.on_bad_row
    testing = load_dataset(folder, split, planning_question=request.questions, on_bad_row=bad_row)
    if run_dir is None:
        return testing, None, folder
    seen = testing if request.data else load_dataset(folder, config.data.train_split, on_bad_row=bad_row)
    return testing, seen, folder


def data_folder(config: Config, run_dir: Path | None) -> Path:
    """Where a run's data is; what is on the hub is fetched. Raises DataError for a folder that is not there."""
    if config.data.path is None:
        assert run_dir is not None
        return run_dir / "data"
    folder = data_root(config.data.path)
    if not folder.is_dir():
        raise DataError(
            f"data.path='{folder}': no such folder ({folder.absolute()}); give a ReasonMap-Train folder, from the "
            "working directory, or leave it out to generate one"
        )
    return folder


def _default_out(request: EvalRequest, run_dir: Path | None, folder: Path, split: str) -> Path:
    where = split if request.data is None else f"{folder.resolve().name}-{split}"
    if request.responses:
        return request.responses.with_name(f"{request.responses.stem}-eval-{where}")
    if run_dir:
        return run_dir / f"eval-{where}"
    name = str(request.target).split("://")[-1] if _is_url(request) else Path(str(request.target)).resolve().name
    return Path("runs") / f"eval-{re.sub(r'[^A-Za-z0-9.]+', '-', name).strip('-')}-{where}"


def _engine(
    request: EvalRequest, checkpoint: Path, config: Config, examiner: Examiner, out: Path
) -> tuple[RolloutEngine, str]:
    """The engine that answers, and what identifies its weights."""
    if _is_url(request):
        return attach(config, str(request.target), examiner.problems)
    if config.policy.lora_rank:  # the checkpoint holds the weights with the adapters multiplied in
        server = replace(config.rollout.server, lora_sync="merged")
        config = replace(
            config,
            policy=replace(config.policy, lora_rank=0),
            rollout=replace(config.rollout, server=server),
        )
    policy = load_policy(checkpoint, config.policy)
    show = partial(examiner.console.print, highlight=False, soft_wrap=True)
    return make_engine(config, policy, out, examiner.problems, show), digest_folder(checkpoint)


def progress_bar(console: Console) -> Progress:
    """The bar of long work."""
    return Progress(
        TextColumn("{task.description:<48}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
