"""DynamicViT's predictors, trained on pictures alone: the vision tower and everything else stay as they are."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ivtp.core.sparsify import distillation_loss, gumbel_keep, masked_softmax, ratio_loss
from ivtp.core.units import Units
from ivtp.methods.dynamicvit import DynamicVit
from ivtp.plug import exclusive, find_host
from ivtp.plug.pruner import check_uncompressed, check_unpruned
from ivtp.stock import set_kernel

DISTILLATION, RATIO = 0.5, 2.0
"""Weights of the two losses in the paper, whose third and fourth need a classifier."""


@dataclass(frozen=True)
class PredictorLosses:
    """What the predictors are trained on."""

    distillation: Tensor
    """How far the kept patches are from what the tower makes of them where nothing is dropped."""
    ratio: Tensor
    """How far the share that is kept is from that of the method's plan."""

    @property
    def total(self) -> Tensor:
        """Weighed as in the paper (arXiv 2106.02034, Eq. 17)."""
        return DISTILLATION * self.distillation + RATIO * self.ratio


def predictor_losses(model: nn.Module, method: DynamicVit, pixels: Tensor) -> PredictorLosses:
    """The losses of `method.predictors` on pictures (I, 3, H, W), as the model's processor makes them.

    Tokens are dropped by masks that are drawn anew in every call, so that gradients reach each decision; at inference
    the highest scores stay. Save `method.predictors.state_dict()` as safetensors for `predictors=FILE`. Raises
    `AttachError` for a model that is pruned or compressed already.
    """
    host = find_host(model)
    check_unpruned(host)
    check_uncompressed(host)
    method.predictors.to(pixels.device)
    with exclusive(host.model):
        with torch.no_grad(), _reading(host) as read:
            host.vision.run(pixels)
            teacher = read[-1]
        with _reading(host) as read, _sparsified(host, method, pixels) as policies:
            host.vision.run(pixels)
            features = read[-1]
    first, size = host.size.vision_cls, host.size
    ratios = [cut.keep / size.num_patches for cut in method.plan.cuts]
    kept = policies[-1].repeat_interleave(size.unit, dim=1)
    return PredictorLosses(
        distillation_loss(features[:, first:], teacher[:, first:], kept), ratio_loss(policies, ratios)
    )


@contextmanager
def _reading(host: Any) -> Iterator[list[Tensor]]:
    """What the layer that the projector reads gives (I, T, D), call by call."""
    found: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    handle = host.vision.layers[host.size.vision_layers - 1].register_forward_hook(look)
    try:
        yield found
    finally:
        handle.remove()


@contextmanager
def _sparsified(host: Any, method: DynamicVit, pixels: Tensor) -> Iterator[list[Tensor]]:
    """The tower with masks behind the method's layers; gives the policies (I, N) of its places as they are drawn."""
    first, units = host.size.vision_cls, Units(host.size.unit, host.size.vision_cls)
    policies: list[Tensor] = []
    everything = torch.ones(len(pixels), host.size.num_patches, device=pixels.device)

    def decide(place: int, output: Any) -> None:
        tokens = units.mean(output[0] if isinstance(output, tuple) else output)[:, first:].float()
        before = policies[-1] if policies else everything
        policies.append(gumbel_keep(method.predictors[place](tokens, before.unsqueeze(-1)), before))

    with ExitStack() as stack:
        for place, cut in enumerate(method.plan.cuts):
            layer = host.vision.layers[cut.layer]
            hook = layer.register_forward_hook(lambda module, args, output, place=place: decide(place, output))
            stack.callback(hook.remove)
        for number in range(len(host.vision.layers)):
            attention = host.vision.attention(number)
            original = attention.config
            attention.config = copy.copy(original)
            set_kernel(attention.config, _NAME)
            attention.config.ivtp_policies, attention.config.ivtp_unit = policies, host.size.unit
            stack.callback(setattr, attention, "config", original)
        yield policies


_NAME = "ivtp_sparsified"


def _sparsified_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Attention (B, H, T, d) with the last policy that was drawn; CLS tokens are always kept."""
    logits = (query.float() @ key.float().transpose(-1, -2)) * (kwargs.get("scaling") or query.shape[-1] ** -0.5)
    policies = module.config.ivtp_policies
    if policies:
        kept = policies[-1].repeat_interleave(module.config.ivtp_unit, dim=1)
        cls = logits.shape[-1] - kept.shape[1]
        weights = masked_softmax(logits, nn.functional.pad(kept, (cls, 0), value=1.0))
    else:
        weights = logits.softmax(dim=-1)
    return (weights.to(value.dtype) @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register(_NAME, _sparsified_attention)
