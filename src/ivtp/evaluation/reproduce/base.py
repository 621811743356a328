"""What all tables and figures share: what is asked, rows with paired intervals, and what is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivtp.config import PruneConfig
from ivtp.cost.flops import flops
from ivtp.cost.sizes import model_config
from ivtp.errors import ConfigError, LoadError
from ivtp.evaluation.asked import Asked, Row, Run
from ivtp.evaluation.ratios import Array, percentiles
from ivtp.files.machine import processor_name
from ivtp.files.outputs import whole, write_text
from ivtp.micro.world.crowds import CROWDS, crowd_name
from ivtp.registry import host_classes, list_methods

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ivtp.evaluation.sweep import Measured

Report = Callable[[int, str], AbstractContextManager[Callable[[int], None]]]
"""Opens a progress bar over so many questions, or other steps, that are called so; it is told of each more."""
FULL = Run("none")


@dataclass(frozen=True)
class Request:
    """What every table is made with."""

    asked: Asked
    """Model, tasks and limit; its method and keep are those of each row. A table that is counted and not measured has
    no tasks, and takes models of its own where none (an empty name) is asked for."""
    methods: tuple[str, ...] = ()
    """Empty: all that the model's family takes."""
    keeps: tuple[int, ...] = ()
    """Empty: the paper's."""
    workers: int = 1
    images: tuple[str, ...] = ()
    """Files of the gallery's own images, and what is asked about each."""
    questions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """A table or figure: what `write` puts into files of its name."""

    title: str
    rows: list[Row]
    markdown: str
    about: dict[str, Any] = field(default_factory=dict)
    figure: Figure | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Further files, by suffix."""


def measure(request: Request, runs: Sequence[Run], report: Report) -> dict[Run, Measured]:
    """Every run on the request's tasks, the full model first.

    Raises `ConfigError` for a run that cannot be, and for tasks that have no column, before any has begun.
    """
    from ivtp.evaluation.run import columns, count_questions  # lmms-eval comes with these: not all tables need it
    from ivtp.evaluation.sweep import sweep

    if not columns(request.asked.tasks):
        raise ConfigError(f"{', '.join(request.asked.tasks)}: none is a benchmark of paper12 or micro12; name some")
    for run in runs:
        _check(request.asked.model, run)
    wanted = list(dict.fromkeys([FULL, *runs]))
    total = len(wanted) * count_questions(request.asked)
    with report(total, "questions") as on_answers:
        found = dict(sweep(request.asked, wanted, request.workers, on_answers))
    return {run: found[run] for run in wanted}


def methods_of(request: Request) -> tuple[str, ...]:
    """Those asked for, or all that the model's family takes; all there are where its sizes are not on this machine."""
    if request.methods:
        return tuple(name for name in request.methods if name != "none")
    try:
        config = model_config(request.asked.model)
    except LoadError:
        return tuple(list_methods())
    family = next((name for name, host in host_classes().items() if host.matches(config)), None)
    return tuple(list_methods(family))


def _check(model: str, run: Run) -> None:
    """What cannot be is known from a model's sizes, where they are on this machine."""
    try:
        flops(model, method=run.method, keep=run.keep, text_tokens=64, **run.options)
    except LoadError:
        PruneConfig.of(method=run.method, keep=run.keep, **run.options)


def row(run: Run, found: Measured, against: Iterable[tuple[str, Measured]] = ()) -> Row:
    """A run's figures in points, 0 to 100, with 95% bootstrap intervals; differences to others are paired."""
    made: Row = {"name": run.name or run.method, "method": run.method}
    made |= {"keep": "all" if run.method == "none" else run.keep, "options": dict(run.options)}
    made |= with_interval("mean", found.mean, found.draws)
    for name, other in against:
        made |= difference(name, found, other)
    made["objects"] = {
        crowd_name(number): with_interval("mean", part.mean, part.draws)
        for number in range(len(CROWDS))
        if (part := found.crowd(number)) is not None
    }
    return made | {"benchmarks": dict(found.figures)} | found.costs


def with_interval(name: str, value: float, draws: Array | None) -> Row:
    """Columns of a figure and its interval, where there is one."""
    low, high = (None, None) if draws is None else percentiles(draws.tolist())
    return {name: value, f"{name} low": low, f"{name} high": high}


def difference(name: str, first: Measured, second: Measured) -> Row:
    """Of two means over the same questions."""
    paired = None if first.draws is None or second.draws is None else first.draws - second.draws
    return with_interval(name, first.mean - second.mean, paired)


def shown(found: Row, name: str) -> str:
    """A figure with its interval, as a cell."""
    value, low, high = found.get(name), found.get(f"{name} low"), found.get(f"{name} high")
    if value is None:
        return "–"
    return f"{value:.1f}" if low is None or high is None else f"{value:.1f} ({low:.1f}–{high:.1f})"


def shown_difference(found: Row, name: str) -> str:
    """A difference as a cell; "none" where its interval holds 0."""
    low, high = found.get(f"{name} low"), found.get(f"{name} high")
    if low is None or high is None:
        return "–" if found.get(name) is None else f"{found[name]:+.1f}"
    span = f"{low:+.1f} to {high:+.1f}"
    return f"none ({span})" if low <= 0 <= high else f"{found[name]:+.1f} ({span})"


def grid(header: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """A GitHub table."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in rows)])


def about(request: Request, command: str) -> dict[str, Any]:
    """By which command; and what was measured, where, if anything was."""
    asked = request.asked
    found: dict[str, Any] = {"command": command}
    packages = ["ivtp", "torch", "transformers"]
    if asked.tasks:
        found |= {"model": asked.model, "tasks": list(asked.tasks), "limit": asked.limit}
        found |= {"dtype": asked.dtype, "machine": f"{processor_name()}, {asked.device}"}
        packages.insert(1, "lmms_eval")
    return found | {name: version(name) for name in packages}


def write(folder: Path, name: str, result: Result) -> list[Path]:
    """JSON, Markdown and, of a figure, PNG and SVG; and its further files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.json", folder / f"{name}.md"]
    document = {"about": result.about, "rows": result.rows}
    write_text(files[0], json.dumps(document, indent=1, ensure_ascii=False) + "\n", "--output")
    command = result.about.get("command", "")
    write_text(files[1], f"# {result.title}\n\n`{command}`\n\n{result.markdown}\n", "--output")
    if result.figure is not None:
        from matplotlib import rc_context  # which a page of pictures does not need

        for suffix in (".png", ".svg"):
            files.append(folder / f"{name}{suffix}")
            # ids in an SVG are random otherwise, and the same figure would be another file
            with whole(files[-1], "--output") as partial, rc_context({"svg.hashsalt": name}):
                result.figure.savefig(partial, dpi=110, metadata={"Date": None} if suffix == ".svg" else None)
    for suffix, data in result.files.items():
        files.append(folder / f"{name}{suffix}")
        with whole(files[-1], "--output") as partial:
            partial.write_bytes(data)
    return files
