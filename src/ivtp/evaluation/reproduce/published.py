"""Our figures beside the literature's: what is left of the full model at 64 tokens, and whether methods rank alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from ivtp.errors import ConfigError, InputError
from ivtp.evaluation.asked import Asked, Row, Run
from ivtp.evaluation.published import KEEP, beside, correlation, figures_of, published_shares, sources
from ivtp.evaluation.reproduce import base
from ivtp.evaluation.sweep import Measured


def make(request: base.Request, report: base.Report) -> base.Result:
    """A row for each method that papers have a figure of, the best published first."""
    made = rows(base.measure(request, [Run(method, KEEP) for method in methods(request)], report))
    rank = correlation(made)
    about = {"correlation": {"methods": len(made), **rank}, "sources": sources()}
    return base.Result("Published figures and ours", made, page(request.asked, made, rank), about, draw(made))


def methods(request: base.Request) -> tuple[str, ...]:
    """Those asked for, or all that papers have. Raises `ConfigError` for others, and for another number of tokens."""
    known = published_shares()
    for keep in request.keeps:
        if keep != KEEP:
            raise ConfigError(f"--keep {keep}: the published figures are of {KEEP} tokens; leave --keep out")
    for method in request.methods:
        if method not in known:
            raise ConfigError(f"--method {method}: no paper listed here has it; use {', '.join(sorted(known))}")
    return request.methods or tuple(known)


def rows(found: Mapping[Run, Measured]) -> list[Row]:
    """Percent of the full model's mean: what papers print, their median, and ours with its interval.

    Raises `InputError` where the full model scores nothing.
    """
    full = found[base.FULL]
    if full.mean == 0:
        raise InputError(
            "all tokens score 0 on these tasks: there is nothing to retain; ask for other tasks or a model"
        )
    ours = {run.method: measured for run, measured in found.items() if run != base.FULL}
    made = []
    for row in beside({method: measured.mean / full.mean for method, measured in ours.items()}):
        measured = ours[row["method"]]
        draws = None if full.draws is None or measured.draws is None else 100 * measured.draws / full.draws
        row |= {"published": 100 * row["published"], "mean": measured.mean}
        row |= base.with_interval("here", 100 * row["here"], draws)
        made.append(row | {"papers": {paper: 100 * share for paper, share in figures_of(row["method"])}})
    return made


def page(asked: Asked, rows: Sequence[Row], rank: Mapping[str, float]) -> str:
    """What ours is, the correlation, the figures, and the papers."""
    papers = sources()
    numbers = {source["paper"]: number for number, source in enumerate(papers, 1)}
    cells = [
        (
            row["method"],
            f"{row['published']:.1f}",
            ", ".join(f"{share:.1f} [{numbers[paper]}]" for paper, share in row["papers"].items()),
            f"{row['rank']:g}",
            base.shown(row, "here"),
            f"{row['rank here']:g}",
        )
        for row in rows
    ]
    header = ("method", "published", "of which", "rank", "here", "rank here")
    listed = (f"{numbers[s['paper']]}. [{s['title']}]({s['paper']}): {s['table']}" for s in papers)
    return "\n\n".join(
        [
            ours_is(asked),
            ranks_are(len(rows), rank),
            base.grid(header, cells),
            f"Percent of the full model's mean, at {KEEP} tokens; published is the median of the papers.",
            "\n".join(listed),
        ]
    )


def ours_is(asked: Asked) -> str:
    """What our column was measured on, which is not what the papers' was."""
    tasks = ", ".join(asked.tasks)
    if asked.model == "micro":
        return (
            "Published: LLaVA-1.5-7B on real benchmarks. Here: the embedded micro model in its own synthetic world "
            f"({tasks}), which says nothing of a real model's figures."
        )
    return f"Published: LLaVA-1.5-7B on each paper's choice of benchmarks. Here: {asked.model} on {tasks}."


def ranks_are(count: int, rank: Mapping[str, float]) -> str:
    """The correlation in a sentence; none where its interval holds 0."""
    low, high = rank["Spearman low"], rank["Spearman high"]
    interval = f"{low:.2f} to {high:.2f}"
    found = f"{rank['Spearman']:.2f} ({interval})" + (": none is shown" if low <= 0 <= high else "")
    return f"Spearman's rank correlation over {count} methods, with its 95% interval (methods resampled): {found}."


def draw(rows: Sequence[Row]) -> Figure:
    """Ours against the published median, a point a method."""
    figure = Figure(figsize=(6, 4.8), layout="constrained")
    axes = figure.add_subplot(xlabel="published, % of the full model's mean", ylabel="here, %")
    for row in rows:
        low, high = row["here low"], row["here high"]
        errors = None if low is None else [[max(row["here"] - low, 0)], [max(high - row["here"], 0)]]
        axes.errorbar(row["published"], row["here"], yerr=errors, fmt="o", color="C0", markersize=4, capsize=2)
        axes.annotate(
            row["method"], (row["published"], row["here"]), fontsize=7, xytext=(4, 4), textcoords="offset points"
        )
    axes.grid(alpha=0.3)
    return figure
