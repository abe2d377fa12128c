"""The command line: ``rewardmap train | plan | profile | eval | serve | generate | show | score``.

Heavy imports wait until a command runs, so that ``--help`` is quick. Mistakes and failures end as ``rewardmap.exits``
says; ``--debug`` shows the traceback.
"""

from __future__ import annotations

import io
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, TypeVar

import typer

import rewardmap
from rewardmap.exits import errors

app = typer.Typer(
    help="Teach vision-language models to read maps by reinforcement learning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Name = TypeVar("Name", bound=str)
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def main() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not where it is closed
            stream.reconfigure(errors="replace")  # no work is lost to a sign that the terminal's encoding lacks
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rewardmap {rewardmap.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version.")
    ] = False,
) -> None:
    """Options before the command."""


@app.command()
def train(
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CONFIG KEY=VALUE",
            help="A TOML file or the name of a shipped one (default: tiny), then what overrides it: settings such as "
            "train.seed=3, and further TOML files.",
        ),
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Folder for the run. Default: runs/<config>-<date and time>.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Go on with a stopped run in its folder RUN.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Train a policy, evaluate it before and after, and write a run folder."""
    with errors(debug, again="go on with --resume, or begin elsewhere with --run-dir"):
        from rich.console import Console

        from rewardmap.config import ConfigError
        from rewardmap.config_file import load_config

        if resume is not None and (settings or run_dir):
            raise ConfigError("--resume goes on with the run's own config.toml; give no configuration beside it")
        source, overrides = _source(settings or [])
        config = None if resume else load_config(source, overrides)

        from rewardmap.train import run

        _quiet()
        console = Console()
        if config is None:
            assert resume is not None
            run.resume(resume, console=console)
        else:
            run.train(config, run_dir or _dated(Path(source).stem), console=console)


@app.command()
def plan(
    settings: Annotated[
        list[str], typer.Argument(metavar="CONFIG KEY=VALUE", help="As for train; policy.model names the weights.")
    ],
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of a node.")] = 8,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes.")] = 1,
    gpu: Annotated[str, typer.Option(help="H100, H200 or A100.")] = "H100",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of a question with its map.")] = 6_000,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 500,
    debug: Debug = False,
) -> None:
    """Say what a configuration needs per GPU and about how long a step takes; an error where it cannot fit."""
    with errors(debug):
        from rewardmap.config_file import load_config
        from rewardmap.train import plan as planning

        _one_of("--gpu", gpu, tuple(planning.DEVICES))
        config = load_config(settings[0], settings[1:])
        work = planning.Workload(prompt_tokens, answer_tokens)
        found = planning.plan(config, planning.shapes_of(config), gpus * nodes, gpu, work, nodes)
        typer.echo(planning.table(found, gpus * nodes, gpu))


@app.command()
def profile(
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="CONFIG KEY=VALUE", help="As for train (default: tiny).")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps to record, after one that warms up.")] = 3,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A new folder. Default: runs/profile-<date and time>.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Record the first steps of a run: a trace, a table of where their time goes, a roofline picture."""
    with errors(debug):
        from rich.console import Console

        from rewardmap.config_file import load_config

        source, overrides = _source(settings or [])
        config = load_config(source, overrides)

        from rewardmap.train.profile import profile as record

        _quiet()
        record(config, out or _dated("profile"), steps=steps, console=Console())


@app.command("eval")
def evaluate(
    target: Annotated[
        str | None,
        typer.Argument(metavar="TARGET", help="A run folder, a folder of weights, or the URL of an SGLang server."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings that override the run's, such as eval.max_problems=100."),
    ] = None,
    responses: Annotated[
        Path | None,
        typer.Option(metavar="FILE.jsonl", help="Judge these answers ('uid' and 'response' a line); asks no model."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="A ReasonMap, -Plus or -Train folder, or hf://datasets/OWNER/NAME. Default: the run's own data.",
        ),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Default: the run's test split, else test.")] = None,
    questions: Annotated[str, typer.Option(help="ReasonMap's planning questions: short or long.")] = "short",
    normaliser: Annotated[
        str | None,
        typer.Option(
            help="Names in routes read as the training reward does (training; default for a run), or as "
            "ReasonMap's evaluation does, stricter (evaluation; default else)."
        ),
    ] = None,
    extraction: Annotated[
        str, typer.Option(help="Short answers read as published, or lenient as VLMEvalKit does.")
    ] = "published",
    map_scores: Annotated[bool, typer.Option(help="Routes get ReasonMap's map score.")] = True,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for tables and answers.")] = None,
    debug: Debug = False,
) -> None:
    """Evaluate a run, weights, a server or a file of answers as ReasonMap and ReasonMap-Plus do."""
    with errors(debug):
        from rich.console import Console

        if target is not None and "=" in target and not Path(target).exists():
            settings, target = [target, *(settings or [])], None
        request = {
            "questions": _one_of("--questions", questions, ("short", "long")),
            "normaliser": normaliser and _one_of("--normaliser", normaliser, ("training", "evaluation")),
            "extraction": _one_of("--extraction", extraction, ("published", "lenient")),
        }

        from rewardmap.train.examine import EvalRequest, evaluate_target
        from rewardmap.transit.reasonmap import data_root

        _quiet()
        evaluate_target(
            EvalRequest(
                target=target,
                responses=responses,
                data=None if data is None else data_root(data),
                split=split,
                map_scores=map_scores,
                out=out,
                settings=settings or [],
                **request,  # type: ignore[arg-type]
            ),
            Console(),
        )


@app.command()
def serve(
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CONFIG KEY=VALUE",
            help="As for train (default: tiny); for example rollout.server.replicas=2.",
        ),
    ] = None,
    folder: Annotated[
        Path, typer.Option(help="For keys, logs and the weights; called again, the keys stay the same.")
    ] = Path("servers"),
    debug: Debug = False,
) -> None:
    """Start a configuration's SGLang servers alone, until Ctrl-C."""
    with errors(debug):
        from rich.console import Console

        from rewardmap.config_file import load_config

        config = load_config(*_source(settings or []))

        from rewardmap.train.serve import serve as start

        _quiet()
        start(config, folder, console=Console())


