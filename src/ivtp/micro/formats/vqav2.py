"""VQAv2: short answers to questions of every basic kind, scored against ten annotators."""

from __future__ import annotations

import random

from ivtp.micro.formats.base import Example, VqaFormat, annotate, short
from ivtp.micro.world.photo import Photo
from ivtp.micro.world.questions import ask
from ivtp.micro.world.vocabulary import COLOURS, NAMES, POSITIONS

KINDS = ("existence", "colour", "count", "neighbour", "position", "extreme")
_OTHERS = {
    "existence": ("yes", "no"),
    "colour": tuple(COLOURS),
    "count": tuple(str(n) for n in range(11)),
    "position": POSITIONS,
}


class VqaV2(VqaFormat):
    """Goyal et al., 2017 (arXiv 1612.00837); LLaVA-1.5's prompt for short answers."""

    title = "VQAv2"

    def examples(self, photo: Photo, rng: random.Random) -> list[Example]:
        """One question of a basic kind."""
        kind = rng.choice(KINDS)
        asked = ask(photo.scene, rng, kind)
        if asked is None:
            return []
        references = annotate(asked.answer, _OTHERS.get(kind, NAMES), rng)
        return [self._example(photo, short(asked.text), asked.answer, asked.objects, references=references, group=kind)]


FORMAT = VqaV2
