"""Questions about scenes, with short lower-case answers that the scene graph decides.

Every question is asked only where its answer has a clear margin, and answers are drawn so that the question
alone does not give them away: yes as often as no, counts and positions uniformly over what the scene offers,
absent objects from the categories of the present ones.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations, pairwise

from ivtp.micro.world.captions import canonical_caption, ordered
from ivtp.micro.world.geometry import extreme_object, nearest_object, object_towards, relation_holds
from ivtp.micro.world.scene import Scene, position_of
from ivtp.micro.world.vocabulary import (
    COLOURS,
    DIRECTIONS,
    EXTREMES,
    LETTERS,
    NAMES,
    NUMBERS,
    OBJECTS,
    POSITIONS,
    SIGN_TEXTS,
    article,
    listing,
    plural,
)

POSITION_MARGIN = 14.0  # pixels between a centre and the next cell of the 3x3 grid
CAPTION_MARGIN = 6.0  # pixels between the centres of neighbours in a listing
LONGEST_CAPTION = 6  # objects

OPEN_KINDS = ("colour", "neighbour", "position", "extreme", "sign")
"""Kinds with a short answer that is hard to guess: neither yes or no, nor a count or a letter."""


@dataclass(frozen=True)
class Question:
    """A question and its only answer; ``objects`` are the indices of the scene's objects that it is about."""

    kind: str
    text: str
    answer: str
    objects: tuple[int, ...]


def ask(scene: Scene, rng: random.Random, kind: str | None = None) -> Question | None:
    """A random question of a kind (default: any); None if the scene has no clear one of that kind."""
    return _ASK[kind or rng.choice(KINDS)](scene, rng)


def questions(scene: Scene, *, seed: int, count: int) -> list[Question]:
    """Up to ``count`` distinct questions, the kinds in turn from a random start."""
    rng = random.Random(f"{scene.seed}/{seed}")
    found: dict[str, Question] = {}
    order = rng.sample(KINDS, len(KINDS))
    for attempt in range(8 * max(count, len(KINDS))):
        if len(found) >= count:
            break
        question = ask(scene, rng, order[attempt % len(order)])
        if question is not None:
            found.setdefault(question.text, question)
    return list(found.values())


def two_apart(asked: Iterable[Question]) -> tuple[Question, Question] | None:
    """The first two questions of different kinds about different objects, with different answers."""
    for first, second in combinations(asked, 2):
        if first.kind != second.kind and not set(first.objects) & set(second.objects) and first.answer != second.answer:
            return first, second
    return None


def uniques(scene: Scene, *, signs: bool = True) -> list[int]:
    """Indices of the objects that their name alone identifies."""
    counts = Counter(item.name for item in scene.objects)
    return [i for i, o in enumerate(scene.objects) if counts[o.name] == 1 and (signs or o.text is None)]


def _absent_name(scene: Scene, rng: random.Random) -> str:
    """A name that the scene lacks, mostly of a category that it shows."""
    present = {item.name for item in scene.objects}
    absent = [name for name in NAMES if name not in present]
    categories = {OBJECTS[name][0] for name in present if name in OBJECTS}
    similar = [name for name in absent if name in OBJECTS and OBJECTS[name][0] in categories]
    return rng.choice(similar if similar and rng.random() < 0.7 else absent)


def _existence(scene: Scene, rng: random.Random) -> Question | None:
    backed = [i for i, item in enumerate(scene.objects) if item.colour is not None]
    if backed and rng.random() < 0.3:
        return _existence_on_backing(scene, rng, rng.choice(backed))
    shown = sorted({item.name for item in scene.objects})
    name = rng.choice(shown) if rng.random() < 0.5 else _absent_name(scene, rng)
    objects = tuple(i for i, item in enumerate(scene.objects) if item.name == name)
    form = rng.choice(("is there {} in the image?", "is there {}?", "can you see {}?", "does the image show {}?"))
    text = form.format(article(name))
    return Question("existence", text, "yes" if objects else "no", objects or tuple(range(len(scene.objects))))


