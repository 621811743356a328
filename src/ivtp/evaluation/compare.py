"""Every method on the same test questions: `ivtp compare`.

The questions are those of the twelve formats, in equal numbers, about as many simple photos as middling and crowded
ones; accuracy is the mean of the formats' own figures, over all photos and over those of so many objects, from stock
``generate`` in left-padded batches. GFLOPs and milliseconds are of prefills at batch 1, one question of each format,
all methods interleaved; the clock also sees what ``generate`` does around a prefill. Methods are shared out among
processes (small models make poor use of more than one thread); finished ones are saved as they come, and ``--resume``
goes on behind them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers

from ivtp.config import PruneConfig
from ivtp.cost.flops import flops, prompt_tokens
from ivtp.cost.sizes import sizes
from ivtp.errors import ConfigError, short_reason
from ivtp.evaluation.scoring import Dtype, Table, interval, write_json
from ivtp.evaluation.units import CROWDS, Unit, by_crowd, by_format, collect, crowd_name, gap
from ivtp.files.machine import processor_name
from ivtp.generate import complete, load, prompt_for
from ivtp.micro import world
from ivtp.micro.formats import list_formats
from ivtp.micro.formats.base import Example
from ivtp.plug import Pruner, attach
from ivtp.registry import method_class

LONGEST_ANSWER = 64  # tokens
Row = dict[str, Any]
Run = tuple[str, int]
"""A method and how many visual tokens it keeps."""
Report = Callable[[Iterable[Any], int, str], Iterable[Any]]
"""Passes items on, of which there are so many and which are called so; shows how far it is."""


class Bench:
    """A model and the questions of every format, each photo drawn once: what `measure` is asked with."""

    def __init__(self, model: str, questions: int, batch: int, dtype: str, split: str = "test") -> None:
        self.model: Any
        self.processor: Any
        self.model, self.processor = load(model, dtype=dtype)
        each = -(-questions // len(list_formats()))
        self.units = sorted((u for group in collect(split, each, even=True) for u in group), key=lambda u: u.form.title)
        self.examples = [example for unit in self.units for example in unit.examples]
        self._batch = batch

    @cached_property
    def batches(self) -> list[Any]:
        """The inputs of all questions."""
        starts = range(0, len(self.examples), self._batch)
        return [self.inputs(self.examples[start : start + self._batch]) for start in starts]

    def one_each(self) -> list[Unit]:
        """The first unit of every format."""
        return list({unit.form.title: unit for unit in reversed(self.units)}.values())

    def inputs(self, examples: list[Example]) -> Any:
        """The model's inputs, left-padded."""
        prompts = [prompt_for(self.processor, example.prompt) for example in examples]
        images = [example.photo.picture() for example in examples]
        inputs = self.processor(images=images, text=prompts, padding=True, return_tensors="pt")
        return inputs.to(self.model.device, self.model.dtype)

    def attach(self, method: str | type[Any], keep: int, positions: str, **options: Any) -> Pruner | None:
        """The pruner of a run; none for the full model."""
        if method == "none":
            return None
        return attach(self.model, self.processor, method=method, keep=keep, positions=positions, **options)

    def score(self, pruner: Pruner | None) -> list[tuple[Unit, list[float]]]:
        """Ask all questions, and let the pruner go; how right the answers of every unit are."""
        answers: list[str] = []
        with pruner or nullcontext():
            for inputs in self.batches:
                answers += complete(self.model, self.processor, inputs, LONGEST_ANSWER)
        said = iter(answers)
        return [(unit, [unit.form.score(example, next(said)) for example in unit.examples]) for unit in self.units]


def measure(bench: Bench, method: str, keep: int, positions: str) -> Row:
    """Accuracy of one method, by format and objects too, every answer's score, and the tokens that it keeps."""
    pruner = bench.attach(method, keep, positions)
    scored = bench.score(pruner)
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
        "by objects": by_crowd(scored, "accuracy"),
        "by format": {title: row["accuracy"] for title, row in figures.items() if title != "mean"},
        "scores": " ".join(f"{score:g}" for _, scores in scored for score in scores),
    }


_bench: Bench


def _begin(*bench: Any) -> None:
    global _bench
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _set_up(threads=1)
    _bench = Bench(*bench)


