"""Records to token ids with labels on the assistant's turns alone, and to padded batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ivtp.errors import ConfigError, ImageError, InputError
from ivtp.hosts.base import process
from ivtp.images import load_image
from ivtp.prompt.chat import ChatTemplate, image_token_of
from ivtp.training.records import Record

IGNORED = -100
"""The label of a token that is not learned."""
Piece = tuple[str, bool]
"""Text of a conversation, and whether it is learned."""
Shown = tuple[Record, list[Any]]
"""A record and its pictures."""


class Conversations(Dataset[Shown]):
    """Records with their pictures, which are read when they are asked for."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, place: int) -> Shown:
        """Raises `ImageError` that names the record."""
        record = self.records[place]
        try:
            return record, [load_image(image) for image in record.images]
        except ImageError as error:
            raise ImageError(f"{record.name}: {error}") from None


class Encoder:
    """Writes conversations with the model's own chat template, as prompts are written later, and labels the answers.

    Learned is what the model has to say where it is asked: everything behind the template's opening of an answer, up
    to what ends the turn. Where the template ends a turn with no special token, the tokenizer's own end is put there.
    `plain` is LLaVA's first stage: the image and its caption, without a question or template. Called with records and
    their pictures it gives a batch: padded on the left as prompts are, at most `max_length` columns.
    """

    def __init__(
        self,
        processor: Any,
        media: Sequence[str],
        *,
        plain: bool,
        max_length: int,
        process: Callable[..., Any] = process,
    ) -> None:
        """`media` are the arguments of a call that describe images, `process` is that of the model's `Host`.

        Raises `LoadError` without a chat template, `ConfigError` for a tokenizer that tells no characters.
        """
        self._processor, self._tokenizer = processor, processor.tokenizer
        self._media, self._max_length, self._process = media, max_length, process
        self._image_token = image_token_of(processor)
        self._template = None if plain else ChatTemplate.required(processor)
        if not self._tokenizer.is_fast:
            raise ConfigError("labels need a fast tokenizer, which tells the characters of its tokens; load that one")

    def __call__(self, shown: Sequence[Shown]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and `labels` (B, T), and the images as the model takes them.

        Raises `InputError` for a record whose images need more columns than there are.
        """
        texts = ["".join(text for text, _ in self.pieces(record)) for record, _ in shown]
        made = self._process(self._processor, texts, [pictures for _, pictures in shown])
        rows = []
        for (record, _), ids, mask in zip(shown, made["input_ids"], made["attention_mask"], strict=True):
            rows.append(self._labelled(record, ids[mask.bool()].tolist()))
        width = max(len(ids) for ids, _ in rows)
        batch = {
            "input_ids": _padded([ids for ids, _ in rows], width, self._tokenizer.pad_token_id),
            "attention_mask": _padded([[1] * len(ids) for ids, _ in rows], width, 0),
            "labels": _padded([labels for _, labels in rows], width, IGNORED),
        }
        return batch | {name: made[name] for name in self._media if name in made}

    def pieces(self, record: Record) -> list[Piece]:
        """The text of a record with one image token for each image, in pieces that are learned or not.

        Raises `InputError` where the chat template does not write answers as it asks for them.
        """
        if self._template is None:
            return [(self._image_token * len(record.images), False), (f"{record.turns[-1].text}\n", True)]
        messages = [(role, [*[None] * images, text]) for role, text, images in record.turns]
        whole = self._template.write_messages(messages, asks=False)
        end = self._end(whole, record.turns[-1].text)
        pieces: list[Piece] = []
        at = 0
        for number in range(1, len(messages), 2):
            head, answer = self._template.write_messages(messages[:number], asks=True), record.turns[number].text
            stop = whole.find(answer, len(head)) + len(answer)
            if not whole.startswith(head) or stop < len(head) + len(answer):
                raise InputError(f"{record.name}: the chat template does not write answers as it asks for them")
            written = whole[stop:].lstrip().startswith(end) if end else False
            behind = whole.index(end, stop) + len(end) if written else stop
            ending = whole[stop:behind] if written else self._tokenizer.eos_token
            pieces += [(whole[at : len(head)], False), (whole[len(head) : stop] + ending, True)]
            at = behind
        return pieces

    def ids(self, record: Record) -> tuple[list[int], list[bool]]:
        """Token ids with one for each image, and which of them are learned."""
        pieces = self.pieces(record)
        text, spans = "", []
        for piece, learned in pieces:
            if learned:
                spans.append((len(text), len(text) + len(piece)))
            text += piece
        made = self._tokenizer(text, return_offsets_mapping=True)
        inside = [any(b > start and a < stop for start, stop in spans) for a, b in made["offset_mapping"]]
        return list(made["input_ids"]), inside

    def _end(self, whole: str, answer: str) -> str:
        """The special token with which the template ends an answer; empty where it writes none."""
        behind = whole[whole.rfind(answer) + len(answer) :].strip()
        marks = sorted(filter(None, self._tokenizer.all_special_tokens), key=len, reverse=True)
        return next((mark for mark in marks if behind.startswith(mark)), "")

    def _labelled(self, record: Record, ids: list[int]) -> tuple[list[int], list[int]]:
        """Ids, as the processor makes them with slots for every patch, and their labels, both cut off at the end."""
        image = self._tokenizer.convert_tokens_to_ids(self._image_token)
        learned = spread(*self.ids(record), ids, image)
        if learned is None:
            raise InputError(f"{record.name}: the processor writes other text than its tokenizer; its answers are lost")
        if image in ids[self._max_length :]:
            raise InputError(
                f"{record.name}: its images end behind column {self._max_length}; allow more with --max-length"
            )
        labels = [token if own else IGNORED for token, own in zip(ids, learned, strict=True)]
        return ids[: self._max_length], labels[: self._max_length]


def spread(short: list[int], learned: list[bool], long: list[int], image: int) -> list[bool] | None:
    """Which of the ids `long` are learned, where each `image` of `short` became tokens of its own; None: no match."""
    places = [i for i, token in enumerate(short) if token == image]
    found = [False] * len(long)
    at = 0
    for start, stop in zip([0, *(i + 1 for i in places)], [*places, len(short)], strict=True):
        text, last = short[start:stop], stop == len(short)
        if start:  # behind an image: where this text comes next, or at the end
            choices = [len(long) - len(text)] if last else range(at + 1, len(long) - len(text) + 1)
            at = next((i for i in choices if i > at and long[i : i + len(text)] == text), -1)
        if at < 0 or long[at : at + len(text)] != text:
            return None
        found[at : at + len(text)] = learned[start:stop]
        at += len(text)
    return found if at == len(long) else None


def _padded(rows: list[list[int]], width: int, value: int) -> Tensor:
    """(B, width), filled up on the left."""
    return torch.tensor([[value] * (width - len(row)) + row for row in rows])
