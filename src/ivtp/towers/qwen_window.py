"""Qwen2.5-VL's vision encoder: most of its layers see windows of the image."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ivtp.core.select import on_device
from ivtp.core.units import Units
from ivtp.stock import patch_windows
from ivtp.towers.qwen_like import QwenVisionTower


class QwenWindowTower(QwenVisionTower):
    """A `Qwen2_5_VisionTransformerPretrainedModel`: its layers take the patches window by window."""

    kinds = ("qwen2_5_vl_vision", "qwen2_5_vl")

    @classmethod
    def _widths(cls, config: Any) -> dict[str, Any]:
        whole = set(config.fullatt_block_indexes)
        return {
            "vision_hidden": config.hidden_size,
            "vision_mlp": config.intermediate_size,
            "vision_mlp_matrices": 3,
            "vision_windowed": tuple(layer for layer in range(config.depth) if layer not in whole),
        }

    @classmethod
    def windowed(cls, config: Any, grid: tuple[int, int]) -> int:
        """Each window's own."""
        merge = config.spatial_merge_size
        _, ends = patch_windows(merge * grid[0], merge * grid[1], config)
        return int(((ends[1:] - ends[:-1]) // merge**2).square().sum())

    def order(self, pixel_values: Tensor) -> Tensor:
        """The patches of the first window lie first, then those of the next."""
        return self._windows(pixel_values)[0].argsort()

    def run(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """As of Qwen2-VL, window by window."""
        tokens, ends = self._windows(pixel_values)
        hidden, turn = self.begin(pixel_values)
        hidden, turn = hidden[tokens], tuple(part[tokens] for part in turn)
        whole = self.ends([0, len(tokens)], hidden.device)
        windows = self.ends(ends, hidden.device)
        for number, layer in enumerate(self.layers):
            seen = whole if number in self.config.fullatt_block_indexes else windows
            hidden = layer(hidden, position_embeddings=turn, **seen)
        return hidden.mean(dim=0, keepdim=True), hidden.unsqueeze(0)

    def _windows(self, pixel_values: Tensor) -> tuple[Tensor, list[int]]:
        """Which token comes where (T,), and where each window begins."""
        rows, columns = self.grid(pixel_values)
        order, ends = patch_windows(rows, columns, self.config)
        tokens = Units(self.config.spatial_merge_size**2).tokens(order.unsqueeze(0)).squeeze(0)
        return on_device(tokens, pixel_values.device), ends.tolist()
