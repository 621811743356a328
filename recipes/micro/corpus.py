"""Sentences in which every word of the world occurs, for training tokenizers."""

from __future__ import annotations

import random

from ivtp.micro.model import SYSTEM
from ivtp.micro.world.captions import caption
from ivtp.micro.world.chinese import CHINESE_WORDS
from ivtp.micro.world.photo import take_photo
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
from recipes.micro.tasks import TASKS, ask_task


def corpus(photos: int = 400) -> list[str]:
    """All single words (each several times), the system prompt, then prompts, answers and captions of photos."""
    words = [*NAMES, *map(plural, NAMES), *map(article, NAMES), *COLOURS, *SIGN_TEXTS, *POSITIONS, *CHINESE_WORDS]
    words += [*EXTREMES, *DIRECTIONS, *LETTERS, *map(str, range(11)), "yes", "no", "unanswerable"]
    sentences = [*words * 3, SYSTEM]
    for index in range(photos):
        photo = take_photo("train", index)
        rng = random.Random(index)
        sentences.append(caption(photo.scene, rng))
        for task in TASKS:
            for question in ask_task(photo, rng, task):
                sentences += [question.text, question.answer]
    return sentences
