"""Draw docs/accuracy.png from results/micro-compare.json: `make tables` (needs matplotlib, the extra `train`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.tables import CHANGED, COMPARED, IN_README, ROOT

Row = dict[str, Any]


def main(file: Path = ROOT / "docs" / "accuracy.png") -> None:
    """Accuracy against the cost of a prefill: README's methods in colour, the others in grey."""
    document = json.loads(COMPARED.read_text(encoding="utf-8"))
    by_method: dict[str, list[Row]] = {}
    for row in document["tables"][0]["rows"]:
        if row["method"] not in CHANGED:
            by_method.setdefault(row["method"], []).append(row)
    (full,) = by_method.pop("none")
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="GFLOPs of a prefill, choosing included", ylabel="accuracy, %")
    for name, rows in sorted(by_method.items(), key=lambda item: item[0] in IN_README):
        draw(axes, name, sorted(rows, key=lambda row: row["keep"]))
    axes.plot(full["GFLOPs"], 100 * full["accuracy"], "k*", markersize=12, label="all 576 tokens")
    axes.axhline(100 * full["accuracy"], color="black", linewidth=0.8, linestyle=":")
    about = document["about"]
    axes.set_title(f"embedded micro model, its own synthetic world, {about['questions']} questions: 16, 64, 128 tokens")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(file, dpi=110)


def draw(axes: Any, name: str, rows: list[Row]) -> None:
    """One method's line through its numbers of tokens, with 95% intervals where it is in colour."""
    cost, accuracy = [row["GFLOPs"] for row in rows], [100 * row["accuracy"] for row in rows]
    if name not in IN_README:
        axes.plot(cost, accuracy, color="0.8", marker=".", linewidth=1)
        axes.annotate(name, (cost[0], accuracy[0]), color="0.5", fontsize=6, ha="right", va="top")
        return
    below = [100 * (row["accuracy"] - row["accuracy low"]) for row in rows]
    above = [100 * (row["accuracy high"] - row["accuracy"]) for row in rows]
    width = 2.5 if name == "ivtp" else 1.5
    axes.errorbar(cost, accuracy, yerr=(below, above), marker="o", markersize=4, linewidth=width, capsize=2, label=name)


if __name__ == "__main__":
    main()
