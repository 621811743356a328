"""Figure 3: the mean of the twelve benchmarks against the cost of a prefill, one line a method."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from ivtp.evaluation.asked import Row
from ivtp.evaluation.reproduce import base, table1

KEEPS = (16, 32, 64, 128, 256, 512)
COLOURED = ("ivtp", "ivtp+", "topk", "random")
"""And the best others; what is left is grey."""
BEST = 3


def make(request: base.Request, report: base.Report) -> base.Result:
    """A row a method and number of tokens, and the figure."""
    rows = table1.rows(base.measure(request, table1.runs(request, KEEPS), report))
    return base.Result("Figure 3: accuracy against cost", rows, overview(rows), figure=draw(rows))


def overview(rows: list[Row]) -> str:
    """Methods by tokens: means with their intervals, and TFLOPs."""
    keeps = list(dict.fromkeys(row["keep"] for row in rows if row["method"] != "none"))
    lines = lines_of(rows)
    full = rows[0]
    header = ("method", *(f"{keep} tokens" for keep in keeps), *(f"TFLOPs, {keep}" for keep in keeps))
    cells = [("all tokens", *[base.shown(full, "mean")] * len(keeps), *[f"{full['tflops']:.4g}"] * len(keeps))]
    for name in lines:
        own = {row["keep"]: row for row in lines[name]}
        means = (base.shown(own[keep], "mean") if keep in own else "–" for keep in keeps)
        costs = (f"{own[keep]['tflops']:.4g}" if keep in own else "–" for keep in keeps)
        cells.append((table1.label(lines[name][0]), *means, *costs))
    return base.grid(header, cells)


def lines_of(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of each method by the number of tokens, the best method first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["method"] != "none":
            found.setdefault(row["name"], []).append(row)
    for own in found.values():
        own.sort(key=lambda row: row["keep"])
    return dict(sorted(found.items(), key=lambda item: -sum(row["mean"] for row in item[1]) / len(item[1])))


def draw(rows: list[Row]) -> Figure:
    """Mean against TFLOPs, the full model a star, with 95% intervals where a line is in colour."""
    lines = lines_of(rows)
    best = [name for name in lines if name not in COLOURED][:BEST]
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.add_subplot(xlabel="TFLOPs of a prefill, choosing included", ylabel="mean of the benchmarks")
    for name in reversed(lines):
        _line(axes, table1.label(lines[name][0]), lines[name], name in (*COLOURED, *best))
    full = rows[0]
    axes.plot(full["tflops"], full["mean"], "k*", markersize=12, label="all tokens")
    axes.axhline(full["mean"], color="black", linewidth=0.8, linestyle=":")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    return figure


def _line(axes: Any, name: str, rows: list[Row], coloured: bool) -> None:
    cost, mean = [row["tflops"] for row in rows], [row["mean"] for row in rows]
    if not coloured:
        axes.plot(cost, mean, color="0.8", marker=".", linewidth=1)
        axes.annotate(name, (cost[0], mean[0]), color="0.5", fontsize=6, ha="right", va="top")
        return
    errors = None
    if all(row["mean low"] is not None for row in rows):
        below = [max(row["mean"] - row["mean low"], 0) for row in rows]  # lmms-eval rounds some figures
        errors = [below, [max(row["mean high"] - row["mean"], 0) for row in rows]]
    axes.errorbar(cost, mean, yerr=errors, marker="o", markersize=4, linewidth=1.8, capsize=2, label=name)
