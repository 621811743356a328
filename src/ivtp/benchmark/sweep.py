"""Go through the configurations of a benchmark; every one that is finished is safe on disk."""

from __future__ import annotations

import dataclasses
from itertools import groupby
from pathlib import Path

import torch

from ivtp.benchmark.asked import Asked, Point
from ivtp.benchmark.compiled import time_compiled
from ivtp.benchmark.measure import Clock, Report, measure, rounds_of
from ivtp.benchmark.models import Subject, load_subject
from ivtp.benchmark.prompts import make_prompt
from ivtp.benchmark.results import Document, Row, describe_machine, new_document, read_document, result_of
from ivtp.benchmark.results import write_document as write
from ivtp.benchmark.runs import Runs, config_for, make_runs
from ivtp.generate import check_device
from ivtp.registry import method_class


def sweep(
    asked: Asked,
    *,
    file: Path | None = None,
    resume: bool = False,
    command: str = "",
    report: Report = lambda text: None,
) -> Document:
    """Measure what is asked; the document goes to `file` after each configuration.

    `report` is called `rounds(asked)` times, fewer where a configuration was finished before. Whatever ends this
    early leaves the model detached and the file as it was after the last finished configuration. Raises `ConfigError`
    before anything is measured.
    """
    check_device(asked.device)
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    machine = describe_machine(asked.device, asked.threads)
    document = read_document(file, asked, machine) if file is not None and resume else None
    document = document or new_document(asked, machine, command)
    finished = {Point(r["keep"], r["text"], r["images"], r["batch"]) for r in document["results"]}
    todo = [point for point in asked.points() if point not in finished]
    if not todo:
        return document
    torch.manual_seed(asked.seed)
    subject = load_subject(asked)
    _check(subject, asked, todo)
    document["notes"], document["weights"] = list(subject.notes), subject.weights()
    for keep, points in groupby(todo, key=lambda point: point.keep):
        runs = make_runs(subject, asked, keep)
        for point in points:
            document["results"].append(_measure(subject, asked, point, runs, report))
            if file is not None:
                write(file, document)
    return document


def rounds(asked: Asked) -> int:
    """How often a whole sweep reports."""
    return len(asked.points()) * (rounds_of(asked.repeats) + asked.compile)


def _check(subject: Subject, asked: Asked, todo: list[Point]) -> None:
    """Refuse what does not fit the model now, not after the hours that stand before it in the list."""
    for point in todo:
        for method in asked.methods:
            method_class(method)(config_for(subject, asked, method, point.keep), subject.host.size)
    for images in {point.images for point in todo}:
        shortest = min((point for point in todo if point.images == images), key=lambda point: point.text)
        make_prompt(subject, dataclasses.replace(shortest, batch=1), asked.seed)


def _measure(subject: Subject, asked: Asked, point: Point, runs: Runs, report: Report) -> Row:
    """One configuration; one that does not fit into the device's memory is a result as well."""
    clock = Clock(subject.device)

    def tell(what: str) -> None:
        report(f"{point}: {what}")

    try:
        prompt = make_prompt(subject, point, asked.seed)
        measured = measure(
            subject, prompt, runs, tokens=asked.tokens or 0, repeats=asked.repeats, report=tell, clock=clock
        )
        result = result_of(point, prompt.text_tokens, measured)
        if asked.compile:
            compiled = time_compiled(subject.model, prompt.inputs, runs, asked.repeats, clock)
            for row in result["rows"]:
                row["compiled"] = compiled[row["run"]]
            tell("compiled")
        return result
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {**dataclasses.asdict(point), "error": "out of memory"}
