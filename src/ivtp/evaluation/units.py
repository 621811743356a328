"""Questions of all formats about test photos, and each benchmark's figure over them with its interval."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ivtp.errors import ConfigError
from ivtp.evaluation.scoring import RESAMPLES, interval
from ivtp.micro.formats import format_class, list_formats
from ivtp.micro.formats.base import Example, Format


@dataclass(frozen=True)
class Unit:
    """Examples that belong together: one, or MME's pair."""

    form: Format
    examples: tuple[Example, ...]


def collect(split: str, questions: int, seed: int = 0) -> list[list[Unit]]:
    """``questions`` units of every format, grouped by the photo that they are about; VizWiz has its own, bad ones.

    Raises `ConfigError` where a format finds too few clear questions.
    """
    missing = dict.fromkeys(list_formats(), questions)
    groups: list[list[Unit]] = []
    for index in range(seed * 1_000_000, seed * 1_000_000 + 50 * questions):
        rng = random.Random(f"gate/{split}/{index}")
        by_photo: dict[Any, list[Unit]] = {}
        for name in [name for name, count in missing.items() if count]:
            form: Format = format_class(name)()
            photo = form.photo(split, index)
            examples = _asked(form, photo, rng)
            if examples:
                by_photo.setdefault(photo, []).append(Unit(form, tuple(examples)))
                missing[name] -= 1
        groups += list(by_photo.values())
        if not any(missing.values()):
            return groups
    raise ConfigError(f"split {split!r} offers too few clear questions for {[n for n, c in missing.items() if c]}")


def _asked(form: Format, photo: Any, rng: random.Random) -> list[Example]:
    """Examples of a format about a photo; a few tries, as not every draw finds a clear question."""
    for _ in range(6):
        examples = form.examples(photo, rng)
        if examples:
            return examples
    return []


def by_format(scored: list[tuple[Unit, list[float]]], label: str) -> dict[str, dict[str, Any]]:
    """Each format's figure with its 95% bootstrap interval, and the mean of all figures: title -> columns."""
    forms: dict[str, list[tuple[Unit, list[float]]]] = {}
    for unit, scores in scored:
        forms.setdefault(unit.form.title, []).append((unit, scores))
    rng = random.Random(0)
    rows: dict[str, dict[str, Any]] = {}
    draws: list[list[float]] = []
    for title, mine in sorted(forms.items()):
        draws.append([_total(rng.choices(mine, k=len(mine))) for _ in range(RESAMPLES)])
        asked = sum(len(scores) for _, scores in mine)
        rows[title] = {"questions": asked} | interval(label, _total(mine), draws[-1])
    means = [statistics.fmean(values) for values in zip(*draws, strict=True)]
    rows["mean"] = {"questions": sum(row["questions"] for row in rows.values())} | interval(
        label, statistics.fmean(row[label] for row in rows.values()), means
    )
    return rows


def _total(scored: Sequence[tuple[Unit, list[float]]]) -> float:
    examples = [example for unit, _ in scored for example in unit.examples]
    return scored[0][0].form.total(examples, [score for _, scores in scored for score in scores])


def gap(first: list[tuple[Unit, list[float]]], second: list[tuple[Unit, list[float]]]) -> tuple[float, list[float]]:
    """Difference of two means over the formats for the same units, and its bootstrap draws (paired)."""
    forms: dict[str, list[int]] = {}
    for place, (unit, _) in enumerate(first):
        forms.setdefault(unit.form.title, []).append(place)
    rng = random.Random(0)

    def mean(places: list[list[int]]) -> float:
        return statistics.fmean(_total([first[i] for i in p]) - _total([second[i] for i in p]) for p in places)

    draws = [mean([rng.choices(places, k=len(places)) for places in forms.values()]) for _ in range(RESAMPLES)]
    return mean(list(forms.values())), draws
