"""What a pruned cache remembers of the conversation in it, and what its next turn is handed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ivtp.hosts.base import Visual
from ivtp.methods.base import Method
from ivtp.prefill.images import Read
from ivtp.prefill.record import Record


@dataclass(frozen=True, eq=False)
class Conversation:
    """The prompts of a cache and what was decided about their images; B rows, without copies for beams.

    It goes with the cache and is never changed. Copies of the cache share it, and a pickled cache leaves it behind.
    """

    ids: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.long))
    """(B, T) on the host: what the conversation begins with."""
    valid: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.bool))
    """(B, T) bool on the host: no padding."""
    record: Record | None = None
    """Of the last turn that pruned."""
    images: tuple[tuple[Read, ...], ...] = ()
    """The images of each row, where they may be chosen from again."""

    def __deepcopy__(self, memo: Any) -> Conversation:
        return self

    def __reduce__(self) -> Any:
        return Conversation, ()

    def spread(self, rows: int) -> Conversation | None:
        """The same for so many rows: several for each prompt, as for returned sequences; None where that cannot be."""
        repeats, rest = divmod(rows, max(len(self.ids), 1))
        if rest or not repeats or not len(self.ids):
            return None
        ids, valid = (own.repeat_interleave(repeats, dim=0) for own in (self.ids, self.valid))
        return Conversation(ids, valid, self.record, tuple(row for row in self.images for _ in range(repeats)))

    def begins(self, ids: Tensor, mask: Tensor | None) -> bool:
        """Whether the prompts (B, T) of a call begin with these, token by token and in the same columns."""
        length = self.ids.shape[1]
        same = torch.equal(ids[:, :length].cpu(), self.ids)
        return same and (mask is None or torch.equal(mask[:, :length].cpu().bool(), self.valid))

    def begins_unpadded(self, ids: Tensor, mask: Tensor | None) -> bool:
        """Whether the prompts (B, T) of a call begin with these, padded in whatever way."""
        ids = ids.cpu()
        there = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.cpu().bool()
        mine = [own[valid] for own, valid in zip(self.ids, self.valid, strict=True)]
        given = [own[valid] for own, valid in zip(ids, there, strict=True)]
        return all(torch.equal(new[: len(own)], own) for own, new in zip(mine, given, strict=True))


@dataclass(frozen=True)
class Turn:
    """A later turn of a conversation, as `generate` found it beside a cache that is filled."""

    images: tuple[Read | int, ...]
    """Of the prompts that are read now, in their order: read in an earlier turn, or a number among the call's."""
    given: tuple[Visual, ...]
    """The images that the call hands over."""
    past: int = 0
    """Columns of the call's prompts that are in the cache and do not reach the model again."""
    anew: bool = False
    """Whether the whole conversation is read, into a cache that was emptied."""
    before: tuple[Record, ...] = ()
    """Of the earlier turns that pruned."""
    begun: tuple[Tensor, Tensor] | None = None
    """On the host the past columns (B, past) of the prompts, and bool which are no padding; None: not known."""

    @property
    def visuals(self) -> list[Visual]:
        """The images, as prompts are read with them."""
        return [self.given[image] if isinstance(image, int) else image.visual for image in self.images]


def reads_in_encoder(method: Method) -> bool:
    """Whether stage 1 depends on the question."""
    return method.reads_clip or method.reads_words
