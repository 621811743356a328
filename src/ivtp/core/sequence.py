"""The one place that cuts hidden states, masks, positions and cache together."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from ivtp.core.select import on_device, right_aligned, take
from ivtp.errors import InputError


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


class PrunedLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped here
    """A cache layer that holds fewer tokens than the prompt had and still reports the prompt's length.

    `generate` and multi-turn code slice new input by `get_seq_length()`, so that stays the logical length, while
    masks are made for the tokens that are there. `removed` is their difference, `prompt_valid` (B, kept) marks
    padding among the kept prompt tokens (None: no padding), `prompt_length` is the unpruned length of what the prefill
    read, `fixed_length` that of its prompt without drafted tokens,
    `shift` (B, 1) what compact positions lie behind, and `part` is the same for layers that hold the same tokens.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        prompt_length: int,
        fixed_length: int,
        prompt_valid: Tensor | None,
        shift: Tensor | None,
        part: int,
    ) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self.prompt_length = prompt_length
        self.fixed_length = fixed_length
        self.removed = prompt_length - keys.shape[-2]
        self.prompt_valid = prompt_valid
        self.shift = shift
        self.part = part
        self.expected = False
        """Whether the attached pruner has prepared the step that comes next."""

    def get_seq_length(self) -> int:
        """The logical length: the whole prompt and everything after it."""
        return int(super().get_seq_length()) + self.removed

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that are there, and the offset that makes column j of them the logical token j + removed.

        Raises `InputError` where only an attached pruner could make the right mask and none is at work.
        """
        if (self.prompt_valid is not None or self.shift is not None) and not self.expected:
            raise InputError(
                "this cache holds a pruned prompt; go on with it while the pruner is attached, or start a new cache"
            )
        return int(super().get_seq_length()) + query_length, self.removed

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append a step's keys and values."""
        self.expected = False
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys, values

    def crop(self, max_length: int) -> None:
        """Remove -`max_length` tokens from the end, or (older transformers) all behind that logical length.

        Raises `InputError` where that reaches into the prompt: which of its tokens are there is not known by number.
        """
        surplus = -max_length if max_length <= 0 else self.get_seq_length() - max_length
        if surplus <= 0:
            return
        left = self.get_seq_length() - surplus
        if left < self.fixed_length:
            raise InputError("a pruned prompt cannot be cropped; start a new cache with the shorter prompt")
        self.keys = self.keys[..., :-surplus, :]
        self.values = self.values[..., :-surplus, :]
        drafted = self.prompt_length - left  # tokens of the prefill that were no prompt
        if drafted > 0:
            self.prompt_length = left
            self.prompt_valid = None if self.prompt_valid is None else self.prompt_valid[:, :-drafted]

    def reset(self) -> None:
        """Empty the layer; what was pruned is forgotten with it."""
        super().reset()
        self.removed, self.prompt_length, self.fixed_length = 0, 0, 0
        self.prompt_valid = self.shift = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Permute the batch for beam search."""
        super().reorder_cache(beam_idx)
        self._map_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        self._map_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        super().batch_select_indices(indices)
        self._map_rows(lambda rows: rows[indices])

    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self.prompt_valid = None if self.prompt_valid is None else change(self.prompt_valid)
        self.shift = None if self.shift is None else change(self.shift)


@dataclass(frozen=True)
class Seen:
    """What the decoder layers from `first_layer` on saw, until the next cut.

    `guide` says that the last column is the pseudo CLS token; `index` (B, T') gathers this sequence into the next one
    (None for the last). The guide is in no `index` that leads out of the layers that carry it.
    """

    first_layer: int
    sequence: TokenSequence
    guide: bool
    index: Tensor | None = None


def prune_cache(
    cache: Cache, seen: Many[Seen], *, prompt_length: int, fixed_length: int, shift: Tensor | None, evict: bool
) -> None:
    """Shorten every layer of `cache` in place, to the final tokens (`evict`) or to what that layer saw.

    The guide token never stays. The lengths and `shift` are what `PrunedLayer` needs to know.
    """
    for number, layer in enumerate(cache.layers):
        if not getattr(layer, "is_initialized", False):
            continue
        place = max(i for i, part in enumerate(seen) if part.first_layer <= number)
        sequence, index = _final_tokens(seen[place:]) if evict else _own_tokens(seen[place])
        keys, values = layer.keys, layer.values
        if index is not None:
            index = index.to(keys.device)
            keys, values = take(keys, index, dim=2), take(values, index, dim=2)
        valid = sequence.valid if sequence.padded else None
        cache.layers[number] = PrunedLayer(
            keys, values, prompt_length, fixed_length, valid, shift, part=0 if evict else place
        )


def _final_tokens(parts: Many[Seen]) -> tuple[TokenSequence, Tensor | None]:
    index: Tensor | None = None
    for part in reversed(parts[:-1]):
        assert part.index is not None
        index = part.index if index is None else part.index.gather(1, index)
    return parts[-1].sequence, index


def _own_tokens(part: Seen) -> tuple[TokenSequence, Tensor | None]:
    if not part.guide:
        return part.sequence, None
    sequence = part.sequence.without_guide()
    return sequence, torch.arange(sequence.length, device=sequence.patch.device).expand_as(sequence.patch)
