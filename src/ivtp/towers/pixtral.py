"""Pixtral's vision encoder: patches of one image of any size, turned by their row and column."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from ivtp.core.select import on_device
from ivtp.errors import UnsupportedModelError
from ivtp.stock import patch_places
from ivtp.towers.base import VisionTower
from ivtp.towers.pre_norm import weighable


class PixtralTower(VisionTower):
    """A `PixtralVisionModel`; every layer sees the whole image, and there is no norm behind the last."""

    flat = True
    kind: ClassVar[str] = "pixtral"
    """What its config calls itself."""

    def __init__(self, module: nn.Module, merge: int = 1) -> None:
        """`merge` x `merge` patches, which a projector makes one token of, lie behind each other in the layers."""
        self.module = module
        self.layers = module.transformer.layers  # type: ignore[assignment, union-attr]  # nn.Module is untyped
        self._merge = merge

    @classmethod
    def sizes(cls, config: Any) -> dict[str, Any]:
        """Of the largest image, a square."""
        if config.model_type != cls.kind:
            raise UnsupportedModelError(f"the vision tower is a {config.model_type!r}; a {cls.kind} can be pruned")
        return {
            "num_patches": (-(-config.image_size // config.patch_size)) ** 2,
            "patch_size": config.patch_size,
            "vision_depth": config.num_hidden_layers,
            "vision_hidden": config.hidden_size,
            "vision_mlp": config.intermediate_size,
            "vision_mlp_matrices": 3,
            "vision_heads": config.num_attention_heads,
            "vision_cls": 0,
            "any_size": True,
        }

    def attention(self, layer: int) -> nn.Module:
        """`attention`."""
        return self.layers[layer].attention  # type: ignore[return-value]  # nn.Module attributes are untyped

    def attend(self, layer: int, hidden: Tensor, *args: Any, bias: Tensor | None = None, **kwargs: Any) -> Tensor:
        """As in the stock layer, of (1, T, D), which is handed its mask by position."""
        block: Any = self.layers[layer]
        if args:
            kwargs["attention_mask"] = args[0]
        if bias is not None:
            kwargs["attention_mask"] = weighable(self.module, bias).to(hidden.dtype)
        attended, _ = block.attention(hidden_states=block.attention_norm(hidden), **kwargs)
        return hidden + attended  # type: ignore[no-any-return]

    def feed_forward(self, layer: int, hidden: Tensor) -> Tensor:
        """As in the stock layer."""
        block: Any = self.layers[layer]
        return hidden + block.feed_forward(block.ffn_norm(hidden))  # type: ignore[no-any-return]

    def cut_positions(self, kwargs: dict[str, Any], index: Tensor) -> dict[str, Any]:
        """The turns of its tokens."""
        return {"position_embeddings": tuple(part[index[0]] for part in kwargs["position_embeddings"])}

    def run(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """The layers over one image (1, 3, H, W); the mean of its patches is what is pooled."""
        module: Any = self.module
        embedded = module.patch_conv(pixel_values.to(module.patch_conv.weight.dtype))  # (1, D, rows, columns)
        rows, columns = embedded.shape[-2:]
        places = on_device(patch_places(rows, columns, self._merge), embedded.device)  # (T, 2)
        hidden = module.ln_pre(embedded[:, :, places[:, 0], places[:, 1]].mT)
        turn = module.patch_positional_embedding(hidden, places)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=None, position_embeddings=turn)
        return hidden.mean(dim=1), hidden

    def normalise(self, hidden: Tensor) -> Tensor:
        """As it is: there is no norm."""
        return hidden
