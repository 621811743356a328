"""The demo's questions are of the kind that the rule says, and the shipped choice fits the shipped picture."""

from __future__ import annotations

import json

import numpy as np

from ivtp.images import load_image
from ivtp.micro.world import OPEN_KINDS, Question, render, sample_scene, split_seed
from recipes.micro.choose_demo import FOLDER, Asked, pair_in, summary

SCENE = sample_scene(split_seed("validation", 0), min_objects=3)


def asked(kind: str, objects: tuple[int, ...], right: tuple[bool, ...], seen: float = 1.0) -> Asked:
    return Asked(SCENE, Question(kind, f"{kind}?", f"the {kind}", objects), right, seen)


GOOD = (True, False, True, True)


def test_two_kinds_and_different_objects() -> None:
    first, second = asked("colour", (0,), GOOD), asked("position", (1,), GOOD)
    assert pair_in([first, second]) == (first.question, second.question)
    assert pair_in([first, asked("colour", (1,), GOOD)]) is None
    assert pair_in([first, asked("position", (0, 2), GOOD)]) is None
    assert pair_in([first]) is None


def test_what_shows_nothing_is_not_chosen() -> None:
    first = asked("colour", (0,), GOOD)
    for right in (
        (True, True, True, True),
        (False, False, True, True),
        (True, False, False, True),
        (True, False, True, False),
    ):
        assert pair_in([first, asked("position", (1,), right)]) is None
    assert pair_in([first, asked("position", (1,), GOOD, seen=0.1)]) is None


def test_the_summary_counts_both_ways() -> None:
    found = [
        [asked("colour", (0,), GOOD), asked("sign", (1,), (True, True, False, True))],
        [asked("sign", (1,), GOOD, 0.0)],
    ]
    said = summary(found, 64)
    assert "3 questions about 2 validation scenes" in said
    assert "TopK in 1, IVTP in 2, IVTP+ in 3" in said
    assert "IVTP is and TopK is not in 2 (1 of them" in said
    assert said.endswith("and TopK is and IVTP is not in 1")


def test_the_shipped_scene() -> None:
    entry = json.loads((FOLDER / "demo.json").read_text(encoding="utf-8"))
    index = int(entry["image"].removeprefix("validation-").removesuffix(".png"))
    scene = sample_scene(split_seed("validation", index), min_objects=3)
    assert entry["seed"] == scene.seed
    assert np.array_equal(np.asarray(load_image(FOLDER / entry["image"])), np.asarray(render(scene)))
    assert {question["kind"] for question in entry["questions"]} <= set(OPEN_KINDS)
    assert len({question["kind"] for question in entry["questions"]}) == 2
    assert "IVTP+ in" in entry["chosen"]
