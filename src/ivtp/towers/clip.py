"""CLIP's vision encoder: a CLS token in front of the patches."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ivtp.errors import UnsupportedModelError
from ivtp.towers.pre_norm import PreNormTower, square_image


class ClipTower(PreNormTower):
    """A `CLIPVisionModel`; its pooler is the post layer norm of the last layer's CLS."""

    @classmethod
    def sizes(cls, config: Any) -> dict[str, int]:
        """All of one square image."""
        if config.model_type != "clip_vision_model":
            raise UnsupportedModelError(
                f"the vision tower is a {config.model_type!r}; LLaVA with a clip_vision_model can be pruned"
            )
        return {**square_image(config), "vision_cls": 1}

    def run(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """The whole tower."""
        output = self.module(pixel_values, return_dict=True)
        return output.pooler_output, output.last_hidden_state
