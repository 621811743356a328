"""Compositional questions: objects that are named by what is around them, comparisons, and counts of counts."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

from ivtp.micro.world.geometry import SIZE_RATIO, object_towards, relation_holds
from ivtp.micro.world.questions import Question, uniques
from ivtp.micro.world.scene import Scene, SceneObject, position_of
from ivtp.micro.world.vocabulary import DIRECTIONS, article

_WHERE = {"left": "left of", "right": "right of", "above": "above", "below": "below"}


def compose(scene: Scene, rng: random.Random) -> Question | None:
    """A random compositional question (kind "compose"); None if the drawn form finds no clear one in the scene."""
    return rng.choice(_FORMS)(scene, rng)


def referring(scene: Scene, index: int, rng: random.Random) -> tuple[str, tuple[int, ...]] | None:
    """A phrase that means one object without naming it, and the objects that the phrase is about.

    ``the object left of the dog``, ``the object on the red disc``; None if nothing identifies it.
    """
    found: list[tuple[str, tuple[int, ...]]] = []
    item = scene.objects[index]
    if (
        item.colour is not None
        and [(o.backing, o.colour) for o in scene.objects].count((item.backing, item.colour)) == 1
    ):
        joint = "on" if item.backing == "disc" else "in"
        found.append((f"the object {joint} the {item.colour} {item.backing}", (index,)))
    for other in uniques(scene):
        for way in DIRECTIONS:
            if other != index and object_towards(scene, other, way) == index:
                found.append((f"the object {_WHERE[way]} the {scene.objects[other].name}", (index, other)))
    return rng.choice(found) if found else None


def _question(text: str, answer: str, objects: tuple[int, ...]) -> Question:
    return Question("compose", text, answer, tuple(dict.fromkeys(objects)))


def _referred(
    scene: Scene, rng: random.Random, wanted: Callable[[SceneObject], bool]
) -> tuple[int, str, tuple[int, ...]] | None:
    """A random object that satisfies ``wanted``, with a phrase that refers to it."""
    for index in rng.sample(range(len(scene.objects)), len(scene.objects)):
        found = referring(scene, index, rng) if wanted(scene.objects[index]) else None
        if found is not None:
            return index, *found
    return None


def _colour_of(scene: Scene, rng: random.Random) -> Question | None:
    """What colour is the disc of the object left of the dog?"""
    for index in rng.sample(range(len(scene.objects)), len(scene.objects)):
        item = scene.objects[index]
        found = referring(scene, index, rng) if item.colour is not None else None
        if found is not None and str(item.colour) not in found[0]:
            text = rng.choice(("what color is the {0} of {1}?", "which color is the {0} of {1}?"))
            return _question(text.format(item.backing, found[0]), str(item.colour), found[1])
    return None


def _name_of(scene: Scene, rng: random.Random) -> Question | None:
    """What is left of the object on the red disc?"""
    for index in rng.sample(range(len(scene.objects)), len(scene.objects)):
        item = scene.objects[index]
        ways = [way for way in DIRECTIONS if object_towards(scene, index, way) is not None]
        found = referring(scene, index, rng) if ways else None
        if found is None:
            continue
        way = rng.choice(ways)
        other = object_towards(scene, index, way)
        if other is not None and other not in found[1] and item.name not in found[0]:
            form = rng.choice(("what is {} {}?", "which object is {} {}?"))
            return _question(form.format(_WHERE[way], found[0]), scene.objects[other].name, (*found[1], other))
    return None


def _which_on(scene: Scene, rng: random.Random) -> Question | None:
    """What is the object on the red disc?"""
    found = _referred(scene, rng, lambda item: True)
    if found is None:
        return None
    index, phrase, objects = found
    form = rng.choice(("what is {}?", "name {}."))
    return _question(form.format(phrase), scene.objects[index].name, objects)


def _choose(scene: Scene, rng: random.Random) -> Question | None:
    """Is the object left of the dog a cat or a car?"""
    found = _referred(scene, rng, lambda item: True)
    names = sorted({item.name for item in scene.objects})
    if found is None or len(names) < 2:
        return None
    index, phrase, objects = found
    right = scene.objects[index].name
    wrong = rng.choice([name for name in names if name != right])
    first, second = rng.sample((right, wrong), 2)
    return _question(f"is {phrase} {article(first)} or {article(second)}?", right, objects)


def _verify(scene: Scene, rng: random.Random) -> Question | None:
    """Is there a dog left of the tree?"""
    unique = uniques(scene)
    if len(unique) < 2:
        return None
    first, second = rng.sample(unique, 2)
    way = rng.choice(DIRECTIONS)
    holds = relation_holds(scene.objects[first], scene.objects[second], way)
    if holds is None:
        return None
    names = scene.objects[first].name, scene.objects[second].name
    form = rng.choice(("is there {} {} the {}?", "do you see {} {} the {}?"))
    return _question(form.format(article(names[0]), _WHERE[way], names[1]), "yes" if holds else "no", (first, second))


def _same_colour(scene: Scene, rng: random.Random) -> Question | None:
    """Do the dog and the cat have the same colour behind them?"""
    backed = [i for i in uniques(scene) if scene.objects[i].colour is not None]
    if len(backed) < 2:
        return None
    pairs = [(a, b) for a in backed for b in backed if a != b]
    alike = [p for p in pairs if scene.objects[p[0]].colour == scene.objects[p[1]].colour]
    unlike = [p for p in pairs if scene.objects[p[0]].colour != scene.objects[p[1]].colour]
    pool = rng.choice([part for part in (alike, unlike) if part])
    first, second = rng.choice(pool)
    a, b = scene.objects[first].name, scene.objects[second].name
    form = rng.choice(("are the {} and the {} on the same color?", "do the {} and the {} have the same color?"))
    return _question(form.format(a, b), "yes" if pool is alike else "no", (first, second))


def _larger(scene: Scene, rng: random.Random) -> Question | None:
    """Which is larger, the dog or the cat?"""
    unique = [i for i in uniques(scene) if scene.objects[i].text is None]
    rng.shuffle(unique)
    for first, second in pairwise(unique):
        sides = [scene.objects[i].box[2] - scene.objects[i].box[0] for i in (first, second)]
        if max(sides) >= SIZE_RATIO * min(sides):
            word = rng.choice(("larger", "smaller"))
            wanted = (max if word == "larger" else min)(sides)
            answer = (first, second)[sides.index(wanted)]
            names = (scene.objects[first].name, scene.objects[second].name)
            return _question(
                f"which is {word}, the {names[0]} or the {names[1]}?", scene.objects[answer].name, (first, second)
            )
    return None


def _where(scene: Scene, rng: random.Random) -> Question | None:
    """Where is the object on the red disc?"""
    found = _referred(scene, rng, lambda item: position_of(item.box, 14.0) is not None)
    if found is None:
        return None
    index, phrase, objects = found
    return _question(f"where is {phrase}?", str(position_of(scene.objects[index].box, 14.0)), objects)


_FORMS: tuple[Callable[[Scene, random.Random], Question | None], ...] = (
    *(_colour_of, _name_of, _which_on, _choose, _verify, _same_colour, _larger, _where),
)
