"""The retrained table: every row trained and measured, so many at once, and what is written of those that are done."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ivtp.evaluation.asked import Asked, Row, Run
from ivtp.evaluation.reproduce import base
from ivtp.evaluation.run import count_questions
from ivtp.evaluation.sweep import Measured, sweep
from ivtp.training.stages import PRETRAIN
from recipes.micro.retrain_predictors import LEARNING_RATE
from recipes.micro.retrain_runs import (
    FIRST_SEED,
    FULL,
    Arm,
    Facts,
    FailedError,
    Settings,
    Told,
    parts,
    train_arm,
    trained_folder,
)

NAME, TITLE = "retrained", "The retrained table of the micro world"


@dataclass(frozen=True)
class Found:
    """A row that was trained and measured."""

    measured: Measured
    training: tuple[Facts, ...]
    """Of each of its commands."""


@dataclass
class Table:
    """Rows as they are done."""

    settings: Settings
    asked: Asked
    """Tasks, limit and cache; its model is the one that all rows begin with."""
    arms: Sequence[Arm]
    untouched: dict[Run, Measured]
    found: dict[Arm, Found]

    @classmethod
    def of(cls, settings: Settings, asked: Asked, arms: Sequence[Arm]) -> Table:
        """Without a row yet."""
        return cls(settings, asked, arms, {}, {})

    def steps(self) -> int:
        """Of all commands, and questions of all measurements."""
        trained = sum(part.steps for arm in self.arms for part in parts(arm, self.settings))
        return trained + count_questions(self.asked) * (len(self.arms) + len(self._pure()))

    def make(self, workers: int, told: Told) -> Iterator[None]:
        """Train and measure all rows, `workers` at once; a moment after each that is done.

        A row that fails holds up no other; raises `FailedError` behind the last one then.
        """
        failed: list[str] = []
        with ThreadPoolExecutor(workers) as pool:
            jobs = {pool.submit(self._row, arm, told): arm for arm in self.arms}
            for job in as_completed(jobs):
                error = job.exception()
                if error is None:
                    yield
                else:
                    failed.append(f"{jobs[job].folder}: {error}")
        if failed:
            raise FailedError(f"{len(failed)} of {len(jobs)} rows failed ({' | '.join(failed)})")

    def _pure(self) -> list[Run]:
        """What is measured without training, each once."""
        return list(dict.fromkeys(arm.run(self.settings) for arm in self.arms if not arm.compressor))

    def _row(self, arm: Arm, told: Told) -> None:
        facts = train_arm(arm, self.settings, told)
        run = arm.run(self.settings)
        if not arm.compressor and arm.seed == FIRST_SEED:  # behind the training: DynamicViT's predictors are there
            self.untouched[run] = self._measured(self.asked, run, told)
        of = replace(self.asked, model=str(trained_folder(arm, self.settings)))
        self.found[arm] = Found(self._measured(of, run, told), tuple(facts))

    def _measured(self, asked: Asked, run: Run, told: Told) -> Measured:
        """In a process of its own."""
        ((_, measured),) = sweep(asked, [run], 1, told)
        return measured

    # ---- what is written ---------------------------------------------------------------------------------------

    def rows(self) -> list[Row]:
        """The untouched model, then the retrained rows: the full one's first, then by tokens, the best first."""
        full = Arm(FULL, 0).run(self.settings)
        made = []
        if full in self.untouched:
            made.append(base.row(full, self.untouched[full]) | {"name": "untouched", "seed": None})
        order = sorted(self.found, key=lambda arm: (arm.keep, -self.found[arm].measured.mean))
        return made + [self.row(arm) for arm in order]

    def row(self, arm: Arm) -> Row:
        """Against all tokens and IVTP, retrained with the same order of data or else the first, and no training."""
        found, run = self.found[arm], arm.run(self.settings)
        others = {
            "to full": self._beside(arm, FULL, 0),
            "to ivtp": self._beside(arm, "ivtp", arm.keep),
            "to untouched": self.untouched.get(run),
            "to first seed": self._measured_of(replace(arm, seed=FIRST_SEED)) if arm.seed != FIRST_SEED else None,
        }
        made = base.row(run, found.measured, [(name, other) for name, other in others.items() if other is not None])
        made |= {"method": arm.name, "seed": arm.seed, "keep": arm.keep or "all", "training": list(found.training)}
        made |= {name: sum(facts[name] for facts in found.training) for name in ("minutes", "flops")}
        pure = self.untouched.get(run)
        return made if pure is None else made | base.with_interval("untouched", pure.mean, pure.draws)

    def _beside(self, arm: Arm, name: str, keep: int) -> Measured | None:
        """None where there is no such row, or it is the row itself."""
        if name == arm.name:
            return None
        same = self._measured_of(Arm(name, keep, arm.seed))
        return same or self._measured_of(Arm(name, keep))

    def _measured_of(self, arm: Arm) -> Measured | None:
        return self.found[arm].measured if arm in self.found else None

    def write(self, folder: Path, command: str) -> list[Path]:
        """JSON and Markdown of the rows that there are."""
        settings, made = self.settings, self.rows()
        about = base.about(base.Request(self.asked), command)
        about |= {
            "rows": f"{len(self.found)} of {len(self.arms)}",
            "records": {name: len(records) for name, records in settings.records.items()},
            "seeds": sorted({arm.seed for arm in self.arms}),
            "stage": settings.stage.name,
            "learning rates": {
                PRETRAIN.name: PRETRAIN.learning_rate,
                settings.stage.name: settings.learning_rate,
                "predictors": LEARNING_RATE,
            },
            "steps": sorted({found.training[-1]["steps"] for found in self.found.values()}),
            "batch": settings.batch,
        }
        return base.write(folder, NAME, base.Result(TITLE, made, page(made, about), about))


