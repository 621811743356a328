"""Qwen3-VL: features of some encoder layers are added to the visual tokens behind the first decoder layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ivtp.errors import UnsupportedModelError
from ivtp.hosts.qwen_like import QwenLike
from ivtp.plan import Geometry
from ivtp.towers.qwen_deepstack import QwenDeepstackTower

_SMALL = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
_LARGE = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}
_STOCK: dict[str, tuple[dict[str, Any], tuple[int, int, int, int]]] = {
    # its encoder; width of the decoder, of its MLPs, its layers and heads
    "Qwen3-VL-2B-Instruct": (_SMALL, (2048, 6144, 28, 16)),
    "Qwen3-VL-4B-Instruct": (_SMALL, (2560, 9728, 36, 32)),
    "Qwen3-VL-8B-Instruct": (_LARGE, (4096, 12288, 36, 32)),
    "Qwen3-VL-32B-Instruct": (_LARGE, (5120, 25600, 64, 64)),
}


class Qwen3VLHost(QwenLike):
    """`Qwen3VLForConditionalGeneration`; as `qwen2_vl`; kept tokens get the deepstack features of their own patches.

    One that was cut gets none, wherever it left; a deepstack layer behind a cut in the encoder sees the kept units
    only, and its merger reads only those that reach the decoder. A token that stands for several, as SparseVLM merges
    them behind its cuts, gets those of the unit at whose place it stands; a pseudo CLS token gets none.

    Refuses: what `qwen2_vl` does; the mixture-of-experts models of the series, which are another stock class.
    """

    name = "qwen3_vl"
    model_class = "Qwen3VLForConditionalGeneration"
    parts = ("Qwen3VLConfig", "Qwen3VLProcessor")
    stock = tuple(_STOCK)
    fewest = 64
    tower = QwenDeepstackTower
    vision: QwenDeepstackTower

    @classmethod
    def geometry(cls, config: Any) -> Geometry:
        """As of Qwen2-VL. Raises `UnsupportedModelError` where features are added behind the last decoder layer."""
        size = super().geometry(config)
        if len(size.deepstack) >= size.text_layers:
            raise UnsupportedModelError(
                f"{len(size.deepstack)} deepstack layers need more decoder layers than {size.text_layers} behind which "
                "they are added; a model with more decoder layers can be pruned"
            )
        return size

    @classmethod
    def stock_config(cls, name: str) -> Any:
        """Qwen3-VL of the given size."""
        from transformers import Qwen3VLConfig

        vision, (width, mlp, layers, heads) = _STOCK[name]
        text = {
            "hidden_size": width,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
        }
        return Qwen3VLConfig(text_config=text, vision_config={**vision, "num_heads": 16, "out_hidden_size": width})

    @classmethod
    def tiny_vision(cls) -> dict[str, Any]:
        """Of 4 x 4 pixels a patch, 36 learned places, and three layers that are read by the decoder."""
        return {
            "depth": 5,
            "hidden_size": 32,
            "intermediate_size": 64,
            "out_hidden_size": 48,
            "num_heads": 2,
            "patch_size": 4,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0, 2, 3],
        }

    def project_deep(self, layer: int, features: Tensor) -> Tensor:
        """The layer's own merger: a norm over a unit's features, and two linear layers."""
        merged = self.vision.merge_deep(layer, features.flatten(0, 1))
        return merged.view(len(features), -1, merged.shape[-1])


HOST = Qwen3VLHost