def _end_with_parent() -> None:
    """A pool's processes outlive a main process that was killed, and wait for jobs for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _set_up(threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)


def _job(method: str, keep: int, positions: str) -> Row:
    return measure(_bench, method, keep, positions)


def measure_all(runs: list[Run], positions: str, workers: int, bench: tuple[Any, ...]) -> Iterator[Row]:
    """Rows of all runs as processes finish them, each process with a `Bench` of its own."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, initializer=_begin, initargs=bench) as pool:
        jobs = [pool.submit(_job, method, keep, positions) for method, keep in runs]
        try:
            for job in as_completed(jobs):
                yield job.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def time_prefills(bench: Bench, runs: list[Run], positions: str, report: Report) -> dict[Run, Row]:
    """Mean GFLOPs and median milliseconds of a prefill at batch 1: all runs in turn, prompt by prompt."""
    times: dict[Run, list[float]] = {run: [] for run in runs}
    costs: dict[Run, list[float]] = {run: [] for run in runs}
    prompts = [bench.inputs(list(unit.examples[:1])) for unit in bench.one_each()]
    for inputs in report(prompts, len(prompts), "milliseconds"):
        for method, keep in runs:
            pruner = bench.attach(method, keep, positions)
            with pruner or nullcontext():
                _prefill_ms(bench, inputs)  # warms up
                times[method, keep].append(_prefill_ms(bench, inputs))
                costs[method, keep].append(_flops(bench, pruner, inputs))
    return {
        run: {"GFLOPs": statistics.mean(costs[run]) / 1e9, "ms a prefill": statistics.median(times[run])}
        for run in runs
    }


def _prefill_ms(bench: Bench, inputs: Any) -> float:
    began = time.perf_counter()
    complete(bench.model, bench.processor, inputs, max_new_tokens=1)
    return 1000 * (time.perf_counter() - began)


def _flops(bench: Bench, pruner: Pruner | None, inputs: Any) -> float:
    """Of the last prefill."""
    if pruner is not None and pruner.trace is not None:
        return pruner.trace.flops
    text = prompt_tokens(inputs["input_ids"].shape[1], sizes(bench.model).geometry)
    return flops(bench.model, method="none", text_tokens=text).total


def add_differences(rows: list[Row], units: list[Unit], report: Report) -> None:
    """What each method gains or loses to all tokens, and to IVTP at the same count, with paired 95% intervals.

    An interval that holds 0 shows no difference.
    """
    found = {(row["method"], row["keep"]): _scored(row, units) for row in rows}
    for row in report(rows, len(rows), "differences"):
        for name, other in (("to all tokens", ("none", world.GRID**2)), ("to ivtp", ("ivtp", row["keep"]))):
            row[name] = None
            if other in found and other != (row["method"], row["keep"]):
                row |= interval(name, *gap(found[row["method"], row["keep"]], found[other]))


def _scored(row: Row, units: list[Unit]) -> list[tuple[Unit, list[float]]]:
    """Every unit with the scores of a row."""
    scores = map(float, row["scores"].split())
    return [(unit, [next(scores) for _ in unit.examples]) for unit in units]


def tables(rows: list[Row], asked: str) -> list[Table]:
    """All keeps side by side, then one table for each; the full model on top, then the best accuracy.

    ``asked`` says in every title how it was measured.
    """
    full = [row for row in rows if row["method"] == "none"]
    keeps = sorted({row["keep"] for row in rows} - {world.GRID**2})
    made = [
        Table(f"Tokens kept of {world.GRID**2}: accuracy, GFLOPs and ms a prefill; {asked}", _overview(rows, keeps))
    ]
    for keep in keeps:
        mine = sorted((r for r in rows if r["keep"] == keep), key=lambda r: -r["accuracy"])
        shown = [{"method": _label(row["method"])} | _flat(row) for row in full + mine]
        made.append(Table(f"{keep} of {world.GRID**2} tokens, {asked}", shown))
    return made


def _flat(row: Row) -> Row:
    """A row's columns: the accuracies by the number of objects stand beside the mean, the formats' are left out."""
    columns = {k: v for k, v in row.items() if k not in ("method", "keep", "by objects", "by format", "scores")}
    head = {k: columns.pop(k) for k in ("questions", "accuracy", "accuracy low", "accuracy high")}
    for crowd, figures in row["by objects"].items():
        head |= {f"{crowd}{end}": figures[f"accuracy{end}"] for end in ("", " low", " high")}
    return head | columns


