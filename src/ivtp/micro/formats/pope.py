"""POPE: is an object there? Absent ones are drawn at random, from the most frequent, or from the most alike."""

from __future__ import annotations

import random

from ivtp.micro.formats.base import Example, Format, short
from ivtp.micro.world.photo import Photo
from ivtp.micro.world.vocabulary import NAMES, OBJECTS, article

SAMPLINGS = ("random", "popular", "adversarial")
POPULAR = ("dog", "cat", "car", "tree", "apple", "house", "ball")
"""Stand for a benchmark's most frequent objects."""


class Pope(Format):
    """Li et al., 2023 (arXiv 2305.10355): object hallucination; accuracy, yes as often as no."""

    title = "POPE"
    metric = "accuracy"

    def examples(self, photo: Photo, rng: random.Random) -> list[Example]:
        """One question about an object's existence; the group says how an absent one was drawn."""
        present = sorted({item.name for item in photo.scene.objects})
        group = rng.choice(SAMPLINGS)
        answer = rng.choice(("yes", "no"))
        shown, absent = _pools(group, present)
        if not shown or not absent:
            return []  # whatever the answer was to be, so that both stay equally frequent
        name = rng.choice(shown if answer == "yes" else absent)
        objects = tuple(i for i, item in enumerate(photo.scene.objects) if item.name == name)
        everything = tuple(range(len(photo.scene.objects)))
        prompt = short(f"Is there {article(name)} in the image?")
        return [self._example(photo, prompt, answer, objects or everything, group=group)]


def _pools(sampling: str, present: list[str]) -> tuple[list[str], list[str]]:
    """Present and absent names to ask for: of all, of the popular ones, or of the categories that the photo shows."""
    pool: tuple[str, ...] = NAMES
    if sampling == "popular":
        pool = POPULAR
    elif sampling == "adversarial":
        categories = {OBJECTS[name][0] for name in present if name in OBJECTS}
        pool = tuple(name for name, (category, _) in OBJECTS.items() if category in categories)
    return [name for name in pool if name in present], [name for name in pool if name not in present]


FORMAT = Pope
