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
    given = tuple(host.visuals(inputs))
    return Turn(tuple(range(len(given))), given, before=_with_record(conversation_in(cache)))


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
        self.host, self.cache, self.ids, self.arguments = host, cache, ids, arguments
        self.mask: Tensor | None = arguments.get("attention_mask")
        self.is_whole = self.mask is None or self.mask.shape[-1] == ids.shape[1]
        self.slots = (ids == host.image_token).cpu()  # (B, T)
        self.held = conversation_in(cache)
        self.record = self.held.record if self.held else None
        self.conversation = self.held.spread(len(ids)) if self.held else None
        self.has_media = arguments.get(host.media[0]) is not None

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
        given, rows = self._behind(past)
        images = tuple(m for row in rows for m in row)
        begun = None
        if self.is_whole:
            valid = torch.ones_like(self.ids) if self.mask is None else self.mask
            begun = self.ids[:, :past].cpu(), valid[:, :past].cpu().bool()
        turn = Turn(images, tuple(given), past, False, _with_record(self.held), begun)
        return LaterTurn(turn if images else None, self.record)

    def read_again(self, method: Method) -> LaterTurn:
        """All images are chosen from again: stage 1 is kept where the question does not change it."""
        check_cache(self.cache)
        if not self.is_whole:
            raise InputError(
                'repruning="turn" reads the whole conversation again; pass all of its input_ids, not the new turn alone'
            )
        known = self._known(method)
        whole = self.host.generate_reads  # positions come from what describes the images, whether they are known or not
        found = self._share(self._slots_behind(known)) if known and not whole else None
        if found is not None:
            given, rows = found
            reads: Sequence[tuple[Read, ...]] = known
        else:
            given, rows = self._share_all(needed=whole or not known)
            reads = [_reused(known[row], own, given) if known else () for row, own in enumerate(rows)]
            rows = [own[len(read) :] for read, own in zip(reads, rows, strict=True)]
        images = tuple(image for pair in zip(reads, rows, strict=True) for own in pair for image in own)
        return LaterTurn(Turn(images, tuple(given), 0, True, _with_record(self.held)), self.record, self.cache)

    def _visuals(self, slots: Tensor) -> list[Visual]:
        """The images that the call hands over, where they are those of these `slots` (B, T). Raises `InputError`."""
        if not self.has_media:
            return []
        hidden = self.slots & ~slots
        return self.host.visuals({**self.arguments, "input_ids": self.ids.cpu().masked_fill(hidden, -1)})

    def _share(self, slots: Tensor) -> tuple[list[Visual], list[list[int]]] | None:
        """The same, and which of them each row has; None where they are not those of these slots."""
        try:
            given = self._visuals(slots)
        except InputError:
            return None
        rows = share_out(_counts(slots), given)
        return None if rows is None else (given, rows)

    def _share_all(self, *, needed: bool = False) -> tuple[list[Visual], list[list[int]]]:
        """The same of the whole conversation. Raises `InputError`; it says so where all images are `needed`."""
        found = self._share(self.slots)
        if found is not None:
            return found
        given = self._visuals(self.slots)
        if needed:
            raise InputError(
                f'repruning="turn" needs the {" and ".join(self.host.media)} of all images of the conversation: '
                "the cache keeps none that this method and its options could choose from again, or the model itself "
                "reads where they lie; pass them with the whole prompt"
            )
        raise misfit(_counts(self.slots), given)

    def _behind(self, past: int) -> tuple[list[Visual], list[list[int]]]:
        """Those of each row's new turn, behind `past` columns; the call hands over these alone or all."""
        new = self.slots & (torch.arange(self.slots.shape[1]) >= past)
        found = self._share(new)
        if found is not None:
            return found
        given, rows = self._share_all()
        later = []
        for count, own in zip(_counts(new), rows, strict=True):
            sizes = [len(given[m].token) for m in own]
            first = next((i for i in range(len(own) + 1) if sum(sizes[i:]) == count), None)
            if first is None:
                raise InputError("an image lies across the end of what the cache holds; start a new cache")
            later.append(own[first:])
        return given, later

    def _slots_behind(self, known: Sequence[Sequence[Read]]) -> Tensor:
        """(B, T) bool: the slots behind those of the known images, which come first."""
        held = torch.tensor([sum(len(read.visual.token) for read in row) for row in known])
        return self.slots & (self.slots.cumsum(dim=1) > held[:, None])

    def _known(self, method: Method) -> tuple[tuple[Read, ...], ...]:
        """The images of each row that the cache keeps, as the method would read them; empty where it does not."""
        talk = self.conversation
        if talk is None or talk.record is None or not talk.images or reads_in_encoder(method):
            return ()
        same = talk.record.method.config == method.config
        return talk.images if same and talk.begins_unpadded(self.ids, self.mask) else ()


def _reused(known: tuple[Read, ...], own: list[int], given: Sequence[Visual]) -> tuple[Read, ...]:
    """The `known` images of a row where the first of its `own` ones, among those `given`, are the same."""
    return known if all(_alike(read.visual, given[m]) for read, m in zip(known, own, strict=False)) else ()


def _alike(one: Visual, other: Visual) -> bool:
    """Whether two images fill the same slots with the same patches."""
    return one.grids == other.grids and torch.equal(one.token, other.token) and torch.equal(one.tiles, other.tiles)


def _counts(slots: Tensor) -> list[int]:
    """Image slots in each row of (B, T)."""
    return [int(count) for count in slots.sum(dim=1)]
