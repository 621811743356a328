"""What the micro model is trained to do: the world's kinds of questions, plain, and the twelve formats."""

from __future__ import annotations

import random
from functools import cache

from ivtp.micro import world
from ivtp.micro.formats import format_class, list_formats
from ivtp.micro.formats.base import Format
from ivtp.micro.world.photo import Photo

TASKS: tuple[str, ...] = (*world.KINDS, *list_formats())
LONG = ("caption", "llava_bench")
"""Tasks with long answers: one of them is worth many short ones."""


@cache
def _format(name: str) -> Format:
    found: Format = format_class(name)()
    return found


def ask_task(photo: Photo, rng: random.Random, task: str) -> list[world.Question]:
    """Questions of a task about a photo (MME has two), ``kind`` = the task; none where it offers no clear one.

    Nothing but "unanswerable" is to be learnt from an unreadable photo.
    """
    if task in world.KINDS:
        question = world.ask(photo.scene, rng, task) if photo.readable else None
        return [] if question is None else [question]
    if not photo.readable and task != "vizwiz":
        return []
    return [world.Question(task, e.prompt, e.answer, e.objects) for e in _format(task).examples(photo, rng)]


def ask_many(photo: Photo, rng: random.Random, count: int, weights: list[float]) -> list[world.Question]:
    """``count`` questions about a photo, the tasks drawn by weight; tasks that it does not offer are skipped."""
    if not photo.readable:
        weights = [weight * (task == "vizwiz") for task, weight in zip(TASKS, weights, strict=True)]
        count = min(count, 2)  # they all have the same answer
    found: list[world.Question] = []
    while len(found) < count:
        for task in rng.choices(TASKS, weights, k=count - len(found)):
            found += ask_task(photo, rng, task)
    return found[:count]
