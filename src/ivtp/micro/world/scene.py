"""Scenes of the micro world as symbolic graphs: what is where; nothing is drawn here."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

from ivtp.errors import ConfigError
from ivtp.micro.world.vocabulary import BACKGROUNDS, COLOURS, GLYPHS, POSITIONS, SIGN_TEXTS

SIZE = 336
PATCH = 14
GRID = SIZE // PATCH

NEW_BACKGROUNDS = ("checks", "dots", "rings")
"""Backgrounds of the split that shows what no model was trained on."""

_SPLITS = ("train", "validation", "test", "pairs", "styles")
_SPLIT_RANGE = 2**40
_GAP = 4  # pixels between two objects, and to the border


@dataclass(frozen=True)
class Style:
    """What scenes are sampled from: how many objects, their longer sides in pixels, backgrounds, share of signs."""

    objects: tuple[int, int] = (1, 10)
    sides: tuple[int, int] = (40, 110)
    backgrounds: tuple[str, ...] = BACKGROUNDS
    signs: float = 0.17


@dataclass(frozen=True)
class Background:
    """What lies behind the objects: ``kind`` is one of BACKGROUNDS, ``colours`` two RGB triples."""

    kind: str
    colours: tuple[tuple[int, int, int], tuple[int, int, int]]
    seed: int


@dataclass(frozen=True)
class SceneObject:
    """One object: ``box`` = (x0, y0, x1, y1) in pixels, exclusive at the end, backing included.

    ``backing`` is "none", "disc" or "frame", ``colour`` its colour (None without a backing);
    ``text`` is what a sign says, None for every other object.
    """

    name: str
    box: tuple[int, int, int, int]
    backing: str
    colour: str | None
    text: str | None

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) of the box's centre in pixels."""
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2


@dataclass(frozen=True)
class Scene:
    """A scene graph; ``seed`` is the seed that it was sampled from."""

    seed: int
    background: Background
    objects: tuple[SceneObject, ...]


def split_seed(split: str, index: int) -> int:
    """Seed of scene ``index`` of "train", "validation", "test", "pairs" or "styles"; the ranges never meet."""
    if split not in _SPLITS or not 0 <= index < _SPLIT_RANGE:
        raise ConfigError(
            f"no scene {index} in split {split!r}; use one of {', '.join(_SPLITS)} and 0..{_SPLIT_RANGE - 1}"
        )
    return _SPLITS.index(split) * _SPLIT_RANGE + index


def sample_scene(
    seed: int, *, min_objects: int | None = None, max_objects: int | None = None, style: Style | None = None
) -> Scene:
    """The scene of a seed; the number of objects is uniform over min_objects..max_objects (default: the style's).

    Raises `ConfigError` for numbers outside of what the style allows.
    """
    style = style or Style()
    lowest, highest = style.objects
    first, last = min_objects or lowest, highest if max_objects is None else max_objects
    if min_objects == 0 or not lowest <= first <= last <= highest:
        raise ConfigError(
            f"min_objects={min_objects}, max_objects={max_objects}: need {lowest} <= min <= max <= {highest}"
        )
    rng = random.Random(seed)
    background = _background(rng, style)
    count = rng.randint(first, last)
    while True:
        boxes = _boxes(rng, [_shape(rng, count, sign, style) for sign in _signs(rng, count, style)])
        if boxes is not None:
            break
    return Scene(seed, background, _furnish(rng, boxes))


def _background(rng: random.Random, style: Style) -> Background:
    kind = rng.choice(style.backgrounds)
    # Muted mid tones only, so that every colour of a backing stands out.
    tone = rng.randint(90, 190)
    first = [min(210, max(70, tone + rng.randint(-45, 45))) for _ in range(3)]
    spread = 16 if kind == "noise" else 40
    second = [min(215, max(60, value + rng.randint(-spread, spread))) for value in first]
    pair = ((first[0], first[1], first[2]), (second[0], second[1], second[2]))
    return Background(kind, pair, rng.getrandbits(31))


