"""What the micro model gets right on held-out test photos: ``python -m recipes.micro.evaluate``.

Every number comes from stock ``generate`` (greedy, left-padded batches). An answer counts only if it matches exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ivtp.cli.door import quiet, run
from ivtp.config import PruneConfig
from ivtp.files.machine import processor_name
from ivtp.files.outputs import check_output, write_text
from ivtp.generate import complete, load, prompt_for
from ivtp.micro import world
from ivtp.plug import attach
from recipes.micro.scoring import Dtype, Item, Table, accuracy_row, mean_interval, sample_items, write_json

LONGEST_ANSWER = 48  # tokens
OBJECT_KINDS = ("colour", "relation", "neighbour", "position", "extreme", "sign")
"""Kinds that ask about particular objects of the scene."""
Report = Callable[[int], None]


def answer_all(
    model: Any,
    processor: Any,
    items: list[Item],
    *,
    image: str = "photo",
    batch: int = 8,
    report: Report = lambda done: None,
    after: Callable[[list[Item]], None] = lambda items: None,
) -> list[str]:
    """Greedy answers; ``image`` is "photo", "grey" (a plain grey picture) or "none" (a prompt without an image).

    ``after`` is called with the items of each batch, while the record of its prefill is still the last one.
    """
    answers: list[str] = []
    for start in range(0, len(items), batch):
        part = items[start : start + batch]
        prompts = [prompt_for(processor, item.question.text, images=int(image != "none")) for item in part]
        inputs = processor(images=_images(part, image), text=prompts, padding=True, return_tensors="pt")
        inputs = inputs.to(model.device, model.dtype)
        answers += complete(model, processor, inputs, LONGEST_ANSWER)
        after(part)
        report(len(part))
    return answers


def _images(items: list[Item], image: str) -> list[Image.Image] | None:
    if image == "none":
        return None
    if image == "grey":
        return [Image.new("RGB", (world.SIZE, world.SIZE), (128, 128, 128))] * len(items)
    return [item.photo.picture() for item in items]


def by_type(model: Any, processor: Any, items: list[Item], *, batch: int, report: Report) -> Table:
    """Exact match by kind with all visual tokens, with a grey picture, and without an image."""
    results = {
        image: answer_all(model, processor, items, image=image, batch=batch, report=report)
        for image in ("photo", "grey", "none")
    }
    rows = []
    for kind in (*world.KINDS, "mean"):
        row: dict[str, Any] = {"kind": kind}
        for image, label in (("photo", "576 tokens"), ("grey", "grey picture"), ("none", "no image")):
            row |= accuracy_row(items, results[image], kind, label)
        rows.append(row)
    return Table("Exact match by question type", rows)


def compare_coverage(
    model: Any,
    processor: Any,
    items: list[Item],
    keep: int,
    *,
    batch: int,
    report: Report,
) -> Table:
    """How much of the asked objects survives: IVTP against TopK, question by question."""
    shares: dict[str, list[float]] = {}
    for method in ("topk", "ivtp"):
        shares[method] = []
        with attach(model, processor, method=method, keep=keep) as pruner:

            def record(part: list[Item], pruner: Any = pruner, found: list[float] = shares[method]) -> None:
                for item, kept in zip(part, pruner.trace.kept().tolist(), strict=True):
                    found.append(len(item.asked & set(kept)) / len(item.asked))

            answer_all(model, processor, items, batch=batch, report=report, after=record)
    pairs = list(zip(shares["ivtp"], shares["topk"], strict=True))
    rows = []
    for label, hits in (
        ("IVTP covers more", [a > b for a, b in pairs]),
        ("equal", [a == b for a, b in pairs]),
        ("TopK covers more", [a < b for a, b in pairs]),
    ):
        value, low, high = mean_interval([hits])
        rows.append({"outcome": label, "share": value, "share low": low, "share high": high})
    means = ", ".join(f"{name} {100 * sum(values) / len(values):.1f}%" for name, values in shares.items())
    title = f"Asked objects' patches among the {keep} kept, {len(items)} test photos (mean coverage: {means})"
    return Table(title, rows)


app = typer.Typer(add_completion=False, rich_markup_mode=None)
console = Console()


@app.command(help=__doc__)
def main(
    model: Annotated[str, typer.Option(help='"micro", or a folder with an exported model')] = "micro",
    by_type_: Annotated[bool, typer.Option("--by-type", help="exact match by question type")] = False,
    coverage: Annotated[int, typer.Option(min=0, help="photos for the coverage count, 0 to leave it out")] = 0,
    keep: Annotated[int, typer.Option(help="visual tokens that stay")] = 64,
    questions: Annotated[int, typer.Option(min=1, help="test questions of each table")] = 1000,
    split: Annotated[str, typer.Option(help="test or validation")] = "test",
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, help="which questions")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="questions a batch")] = 8,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 1,
    dtype: Annotated[Dtype, typer.Option(help="what to compute in; auto is float32")] = "auto",
    output: Annotated[Path | None, typer.Option(help="JSON file for all numbers")] = None,
    markdown: Annotated[Path | None, typer.Option(help="file for the tables")] = None,
) -> None:
    if not (by_type_ or coverage):
        raise typer.BadParameter("nothing to measure; give --by-type or --coverage N")
    PruneConfig(keep=keep).tokens(world.GRID**2)
    check_output(output, "--output", inputs=(model,))
    check_output(markdown, "--markdown", inputs=(model, output))
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    quiet()
    lvlm, processor = load(model, dtype=dtype)
    items = sample_items(questions, split=split, seed=seed)
    covered = sample_items(coverage, split=split, seed=seed + 1, kinds=OBJECT_KINDS)
    answers = 3 * len(items) * by_type_ + 2 * coverage
    columns = (TextColumn("questions"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    tables = []
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=answers)

        def report(done: int) -> None:
            progress.advance(task, done)

        if by_type_:
            tables.append(by_type(lvlm, processor, items, batch=batch, report=report))
        if coverage:
            tables.append(compare_coverage(lvlm, processor, covered, keep, batch=batch, report=report))
    about = {
        "model": model,
        "split": split,
        "seed": seed,
        "questions": questions,
        "batch": batch,
        "dtype": str(next(lvlm.parameters()).dtype),
        "machine": f"{processor_name()}, {threads} CPU threads",
        "torch": torch.__version__,
    }
    text = "\n".join(table.markdown() for table in tables)
    console.print(Markdown(text))
    if output is not None:
        write_json(output, tables, about)
    if markdown is not None:
        write_text(markdown, text, "--markdown")


if __name__ == "__main__":
    run(app)
