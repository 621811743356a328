"""LLaVA-OneVision: a SigLIP tower, and tiles of a single image, whose grid is scaled down where it is large."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ivtp.errors import InputError
from ivtp.hosts.base import Visual
from ivtp.hosts.llava_like import LlavaLike
from ivtp.hosts.tiles import TilesHost
from ivtp.hosts.tiny import CHAT_TEMPLATE, IMAGE, for_images, settle, tiny_llama, tiny_siglip, tiny_tokenizer
from ivtp.towers.siglip import SiglipTower

_STOCK: dict[str, dict[str, int]] = {
    "llava-onevision-qwen2-0.5b-ov": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 152000,
    },
    "llava-onevision-qwen2-7b-ov": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152128,
    },
}


class LlavaOnevisionHost(TilesHost):
    """`LlavaOnevisionForConditionalGeneration` with a SigLIP tower and one feature layer; images of any size.

    The only image of a prompt is read as a whole and in tiles, as LLaVA-NeXT's; each of several as a whole. A grid of
    tiles that is larger than `vision_aspect_ratio` admits is scaled down behind the projector: with all tokens kept
    that is what happens, and where the encoder is cut, the patch nearest to each place stands for it. The mean over
    all patches, of their attention and of their features, stands for CLS.

    Refuses: what LLaVA refuses, but its strategy has to be "full"; videos; methods that need a CLS token or a text
    side, or merge in the encoder, but `ivtp+`.
    """

    name = "llava_onevision"
    model_class = "LlavaOnevisionForConditionalGeneration"
    stock = tuple(_STOCK)
    gives = frozenset({"grid"})
    tower = SiglipTower
    media = (*TilesHost.media, "batch_num_images")
    unread = ("pixel_values_videos",)
    settings = (*LlavaLike.settings, "vision_aspect_ratio")

    @classmethod
    def matches(cls, config: Any) -> bool:
        """A LLaVA-OneVision config, whatever its tower and decoder."""
        return getattr(config, "model_type", None) == "llava_onevision"

    @classmethod
    def limit(cls, config: Any) -> int | None:
        """The number in "anyres_max_9"."""
        return int(config.vision_aspect_ratio.removeprefix("anyres_max_"))

    @classmethod
    def stock_config(cls, name: str) -> Any:
        """LLaVA-OneVision of the given size, with SigLIP-so400m/14 at 384 pixels and a Qwen2."""
        from transformers import LlavaOnevisionConfig, Qwen2Config

        return LlavaOnevisionConfig(text_config=Qwen2Config(**_STOCK[name]))

    @classmethod
    def visual(cls, config: Any, size: tuple[int, int], images: int = 1) -> Visual:
        """The only image in its tiles, one of several as a whole with a newline behind it."""
        if images == 1:
            return super().visual(config, size)
        patches = SiglipTower.sizes(config.vision_config)["num_patches"]
        side, every = math.isqrt(patches), torch.arange(patches)
        return Visual(((side, side),), torch.cat([every, torch.tensor([-1])]), every[None])

    def images_beside(self, count: int, inputs: dict[str, Any]) -> list[int]:
        """As `batch_num_images` says; without it the stock model takes every image for the only one."""
        counts = inputs.get("batch_num_images")
        beside = [1] * count if counts is None else [n for n in counts.tolist() for _ in range(n)]
        if len(beside) != count:
            raise InputError(
                f"batch_num_images name {len(beside)} images, and there are {count} image_sizes; "
                "pass both as the processor gives them"
            )
        return beside

    @classmethod
    def tiny(cls, seed: int = 0) -> tuple[nn.Module, Any]:
        """Tiles of 16 patches, of which two are shown, or a few more; 5 encoder and 8 decoder layers."""
        from transformers import (
            LlavaOnevisionConfig,
            LlavaOnevisionForConditionalGeneration,
            LlavaOnevisionProcessor,
        )
        from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
            LlavaOnevisionImageProcessorPil,
        )

        tokenizer = tiny_tokenizer()
        tiles = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]  # (height, width)
        config = LlavaOnevisionConfig(
            vision_config=tiny_siglip(num_hidden_layers=5, image_size=32, patch_size=8),
            text_config=tiny_llama(tokenizer),
            image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
            image_grid_pinpoints=tiles,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            vision_aspect_ratio="anyres_max_2",
            tie_word_embeddings=False,
        )
        processor = for_images(LlavaOnevisionProcessor)(
            LlavaOnevisionImageProcessorPil(size={"height": 32, "width": 32}, image_grid_pinpoints=tiles),
            tokenizer,
            num_image_tokens=16,
            vision_feature_select_strategy="full",
            vision_aspect_ratio="anyres_max_2",
            chat_template=CHAT_TEMPLATE,
        )
        with torch.random.fork_rng():
            model = settle(LlavaOnevisionForConditionalGeneration(config), tokenizer, seed)
        return model, processor


HOST = LlavaOnevisionHost
