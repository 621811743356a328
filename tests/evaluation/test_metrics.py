"""Scorers against cases that were worked out by hand from the benchmarks' definitions."""

from __future__ import annotations

import pytest

from ivtp.evaluation.metrics import circular, description_f1, partial_credit


@pytest.mark.parametrize(
    ("answer", "wanted", "share"),
    [
        ("orange, top left", "orange, top left", 1.0),
        ("Orange., the top left", "orange, top left", 1.0),
        ("orange", "orange, top left", 0.5),
        ("top left, orange", "orange, top left", 0.0),
        ("orange, left, top", "orange, top", 0.5),
        ("", "orange, top left", 0.0),
    ],
)
def test_every_part_of_an_answer_counts(answer: str, wanted: str, share: float) -> None:
    assert partial_credit(answer, wanted) == share


@pytest.mark.parametrize(
    ("answer", "f1"),
    [
        ("a dog on a red disc, a cat and a sign that says stop", 1.0),
        ("a cat, a sign that says stop and a dog on a red disc.", 1.0),
        ("a dog on a blue disc, a cat and a sign that says stop", 2 * 2 / 6),  # two of three, of three
        ("a cat", 2 * 1 / 4),
        ("a cat, a cat", 2 * 1 / 5),  # the second is of nothing
        ("", 0.0),
    ],
)
def test_descriptions_count_whole_phrases(answer: str, f1: float) -> None:
    wanted = "a dog on a red disc, a cat and a sign that says stop"
    assert description_f1(answer, wanted) == pytest.approx(f1)


def test_a_question_counts_when_all_of_its_turns_are_right() -> None:
    assert circular([(0, True), (1, True), (0, True), (1, False), (2, False)]) == pytest.approx(1 / 3)
