"""LLaVA-Bench (in the wild): detailed descriptions, judged by the objects, attributes and texts that they name."""

from __future__ import annotations

import random

from ivtp.micro.formats.base import Example, Format, overlap_f1
from ivtp.micro.world.captions import canonical_caption
from ivtp.micro.world.photo import Photo

LONGEST = 6  # objects
_FORMS = ("Describe this photo in detail.", "What do you see in this image? Describe it in detail.")


class LlavaBench(Format):
    """Liu et al., 2023 (arXiv 2304.08485). The benchmark's judge is a language model; here it is the scene graph."""

    title = "LLaVA-Bench"
    metric = "F1 of the described objects"

    def examples(self, photo: Photo, rng: random.Random) -> list[Example]:
        """One request for a description, for photos of at most six objects."""
        scene = photo.scene
        if len(scene.objects) > LONGEST:
            return []
        objects = tuple(range(len(scene.objects)))
        return [self._example(photo, rng.choice(_FORMS), canonical_caption(scene), objects)]

    def score(self, example: Example, answer: str) -> float:
        """F1 of the phrases: an object counts only with its disc, frame or text; the order does not count."""
        return description_f1(answer, example.answer)


def description_f1(answer: str, wanted: str) -> float:
    """F1 of the listed phrases, in whatever order: 0..1."""
    return overlap_f1(phrases(answer), phrases(wanted))


def phrases(description: str) -> list[str]:
    """The listed objects of a description: ``a dog on a red disc``, ``a sign that says stop``."""
    parts = description.strip().rstrip(".").lower().replace(" and ", ", ").split(", ")
    return [part.strip() for part in parts if part.strip()]


FORMAT = LlavaBench
