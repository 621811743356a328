"""What families of a vision tower, LLaVA's token-wise projector and a decoder with Llama's layers share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ivtp.compressors.base import Compressor
from ivtp.errors import InputError, LoadError, UnsupportedModelError
from ivtp.files.sidecar import SIDECAR
from ivtp.hosts.base import Host, Visual, openai_clip
from ivtp.plan import Compressed, Geometry
from ivtp.towers.clip import ClipTower
from ivtp.towers.llama import LlamaTower
from ivtp.towers.pixtral import PixtralTower
from ivtp.towers.pre_norm import PreNormTower


class LlavaLike(Host):
    """A tower of which one feature layer is read, LLaVA's projector, and a decoder with Llama's layers."""

    tower: ClassVar[type[PreNormTower] | type[PixtralTower]] = ClipTower
    """The kind of its vision tower."""
    decoder: ClassVar[type[LlamaTower]] = LlamaTower
    """The kind of its decoder."""
    settings: ClassVar[tuple[str, ...]] = ("vision_feature_layer", "vision_feature_select_strategy")
    """Arguments of a forward that have to be those of the config."""

    @classmethod
    def geometry(cls, config: Any) -> Geometry:
        """Sizes from a `LlavaConfig`. Raises `UnsupportedModelError` for towers and settings outside the family."""
        vision: dict[str, Any] = cls.tower.sizes(config.vision_config)
        text: dict[str, Any] = cls.decoder.sizes(config.text_config)
        feature, layers = config.vision_feature_layer, vision["vision_depth"]
        strategy = "default" if vision["vision_cls"] else "full"  # "default" leaves the first token out
        own = getattr(config, "vision_feature_select_strategy", "full")  # some families leave out no token at all
        if not isinstance(feature, int) or own != strategy:
            raise UnsupportedModelError(
                f"vision_feature_layer={feature!r} with strategy {own!r} is not prunable; "
                f'one feature layer with the strategy "{strategy}" is'
            )
        return Geometry(
            name=str(getattr(config, "name_or_path", "") or cls.name),
            vision_layers=feature if feature >= 0 else layers + 1 + feature,
            **vision,
            **text,
        )

    def __init__(self, model: nn.Module) -> None:
        """Locate the parts of a stock LLaVA."""
        inner: Any = model
        self.model = model
        self.size = self.geometry(inner.config)
        self.multimodal = inner.model
        self.embedding = inner.get_input_embeddings()
        self.vision = self.tower(inner.model.vision_tower)
        self.text = self.decoder(inner.model.language_model)
        self._projector = inner.model.multi_modal_projector
        compressor = next((part for part in self._projector.modules() if isinstance(part, Compressor)), None)
        if compressor is not None:
            self.size = dataclasses.replace(self.size, compressed=Compressed(compressor.name, compressor.tokens))
        self.image_token = inner.config.image_token_id

    def visuals(self, inputs: dict[str, Any]) -> list[Visual]:
        """All alike: one tile, whose patches fill the slots in raster order; a compressor's tokens have no places."""
        tokens = torch.arange(self.size.visual_tokens)
        side = math.isqrt(self.size.num_patches)
        grid = (1, len(tokens)) if self.size.compressed else (side, side)
        return [Visual((grid,), tokens, tokens[None])] * int(inputs["pixel_values"].shape[0])

    def tiles(self, inputs: dict[str, Any], visuals: Sequence[Visual]) -> list[Tensor]:
        """Each image as it is."""
        return list(inputs["pixel_values"].split(1))

    def project(self, features: Tensor) -> Tensor:
        """LLaVA's two-layer projector."""
        return self._projector(features)  # type: ignore[no-any-return]

    def check_call(self, inputs: dict[str, Any]) -> None:
        """`settings` are those of the config."""
        inner: Any = self.model
        for name in self.settings:
            given, configured = inputs.get(name), getattr(inner.config, name)
            if given is not None and given != configured:
                raise InputError(
                    f"{name}={given!r} differs from the model's own ({configured!r}), which a pruned model reads; "
                    "set it in model.config before attaching"
                )

    def default_clip(self) -> str | None:
        """The folder that the checkpoint's `ivtp.json` names, else OpenAI's CLIP for a tower of its sizes."""
        folder, named = self._folder(), self._sidecar().get("clip")
        if folder and named:
            clip = folder / str(named)
            if not clip.is_dir():
                raise LoadError(
                    f"{clip}, which {SIDECAR} beside it names, does not exist; copy it there or pass clip=..."
                )
            return str(clip)
        return openai_clip(self.size, len(self.vision.layers))
