"""The retrained table of the micro world: every method trained with pruning in the loop, and trained projectors.

``python -m recipes.micro.retrain records`` writes the data, ``choose`` compares learning rates on the validation
split, ``table`` trains and measures every row from the shipped weights. Each row is a few `ivtp train` commands, in
processes of their own on a thread each; killed at any moment, the same command goes on. ``start`` and ``predictors``
are steps of rows that `ivtp train` has no command for.
"""

from __future__ import annotations

import os
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markdown import Markdown

from ivtp.cli.console import bar, err
from ivtp.cli.door import interruptible, quiet, run
from ivtp.cli.eval import named_tasks
from ivtp.evaluation.answers import cache_folder
from ivtp.evaluation.asked import Asked
from ivtp.files.machine import processor_name
from ivtp.files.outputs import check_folder, write_text
from ivtp.generate import load, save
from ivtp.micro import world
from ivtp.plug import compress
from recipes.micro import retrain_records
from recipes.micro.bench import Bench
from recipes.micro.retrain_predictors import train_predictors
from recipes.micro.retrain_runs import NAMES, Arm, Settings, arms, parts, train_arm, trained_folder
from recipes.micro.scoring import Table, interval, write_json
from recipes.micro.units import by_format, gap

CHOICES = ((3e-5, False), (1e-4, False), (3e-4, False), (3e-4, True), (1e-3, True))
"""Learning rates, with the decoder's own weights or with adapters."""

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode=None)
console = Console()

Data = Annotated[Path, typer.Option(metavar="DIR", help="folder that `records` wrote")]
Runs = Annotated[Path, typer.Option(metavar="DIR", help="folder of all runs: weights, logs, what is done")]
Model = Annotated[str, typer.Option(help="the weights that every row begins with")]
Batch = Annotated[int, typer.Option(min=1, help="records of a step")]
MaxSteps = Annotated[int | None, typer.Option(min=1, help="steps of a stage, in place of one epoch")]
Workers = Annotated[int, typer.Option(min=1, help="rows at once, on a CPU thread each")]
Output = Annotated[Path, typer.Option(metavar="DIR", help="folder for JSON and Markdown")]
Keep = Annotated[int, typer.Option(min=1, max=world.GRID**2, help="tokens that stay")]


@app.command()
def records(
    out: Annotated[Path, typer.Option(metavar="DIR", help="folder for finetune.json, pretrain.json and images")],
    records: Annotated[int, typer.Option(min=1, help="questions, in equal numbers of every format")] = 2400,
) -> None:
    """Write training photos with questions, and with captions, as `ivtp train` reads them: the same at every call."""
    check_folder(out, "--out")
    with bar(records, "records") as told:
        count = retrain_records.write_records(out, records, told)
    console.print(f"{count} records in {out}", markup=False, soft_wrap=True)


@app.command()
def start(
    compressor: Annotated[str, typer.Option(help="one of ivtp.list_compressors()")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="folder for the checkpoint")],
    keep: Keep = 64,
    model: Model = "micro",
) -> None:
    """Save a model with an untrained compressor in the projector's place."""
    check_folder(out, "--out")
    quiet()
    network, processor = load(model)
    compress(network, processor, compressor, tokens=keep)
    save(network, processor, out)


@app.command()
def predictors(
    data: Data,
    out: Annotated[Path, typer.Option(metavar="FILE", help="safetensors file for the predictors")],
    keep: Keep = 64,
    steps: Annotated[int, typer.Option(min=1, help="steps")] = 100,
    batch: Annotated[int, typer.Option(min=1, help="photos of a step")] = 16,
    model: Model = "micro",
) -> None:
    """Train DynamicViT's predictors on the photos; prints the losses of each step."""
    quiet()
    found = Settings(data, Path(), model).records[retrain_records.PRETRAIN]
    images = [record.images[0] for record in found]
    train_predictors(images, keep, out, steps=steps, batch=batch, seed=0, model=model, on_step=print)


