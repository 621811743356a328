"""Training data as LLaVA publishes it: a JSON list of conversations beside a folder of images, checked when read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, UnidentifiedImageError

from ivtp.errors import ConfigError, short_reason

MARK = "<image>"
"""What stands for an image in a turn of the data, whatever a model's own tokenizer calls it."""
ROLES = {"human": "user", "gpt": "assistant"}
"""Roles of the data, and what chat templates call them."""


class Turn(NamedTuple):
    """What one side says, and how many images it shows before its text."""

    role: str
    text: str
    images: int = 0


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation: turns of the user and the assistant, one after the other, that end in an answer."""

    name: str
    """How errors call it, by its id and its place."""
    images: tuple[Path, ...]
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Bad:
    """A record that cannot be trained on, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def read_records(file: Path, folder: Path | None, *, needs_image: bool) -> tuple[list[Record], list[Bad]]:
    """The records of a file in LLaVA's format, and those that are bad; `folder` is where their images lie.

    A record is `{"id", "image"?, "conversations": [{"from": "human" | "gpt", "value": "<image>\\n..."}]}`; "image" is
    one file or a list of them. An answer in front of the first question is left out, as LLaVA does. `needs_image`:
    records without one are bad, where only the projector learns. Of every image the header is read. Raises
    `ConfigError` for a file that is no such list, and for images without a folder.
    """
    entries = _read_list(file)
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"--images {folder} is no folder; name the one that the images of --data {file} lie in")
    if folder is None and any(isinstance(e, dict) and e.get("image") for e in entries):
        raise ConfigError(f"--data {file} names images; say with --images DIR where they lie")
    good: list[Record] = []
    bad: list[Bad] = []
    seen: dict[Path, str] = {}
    for place, entry in enumerate(entries):
        identity = f" (id {entry['id']!r})" if isinstance(entry, dict) and "id" in entry else ""
        name = f"record {place}{identity}"
        try:
            record = _record(name, entry, folder or Path())
            if needs_image and not record.images:
                raise ValueError("it has no image, and in pretraining only the projector learns; leave it out")
            for image in record.images:
                if image not in seen:
                    seen[image] = _complaint(image)
                if seen[image]:
                    raise ValueError(seen[image])
        except ValueError as error:
            bad.append(Bad(name, str(error)))
        else:
            good.append(record)
    return good, bad


def _read_list(file: Path) -> list[Any]:
    if not file.is_file():
        raise ConfigError(f"--data {file} is no file; name LLaVA's JSON list of conversations")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--data {file} cannot be read as JSON ({short_reason(error)}); save it again") from None
    if not isinstance(content, list) or not content:
        kind = "an empty list" if content == [] else f"a {type(content).__name__}"
        raise ConfigError(f"--data {file} holds {kind}; a list of conversations is needed")
    return content


def _record(name: str, entry: Any, folder: Path) -> Record:
    """Raises `ValueError` with what is wrong with it."""
    if not isinstance(entry, dict):
        raise ValueError(f'it is a {type(entry).__name__}; use an object with "id", "image" and "conversations"')
    given = entry.get("image")
    names = [] if given is None else given if isinstance(given, list) else [given]
    if not all(isinstance(image, str) and image for image in names):
        raise ValueError(f'its "image" is {given!r}; use the name of a file, or a list of names')
    turns = list(_turns(entry.get("conversations")))
    while turns and turns[0].role == "assistant":
        turns.pop(0)
    if not turns:
        raise ValueError('its "conversations" hold no question; use turns of "human" and "gpt"')
    for number, (turn, following) in enumerate(zip(turns, [*turns[1:], None], strict=True), start=1):
        wanted = "user" if number % 2 else "assistant"
        if turn.role != wanted:
            raise ValueError(f"turn {number} is of the same side as the one before; questions and answers take turns")
        if turn.role == "user" and following is None:
            raise ValueError(f"its turn {number} has no answer; add one or leave the turn out")
    shown = sum(turn.images for turn in turns)
    if shown != len(names):
        raise ValueError(f"its turns show {shown} {MARK} and it has {len(names)} image(s); use one {MARK} for each")
    return Record(name, tuple(folder / image for image in names), tuple(turns))


def _turns(conversations: Any) -> Iterator[Turn]:
    if not isinstance(conversations, list):
        raise ValueError('it has no list "conversations"; use [{"from": "human", "value": ...}, {"from": "gpt", ...}]')
    for number, turn in enumerate(conversations, start=1):
        said = turn.get("from") if isinstance(turn, dict) else None
        value = turn.get("value") if isinstance(turn, dict) else None
        if said not in ROLES:
            raise ValueError(f"turn {number} is from {said!r}; use {' or '.join(ROLES)}")
        if not isinstance(value, str):
            raise ValueError(f'turn {number} has no text; use "value": "..."')
        images, text = value.count(MARK), value.replace(MARK, "").strip()
        if ROLES[said] == "assistant" and images:
            raise ValueError(f"turn {number}, an answer, shows an image; {MARK} belongs into a question")
        if not text and ROLES[said] == "assistant":
            raise ValueError(f"turn {number} is an empty answer; fill it in or leave the record out")
        yield Turn(ROLES[said], text, images)


def _complaint(file: Path) -> str:
    """Why the image cannot be read, by its header alone; empty where it can."""
    try:
        with Image.open(file) as image:
            return "" if min(image.size) > 0 else f"its image {file} has no pixels"
    except FileNotFoundError:
        return f"its image {file} does not exist; check --images"
    except UnidentifiedImageError:
        return f"its image {file} is no image that can be read"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return f"its image {file} cannot be read ({short_reason(error)})"


def refuse(bad: Sequence[Bad], file: Path, *, most: int = 10) -> None:
    """Raise `ConfigError` with the first bad records, where there are any."""
    if not bad:
        return
    more = f" | and {len(bad) - most} more" if len(bad) > most else ""
    named = " | ".join(str(one) for one in bad[:most])
    raise ConfigError(f"--data {file} has {len(bad)} bad record(s); repair them, or add --skip-bad: {named}{more}")