def _overview(rows: list[Row], keeps: list[int]) -> list[Row]:
    """One row a method, best mean accuracy first; the full model's figures stand under every keep."""
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        for keep in keeps if row["method"] == "none" else [row["keep"]]:
            found.setdefault(row["method"], {})[keep] = row
    whole = {name: by_keep for name, by_keep in found.items() if by_keep.keys() == set(keeps)}
    ordered = sorted(whole.items(), key=lambda item: -sum(row["accuracy"] for row in item[1].values()))
    return [{"method": _label(name)} | _columns(by_keep, keeps) for name, by_keep in ordered]


def _label(method: str) -> str:
    """A name that says where a method that has to be trained is not."""
    untrained = method != "none" and method_class(method).info.trainable
    return f"{method} (untrained)" if untrained else method


def _columns(by_keep: dict[int, Row], keeps: list[int]) -> Row:
    found: Row = {}
    for keep in keeps:
        found |= {f"{keep}{end}": by_keep[keep][f"accuracy{end}"] for end in ("", " low", " high")}
    found |= {f"GFLOPs at {keep}": round(by_keep[keep]["GFLOPs"], 2) for keep in keeps}
    return found | {f"ms at {keep}": round(by_keep[keep]["ms a prefill"], 1) for keep in keeps}


def compare(
    *,
    model: str,
    methods: list[str],
    keeps: list[int],
    questions: int,
    positions: str,
    batch: int,
    dtype: Dtype,
    workers: int,
    threads: int,
    resume: bool,
    output: Path | None,
    report: Report,
) -> tuple[list[Row], str]:
    """A row for every method and count, and the tables as Markdown. `report` passes on what it is handed.

    `output` is rewritten after every method; with `resume` what it holds is not measured again. Raises `ConfigError`
    before a model is loaded.
    """
    for name, count in itertools.product(methods, keeps):
        method_class(name)
        PruneConfig.of(method=name, keep=count, positions=positions).tokens(world.GRID**2)
    _set_up(threads)
    start = (model, questions, batch, dtype)
    bench = Bench(*start)
    count = len(bench.examples)
    about = {"model": model, "questions": count, "positions": positions, "dtype": str(bench.model.dtype)}
    about |= {"torch": torch.__version__, "transformers": transformers.__version__, "weights": _digest(bench.model)}
    about["photos"] = "as many of each: " + ", ".join(map(crowd_name, range(len(CROWDS))))
    about["machine"] = f"{processor_name()}, {threads} CPU threads"
    rows = _finished(output, about) if resume and output else []
    done = [(row["method"], row["keep"]) for row in rows]
    wanted = [("none", world.GRID**2), *((name, k) for k in keeps for name in methods)]
    runs = list(dict.fromkeys([*wanted, *done]))
    left = [run for run in runs if run not in done]
    for row in report(measure_all(left, positions, workers, start), len(left), "methods") if left else ():
        rows.append(row)
        if output is not None:
            write_json(output, [Table("methods", rows)], about)
    rows.sort(key=lambda row: runs.index((row["method"], row["keep"])))
    times = time_prefills(bench, runs, positions, report)
    for row in rows:
        row |= times[row["method"], row["keep"]]
    add_differences(rows, bench.units, report)
    if output is not None:
        write_json(output, [Table("methods", rows)], about)
    asked = f"{count} questions, {positions} positions, {str(bench.model.dtype).removeprefix('torch.')}"
    return rows, "\n".join(table.markdown() for table in tables(rows, asked))


def _digest(model: Any) -> str:
    """Tells weights apart."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.float().numpy().tobytes())
    return digest.hexdigest()[:12]


def _finished(file: Path, about: dict[str, Any]) -> list[Row]:
    """The rows of a file that was measured in the same way; none where there is no file."""
    if not file.is_file():
        return []
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        measured, rows = found["about"], list(found["tables"][0]["rows"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"--resume: {file} holds no comparison ({short_reason(error)})") from None
    if {**measured, "machine": about["machine"]} != about:  # milliseconds are measured at the end, all anew
        raise ConfigError(f"{file} was measured with {measured}; give another --output, or no --resume")
    return rows
