"""How each row of the retrained table is trained: its commands, one after the other, each in a process of its own."""

from __future__ import annotations

import csv
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from ivtp.errors import ConfigError, IvtpError
from ivtp.evaluation.asked import Run
from ivtp.files.outputs import write_text
from ivtp.files.sidecar import read_json
from ivtp.registry import list_compressors
from ivtp.training.folder import last_checkpoint
from ivtp.training.plan import estimate
from ivtp.training.records import Record, read_records, refuse
from ivtp.training.run import Asked
from ivtp.training.stages import FINETUNE, LORA, PRETRAIN, Stage
from recipes.micro import retrain_records
from recipes.micro.loop import CsvLog
from recipes.micro.retrain_predictors import predictor_flops

FULL = "full"
METHODS = ("random", "topk", "spatial", "evit", "tome", "dynamicvit", "ivtp", "ivtp+")
COMPRESSORS = ("cabstractor", "llamavid", "resampler", "qformer")
NAMES = (FULL, *METHODS, *COMPRESSORS)
REPEATED = (FULL, "topk", "ivtp")
"""Trained with several orders of the data, so that their spread is known."""
FIRST_SEED = 42
SAVE_STEPS = 25
Told = Callable[[int], Any]
"""Is told how many more steps were done."""
Facts = dict[str, Any]


class FailedError(IvtpError):
    """A command of a row ended with an error."""


@dataclass(frozen=True)
class Settings:
    """What all rows share."""

    data: Path
    runs: Path
    model: str = "micro"
    learning_rate: float = 3e-4
    lora: bool = False
    batch: int = 16
    max_steps: int | None = None
    """In place of one epoch of each stage."""
    predictor_steps: int = 100

    @cached_property
    def records(self) -> dict[str, list[Record]]:
        """Of each stage's file. Raises `ConfigError` for files that are not there, or hold bad records."""
        found = {}
        for name in (retrain_records.FINETUNE, retrain_records.PRETRAIN):
            file = self.data / name
            if not file.is_file():
                raise ConfigError(f"--data {self.data} holds no {name}; write it with the command `records`")
            found[name], bad = read_records(file, self.data, needs_image=True)
            refuse(bad, file)
        return found

    @property
    def stage(self) -> Stage:
        """The second one."""
        return LORA if self.lora else FINETUNE


@dataclass(frozen=True)
class Arm:
    """A row: what is trained, at how many tokens, in which order of the data."""

    name: str
    keep: int
    """Of the full model, all there are: 0."""
    seed: int = FIRST_SEED

    @property
    def folder(self) -> str:
        """Of its run."""
        return f"{self.name}-{self.seed}" if self.name == FULL else f"{self.name}-{self.keep}-{self.seed}"

    @property
    def compressor(self) -> bool:
        """Whether a trained projector gives the tokens, in the place of a method."""
        return self.name in list_compressors()

    def run(self, settings: Settings) -> Run:
        """What is attached, in training as in evaluation."""
        if self.name == FULL or self.compressor:
            return Run("none", name=self.name)
        options = {"predictors": str(predictors_file(self, settings))} if self.name == "dynamicvit" else {}
        return Run(self.name, self.keep, options)


def arms(keeps: Sequence[int], only: Sequence[str], seeds: int) -> list[Arm]:
    """All rows, in the order in which they are made. Raises `ConfigError` for a name that there is not."""
    for name in only:
        if name not in NAMES:
            raise ConfigError(f"--only {name}: there is no such row; use one of {', '.join(NAMES)}")
    found = []
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        names = [name for name in only or NAMES if seed == FIRST_SEED or name in REPEATED]
        found += [Arm(name, 0 if name == FULL else keep, seed) for keep in keeps for name in names]
    return list(dict.fromkeys(found))


def predictors_file(arm: Arm, settings: Settings) -> Path:
    """What DynamicViT's predictors are written to."""
    return settings.runs / arm.folder / "predictors.safetensors"


