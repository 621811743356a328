"""Qwen2-VL's vision encoder: patches of one image of any size, turned by their row and column."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ivtp.core.select import on_device
from ivtp.errors import InputError, UnsupportedModelError
from ivtp.stock import kernel_name, patch_places
from ivtp.towers.base import VisionTower


class QwenVisionTower(VisionTower):
    """A `Qwen2VisionTransformerPretrainedModel`, whose merger is the projector; every layer sees the whole image."""

    flat = True
    kinds: ClassVar[tuple[str, ...]] = ("qwen2_vl_vision", "qwen2_vl")
    """What its config calls itself, in old checkpoints like the whole model."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.layers = module.blocks  # type: ignore[assignment]  # nn.Module attributes are untyped
        self.config: Any = module.config

    @property
    def projectors(self) -> tuple[nn.Module, ...]:
        """The merger."""
        module: Any = self.module
        return (module.merger,)

    @classmethod
    def sizes(cls, config: Any) -> dict[str, Any]:
        """All but `num_patches`, which are those of an image."""
        if config.model_type not in cls.kinds:
            raise UnsupportedModelError(f"the vision tower is a {config.model_type!r}; a {cls.kinds[0]} can be pruned")
        return {
            "patch_size": config.patch_size,
            "patch_frames": config.temporal_patch_size,
            "unit": config.spatial_merge_size**2,
            "vision_depth": config.depth,
            "vision_heads": config.num_heads,
            "vision_cls": 0,
            **cls._widths(config),
        }

    @classmethod
    def windowed(cls, config: Any, grid: tuple[int, int]) -> int | None:
        """Of an image of `grid` units, the pairs of these that see each other in windows; None without windows."""
        return None

    @classmethod
    def _widths(cls, config: Any) -> dict[str, Any]:
        return {"vision_hidden": config.embed_dim, "vision_mlp": int(config.embed_dim * config.mlp_ratio)}

    def attention(self, layer: int) -> nn.Module:
        """`attn`."""
        return self.layers[layer].attn  # type: ignore[return-value]  # nn.Module attributes are untyped

    def attend(self, layer: int, hidden: Tensor, *args: Any, bias: Tensor | None = None, **kwargs: Any) -> Tensor:
        """As in the stock layer, of (T, D)."""
        if bias is not None:
            raise InputError("this encoder cannot weigh merged tokens by their size; use another method")
        block: Any = self.layers[layer]
        return hidden + block.attn(block.norm1(hidden), *args, **kwargs)  # type: ignore[no-any-return]

    def feed_forward(self, layer: int, hidden: Tensor) -> Tensor:
        """As in the stock layer."""
        block: Any = self.layers[layer]
        return hidden + block.mlp(block.norm2(hidden))  # type: ignore[no-any-return]

    def cut_positions(self, kwargs: dict[str, Any], index: Tensor) -> dict[str, Any]:
        """The turns of its tokens, and how many there are."""
        length = index.shape[1]
        return {
            "position_embeddings": tuple(part[index[0]] for part in kwargs["position_embeddings"]),
            "cu_seqlens": kwargs["cu_seqlens"].clamp_max(length),
            "max_seqlen": length,
        }

    def run(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """The layers over one image (1, rows, columns, unit, pixels of a patch); the mean of them is what is pooled."""
        hidden, turn = self.begin(pixel_values)
        seen = self.ends([0, len(hidden)], hidden.device)
        for layer in self.layers:
            hidden = layer(hidden, position_embeddings=turn, **seen)
        return hidden.mean(dim=0, keepdim=True), hidden.unsqueeze(0)

    def grid(self, pixel_values: Tensor) -> tuple[int, int]:
        """Rows and columns of the patches of an image."""
        merge = self.config.spatial_merge_size
        return merge * pixel_values.shape[1], merge * pixel_values.shape[2]

    def begin(self, pixel_values: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The embedded patches (T, D) of an image, and their turns, cosines and sines (T, d)."""
        module: Any = self.module
        hidden = module.patch_embed(pixel_values.flatten(0, -2))
        places = patch_places(*self.grid(pixel_values), self.config.spatial_merge_size)
        return hidden, module.rotary_pos_emb(hidden, on_device(places, hidden.device))

    def ends(self, ends: list[int], device: torch.device) -> dict[str, Any]:
        """Where sequences begin and end for a layer; the host reads it, and FlashAttention the device."""
        bounds = torch.tensor(ends, dtype=torch.int32)
        longest = int((bounds[1:] - bounds[:-1]).max())
        fused = "flash" in kernel_name(self.config)
        return {"cu_seqlens": bounds.to(device) if fused else bounds, "max_seqlen": longest}

    def normalise(self, hidden: Tensor) -> Tensor:
        """The norm in front of the merger."""
        module: Any = self.module
        return module.merger.ln_q(hidden)  # type: ignore[no-any-return]
