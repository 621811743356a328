"""Photographs of scenes: what the formats of the benchmarks ask about.

A photo is a scene, sampled from a wider range than ``sample_scene`` alone uses, sometimes cut off at the border,
sometimes a wall of signs, and then disturbed as photographs are. Its split decides what it may show:

* ``train``, ``validation``, ``test``: 1-12 objects of 28-110 px; some pairs of objects never meet;
* ``pairs``: the same, but at least one such pair is there;
* ``styles``: backgrounds and sizes that the other splits never show.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass, replace
from itertools import combinations

from PIL import Image

from ivtp.micro.world.nuisance import Nuisance, disturb, sample_nuisance
from ivtp.micro.world.render import render
from ivtp.micro.world.scene import NEW_BACKGROUNDS, SIZE, Scene, SceneObject, Style, sample_scene, split_seed
from ivtp.micro.world.vocabulary import BACKGROUNDS, GLYPHS

PHOTO_STYLE = Style(objects=(1, 12), sides=(28, 110), backgrounds=BACKGROUNDS)
NEW_STYLE = Style(objects=(1, 4), sides=(112, 128), backgrounds=NEW_BACKGROUNDS)
PAIRS_STYLE = replace(PHOTO_STYLE, objects=(5, 12))  # at most three signs, so two glyphs at least
SIGNS_STYLE = replace(PHOTO_STYLE, objects=(2, 6), sides=(60, 110), signs=1.0)

_HELD_OUT = 12  # one in so many pairs of objects
_SIGN_WALLS, _CROPPED, _DISTURBED = 0.06, 0.15, 0.25  # shares of the photos


@dataclass(frozen=True)
class Photo:
    """A picture of a scene; ``readable`` is False where a severe disturbance leaves nothing to see."""

    scene: Scene
    nuisances: tuple[Nuisance, ...] = ()
    readable: bool = True

    def picture(self) -> Image.Image:
        """The RGB image of 336x336 pixels."""
        image = render(self.scene)
        for nuisance in self.nuisances:
            image = disturb(image, nuisance)
        return image


def _at_most(style: Style, most: int | None) -> Style:
    lowest, highest = style.objects
    return style if most is None else replace(style, objects=(min(lowest, most), min(highest, most)))


def held_out(first: str, second: str) -> bool:
    """Whether two objects (by name) never meet in a photo of the ordinary splits; one pair in twelve."""
    pair = "+".join(sorted((first, second)))
    return first != second and "sign" not in (first, second) and zlib.crc32(pair.encode()) % _HELD_OUT == 0


def take_photo(split: str, index: int, *, bad: bool = False, most: int | None = None) -> Photo:
    """Photo ``index`` of a split, with at most ``most`` objects.

    ``bad`` ones (VizWiz's) are always disturbed and every fifth is unreadable.
    """
    seed = split_seed(split, index)
    rng = random.Random(f"photo/{seed}/{bad}")
    wall = rng.random() < _SIGN_WALLS
    style = {"styles": NEW_STYLE, "pairs": PAIRS_STYLE}.get(split, SIGNS_STYLE if wall else PHOTO_STYLE)
    scene = _meet(sample_scene(seed, style=_at_most(style, most)), rng, pairs=split == "pairs")
    if split not in ("pairs", "styles") and rng.random() < _CROPPED:
        scene = _cut_off(scene, rng)
    readable = not bad or rng.random() < 0.8
    if not bad and rng.random() >= _DISTURBED:
        return Photo(scene)
    return Photo(scene, (sample_nuisance(rng, severe=not readable),), readable)


def _meet(scene: Scene, rng: random.Random, *, pairs: bool) -> Scene:
    """The scene with objects renamed so that no held-out pair meets; with ``pairs``, the first two objects are one."""
    names = [item.name for item in scene.objects]
    glyphs = [i for i, item in enumerate(scene.objects) if item.text is None]
    taken: list[str] = []
    if pairs:
        taken += rng.choice([(a, b) for a, b in combinations(GLYPHS, 2) if held_out(a, b)])
    renamed: dict[str, str] = {}
    for index in glyphs[len(taken) :]:
        if names[index] not in renamed:
            candidates = (names[index], *rng.sample(GLYPHS, len(GLYPHS)))
            new = next(c for c in candidates if c not in taken and not any(held_out(c, other) for other in taken))
            renamed[names[index]] = new
            taken.append(new)
        names[index] = renamed[names[index]]
    for index, name in zip(glyphs, taken[: 2 * pairs], strict=False):
        names[index] = name
    return replace(scene, objects=tuple(replace(o, name=n) for o, n in zip(scene.objects, names, strict=True)))


def _cut_off(scene: Scene, rng: random.Random) -> Scene:
    """A closer view of a part of the scene: objects may stick out.

    Those seen by less than half are gone, and signs of which a letter could be missing.
    """
    largest = max(max(o.box[2] - o.box[0], o.box[3] - o.box[1]) for o in scene.objects)
    zoom = min(rng.uniform(1.05, 1.3), PHOTO_STYLE.sides[1] / largest)  # no larger than the style's objects
    left, top = (rng.uniform(0, SIZE * (1 - 1 / zoom)) for _ in range(2))
    objects = []
    for item in scene.objects:
        x0, y0, x1, y1 = item.box
        width, height = round((x1 - x0) * zoom), round((y1 - y0) * zoom)
        x, y = round((x0 - left) * zoom), round((y0 - top) * zoom)
        moved = replace(item, box=(x, y, x + width, y + height))
        if visible_share(moved) >= (0.5 if item.text is None else 0.95):
            objects.append(moved)
    return replace(scene, objects=tuple(objects)) if objects else scene


def visible_share(item: SceneObject) -> float:
    """Part of an object's box inside the picture, 0..1."""
    x0, y0, x1, y1 = item.box
    inside = max(0, min(x1, SIZE) - max(x0, 0)) * max(0, min(y1, SIZE) - max(y0, 0))
    return inside / ((x1 - x0) * (y1 - y0))
