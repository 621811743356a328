"""Sentences in which every word of the world occurs, for training tokenizers."""

from __future__ import annotations

import random

from ivtp.micro.world.captions import caption
from ivtp.micro.world.questions import questions
from ivtp.micro.world.scene import sample_scene, split_seed
from ivtp.micro.world.vocabulary import (
    COLOURS,
    DIRECTIONS,
    EXTREMES,
    LETTERS,
    NAMES,
    POSITIONS,
    SIGN_TEXTS,
    article,
    plural,
)


def corpus(scenes: int = 400) -> list[str]:
    """All single words (each several times), then questions, answers and captions of training scenes."""
    words = [*NAMES, *map(plural, NAMES), *map(article, NAMES), *COLOURS, *SIGN_TEXTS, *POSITIONS]
    words += [*EXTREMES, *DIRECTIONS, *LETTERS, *map(str, range(11)), "yes", "no"]
    sentences = words * 3
    for index in range(scenes):
        scene = sample_scene(split_seed("train", index))
        rng = random.Random(scene.seed)
        sentences.append(caption(scene, rng))
        for question in questions(scene, seed=0, count=10):
            sentences += [question.text, question.answer]
    return sentences
