"""Batches of records that are alike: with or without images, and of about the same length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class GroupedSampler(Sampler[int]):
    """Every `group` places in a row are records of one modality and similar length: what all ranks read at once.

    A rank without images beside others with some would skip the projector that they wait for. The last group of each
    modality is filled up with records of its own; the longest group comes first, so that memory runs out at once or
    never. An order depends on `seed` and on the epoch alone: a run that is resumed goes on with the same one.
    """

    def __init__(self, lengths: Sequence[int], with_image: Sequence[bool], group: int, seed: int) -> None:
        self._lengths, self._group, self._seed, self._epoch = lengths, group, seed, 0
        self._kinds = [[i for i, shown in enumerate(with_image) if shown is wanted] for wanted in (True, False)]

    def set_epoch(self, epoch: int) -> None:
        """Which order comes next."""
        self._epoch = epoch

    def __len__(self) -> int:
        return sum(-(-len(kind) // self._group) * self._group for kind in self._kinds)

    def __iter__(self) -> Iterator[int]:
        draw = torch.Generator().manual_seed(self._seed + self._epoch)
        groups = [group for kind in self._kinds if kind for group in self._groups(kind, draw)]
        order = torch.randperm(len(groups), generator=draw).tolist()
        longest = max(order, key=lambda i: max(self._lengths[place] for place in groups[i]), default=0)
        order.remove(longest)
        return iter([place for i in [longest, *order] for place in groups[i]])

    def _groups(self, kind: list[int], draw: torch.Generator) -> Iterator[list[int]]:
        lengths = [self._lengths[place] for place in kind]
        order = [kind[i] for i in get_length_grouped_indices(lengths, self._group, generator=draw)]
        missing = -len(order) % self._group
        order += [order[i % len(order)] for i in range(missing)]
        for start in range(0, len(order), self._group):
            yield order[start : start + self._group]