def trained_folder(arm: Arm, settings: Settings) -> Path:
    """The checkpoint that a row is measured with."""
    return settings.runs / arm.folder / "finetune"


# ---- the commands of a row --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """One command of a row."""

    name: str
    words: tuple[str, ...]
    """Behind `python`."""
    folder: Path
    """Of the row."""
    steps: int
    flops: Callable[[], float]
    """Of its training; counted once its model is there."""

    @property
    def done(self) -> Path:
        """What is written when it is done."""
        return self.folder / f"{self.name}.done.json"

    @property
    def log(self) -> Path:
        """Losses and CPU seconds, step by step."""
        return self.folder / f"{self.name}.csv"

    @property
    def command(self) -> str:
        """As it is typed."""
        return shlex.join(["python", *self.words])


def parts(arm: Arm, settings: Settings) -> list[Part]:
    """What has to be run for a row, in this order."""
    folder, model = settings.runs / arm.folder, settings.model
    found: list[Part] = []
    if arm.compressor:
        put_in = {"model": model, "compressor": arm.name, "keep": arm.keep, "out": folder / "start"}
        found.append(_own("start", folder, put_in, 0, lambda: 0.0))
        first = _asked(arm, settings, PRETRAIN, retrain_records.PRETRAIN, str(folder / "start"), folder / "pretrain")
        found.append(_trained(first, settings, folder))
        model = str(folder / "pretrain")
    if arm.name == "dynamicvit":
        steps, batch = settings.predictor_steps, settings.batch
        given = {"model": model, "data": settings.data, "keep": arm.keep, "steps": steps, "batch": batch}
        given |= {"out": predictors_file(arm, settings)}
        cost = predictor_flops(model, arm.keep) * steps * batch
        found.append(_own("predictors", folder, given, steps, lambda: cost))
    last = _asked(arm, settings, settings.stage, retrain_records.FINETUNE, model, folder / "finetune")
    return [*found, _trained(last, settings, folder)]


def _own(name: str, folder: Path, given: Mapping[str, Any], steps: int, flops: Callable[[], float]) -> Part:
    """A command of the recipe."""
    return Part(name, ("-m", "recipes.micro.retrain", name, *_flags(given)), folder, steps, flops)


def _flags(given: Mapping[str, Any]) -> list[str]:
    return [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]


def _asked(arm: Arm, settings: Settings, stage: Stage, file: str, model: str, out: Path) -> Asked:
    """A stage of a row; `--resume` begins where there is nothing to go on with."""
    run = arm.run(settings)
    rate = PRETRAIN.learning_rate if stage is PRETRAIN else settings.learning_rate
    arguments = {"learning_rate": rate, "save_steps": SAVE_STEPS, "disable_tqdm": True}
    return Asked(
        stage,
        settings.data / file,
        settings.data,
        model,
        out,
        method=run.method,
        keep=run.keep,
        options=run.options,
        max_steps=settings.max_steps,
        batch=settings.batch,
        checkpointing=False,
        seed=arm.seed,
        arguments=arguments,
        resume=True,
    )


def _trained(asked: Asked, settings: Settings, folder: Path) -> Part:
    records = settings.records[asked.data.name]
    assert asked.batch is not None
    steps = asked.max_steps or math.ceil(len(records) / asked.batch)

    def flops() -> float:
        return estimate(asked, records, devices=1).total_flops

    return Part(asked.out.name, words_of(asked), folder, steps, flops)


def words_of(asked: Asked) -> tuple[str, ...]:
    """The `ivtp train` command that is `asked`."""
    lora = asked.stage is LORA
    words = ["-m", "ivtp", "train", asked.stage.name.removesuffix("-lora"), *["--lora"] * lora]
    given: dict[str, Any] = {"data": asked.data, "images": asked.images, "model": asked.model, "out": asked.out}
    given |= {"method": asked.method}
    if asked.method != "none":
        given |= {"keep": asked.keep}
    given |= {"max-steps": asked.max_steps, "batch": asked.batch, "seed": asked.seed}
    words += _flags(given)
    for name, value in asked.options.items():
        words += ["--option", f"{name}={value}"]
    for name, value in asked.arguments.items():
        words += ["--set", f"{name}={json.dumps(value)}"]
    return (*words, *["--no-checkpointing"] * (not asked.checkpointing), *["--resume"] * asked.resume)


