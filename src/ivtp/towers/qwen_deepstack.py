"""Qwen3-VL's vision encoder: patches also know their place by embeddings, and some layers are read by the decoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ivtp.core.select import on_device
from ivtp.stock import patch_embeddings
from ivtp.towers.qwen_like import QwenVisionTower


class QwenDeepstackTower(QwenVisionTower):
    """A `Qwen3VLVisionModel`: Qwen2-VL's layers, learned places, and mergers of their own behind some layers."""

    kinds = ("qwen3_vl_vision", "qwen3_vl")

    @classmethod
    def _widths(cls, config: Any) -> dict[str, Any]:
        return {
            "vision_hidden": config.hidden_size,
            "vision_mlp": config.intermediate_size,
            "deepstack": tuple(sorted(config.deepstack_visual_indexes)),
        }

    @property
    def projectors(self) -> tuple[nn.Module, ...]:
        """The merger, and those of single layers."""
        module: Any = self.module
        return (*super().projectors, module.deepstack_merger_list)

    def begin(self, pixel_values: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As of Qwen2-VL, with the embedding of each patch's place, interpolated between those of a fixed grid."""
        module: Any = self.module
        hidden, turn = super().begin(pixel_values)
        places, weights = (
            on_device(part, hidden.device) for part in patch_embeddings(*self.grid(pixel_values), module)
        )
        return hidden + (module.pos_embed(places) * weights.unsqueeze(-1)).sum(dim=1).to(hidden.dtype), turn

    def merge_deep(self, layer: int, features: Tensor) -> Tensor:
        """What the own merger of a layer makes of the features (T, D) of whole units: (T / unit, D_text)."""
        place = list(self.config.deepstack_visual_indexes).index(layer)
        return self.module.deepstack_merger_list[place](features)  # type: ignore[no-any-return, index, operator]

    def normalise(self, hidden: Tensor) -> Tensor:
        """The norm in front of the merger."""
        module: Any = self.module
        return module.merger.norm(hidden)  # type: ignore[no-any-return]
