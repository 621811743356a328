"""Pixtral: LLaVA with a tower for images of any size, whose rows of tokens end in tokens of the prompt's text."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ivtp.errors import InputError
from ivtp.hosts.base import Visual
from ivtp.hosts.llava_like import LlavaLike
from ivtp.hosts.tiny import CHAT_TEMPLATE, IMAGE, settle, tiny_mistral, tiny_tokenizer
from ivtp.plan import Geometry
from ivtp.stock import within
from ivtp.towers.pixtral import PixtralTower

SLOT, BREAK, END = "[IMG]", "[IMG_BREAK]", "[IMG_END]"
"""What the processor writes: a slot of an image, and what ends a row of them and the last row."""


class PixtralHost(LlavaLike):
    """`LlavaForConditionalGeneration` with a Pixtral tower, one feature layer and a decoder with Llama's layers.

    Images are of any size. The tokens that end the rows of an image are text: they stay, whatever is cut of the rows.
    The mean over all patches, of their attention and of their features, stands for CLS.

    Refuses: what LLaVA refuses, but its strategy has to be "full"; a call without `image_sizes`; methods that need a
    CLS token, a text side or a square grid.
    """

    name = "pixtral"
    model_class = "LlavaForConditionalGeneration"
    media = ("pixel_values", "image_sizes")
    stock: ClassVar[tuple[str, ...]] = ("pixtral-12b",)
    hub = "mistral-community/{}"
    gives = frozenset()
    tower = PixtralTower
    tiny_patch: ClassVar[int] = 8
    """Pixels along a patch of `tiny`."""

    @classmethod
    def matches(cls, config: Any) -> bool:
        """A LLaVA config with a Pixtral tower, whatever its decoder."""
        return getattr(config, "model_type", None) == "llava" and config.vision_config.model_type == PixtralTower.kind

    @classmethod
    def merge(cls, config: Any) -> int:
        """Patches along a visual token."""
        return 1

    @classmethod
    def geometry(cls, config: Any) -> Geometry:
        """Sizes from the config, and of the largest image, a square."""
        found, rows = super().geometry(config), -(-config.vision_config.image_size // cls._side(config))
        return dataclasses.replace(found, num_patches=rows**2, unit=cls.merge(config) ** 2, marks=rows)

    @classmethod
    def stock_config(cls, name: str) -> Any:
        """Pixtral-12B, whose decoder is Mistral NeMo's."""
        from transformers import LlavaConfig, MistralConfig, PixtralVisionConfig

        text = MistralConfig(
            hidden_size=5120,
            intermediate_size=14336,
            num_hidden_layers=40,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=131072,
            sliding_window=None,
        )
        return LlavaConfig(
            vision_config=PixtralVisionConfig(),
            text_config=text,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )

    @classmethod
    def visual(cls, config: Any, size: tuple[int, int], images: int = 1) -> Visual:
        """Scaled down to the largest edge, where it is longer, and then to whole tokens."""
        side, longest = cls._side(config), config.vision_config.image_size
        (width, height), scaled = size, within((size[1], size[0]), side, longest)
        if not all(scaled):
            raise InputError(f"an image of {width} x {height} pixels is a strip; crop it to at most {longest} : 1")
        return _in_rows(scaled[0] // side, scaled[1] // side)

    @classmethod
    def _side(cls, config: Any) -> int:
        """Pixels along a visual token."""
        return int(cls.merge(config) * config.vision_config.patch_size)

    def visuals(self, inputs: dict[str, Any]) -> list[Visual]:
        """The tokens of each image, in raster order."""
        sizes, pixels = inputs.get("image_sizes"), inputs["pixel_values"]
        if sizes is None:
            raise InputError("images of this model need their image_sizes; pass all that the processor gives")
        sides: list[list[int]] = torch.as_tensor(sizes).reshape(-1, 2).tolist()
        largest = [max(edges, default=0) for edges in zip(*sides, strict=True)]
        if len(sides) != len(pixels) or any(n > most for n, most in zip(largest, pixels.shape[-2:], strict=False)):
            raise InputError(
                f"pixel_values of shape {tuple(pixels.shape)} do not fit {len(sides)} images of image_sizes; "
                "pass both as the processor gives them"
            )
        config: Any = self.model.config
        side, across = self._side(config), config.vision_config.patch_size
        for height, width in sides:
            if min(height, width) < side or any(n // across * across % side for n in (height, width)):
                raise InputError(
                    f"an image of {width} x {height} pixels is not of whole tokens of {side} pixels; "
                    "let the model's processor scale it"
                )
        return [_in_rows(height // side, width // side) for height, width in sides]

    def tiles(self, inputs: dict[str, Any], visuals: Sequence[Visual]) -> list[Tensor]:
        """Each image without what fills it up to the largest of the call."""
        config: Any = self.model.config
        side, own = self._side(config), inputs["pixel_values"].split(1)
        return [
            part[..., : visual.grids[0][0] * side, : visual.grids[0][1] * side]
            for part, visual in zip(own, visuals, strict=True)
        ]

    @classmethod
    def tiny(cls, seed: int = 0) -> tuple[nn.Module, Any]:
        """Images of up to 64 tokens of 8 x 8 pixels; 6 encoder and 8 decoder layers."""
        import transformers
        from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

        tokenizer = tiny_tokenizer(SLOT, image_break_token=BREAK, image_end_token=END)
        config = cls.tiny_config(
            vision_config=transformers.PixtralVisionConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=6,
                num_attention_heads=2,
                image_size=64,
                patch_size=cls.tiny_patch,
            ),
            text_config=tiny_mistral(tokenizer),
            image_token_id=tokenizer.image_token_id,
        )
        processor = _processor_class()(
            PixtralImageProcessorPil(size={"longest_edge": 64}, patch_size=cls.tiny_patch),
            tokenizer,
            patch_size=cls.tiny_patch,
            spatial_merge_size=cls.merge(config),
            chat_template=CHAT_TEMPLATE.replace(f"{IMAGE}\n", SLOT),
        )
        with torch.random.fork_rng():
            model = settle(getattr(transformers, cls.model_class)(config), tokenizer, seed)
        return model, processor

    @classmethod
    def tiny_config(cls, **parts: Any) -> Any:
        """The config of `tiny`, of its towers."""
        from transformers import LlavaConfig

        return LlavaConfig(**parts, vision_feature_layer=-1, vision_feature_select_strategy="full")


@cache
def _in_rows(rows: int, columns: int) -> Visual:
    """An image of `rows` x `columns` tokens, with a token of the text behind each row."""
    every = torch.arange(rows * columns)
    return Visual(((rows, columns),), every, every[None], marks=rows)


@cache
def _processor_class() -> Any:
    """The stock processor; its module imports a function from torchvision's that stands in PIL's as well."""
    from transformers.models.pixtral import image_processing_pil_pixtral as pil

    needed = pil.__name__.replace("_pil_", "_")
    lent = sys.modules.setdefault(needed, pil) is pil
    try:
        from transformers.models.pixtral.processing_pixtral import PixtralProcessor
    finally:
        if lent:
            del sys.modules[needed]

    class WithoutTorchvision(PixtralProcessor):  # type: ignore[misc]  # transformers is untyped here
        """It takes PIL's image processor."""

    return WithoutTorchvision


HOST = PixtralHost
