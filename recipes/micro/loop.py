"""The loop around every training step: time budget, running exact match, checkpoints, log; resumable."""

from __future__ import annotations

import csv
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

from ivtp.errors import ConfigError
from ivtp.micro.world import KINDS
from recipes.micro.optim import Optimisers, trapezoid
from recipes.micro.tasks import LONG, TASKS

BatchResult = tuple[float, list[float], list[int]]
"""Loss of a batch, and by question kind how many were answered exactly and how many were asked."""


class Budget:
    """How far a run is, by steps or, where ``minutes`` is given, by the clock (time before a resume counts)."""

    def __init__(self, steps: int | None, minutes: float | None, spent: float = 0.0) -> None:
        if (steps is None) == (minutes is None):
            raise ConfigError("give exactly one of --steps and --minutes")
        self.steps, self.minutes = steps, minutes
        self._start = time.monotonic() - spent * 60

    @property
    def spent(self) -> float:
        """Minutes since the run began, earlier parts of a resumed run included."""
        return (time.monotonic() - self._start) / 60

    def fraction(self, step: int) -> float:
        """Part of the run that is done after ``step`` steps; 1 or more when it is over. Equal on all processes."""
        fraction = step / self.steps if self.steps is not None else self.spent / (self.minutes or 1)
        if is_distributed():
            shared = torch.tensor([fraction], dtype=torch.float64)
            distributed.broadcast(shared, src=0)
            return float(shared)
        return fraction


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint so that a kill at any moment leaves the old one or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint on the CPU; raises ConfigError where there is none."""
    if not path.is_file():
        raise ConfigError(f"no checkpoint at {path}; run the earlier stage first or leave out --resume")
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def rng_for(*numbers: int) -> random.Random:
    """A random generator that depends on these numbers only (seed, step, rank), so that a resumed run repeats."""
    return random.Random(hash(numbers))


class CsvLog:
    """Rows appended to a CSV file; the header comes from the first row."""

    def __init__(self, path: Path, *, append: bool) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if not append:
            path.unlink(missing_ok=True)

    def write(self, row: dict[str, float | int | str]) -> None:
        """Appends one row; floats are rounded to five digits."""
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(row))
            if new:
                writer.writeheader()
            writer.writerow({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()})


@dataclass
class KindTracker:
    """Running exact match by task on fresh training photos, and the question mix that follows from it."""

    exact: list[float] = field(default_factory=lambda: [0.0] * len(TASKS))
    level: int = 0
    """Step of the curriculum, for stages that have one."""
    decay: float = 0.95

    def update(self, right: list[float], asked: list[int]) -> None:
        """Moves the averages towards one batch's result; small counts move them less."""
        for task, (r, n) in enumerate(zip(right, asked, strict=True)):
            if n:
                keep = self.decay ** min(1.0, n / 8)
                self.exact[task] = keep * self.exact[task] + (1 - keep) * r / n

    def weights(self, long: float, formats: float = 1.0) -> list[float]:
        """How often to ask each task: those that are not solved yet more often, those with long answers rarely.

        ``long`` and ``formats`` are what a task with long answers and one of the benchmark formats weigh.
        """
        return [
            (0.15 + 1 - exact) * (long if task in LONG else 1.0) * (1.0 if task in KINDS else formats)
            for task, exact in zip(TASKS, self.exact, strict=True)
        ]

    @property
    def mean(self) -> float:
        """Mean exact match over the tasks."""
        return sum(self.exact) / len(self.exact)

    @property
    def short_mean(self) -> float:
        """Mean exact match over the tasks with short answers."""
        short = [exact for task, exact in zip(TASKS, self.exact, strict=True) if task not in LONG]
        return sum(short) / len(short)

    def row(self) -> dict[str, float | int | str]:
        """The averages, named by task, for the CSV log."""
        return dict(zip(TASKS, self.exact, strict=True))


def is_distributed() -> bool:
    """Whether several processes (of ``torchrun``) train together."""
    return distributed.is_available() and distributed.is_initialized()


def rank() -> int:
    """Number of this process among those that train together; 0 when alone."""
    return distributed.get_rank() if is_distributed() else 0


def world_size() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if is_distributed() else 1


@dataclass(frozen=True)
class LoopOptions:
    """Options that all stages share: exactly one of ``steps`` and ``minutes`` says how long."""

    steps: int | None = None
    minutes: float | None = None
    muon_lr: float = 4e-3
    adam_lr: float = 1.5e-3
    cooldown: float = 0.35
    seed: int = 0
    save_minutes: float = 2.0
    log_steps: int = 20


def train_loop(
    batch: Callable[[int], BatchResult],
    modules: Mapping[str, nn.Module],
    optimisers: Optimisers,
    tracker: KindTracker,
    options: LoopOptions,
    checkpoint: Path,
    *,
    resume: bool = False,
    after: Callable[[float], None] = lambda fraction: None,
    report: Callable[[float, str], None] = lambda fraction, text: None,
) -> None:
    """Calls ``batch(step)`` (forward and backward) and updates until the budget is spent.

    ``after(fraction)`` runs after each update. The checkpoint holds the modules, the optimisers and the progress,
    so a resumed run continues as if it had never stopped.
    """
    step, spent = 0, 0.0
    if resume:
        state = load_checkpoint(checkpoint)
        for name, module in modules.items():
            module.load_state_dict(state[name])
        optimisers.load_state_dict(state["optimisers"])
        step, spent = state["step"], state["minutes"]
        tracker.level, tracker.exact = state["level"], state["exact"]
    budget = Budget(options.steps, options.minutes, spent)
    log = CsvLog(checkpoint.with_suffix(".csv"), append=resume)
    saved = budget.spent

    def save(*, finished: bool = False) -> None:
        if rank() == 0:
            progress = {"step": step, "minutes": budget.spent, "level": tracker.level, "exact": tracker.exact}
            progress["finished"] = finished
            weights = {name: module.state_dict() for name, module in modules.items()}
            save_checkpoint(checkpoint, {**weights, "optimisers": optimisers.state_dict(), **progress})

    fraction = budget.fraction(step)
    while fraction < 1:
        loss, right, asked = sum_over_processes(batch(step))
        optimisers.step(trapezoid(fraction, cooldown=options.cooldown))
        tracker.update(right, asked)
        after(fraction)
        report(fraction, f"loss {loss:.3f}, exact {tracker.mean:.1%}, level {tracker.level}")
        step += 1
        fraction = budget.fraction(step)
        if (step % options.log_steps == 0 or fraction >= 1) and rank() == 0:
            row: dict[str, float | int | str] = {"step": step, "minutes": budget.spent, "level": tracker.level}
            log.write({**row, "loss": loss, "mean": tracker.mean, **tracker.row()})
        if budget.spent - saved > options.save_minutes:
            saved = budget.spent
            save()
    save(finished=True)


def sum_over_processes(result: BatchResult) -> BatchResult:
    """Mean loss and summed counts over the processes that train together."""
    if not is_distributed():
        return result
    loss, right, asked = result
    flat = torch.tensor([loss, *right, *asked], dtype=torch.float64)
    distributed.all_reduce(flat)
    kinds = len(right)
    counts = [round(value) for value in flat[1 + kinds :].tolist()]
    return float(flat[0]) / world_size(), flat[1 : 1 + kinds].tolist(), counts
