"""What the micro model gets right on held-out test scenes: ``python -m ivtp.micro.evaluate``.

Every number comes from stock ``generate`` (greedy, left-padded batches), except ``--oracle``, which hands the
decoder chosen patches at their original positions. An answer counts only if it matches exactly.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ivtp.cost import flops
from ivtp.generate import load, prompt_for
from ivtp.micro import world
from ivtp.micro.oracle import compare_coverage, compare_oracle
from ivtp.micro.scoring import Item, Table, accuracy_row, sample_items, write_json
from ivtp.plug import attach
from ivtp.registry import list_methods

LONGEST_ANSWER = 48  # tokens
OBJECT_KINDS = ("colour", "relation", "neighbour", "position", "extreme", "sign")
"""Kinds that ask about particular objects of the scene."""
Report = Callable[[int], None]


def answer_all(
    model: Any,
    processor: Any,
    items: list[Item],
    *,
    image: str = "scene",
    batch: int = 8,
    report: Report = lambda done: None,
    after: Callable[[list[Item]], None] = lambda items: None,
) -> list[str]:
    """Greedy answers; ``image`` is "scene", "grey" (a plain grey picture) or "none" (a prompt without an image).

    ``after`` is called with the items of each batch, while the record of its prefill is still the last one.
    """
    answers: list[str] = []
    for start in range(0, len(items), batch):
        part = items[start : start + batch]
        prompts = [prompt_for(processor, item.question.text, images=int(image != "none")) for item in part]
        inputs = processor(images=_images(part, image), text=prompts, padding=True, return_tensors="pt")
        inputs = inputs.to(model.device, model.dtype)
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=LONGEST_ANSWER, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
        after(part)
        report(len(part))
    return answers


def _images(items: list[Item], image: str) -> list[Image.Image] | None:
    if image == "none":
        return None
    if image == "grey":
        return [Image.new("RGB", (world.SIZE, world.SIZE), (128, 128, 128))] * len(items)
    return [world.render(item.scene) for item in items]


def by_type(model: Any, processor: Any, items: list[Item], *, batch: int, report: Report) -> Table:
    """Exact match by kind with all visual tokens, with a grey picture, and without an image."""
    results = {
        image: answer_all(model, processor, items, image=image, batch=batch, report=report)
        for image in ("scene", "grey", "none")
    }
    rows = []
    for kind in (*world.KINDS, "mean"):
        row: dict[str, Any] = {"kind": kind}
        for image, label in (("scene", "576 tokens"), ("grey", "grey picture"), ("none", "no image")):
            row |= accuracy_row(items, results[image], kind, label)
        rows.append(row)
    return Table("Exact match by question type", rows)


def compare_methods(
    model: Any, processor: Any, items: list[Item], methods: list[str], keep: int, *, batch: int, report: Report
) -> list[Table]:
    """Accuracy, visual tokens (mean over decoder layers, and at the end), TFLOPs and milliseconds of a prefill.

    A second table gives each method's accuracy by kind.
    """
    rows, kinds = [], [{"kind": kind} for kind in world.KINDS]
    for method in methods:
        none = method == "none"
        pruner = None if none else attach(model, processor, method=method, keep=keep)
        per_question: list[tuple[float, float, float]] = []

        def record(part: list[Item], pruner: Any = pruner, seen: list[Any] = per_question) -> None:
            if pruner is not None:
                trace = pruner.trace
                layers = trace.tokens_per_layer.llm_attention
                seen.append((sum(layers) / len(layers), trace.flops / len(part), float(len(part))))

        with pruner or nullcontext():
            answers = answer_all(model, processor, items, batch=batch, report=report, after=record)
            milliseconds = prefill_milliseconds(model, processor, items[:10])
        row: dict[str, Any] = {"method": method} | accuracy_row(items, answers, "mean", "accuracy")
        for by_kind in kinds:
            by_kind |= accuracy_row(items, answers, by_kind["kind"], method)
        if none:
            per_question = [(float(world.GRID**2), full_flops(model, processor, item), 1.0) for item in items]
        total = sum(n for _, _, n in per_question)
        row["tokens at the end"] = world.GRID**2 if none else keep
        row["tokens, mean of decoder layers"] = sum(t * n for t, _, n in per_question) / total
        row["TFLOPs a prefill"] = sum(f * n for _, f, n in per_question) / total / 1e12
        row["ms a prefill"] = milliseconds
        rows.append(row)
    title = f"{len(items)} test questions at {keep} of {world.GRID**2} tokens"
    return [Table(title, rows), Table(f"{title}, by kind", kinds)]


def full_flops(model: Any, processor: Any, item: Item) -> float:
    """FLOPs of one prefill without pruning."""
    text = len(processor.tokenizer(prompt_for(processor, item.question.text)).input_ids)
    return flops(model, method="none", text_tokens=text).total


def prefill_milliseconds(model: Any, processor: Any, items: list[Item]) -> float:
    """Median wall-clock of the prefill and one token, batch 1, after one warm-up."""
    seconds = []
    for item in [items[0], *items]:
        inputs = processor(
            images=world.render(item.scene), text=prompt_for(processor, item.question.text), return_tensors="pt"
        ).to(model.device, model.dtype)
        began = time.perf_counter()
        with torch.inference_mode():
            model.generate(**inputs, max_new_tokens=1, do_sample=False)
        seconds.append(time.perf_counter() - began)
    return 1000 * sorted(seconds[1:])[(len(seconds) - 1) // 2]


app = typer.Typer(add_completion=False, rich_markup_mode=None)
console = Console()


@app.command(help=__doc__)
def main(
    model: Annotated[str, typer.Option(help='"micro", or a folder with an exported model')] = "micro",
    by_type_: Annotated[bool, typer.Option("--by-type", help="exact match by question type")] = False,
    methods: Annotated[str, typer.Option(help="methods to compare, separated by spaces or commas")] = "",
    oracle: Annotated[bool, typer.Option("--oracle", help="patches of the asked objects against random ones")] = False,
    coverage: Annotated[int, typer.Option(help="scenes for the coverage count, 0 to leave it out")] = 0,
    keep: Annotated[int, typer.Option(help="visual tokens that stay")] = 64,
    questions: Annotated[int, typer.Option(help="test questions of each table")] = 1000,
    split: Annotated[str, typer.Option(help="test or validation")] = "test",
    seed: Annotated[int, typer.Option(help="which questions")] = 0,
    batch: Annotated[int, typer.Option(help="questions a batch")] = 8,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 1,
    dtype: Annotated[str, typer.Option(help="bfloat16, float32 or auto")] = "auto",
    json: Annotated[Path | None, typer.Option(help="file for all numbers")] = None,
    markdown: Annotated[Path | None, typer.Option(help="file for the tables")] = None,
) -> None:
    names = methods.replace(",", " ").split()
    if unknown := [name for name in names if name not in ("none", *list_methods())]:
        raise typer.BadParameter(f"{unknown[0]!r} is no method; use none, {', '.join(list_methods())}")
    if not (by_type_ or names or oracle or coverage):
        raise typer.BadParameter("nothing to measure; give --by-type, --methods, --oracle or --coverage N")
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    lvlm, processor = load(model, dtype="auto" if dtype == "auto" else getattr(torch, dtype))
    items = sample_items(questions, split=split, seed=seed)
    covered = sample_items(coverage, split=split, seed=seed + 1, kinds=OBJECT_KINDS)
    answers = 3 * len(items) * by_type_ + len(items) * (len(names) + 2 * oracle) + 2 * coverage
    columns = (TextColumn("questions"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    tables = []
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=answers)

        def report(done: int) -> None:
            progress.advance(task, done)

        if by_type_:
            tables.append(by_type(lvlm, processor, items, batch=batch, report=report))
        if names:
            tables += compare_methods(lvlm, processor, items, names, keep, batch=batch, report=report)
        if oracle:
            tables.append(compare_oracle(lvlm, processor, items, keep, seed=seed, batch=batch, report=report))
        if coverage:
            tables.append(compare_coverage(lvlm, processor, covered, keep, ask=answer_all, batch=batch, report=report))
    about = {
        "model": model,
        "split": split,
        "seed": seed,
        "questions": questions,
        "batch": batch,
        "dtype": str(next(lvlm.parameters()).dtype),
        "machine": f"{platform.machine()}, {threads} CPU threads",
        "torch": torch.__version__,
    }
    text = "\n".join(table.markdown() for table in tables)
    console.print(Markdown(text))
    if json is not None:
        write_json(json, tables, about)
    if markdown is not None:
        markdown.parent.mkdir(parents=True, exist_ok=True)
        markdown.write_text(text)


if __name__ == "__main__":
    app()
