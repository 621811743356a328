"""A later turn of a conversation: what a `generate` that is handed a filled cache has to read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from ivtp.errors import InputError
from ivtp.hosts.base import Host, Visual
from ivtp.methods.base import Method
from ivtp.prefill.cache import check_cache, conversation_in
from ivtp.prefill.images import Read
from ivtp.prefill.record import Record
from ivtp.prefill.turns import Conversation, Turn, reads_in_encoder
from ivtp.prompt.batch import misfit, share_out
from ivtp.stock import CACHE_NAMES, is_drafting


@dataclass(frozen=True)
class LaterTurn:
    """What is to be done for it."""

    turn: Turn | None
    """What is to be pruned; None: nothing, the model goes on as with any cache."""
    record: Record | None
    """Of the conversation so far."""
    refill: Cache | None = None
    """The cache, where it is filled anew."""


def find_turn(
    host: Host, method: Method, ids: Tensor | None, arguments: dict[str, Any], configs: Sequence[Any]
) -> LaterTurn | None:
    """The turn that a `generate` with these arguments answers; None where nothing is cached yet, or a draft is made.

    `ids` (B, T) are the whole conversation, or its new turn alone beside a mask of the whole. Raises `InputError`.
    """
    cache = next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)
    if not isinstance(cache, Cache) or cache.get_seq_length() == 0:
        return None
    if ids is None or any(is_drafting(config) for config in configs):
        return None
    call = _Call(host, cache, ids, arguments)
    if _chooses_again(method) and call.shows_images:
        return call.read_again(method)
    return call.go_on()


def turn_in_forward(host: Host, method: Method, cache: Cache, inputs: dict[str, Any]) -> Turn:
    """The turn of a forward with images beside a filled cache: all of them are new. Raises `InputError`."""
    if _chooses_again(method):
        raise InputError(
            'repruning="turn" needs the whole conversation to choose again, which a forward behind a cache does not '
            'have; use generate, or repruning="first"'
        )
    return Turn(tuple(range(len(host.visuals(inputs)))), before=_with_record(conversation_in(cache)))


def _chooses_again(method: Method) -> bool:
    """Whether another question may keep other tokens, and is to."""
    depends = reads_in_encoder(method) or any(cut.where == "llm" for cut in method.plan.cuts)
    return method.config.repruning == "turn" and depends


def _with_record(conversation: Conversation | None) -> tuple[Record, ...]:
    """The records of all turns of a conversation that pruned."""
    record = conversation.record if conversation else None
    return (*record.before, record) if record else ()


@contextmanager
def refilled(cache: Cache) -> Iterator[None]:
    """An emptied `cache`; what was in it comes back where the call fails."""
    layers = list(cache.layers)
    cache.layers[:] = [DynamicLayer() for _ in layers]
    try:
        yield
    except BaseException:
        cache.layers[:] = layers
        raise


class _Call:
    """A `generate` beside a filled cache."""

    def __init__(self, host: Host, cache: Cache, ids: Tensor, arguments: dict[str, Any]) -> None:
        host.check_media(arguments)
        self.cache, self.ids = cache, ids
        self.mask: Tensor | None = arguments.get("attention_mask")
        self.is_whole = self.mask is None or self.mask.shape[-1] == ids.shape[1]
        self.slots = (ids == host.image_token).cpu()  # (B, T)
        self.held = conversation_in(cache)
        self.record = self.held.record if self.held else None
        self.conversation = self.held.spread(len(ids)) if self.held else None
        self.has_media = arguments.get(host.media[0]) is not None
        self.given = host.visuals(arguments) if self.has_media else []

    @property
    def shows_images(self) -> bool:
        """Whether the conversation has any, as far as is known."""
        return self.has_media or self.record is not None or bool(self.slots.any())

    def go_on(self) -> LaterTurn:
        """What is cached stays; of the images those of the new turn are read."""
        past = self.cache.get_seq_length() if self.is_whole else 0
        if self.is_whole and self.conversation and not self.conversation.begins(self.ids, self.mask):
            raise InputError(
                "the prompt does not begin with what the cache holds, token by token and padded alike; pass the same "
                "conversation with the new turn behind it, or start a new cache"
            )
        if not self.has_media:
            return LaterTurn(None, self.record)
        new = _counts(self.slots[:, past:])
        rows = share_out(new, self.given) or self._behind(new)
        images = tuple(m for row in rows for m in row)
        begun = None
        if self.is_whole:
            valid = torch.ones_like(self.ids) if self.mask is None else self.mask
            begun = self.ids[:, :past].cpu(), valid[:, :past].cpu().bool()
        return LaterTurn(Turn(images, past, False, _with_record(self.held), begun) if images else None, self.record)

    def read_again(self, method: Method) -> LaterTurn:
        """All images are chosen from again: stage 1 is kept where the question does not change it."""
        check_cache(self.cache)
        if not self.is_whole:
            raise InputError(
                'repruning="turn" reads the whole conversation again; pass all of its input_ids, not the new turn alone'
            )
        counts, known = _counts(self.slots), self._known(method)
        images = _behind_known(counts, known, self.given)
        if images is None:
            rows = share_out(counts, self.given)
            if rows is None and not known:
                raise InputError(
                    'repruning="turn" needs the pixel_values of all images of the conversation: the cache keeps none '
                    "that this method and its options could choose from again"
                )
            if rows is None:
                raise misfit(counts, self.given)
            images = [m for row, own in enumerate(rows) for m in self._reused(own, known[row] if known else ())]
        return LaterTurn(Turn(tuple(images), 0, True, _with_record(self.held)), self.record, self.cache)

    def _behind(self, new: list[int]) -> list[list[int]]:
        """Of all images of the conversation those in each row's new turn, which has so many slots."""
        whole = _counts(self.slots)
        rows = share_out(whole, self.given)
        if rows is None:
            raise misfit(whole, self.given)
        later = []
        for row, own in enumerate(rows):
            sizes = [len(self.given[m].token) for m in own]
            first = next((i for i in range(len(own) + 1) if sum(sizes[i:]) == new[row]), None)
            if first is None:
                raise InputError("an image lies across the end of what the cache holds; start a new cache")
            later.append(own[first:])
        return later

    def _known(self, method: Method) -> tuple[tuple[Read, ...], ...]:
        """The images of each row that the cache keeps, as the method would read them; empty where it does not."""
        talk = self.conversation
        if talk is None or talk.record is None or not talk.images or reads_in_encoder(method):
            return ()
        same = talk.record.method.config == method.config
        return talk.images if same and talk.begins_unpadded(self.ids, self.mask) else ()

    def _reused(self, own: list[int], known: tuple[Read, ...]) -> list[Read | int]:
        """The images of a row, read already where they are the known ones."""
        reads = known if all(_alike(r.visual, self.given[m]) for r, m in zip(known, own, strict=False)) else ()
        return [*reads, *own[len(reads) :]]


def _behind_known(
    counts: list[int], known: tuple[tuple[Read, ...], ...], given: Sequence[Visual]
) -> list[Read | int] | None:
    """The images of all rows, of which the `given` ones stand behind the known ones; None where they do not fit."""
    if not known:
        return None
    left = [count - sum(len(read.visual.token) for read in row) for count, row in zip(counts, known, strict=True)]
    rows = share_out(left, given) if min(left) >= 0 else None
    return None if rows is None else [image for pair in zip(known, rows, strict=True) for own in pair for image in own]


def _alike(one: Visual, other: Visual) -> bool:
    """Whether two images fill the same slots with the same patches."""
    return one.grids == other.grids and torch.equal(one.token, other.token) and torch.equal(one.tiles, other.tiles)


def _counts(slots: Tensor) -> list[int]:
    """Image slots in each row of (B, T)."""
    return [int(count) for count in slots.sum(dim=1)]
