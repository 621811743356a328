"""The one place that cuts hidden states, masks, positions and cache together."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ivtp.core.select import on_device, right_aligned, take


@dataclass(frozen=True)
class TokenSequence:
    """What each column of a (B, T, D) decoder input is.

    `patch` is the original patch index (image m of a row counts from m*N), -1 for text, padding and the guide;
    `valid` is False for padding; `position` the position id, or one on each axis; `source` the column of the user's
    prompt, -1 for the guide. `slack` counts the empty columns at the left of each row and `holes` says whether there
    is padding elsewhere; both are known on the host, so that lengths never have to be read from the device.
    """

    patch: Tensor  # (B, T)
    valid: Tensor  # (B, T) bool
    position: Tensor  # (B, T), or (B, T, axes)
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
    def position_ids(self) -> Tensor:
        """The positions as a model takes them: (B, T), or (axes, B, T)."""
        return self.position if self.position.dim() == 2 else self.position.movedim(-1, 0)

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
            position=take(self.position, index),
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
        places = self.position.view(*prompt.shape, -1).masked_fill(~prompt.unsqueeze(-1), -1)
        last = places.amax(dim=(1, 2)) + 1  # (B,)
        behind = last.view(-1, *[1] * (self.position.dim() - 1)).expand_as(self.position[:, :1])
        column = torch.full_like(self.patch[:, :1], -1)
        return replace(
            self,
            patch=torch.cat([self.patch, column], dim=1),
            valid=torch.cat([self.valid, column.bool()], dim=1),
            position=torch.cat([self.position, behind], dim=1),
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
) -> tuple[TokenSequence, Tensor, Tensor | None]:
    """The sequence that enters the decoder after stage 1, and its gather index (B, T') into the prompt.

    `kept` are the patches (k,) that stay of each image of the rows, in the order of their features. With `compact`
    positions that no token is at any more close up, and what comes behind the prompt moves up by the third (B, 1).
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
    placed, shift = sequence.position, None
    if compact:
        vacant, shift = _vacant(prompt, gone)
        placed = placed - take(vacant, index)
    offsets = on_device(image_offsets(slots.patches), index.device)
    patch = torch.where(visual, local + offsets[slots.image.gather(1, index)], -1)
    return replace(sequence, patch=patch, position=placed), index, shift


def _vacant(prompt: TokenSequence, gone: Tensor) -> tuple[Tensor, Tensor]:
    """How many positions before each of the prompt's no token is at once those `gone` (B, T) are, and in all (B, 1).

    A position is taken by a token that has it on any axis. The first is of the shape of the prompt's positions.
    """
    (before, all_before), (after, all_after) = (
        _taken(prompt.position, there) for there in (prompt.valid, prompt.valid & ~gone)
    )
    return before - after, all_before - all_after


def _taken(position: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """How many positions before each of `position` (B, T, ...) the tokens `there` (B, T) take, and in all (B, 1)."""
    flat = position.flatten(1).contiguous()
    far = torch.iinfo(flat.dtype).max
    axes = there.view(*there.shape, *[1] * (position.dim() - 2)).expand_as(position).flatten(1)
    ordered = flat.masked_fill(~axes, far).sort(dim=1).values
    new = ordered < far
    new[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
    count = torch.nn.functional.pad(new.cumsum(dim=1), (1, 0))  # (B, 1 + T * axes)
    return count.gather(1, torch.searchsorted(ordered, flat)).view_as(position), count[:, -1:]


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
