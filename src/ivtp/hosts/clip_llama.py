"""What families of a CLIP tower, a token-wise projector and a decoder with Llama's layers share."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from ivtp.compressors.base import Compressor
from ivtp.errors import InputError, LoadError, UnsupportedModelError
from ivtp.files.sidecar import SIDECAR
from ivtp.hosts.base import Host, openai_clip
from ivtp.plan import Compressed, Geometry
from ivtp.towers.clip import ClipTower
from ivtp.towers.llama import LlamaTower


class ClipLlamaHost(Host):
    """A CLIP tower of which one feature layer is read, LLaVA's projector, and a decoder with Llama's layers."""

    @classmethod
    def geometry(cls, config: Any) -> Geometry:
        """Sizes from a `LlavaConfig`. Raises `UnsupportedModelError` for towers and settings outside the family."""
        vision: dict[str, Any] = ClipTower.sizes(config.vision_config)
        text: dict[str, Any] = LlamaTower.sizes(config.text_config)
        feature, layers = config.vision_feature_layer, vision["vision_depth"]
        if not isinstance(feature, int) or config.vision_feature_select_strategy != "default":
            raise UnsupportedModelError(
                f"vision_feature_layer={feature!r} with strategy {config.vision_feature_select_strategy!r} is not "
                'prunable; one feature layer with the strategy "default" is'
            )
        return Geometry(
            name=str(getattr(config, "name_or_path", "") or "llava"),
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
        self.vision = ClipTower(inner.model.vision_tower)
        self.text = LlamaTower(inner.model.language_model)
        self._projector = inner.model.multi_modal_projector
        compressor = next((part for part in self._projector.modules() if isinstance(part, Compressor)), None)
        if compressor is not None:
            self.size = dataclasses.replace(self.size, compressed=Compressed(compressor.name, compressor.tokens))
        self.image_token = inner.config.image_token_id

    def project(self, features: Tensor) -> Tensor:
        """LLaVA's two-layer projector."""
        return self._projector(features)  # type: ignore[no-any-return]

    def check_call(self, inputs: dict[str, Any]) -> None:
        """The layer and strategy of the vision features are those of the config."""
        inner: Any = self.model
        for name in ("vision_feature_layer", "vision_feature_select_strategy"):
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
