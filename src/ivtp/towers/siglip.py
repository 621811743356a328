"""SigLIP's vision encoder: patches alone, which a head may pool."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from ivtp.errors import UnsupportedModelError
from ivtp.towers.pre_norm import PreNormTower, in_squares, square_image


def so400m(pixels: int) -> Any:
    """The config of SigLIP-so400m/14 without its head, at so many pixels along a side."""
    from transformers import SiglipVisionConfig

    return SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=pixels,
        patch_size=14,
        vision_use_head=False,
    )


class SiglipTower(PreNormTower):
    """A `SiglipVisionModel`, with its pooling head or without."""

    kind: ClassVar[str] = "siglip_vision_model"
    """What its config calls itself."""

    @classmethod
    def sizes(cls, config: Any) -> dict[str, int]:
        """All of one square image."""
        if config.model_type != cls.kind:
            raise UnsupportedModelError(f"the vision tower is a {config.model_type!r}; a {cls.kind} can be pruned")
        return {**square_image(config), "vision_cls": 0}

    def run(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """The whole tower; without a head the mean of the patches is what is pooled."""
        output = self.module(pixel_values, return_dict=True)
        last: Tensor = output.last_hidden_state
        return last.mean(dim=1) if output.pooler_output is None else output.pooler_output, last


class SiglipSquaresTower(SiglipTower):
    """The same for a projector that makes one token of a square of patches, which lie behind each other."""

    def __init__(self, module: nn.Module, across: int) -> None:
        """`across` patches along the side of a square."""
        super().__init__(module)
        self._across = across

    def run(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """As the stock tower without a head; no layer knows where a token stands, so their order may be another."""
        inner: Any = getattr(self.module, "vision_model", self.module)
        hidden = in_squares(inner.embeddings(pixel_values), self._across)
        last = self.normalise(inner.encoder(inputs_embeds=hidden).last_hidden_state)
        return last.mean(dim=1), last
