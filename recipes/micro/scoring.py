"""Test questions, exact match with intervals, and tables as JSON and Markdown."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ivtp.errors import ConfigError
from ivtp.evaluation.ratios import RESAMPLES, percentiles
from ivtp.files.outputs import write_text
from ivtp.micro import world
from ivtp.micro.world.photo import Photo, take_photo

Dtype = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class Item:
    """A question about a test photo."""

    photo: Photo
    question: world.Question

    @property
    def asked(self) -> set[int]:
        """Patches of the objects that the question is about."""
        return set(world.patches_of(self.photo.scene, self.question.objects))


def sample_items(count: int, *, split: str = "test", seed: int = 0, kinds: tuple[str, ...] = world.KINDS) -> list[Item]:
    """``count`` questions, the kinds in turn, each about another photo of the split."""
    items: list[Item] = []
    index = 0
    while len(items) < count:
        kind = kinds[len(items) % len(kinds)]
        photo = take_photo(split, seed * 1_000_000 + index)
        question = world.ask(photo.scene, random.Random(f"{seed}/{index}"), kind)
        index += 1
        if question is not None:
            items.append(Item(photo, question))
    return items


def exact(answer: str, expected: str) -> bool:
    """Whether an answer counts: the same words, whatever the case and the final full stop."""
    return answer.strip().rstrip(".").lower() == expected


def wilson(right: int, asked: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a proportion (Wilson, 1927); (0, 1) where nothing was asked."""
    if asked == 0:
        return 0.0, 1.0
    share, n = right / asked, asked
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(groups: list[list[bool]], *, seed: int = 0) -> tuple[float, float, float]:
    """Mean of the groups' shares with a 95% bootstrap interval, resampled within each group."""
    groups = [group for group in groups if group]
    if not groups:
        raise ConfigError("no answers to score; ask for at least one question")
    rng = random.Random(seed)

    def mean(parts: list[list[bool]]) -> float:
        return sum(sum(part) / len(part) for part in parts) / len(parts)

    draws = [mean([rng.choices(group, k=len(group)) for group in groups]) for _ in range(RESAMPLES)]
    return mean(groups), *percentiles(draws)


def interval(label: str, value: float, draws: Sequence[float]) -> dict[str, float]:
    """Columns of a value and the 95% interval of its bootstrap draws."""
    low, high = percentiles(draws)
    return {label: value, f"{label} low": low, f"{label} high": high}


def bootstrap(label: str, samples: Sequence[Any], statistic: Callable[[list[Any]], float]) -> dict[str, float]:
    """Columns of a statistic of the samples and its 95% bootstrap interval."""
    rng = random.Random(0)
    draws = [statistic(rng.choices(samples, k=len(samples))) for _ in range(RESAMPLES)]
    return interval(label, statistic(list(samples)), draws)


def accuracy_row(items: list[Item], answers: list[str], kind: str, label: str) -> dict[str, Any]:
    """Exact match of one kind (Wilson interval), or of "mean": the mean over the kinds (bootstrap interval)."""
    verdicts: dict[str, list[bool]] = {name: [] for name in world.KINDS}
    for item, answer in zip(items, answers, strict=True):
        verdicts[item.question.kind].append(exact(answer, item.question.answer))
    if kind == "mean":
        value, low, high = mean_interval(list(verdicts.values()))
        asked = len(items)
    else:
        asked, right = len(verdicts[kind]), sum(verdicts[kind])
        value, (low, high) = (right / asked if asked else 0.0), wilson(right, asked)
    return {"questions": asked, label: value, f"{label} low": low, f"{label} high": high}


@dataclass(frozen=True)
class Table:
    """One result: a title and rows of named values."""

    title: str
    rows: list[dict[str, Any]]

    def markdown(self) -> str:
        """GitHub table; a share is printed in percent with its interval beside it."""
        names = [n for n in self.rows[0] if not n.endswith((" low", " high"))]
        lines = [f"### {self.title}", "", "| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
        lines += ["| " + " | ".join(_cell(row, name) for name in names) + " |" for row in self.rows]
        return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None:
        return "–"
    if f"{name} low" in row:
        return f"{100 * value:.1f} ({100 * row[f'{name} low']:.1f}–{100 * row[f'{name} high']:.1f})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_json(path: Path, tables: list[Table], about: dict[str, Any]) -> None:
    """All tables and what they were measured on."""
    document = {"about": about, "tables": [vars(table) for table in tables]}
    write_text(path, json.dumps(document, indent=2) + "\n", "--output")
