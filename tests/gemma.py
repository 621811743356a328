"""Gemma's decoders as the reference computes Llama's: what they do more belongs to their weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from reference import Reference
from torch import Tensor, nn


class Normed(nn.Module):
    """A module with one of the reference's norms behind it, of heads of so many channels or of all of them."""

    def __init__(self, inner: nn.Module, norm: nn.Module, channels: int | None = None) -> None:
        super().__init__()
        self.inner, self.norm, self.channels = inner, norm, channels

    def forward(self, x: Tensor) -> Tensor:
        made = self.inner(x)
        heads = made if self.channels is None else made.unflatten(-1, (-1, self.channels))
        return Reference._norm(self.norm, heads).reshape(made.shape)


def multiplied_out(model: nn.Module) -> Any:
    """A copy whose norms add nothing to their weights, and whose embeddings and logits are as large as they are used.

    The norms behind a half of a layer, and those of queries and keys, belong to the matrices before them.
    """
    copied: Any = copy.deepcopy(model)
    decoder, scale = copied.model.language_model, copied.config.text_config.hidden_size**0.5
    copied.config.vision_feature_layer = -1
    with torch.no_grad():
        decoder.embed_tokens.weight *= scale
        for module in copied.model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.weight += 1
                module.variance_epsilon = module.eps
        for layer in decoder.layers:
            attention = layer.self_attn
            stretch = attention.scaling * attention.head_dim**0.5
            if hasattr(attention, "q_norm"):
                attention.q_norm.weight *= stretch
                attention.q_proj = Normed(attention.q_proj, attention.q_norm, attention.head_dim)
                attention.k_proj = Normed(attention.k_proj, attention.k_norm, attention.head_dim)
                del attention.q_norm, attention.k_norm
            else:
                attention.q_proj.weight *= stretch
            if hasattr(layer, "post_feedforward_layernorm"):
                attention.o_proj = Normed(attention.o_proj, layer.post_attention_layernorm)
                layer.mlp = Normed(layer.mlp, layer.post_feedforward_layernorm)
                layer.post_attention_layernorm = layer.pre_feedforward_layernorm
    return copied