def page(rows: Sequence[Row], about: Mapping[str, Any]) -> str:
    """How all were trained, a table for each number of tokens, the twelve figures, and the spread of the seeds."""
    trained = [row for row in rows if row["seed"] is not None]
    every = [row for row in rows if row["keep"] == "all"]
    sections = [_intro(about)]
    for keep in dict.fromkeys(row["keep"] for row in trained if row["keep"] != "all"):
        mine = [*every, *(row for row in trained if row["keep"] == keep)]
        sections.append(f"## {keep} tokens\n\n{main_table(mine)}\n\n{figures(mine)}")
    if len(sections) == 1 and every:
        sections.append(f"{main_table(every)}\n\n{figures(every)}")
    spread = seeds_table(trained)
    return "\n\n".join([*sections, *([f"## Seeds\n\n{spread}"] if spread else [])])


def _intro(about: Mapping[str, Any]) -> str:
    steps = " or ".join(map(str, about["steps"]))
    return (
        f"{about['rows']} rows. Every row begins with the weights of `{about['model']}` and learns from the same "
        f"records in the same order: {steps} steps of {about['batch']} in `{about['stage']}`, at a learning rate of "
        f"{about['learning rates'][about['stage']]:g}. Compressors run the first stage before, at "
        f"{about['learning rates'][PRETRAIN.name]:g}. Minutes are of one CPU core."
    )


HEADER = ("row", "seed", "tokens", "mean", "to full", "to IVTP", "untrained", "by training")
COSTS = ("GFLOPs of a prefill", "PFLOPs of training", "minutes")


def main_table(rows: Sequence[Row]) -> str:
    """Mean and differences with their intervals, and what a prefill and the training cost."""
    return base.grid((*HEADER, *COSTS), (_cells(row) for row in rows))


def _cells(row: Row) -> Iterator[str]:
    yield str(row["name"])
    yield "–" if row["seed"] is None else str(row["seed"])
    yield f"{row['visual_tokens']:.0f}"
    yield base.shown(row, "mean")
    yield base.shown_difference(row, "to full")
    yield base.shown_difference(row, "to ivtp")
    yield base.shown(row, "untouched")
    yield base.shown_difference(row, "to untouched")
    yield f"{1000 * row['tflops']:.4g}"
    yield f"{row['flops'] / 1e15:.3g}" if "flops" in row else "–"
    yield f"{row['minutes']:.1f}" if "minutes" in row else "–"


def figures(rows: Sequence[Row]) -> str:
    """The twelve figures of each row."""
    titles = list(rows[0]["benchmarks"])
    cells = (
        (f"{row['name']}", str(row["seed"] or "–"), *(f"{row['benchmarks'][t]:.1f}" for t in titles)) for row in rows
    )
    return base.grid(("row", "seed", *titles), cells)


def seeds_table(rows: Sequence[Row]) -> str:
    """The spread of what was trained with several orders of the data; empty where nothing was."""
    groups: dict[tuple[str, Any], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["name"], row["keep"]), []).append(row)
    cells = []
    for (name, keep), mine in groups.items():
        if len(mine) > 1:
            mine.sort(key=lambda row: row["seed"])
            means = [row["mean"] for row in mine]
            gaps = ", ".join(base.shown_difference(row, "to first seed") for row in mine[1:])
            cells.append(
                (name, str(keep), ", ".join(f"{m:.1f}" for m in means), f"{max(means) - min(means):.1f}", gaps)
            )
    header = ("row", "tokens", "means by seed", "spread", "to the first seed")
    return base.grid(header, cells) if cells else ""
