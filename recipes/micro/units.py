"""Questions of all formats about test photos, and each benchmark's figure over them with its interval."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ivtp.errors import ConfigError
from ivtp.evaluation.ratios import RESAMPLES
from ivtp.micro.formats import format_class, list_formats
from ivtp.micro.formats.base import Example, Format
from ivtp.micro.world.crowds import CROWDS, crowd_name, crowd_of
from recipes.micro.scoring import interval


@dataclass(frozen=True)
class Unit:
    """Examples that belong together: one, or MME's pair."""

    form: Format
    examples: tuple[Example, ...]


def collect(
    split: str, questions: int, seed: int = 0, *, even: bool = False, formats: Sequence[str] = ()
) -> list[list[Unit]]:
    """``questions`` units of every format, grouped by the photo that they are about; VizWiz has its own, bad ones.

    ``formats`` are those alone that ask, in place of all. ``even`` takes equally many of each of CROWDS for every
    format, except where a format hardly asks about such photos (LLaVA-Bench's captions of many objects); then others
    take their place. Raises `ConfigError` where a format finds too few clear questions.
    """
    names = formats or list_formats()
    missing = dict.fromkeys(names, questions)
    room = {(name, crowd): _part(questions, place + crowd) for place, name in enumerate(names) for crowd in range(3)}
    groups: list[list[Unit]] = []
    first = seed * 1_000_000
    for index in range(first, first + 50 * questions):
        even = even and index - first < 12 * questions  # long enough to find what a format does ask about
        rng = random.Random(f"gate/{split}/{index}")
        by_photo: dict[Any, list[Unit]] = {}
        for name in [name for name, count in missing.items() if count]:
            form: Format = format_class(name)()
            photo = form.photo(split, index)
            place = name, crowd_of(photo)
            examples = _asked(form, photo, rng) if room[place] > 0 or not even else []
            if examples:
                by_photo.setdefault(photo, []).append(Unit(form, tuple(examples)))
                missing[name] -= 1
                room[place] -= 1
        groups += list(by_photo.values())
        if not any(missing.values()):
            return groups
    raise ConfigError(f"split {split!r} offers too few clear questions for {[n for n, c in missing.items() if c]}")


def _part(total: int, turn: int) -> int:
    """One of three parts of a total; the turns of three formats in a row share out what is left over."""
    return total // len(CROWDS) + (turn % len(CROWDS) < total % len(CROWDS))


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


def by_crowd(scored: list[tuple[Unit, list[float]]], label: str) -> dict[str, dict[str, Any]]:
    """The mean of the formats' figures over photos of each of CROWDS that were asked about: crowd -> columns."""
    crowds: dict[int, list[tuple[Unit, list[float]]]] = {}
    for unit, scores in scored:
        crowds.setdefault(crowd_of(unit.examples[0].photo), []).append((unit, scores))
    return {crowd_name(crowd): by_format(mine, label)["mean"] for crowd, mine in sorted(crowds.items())}


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
