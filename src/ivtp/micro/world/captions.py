"""Captions of scenes: the canonical one, and sampled ones of every length."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ivtp.micro.world.scene import Scene, SceneObject, position_of
from ivtp.micro.world.vocabulary import article, listing


def phrase(item: SceneObject, *, backing: bool = True) -> str:
    """An object in words: ``a dog``, ``a dog on a red disc``, ``a sign that says stop``."""
    if item.text is not None:
        return f"a sign that says {item.text}" if backing else "a sign"
    if not backing or item.colour is None:
        return article(item.name)
    joint = "on" if item.backing == "disc" else "in"
    return f"{article(item.name)} {joint} {article(item.colour + ' ' + item.backing)}"


def place(item: SceneObject) -> str:
    """Where an object is, in words: ``at the top left``, ``on the right``."""
    word = position_of(item.box)
    assert word is not None
    return {"left": "on the left", "right": "on the right", "center": "in the center"}.get(word, f"at the {word}")


def ordered(scene: Scene, axis: int = 0) -> list[int]:
    """Indices of the objects by their centre, left to right (axis 0) or top to bottom (axis 1)."""
    return sorted(range(len(scene.objects)), key=lambda i: (scene.objects[i].centre[axis], i))


def canonical_caption(scene: Scene) -> str:
    """The one full caption of a scene: every object with its backing or text, from left to right."""
    return listing([phrase(scene.objects[i]) for i in ordered(scene)])


def caption(scene: Scene, rng: random.Random) -> str:
    """A true caption of any length, from one name to a description with backings, places and background."""
    count = len(scene.objects)
    size = count if rng.random() < 0.3 else rng.randint(1, count)
    chosen = rng.sample(range(count), size)
    if rng.random() < 0.7:
        chosen = [i for i in ordered(scene) if i in chosen]
    items = [scene.objects[i] for i in chosen]
    style = rng.choice(("name", "plain", "backing", "backing", "place", "full"))
    text = listing([_styled(item, style) for item in items])
    if style == "full":
        return text + _surroundings(scene, items)
    return text


def _styled(item: SceneObject, style: str) -> str:
    if style == "name":
        return item.text if item.text is not None else item.name
    words = phrase(item, backing=style in ("backing", "full"))
    return f"{words} {place(item)}" if style in ("place", "full") else words


def _surroundings(scene: Scene, items: Sequence[SceneObject]) -> str:
    kind = scene.background.kind
    adjective = {"noise": "noisy", "stripes": "striped", "texture": "textured"}.get(kind, kind)
    return f" before {article(adjective)} background"
