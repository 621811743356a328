"""Curves of a training log: losses above, accuracies below."""

from __future__ import annotations

import csv
from pathlib import Path

from ivtp.files.outputs import need_matplotlib, whole

_LEFT_OUT = ("step", "minutes", "seconds", "images", "level", "window", "rate", "box_error_px")


def plot_log(log: Path) -> Path:
    """Writes ``LOG.png``: columns that stay within 0..1 are drawn as shares, the others as losses.

    Raises `ConfigError` without matplotlib.
    """
    need_matplotlib("plot")
    from matplotlib.figure import Figure

    with log.open(newline="") as file:
        rows = list(csv.DictReader(file))
    curves = {
        name: [(float(row["step"]), float(row[name])) for row in rows if row[name]]
        for name in rows[0]
        if name not in _LEFT_OUT
    }
    curves = {name: points for name, points in curves.items() if points}
    losses = {name for name in curves if name == "loss" or max(value for _, value in curves[name]) > 1.0}
    figure = Figure(figsize=(9, 8), layout="constrained")
    for axes, chosen, title in zip(
        figure.subplots(2, 1, sharex=True), (losses, curves.keys() - losses), ("loss", "share"), strict=True
    ):
        for name in sorted(chosen):
            marker = "." if len(curves[name]) == 1 else None  # a line needs two points to be seen
            axes.plot(*zip(*curves[name], strict=True), label=name, linewidth=1, marker=marker)
        axes.set_ylabel(title)
        axes.legend(fontsize=6, ncols=4)
        axes.grid(alpha=0.3)
    axes.set_xlabel("step")
    target = log.with_suffix(".png")
    with whole(target, "plot:") as partial:
        figure.savefig(partial, dpi=100)
    return target
