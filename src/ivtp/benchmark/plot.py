"""Curves of a result document; needs matplotlib, which the extra `train` brings."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ivtp.benchmark.growth import AXES, steps
from ivtp.benchmark.results import Document, Row
from ivtp.files.outputs import check_output, need_matplotlib, whole

SUFFIXES = (".png", ".svg", ".pdf")


def check_plot(file: Path | None, inputs: Iterable[object] = ()) -> None:
    """Refuse a file or an installation that could not be drawn with, before anything is measured.

    `inputs`: what the command reads or also writes.
    """
    if file is None:
        return
    check_output(file, "--plot", suffixes=SUFFIXES, inputs=inputs)
    need_matplotlib("--plot")


def plot(document: Document, file: Path) -> None:
    """Latency against keep, or what grows along each axis. The file is written whole or not at all."""
    figure = _growth(document) if document["growth"] else _latency(document)
    with whole(file, "--plot") as partial:
        figure.savefig(partial, dpi=120)


def _latency(document: Document) -> Any:
    """One panel for each prompt: a line for each run, dashed what its FLOPs predict from the full model's time."""
    from matplotlib.figure import Figure

    panels: dict[tuple[int, int, int], list[Row]] = {}
    for result in document["results"]:
        if "rows" in result:
            panels.setdefault((result["text"], result["images"], result["batch"]), []).append(result)
    figure = Figure(figsize=(6 * max(1, len(panels)), 5), layout="constrained")
    figure.suptitle(f"{document['model']}, {document['machine']['device']}")
    for number, ((text, images, batch), results) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), number)
        for name in [row["run"] for row in results[0]["rows"]]:
            _latency_lines(axes, name, results)
        axes.set(xlabel="visual tokens kept of each image", ylabel="prefill ms", ylim=(0, None))
        axes.set_title(f"{text} text tokens, {images} image(s), batch {batch}", fontsize=9)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="best", framealpha=0.5)
    return figure


def _latency_lines(axes: Any, name: str, results: list[Row]) -> None:
    points = []
    for result in results:
        rows = {row["run"]: row for row in result["rows"]}
        predicted = rows["full"]["prefill_ms"] / rows[name]["full_over_this_flops"]
        points.append((_kept(result), rows[name]["prefill_ms"], predicted))
    points.sort()
    kept, measured, predicted_ms = zip(*points, strict=True)
    (line,) = axes.plot(kept, measured, marker="o", markersize=3, label=name)
    if name != "full":
        axes.plot(
            kept,
            predicted_ms,
            linestyle="--",
            marker="x",
            linewidth=1,
            color=line.get_color(),
            label=f"{name}, by FLOPs",
        )


def _kept(result: Row) -> float:
    """Visual tokens of an image in the oracle's cache, whatever way `keep` was written in."""
    oracle = next(row for row in result["rows"] if row["run"] == "oracle")
    return float(oracle["cache_tokens"] - result["text_tokens"] + result["images"]) / float(result["images"])


def _growth(document: Document) -> Any:
    """Time above, peak memory below, a column for each axis that was varied; both scales are logarithmic."""
    from matplotlib.figure import Figure

    method = document["asked"]["methods"][0]
    varied = {axis: found for axis in AXES if len(found := steps(document, axis)) > 1}
    figure = Figure(figsize=(5 * max(1, len(varied)), 8), layout="constrained")
    for column, (axis, found) in enumerate(varied.items(), start=1):
        sizes = [step.size for step in found]
        time = figure.add_subplot(2, len(varied), column, xscale="log", yscale="log", ylabel="ms")
        memory = figure.add_subplot(2, len(varied), len(varied) + column, xscale="log", yscale="log", ylabel="peak MB")
        for run in found[0].rows:
            time.plot(sizes, [step.rows[run]["prefill_ms"] for step in found], marker="o", label=run)
            memory.plot(sizes, [step.rows[run]["peak_bytes"] / 1e6 for step in found], marker="o", label=run)
        scoring = [_positive(step.rows[method]["over_oracle_ms"]) for step in found]
        attention = [step.rows["full"]["attention_ms"] for step in found]
        time.plot(sizes, scoring, linestyle="--", marker=".", label=f"{method} - oracle")
        time.plot(sizes, attention, linestyle=":", marker=".", label="one attention layer, all tokens")
        for axes in (time, memory):
            axes.set_xlabel(axis)
            axes.set_xticks(sizes, labels=[str(size) for size in sizes])
            axes.set_xticks([], minor=True)
            axes.grid(alpha=0.3, which="both")
            axes.legend(fontsize=7)
    return figure


def _positive(value: float) -> float:
    """A gap where noise made a difference negative: a logarithmic scale has no place for it."""
    return value if value > 0 else float("nan")
