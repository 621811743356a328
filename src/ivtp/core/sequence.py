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
    """Where a prompt's image slots are: `mask` (B, T) bool, N slots for each image, `images` counted for each row."""

    mask: Tensor
    images: tuple[int, ...]
    num_patches: int
    tail: int
    """At most so many columns lie behind the last slot of a row."""


def enter_decoder(
    slots: Placeholders, prompt: TokenSequence, patches: Tensor, compact: bool
) -> tuple[TokenSequence, Tensor]:
    """The sequence that enters the decoder after stage 1, and its gather index (B, T') into the prompt.

    `patches` (I, k) are the patches that each of the batch's images kept, in the order of their features. With
    `compact` the positions behind a removed token move up.
    """
    kept_slots = patches.shape[1]
    ordinal = slots.mask.cumsum(dim=1) - 1  # (B, T): how many slots came before
    within = ordinal % slots.num_patches
    gone = slots.mask & (within >= kept_slots)
    removed = slots.num_patches - kept_slots
    sequence, index = prompt.drop(gone, [n * removed for n in slots.images])
    filled = torch.arange(index.shape[1], device=index.device) >= on_device(sequence.slack, index.device).unsqueeze(1)
    visual = (slots.mask & ~gone).gather(1, index) & filled
    image = ordinal.gather(1, index) // slots.num_patches
    local = torch.zeros_like(index).masked_scatter(visual, patches)  # (B, T') patch within its image
    start = index - within.gather(1, index)  # the column of the image's first slot
    own = torch.where(visual, start + local, index)  # where each token stands in the prompt
    if compact:
        placed, source = sequence.position - gone.cumsum(dim=1).gather(1, index), index
    else:
        placed, source = prompt.position.gather(1, own), own
    patch = torch.where(visual, local + image * slots.num_patches, -1)
    valid = prompt.valid.gather(1, own) & filled  # a mask may hide single slots
    return replace(sequence, patch=patch, valid=valid, position=placed, source=source), index


def offset_images(patch: Tensor, images: tuple[int, ...], patches: int) -> Tensor:
    """Patch indices (I, T) of single images, counted on within each sample."""
    number = on_device([m for count in images for m in range(count)], patch.device).unsqueeze(1)
    return torch.where(patch >= 0, patch + number * patches, -1)


def join_images(tensor: Tensor, images: tuple[int, ...], fill: float) -> Tensor:
    """Rows of images (I, T) to rows of samples (B, T * most images)."""
    rows = tensor.new_full((len(images), tensor.shape[1] * max(images)), fill)
    first = 0
    for row, count in enumerate(images):
        flat = tensor[first : first + count].flatten()
        rows[row, : len(flat)] = flat
        first += count
    return rows
