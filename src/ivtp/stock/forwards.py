"""Where the real forward of a module is, and where and how it runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def forward_slot(module: nn.Module) -> str:
    """The instance attribute that holds the real forward: accelerate keeps it behind its own."""
    return "_old_forward" if "_old_forward" in module.__dict__ else "forward"


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes; accelerate's hooks, on it or on its parts, keep offloaded weights elsewhere."""
    for part in module.modules():
        for hook in _hooks(getattr(part, "_hf_hook", None)):
            device = getattr(hook, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return next(module.parameters()).device


def _hooks(hook: Any) -> Iterator[Any]:
    """One hook of accelerate, or those of a sequence."""
    yield from getattr(hook, "hooks", ()) or (() if hook is None else (hook,))


def floating_dtype(module: nn.Module) -> torch.dtype:
    """What a module computes in: quantised weights are integers, its norms are not."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.get_default_dtype())


def is_checkpointed(layer: Any) -> bool:
    """Whether the layer runs under gradient checkpointing, and so without a cache."""
    return bool(layer.training and getattr(layer, "gradient_checkpointing", False))


def reruns_hooks(layer: Any) -> bool:
    """Whether gradient checkpointing recomputes this layer with its hooks, as transformers before 5.23 do."""
    checkpointed = next((c for c in type(layer).__mro__ if c.__name__ == "GradientCheckpointingLayer"), object)
    return "__call__" in checkpointed.__dict__ and is_checkpointed(layer)
