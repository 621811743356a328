"""Training photos of the micro world in LLaVA's format: what `ivtp train` reads."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ivtp.files.outputs import whole, write_text
from ivtp.micro.formats import list_formats
from ivtp.micro.formats.base import Example
from ivtp.micro.world import caption
from ivtp.micro.world.photo import Photo
from ivtp.training.records import MARK
from recipes.micro.units import collect

FINETUNE, PRETRAIN = "finetune.json", "pretrain.json"
IMAGES = "images"
Entry = dict[str, Any]


def write_records(folder: Path, records: int, on_record: Callable[[int], Any] = lambda more: None) -> int:
    """`finetune.json` with a question a record, `pretrain.json` with captions of the same photos, and the photos.

    All formats ask equally often: `records` is rounded up to a multiple of their number, which is returned.
    """
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    names, each = list_formats(), -(-records // len(list_formats()))
    asked: list[Entry] = []
    shown: list[Entry] = []
    for place, name in enumerate(names):
        photos: dict[Photo, str] = {}
        for number, example in enumerate(islice(examples(name, place, each), each)):
            identity, photo = f"{name}-{number:05d}", example.photo
            if photo not in photos:
                photos[photo] = f"{IMAGES}/{identity}.png"
                with whole(folder / photos[photo], "--out") as partial:
                    photo.picture().save(partial)
                said = caption(photo.scene, random.Random(f"retrain/{identity}"))
                shown.append(entry(identity, photos[photo], MARK, said))
            asked.append(entry(identity, photos[photo], f"{MARK}\n{example.prompt}", example.answer))
            on_record(1)
    for file, entries in ((FINETUNE, asked), (PRETRAIN, shown)):
        write_text(folder / file, json.dumps(entries, ensure_ascii=False) + "\n", "--out")
    return len(asked)


def examples(name: str, place: int, count: int) -> Iterator[Example]:
    """At least `count` of a format, about photos that no other format asks about and no released weights have seen.

    Simple and crowded photos in equal numbers, as those of the benchmarks.
    """
    for group in collect("train", count, seed=place + 1, even=True, formats=(name,)):
        for unit in group:
            yield from unit.examples


def entry(identity: str, image: str, question: str, answer: str) -> Entry:
    """One conversation of one turn."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": identity, "image": image, "conversations": turns}
