"""LLaVA-NeXT (LLaVA-1.6): images are read as a whole and in tiles, with newline tokens behind the rows of these."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ivtp.errors import InputError
from ivtp.hosts.base import Visual
from ivtp.hosts.llava_like import LlavaLike
from ivtp.hosts.tiny import CHAT_TEMPLATE, IMAGE, settle, tiny_clip, tiny_llama, tiny_tokenizer
from ivtp.stock import best_tiling


class LlavaNextHost(LlavaLike):
    """`LlavaNextForConditionalGeneration` with a CLIP tower and one feature layer; images of any size.

    An image's patches are those of the whole, scaled down, and then those of the tiles in raster order, without
    padding; `keep` is for all of them together. At a cut in the encoder every tile keeps the same number; what is then
    above the budget leaves by its score. Newline tokens stay.

    Refuses: what LLaVA refuses; methods that merge in the encoder, but `ivtp+`: they could not tell a tile's padding.
    """

    name = "llava_next"
    model_class = "LlavaNextForConditionalGeneration"
    media = ("pixel_values", "image_sizes")
    stock = ()
    pads = True

    @classmethod
    def matches(cls, config: Any) -> bool:
        """A LLaVA-NeXT config, whatever its tower and decoder."""
        return getattr(config, "model_type", None) == "llava_next"

    @classmethod
    def visual(cls, config: Any, size: tuple[int, int]) -> Visual:
        """In the tiles whose resolution shows most of the image."""
        pixels = config.vision_config.image_size
        resolutions = tuple(map(tuple, config.image_grid_pinpoints))
        return _visual((size[1], size[0]), resolutions, pixels, pixels // config.vision_config.patch_size)

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

    def __init__(self, model: nn.Module) -> None:
        """Locate the parts of a stock LLaVA-NeXT."""
        super().__init__(model)
        config: Any = model.config
        self._pixels = config.vision_config.image_size
        self._resolutions = tuple(map(tuple, config.image_grid_pinpoints))

    @property
    def most_patches(self) -> int:
        """Those of the whole, and of the most tiles that there can be."""
        tiles = max((height // self._pixels) * (width // self._pixels) for height, width in self._resolutions)
        return int(self.size.num_patches * (1 + tiles))

    def visuals(self, inputs: dict[str, Any]) -> list[Visual]:
        """The whole image, then the rows of its tiles, each with a newline behind it."""
        sizes, pixels = inputs.get("image_sizes"), inputs["pixel_values"]
        if sizes is None:
            raise InputError("images of this model need their image_sizes; pass all that the processor gives")
        side = self._pixels // self.size.patch_size
        found = [_visual((int(h), int(w)), self._resolutions, self._pixels, side) for h, w in sizes.tolist()]
        given = len(pixels) if pixels.dim() == 5 else sum(len(v.tiles) for v in found)
        if given != (len(found) if pixels.dim() == 5 else len(pixels)):
            raise InputError(
                f"pixel_values of shape {tuple(pixels.shape)} do not fit {len(found)} image_sizes; "
                "pass both as the processor gives them"
            )
        return found

    def tiles(self, inputs: dict[str, Any], visuals: Sequence[Visual]) -> list[Tensor]:
        """The tiles of each image, without those that fill up a batch."""
        pixels, counts = inputs["pixel_values"], [len(visual.tiles) for visual in visuals]
        if pixels.dim() == 5:
            return [own[:count] for own, count in zip(pixels, counts, strict=True)]
        return list(pixels.split(counts))

    def separator(self) -> Tensor | None:
        """The newline."""
        inner: Any = self.multimodal
        newline: Tensor = inner.image_newline
        return newline


@cache
def _visual(size: tuple[int, int], resolutions: tuple[tuple[int, int], ...], pixels: int, side: int) -> Visual:
    """An image of `size` (height, width), in tiles of `pixels` with `side` x `side` patches."""
    height, width = best_tiling(size, resolutions)
    rows, columns = height // pixels, width // pixels
    shown = _shown(size, rows * side, columns * side)  # (rows, columns) bool of all patches: not padding
    first = side * side
    patch = torch.where(shown, shown.flatten().cumsum(0).view_as(shown) - 1 + first, -1)
    tiles = patch.view(rows, side, columns, side).transpose(1, 2).reshape(rows * columns, first)
    whole = torch.arange(first)
    lines = [torch.cat([row[row >= 0], torch.tensor([-1])]) for row in patch if bool((row >= 0).any())]
    grids = ((side, side), *((len(lines), len(line) - 1) for line in lines[:1]))
    return Visual(grids, torch.cat([whole, *lines]), torch.cat([whole[None], tiles]))


def _shown(size: tuple[int, int], rows: int, columns: int) -> Tensor:
    """(rows, columns) bool: where a picture of `size` (height, width), scaled to fit in, lies between its padding."""
    height, width = size
    shown = torch.zeros(rows, columns, dtype=torch.bool)
    if width / height > columns / rows:
        border = (rows - int(round(height * (columns / width), 7))) // 2
        shown[border : rows - border] = True
    else:
        border = (columns - int(round(width * (rows / height), 7))) // 2
        shown[:, border : columns - border] = True
    return shown


HOST = LlavaNextHost
