"""Table 1: every method on the twelve benchmarks, at 64 tokens where no other number is asked for."""

from __future__ import annotations

from collections.abc import Sequence

from ivtp.evaluation.asked import Row, Run
from ivtp.evaluation.reproduce import base
from ivtp.evaluation.sweep import Measured
from ivtp.registry import method_class

KEEPS = (64,)


def runs(request: base.Request, keeps: Sequence[int]) -> list[Run]:
    """All methods at each number of tokens."""
    return [Run(method, keep) for keep in request.keeps or keeps for method in base.methods_of(request)]


def rows(found: dict[Run, Measured]) -> list[Row]:
    """The full model, then for each number of tokens the methods, the best first, against it, IVTP and the best."""
    full = found[base.FULL]
    made = [base.row(base.FULL, full)]
    for keep in dict.fromkeys(run.keep for run in found if run != base.FULL):
        mine = {run: measured for run, measured in found.items() if run.keep == keep and run != base.FULL}
        ordered = sorted(mine, key=lambda run: -mine[run].mean)
        others = [("to ivtp", Run("ivtp", keep)), ("to best", ordered[0])]
        for run in ordered:
            pairs = [(name, mine[other]) for name, other in others if other in mine and other != run]
            made.append(base.row(run, mine[run], [("change", full), *pairs]))
    return sorted(made, key=lambda row: 0 if row["keep"] == "all" else row["keep"])


def label(row: Row) -> str:
    """A method's name; one that has to be trained says that it is not."""
    if row["method"] == "none":
        return "all tokens"
    return f"{row['name']} (untrained)" if method_class(row["method"]).info.trainable else str(row["name"])


def table(rows: Sequence[Row]) -> str:
    """Mean, differences and cost, then the twelve figures, then simple and crowded photos where tasks tell."""
    titles = list(rows[0]["benchmarks"])
    crowds = list(rows[0]["objects"])
    first = base.grid(
        ("method", "tokens", "mean", "to all tokens", "to IVTP", "to the best", "TFLOPs", *crowds),
        [
            (
                label(row),
                f"{row['visual_tokens']:.0f}",
                base.shown(row, "mean"),
                base.shown_difference(row, "change"),
                base.shown_difference(row, "to ivtp"),
                base.shown_difference(row, "to best"),
                f"{row['tflops']:.4g}",
                *(base.shown(row["objects"][crowd], "mean") for crowd in crowds),
            )
            for row in rows
        ],
    )
    second = base.grid(
        ("method", *titles),
        [(label(row), *(f"{row['benchmarks'][title]:.1f}" for title in titles)) for row in rows],
    )
    return f"{first}\n\n{second}"


def make(request: base.Request, report: base.Report) -> base.Result:
    """A row a method."""
    made = rows(base.measure(request, runs(request, KEEPS), report))
    full, tables = made[0], []
    for keep in dict.fromkeys(row["keep"] for row in made[1:]):
        tables.append(f"## {keep} tokens\n\n{table([full, *(row for row in made if row['keep'] == keep)])}")
    return base.Result("Table 1: all methods on the twelve benchmarks", made, "\n\n".join(tables))
