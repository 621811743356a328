"""Qwen2-VL: a tower with full attention over images of any size."""

from __future__ import annotations

from typing import Any

from ivtp.hosts.qwen_like import QwenLike

_STOCK: dict[str, dict[str, Any]] = {
    "Qwen2-VL-2B-Instruct": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
    "Qwen2-VL-7B-Instruct": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
}


class Qwen2VLHost(QwenLike):
    """`Qwen2VLForConditionalGeneration`; images of any size, of which the four patches of a token are cut together.

    Kept tokens, and the answer, have the stock model's positions; `positions="compact"` closes up rows and columns that
    nothing is left in. The mean over all patches, of their attention and of their features, stands for CLS.

    Refuses: videos; methods that need a CLS token, a text side or a square grid, or merge in the encoder.
    """

    name = "qwen2_vl"
    model_class = "Qwen2VLForConditionalGeneration"
    parts = ("Qwen2VLConfig", "Qwen2VLProcessor")
    stock = tuple(_STOCK)

    @classmethod
    def stock_config(cls, name: str) -> Any:
        """Qwen2-VL of the given size."""
        from transformers import Qwen2VLConfig

        text = _STOCK[name]
        return Qwen2VLConfig(text_config=dict(text), vision_config={"hidden_size": text["hidden_size"]})

    @classmethod
    def tiny_vision(cls) -> dict[str, Any]:
        """Of 4 x 4 pixels a patch."""
        return {"depth": 5, "embed_dim": 32, "hidden_size": 48, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}


HOST = Qwen2VLHost
