"""Idefics3: a SigLIP tower, tiles with the whole image behind them, and a projector that joins squares of patches."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

from ivtp.hosts.idefics_like import SO400M, IdeficsLike


class Idefics3Host(IdeficsLike):
    """`Idefics3ForConditionalGeneration` and a decoder with Llama's layers; images of any size.

    What is cut are visual tokens: the projector makes one of a square of patches, `scale_factor` of them a side, which
    leave together. An image's tokens are those of its tiles, one tile behind the other, and then those of the whole,
    scaled down; `keep` is for all of them together. The mean over all patches, of their attention and of their
    features, stands for CLS. What the processor writes between tiles stays, and is no part of the question.

    Refuses: tiles with padding, or of another size than the tower's (the stock processor makes none); slots without the
    marks and tags that the processor writes; the decoders that LLaVA refuses; methods that need a CLS token or a text
    side, or merge in the encoder.
    """

    name = "idefics3"
    model_class = "Idefics3ForConditionalGeneration"
    stock = ("Idefics3-8B-Llama3",)
    hub = "HuggingFaceM4/{}"
    parts = ("Idefics3Config", "Idefics3VisionConfig")
    tiny_sizes = (32, 2)
    tags = ("<global-img>", *(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)))

    @classmethod
    def stock_config(cls, name: str) -> Any:
        """Idefics3 with SigLIP-so400m at 364 pixels and Llama 3.1 8B."""
        text = LlamaConfig(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=128259,
        )
        return cls.config(SO400M, (364, 14), 2, text)

    @classmethod
    def tiny_pictures(cls, **sizes: dict[str, int]) -> Any:
        """The stock image processor."""
        from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

        return Idefics3ImageProcessorPil(**sizes)


HOST = Idefics3Host
