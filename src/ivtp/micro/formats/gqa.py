"""GQA: compositional questions with one short answer."""

from __future__ import annotations

import random

from ivtp.micro.formats.base import Example, Format, short
from ivtp.micro.world.compose import compose
from ivtp.micro.world.photo import Photo


class Gqa(Format):
    """Hudson and Manning, 2019 (arXiv 1902.09506); exact match."""

    title = "GQA"

    def examples(self, photo: Photo, rng: random.Random) -> list[Example]:
        """One compositional question."""
        asked = compose(photo.scene, rng)
        return [] if asked is None else [self._example(photo, short(asked.text), asked.answer, asked.objects)]


FORMAT = Gqa