def _existence_on_backing(scene: Scene, rng: random.Random, index: int) -> Question:
    item = scene.objects[index]
    colour = item.colour if rng.random() < 0.5 else rng.choice(list(COLOURS))
    joint = "on" if item.backing == "disc" else "in"
    named = tuple(i for i, other in enumerate(scene.objects) if other.name == item.name)
    hits = [i for i in named if (scene.objects[i].backing, scene.objects[i].colour) == (item.backing, colour)]
    text = f"is there {article(item.name)} {joint} {article(f'{colour} {item.backing}')}?"
    return Question("existence", text, "yes" if hits else "no", named)


def _colour(scene: Scene, rng: random.Random) -> Question | None:
    candidates = [i for i in uniques(scene) if scene.objects[i].colour is not None]
    if not candidates:
        return None
    index = rng.choice(candidates)
    item = scene.objects[index]
    joint = "behind" if item.backing == "disc" else "around"
    form = rng.choice(
        (
            f"what color is the {item.backing} {joint} the {item.name}?",
            f"which color is {joint} the {item.name}?",
            f"what is the color of the {item.name}'s {item.backing}?",
        )
    )
    return Question("colour", form, item.colour or "", (index,))


def _count(scene: Scene, rng: random.Random) -> Question | None:
    groups: dict[str, list[int]] = {}
    if rng.random() < 0.55:
        for i, item in enumerate(scene.objects):
            groups.setdefault(plural(item.name), []).append(i)
        groups[plural(_absent_name(scene, rng))] = []
    else:
        for i, item in enumerate(scene.objects):
            if item.colour is not None:
                joint = "on" if item.backing == "disc" else "in"
                key = f"objects {joint} {article(f'{item.colour} {item.backing}')}"
                groups.setdefault(key, []).append(i)
    if not groups:
        return None
    numbers = sorted({len(members) for members in groups.values()})
    number = count_to_ask(numbers, rng)
    what = rng.choice(sorted(key for key, members in groups.items() if len(members) == number))
    form = rng.choice(("how many {} are there?", "how many {} are in the image?", "count the {}."))
    return Question("count", form.format(what), str(number), tuple(groups[what]) or _all(scene))


def count_to_ask(numbers: list[int], rng: random.Random) -> int:
    """One of the numbers: almost every scene offers "1"; larger ones are rarer and so drawn more readily."""
    return rng.choices(numbers, [max(1, 3 * n - 2) for n in numbers])[0]


def _all(scene: Scene) -> tuple[int, ...]:
    return tuple(range(len(scene.objects)))


def _relation(scene: Scene, rng: random.Random) -> Question | None:
    unique = uniques(scene)
    if len(unique) < 2:
        return None
    first, second = rng.sample(unique, 2)
    direction = rng.choice(DIRECTIONS)
    holds = relation_holds(scene.objects[first], scene.objects[second], direction)
    if holds is None:
        return None
    joint = direction if direction in ("above", "below") else f"{direction} of"
    a, b = scene.objects[first].name, scene.objects[second].name
    form = rng.choice(("is the {} {} the {}?", "is the {} located {} the {}?", "do you see the {} {} the {}?"))
    return Question("relation", form.format(a, joint, b), "yes" if holds else "no", (first, second))


def _neighbour(scene: Scene, rng: random.Random) -> Question | None:
    unique = uniques(scene)
    rng.shuffle(unique)
    for index in unique:
        name = scene.objects[index].name
        found = {way: object_towards(scene, index, way) for way in DIRECTIONS}
        found = {"next to": nearest_object(scene, index), **found}
        known = [(way, other) for way, other in found.items() if other is not None]
        if not known:
            continue
        direction, other = rng.choice(known)
        where = {"left": "left of", "right": "right of"}.get(direction, direction)
        form = rng.choice(("what is {} the {}?", "which object is {} the {}?", "name the object {} the {}."))
        return Question("neighbour", form.format(where, name), scene.objects[other].name, (index, other))
    return None


