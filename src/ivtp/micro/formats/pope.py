"""POPE: is an object there? Absent ones are drawn at random, from the most frequent, or from the most alike."""

from __future__ import annotations

import random

from ivtp.micro.formats.base import Example, Format, short
from ivtp.micro.world.photo import Photo
from ivtp.micro.world.vocabulary import NAMES, OBJECTS, article

SAMPLINGS = ("random", "popular", "adversarial")
POPULAR = ("sign", "dog", "cat", "car", "tree", "apple", "house", "ball")
"""Signs are by far the most frequent objects of the photos; the others stand for a benchmark's frequent ones."""


class Pope(Format):
    """Li et al., 2023 (arXiv 2305.10355): object hallucination; accuracy, yes as often as no."""

    title = "POPE"
    metric = "accuracy"

    def examples(self, photo: Photo, rng: random.Random) -> list[Example]:
        """One question about an object's existence; the group says how an absent one was drawn."""
        present = sorted({item.name for item in photo.scene.objects})
        group = rng.choice(SAMPLINGS)
        answer = rng.choice(("yes", "no"))
        if answer == "yes":
            name = rng.choice(present)
        else:
            pool = [name for name in _pool(group, present) if name not in present]
            name = rng.choice(pool or [name for name in NAMES if name not in present])
        objects = tuple(i for i, item in enumerate(photo.scene.objects) if item.name == name)
        everything = tuple(range(len(photo.scene.objects)))
        prompt = short(f"Is there {article(name)} in the image?")
        return [self._example(photo, prompt, answer, objects or everything, group=group)]


def _pool(sampling: str, present: list[str]) -> tuple[str, ...]:
    """Names to draw an absent object from: all, the popular ones, or those of a category that the photo shows."""
    if sampling == "random":
        return NAMES
    if sampling == "popular":
        return POPULAR
    categories = {OBJECTS[name][0] for name in present if name in OBJECTS}
    return tuple(name for name, (category, _) in OBJECTS.items() if category in categories)


FORMAT = Pope
