"""After the prefill: make what `generate` believes about the prompt fit the cache that is there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ivtp.core.sequence import PrunedLayer
from ivtp.hosts.base import Host


def is_prefill(inputs: dict[str, Any]) -> bool:
    """Whether these are the first tokens of a prompt: nothing is cached yet."""
    cache = inputs.get("past_key_values")
    return cache is None or cache.get_seq_length() == 0


def continue_inputs(host: Host, inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[int, Any]]:
    """Inputs of a step on a pruned cache, and masks of their own for the decoder layers that need one.

    Without padding, with evicted layers and original positions both come back as nothing to do: the cache layers
    themselves report the right lengths and offsets.
    """
    cache = inputs.get("past_key_values")
    layers = getattr(cache, "layers", [])
    if not layers or not isinstance(layers[0], PrunedLayer):
        return inputs, {}
    first: PrunedLayer = layers[0]
    for layer in layers:
        layer.expected = True
    tokens: Tensor = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
    changed = dict(inputs)
    if first.shift is not None:
        changed["position_ids"] = _positions(inputs.get("position_ids"), first, tokens) - first.shift
    given = inputs.get("attention_mask")
    if first.prompt_valid is not None:
        changed["attention_mask"] = _logical_mask(given, first, tokens)
    return changed, _masks_of_layers(host, layers, given, tokens)


def _positions(given: Tensor | None, layer: PrunedLayer, tokens: Tensor) -> Tensor:
    if given is not None:
        return given
    return torch.arange(tokens.shape[1], device=tokens.device)[None] + layer.get_seq_length()


def _logical_mask(given: Tensor | None, layer: PrunedLayer, tokens: Tensor) -> Tensor:
    """(B, logical length + new): the padding of the kept prompt tokens, right-aligned where the prompt ends."""
    assert layer.prompt_valid is not None
    valid = layer.prompt_valid
    total = layer.get_seq_length() + tokens.shape[1]
    if given is None:
        given = valid.new_ones((valid.shape[0], total))
    head = valid.new_zeros((valid.shape[0], layer.prompt_length - valid.shape[1]))
    return torch.cat([head, valid, given[:, layer.prompt_length :].bool()], dim=1).long()


def _masks_of_layers(host: Host, layers: list[Any], given: Tensor | None, tokens: Tensor) -> dict[int, Any]:
    """Masks for layers whose cache is shorter than the first layer's (`cache="layered"`)."""
    padded = any(layer.prompt_valid is not None for layer in layers)
    if len({layer.part for layer in layers}) == 1 or (tokens.shape[1] == 1 and not padded):
        return {}  # one new token without padding sees every key: no mask
    masks: dict[int, Any] = {}
    made: dict[int, Any] = {}
    hidden = torch.empty(*tokens.shape[:2], 0, dtype=layers[0].keys.dtype, device=tokens.device)
    for number, layer in enumerate(layers):
        if layer.part not in made:
            valid = _logical_mask(given, layer, tokens) if layer.prompt_valid is not None else given
            alone = DynamicCache()
            alone.layers = [layer]
            made[layer.part] = host.causal_mask(hidden, valid, cache=alone)
        masks[number] = made[layer.part]
    return masks
