"""Vision encoders of pre-norm layers with full attention, as CLIP's and SigLIP's are."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from ivtp.errors import InputError
from ivtp.stock import kernel_name
from ivtp.towers.base import VisionTower


def square_image(config: Any) -> dict[str, int]:
    """The fields of `Geometry` that a tower's config tells of one square image and the layers that read it."""
    return {
        "num_patches": (config.image_size // config.patch_size) ** 2,
        "patch_size": config.patch_size,
        "vision_depth": config.num_hidden_layers,
        "vision_hidden": config.hidden_size,
        "vision_mlp": config.intermediate_size,
        "vision_heads": config.num_attention_heads,
    }


def in_squares(patches: Tensor, across: int) -> Tensor:
    """The patches (I, N, D) of square images, those of each square of `across` x `across` behind each other."""
    squares = math.isqrt(patches.shape[1]) // across
    grid = patches.view(len(patches), squares, across, squares, across, patches.shape[2])
    return grid.transpose(2, 3).flatten(1, 4)


def weighable(module: nn.Module, bias: Tensor) -> Tensor:
    """`bias` as it is. Raises `InputError` where the kernel of an encoder cannot add it to its logits."""
    config: Any = module.config
    if "flash" in kernel_name(config):
        raise InputError(
            "FlashAttention cannot weigh merged tokens by their size; load the model with "
            'attn_implementation={"vision_config": "sdpa"}'
        )
    return bias


class PreNormTower(VisionTower):
    """Layers of `layer_norm1`, `self_attn`, `layer_norm2` and `mlp`, with a post layer norm behind the last."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        inner: Any = getattr(module, "vision_model", module)
        self.layers = inner.encoder.layers
        self._post_norm = inner.post_layernorm

    def normalise(self, hidden: Tensor) -> Tensor:
        """The post layer norm."""
        return self._post_norm(hidden)  # type: ignore[no-any-return]

    def attention(self, layer: int) -> nn.Module:
        """`self_attn`."""
        return self.layers[layer].self_attn  # type: ignore[return-value]  # nn.Module attributes are untyped

    def attend(self, layer: int, hidden: Tensor, *args: Any, bias: Tensor | None = None, **kwargs: Any) -> Tensor:
        """As in the stock layer, which is handed its mask by position; images have none of their own."""
        block: Any = self.layers[layer]
        if args:
            kwargs["attention_mask"] = args[0]
        if bias is not None:
            kwargs["attention_mask"] = weighable(self.module, bias).to(hidden.dtype)
        attended, _ = block.self_attn(hidden_states=block.layer_norm1(hidden), **kwargs)
        return hidden + attended  # type: ignore[no-any-return]

    def feed_forward(self, layer: int, hidden: Tensor) -> Tensor:
        """As in the stock layer."""
        block: Any = self.layers[layer]
        return hidden + block.mlp(block.layer_norm2(hidden))  # type: ignore[no-any-return]
