"""SEED-Bench: multiple choice over nine dimensions of a single image."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence

from ivtp.micro.formats.base import ChoiceFormat, Example, lettered
from ivtp.micro.world.geometry import relation_holds
from ivtp.micro.world.photo import Photo
from ivtp.micro.world.questions import Question, ask, uniques
from ivtp.micro.world.scene import Scene, near_cell, position_of
from ivtp.micro.world.vocabulary import (
    BACKGROUNDS,
    COLOURS,
    NAMES,
    POSITIONS,
    SIGN_TEXTS,
    article,
    plural,
)

_Stem = tuple[str, str, Sequence[str], tuple[int, ...]]  # question, answer, table of options, objects


class SeedBench(ChoiceFormat):
    """Li et al., 2023 (arXiv 2307.16125); its nine image dimensions, LLaVA-1.5's prompt."""

    title = "SEED-Bench"

    def examples(self, photo: Photo, rng: random.Random) -> list[Example]:
        """One question of a random dimension; the group names it."""
        disturbed = bool(photo.nuisances)  # noise makes any background noisy, blur makes any plain
        dimension = rng.choice([name for name, stem in DIMENSIONS.items() if not (disturbed and stem is _scene)])
        stem = DIMENSIONS[dimension](photo.scene, rng)
        if stem is None:
            return []
        text, answer, table, objects = stem
        choice = lettered(text, answer, [word for word in table if word != answer], rng)
        return [self._example(photo, choice.text, choice.answer, objects, group=dimension)]


def _scene(scene: Scene, rng: random.Random) -> _Stem | None:
    if scene.background.kind not in BACKGROUNDS:
        return None
    return "how does the background look?", scene.background.kind, BACKGROUNDS, ()


def _identity(scene: Scene, rng: random.Random) -> _Stem | None:
    """What stands in a part of the picture, where only one object does."""
    clear = []
    for index, item in enumerate(scene.objects):
        word = position_of(item.box, 14.0)
        if word is not None and not any(near_cell(o.box, word) for o in scene.objects if o is not item):
            clear.append(index)
    if not clear:
        return None
    index = rng.choice(clear)
    item = scene.objects[index]
    others = [name for name in NAMES if name not in {o.name for o in scene.objects}]
    return f"what is the object in this part: {position_of(item.box)}?", item.name, others, (index,)


def _asked(kind: str, table: Sequence[str]) -> Callable[[Scene, random.Random], _Stem | None]:
    def stem(scene: Scene, rng: random.Random) -> _Stem | None:
        question: Question | None = ask(scene, rng, kind)
        return None if question is None else (question.text, question.answer, table, question.objects)

    return stem


def _relation(scene: Scene, rng: random.Random) -> _Stem | None:
    unique = uniques(scene)
    if len(unique) < 2:
        return None
    first, second = rng.sample(unique, 2)
    a, b = scene.objects[first], scene.objects[second]
    clear = [way for way in ("left", "right", "above", "below") if relation_holds(a, b, way)]
    dx, dy = abs(a.centre[0] - b.centre[0]), abs(a.centre[1] - b.centre[1])
    if not clear or max(dx, dy) < 2 * min(dx, dy):
        return None  # on a diagonal two options would be true
    answer = clear[0] if len(clear) == 1 else next(w for w in clear if (w in ("left", "right")) == (dx > dy))
    return f"where is the {a.name} from the {b.name}?", answer, ("left", "right", "above", "below"), (first, second)


def _interaction(scene: Scene, rng: random.Random) -> _Stem | None:
    """What an object stands on."""
    unique = [i for i in uniques(scene) if scene.objects[i].text is None]
    if not unique:
        return None
    index = rng.choice(unique)
    item = scene.objects[index]
    answer = "nothing" if item.colour is None else article(f"{item.colour} {item.backing}")
    table = ["nothing", *(article(f"{colour} {backing}") for colour in COLOURS for backing in ("disc", "frame"))]
    return f"what holds the {item.name}?", answer, table, (index,)


def _reasoning(scene: Scene, rng: random.Random) -> _Stem | None:
    """What there is most of."""
    counts = Counter(item.name for item in scene.objects).most_common()
    if len(counts) < 2 or counts[0][1] == counts[1][1]:
        return None
    most = counts[0][0]
    objects = tuple(i for i, item in enumerate(scene.objects) if item.name == most)
    others = [plural(name) for name, _ in counts[1:]] + [plural(n) for n in rng.sample(NAMES, 8) if n != most]
    return "what is there most of in the image?", plural(most), others[:3] if len(others) >= 3 else others, objects


DIMENSIONS: dict[str, Callable[[Scene, random.Random], _Stem | None]] = {
    "scene understanding": _scene,
    "instance identity": _identity,
    "instance attributes": _asked("colour", tuple(COLOURS)),
    "instance location": _asked("position", POSITIONS),
    "instances counting": _asked("count", tuple(str(n) for n in range(7))),
    "spatial relation": _relation,
    "instance interaction": _interaction,
    "visual reasoning": _reasoning,
    "text understanding": _asked("sign", SIGN_TEXTS),
}
FORMAT = SeedBench
