"""MME: two yes-no questions about each photo, one true and one false; both have to be right."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from ivtp.micro.formats.base import Example, Format
from ivtp.micro.world.geometry import relation_holds
from ivtp.micro.world.photo import Photo
from ivtp.micro.world.questions import count_to_ask, uniques
from ivtp.micro.world.scene import Scene
from ivtp.micro.world.vocabulary import COLOURS, NAMES, SIGN_TEXTS, article, plural

REQUEST = "Please answer yes or no."
_Pair = tuple[str, str, tuple[int, ...]]  # a true statement as a question, a false one, the objects


class Mme(Format):
    """Fu et al., 2023 (arXiv 2306.13394): the mean of accuracy and accuracy+ (both questions of a photo right)."""

    title = "MME"
    metric = "mean of accuracy and accuracy+"

    def examples(self, photo: Photo, rng: random.Random) -> list[Example]:
        """A true and a false question of one task, in random order."""
        task = rng.choice(list(_TASKS))
        found = _TASKS[task](photo.scene, rng)
        if found is None:
            return []
        yes, no, objects = found
        pair = [(yes, "yes"), (no, "no")]
        rng.shuffle(pair)
        return [self._example(photo, f"{text} {REQUEST}", answer, objects, group=task) for text, answer in pair]

    def total(self, examples: Sequence[Example], scores: Sequence[float]) -> float:
        """Half of accuracy and half of accuracy+; examples come in pairs."""
        both = [min(first, second) for first, second in zip(scores[::2], scores[1::2], strict=True)]
        return (sum(scores) / len(scores) + sum(both) / len(both)) / 2


def _existence(scene: Scene, rng: random.Random) -> _Pair | None:
    present = sorted({item.name for item in scene.objects})
    name, absent = rng.choice(present), rng.choice([n for n in NAMES if n not in present])
    objects = tuple(i for i, item in enumerate(scene.objects) if item.name == name)
    form = "Is there {} in this image?"
    return form.format(article(name)), form.format(article(absent)), objects


def _count(scene: Scene, rng: random.Random) -> _Pair | None:
    counts = Counter(item.name for item in scene.objects)
    right = count_to_ask(sorted(set(counts.values())), rng)
    name = rng.choice(sorted(name for name, count in counts.items() if count == right))
    objects = tuple(i for i, item in enumerate(scene.objects) if item.name == name)
    wrong = rng.choice([n for n in range(1, max(3, right) + 1) if n != right])
    form = "Are there a total of {} {} in the image?"
    yes, no = (form.format(n, plural(name) if n != 1 else name) for n in (right, wrong))
    return yes, no, objects


def _position(scene: Scene, rng: random.Random) -> _Pair | None:
    unique = uniques(scene)
    if len(unique) < 2:
        return None
    first, second = rng.sample(unique, 2)
    sides = rng.choice((("left", "right"), ("above", "below")))
    holds = relation_holds(scene.objects[first], scene.objects[second], sides[0])
    if holds is None:
        return None
    words = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
    right, wrong = sides if holds else sides[::-1]
    names = scene.objects[first].name, scene.objects[second].name
    form = "Is the {} {} the {}?"
    yes, no = (form.format(names[0], words[way], names[1]) for way in (right, wrong))
    return yes, no, (first, second)


def _colour(scene: Scene, rng: random.Random) -> _Pair | None:
    backed = [i for i in uniques(scene) if scene.objects[i].colour is not None]
    if not backed:
        return None
    index = rng.choice(backed)
    item = scene.objects[index]
    wrong = rng.choice([colour for colour in COLOURS if colour != item.colour])
    form = f"Is the {item.backing} of the {item.name} {{}}?"
    return form.format(item.colour), form.format(wrong), (index,)


def _ocr(scene: Scene, rng: random.Random) -> _Pair | None:
    signs = [i for i, item in enumerate(scene.objects) if item.text is not None]
    if not signs:
        return None
    index = rng.choice(signs)
    shown = {scene.objects[i].text for i in signs}
    wrong = rng.choice([text for text in SIGN_TEXTS if text not in shown])
    form = "Is there a sign that says {} in the image?"
    return form.format(scene.objects[index].text), form.format(wrong), (index,)


_TASKS = {"existence": _existence, "count": _count, "position": _position, "color": _colour, "OCR": _ocr}
FORMAT = Mme
