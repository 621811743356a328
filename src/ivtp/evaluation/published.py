"""What papers print of methods on LLaVA-1.5-7B at 64 tokens, without training, and whether others rank alike.

`published.json` names each figure's paper and table. IVTP has none at this number of tokens without training.
"""

from __future__ import annotations

import functools
import json
import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ivtp.evaluation.ratios import RESAMPLES, percentiles

PUBLISHED = Path(__file__).with_name("published.json")
KEEP = 64


@functools.cache
def sources() -> list[dict[str, Any]]:
    """The tables: `paper`, `title`, `table`, the full model's average and each method's in `figures`."""
    found: list[dict[str, Any]] = json.loads(PUBLISHED.read_text(encoding="utf-8"))["sources"]
    return found


def figures_of(method: str) -> Iterator[tuple[str, float]]:
    """Each paper that prints an average of a method, with that as a part of the full model's."""
    for source in sources():
        if method in source["figures"]:
            yield source["paper"], source["figures"][method] / source["full"]


def published_shares() -> dict[str, float]:
    """Each method's median published average, as a part of the full model's."""
    names = dict.fromkeys(name for source in sources() for name in source["figures"])
    return {name: statistics.median(share for _, share in figures_of(name)) for name in names}


def beside(ours: Mapping[str, float]) -> list[dict[str, Any]]:
    """A row for each method that both have, the best published first: parts of the full model's average, and ranks."""
    theirs = published_shares()
    names = sorted(theirs.keys() & ours.keys(), key=lambda name: -theirs[name])
    ranks = [dict(zip(names, ranked([-side[name] for name in names]), strict=True)) for side in (theirs, ours)]
    return [
        {"method": n, "published": theirs[n], "rank": ranks[0][n], "here": ours[n], "rank here": ranks[1][n]}
        for n in names
    ]


def correlation(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Columns of Spearman's correlation between the two parts of `beside`, with its interval: methods resampled."""
    pairs, rng = [(row["here"], row["published"]) for row in rows], random.Random(0)
    low, high = percentiles([spearman(rng.choices(pairs, k=len(pairs))) for _ in range(RESAMPLES)])
    return {"Spearman": spearman(pairs), "Spearman low": low, "Spearman high": high}


def spearman(pairs: Sequence[tuple[float, float]]) -> float:
    """Spearman's rank correlation; equal values share the mean of their ranks. 0 where one side has a single value."""
    first, second = (ranked([pair[i] for pair in pairs]) for i in range(2))
    if len(set(first)) < 2 or len(set(second)) < 2:
        return 0.0
    return statistics.correlation(first, second)


def ranked(values: Sequence[float]) -> list[float]:
    """Ranks from 1, the smallest first; equal values share the mean of their ranks."""
    return [sum(v < value for v in values) + (sum(v == value for v in values) + 1) / 2 for value in values]
