"""A model class that no file of `hosts/` knows, with parts of other names than LLaVA's, and its family."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaModel

from ivtp.hosts.base import Host, Visual
from ivtp.hosts.llava_siglip import HOST as LLAVA_SIGLIP
from ivtp.hosts.tiny import settle
from ivtp.plan import Geometry
from ivtp.towers.llama import LlamaTower
from ivtp.towers.siglip import SiglipTower


class ToyConfig(LlavaConfig):
    model_type = "toy"


class ToyModel(LlavaModel):
    """One matrix stands between `eyes` and the decoder."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.eyes = self.vision_tower
        self.bridge = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)
        del self.vision_tower, self.multi_modal_projector

    def get_image_features(self, pixel_values: Tensor, **_: Any) -> Any:
        output = self.eyes(pixel_values, output_hidden_states=True, return_dict=True)
        output.pooler_output = list(self.bridge(output.hidden_states[-1]))
        return output


class ToyForConditionalGeneration(LlavaForConditionalGeneration):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.model = ToyModel(config)


class ToyHost(Host):
    """`ToyForConditionalGeneration` with a SigLIP tower and a decoder with Llama's layers.

    Refuses: other vision towers and decoders; methods that need a CLS token or a text side.
    """

    name = "toy"
    model_class = "ToyForConditionalGeneration"
    stock = ("toy-small",)
    gives = frozenset({"grid"})

    @classmethod
    def matches(cls, config: Any) -> bool:
        return getattr(config, "model_type", None) == "toy"

    @classmethod
    def geometry(cls, config: Any) -> Geometry:
        return Geometry(
            name=cls.name,
            vision_layers=config.vision_config.num_hidden_layers,
            **SiglipTower.sizes(config.vision_config),
            **LlamaTower.sizes(config.text_config),
        )

    @classmethod
    def stock_config(cls, name: str) -> Any:
        return cls.tiny()[0].config

    @classmethod
    def tiny(cls, seed: int = 0) -> tuple[nn.Module, Any]:
        other, processor = LLAVA_SIGLIP.tiny(seed)
        told = {name: value for name, value in other.config.to_dict().items() if name != "model_type"}
        with torch.random.fork_rng():
            return settle(ToyForConditionalGeneration(ToyConfig(**told)), processor.tokenizer, seed), processor

    def __init__(self, model: nn.Module) -> None:
        inner: Any = model
        self.model, self.multimodal = model, inner.model
        self.size = self.geometry(inner.config)
        self.embedding = inner.get_input_embeddings()
        self.vision, self.text = SiglipTower(inner.model.eyes), LlamaTower(inner.model.language_model)
        self.image_token = inner.config.image_token_id

    def visuals(self, inputs: dict[str, Any]) -> list[Visual]:
        tokens = torch.arange(self.size.num_patches)
        side = math.isqrt(len(tokens))
        return [Visual(((side, side),), tokens, tokens[None])] * len(inputs["pixel_values"])

    def tiles(self, inputs: dict[str, Any], visuals: Sequence[Visual]) -> list[Tensor]:
        return list(inputs["pixel_values"].split(1))

    def project(self, features: Tensor) -> Tensor:
        inner: Any = self.multimodal
        return inner.bridge(features)

    def default_clip(self) -> str | None:
        return None
