"""The command line: ``rewardmap train | eval | generate | score``.

Heavy imports wait until a command runs, so that ``--help`` is quick. A user's mistake ends in one line on
stderr and exit code 2, a failure in exit code 1, Ctrl-C in 130; ``--debug`` shows the traceback.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, NoReturn

import typer

import rewardmap

USER_ERROR, FAILURE, INTERRUPTED = 2, 1, 130

app = typer.Typer(
    help="Teach vision-language models to read maps by reinforcement learning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def main() -> None:
    """The console script."""
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
            help="A TOML file or the name of a shipped one (default: tiny), then settings that override it, "
            "such as train.seed=3.",
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
    with _errors(debug):
        from rich.console import Console

        from rewardmap.config import ConfigError, load_config

        settings = settings or []
        if resume is not None and (settings or run_dir):
            raise ConfigError("--resume goes on with the run's own config.toml; give no configuration beside it")
        named = bool(settings) and ("=" not in settings[0] or Path(settings[0]).is_file())
        source = settings[0] if named else "tiny"
        config = None if resume else load_config(source, settings[1:] if named else settings)

        from rewardmap.train import run

        _quiet()
        console = Console()
        if config is None:
            assert resume is not None
            run.resume(resume, console=console)
        else:
            stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
            run.train(config, run_dir or Path("runs") / f"{Path(source).stem}-{stamp}", console=console)


@app.command("eval")
def evaluate(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A ReasonMap-Train folder. Default: the run's own data."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Default: the run's test split.")] = None,
    debug: Debug = False,
) -> None:
    """Evaluate a run's newest checkpoint again and print the closing table."""
    with _errors(debug):
        from rich.console import Console

        from rewardmap.train import run

        _quiet()
        run.evaluate_run(run_dir, data, split, console=Console())


@app.command()
def generate(
    out: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
    maps: Annotated[int, typer.Option(min=2, help="Maps in all, a third of each difficulty.")] = 30,
    test_maps: Annotated[
        int | None, typer.Option(min=1, help="How many of them are held out. Default: two fifths, as published.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same data set.")] = 0,
    level: Annotated[str, typer.Option(help="Size of the maps: full, or tiny for the small policy.")] = "full",
    debug: Debug = False,
) -> None:
    """Draw maps and write a data set in ReasonMap-Train's form."""
    with _errors(debug, user_errors=(ValueError,)):
        from rich.progress import Progress

        from rewardmap.transit import write_dataset

        held_out = test_maps or max(1, 3 * round(maps * 2 / 15))  # the levels take turns: a multiple of three
        if held_out >= maps:
            raise ValueError(f"--test-maps {held_out} leaves no maps to train on; draw more than --maps {maps}")
        with Progress() as bar:
            task = bar.add_task("draw maps", total=maps)
            write_dataset(
                out,
                maps={"train": maps - held_out, "test": held_out},
                preset=level,
                seed=seed,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        typer.echo(f"data set: {out}")


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
    with _errors(debug):
        from typing import get_args

        from rewardmap.config import ConfigError
        from rewardmap.rewards.rubric import Mode
        from rewardmap.rewards.score_file import score_file

        known = {name: name for name in get_args(Mode)}
        if mode not in known:
            raise ConfigError(f"--mode {mode}: choose one of {', '.join(known)}")
        typer.echo(score_file(answers, out, known[mode], stations).table())


def _quiet() -> None:
    """No progress bars of transformers between ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()


@contextmanager
def _errors(debug: bool, user_errors: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turns what a command raises into one line and an exit code."""
    try:
        yield
    except (typer.Exit, typer.BadParameter):
        raise
    except KeyboardInterrupt as stop:
        _fail(INTERRUPTED, f"interrupted; {stop}" if str(stop) else "interrupted")
    except Exception as error:
        if debug:
            raise
        from rewardmap.config import ConfigError
        from rewardmap.types import DataError

        if isinstance(error, (ConfigError, DataError, *user_errors)):
            _fail(USER_ERROR, f"error: {error}")
        _fail(FAILURE, f"error: {explain(error)}")


def explain(error: BaseException) -> str:
    """One line about a failure: the path and the remedy where the disk is the cause."""
    if _disk_is_full(error):
        place = f": {error.filename}" if isinstance(error, OSError) and error.filename else ""
        return (
            f"no space left on device{place}; free some, then go on with --resume, or choose another folder "
            "with --run-dir"
        )
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return f"{type(error).__name__}: {error} (--debug shows where)"


def _disk_is_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # Writers in other languages report the same as text.
    return "No space left on device" in str(error) or "StorageFull" in str(error)


def _fail(code: int, line: str) -> NoReturn:
    sys.stdout.flush()
    typer.echo(" ".join(line.split()), err=True)
    raise typer.Exit(code)


if __name__ == "__main__":
    main()
