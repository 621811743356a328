"""`ivtp eval`: parse, run benchmarks on lmms-eval, print the paper's row."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ivtp.cli import arguments as given
from ivtp.cli.console import err, out
from ivtp.cli.door import quiet
from ivtp.errors import ConfigError
from ivtp.files.outputs import check_folder


@given.spoken
def evaluate(
    context: typer.Context,
    tasks: Annotated[
        str, typer.Option(help="paper12, the twelve of the paper; micro12, their like of the micro world; or names.")
    ] = "paper12",
    model: given.Model = "micro",
    method: given.Method = "ivtp",
    keep: given.Keep = "64",
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task; default: all.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions at once.")] = 1,
    device: given.Device = "cpu",
    dtype: given.Dtype = "auto",
    clip: given.Clip = None,
    include_path: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder with further tasks.")] = None,
    cache: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where answers are kept; default: the user's cache.")
    ] = None,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the row, results and samples.")] = Path(
        "results/eval"
    ),
    option: given.Options = None,
) -> None:
    """Accuracy on real benchmarks, by lmms-eval's own tasks and metrics, as a row of the paper's table.

    The change is against an earlier run of the same with --method none, in the same --output. Several GPUs: put
    `torchrun --nproc_per_node N -m` in front. Benchmarks that a language model judges need OPENAI_API_KEY.
    """
    options = given.parse_options(option, context)
    name = given.check_asked(method, keep, options)
    check_folder(output, "--output")
    if importlib.util.find_spec("lmms_eval") is None:
        raise ConfigError("lmms-eval is not installed; `make eval-env` makes an environment with it")
    quiet()
    from ivtp.evaluation import run
    from ivtp.evaluation.answers import cache_folder
    from ivtp.evaluation.asked import Asked

    named, folders = named_tasks(tasks, limit)
    asked = Asked(
        model,
        named,
        name,
        given.parse_keep(keep),
        limit=limit,
        options=options,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        clip=clip,
        include_path=folders if include_path is None else (str(include_path), *folders),
        answers=str(cache or cache_folder() / "answers"),
    )
    for task in run.judged(asked):
        err.print(f"{task} is left out: a language model judges its answers; set OPENAI_API_KEY", markup=False)
    found = run.evaluate(asked)
    if found is None:
        return
    row = run.row_of(asked, found, run.saved_row(output, asked.full) if name != "none" else None)
    file = run.save(output, asked, row, found)
    _print(row)
    if name != "none" and "change" not in row and run.columns(named):
        err.print("for the change against all tokens run the same with --method none first", markup=False)
    out.print(f"\n{file}", markup=False, soft_wrap=True)


def named_tasks(tasks: str, limit: int | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of tasks, and the folders that hold those that are not lmms-eval's own; micro12's is made."""
    from ivtp.evaluation import micro12
    from ivtp.evaluation.benchmarks import PAPER12
    from ivtp.evaluation.run import whole

    sets = {"paper12": PAPER12, "micro12": micro12.MICRO12}
    named = tuple(column.task for column in sets[tasks]) if tasks in sets else tuple(tasks.split(","))
    if {column.task for column in micro12.MICRO12}.isdisjoint(named):
        return named, ()
    count = min(whole(limit) or micro12.ITEMS, micro12.ITEMS)
    return named, (str(micro12.prepare(count=count, report=_report)),)


def _report(names: Sequence[str]) -> Iterator[str]:
    from rich.progress import track

    yield from track(names, "drawing the micro world's photos", console=err)


def _print(row: dict[str, Any]) -> None:
    """One line for each figure: twelve columns are wider than a terminal."""
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for name, value in row.items():
        if value is None:
            text = "–"
        elif name == "change":
            text = f"{value:+.1f}"
        elif name == "tflops":
            text = f"{value:.4g}"
        else:
            text = f"{value:.1f}" if isinstance(value, float) else str(value)
        table.add_row(name, text)
    out.print(table)
