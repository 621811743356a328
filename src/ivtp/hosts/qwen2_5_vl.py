"""Qwen2.5-VL: a tower of windows, which is cut behind its last layer alone."""

from __future__ import annotations

from typing import Any

from ivtp.hosts.qwen_like import QwenLike
from ivtp.methods.base import Method
from ivtp.towers.qwen_window import QwenWindowTower

_STOCK: dict[str, dict[str, Any]] = {
    "Qwen2.5-VL-3B-Instruct": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
    "Qwen2.5-VL-7B-Instruct": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
}


class Qwen25VLHost(QwenLike):
    """`Qwen2_5_VLForConditionalGeneration`; as `qwen2_vl`, but tokens leave behind its encoder at the earliest.

    Most layers of its encoder see windows of an image: what a patch is worth to the whole of it, only those tell that
    see it all, the last one among them.

    Refuses: what `qwen2_vl` does; cuts before the encoder's end, and methods that read the attention of a layer that
    sees windows.
    """

    name = "qwen2_5_vl"
    model_class = "Qwen2_5_VLForConditionalGeneration"
    parts = ("Qwen2_5_VLConfig", "Qwen2_5_VLProcessor")
    stock = tuple(_STOCK)
    cuts = frozenset({"behind", "projected"})
    tower = QwenWindowTower

    @classmethod
    def stock_config(cls, name: str) -> Any:
        """Qwen2.5-VL of the given size."""
        from transformers import Qwen2_5_VLConfig

        text = _STOCK[name]
        vision = {"hidden_size": 1280, "out_hidden_size": text["hidden_size"]}
        return Qwen2_5_VLConfig(text_config=dict(text), vision_config=vision)

    @classmethod
    def tiny_vision(cls) -> dict[str, Any]:
        """Of 4 x 4 pixels a patch, and windows of 2 x 2 tokens."""
        return {
            "depth": 5,
            "hidden_size": 32,
            "intermediate_size": 64,
            "out_hidden_size": 48,
            "num_heads": 2,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [2, 4],
        }

    def refusal(self, method: Method) -> str | None:
        """Also of what reads or cuts layers that see windows."""
        cuts = [cut for cut in method.plan.cuts if cut.where == "vision"]
        windowed = {tap for cut in cuts for tap in cut.taps} & set(self.size.vision_windowed)
        inner = any(not cut.is_after_encoder(self.size) and cut.place == "behind" for cut in cuts)
        if super().refusal(method) is None and (windowed or inner):
            return (
                f"method {method.config.method!r} cuts or reads encoder layers that see windows of an image, which "
                f"{self.name} does not allow; use another method (see `ivtp methods --hosts`)"
            )
        return super().refusal(method)


HOST = Qwen25VLHost
