"""What Idefics3 and SmolVLM share: tiles with the whole behind them, each with a tag, and squares of patches joined."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn

from ivtp.errors import InputError, UnsupportedModelError
from ivtp.hosts.base import Visual
from ivtp.hosts.llava_like import LlavaLike
from ivtp.hosts.tagged import Tagged, read_tagged
from ivtp.hosts.tiles import tiles_in_line
from ivtp.hosts.tiny import CHAT_TEMPLATE, IMAGE, settle, tiny_llama, tiny_tokenizer
from ivtp.plan import Geometry
from ivtp.stock import split_grid
from ivtp.towers.idefics import IdeficsTower

MOST_ACROSS = 4
"""Tiles along the longer side of an image, as the processors of the released checkpoints are set."""

SO400M = (1152, 4304, 27, 16)
"""`_SIZES` of SigLIP-so400m."""
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


class IdeficsLike(LlavaLike):
    """SigLIP's layers, one matrix that reads the patches of a square, and a decoder with Llama's layers."""

    media = ("pixel_values", "pixel_attention_mask")
    unread = ("image_hidden_states", "pixel_values_videos")
    gives = frozenset({"grid"})
    settings = ()
    parts: ClassVar[tuple[str, str]]
    """Names of the stock configs, of the model and of its encoder."""
    tiny_sizes: ClassVar[tuple[int, int]]
    """Of `tiny`: pixels along a tile, and patches along a square."""
    tags: ClassVar[tuple[str, ...]]
    """Of `tiny`: those that its tokenizer has a token for."""

    @classmethod
    def matches(cls, config: Any) -> bool:
        """A config of this family, whatever its decoder."""
        return getattr(config, "model_type", None) == cls.name

    @classmethod
    def geometry(cls, config: Any) -> Geometry:
        """Sizes of the model. Raises `UnsupportedModelError` for what cannot be pruned."""
        vision: dict[str, Any] = IdeficsTower.sizes(config.vision_config)
        text: dict[str, Any] = cls.decoder.sizes(config.text_config)
        side, across = math.isqrt(vision["num_patches"]), config.scale_factor
        if side % across:
            raise UnsupportedModelError(
                f"a tile of {side} x {side} patches is not made of squares of {across} x {across} (scale_factor); "
                "a model whose squares fill its tiles can be pruned"
            )
        name = str(getattr(config, "name_or_path", "") or cls.name)
        whole = Geometry(name, vision_layers=vision["vision_depth"], projector_matrices=1, marks=3, **vision, **text)
        return dataclasses.replace(whole, num_patches=(side // across) ** 2, unit=across**2)

    @classmethod
    def config(cls, vision: Sequence[int], tile: tuple[int, int], across: int, text: Any, **others: Any) -> Any:
        """With an encoder of the sizes `_SIZES` that reads tiles of so many pixels in patches of so many."""
        config, vision_config = (getattr(transformers, part) for part in cls.parts)
        sizes = dict(zip(_SIZES, vision, strict=True))
        encoder = vision_config(**sizes, image_size=tile[0], patch_size=tile[1])
        return config(vision_config=encoder, text_config=text, scale_factor=across, **others)

    @classmethod
    def visual(cls, config: Any, size: tuple[int, int], images: int = 1) -> Visual:
        """In as many tiles as the processors of the released checkpoints cut it in, a tag counted as one token."""
        side = config.vision_config.image_size
        rows, columns = split_grid((size[1], size[0]), side, MOST_ACROSS * side)
        tiles = tiles_in_line(rows * columns + 1, cls.geometry(config).num_patches)
        return dataclasses.replace(tiles, marks=2 * rows * columns + rows + 3)

    def __init__(self, model: nn.Module) -> None:
        """Locate the parts of a stock model."""
        inner: Any = model
        self.model = model
        self.size = self.geometry(inner.config)
        self.multimodal = inner.model
        self.embedding = inner.get_input_embeddings()
        self.vision = IdeficsTower(inner.model.vision_model, inner.config.scale_factor)
        self.text = self.decoder(inner.model.text_model)
        self._projector = inner.model.connector.modality_projection
        self._side: int = inner.config.vision_config.image_size
        self.image_token = inner.config.image_token_id

    @property
    def most_patches(self) -> int:
        """Those of the most tiles and of the whole."""
        return self.size.num_patches * (MOST_ACROSS**2 + 1)

    def visuals(self, inputs: dict[str, Any]) -> list[Visual]:
        """An image for each run of tiles that ends in the whole."""
        rows, given = self._read(inputs["input_ids"]), int(self._shown(inputs).sum())
        asked = sum(image.tiles for row in rows for image in row)
        repeats = max(1, asked // max(given, 1))  # rows of beams share their images
        own = [image.tiles for row in rows[::repeats] for image in row]
        if sum(own) != given:
            raise InputError(
                f"the prompt has the image slots of {asked} tiles, and pixel_values {given}; "
                "build prompt and pixel_values with the model's processor"
            )
        return [tiles_in_line(tiles, self.size.num_patches) for tiles in own]

    def _read(self, ids: Tensor) -> list[list[Tagged]]:
        return [read_tagged(row, self.image_token, self.size.num_patches) for row in ids.tolist()]

    def _shown(self, inputs: dict[str, Any]) -> Tensor:
        """(rows, tiles) bool: those that do not fill up a batch. Raises `InputError` for tiles with padding."""
        pixels, mask, side = inputs["pixel_values"], inputs.get("pixel_attention_mask"), self._side
        if pixels.dim() != 5 or pixels.shape[-2:] != (side, side):
            raise InputError(
                f"pixel_values of shape {tuple(pixels.shape)} are no tiles of {self.name}, (prompts, tiles, 3, {side}, "
                f"{side}); pass images as the model's processor resizes and splits them"
            )
        shown: Tensor = (pixels != 0).flatten(2).any(dim=2)
        if mask is not None:
            if mask.shape != (*pixels.shape[:2], side, side):
                raise InputError(
                    f"pixel_attention_mask of shape {tuple(mask.shape)} does not fit pixel_values of shape "
                    f"{tuple(pixels.shape)}; pass both as the model's processor gives them"
                )
            seen = nn.functional.max_pool2d(mask.float(), self.size.patch_size).flatten(2).amin(dim=2) > 0
            if (shown & ~seen).any():
                raise InputError(
                    "pixel_attention_mask hides patches of an image's tile; tiles without padding can be pruned: "
                    "pass images as the model's processor resizes and splits them"
                )
        return shown

    def tiles(self, inputs: dict[str, Any], visuals: Sequence[Visual]) -> list[Tensor]:
        """The tiles of each image, without those that fill up a batch."""
        pixels = inputs["pixel_values"].flatten(0, 1)
        return list(pixels[(pixels != 0).flatten(1).any(dim=1)].split([len(visual.tiles) for visual in visuals]))

    def framing(self, ids: Tensor) -> Tensor:
        """Marks, tags and newlines around tiles."""
        found = torch.zeros(ids.shape, dtype=torch.bool)
        for row, images in enumerate(self._read(ids)):
            for image in images:
                found[row, image.columns.start : image.columns.stop] = True
        return found

    def project(self, features: Tensor) -> Tensor:
        """The post layer norm, and the only matrix, of the patches of each square side by side."""
        features = self.vision.normalise(features)
        return super().project(features.reshape(len(features), -1, self.size.unit * features.shape[2]))

    @classmethod
    def process(cls, processor: Any, texts: Sequence[str], pictures: Sequence[Sequence[Any]]) -> Any:
        """As the stock processor makes them, which wants a list of pictures for every prompt of a batch."""
        own = [list(some) for some in pictures] if any(map(len, pictures)) else None
        return processor(images=own, text=list(texts), padding=len(texts) > 1, return_tensors="pt")

    @classmethod
    def tiny_pictures(cls, **sizes: dict[str, int]) -> Any:
        """The stock image processor."""
        raise NotImplementedError

    @classmethod
    def tiny(cls, seed: int = 0) -> tuple[nn.Module, Any]:
        """Up to four tiles beside the whole; 5 encoder and 8 decoder layers."""
        side, across = cls.tiny_sizes
        marks = {tag.strip("<>"): tag for tag in ("<fake_token_around_image>", "<end_of_utterance>", *cls.tags)}
        processor = transformers.Idefics3Processor(
            cls.tiny_pictures(size={"longest_edge": 2 * side}, max_image_size={"longest_edge": side}),
            tiny_tokenizer(**marks),
            image_seq_len=(side // 4 // across) ** 2,
            chat_template=CHAT_TEMPLATE,
        )
        tokenizer = processor.tokenizer
        image = tokenizer.convert_tokens_to_ids(IMAGE)
        text = tiny_llama(tokenizer)
        config = cls.config((32, 64, 5, 2), (side, 4), across, text, image_token_id=image, tie_word_embeddings=False)
        with torch.random.fork_rng():
            model = settle(getattr(transformers, cls.model_class)(config), tokenizer, seed)
        return model, processor
