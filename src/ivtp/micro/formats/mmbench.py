"""MMBench: multiple choice over perception abilities, in English."""

from __future__ import annotations

import random

from ivtp.micro.formats.base import ChoiceFormat, Example, lettered, mixed_names
from ivtp.micro.world.photo import Photo
from ivtp.micro.world.questions import ask
from ivtp.micro.world.vocabulary import COLOURS, NAMES, POSITIONS, SIGN_TEXTS

TABLES: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "count": tuple(str(n) for n in range(7)),
    "position": POSITIONS,
    "neighbour": NAMES,
    "extreme": NAMES,
    "sign": SIGN_TEXTS,
}
"""Where the wrong options of each kind of question are drawn from."""


class MmBench(ChoiceFormat):
    """Liu et al., 2023 (arXiv 2307.06281); LLaVA-1.5's prompt for option letters."""

    title = "MMBench"

    def examples(self, photo: Photo, rng: random.Random) -> list[Example]:
        """One question with four options."""
        kind = rng.choice(list(TABLES))
        asked = ask(photo.scene, rng, kind)
        if asked is None:
            return []
        others = [word for word in TABLES[kind] if word != asked.answer]
        if TABLES[kind] is NAMES:
            others = mixed_names(asked.answer, [item.name for item in photo.scene.objects], NAMES, rng)
        choice = lettered(asked.text, asked.answer, others, rng)
        return [self._example(photo, choice.text, choice.answer, asked.objects, group=kind)]


FORMAT = MmBench
