"""PaliGemma 2: PaliGemma with Gemma 2 as its decoder."""

from __future__ import annotations

from typing import Any

from ivtp.hosts.paligemma import VOCABULARY, PaliGemmaHost
from ivtp.towers.gemma import Gemma2Tower

_DECODERS: dict[str, dict[str, int]] = {
    "3b": {
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "10b": {
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_hidden_layers": 42,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
}


class PaliGemma2Host(PaliGemmaHost):
    """`PaliGemmaForConditionalGeneration` with a SigLIP tower and Gemma 2 as its decoder.

    As `paligemma`. The logits of its attention are capped where the kernel does so: PyTorch's own does not. Prompt and
    answer have to fit in the sliding window of its layers (4096 tokens in the released checkpoints).

    Refuses: what `paligemma` refuses; prompts and answers beyond the sliding window, such as images of 896 pixels.
    """

    name = "paligemma2"
    stock = tuple(f"paligemma2-{size}-pt-{side}" for size in _DECODERS for side in (224, 448))
    decoder = Gemma2Tower

    @classmethod
    def matches(cls, config: Any) -> bool:
        """A PaliGemma config with Gemma 2."""
        return getattr(config, "model_type", None) == "paligemma" and config.text_config.model_type == "gemma2"

    @classmethod
    def stock_config(cls, name: str) -> Any:
        """PaliGemma 2 of the given decoder and image size, with SigLIP-so400m/14."""
        from transformers import Gemma2Config, PaliGemmaConfig

        vision = super().stock_config(name).vision_config
        text = Gemma2Config(**_DECODERS[name.split("-")[1]], head_dim=256, vocab_size=VOCABULARY)
        return PaliGemmaConfig(vision_config=vision, text_config=text, projection_dim=text.hidden_size)

    @classmethod
    def tiny_decoder(cls, sizes: dict[str, Any]) -> Any:
        """Every other layer slides; logits are capped low enough to matter."""
        from transformers import Gemma2Config

        sizes = {**sizes, "num_key_value_heads": 2, "query_pre_attn_scalar": 12, "sliding_window": 1024}
        return Gemma2Config(**sizes, attn_logit_softcapping=5.0, final_logit_softcapping=None)


HOST = PaliGemma2Host
