"""How time and memory grow along each axis, and whether scoring grows faster than one attention layer."""

from __future__ import annotations

from dataclasses import dataclass

from ivtp.benchmark.results import Document, Row
from ivtp.benchmark.table import Grid, number, ratio

AXES = ("text", "images", "batch")


@dataclass(frozen=True)
class Step:
    """One size of an axis: the rows of its runs by name."""

    size: int
    rows: dict[str, Row]


def steps(document: Document, axis: str) -> list[Step]:
    """The finished configurations of one axis in order of size; the others are where the largest one has them."""
    done = [result for result in document["results"] if "rows" in result]
    others = [name for name in AXES if name != axis]
    if not done:
        return []
    largest = max(done, key=lambda result: int(result[axis]))
    chosen = [result for result in done if all(result[name] == largest[name] for name in others)]
    found = [Step(result[axis], {row["run"]: row for row in result["rows"]}) for result in chosen]
    return sorted(found, key=lambda step: step.size)


def growth_grids(document: Document) -> list[Grid]:
    """Two tables, time and memory, for each axis that has more than one size.

    "scoring" is the first method less the oracle, "attention" one attention layer of the full model's decoder over the
    whole prompt. The last line is by what factor each number grows from the first size to the last.
    """
    method = document["asked"]["methods"][0]
    grids = []
    for axis in AXES:
        found = steps(document, axis)
        if len(found) > 1:
            times = [_times(step, method) for step in found]
            peaks = [_peaks(step, method) for step in found]
            grids += [_grid(axis, f"growth with {axis}", found, times), _grid(axis, "", found, peaks)]
    failed = [r for r in document["results"] if "error" in r]
    lines: list[tuple[str, ...]] = [
        (f"text {r['text']}, images {r['images']}, batch {r['batch']}: {r['error']}",) for r in failed
    ]
    return [*grids, Grid("not measured", ("",), lines)] if failed else grids


def _times(step: Step, method: str) -> dict[str, float]:
    scoring, attention = step.rows[method]["over_oracle_ms"], step.rows["full"]["attention_ms"]
    prefills = {f"{run} ms": step.rows[run]["prefill_ms"] for run in ("full", "oracle", method)}
    return {**prefills, "scoring ms": scoring, "attention ms": attention, "scoring / attention": scoring / attention}


def _peaks(step: Step, method: str) -> dict[str, float]:
    return {f"{run} peak MB": step.rows[run]["peak_bytes"] / 1e6 for run in ("full", "oracle", method)}


def _grid(axis: str, title: str, found: list[Step], numbers: list[dict[str, float]]) -> Grid:
    lines = [
        (str(step.size), *(number(value) for value in values.values()))
        for step, values in zip(found, numbers, strict=True)
    ]
    ends = zip(numbers[0].values(), numbers[-1].values(), strict=True)
    factors = (ratio(last / first if first > 0 else None) for first, last in ends)
    lines.append((f"x {found[-1].size / found[0].size:.4g}", *factors))
    return Grid(title, (axis, *numbers[0]), lines)
