"""The one place that cuts hidden states, masks, positions and cache together."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ivtp.core.select import on_device, right_aligned


@dataclass(frozen=True)
class TokenSequence:
    """What each column of a (B, T, D) decoder input is.

    `patch` is the original patch index (image m of a row counts from m*N), -1 for text, padding and the guide;
    `valid` is False for padding; `position` the position id; `source` the column of the user's prompt, -1 for the
    guide. `slack` counts the empty columns at the left of each row and `holes` says whether there is padding
    elsewhere; both are known on the host, so that lengths never have to be read from the device.
    """

    patch: Tensor  # (B, T)
    valid: Tensor  # (B, T) bool
    position: Tensor  # (B, T)
    source: Tensor  # (B, T)
    slack: tuple[int, ...]
    holes: bool

    def to(self, device: torch.device) -> TokenSequence:
        """The same, from the host to `device`."""
        tensors: dict[str, Any] = {
            name: on_device(getattr(self, name), device) for name in ("patch", "valid", "position", "source")
        }
        return replace(self, **tensors)

    @property
    def visual(self) -> Tensor:
        """(B, T) bool: the visual tokens."""
        return self.patch >= 0

    @property
    def length(self) -> int:
        """T."""
        return self.patch.shape[1]

    @property
    def padded(self) -> bool:
        """Whether any column is padding."""
        return self.holes or any(self.slack)

    def drop(self, gone: Tensor, counts: Many[int]) -> tuple[TokenSequence, Tensor]:
        """Remove the marked columns (B, T), `counts` in each row; also returns the gather index (B, T').

        Rows are aligned right, and T' is as short as the fullest row allows.
        """
        slack = [have + more for have, more in zip(self.slack, counts, strict=True)]
        left = tuple(s - min(slack) for s in slack)
        columns = torch.arange(self.length, device=gone.device)
        empty = columns < on_device(self.slack, gone.device).unsqueeze(1)
        index = right_aligned(~(gone | empty), self.length - min(slack))
        filled = columns[: index.shape[1]] >= on_device(left, gone.device).unsqueeze(1)
        sequence = TokenSequence(
            patch=self.patch.gather(1, index).masked_fill(~filled, -1),
            valid=self.valid.gather(1, index) & filled,
            position=self.position.gather(1, index),
            source=self.source.gather(1, index),
            slack=left,
            holes=self.holes,
        )
        return sequence, index

    def with_guide(self, answer: Tensor | None = None) -> TokenSequence:
        """Append the pseudo CLS token: valid, of no patch, at the position behind the prompt.

        `answer` (B, T) bool marks columns that are no part of the prompt.
        """
        prompt = self.valid if answer is None else self.valid & ~answer
        last = self.position.masked_fill(~prompt, -1).amax(dim=1, keepdim=True) + 1
        column = torch.full_like(last, -1)
        return replace(
            self,
            patch=torch.cat([self.patch, column], dim=1),
            valid=torch.cat([self.valid, column.bool()], dim=1),
            position=torch.cat([self.position, last], dim=1),
            source=torch.cat([self.source, column], dim=1),
        )

    def without_guide(self) -> TokenSequence:
        """Drop the last column."""
        names = ("patch", "valid", "position", "source")
        return replace(self, **{name: getattr(self, name)[:, :-1] for name in names})


@dataclass(frozen=True)
class Placeholders:
    """Where a prompt's image slots are, and what they hold.

    `mask` (B, T) bool marks them; `patch` (B, T) is the patch of its image that a slot holds, -1 for separators and
    text; `image` (B, T) counts the images of all rows, row by row.
    """

    mask: Tensor
    patch: Tensor
    image: Tensor
    patches: tuple[tuple[int, ...], ...]
    """Patches of each image of each row."""
    tail: int
    """At most so many columns lie behind the last slot of a row."""

    @property
    def images(self) -> tuple[int, ...]:
        """Images of each row."""
        return tuple(map(len, self.patches))

    def removed(self, kept: Many[Tensor]) -> list[int]:
        """How many patches of each row leave where `kept` (k,) stay of each image of the rows."""
        stay = iter(map(len, kept))
        return [sum(n - next(stay) for n in row) for row in self.patches]

    def to(self, device: torch.device) -> Placeholders:
        """The same, from the host to `device`."""
        moved: dict[str, Any] = {name: on_device(getattr(self, name), device) for name in ("mask", "patch", "image")}
        return replace(self, **moved)


def enter_decoder(
    slots: Placeholders, prompt: TokenSequence, kept: Many[Tensor], compact: bool
) -> tuple[TokenSequence, Tensor]:
    """The sequence that enters the decoder after stage 1, and its gather index (B, T') into the prompt.

    `kept` are the patches (k,) that stay of each image of the rows, in the order of their features. With `compact`
    the positions behind a removed token move up.
    """
    holds = slots.patch >= 0
    lengths = [len(own) for own in kept]
    stays = torch.zeros(len(kept), max(_flat(slots.patches), default=0), dtype=torch.bool, device=holds.device)
    number = on_device([m for m, length in enumerate(lengths) for _ in range(length)], holds.device)
    patches = torch.cat(list(kept)) if kept else number
    stays[number, patches] = True
    gone = holds & ~stays[slots.image, slots.patch.clamp_min(0)] if kept else holds
    sequence, index = prompt.drop(gone, slots.removed(kept))
    filled = torch.arange(index.shape[1], device=index.device) >= on_device(sequence.slack, index.device).unsqueeze(1)
    visual = (holds & ~gone).gather(1, index) & filled
    local = torch.zeros_like(index).masked_scatter(visual, patches)  # (B, T') patch within its image
    placed = sequence.position
    if compact:
        placed = placed - gone.cumsum(dim=1).gather(1, index)
    offsets = on_device(image_offsets(slots.patches), index.device)
    patch = torch.where(visual, local + offsets[slots.image.gather(1, index)], -1)
    return replace(sequence, patch=patch, position=placed), index


def image_offsets(patches: tuple[tuple[int, ...], ...]) -> list[int]:
    """For every image of the rows, row by row, how many patches the images before it in its row have."""
    return [sum(counts[:m]) for counts in patches for m in range(len(counts))] or [0]


def offset_images(patch: Tensor, offsets: Many[int]) -> Tensor:
    """Patch indices (I, T) of single images, counted on within each sample."""
    number = on_device(list(offsets), patch.device).unsqueeze(1)
    return torch.where(patch >= 0, patch + number, -1)


def join_images(parts: Many[Tensor], images: tuple[int, ...], fill: float) -> Tensor:
    """Rows of single images (t,) one behind the other in the rows of their samples: (B, most), filled up."""
    rows: list[Tensor] = []
    first = 0
    for count in images:
        own = list(parts[first : first + count])
        rows.append(torch.cat(own) if own else parts[0][:0])
        first += count
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)


def _flat(rows: Many[Many[int]]) -> list[int]:
    return [value for row in rows for value in row]
