"""SmolVLM2: as Idefics3, with smaller towers and more patches of the encoder in a visual token."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

from ivtp.hosts.idefics_like import SO400M, IdeficsLike

_BASE = ((768, 3072, 12, 12), (512, 16), 4)
_STOCK = {
    "SmolVLM2-256M-Video-Instruct": (*_BASE, (576, 1536, 30, 9, 3)),
    "SmolVLM2-500M-Video-Instruct": (*_BASE, (960, 2560, 32, 15, 5)),
    "SmolVLM2-2.2B-Instruct": (SO400M, (384, 14), 3, (2048, 8192, 24, 32, 32)),
}
_TEXT = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


class SmolVLMHost(IdeficsLike):
    """`SmolVLMForConditionalGeneration` and a decoder with Llama's layers; images of any size.

    As `idefics3`; the first SmolVLM's checkpoints are of that family themselves. Frames of a video are images.

    Refuses: what `idefics3` refuses.
    """

    name = "smolvlm"
    model_class = "SmolVLMForConditionalGeneration"
    stock = tuple(_STOCK)
    hub = "HuggingFaceTB/{}"
    parts = ("SmolVLMConfig", "SmolVLMVisionConfig")
    tiny_sizes = (39, 3)
    tags = ()

    @classmethod
    def stock_config(cls, name: str) -> Any:
        """SmolVLM2 of the given size, with SigLIP and SmolLM2."""
        vision, tile, across, text = _STOCK[name]
        decoder = dict(zip(_TEXT, text, strict=True))
        return cls.config(vision, tile, across, LlamaConfig(**decoder, vocab_size=49280))

    @classmethod
    def tiny_pictures(cls, **sizes: dict[str, int]) -> Any:
        """The stock image processor."""
        from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

        return SmolVLMImageProcessorPil(**sizes)


HOST = SmolVLMHost
