"""The vision encoder of Idefics3 and SmolVLM: SigLIP's layers, and positions for images of any size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ivtp.errors import UnsupportedModelError
from ivtp.towers.pre_norm import PreNormTower, in_squares, square_image


class IdeficsTower(PreNormTower):
    """An `Idefics3VisionTransformer`, whose layers are given the patches of a square one behind the other."""

    def __init__(self, module: Any, across: int) -> None:
        """The projector makes one visual token of `across` x `across` patches."""
        super().__init__(module)
        self._across = across

    @classmethod
    def sizes(cls, config: Any) -> dict[str, int]:
        """All of one square tile, `num_patches` those that enter the encoder."""
        if not (isinstance(config.image_size, int) and isinstance(config.patch_size, int)):
            raise UnsupportedModelError(
                f"the vision tower reads {config.image_size} pixels in patches of {config.patch_size}; one with square "
                "tiles and patches, each of whose sizes is a number, can be pruned"
            )
        return {**square_image(config), "vision_cls": 0}

    def run(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """As the stock tower reads tiles without padding; the mean of the patches is what is pooled."""
        module: Any = self.module
        pixels = pixel_values.to(module.embeddings.patch_embedding.weight.dtype)
        rows, columns = (side // module.patch_size for side in pixels.shape[2:])
        shown = torch.ones(len(pixels), rows, columns, dtype=torch.bool, device=pixels.device)
        hidden = module.embeddings(pixel_values=pixels, patch_attention_mask=shown)
        last: Tensor = self.normalise(module.encoder(in_squares(hidden, self._across)).last_hidden_state)
        return last.mean(dim=1), last
