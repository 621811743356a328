"""Benchmarks' figures as sums of ratios over their items: what a bootstrap can weigh anew.

A mean is one ratio, of scores over ones; POPE's F1 is one, of 2 TP over 2 TP + FP + FN; MME's score is one for each of
its tasks. Items are what belongs together: MME's two questions, all turns of one of MMBench's.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Sample = Mapping[str, Any]
RESAMPLES = 1000
"""Bootstrap draws."""


def percentiles(draws: Sequence[float]) -> tuple[float, float]:
    """The bounds of the middle 95% of bootstrap draws."""
    ordered = sorted(draws)
    return ordered[round(0.025 * len(ordered))], ordered[round(0.975 * len(ordered)) - 1]


@dataclass(frozen=True)
class Ratios:
    """A figure: the sum over its terms of sum(over) / sum(under), times a scale."""

    over: Array
    """(items, terms)."""
    under: Array
    """(items, terms)."""
    items: tuple[int, ...]
    """The number of each item's first question."""
    scale: float = 1.0

    def value(self, weights: Array | None = None) -> Array:
        """The figure (), or one for each row of `weights` (draws, items).

        A ratio of nothing is as the mean of the others: a draw may lack one of MME's tasks.
        """
        weights = np.ones(len(self.over)) if weights is None else weights
        over, under = weights @ self.over, weights @ self.under
        total = np.divide(over, under, out=np.zeros_like(over), where=under > 0).sum(axis=-1)
        there = np.maximum((under > 0).sum(axis=-1), 1)
        found: Array = self.scale * total * under.shape[-1] / there
        return found

    def of(self, chosen: Sequence[bool]) -> Ratios:
        """The figure over some items."""
        picked = np.asarray(chosen, dtype=bool)
        items = tuple(item for item, stays in zip(self.items, picked, strict=True) if stays)
        return Ratios(self.over[picked], self.under[picked], items, self.scale)

    def draws(self, name: str) -> Array:
        """The figure of RESAMPLES bootstrap draws of the items (RESAMPLES,); the same items for the same name."""
        rng = np.random.default_rng([zlib.crc32(name.encode()), len(self.over)])
        even = np.full(len(self.over), 1 / len(self.over))
        return self.value(rng.multinomial(len(self.over), even, size=RESAMPLES).astype(float))


def ratios(metric: str, samples: Sequence[Sample], scale: float) -> Ratios | None:
    """The figure of a benchmark's `metric` over lmms-eval's samples; None where a judge's figure is no such sum.

    `scale` makes the metric what a table shows.
    """
    values = [(int(sample["doc_id"]), sample[metric]) for sample in samples if metric in sample]
    if not values:
        return None
    return _KINDS.get(metric, _mean)(values, scale)


Values = list[tuple[int, Any]]


def _one_term(terms: Sequence[tuple[int, float, float]], scale: float) -> Ratios:
    """Of (number, over, under)."""
    items, over, under = zip(*terms, strict=True)
    return Ratios(np.array(over, float)[:, None], np.array(under, float)[:, None], tuple(items), scale)


def _mean(values: Values, scale: float) -> Ratios | None:
    if not all(isinstance(value, int | float) for _, value in values):
        return None
    return _one_term([(number, float(value), 1.0) for number, value in values], scale)


def _pope_f1(values: Values, scale: float) -> Ratios:
    """Answers that are neither yes nor no to a question whose answer is no count for neither side."""
    terms = []
    for number, value in values:
        there, said = value["ground_truth"] == "yes", value["prediction"]
        hit, missed = there and said == "yes", there and said == "no"
        terms.append((number, 2.0 * hit, 2.0 * hit + missed + (not there and said == "yes")))
    return _one_term(terms, scale)


def _mme(values: Values, scale: float) -> Ratios:
    """Accuracy and accuracy+ of pairs, 0 to 200, summed over the tasks."""
    pairs: dict[tuple[str, Any], list[tuple[int, float]]] = {}
    for number, value in values:
        pairs.setdefault((value["category"], value["question_id"]), []).append((number, value["score"]))
    tasks = sorted({task for task, _ in pairs})
    over, under = (np.zeros((len(pairs), len(tasks))) for _ in range(2))
    for row, ((task, _), scored) in enumerate(pairs.items()):
        right = sum(score for _, score in scored)
        over[row, tasks.index(task)] = 100 * (right / len(scored) + (right == len(scored)))
        under[row, tasks.index(task)] = 1
    return Ratios(over, under, tuple(scored[0][0] for scored in pairs.values()), scale)


def _circular(values: Values, scale: float) -> Ratios:
    """Questions of which every turn is right."""
    turns: dict[int, list[tuple[int, bool]]] = {}
    for number, (question, right) in values:
        turns.setdefault(question, []).append((number, right))
    return _one_term([(t[0][0], float(all(right for _, right in t)), 1.0) for t in turns.values()], scale)


def _seed(values: Values, scale: float) -> Ratios:
    """The option's letter."""
    same = [(number, value["pred"].lower().strip() == value["answer"].lower().strip()) for number, value in values]
    return _one_term([(number, float(right), 1.0) for number, right in same], scale)


def _llava(values: Values, scale: float) -> Ratios:
    """The model's marks over those of the reference; what could not be judged does not count."""
    terms = []
    for number, value in values:
        best, mine = (0, 0) if -999 in value["scores"] else value["scores"]
        terms.append((number, 100.0 * float(mine), float(best)))
    return _one_term(terms, scale)


def _judged(values: Values, scale: float) -> Ratios | None:
    """MM-Vet's marks, in percent; MMBench's figure is its own judge's."""
    if not all(isinstance(value, Mapping) and "score" in value for _, value in values):
        return None
    return _one_term([(number, 100.0 * value["score"], 1.0) for number, value in values], scale)


_KINDS: Mapping[str, Callable[[Values, float], Ratios | None]] = {
    "pope_f1_score": _pope_f1,
    "mme_perception_score": _mme,
    "circular": _circular,
    "seed_all": _seed,
    "gpt_eval_llava_all": _llava,
    "gpt_eval_score": _judged,
}