@app.command()
def choose(
    data: Data,
    runs: Runs,
    keep: Keep = 64,
    steps: Annotated[int, typer.Option(min=1, help="steps of each training")] = 60,
    batch: Batch = 16,
    questions: Annotated[int, typer.Option(min=1, help="questions of the validation split")] = 520,
    workers: Workers = 1,
    model: Model = "micro",
    output: Output = Path("results"),
) -> None:
    """Which learning rate, and LoRA or not: IVTP, trained for a few steps and asked about the validation split."""
    _begin(output, runs)
    shared = Settings(data, runs, model, batch=batch, max_steps=steps)
    options = [replace(shared, runs=runs / _name(*one), learning_rate=one[0], lora=one[1]) for one in CHOICES]
    arm = Arm("ivtp", keep)
    with (
        _going_on(runs),
        bar(sum(part.steps for of in options for part in parts(arm, of)), "steps") as told,
        ThreadPoolExecutor(workers) as pool,
    ):
        facts = list(pool.map(lambda of: train_arm(arm, of, told), options))
    reference = _scored(model, keep, questions)
    none = {"training": "none", "minutes": 0.0, "last loss": None} | by_format(reference, "accuracy")["mean"]
    rows = [none | interval("to none", 0.0, [0.0, 0.0])]
    for of, (done,) in zip(options, facts, strict=True):
        scored = _scored(str(trained_folder(arm, of)), keep, questions)
        rows.append(
            {"training": of.runs.name, "minutes": done["minutes"], "last loss": done["losses"][-1]}
            | by_format(scored, "accuracy")["mean"]
            | interval("to none", *gap(scored, reference))
        )
    asked = rows[0]["questions"]
    made = Table(f"IVTP at {keep} tokens, {steps} steps of {batch}, {asked} questions of the validation split", rows)
    about: dict[str, Any] = {"command": _command(), "commands": [done["command"] for (done,) in facts]}
    about |= {"split": "validation", "torch": torch.__version__, "machine": processor_name()}
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "retrained-choice.json", [made], about)
    write_text(output / "retrained-choice.md", f"`{_command()}`\n\n{made.markdown()}", "--output")
    console.print(Markdown(made.markdown()))


def _name(rate: float, lora: bool) -> str:
    return f"{'lora' if lora else 'weights'}-{rate:g}"


def _scored(model: str, keep: int, questions: int) -> Any:
    """Answers with IVTP attached, as it was in training."""
    bench = Bench(model, questions, 12, "float32", "validation")
    return bench.score(bench.attach("ivtp", keep, "original"))


@app.command()
def table(
    data: Data,
    runs: Runs,
    keep: Annotated[list[int] | None, typer.Option(min=1, max=world.GRID**2, help="tokens that stay (repeat)")] = None,
    only: Annotated[list[str] | None, typer.Option(metavar="NAME", help=f"rows: {', '.join(NAMES)} (repeat)")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="orders of the data that full, topk and ivtp learn from")] = 2,
    learning_rate: Annotated[float, typer.Option(min=0, help="of the second stage")] = 3e-4,
    lora: Annotated[bool, typer.Option("--lora", help="adapters in place of the decoder's own weights")] = False,
    batch: Batch = 16,
    max_steps: MaxSteps = None,
    predictor_steps: Annotated[int, typer.Option(min=1, help="steps of DynamicViT's predictors")] = 100,
    tasks: Annotated[str, typer.Option(help="micro12, or some of its tasks, with commas")] = "micro12",
    limit: Annotated[int | None, typer.Option(min=1, help="questions of each benchmark; default: all")] = None,
    workers: Workers = 1,
    model: Model = "micro",
    cache: Annotated[Path | None, typer.Option(metavar="DIR", help="where answers are kept")] = None,
    output: Output = Path("results"),
) -> None:
    """Train and measure every row; what is done is written after each."""
    from recipes.micro.retrain_table import Table as Retrained  # lmms-eval comes with it

    _begin(output, runs)
    settings = Settings(data, runs, model, learning_rate, lora, batch, max_steps, predictor_steps)
    wanted = arms(keep or (64, 16), only or (), seeds)
    named, folders = named_tasks(tasks, limit)
    kept = str(cache or cache_folder() / "answers")
    asked = Asked(model, named, "none", limit=limit, batch_size=16, include_path=folders, answers=kept)
    made = Retrained(settings, asked, wanted)
    with _going_on(runs), bar(made.steps(), "steps and questions") as told:
        for _ in made.make(workers, told):
            files = made.write(output, _command())
    for file in files:
        err.print(f"written: {file}", markup=False, soft_wrap=True)


def _begin(output: Path, runs: Path) -> None:
    check_folder(output, "--output")
    check_folder(runs, "--runs")
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes to come
    quiet()


def _command() -> str:
    return shlex.join(["python", "-m", "recipes.micro.retrain", *sys.argv[1:]])


def _going_on(runs: Path) -> Any:
    return interruptible(lambda: f"what was trained is kept in {runs}; the same command goes on behind it")


if __name__ == "__main__":
    run(app)
