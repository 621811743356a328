"""InternViT, InternVL's vision encoder: CLS, scaled residuals, and patches that the projector joins in squares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ivtp.errors import UnsupportedModelError
from ivtp.towers.pre_norm import PreNormTower, in_squares, weighable

ACROSS = 2
"""Patches along the side of a square that the projector makes one visual token of."""


class InternVitTower(PreNormTower):
    """An `InternVLVisionModel`, whose layers are given the patches of a square one behind the other."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.layers = module.encoder.layer
        self._post_norm = module.layernorm

    @classmethod
    def sizes(cls, config: Any) -> dict[str, int]:
        """All of one square image, `num_patches` those that enter the encoder."""
        if config.model_type != "internvl_vision":
            raise UnsupportedModelError(
                f"the vision tower is a {config.model_type!r}; InternVL with an internvl_vision can be pruned"
            )
        (side, other), (patch, patch_other) = config.image_size, config.patch_size
        if side != other or patch != patch_other or side // patch % ACROSS:
            raise UnsupportedModelError(
                f"the vision tower reads {config.image_size} pixels in patches of {config.patch_size}; one with square "
                f"tiles and patches, {ACROSS} x {ACROSS} of which fill a tile, can be pruned"
            )
        return {
            "num_patches": (side // patch) ** 2,
            "patch_size": patch,
            "vision_depth": config.num_hidden_layers,
            "vision_hidden": config.hidden_size,
            "vision_mlp": config.intermediate_size,
            "vision_heads": config.num_attention_heads,
            "vision_cls": 1,
        }

    def run(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """As the stock tower, but for the order of its tokens."""
        module: Any = self.module
        hidden = module.embeddings(pixel_values)
        hidden = torch.cat([hidden[:, :1], in_squares(hidden[:, 1:], ACROSS)], dim=1)
        last: Tensor = module.layernorm(module.encoder(hidden).last_hidden_state)
        return last[:, 0], last

    def attention(self, layer: int) -> Any:
        """`attention`."""
        return self.layers[layer].attention

    def attend(self, layer: int, hidden: Tensor, *args: Any, bias: Tensor | None = None, **kwargs: Any) -> Tensor:
        """As in InternVLVisionLayer, which takes no mask."""
        block: Any = self.layers[layer]
        if bias is not None:
            kwargs["attention_mask"] = weighable(self.module, bias).to(hidden.dtype)
        attended, _ = block.attention(block.layernorm_before(hidden), **kwargs)
        return block.lambda_1 * attended + hidden  # type: ignore[no-any-return]

    def feed_forward(self, layer: int, hidden: Tensor) -> Tensor:
        """As in InternVLVisionLayer."""
        block: Any = self.layers[layer]
        return block.lambda_2 * block.dropout(block.mlp(block.layernorm_after(hidden))) + hidden  # type: ignore[no-any-return]