@app.command()
def generate(
    out: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that does not exist yet.")],
    maps: Annotated[int, typer.Option(min=2, help="Maps in all, a third of each difficulty.")] = 30,
    test_maps: Annotated[
        int | None, typer.Option(min=1, help="How many of them are held out. Default: two fifths, as published.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same data set.")] = 0,
    level: Annotated[
        str, typer.Option(help="The maps: full, or tiny for the small policy; grid, grid-tiny: a world without trains.")
    ] = "full",
    form: Annotated[
        str, typer.Option(help="ReasonMap-Train (all questions), ReasonMap (planning) or ReasonMap-Plus (the others).")
    ] = "ReasonMap-Train",
    debug: Debug = False,
) -> None:
    """Draw maps and write a data set in ReasonMap's, ReasonMap-Plus's or ReasonMap-Train's form."""
    with errors(debug, user_errors=(ValueError,)):
        from rich.progress import Progress

        from rewardmap.transit import write_dataset

        held_out = test_maps or max(1, 3 * round(maps * 2 / 15))  # the levels take turns: a multiple of three
        if held_out >= maps:
            raise ValueError(f"--test-maps {held_out} leaves no maps to train on; draw more than --maps {maps}")
        with Progress(transient=True) as bar:
            task = bar.add_task("draw maps", total=maps)
            write_dataset(
                out,
                maps={"train": maps - held_out, "test": held_out},
                preset=level,
                seed=seed,
                form=form,  # type: ignore[arg-type]
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        typer.echo(f"data set: {out}")


@app.command()
def show(
    picked: Annotated[
        Path, typer.Argument(metavar="MAP", help="A map of a generated data folder: DIR/maps/COUNTRY/CITY.png.")
    ],
    route: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="START GOAL", help="Lay the best route between two stations over it."),
    ] = None,
    question: Annotated[str | None, typer.Option(metavar="UID", help="Lay a question and its steps over it.")] = None,
    answer: Annotated[
        str | None, typer.Option(metavar="TEXT|FILE", help="Lay a planning answer over it and say what is wrong.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="PNG", help="Where the picture goes.")] = Path("map.png"),
    debug: Debug = False,
) -> None:
    """Draw a map with a route, a question or an answer laid over it."""
    with errors(debug):
        from rewardmap import show as shown
        from rewardmap.config import ConfigError
        from rewardmap.files import replacing

        if sum(option is not None for option in (route, question, answer)) > 1:
            raise ConfigError("give one of --route, --question and --answer")
        picture = shown.show(picked, route=route, question=question, answer=answer)
        with replacing(out) as file:
            picture.save(file, format="PNG")
        typer.echo(f"picture: {out}")


@app.command()
def score(
    answers: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="Rows of a data set, each with its 'response'.")],
    mode: Annotated[str, typer.Option(help="reference, paper or graph.")] = "reference",
    out: Annotated[Path | None, typer.Option(metavar="OUT.jsonl", help="The same rows with their scores.")] = None,
    stations: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the rows' stations files are looked for first.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Score answers in a file and print a summary by kind."""
    with errors(debug):
        from rewardmap.rewards.rubric import MODES
        from rewardmap.rewards.score_file import score_file

        typer.echo(score_file(answers, out, _one_of("--mode", mode, MODES), stations).table())


def _source(settings: list[str]) -> tuple[str, list[str]]:
    """The configuration that is named, or ``tiny``, and the settings that override it."""
    named = bool(settings) and ("=" not in settings[0] or Path(settings[0]).is_file())
    return (settings[0], settings[1:]) if named else ("tiny", settings)


def _dated(name: str) -> Path:
    """The default folder of what is begun now."""
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def _one_of(option: str, value: str, known: tuple[Name, ...]) -> Name:
    """The known name that ``value`` is. Raises ConfigError where it is none."""
    from rewardmap.config import ConfigError

    for name in known:
        if name == value:
            return name
    raise ConfigError(f"{option} {value}: choose one of {', '.join(known)}")


def _quiet() -> None:
    """No progress bars of transformers between ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()


if __name__ == "__main__":
    main()
