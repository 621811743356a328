"""MM-Vet: one question that needs several skills at once; every part of the answer counts."""

from __future__ import annotations

import random

from ivtp.micro.formats.base import Example, Format, normalise
from ivtp.micro.world.photo import Photo
from ivtp.micro.world.questions import ask

SKILLS = ("colour", "count", "position", "sign", "extreme", "neighbour")


class MmVet(Format):
    """Yu et al., 2023 (arXiv 2308.02490). The benchmark's judge is a language model; here each part is exact."""

    title = "MM-Vet"
    metric = "share of the parts that are right"

    def examples(self, photo: Photo, rng: random.Random) -> list[Example]:
        """Two questions of different skills in one sentence; the group names the skills."""
        kinds = rng.sample(SKILLS, 2)
        first, second = (ask(photo.scene, rng, kind) for kind in kinds)
        if first is None or second is None:
            return []
        text = f"Answer both: {first.text.rstrip('?.')}, and {second.text.rstrip('?.')}?"
        objects = tuple(dict.fromkeys((*first.objects, *second.objects)))
        answer = f"{first.answer}, {second.answer}"
        return [self._example(photo, text, answer, objects, group="+".join(sorted(kinds)))]

    def score(self, example: Example, answer: str) -> float:
        """Share of the two parts that are right, in their order."""
        return partial_credit(answer, example.answer)


def partial_credit(answer: str, wanted: str) -> float:
    """Share of the parts of `wanted`, separated by commas, that `answer` gives in their places: 0..1."""
    parts = wanted.split(",")
    right = sum(normalise(given) == normalise(part) for given, part in zip(answer.split(","), parts, strict=False))
    return right / len(parts)


FORMAT = MmVet
