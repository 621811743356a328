"""Spatial relations between the objects of a scene, each with a margin; None means "too close to call"."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ivtp.micro.world.scene import Scene, SceneObject

RELATION_MARGIN = 30.0  # pixels between two centres along the asked axis
NEAREST_RATIO = 1.3  # the second nearest is at least this much further away
EXTREME_MARGIN = 18.0  # pixels between the outermost centre and the next
SIZE_RATIO = 1.2  # each side of the largest (smallest) object against the next

_AXIS = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}


def _offset(item: SceneObject, other: SceneObject, direction: str) -> tuple[float, float]:
    """How far ``other`` lies from ``item`` in a direction, and how far to its side (absolute), in pixels."""
    axis, sign = _AXIS[direction]
    along = sign * (other.centre[axis] - item.centre[axis])
    return along, abs(other.centre[1 - axis] - item.centre[1 - axis])


def relation_holds(item: SceneObject, other: SceneObject, direction: str) -> bool | None:
    """Whether ``item`` is left of / right of / above / below ``other``, by the centres along one axis."""
    along, _ = _offset(other, item, direction)
    return None if abs(along) < RELATION_MARGIN else along > 0


def nearest_object(scene: Scene, index: int, among: Sequence[int] | None = None) -> int | None:
    """The object next to another: nearest centre, clearly nearer than the second nearest."""
    candidates = [i for i in (range(len(scene.objects)) if among is None else among) if i != index]
    here = scene.objects[index].centre
    ranked = sorted((math.dist(here, scene.objects[i].centre), i) for i in candidates)
    if not ranked or (len(ranked) > 1 and ranked[1][0] < NEAREST_RATIO * ranked[0][0]):
        return None
    return ranked[0][1]


def object_towards(scene: Scene, index: int, direction: str) -> int | None:
    """The nearest object in a direction, where it lies clearly inside that quarter without a rival."""
    here = scene.objects[index]
    ranked: list[tuple[float, float, float, int]] = []
    for i, other in enumerate(scene.objects):
        along, aside = _offset(here, other, direction)
        # A rival counts in a wider cone than the answer, so that no near miss competes.
        if i != index and along > 0 and aside < 1.6 * along:
            ranked.append((math.hypot(along, aside), along, aside, i))
    ranked.sort()
    if not ranked or ranked[0][2] > 0.7 * ranked[0][1] or ranked[0][1] < RELATION_MARGIN:
        return None
    if len(ranked) > 1 and ranked[1][0] < NEAREST_RATIO * ranked[0][0]:
        return None
    return ranked[0][3]


def _side(item: SceneObject, measure: Callable[[float, float], float]) -> float:
    x0, y0, x1, y1 = item.box
    return measure(x1 - x0, y1 - y0)


def extreme_object(scene: Scene, word: str) -> int | None:
    """The largest, smallest, leftmost, rightmost, topmost or bottommost object, if there is a clear one."""
    objects = scene.objects
    if len(objects) < 2:
        return None
    if word in ("largest", "smallest"):
        # By the longer and by the shorter side, so that a wide sign is not called larger than a tall disc.
        power = 1 if word == "smallest" else -1
        winners = set()
        for measure in (max, min):
            sides = sorted((_side(item, measure) ** power, i) for i, item in enumerate(objects))
            if sides[1][0] < SIZE_RATIO * sides[0][0]:
                return None
            winners.add(sides[0][1])
        return winners.pop() if len(winners) == 1 else None
    axis = 0 if word in ("leftmost", "rightmost") else 1
    sign = 1 if word in ("leftmost", "topmost") else -1
    places = sorted((sign * item.centre[axis], i) for i, item in enumerate(objects))
    return places[0][1] if places[1][0] - places[0][0] >= EXTREME_MARGIN else None
