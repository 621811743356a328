"""`ivtp reproduce`: parse, make a table or figure of the paper, write and print it."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Literal

import typer

from ivtp.cli import arguments as given
from ivtp.cli.console import bar, err, wide
from ivtp.cli.door import interruptible, quiet
from ivtp.cli.eval import named_tasks
from ivtp.errors import ConfigError
from ivtp.files.outputs import check_folder, need_matplotlib

Name = Literal["table1", "figure3", "ablations", "complexity", "published", "gallery"]
READ = {
    "complexity": ("model", "method", "output"),
    "gallery": ("model", "method", "keep", "limit", "image", "question", "device", "dtype", "clip", "output"),
}
"""Those that ask no task's questions, and so need no lmms-eval, and the options that they read."""
OWN = {"ablations": ("image", "question", "method")}
"""What others have no use for, where it is more than the gallery's options."""


@given.spoken
def reproduce(
    context: typer.Context,
    name: Annotated[Name, typer.Argument(help="Which.", show_default=False)],
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="micro (the default), a folder, or a hub id; for complexity sizes: both of LLaVA-1.5."
        ),
    ] = None,
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
        list[str] | None, typer.Option(metavar="FILE", help="An image for gallery; repeatable. Default: of micro.")
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
    table needs, too, is not asked again. complexity is counted from sizes: it needs neither a model nor lmms-eval.
    gallery, a page of images with what each method kept and answered, needs no lmms-eval either.
    """
    from ivtp.registry import load_named, method_class, method_name

    methods = tuple(method_name(one) for one in method or [])
    for one in methods:
        method_class(one)
    check_folder(output, "--output")
    _refuse_unread(context, name)
    if bool(image) != bool(question):
        raise ConfigError("each --question is asked about each --image; give at least one of both, or neither")
    if name not in READ and importlib.util.find_spec("lmms_eval") is None:
        raise ConfigError("lmms-eval is not installed; `make eval-env` makes an environment with it")
    if name != "gallery":
        need_matplotlib("ivtp reproduce")
    quiet()
    from ivtp.evaluation.answers import cache_folder
    from ivtp.evaluation.asked import Asked
    from ivtp.evaluation.reproduce import base

    asked, left = Asked(model or "", (), limit=limit, device=device, dtype=dtype, clip=clip), "nothing was written"
    if name not in READ:
        model = model or "micro"
        cache = cache or cache_folder() / "answers"
        left = f"answers so far are kept in {cache}; the same command goes on behind them"
        named, folders = named_tasks(tasks or ("micro12" if model == "micro" else "paper12"), limit)
        kept = str(cache)
        asked = replace(asked, model=model, tasks=named, batch_size=batch_size, include_path=folders, answers=kept)
    own = tuple(image or ()), tuple(question or ())
    request = base.Request(asked, methods, tuple(keep or ()), workers, *own)
    with interruptible(lambda: left):
        result: base.Result = load_named("evaluation.reproduce", name, "make")(request, bar)
    result = replace(result, about=base.about(request, shlex.join(["ivtp", *sys.argv[1:]])) | result.about)
    files = base.write(output, name, result)
    from rich.markdown import Markdown

    cells = (line.split("|") for line in result.markdown.splitlines() if line.startswith("|"))
    columns = zip_longest(*cells, fillvalue="")
    wide(sum(2 + max(map(len, column)) for column in columns)).print(Markdown(f"# {result.title}\n\n{result.markdown}"))
    for file in files:
        err.print(f"written: {file}", markup=False, soft_wrap=True)


def _refuse_unread(context: typer.Context, name: str) -> None:
    """What a table makes no use of would else be left out in silence."""
    for parameter in context.command.params:
        known = str(parameter.name)
        read = known == "name" or (
            known in READ[name] if name in READ else known not in OWN.get(name, ("image", "question"))
        )
        source = context.get_parameter_source(known)
        if not read and source is not None and source.name == "COMMANDLINE":
            raise ConfigError(f"{parameter.opts[0]} has no use in {name}; leave it out")
