"""Do methods rank here as papers rank them on LLaVA-1.5-7B? Spearman's correlation with published averages."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.micro.scoring import Table, bootstrap

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "results" / "published.json"
COMPARED = ROOT / "results" / "micro-compare.json"
KEEP = 64


def like_published(compared: Path = COMPARED, published: Path = PUBLISHED) -> list[Table]:
    """The correlation with its interval (methods resampled), then every method's two figures, both of the full model's.

    A method's published figure is the median of the tables that have it. IVTP has none at this number of tokens
    without training, and is not there.
    """
    theirs = published_shares(published)
    ours = measured_shares(compared)
    names = sorted(theirs.keys() & ours.keys(), key=lambda name: -theirs[name])
    pairs = [(ours[name], theirs[name]) for name in names]
    ranks = [dict(zip(names, ranked([-pair[i] for pair in pairs]), strict=True)) for i in range(2)]
    rows = [
        {"method": n, "published": theirs[n], "rank": ranks[1][n], "here": ours[n], "rank here": ranks[0][n]}
        for n in names
    ]
    found = bootstrap("Spearman", pairs, spearman)
    row: dict[str, Any] = {"methods": len(names), "Spearman": found["Spearman"]}
    row["95% interval"] = f"{found['Spearman low']:.2f} to {found['Spearman high']:.2f}"
    return [
        Table(f"Rank correlation with LLaVA-1.5-7B, {KEEP} tokens", [row]),
        Table(f"Part of the full model's average, {KEEP} tokens", rows),
    ]


def published_shares(file: Path) -> dict[str, float]:
    """Each method's median published average, as a part of the full model's."""
    found: dict[str, list[float]] = {}
    for source in json.loads(file.read_text(encoding="utf-8"))["sources"]:
        for name, figure in source["figures"].items():
            found.setdefault(name, []).append(figure / source["full"])
    return {name: statistics.median(shares) for name, shares in found.items()}


def measured_shares(file: Path) -> dict[str, float]:
    """Each method's accuracy in a file of `ivtp compare`, as a part of the full model's."""
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["tables"][0]["rows"]
    full = next(row["accuracy"] for row in rows if row["method"] == "none")
    return {row["method"]: row["accuracy"] / full for row in rows if row["keep"] == KEEP}


def spearman(pairs: Sequence[tuple[float, float]]) -> float:
    """Spearman's rank correlation; equal values share the mean of their ranks. 0 where one side has a single value."""
    first, second = (ranked([pair[i] for pair in pairs]) for i in range(2))
    if len(set(first)) < 2 or len(set(second)) < 2:
        return 0.0
    return statistics.correlation(first, second)


def ranked(values: Sequence[float]) -> list[float]:
    """Ranks from 1, the smallest first; equal values share the mean of their ranks."""
    return [sum(v < value for v in values) + (sum(v == value for v in values) + 1) / 2 for value in values]
