"""What Qwen2-VL and its successors share: images of any size, a merger of four patches, positions on three axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ivtp.errors import InputError
from ivtp.hosts.base import Host, Visual
from ivtp.hosts.tiny import CHAT_TEMPLATE, IMAGE, for_images, settle, tiny_llama, tiny_tokenizer
from ivtp.plan import Geometry
from ivtp.stock import grid_positions, later_positions, whole_blocks
from ivtp.towers.llama import QwenTextTower
from ivtp.towers.qwen_like import QwenVisionTower

MOST = 16384
"""Tokens of the largest image, as the released checkpoints' processors scale them."""
STRIP = 200
"""Long over short side of an image that they take at most."""


_AROUND = ("<|vision_start|>", "<|vision_end|>")
_TEXT = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
)


class QwenLike(Host):
    """A tower that reads the patches of each image by themselves, its merger, and a decoder with Llama's layers."""

    tower: ClassVar[type[QwenVisionTower]] = QwenVisionTower
    """The kind of its vision tower."""
    fewest: ClassVar[int] = 4
    """Tokens of the smallest image, as the released checkpoints' processors scale them."""
    parts: ClassVar[tuple[str, str]]
    """Names of the stock config and of the stock processor."""
    hub = "Qwen/{}"
    media = ("pixel_values", "image_grid_thw")
    unread = ("pixel_values_videos", "video_grid_thw")
    generate_reads = True
    gives = frozenset()

    @classmethod
    def matches(cls, config: Any) -> bool:
        """A config of this family."""
        return getattr(config, "model_type", None) == cls.name

    @classmethod
    def geometry(cls, config: Any) -> Geometry:
        """Sizes of the model, and of an image of 1280 tokens, the most of transformers' own processor."""
        vision: dict[str, Any] = cls.tower.sizes(config.vision_config)
        text: dict[str, Any] = QwenTextTower.sizes(config.text_config)
        return Geometry(
            name=str(getattr(config, "name_or_path", "") or cls.name),
            num_patches=1280,
            vision_layers=vision["vision_depth"],
            any_size=True,
            projector_width=vision["unit"] * vision["vision_hidden"],
            **vision,
            **text,
        )

    @classmethod
    def tiny_vision(cls) -> dict[str, Any]:
        """The config of the encoder of `tiny`, of 5 layers."""
        raise NotImplementedError

    @classmethod
    def tiny(cls, seed: int = 0) -> tuple[nn.Module, Any]:
        """Images of 16 to 48 tokens of four patches; 5 encoder and 8 decoder layers."""
        import transformers

        tokenizer = tiny_tokenizer(IMAGE, vision_start_token=_AROUND[0], vision_end_token=_AROUND[1])
        start, end = tokenizer.convert_tokens_to_ids(list(_AROUND))
        text = tiny_llama(tokenizer).to_dict()
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}
        config = getattr(transformers, cls.parts[0])(
            vision_config=cls.tiny_vision(),
            text_config={name: text[name] for name in _TEXT} | {"rope_parameters": rope},
            image_token_id=tokenizer.image_token_id,
            video_token_id=len(tokenizer) - 1,
            vision_start_token_id=start,
            vision_end_token_id=end,
        )
        with torch.random.fork_rng():
            model = settle(getattr(transformers, cls.model_class)(config), tokenizer, seed)
        return model, _tiny_processor(getattr(transformers, cls.parts[1]), tokenizer)

    def __init__(self, model: nn.Module) -> None:
        """Locate the parts of a stock model."""
        inner: Any = model
        self.model = model
        self.size = self.geometry(inner.config)
        self.multimodal = inner.model
        self.embedding = inner.get_input_embeddings()
        self.vision = self.tower(inner.model.visual)
        self.text = QwenTextTower(inner.model.language_model)
        self.image_token = inner.config.image_token_id

    @classmethod
    def visual(cls, config: Any, size: tuple[int, int], images: int = 1) -> Visual:
        """Scaled to whole units, of `fewest` to 16384 in all, as the released checkpoints' processors do."""
        side = config.vision_config.patch_size * config.vision_config.spatial_merge_size
        (width, height), most = size, max(size) / min(size)
        if most > STRIP:
            raise InputError(f"an image of {width} x {height} pixels is a strip; crop it to at most {STRIP} : 1")
        rows, columns = (length // side for length in whole_blocks((height, width), side, cls.fewest, MOST))
        return cls.in_units(config, (rows, columns))

    @classmethod
    def in_units(cls, config: Any, grid: tuple[int, int]) -> Visual:
        """An image of `grid` (rows, columns) of units."""
        every = torch.arange(grid[0] * grid[1])
        return Visual((grid,), every, every[None], windowed=cls.tower.windowed(config.vision_config, grid))

    @property
    def most_patches(self) -> int:
        """Those of the largest image that the released checkpoints' processors hand over."""
        return MOST

    def visuals(self, inputs: dict[str, Any]) -> list[Visual]:
        """The units of each grid, in raster order."""
        grids, pixels = self._grids(inputs), inputs["pixel_values"]
        merge = math.isqrt(self.size.unit)
        if sum(rows * columns for rows, columns in grids) != len(pixels):
            raise InputError(
                f"pixel_values of shape {tuple(pixels.shape)} do not fit {len(grids)} images of image_grid_thw; "
                "pass both as the processor gives them"
            )
        config: Any = self.model.config
        return [self.in_units(config, (rows // merge, columns // merge)) for rows, columns in grids]

    def _grids(self, inputs: dict[str, Any]) -> list[tuple[int, int]]:
        """(rows, columns) of the patches of each image."""
        given = inputs.get("image_grid_thw")
        if given is None:
            raise InputError("images of this model need their image_grid_thw; pass all that the processor gives")
        grids: list[list[int]] = given.tolist()
        if any(time != 1 for time, _, _ in grids):
            raise InputError(f"image_grid_thw={grids} holds a video; of {self.name} images alone can be pruned")
        return [(rows, columns) for _, rows, columns in grids]

    def tiles(self, inputs: dict[str, Any], visuals: Sequence[Visual]) -> list[Tensor]:
        """The patches of each image, (1, rows, columns, patches of a unit, pixels of a patch)."""
        own = inputs["pixel_values"].split([visual.patches * self.size.unit for visual in visuals])
        return [part.view(1, *visual.grids[0], self.size.unit, -1) for part, visual in zip(own, visuals, strict=True)]

    def positions(self, inputs: dict[str, Any], ids: Tensor, mask: Tensor | None, past: int = 0) -> Tensor | None:
        """On three axes, as the stock model has them: by row and column in an image, and one behind its largest."""
        given: Tensor | None = inputs.get("position_ids")
        if given is not None:
            return given[-3:] if given.dim() == 3 else given
        if past:
            columns = torch.arange(past, past + ids.shape[1], device=ids.device).expand_as(ids)
            counted = columns if mask is None else (mask.long().cumsum(dim=1) - 1)[:, past:]
            return later_positions(self.multimodal, counted)
        return grid_positions(self.multimodal, ids, mask, inputs["image_grid_thw"].cpu(), self.image_token)

    def project(self, features: Tensor) -> Tensor:
        """The merger: a norm, and two linear layers over the features of a unit."""
        inner: Any = self.multimodal
        merged: Tensor = inner.visual.merger(features.flatten(0, 1))
        return merged.view(len(features), -1, merged.shape[-1])

    def default_clip(self) -> str | None:
        """None: its tower is no CLIP's."""
        return None


def _tiny_processor(kind: Any, tokenizer: Any) -> Any:
    """Of patches of 4 x 4 pixels."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    limits = {"shortest_edge": 16 * 64, "longest_edge": 48 * 64}
    images = Qwen2VLImageProcessorPil(size=limits, patch_size=4, merge_size=2)
    template = CHAT_TEMPLATE.replace(f"{IMAGE}\n", f"{_AROUND[0]}{IMAGE}{_AROUND[1]}")
    return for_images(kind)(images, tokenizer, chat_template=template)
