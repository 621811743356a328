"""Benchmarks on lmms-eval as one row: each benchmark's figure, their mean, and what a prompt kept and cost."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager, get_task_dict

from ivtp.errors import ConfigError, InputError
from ivtp.evaluation.asked import Asked, Row
from ivtp.evaluation.benchmarks import PAPER12, Column
from ivtp.evaluation.lmms import IvtpModel
from ivtp.evaluation.micro12 import MICRO12
from ivtp.files.outputs import write_text


def columns(tasks: Sequence[str]) -> tuple[Column, ...]:
    """Of the tasks those that the paper's table shows, or its like of the micro world, in its order."""
    return tuple(column for column in (*PAPER12, *MICRO12) if column.task in tasks)


def judged(asked: Asked) -> tuple[str, ...]:
    """Tasks that need a judge that is not there."""
    if os.environ.get("OPENAI_API_KEY") or os.environ.get("AZURE_API_KEY"):
        return ()
    return tuple(column.task for column in columns(asked.tasks) if column.judged)


def evaluate(asked: Asked, on_answers: Callable[[int], None] | None = None) -> dict[str, Any] | None:
    """Run the tasks; what lmms-eval found, with every sample. None in all processes of several but the first.

    `on_answers` is told how many more were answered.
    Raises `ConfigError` for an unknown task, and whatever a model raises: an error is never an answer.
    """
    manager, left = _tasks(asked)
    model = IvtpModel(
        asked.model,
        method=asked.method,
        keep=asked.keep,
        batch_size=asked.batch_size,
        device=asked.device,
        dtype=asked.dtype,
        clip=asked.clip,
        answers=asked.answers,
        on_answers=on_answers,
        **(asked.options or {}),
    )

    found: dict[str, Any] | None = simple_evaluate(
        model, tasks=left, limit=whole(asked.limit), bootstrap_iters=0, task_manager=manager, log_samples=True
    )
    return found


def count_questions(asked: Asked) -> int:
    """How many prompts `evaluate` would answer, so far as each question is one. Raises `ConfigError` as it does."""
    manager, left = _tasks(asked)
    tasks = get_task_dict(left, manager, "chat").values()
    return sum(min(whole(asked.limit) or len(task.eval_docs), len(task.eval_docs)) for task in tasks)


def whole(limit: int | None) -> int | None:
    """A limit at which nothing is cut apart: MME asks in pairs, micro12's MMBench in fours."""
    return None if limit is None else 4 * math.ceil(limit / 4)


def _tasks(asked: Asked) -> tuple[Any, list[str]]:
    """lmms-eval's manager of tasks, and the names of those that can be run."""
    manager = TaskManager(include_path=list(asked.include_path) or None)
    unknown = [task for task in asked.tasks if not manager.match_tasks([task])]
    if unknown:
        raise ConfigError(
            f"unknown task {unknown[0]!r}; use paper12, micro12 or names that `python -m lmms_eval --tasks list` prints"
        )
    left = [task for task in asked.tasks if task not in judged(asked)]
    if not left:
        raise InputError(f"{', '.join(asked.tasks)} need a judge; set OPENAI_API_KEY, or ask for other tasks")
    return manager, left


def row_of(asked: Asked, found: Mapping[str, Any], full: Row | None = None) -> Row:
    """The table's row: every benchmark's figure, the mean of those that there are, and its change against `full`."""
    figures = {column.title: column.value(found["results"]) for column in columns(asked.tasks)}
    known = {title: value for title, value in figures.items() if value is not None}
    row: Row = {"method": asked.method, "keep": asked.keep if asked.method != "none" else "all", **figures}
    row["mean"] = statistics.mean(known.values()) if known else None
    if full is not None and known and all(full.get(title) is not None for title in known):
        row["change"] = row["mean"] - statistics.mean(full[title] for title in known)
    others = [task for task in found["results"] if task not in {column.task for column in (*PAPER12, *MICRO12)}]
    for task in others:  # each figure as lmms-eval has it
        figures_of = found["results"][task].items()
        row |= {f"{task} {key.removesuffix(',none')}": v for key, v in figures_of if _is_figure(key, v)}
    return row | mean_costs(found["samples"])


COUNTED = ("visual_tokens", "tflops")
"""Costs of an answer that are the same wherever it was given."""


def mean_costs(samples: Mapping[str, Sequence[Mapping[str, Any]]], names: Sequence[str] = (*COUNTED, "seconds")) -> Row:
    """Visual tokens that are left, TFLOPs of a prefill and seconds of an answer, over all prompts."""
    costs = [cost for of_task in samples.values() for s in of_task for cost in s["token_counts"] if cost]
    return {name: statistics.mean(cost[name] for cost in costs) if costs else None for name in names}


def _is_figure(key: str, value: Any) -> bool:
    return key.endswith(",none") and "_stderr" not in key and isinstance(value, int | float)


def save(folder: Path, asked: Asked, row: Row, found: Mapping[str, Any]) -> Path:
    """Row, lmms-eval's results and all samples, each in a file; returns that of the row."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{asked.name}.json"
    about = {"asked": asdict(asked), **{name: version(name) for name in ("lmms_eval", "torch", "transformers")}}
    document = {"about": about, "row": row, "results": found["results"]}
    lines = [json.dumps({"task": t, **s}, default=str) for t, samples in found["samples"].items() for s in samples]
    write_text(file.with_suffix(".samples.jsonl"), "\n".join(lines) + "\n", "--output")
    write_text(file, json.dumps(document, indent=1, default=str) + "\n", "--output")
    return file


def saved_row(folder: Path, asked: Asked) -> Row | None:
    """The row of an earlier run of the same."""
    file = folder / f"{asked.name}.json"
    if not file.is_file():
        return None
    row: Row = json.loads(file.read_text(encoding="utf-8"))["row"]
    return row
