"""What a cache holds in front of the tokens of a prefill: earlier turns, pruned or not."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from ivtp.core.select import on_device
from ivtp.errors import InputError
from ivtp.hosts.base import Host
from ivtp.prefill.cache import PrunedLayer, check_rows, counted, logical_mask
from ivtp.prompt.batch import check_window
from ivtp.stock import contents


class Past:
    """A filled cache, as it is when a prefill behind it begins; the layers grow, this does not."""

    def __init__(self, cache: Cache, mask: Tensor | None, tokens: Tensor) -> None:
        """`mask` (B, cached + T) is the call's, None: no padding; `tokens` (B, T) are read behind what is cached.

        Raises `InputError` for a mask of other sizes, or a cache with other rows.
        """
        self._cache = cache
        self.length = cache.get_seq_length()
        """Columns that it stands for, those that were pruned included."""
        self.keys = [contents(layer)[0].shape[-2] for layer in cache.layers]
        """Tokens that each layer holds."""
        whole = (len(tokens), self.length + tokens.shape[1])
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != whole):
            raise InputError(
                "a prompt behind a cache needs the two-dimensional attention_mask (batch, cached + new tokens) of the "
                "whole conversation"
            )
        check_rows(cache.layers[0], len(tokens))
        self._mask = mask
        first = cache.layers[0]
        self.shift = first.shift if isinstance(first, PrunedLayer) else None

    def expect(self) -> None:
        """Tell the layers that masks are made for them."""
        for layer in self._cache.layers:
            if isinstance(layer, PrunedLayer):
                layer.expected = True

    def part(self, number: int) -> int:
        """The same for layers that hold the same tokens."""
        layer = self._cache.layers[number]
        return layer.part if isinstance(layer, PrunedLayer) else 0

    def mask(self, number: int) -> Tensor | None:
        """(B, length) padding, with what a layer holds at the right end; None: nothing is padding."""
        layer = self._cache.layers[number]
        given = None if self._mask is None else self._mask[:, : self.length]
        if not isinstance(layer, PrunedLayer) or layer.prompt_valid is None:
            return given
        return logical_mask(given, layer, self.length)

    def valid(self, number: int) -> Tensor | None:
        """(B, keys) bool: what of a layer's tokens is no padding; None: all."""
        mask = self.mask(number)
        return None if mask is None else mask[:, self.length - self.keys[number] :].bool()

    def before(self, number: int) -> DynamicCache:
        """A cache of this layer alone, for the mask of its tokens."""
        alone = DynamicCache()
        alone.layers = [self._cache.layers[number]]
        return alone

    def copied(self) -> DynamicCache:
        """A cache with the same contents, which grows by itself."""
        other = DynamicCache()
        other.layers = [copy.copy(layer) for layer in self._cache.layers]
        return other

    def positions(self, given: Tensor | None, tokens: Tensor) -> Tensor:
        """Position ids (B, T) of `tokens` (B, T), compact where those before are."""
        position = counted(given, tokens, self.length)
        return position if self.shift is None else position - on_device(self.shift, position.device)


def behind(host: Host, cache: Cache, inputs: dict[str, Any]) -> tuple[Past, dict[str, Any]]:
    """What `cache` holds, and the call's inputs with masks and positions of their own tokens. Raises `InputError`."""
    if host.both_ways:  # the stock model misplaces them behind a cache, so nothing says what would be right
        raise InputError(
            f"{host.name} reads a new image and the earlier turns in both directions, which their cache cannot; pass "
            'the whole conversation to generate with repruning="turn", or start a new cache with it'
        )
    ids = inputs.get("input_ids")
    if ids is None:
        raise InputError("pruning reads the prompt's input_ids; pass them instead of inputs_embeds")
    mask = inputs.get("attention_mask")
    past = Past(cache, mask, ids)
    check_window(host, past.length + ids.shape[1])
    return past, {
        **inputs,
        **{name: inputs[name][:, -ids.shape[1] :] for name in host.of_columns if inputs.get(name) is not None},
        "attention_mask": None if mask is None else mask[:, past.length :],
        "position_ids": past.positions(host.positions(inputs, ids, mask, past.length), ids),
    }
