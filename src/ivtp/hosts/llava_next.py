"""LLaVA-NeXT (LLaVA-1.6): images are read as a whole and in tiles, with newline tokens behind the rows of these."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ivtp.hosts.tiles import TilesHost
from ivtp.hosts.tiny import CHAT_TEMPLATE, IMAGE, settle, tiny_clip, tiny_llama, tiny_tokenizer

_VICUNA: dict[str, Any] = {"model_type": "llama", "vocab_size": 32064}
_STOCK: dict[str, dict[str, Any]] = {
    "llava-v1.6-vicuna-7b": {
        **_VICUNA,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llava-v1.6-vicuna-13b": {
        **_VICUNA,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
    "llava-v1.6-mistral-7b": {
        "model_type": "mistral",
        "vocab_size": 32064,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "sliding_window": None,
    },
}


class LlavaNextHost(TilesHost):
    """`LlavaNextForConditionalGeneration` with a CLIP tower and one feature layer; images of any size.

    An image's patches are those of the whole, scaled down, and then those of the tiles in raster order, without
    padding; `keep` is for all of them together. At a cut in the encoder every tile keeps the same number; what is then
    above the budget leaves by its score. Newline tokens stay.

    Refuses: what LLaVA refuses; methods that merge in the encoder, but `ivtp+`: they could not tell a tile's padding.
    """

    name = "llava_next"
    model_class = "LlavaNextForConditionalGeneration"
    stock = tuple(_STOCK)

    @classmethod
    def matches(cls, config: Any) -> bool:
        """A LLaVA-NeXT config, whatever its tower and decoder."""
        return getattr(config, "model_type", None) == "llava_next"

    @classmethod
    def stock_config(cls, name: str) -> Any:
        """LLaVA-NeXT of the given size, with CLIP ViT-L/14 at 336 pixels."""
        from transformers import LlavaNextConfig

        return LlavaNextConfig(text_config=_STOCK[name])

    @classmethod
    def tiny(cls, seed: int = 0) -> tuple[nn.Module, Any]:
        """Tiles of 16 patches, up to four of them beside the whole; 5 encoder and 8 decoder layers."""
        from transformers import (
            LlavaNextConfig,
            LlavaNextForConditionalGeneration,
            LlavaNextProcessor,
        )
        from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

        tokenizer = tiny_tokenizer()
        tiles = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]  # (height, width)
        config = LlavaNextConfig(
            vision_config=tiny_clip(num_hidden_layers=5, image_size=32, patch_size=8),
            text_config=tiny_llama(tokenizer),
            image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
            image_grid_pinpoints=tiles,
            vision_feature_layer=-2,
            tie_word_embeddings=False,
        )
        processor = LlavaNextProcessor(
            LlavaNextImageProcessorPil(
                size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=tiles
            ),
            tokenizer,
            patch_size=8,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=CHAT_TEMPLATE,
        )
        with torch.random.fork_rng():
            model = settle(LlavaNextForConditionalGeneration(config), tokenizer, seed)
        return model, processor


HOST = LlavaNextHost
