"""Rules in place of the language models that judge three of the benchmarks, and MMBench's circular protocol."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from ivtp.micro.formats.llava_bench import description_f1
from ivtp.micro.formats.mmvet import partial_credit

__all__ = ["circular", "description_f1", "partial_credit"]


def circular(verdicts: Iterable[tuple[int, bool]]) -> float:
    """Share of the questions of which every turn of the options was answered right (MMBench, arXiv 2307.06281).

    `verdicts` are the number of a question, and whether one of its turns was right.
    """
    turns: dict[int, list[bool]] = defaultdict(list)
    for question, right in verdicts:
        turns[question].append(right)
    return sum(all(of_one) for of_one in turns.values()) / len(turns)
