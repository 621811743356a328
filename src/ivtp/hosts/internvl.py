"""InternVL: an InternViT tower, tiles with the whole image behind them, and a projector that joins 2 x 2 patches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ivtp.errors import InputError, UnsupportedModelError
from ivtp.hosts.base import Visual
from ivtp.hosts.llava_like import LlavaLike
from ivtp.hosts.tiles import tiles_in_line
from ivtp.hosts.tiny import CHAT_TEMPLATE, IMAGE, for_images, settle, tiny_llama, tiny_tokenizer
from ivtp.plan import Geometry
from ivtp.stock import best_canvas
from ivtp.towers.intern_vit import ACROSS, InternVitTower

MOST_TILES = 12
"""Of one image, as the processors of the released checkpoints are set; the whole comes on top."""

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_STOCK = {
    "InternVL3-1B": (896, 4864, 24, 14, 2),
    "InternVL3-2B": (1536, 8960, 28, 12, 2),
    "InternVL3-8B": (3584, 18944, 28, 28, 4),
    "InternVL3-14B": (5120, 13824, 48, 40, 8),
}


class InternVLHost(LlavaLike):
    """`InternVLForConditionalGeneration` with an InternViT tower and one feature layer; images of any size.

    What is cut are visual tokens: the projector makes one of 2 x 2 patches of the encoder, which leave together, by the
    sum of the attention that they receive. An image's tokens are those of its tiles, one tile behind the other, and
    then those of the whole, scaled down; `keep` is for all of them together. Frames of a video are images.

    Refuses: other vision towers; several feature layers, or another strategy than "default"; the decoders that LLaVA
    refuses; methods that need a text side, or merge in the encoder.
    """

    name = "internvl"
    model_class = "InternVLForConditionalGeneration"
    stock = tuple(_STOCK)
    hub = "OpenGVLab/{}-hf"
    gives = frozenset({"cls", "grid"})
    tower = InternVitTower

    @classmethod
    def matches(cls, config: Any) -> bool:
        """An InternVL config, whatever its decoder."""
        return getattr(config, "model_type", None) == "internvl"

    @classmethod
    def geometry(cls, config: Any) -> Geometry:
        """Sizes from an `InternVLConfig`. Raises `UnsupportedModelError` for towers and settings outside the family."""
        if config.downsample_ratio != 1 / ACROSS:
            raise UnsupportedModelError(
                f"downsample_ratio={config.downsample_ratio} is not prunable; {1 / ACROSS} of the released models is"
            )
        found, unit = super().geometry(config), ACROSS**2
        return dataclasses.replace(found, num_patches=found.num_patches // unit, unit=unit, marks=2)

    @classmethod
    def stock_config(cls, name: str) -> Any:
        """InternVL3 of the given size, with InternViT-300M at 448 pixels and a Qwen2.5."""
        from transformers import InternVLConfig, InternVLVisionConfig, Qwen2Config

        decoder = dict(zip(_SIZES, _STOCK[name], strict=True))
        return InternVLConfig(
            vision_config=InternVLVisionConfig(attention_bias=True),
            text_config=Qwen2Config(**decoder, vocab_size=151674),
        )

    @classmethod
    def visual(cls, config: Any, size: tuple[int, int], images: int = 1) -> Visual:
        """In as many tiles as the processors of the released checkpoints cut it in."""
        columns, rows = best_canvas((size[1], size[0]), tuple(config.vision_config.image_size), MOST_TILES)
        tiles = rows * columns
        return tiles_in_line(tiles + (tiles > 1), cls.geometry(config).num_patches)

    def __init__(self, model: nn.Module) -> None:
        """Locate the parts of a stock InternVL."""
        super().__init__(model)
        feature: int = self.model.config.vision_feature_layer  # type: ignore[union-attr, assignment]
        self._normed = feature == -1  # the last layer is read behind the post layer norm, where there is one

    @property
    def most_patches(self) -> int:
        """Those of the most tiles and of the whole."""
        return self.size.num_patches * (MOST_TILES + 1)

    def visuals(self, inputs: dict[str, Any]) -> list[Visual]:
        """An image for each run of its slots, which is as many tiles long as it was cut in."""
        each, given = self.size.num_patches, len(inputs["pixel_values"])
        slots = nn.functional.pad(inputs["input_ids"].cpu() == self.image_token, (1, 1))  # (B, 1 + T + 1)
        turns = slots[:, 1:].int() - slots[:, :-1].int()
        starts, ends = (turns == 1).nonzero(), (turns == -1).nonzero()  # (images, 2) row and column
        lengths = (ends - starts)[:, 1]
        repeats = max(1, int(lengths.sum()) // (each * max(given, 1)))  # rows of beams share their images
        own = lengths[starts[:, 0] % repeats == 0].tolist()
        if sum(own) != each * given or any(length % each for length in own):
            raise InputError(
                f"the prompt has {sum(own)} image slots for {given} tiles of {each} slots each; "
                "build prompt and pixel_values with the model's processor"
            )
        return [tiles_in_line(length // each, each) for length in own]

    def tiles(self, inputs: dict[str, Any], visuals: Sequence[Visual]) -> list[Tensor]:
        """The tiles of each image."""
        return list(inputs["pixel_values"].split([len(visual.tiles) for visual in visuals]))

    def project(self, features: Tensor) -> Tensor:
        """InternVL's projector, of the patches of each square side by side."""
        if self._normed:
            features = self.vision.normalise(features)
        return super().project(features.reshape(len(features), -1, self.size.unit * features.shape[2]))

    @classmethod
    def tiny(cls, seed: int = 0) -> tuple[nn.Module, Any]:
        """Tiles of 16 tokens made of 64 patches, up to four beside the whole; 5 encoder and 8 decoder layers."""
        from transformers import (
            InternVLConfig,
            InternVLForConditionalGeneration,
            InternVLProcessor,
            InternVLVisionConfig,
        )
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

        marks = {"start_image_token": "<img>", "end_image_token": "</img>", "video_token": "<video>"}
        tokenizer = tiny_tokenizer(context_image_token=IMAGE, **marks)
        config = InternVLConfig(
            vision_config=InternVLVisionConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=5,
                num_attention_heads=2,
                attention_bias=True,
                image_size=32,
                patch_size=4,
            ),
            text_config=tiny_llama(tokenizer),
            image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
            image_seq_length=16,
            tie_word_embeddings=False,
        )
        processor = for_images(InternVLProcessor)(
            GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, max_patches=4),
            tokenizer,
            image_seq_length=16,
            chat_template=CHAT_TEMPLATE,
        )
        with torch.random.fork_rng():
            model = settle(InternVLForConditionalGeneration(config), tokenizer, seed)
        return model, processor


HOST = InternVLHost
