"""Questions are drawn evenly over simple and crowded photos where that is asked, and counted apart."""

from __future__ import annotations

from collections import Counter

import pytest

from ivtp.micro.world.crowds import CROWDS, crowd_name, crowd_of
from recipes.micro.units import Unit, by_crowd, by_format, collect


def drawn(questions: int, *, even: bool) -> list[Unit]:
    return [unit for units in collect("test", questions, even=even) for unit in units]


def test_a_thousand_questions_hold_three_hundred_of_each_crowd() -> None:
    units = drawn(84, even=True)  # of each of twelve formats: a thousand in all
    counts = Counter(crowd_of(unit.examples[0].photo) for unit in units for _ in unit.examples)
    assert min(counts[crowd] for crowd in range(3)) >= 300
    by_title = Counter((unit.form.title, crowd_of(unit.examples[0].photo)) for unit in units)
    assert Counter(unit.form.title for unit in units) == dict.fromkeys({title for title, _ in by_title}, 84)
    assert {count for (title, _), count in by_title.items() if title != "LLaVA-Bench"} == {28}


@pytest.mark.parametrize("questions", [1, 2, 5])
def test_few_questions_are_shared_out_too(questions: int) -> None:
    units = drawn(questions, even=True)
    assert set(Counter(unit.form.title for unit in units).values()) == {questions}
    assert {crowd_of(unit.examples[0].photo) for unit in units} == {0, 1, 2}
    again = drawn(questions, even=True)
    assert [unit.examples for unit in units] == [unit.examples for unit in again]


def test_crowds_are_what_their_names_say() -> None:
    for unit in drawn(2, even=False):
        photo = unit.examples[0].photo
        low, high = CROWDS[crowd_of(photo)]
        assert low <= len(photo.scene.objects) <= high
        assert crowd_name(crowd_of(photo)) == f"{low}-{high} objects"


def test_accuracy_is_counted_by_crowd() -> None:
    units = drawn(4, even=True)
    scored = [(u, [float(crowd_of(u.examples[0].photo) == 0)] * len(u.examples)) for u in units]
    found = by_crowd(scored, "accuracy")
    assert [row["accuracy"] for row in found.values()] == [1, 0, 0]
    assert sum(row["questions"] for row in found.values()) == by_format(scored, "accuracy")["mean"]["questions"]
