"""CLIP's vision encoder: pre-norm layers of full attention, a CLS token in front."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ivtp.errors import InputError, UnsupportedModelError
from ivtp.stock import kernel_name
from ivtp.towers.base import VisionTower


class ClipTower(VisionTower):
    """A `CLIPVisionModel`; its pooler is the post layer norm of the last layer's CLS."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        inner: Any = getattr(module, "vision_model", module)
        self.layers = inner.encoder.layers
        self._post_norm = inner.post_layernorm

    @classmethod
    def sizes(cls, config: Any) -> dict[str, int]:
        """All of one square image."""
        if config.model_type != "clip_vision_model":
            raise UnsupportedModelError(
                f"the vision tower is a {config.model_type!r}; LLaVA with a clip_vision_model can be pruned"
            )
        return {
            "num_patches": (config.image_size // config.patch_size) ** 2,
            "patch_size": config.patch_size,
            "vision_depth": config.num_hidden_layers,
            "vision_hidden": config.hidden_size,
            "vision_mlp": config.intermediate_size,
            "vision_heads": config.num_attention_heads,
            "vision_cls": 1,
        }

    def run(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """The whole tower."""
        output = self.module(pixel_values, return_dict=True)
        return output.pooler_output, output.last_hidden_state

    def normalise(self, hidden: Tensor) -> Tensor:
        """CLIP's post layer norm."""
        return self._post_norm(hidden)  # type: ignore[no-any-return]

    def attention(self, layer: int) -> nn.Module:
        """`self_attn`."""
        return self.layers[layer].self_attn  # type: ignore[return-value]  # nn.Module attributes are untyped

    def attend(self, layer: int, hidden: Tensor, *args: Any, bias: Tensor | None = None, **kwargs: Any) -> Tensor:
        """As in CLIPEncoderLayer, which hands its mask over by position; images have none of their own."""
        block: Any = self.layers[layer]
        if args:
            kwargs["attention_mask"] = args[0]
        if bias is not None:
            kwargs["attention_mask"] = self._checked(bias).to(hidden.dtype)
        attended, _ = block.self_attn(hidden_states=block.layer_norm1(hidden), **kwargs)
        return hidden + attended  # type: ignore[no-any-return]

    def _checked(self, bias: Tensor) -> Tensor:
        if "flash" in kernel_name(self.module.config):
            raise InputError(
                "FlashAttention cannot weigh merged tokens by their size; load the model with "
                'attn_implementation={"vision_config": "sdpa"}'
            )
        return bias

    def feed_forward(self, layer: int, hidden: Tensor) -> Tensor:
        """As in CLIPEncoderLayer."""
        block: Any = self.layers[layer]
        return hidden + block.mlp(block.layer_norm2(hidden))  # type: ignore[no-any-return]
