"""Many runs on the same tasks, shared out among processes: each benchmark's figure, and what it is made of.

A run that was cut off goes on behind the answers that are kept (`answers`); its figures are those of one that was not.
"""

from __future__ import annotations

import functools
import multiprocessing
import multiprocessing.queues
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from lmms_eval import evaluator
from lmms_eval.api import task
from loguru import logger

from ivtp.errors import ConfigError
from ivtp.evaluation.asked import Asked, Row, Run
from ivtp.evaluation.ratios import Array, Ratios, ratios
from ivtp.evaluation.run import COUNTED, columns, evaluate, mean_costs
from ivtp.micro.world.crowds import CROWDS

TOLERANCE = 0.1
"""Points by which a figure of lmms-eval's may differ from its ratios: it rounds LLaVA-Bench's."""
OnAnswers = Callable[[int], None]


@dataclass(frozen=True)
class Measured:
    """What a run found."""

    figures: Mapping[str, float]
    """Of each benchmark that could be measured, by its title."""
    ratios: Mapping[str, Ratios]
    """Of those that are sums of ratios."""
    objects: Mapping[str, Mapping[int, int]]
    """The number of objects of each question's photo, by title and number; empty where a task does not tell."""
    costs: Row
    """Counted alone: answers may come from an earlier run, or from several processes at once."""

    @property
    def mean(self) -> float:
        """The plain mean of all benchmarks."""
        return float(np.mean(list(self.figures.values())))

    @functools.cached_property
    def draws(self) -> Array | None:
        """The mean of bootstrap draws (RESAMPLES,); None where some benchmark is no sum of ratios."""
        if self.ratios.keys() != self.figures.keys():
            return None
        found: Array = np.mean([part.draws(title) for title, part in self.ratios.items()], axis=0)
        return found

    def crowd(self, number: int) -> Measured | None:
        """The same over photos of one of CROWDS; None where tasks tell of none."""
        first, last = CROWDS[number]
        if not self.objects:
            return None
        parts = {}
        for title, part in self.ratios.items():
            chosen = [first <= self.objects[title][item] <= last for item in part.items]
            if any(chosen):
                parts[title] = part.of(chosen)
        found = {title: float(part.value()) for title, part in parts.items()}
        return Measured(found, parts, {}, {}) if found else None


def measured(asked: Asked, on_answers: OnAnswers | None = None) -> Measured:
    """Run the tasks, and take their figures apart."""
    found = evaluate(asked, on_answers)
    assert found is not None, "runs of a sweep are processes of their own"
    figures, parts, objects = {}, {}, {}
    for column in columns(asked.tasks):
        value = column.value(found["results"])
        if value is None:
            continue
        samples = found["samples"][column.task]
        figures[column.title] = value
        part = ratios(column.metric, samples, column.to_percent)
        if part is not None and abs(float(part.value()) - value) <= TOLERANCE:  # else it has no interval
            parts[column.title] = part
        if all("objects" in sample["doc"] for sample in samples):
            objects[column.title] = {int(sample["doc_id"]): int(sample["doc"]["objects"]) for sample in samples}
    if objects.keys() != figures.keys():
        objects = {}
    return Measured(figures, parts, objects, mean_costs(found["samples"], COUNTED))


def sweep(asked: Asked, runs: Sequence[Run], workers: int, on_answers: OnAnswers) -> Iterator[tuple[Run, Measured]]:
    """Each run with what it found, as they end; `workers` processes, on a GPU each its own.

    Raises what a run raises.
    """
    if workers < 1:
        raise ConfigError(f"workers={workers} is no number of processes; use 1 or more")
    spawn = multiprocessing.get_context("spawn")
    told: multiprocessing.queues.Queue[int] = spawn.Queue()
    places: multiprocessing.queues.Queue[int] = spawn.Queue()
    for place in range(workers):
        places.put(place)
    with ProcessPoolExecutor(workers, spawn, initializer=_begin, initargs=(told, places, workers)) as pool:
        jobs = {pool.submit(_job, run.asked(asked)): run for run in runs}
        left = set(jobs)
        try:
            while left:
                done, left = wait(left, timeout=1, return_when=FIRST_COMPLETED)
                _tell(told, on_answers)
                yield from ((jobs[job], job.result()) for job in _in_order(done, jobs))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _in_order(done: set[Future[Measured]], jobs: Mapping[Future[Measured], Run]) -> list[Future[Measured]]:
    return [job for job in jobs if job in done]


def _tell(told: Any, on_answers: OnAnswers) -> None:
    while True:
        try:
            on_answers(told.get_nowait())
        except queue.Empty:
            return


_told: Any
_place = 0


def _begin(told: Any, places: Any, workers: int) -> None:
    """Of each process, which takes its share of the threads."""
    global _told, _place
    _told, _place = told, places.get()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    _hush()


def _end_with_parent() -> None:
    """A pool's processes outlive a main process that was killed, and wait for jobs for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _hush() -> None:
    """lmms-eval's notes and bars of several processes would tear the one bar of the command."""
    logger.disable("lmms_eval")
    for module in (evaluator, task):
        module.tqdm = functools.partial(_no_bar, module.tqdm)


def _no_bar(bar: Any, *args: Any, **kwargs: Any) -> Any:
    return bar(*args, **{**kwargs, "disable": True})


def _job(asked: Asked) -> Measured:
    if asked.device == "cuda":
        asked = replace(asked, device=f"cuda:{_place % torch.cuda.device_count()}")
    return measured(asked, _told.put)
