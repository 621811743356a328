"""What `generate` asks a model for, and where an output keeps its image features."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

EXPAND = "_expand_inputs_for_generation"
"""The method by which `generate` repeats a prompt and its images for beams and samples."""
ENCODES_AHEAD = "_supports_mm_encoder_outputs"
"""The method by which a model says that `generate` may encode the images before the prefill (from 5.18 on)."""


def encodes_ahead(model: Any) -> bool:
    """Whether `generate` would encode the images itself before the prefill."""
    return hasattr(model, ENCODES_AHEAD)


def is_drafting(config: Any) -> bool:
    """Whether a `generate` with this config drafts tokens for another one, which hands it the same cache every time."""
    return bool(getattr(config, "is_assistant", False))


def set_image_features(output: Any, features: Tensor | None) -> None:
    """Put projected image features (slots, D) where this release's output keeps them."""
    if hasattr(output, "image_outputs"):
        output.image_outputs = BaseModelOutputWithPooling(pooler_output=features)
    elif hasattr(output, "image_hidden_states"):
        output.image_hidden_states = features
