"""TextVQA: reading signs; the prompt lists OCR tokens, some of them of no sign, as LLaVA's evaluation does."""

from __future__ import annotations

import random
from dataclasses import replace

from ivtp.micro.formats.base import SHORT, Example, VqaFormat, annotate
from ivtp.micro.world.geometry import extreme_object
from ivtp.micro.world.photo import Photo
from ivtp.micro.world.questions import Question, ask
from ivtp.micro.world.scene import Scene
from ivtp.micro.world.vocabulary import SIGN_TEXTS

_MISSED = 0.15  # chance that the OCR does not see a sign


class TextVqa(VqaFormat):
    """Singh et al., 2019 (arXiv 1904.08920); VQA accuracy with LLaVA-1.5's reference OCR tokens."""

    title = "TextVQA"

    def examples(self, photo: Photo, rng: random.Random) -> list[Example]:
        """One question about a sign."""
        asked = ask(photo.scene, rng, "sign") or _outermost(photo.scene, rng)
        if asked is None:
            return []
        texts = [item.text for item in photo.scene.objects if item.text is not None]
        absent = sorted(set(SIGN_TEXTS) - set(texts))
        tokens = [text for text in texts if rng.random() >= _MISSED] + rng.sample(absent, rng.randint(1, 3))
        rng.shuffle(tokens)
        prompt = f"{asked.text}\nReference OCR token: {', '.join(tokens)}\n{SHORT}"
        references = annotate(asked.answer, SIGN_TEXTS, rng)
        return [self._example(photo, prompt, asked.answer, asked.objects, references=references)]


def _outermost(scene: Scene, rng: random.Random) -> Question | None:
    """A sign told from the others by its place, as on a wall of signs."""
    signs = tuple(i for i, item in enumerate(scene.objects) if item.text is not None)
    word = rng.choice(("leftmost", "rightmost", "topmost", "bottommost"))
    only_signs = replace(scene, objects=tuple(scene.objects[i] for i in signs))
    place = extreme_object(only_signs, word) if signs else None
    if place is None:
        return None
    index = signs[place]
    return Question("sign", f"what does the {word} sign say?", str(scene.objects[index].text), (index,))


FORMAT = TextVqa