def _signs(rng: random.Random, count: int, style: Style) -> list[bool]:
    """Which of the objects are signs: at most three, unless the style is all signs."""
    signs = [rng.random() < style.signs for _ in range(count)]
    while sum(signs) > 3 and style.signs < 1:
        signs[signs.index(True)] = False
    return signs


def _shape(rng: random.Random, count: int, sign: bool, style: Style) -> tuple[int, int, bool]:
    """(width, height, is a sign); crowded scenes have smaller objects."""
    smallest, largest = style.sides
    if count > 6:
        largest = min(largest, 90 if count <= 10 else 76)
    if sign:
        width = rng.randrange(max(72, smallest), largest + 1, 2)
        return width, rng.randrange(40, max(42, width // 2), 2), True
    side = rng.randrange(smallest, largest + 1, 2)
    return side, side, False


def _boxes(
    rng: random.Random, shapes: list[tuple[int, int, bool]]
) -> list[tuple[tuple[int, int, int, int], bool]] | None:
    """Boxes without overlap by rejection, in random order; None if the shapes do not fit in a few tries."""
    placed: list[tuple[tuple[int, int, int, int], bool]] = []
    for width, height, sign in sorted(shapes, reverse=True):
        for _ in range(60):
            x = rng.randint(_GAP, SIZE - _GAP - width)
            y = rng.randint(_GAP, SIZE - _GAP - height)
            if all(
                x + width + _GAP <= a or c + _GAP <= x or y + height + _GAP <= b or d + _GAP <= y
                for (a, b, c, d), _ in placed
            ):
                placed.append(((x, y, x + width, y + height), sign))
                break
        else:
            return None
    rng.shuffle(placed)
    return placed


def _furnish(rng: random.Random, boxes: list[tuple[tuple[int, int, int, int], bool]]) -> tuple[SceneObject, ...]:
    """Names, backings and texts; names and colours repeat often enough that counting is a question."""
    count = len(boxes)
    names = rng.sample(GLYPHS, count)
    if count >= 2 and rng.random() < 0.6:
        for _ in range(rng.randint(1, 2)):
            name = rng.choice(names)
            for _ in range(rng.randint(1, min(4, count - 1))):
                names[rng.randrange(count)] = name
    palette = rng.sample(list(COLOURS), rng.randint(2, 8))
    texts = rng.sample(SIGN_TEXTS, count)
    objects = []
    for (box, sign), name, text in zip(boxes, names, texts, strict=True):
        backing = "none" if sign else rng.choice(("none", "disc", "disc", "frame"))
        colour = None if backing == "none" else rng.choice(palette)
        objects.append(SceneObject("sign" if sign else name, box, backing, colour, text if sign else None))
    return tuple(objects)


def position_of(box: tuple[int, int, int, int], margin: float = 0.0) -> str | None:
    """The word for the box's cell in a 3x3 grid; None if its centre is within ``margin`` px of a border."""
    cells = []
    for start, end in ((box[0], box[2]), (box[1], box[3])):
        centre = (start + end) / 2
        if any(abs(centre - border) < margin for border in (SIZE / 3, SIZE * 2 / 3)):
            return None
        cells.append(min(2, int(centre * 3 / SIZE)))
    return POSITIONS[cells[1] * 3 + cells[0]]


def near_cell(box: tuple[int, int, int, int], position: str, margin: float = 14.0) -> bool:
    """Whether the box's centre lies in a cell of the 3x3 grid or within ``margin`` px of it."""
    row, column = divmod(POSITIONS.index(position), 3)
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    third = SIZE / 3
    return all(
        number * third - margin <= centre <= (number + 1) * third + margin for number, centre in ((row, y), (column, x))
    )


def patches_of(scene: Scene, objects: Iterable[int]) -> list[int]:
    """Raster indices (0..575, ascending) of the patches that the boxes of the objects touch."""
    patches = set()
    for index in objects:
        x0, y0, x1, y1 = scene.objects[index].box
        for row in range(max(y0, 0) // PATCH, (min(y1, SIZE) - 1) // PATCH + 1):
            for column in range(max(x0, 0) // PATCH, (min(x1, SIZE) - 1) // PATCH + 1):
                patches.add(row * GRID + column)
    return sorted(patches)
