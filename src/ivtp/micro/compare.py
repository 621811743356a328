"""Every method on the same test questions: ``python -m ivtp.micro.compare``.

The questions are those of the twelve formats, in equal numbers; accuracy is the mean of the formats' own figures, from
stock ``generate`` in left-padded batches. Milliseconds are of a prefill and one token at batch 1, all methods
interleaved. Finished methods are saved as they come; ``--resume`` goes on behind them.
"""

from __future__ import annotations

import json as json_module
import platform
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ivtp.cost import flops
from ivtp.generate import load, prompt_for
from ivtp.micro import world
from ivtp.micro.formats.base import Example
from ivtp.micro.scoring import Table, write_json
from ivtp.micro.units import Unit, by_format, collect
from ivtp.plug import Pruner, attach
from ivtp.registry import list_formats, list_methods, method_class

LONGEST_ANSWER = 64  # tokens
Row = dict[str, Any]


def measure(
    model: Any, processor: Any, units: list[Unit], method: str, keep: int, positions: str, batch: int, progress: Any
) -> Row:
    """Accuracy of one method, by format too, and the tokens and FLOPs of its prefills."""
    examples = [example for unit in units for example in unit.examples]
    pruner = _pruner(model, processor, method, keep, positions)
    costs: list[float] = []
    answers: list[str] = []
    with pruner or nullcontext():
        for start in range(0, len(examples), batch):
            part = examples[start : start + batch]
            answers += _answer(model, processor, part)
            costs += [_cost(model, processor, e) for e in part] if pruner is None else [pruner.trace.flops]  # type: ignore[union-attr]
            progress.advance(len(part))
    said = iter(answers)
    scored = [(unit, [unit.form.score(example, next(said)) for example in unit.examples]) for unit in units]
    figures = by_format(scored, "accuracy")
    entering, leaving = (float(world.GRID**2),) * 2
    if pruner is not None:
        entering, leaving = pruner.method.plan.tokens_per_layer(pruner.host.size).equivalent
    return {
        "method": method,
        "keep": keep,
        **figures["mean"],
        "equivalent tokens, before cuts": entering,
        "behind cuts": leaving,
        "TFLOPs": sum(costs) / len(examples) / 1e12,
        "by format": {title: row["accuracy"] for title, row in figures.items() if title != "mean"},
    }


def _pruner(model: Any, processor: Any, method: str, keep: int, positions: str) -> Pruner | None:
    if method == "none":
        return None
    return attach(model, processor, method=method, keep=keep, positions=positions)


