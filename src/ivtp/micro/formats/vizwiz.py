"""VizWiz: questions about bad photographs; "unanswerable" where nothing can be seen or nothing is there."""

from __future__ import annotations

import random
import re

from ivtp.micro.formats.base import SHORT, Example, VqaFormat, annotate
from ivtp.micro.world.photo import Photo, take_photo
from ivtp.micro.world.questions import ask
from ivtp.micro.world.vocabulary import NAMES

UNANSWERABLE = "unanswerable"
REQUEST = f"When the provided information is insufficient, respond with 'Unanswerable'.\n{SHORT}"
_ABSENT = 0.12  # share of the readable photos whose question is about an object that is not there


class VizWiz(VqaFormat):
    """Gurari et al., 2018 (arXiv 1802.08218); LLaVA-1.5's prompt, ten annotators."""

    title = "VizWiz"

    def photo(self, split: str, index: int) -> Photo:
        """A bad photograph; one in five is unreadable."""
        return take_photo(split, index, bad=True)

    def examples(self, photo: Photo, rng: random.Random) -> list[Example]:
        """One question; about something that is there, unless it is to have no answer."""
        absent = sorted(set(NAMES) - {item.name for item in photo.scene.objects})
        if photo.readable and rng.random() < _ABSENT:
            other = ask(photo.scene, rng, rng.choice(("colour", "neighbour", "position")))
            if other is None:
                return []
            name = photo.scene.objects[other.objects[0]].name
            text = re.sub(rf"\b{name}\b", rng.choice(absent), other.text)
            return [self._asked(photo, rng, text, UNANSWERABLE, tuple(range(len(photo.scene.objects))))]
        asked = ask(photo.scene, rng, rng.choice(("colour", "count", "neighbour", "position", "sign", "extreme")))
        if asked is None:
            return []
        return [self._asked(photo, rng, asked.text, asked.answer if photo.readable else UNANSWERABLE, asked.objects)]

    def _asked(self, photo: Photo, rng: random.Random, question: str, answer: str, objects: tuple[int, ...]) -> Example:
        others = NAMES if answer == UNANSWERABLE else (UNANSWERABLE,)
        group = "unanswerable" if answer == UNANSWERABLE else "answerable"
        references = annotate(answer, others, rng)
        return self._example(photo, f"{question}\n{REQUEST}", answer, objects, references=references, group=group)


FORMAT = VizWiz
