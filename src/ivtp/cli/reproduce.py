"""`ivtp reproduce`: parse, make a table or figure of the paper, write and print it."""

from __future__ import annotations

import importlib
import importlib.util
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ivtp.cli import arguments as given
from ivtp.cli.console import err, out
from ivtp.cli.door import interruptible, quiet
from ivtp.cli.eval import named_tasks
from ivtp.errors import ConfigError
from ivtp.files.outputs import check_folder, need_matplotlib

Name = Literal["table1", "figure3", "gallery"]


@given.spoken
def reproduce(
    context: typer.Context,
    name: Annotated[Name, typer.Argument(help="Which.", show_default=False)],
    model: given.Model = "micro",
    tasks: Annotated[
        str | None, typer.Option(help="paper12, micro12, or names. Default: micro12 of micro, else paper12.")
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="A method; repeatable. Default: all; of gallery three.")
    ] = None,
    keep: Annotated[
        list[int] | None, typer.Option("--keep", "-k", min=1, help="Visual tokens that stay; repeatable.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task, or images; default: all.")] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="An image for gallery; repeatable. Default: of micro."),
    ] = None,
    question: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="What is asked about each --image; repeatable.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes; on GPUs each has its own.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions at once.")] = 16,
    device: given.Device = "cpu",
    dtype: given.Dtype = "auto",
    clip: given.Clip = None,
    cache: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where answers are kept; default: the user's cache.")
    ] = None,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder for JSON, Markdown and figures.")] = Path(
        "results"
    ),
) -> None:
    """A table or figure of the paper: all methods on the twelve benchmarks, with paired 95% intervals.

    Every answer is kept as it comes: the same command goes on where a killed one stopped, and an answer that another
    table needs, too, is not asked again.
    """
    from ivtp.registry import method_class

    for one in method or []:
        method_class(one)
    _check_own(name, image, question)
    check_folder(output, "--output")
    if name != "gallery" and importlib.util.find_spec("lmms_eval") is None:
        raise ConfigError("lmms-eval is not installed; `make eval-env` makes an environment with it")
    need_matplotlib("ivtp reproduce")
    quiet()
    from ivtp.evaluation.answers import cache_folder
    from ivtp.evaluation.reproduce import base
    from ivtp.evaluation.run import Asked

    default = "micro12" if model == "micro" else "paper12"
    named, folders = ((), ()) if name == "gallery" else named_tasks(tasks or default, limit)
    asked = Asked(
        model,
        named,
        limit=limit,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        clip=clip,
        include_path=folders,
        cache=str(cache or cache_folder() / "answers"),
    )
    own = tuple(image or ()), tuple(question or ())
    request = base.Request(asked, tuple(method or ()), tuple(keep or ()), workers, *own)
    with interruptible(lambda: f"answers so far are kept in {asked.cache}; the same command goes on behind them"):
        result = importlib.import_module(f"ivtp.evaluation.reproduce.{name}").make(request, _bar)
    result = replace(result, about=base.about(request, shlex.join(["ivtp", *sys.argv[1:]])) | result.about)
    files = base.write(output, name, result)
    from rich.markdown import Markdown

    out.print(Markdown(f"# {result.title}\n\n{result.markdown}"))
    for file in files:
        err.print(f"written: {file}", markup=False, soft_wrap=True)


def _check_own(name: str, images: list[str] | None, questions: list[str] | None) -> None:
    """Images and questions of the user's are the gallery's, and go together."""
    if (images or questions) and name != "gallery":
        raise ConfigError(f"--image and --question are for the gallery; {name} is of tasks: leave them out")
    if bool(images) != bool(questions):
        raise ConfigError("each --question is asked about each --image; give at least one of both, or neither")


@contextmanager
def _bar(total: int, title: str) -> Iterator[Callable[[int], Any]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, disable=not err.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda more: progress.advance(task, more)
