"""Rules in place of the language models that judge three of the benchmarks, and MMBench's circular protocol."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from ivtp.micro.formats.base import normalise, overlap_f1
from ivtp.micro.formats.llava_bench import phrases


def partial_credit(answer: str, wanted: str) -> float:
    """Share of the parts of `wanted`, separated by commas, that `answer` gives in their places (MM-Vet, 0..1)."""
    parts = wanted.split(",")
    right = sum(normalise(given) == normalise(part) for given, part in zip(answer.split(","), parts, strict=False))
    return right / len(parts)


def description_f1(answer: str, wanted: str) -> float:
    """F1 of the listed phrases, in whatever order (LLaVA-Bench by a rule, 0..1)."""
    return overlap_f1(phrases(answer), phrases(wanted))


def circular(verdicts: Iterable[tuple[int, bool]]) -> float:
    """Share of the questions of which every turn of the options was answered right (MMBench, arXiv 2307.06281).

    `verdicts` are the number of a question, and whether one of its turns was right.
    """
    turns: dict[int, list[bool]] = defaultdict(list)
    for question, right in verdicts:
        turns[question].append(right)
    return sum(all(of_one) for of_one in turns.values()) / len(turns)
