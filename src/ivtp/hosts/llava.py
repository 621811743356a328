"""LLaVA and LLaVA-1.5: a CLIP vision tower, an MLP projector and a Llama-like decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ivtp.hosts.llava_like import LlavaLike
from ivtp.hosts.tiny import CHAT_TEMPLATE, IMAGE, settle, tiny_clip, tiny_llama, tiny_tokenizer
from ivtp.towers.pixtral import PixtralTower
from ivtp.towers.siglip import SiglipTower

_STOCK = {
    "llava-1.5-7b": {"hidden_size": 4096, "intermediate_size": 11008, "layers": 32},
    "llava-1.5-13b": {"hidden_size": 5120, "intermediate_size": 13824, "layers": 40},
}


class LlavaHost(LlavaLike):
    """`LlavaForConditionalGeneration` with a CLIP tower, one feature layer and a decoder with Llama's layers.

    Refuses: other vision towers; several feature layers, or the strategy "full"; decoders with sliding-window layers,
    or of other kinds than gemma, llama, mistral, phi3, qwen2 and qwen3.
    """

    name = "llava"
    model_class = "LlavaForConditionalGeneration"
    stock = tuple(_STOCK)
    compressible = True

    @classmethod
    def matches(cls, config: Any) -> bool:
        """A LLaVA config, whatever its decoder; a SigLIP or Pixtral tower makes another family of it."""
        others = (PixtralTower.kind, SiglipTower.kind)
        return getattr(config, "model_type", None) == "llava" and config.vision_config.model_type not in others

    @classmethod
    def stock_config(cls, name: str) -> Any:
        """LLaVA-1.5 of the given size, with CLIP ViT-L/14 at 336 pixels."""
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

        decoder = dict(_STOCK[name])
        layers = decoder.pop("layers")
        return LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=1024,
                intermediate_size=4096,
                num_hidden_layers=24,
                num_attention_heads=16,
                image_size=336,
                patch_size=14,
                projection_dim=768,
            ),
            text_config=LlamaConfig(**decoder, num_hidden_layers=layers, num_attention_heads=layers, vocab_size=32064),
        )

    @classmethod
    def tiny(cls, seed: int = 0) -> tuple[nn.Module, Any]:
        """36 patches, 7 encoder and 8 decoder layers, grouped-query attention."""
        from transformers import (
            CLIPImageProcessor,
            LlavaConfig,
            LlavaForConditionalGeneration,
            LlavaProcessor,
        )

        tokenizer = tiny_tokenizer()
        config = LlavaConfig(
            vision_config=tiny_clip(num_hidden_layers=7, image_size=84, patch_size=14),
            text_config=tiny_llama(tokenizer),
            image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
            image_seq_length=36,
            vision_feature_layer=-2,
        )
        processor = LlavaProcessor(
            CLIPImageProcessor(size={"shortest_edge": 84}, crop_size={"height": 84, "width": 84}),
            tokenizer,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=CHAT_TEMPLATE,
        )
        with torch.random.fork_rng():
            model = settle(LlavaForConditionalGeneration(config), tokenizer, seed)
        return model, processor


HOST = LlavaHost
