"""LLaVA with a SigLIP vision tower: patches alone, without CLS."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ivtp.hosts.llava_like import LlavaLike
from ivtp.hosts.tiny import CHAT_TEMPLATE, IMAGE, settle, tiny_llama, tiny_siglip, tiny_tokenizer
from ivtp.towers.siglip import SiglipTower


class LlavaSiglipHost(LlavaLike):
    """`LlavaForConditionalGeneration` with a SigLIP tower, one feature layer and a decoder with Llama's layers.

    The mean over all patches, of their attention and of their features, stands for the CLS token that the tower lacks.

    Refuses: what LLaVA refuses, but its strategy has to be "full"; methods that need a CLS token or a text side.
    """

    name = "llava_siglip"
    model_class = "LlavaForConditionalGeneration"
    gives = frozenset({"grid"})
    tower = SiglipTower

    @classmethod
    def matches(cls, config: Any) -> bool:
        """A LLaVA config with a SigLIP tower."""
        return getattr(config, "model_type", None) == "llava" and config.vision_config.model_type == SiglipTower.kind

    @classmethod
    def tiny(cls, seed: int = 0) -> tuple[nn.Module, Any]:
        """36 patches, 6 encoder and 8 decoder layers, grouped-query attention."""
        from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

        tokenizer = tiny_tokenizer()
        config = LlavaConfig(
            vision_config=tiny_siglip(num_hidden_layers=6, image_size=84, patch_size=14),
            text_config=tiny_llama(tokenizer),
            image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
            image_seq_length=36,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
        processor = LlavaProcessor(
            SiglipImageProcessorPil(size={"height": 84, "width": 84}),
            tokenizer,
            patch_size=14,
            vision_feature_select_strategy="full",
            chat_template=CHAT_TEMPLATE,
        )
        with torch.random.fork_rng():
            model = settle(LlavaForConditionalGeneration(config), tokenizer, seed)
        return model, processor


HOST = LlavaSiglipHost
