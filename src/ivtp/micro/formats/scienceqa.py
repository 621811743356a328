"""ScienceQA-IMG: a short text, a question that needs both the text and the picture, and lettered choices."""

from __future__ import annotations

import random

from ivtp.micro.formats.base import ChoiceFormat, Example, lettered
from ivtp.micro.world.photo import Photo
from ivtp.micro.world.questions import uniques
from ivtp.micro.world.scene import position_of
from ivtp.micro.world.vocabulary import COLOURS, NAMES, POSITIONS

PEOPLE = ("anna", "ben", "carla", "dan", "emma", "felix")


class ScienceQa(ChoiceFormat):
    """Lu et al., 2022 (arXiv 2209.09513); the context says whose thing is whose, the picture how it looks."""

    title = "ScienceQA-IMG"

    def examples(self, photo: Photo, rng: random.Random) -> list[Example]:
        """One question about somebody's thing."""
        scene = photo.scene
        unique = uniques(scene)
        rng.shuffle(unique)
        for index in unique:
            item, place = scene.objects[index], position_of(scene.objects[index].box, 14.0)
            stems = []
            if item.colour is not None:
                stems.append((f"what color is the {item.backing} of", item.colour, tuple(COLOURS)))
            if place is not None:
                stems.append(("where in the picture is the thing of", place, POSITIONS))
            if stems:
                stem, answer, table = rng.choice(stems)
                owner, context = _owners(item.name, [o.name for o in scene.objects], rng)
                text = f"Context: {context}\n{stem} {owner}?"
                choice = lettered(text, answer, [word for word in table if word != answer], rng)
                return [self._example(photo, choice.text, choice.answer, (index,))]
        return []


def _owners(name: str, shown: list[str], rng: random.Random) -> tuple[str, str]:
    """The owner of ``name`` and sentences in random order that also name owners of other things."""
    others = rng.sample(sorted(set(NAMES) - {name}), 2)
    if visible := sorted(set(shown) - {name}):
        others[0] = rng.choice(visible)
    things = list(dict.fromkeys((name, *others)))
    people = rng.sample(PEOPLE, len(things))
    sentences = [f"the {thing} belongs to {person}." for thing, person in zip(things, people, strict=True)]
    rng.shuffle(sentences)
    return people[0], " ".join(sentences)


FORMAT = ScienceQa