def _answer(model: Any, processor: Any, examples: list[Example]) -> list[str]:
    prompts = [prompt_for(processor, example.prompt) for example in examples]
    images = [example.photo.picture() for example in examples]
    inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt").to(model.device, model.dtype)
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=LONGEST_ANSWER, do_sample=False)
    new = out[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def _cost(model: Any, processor: Any, example: Example) -> float:
    text = len(processor.tokenizer(prompt_for(processor, example.prompt)).input_ids)
    return flops(model, method="none", text_tokens=text).total


def time_prefills(
    model: Any, processor: Any, runs: list[tuple[str, int]], examples: list[Example], positions: str
) -> dict[tuple[str, int], float]:
    """Median milliseconds of a prefill and one token at batch 1, all runs in turn for every example."""
    times: dict[tuple[str, int], list[float]] = {run: [] for run in runs}
    for example in [examples[0], *examples]:
        prompt = prompt_for(processor, example.prompt)
        inputs = processor(images=example.photo.picture(), text=prompt, return_tensors="pt")
        inputs = inputs.to(model.device, model.dtype)
        for method, keep in runs:
            with _pruner(model, processor, method, keep, positions) or nullcontext(), torch.inference_mode():
                began = time.perf_counter()
                model.generate(**inputs, max_new_tokens=1, do_sample=False)
                times[method, keep].append(1000 * (time.perf_counter() - began))
    return {run: statistics.median(values[1:]) for run, values in times.items()}


def tables(rows: list[Row], questions: int, positions: str) -> list[Table]:
    """One table for each keep; the best accuracy first, the full model on top."""
    full = [row for row in rows if row["method"] == "none"]
    made = []
    for keep in sorted({row["keep"] for row in rows} - {world.GRID**2}):
        mine = sorted((r for r in rows if r["keep"] == keep), key=lambda r: -r["accuracy"])
        shown = [{k: v for k, v in row.items() if k not in ("keep", "by format")} for row in full + mine]
        made.append(Table(f"{keep} of {world.GRID**2} tokens, {questions} questions, {positions} positions", shown))
    return made


app = typer.Typer(add_completion=False, rich_markup_mode=None)
console = Console()


@app.command(help=__doc__)
def main(
    model: Annotated[str, typer.Option(help='"micro", or a folder with an exported model')] = "micro",
    method: Annotated[list[str] | None, typer.Option(help="a method (repeat); default: all")] = None,
    keep: Annotated[list[int] | None, typer.Option(help="visual tokens that stay (repeat); default: 16 64 128")] = None,
    questions: Annotated[int, typer.Option(help="test questions, a multiple of 12 is taken")] = 1000,
    positions: Annotated[str, typer.Option(help="original or compact")] = "original",
    batch: Annotated[int, typer.Option(help="questions a batch")] = 16,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 2,
    resume: Annotated[bool, typer.Option("--resume", help="go on behind what the JSON file holds")] = False,
    json: Annotated[Path | None, typer.Option(help="file for all numbers, rewritten after every method")] = None,
    markdown: Annotated[Path | None, typer.Option(help="file for the tables")] = None,
) -> None:
    names = method or [*list_methods()]
    for name in names:
        method_class(name)  # refuses what is no method
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    lvlm, processor = load(model)
    each = -(-questions // len(list_formats()))
    units = sorted((u for group in collect("test", each) for u in group), key=lambda u: u.form.title)
    count = sum(len(unit.examples) for unit in units)
    about = {"model": model, "questions": count, "positions": positions, "torch": torch.__version__}
    about["machine"] = f"{platform.machine()}, {threads} CPU threads"
    rows = _finished(json, about) if resume and json else []
    runs = [("none", world.GRID**2), *((name, k) for k in keep or (16, 64, 128) for name in names)]
    left = [run for run in runs if run not in {(row["method"], row["keep"]) for row in rows}]
    with _Bar(len(left) * count) as progress:
        for name, k in left:
            progress.name(f"{name}, {k}")
            rows.append(measure(lvlm, processor, units, name, k, positions, batch, progress))
            if json is not None:
                write_json(json, [Table("methods", rows)], about)
    examples = [unit.examples[0] for unit in units][:: max(1, len(units) // 9)]
    for row in rows:
        row["ms a prefill"] = None
    for run, milliseconds in time_prefills(lvlm, processor, runs, examples, positions).items():
        next(row for row in rows if (row["method"], row["keep"]) == run)["ms a prefill"] = milliseconds
    text = "\n".join(table.markdown() for table in tables(rows, count, positions))
    console.print(Markdown(text))
    if json is not None:
        write_json(json, [Table("methods", rows)], about)
    if markdown is not None:
        markdown.parent.mkdir(parents=True, exist_ok=True)
        markdown.write_text(text)


def _finished(json: Path, about: dict[str, Any]) -> list[Row]:
    """The rows of a file that was measured in the same way; none where there is no file."""
    if not json.is_file():
        return []
    found = json_module.loads(json.read_text())
    if found["about"] != about:
        raise typer.BadParameter(f"{json} was measured with {found['about']}; give another --json, or no --resume")
    rows: list[Row] = found["tables"][0]["rows"]
    return rows


class _Bar:
    """A progress bar over questions."""

    def __init__(self, total: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
        self._task = self._progress.add_task("", total=total)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def name(self, text: str) -> None:
        """What runs now."""
        self._progress.update(self._task, description=text)

    def advance(self, done: int) -> None:
        """So many questions more."""
        self._progress.advance(self._task, done)


if __name__ == "__main__":
    app()