def _position(scene: Scene, rng: random.Random) -> Question | None:
    places: dict[str, list[int]] = {}
    for index in uniques(scene):
        word = position_of(scene.objects[index].box, POSITION_MARGIN)
        if word is not None:
            places.setdefault(word, []).append(index)
    if not places:
        return None
    word = rng.choice(sorted(places))
    index = rng.choice(places[word])
    form = rng.choice(("where is the {}?", "where in the image is the {}?", "in which part is the {}?"))
    return Question("position", form.format(scene.objects[index].name), word, (index,))


def _extreme(scene: Scene, rng: random.Random) -> Question | None:
    for word in rng.sample(EXTREMES, len(EXTREMES)):
        index = extreme_object(scene, word)
        if index is not None:
            form = rng.choice(("what is the {} object?", "which object is {}?", "name the {} object."))
            return Question("extreme", form.format(word), scene.objects[index].name, (index,))
    return None


def _sign(scene: Scene, rng: random.Random) -> Question | None:
    signs = [i for i, item in enumerate(scene.objects) if item.text is not None]
    if not signs:
        return None
    if len(signs) == 1 and rng.random() < 0.7:
        text = scene.objects[signs[0]].text or ""
        what = "number" if text in NUMBERS else "word"
        form = rng.choice(
            (
                "what does the sign say?",
                "read the sign.",
                f"what {what} is on the sign?",
                "what is on the sign?",
            )
        )
        return Question("sign", form, text, (signs[0],))
    unique = uniques(scene, signs=False)
    for index in rng.sample(unique, len(unique)):
        sign = nearest_object(scene, index, among=signs)
        if sign is not None:
            form = rng.choice(("what does the sign next to the {} say?", "read the sign next to the {}."))
            name = scene.objects[index].name
            return Question("sign", form.format(name), scene.objects[sign].text or "", (index, sign))
    return None


def _choice(scene: Scene, rng: random.Random) -> Question | None:
    stems: list[tuple[str, str, list[str], tuple[int, ...]]] = []
    index = rng.choice(_all(scene))
    name = scene.objects[index].name
    named = tuple(i for i in _all(scene) if scene.objects[i].name == name)
    absent = list(dict.fromkeys(_absent_name(scene, rng) for _ in range(12)))
    stems.append((rng.choice(("what is in the image?", "which of these is shown?")), name, absent, named))
    for maker, pool in ((_colour, tuple(COLOURS)), (_position, POSITIONS), (_sign, SIGN_TEXTS)):
        inner = maker(scene, rng)
        if inner is not None:
            others = [word for word in pool if word != inner.answer]
            stems.append((inner.text, inner.answer, others, inner.objects))
    text, answer, others, objects = rng.choice(stems)
    if len(others) < 3:
        return None
    options = [answer, *rng.sample(others, 3)]
    rng.shuffle(options)
    lettered = " ".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True))
    return Question("choice", f"{text} {lettered}", LETTERS[options.index(answer)], objects)


def _caption(scene: Scene, rng: random.Random) -> Question | None:
    """The canonical caption, or the names in order; asked only where the order is clear."""
    if len(scene.objects) > LONGEST_CAPTION:
        return None
    axis = rng.randrange(2)
    order = ordered(scene, axis)
    centres = [scene.objects[i].centre[axis] for i in order]
    if any(b - a < CAPTION_MARGIN for a, b in pairwise(centres)):
        return None
    if axis == 0 and rng.random() < 0.7:
        text = rng.choice(("describe the image.", "what does the image show?", "describe this scene."))
        return Question("caption", text, canonical_caption(scene), _all(scene))
    text = f"list the objects from {('left to right', 'top to bottom')[axis]}."
    return Question("caption", text, listing([scene.objects[i].name for i in order]), _all(scene))


_ASK: dict[str, Callable[[Scene, random.Random], Question | None]] = {
    "existence": _existence,
    "colour": _colour,
    "count": _count,
    "relation": _relation,
    "neighbour": _neighbour,
    "position": _position,
    "extreme": _extreme,
    "sign": _sign,
    "choice": _choice,
    "caption": _caption,
}
KINDS: tuple[str, ...] = tuple(_ASK)
