"""Mistral 3: Pixtral's tower, and a projector that joins 2 x 2 patches."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from ivtp.hosts.pixtral import PixtralHost
from ivtp.plan import Geometry
from ivtp.towers.pixtral import PixtralTower


class Mistral3Host(PixtralHost):
    """`Mistral3ForConditionalGeneration` with a Pixtral tower, one feature layer and a decoder with Llama's layers.

    As `pixtral`, but what is cut are visual tokens: the projector makes one of 2 x 2 patches, which leave together, by
    the sum of the attention that they receive.

    Refuses: what `pixtral` refuses; several feature layers; decoders of other kinds, such as Ministral 3's; methods
    that merge in the encoder.
    """

    name = "mistral3"
    model_class = "Mistral3ForConditionalGeneration"
    stock = ("Mistral-Small-3.1-24B-Instruct-2503", "Mistral-Small-3.2-24B-Instruct-2506")
    hub = "mistralai/{}"
    settings = ("vision_feature_layer",)
    tiny_patch = 4

    @classmethod
    def matches(cls, config: Any) -> bool:
        """A Mistral 3 config, whatever its decoder."""
        return getattr(config, "model_type", None) == "mistral3"

    @classmethod
    def merge(cls, config: Any) -> int:
        """As the config says."""
        return int(config.spatial_merge_size)

    @classmethod
    def geometry(cls, config: Any) -> Geometry:
        """Sizes from a `Mistral3Config`. Raises `UnsupportedModelError` for towers and settings outside the family."""
        found = super().geometry(config)
        return dataclasses.replace(found, merger_width=found.vision_hidden)

    @classmethod
    def stock_config(cls, name: str) -> Any:
        """Mistral Small 3.1 and 3.2, which have the sizes of transformers' own defaults."""
        from transformers import Mistral3Config

        return Mistral3Config()

    def __init__(self, model: nn.Module) -> None:
        """Locate the parts of a stock Mistral 3."""
        super().__init__(model)
        config: Any = model.config
        self._across = self.merge(config)
        self.vision = PixtralTower(self.vision.module, self._across)

    def project(self, features: Tensor) -> Tensor:
        """The norm, the merger and two linear layers; to them all units are one picture, a unit high."""
        across, width = self._across, features.shape[-1]
        units = features.reshape(-1, across, across, width)
        pixels = across * self.size.patch_size
        projected: Tensor = self._projector(units.transpose(0, 1).reshape(-1, width), [(pixels, pixels * len(units))])
        return projected.view(len(features), -1, projected.shape[-1])

    @classmethod
    def tiny_config(cls, **parts: Any) -> Any:
        """Of weights that are not tied."""
        from transformers import Mistral3Config

        return Mistral3Config(**parts, tie_word_embeddings=False)


HOST = Mistral3Host