# ---- running them -----------------------------------------------------------------------------------------------


def train_arm(arm: Arm, settings: Settings, told: Told) -> list[Facts]:
    """What each of the row's commands was and took; those that are done are not run again."""
    return [run_part(part, told) for part in parts(arm, settings)]


def run_part(part: Part, told: Told) -> Facts:
    """What a command was and took, now or before.

    Raises `ConfigError` where the folder holds another run, `FailedError` where the command fails.
    """
    before = read_json(part.done)
    if before:
        if before["command"] != part.command:
            raise ConfigError(
                f"--runs: {part.folder} was made by another command ({before['command']}, now {part.command}); "
                "name another folder"
            )
        told(part.steps)
        return before
    part.folder.mkdir(parents=True, exist_ok=True)
    _follow(part, told)
    logged = read_log(part.log)
    facts = {
        "command": part.command,
        "steps": len(logged),
        "minutes": sum(row["seconds"] for row in logged) / 60,
        "flops": part.flops(),
        "losses": thinned([row["loss"] for row in logged]),
    }
    write_text(part.done, json.dumps(facts, indent=1) + "\n", "--runs")
    _forget_checkpoints(part)
    return facts


def _follow(part: Part, told: Told) -> None:
    """Run the command on one CPU thread, and keep what it prints, with the CPU seconds of every step."""
    step = _restart_log(part)
    told(step)
    log, said = CsvLog(part.log, append=True), [""]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    words = [sys.executable, *part.words]
    with (
        (part.folder / f"{part.name}.txt").open("a", encoding="utf-8") as output,
        subprocess.Popen(
            words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process,
    ):
        assert process.stdout is not None
        watched, spent = psutil.Process(process.pid), 0.0
        for line in process.stdout:
            output.write(line)
            said.append(line.strip() or said[-1])
            loss = loss_in(line)
            if loss is not None:
                now = sum(watched.cpu_times()[:2])
                step += 1
                log.write({"step": step, "loss": loss, "seconds": now - spent})
                spent = now
                told(1)
    if process.returncode:
        raise FailedError(f"{part.command}: {said[-1]}; see {part.folder / part.name}.txt")


def loss_in(line: str) -> float | None:
    """Of a step, as transformers' trainer prints it; None of any other line."""
    if not line.startswith("{'loss': "):
        return None
    return float(line.removeprefix("{'loss': ").partition(",")[0].strip("'}\n"))


def _restart_log(part: Part) -> int:
    """The step behind which the command goes on; of what was logged behind it nothing is left."""
    checkpoint = last_checkpoint(part.folder / part.name)
    step = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
    rows = [row for row in read_log(part.log) if row["step"] <= step]
    log = CsvLog(part.log, append=False)
    for row in rows:
        log.write({**row, "step": int(row["step"])})
    return step


def read_log(file: Path) -> list[dict[str, float]]:
    """The rows of a part's log."""
    if not file.is_file():
        return []
    with file.open(encoding="utf-8", newline="") as opened:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(opened)]


def thinned(values: Sequence[float], count: int = 20) -> list[float]:
    """Means of at most so many stretches of equal length."""
    count = min(count, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)] if count else []
    spans = [values[a:b] for a, b in pairwise(edges)]
    return [round(sum(span) / len(span), 5) for span in spans]


def _forget_checkpoints(part: Part) -> None:
    """What only a run that goes on reads."""
    for folder in (part.folder / part.name).glob("checkpoint-*"):
        shutil.rmtree(folder)
