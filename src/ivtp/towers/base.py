"""What a stack of layers has to tell: where its attention is, and how a layer falls into two halves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.cache_utils import Cache


class Tower:
    """The layers of a vision encoder or a decoder. A subclass finds them in `__init__`; nothing changes the model."""

    module: nn.Module
    """The module that runs them, as the model calls it."""
    layers: nn.ModuleList

    @classmethod
    def sizes(cls, config: Any) -> dict[str, int]:
        """The fields of `Geometry` that the tower's own transformers config tells.

        Raises `UnsupportedModelError` for layers that do not fall into the halves of this tower.
        """
        raise NotImplementedError

    def attention(self, layer: int) -> nn.Module:
        """The attention module of a layer; it chooses its kernel by its `config` attribute."""
        raise NotImplementedError

    def attend(self, layer: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """First half of a layer: normalisation, attention, residual; the arguments are those of the stock layer."""
        raise NotImplementedError

    def feed_forward(self, layer: int, hidden: Tensor) -> Tensor:
        """Second half of a layer: normalisation, MLP, residual."""
        raise NotImplementedError


class VisionTower(Tower):
    """A vision encoder; its layers go on behind the one that feeds the projector."""

    flat: ClassVar[bool] = False
    """Whether it reads one image at a time, and its layers take (T, D), or (1, T, D), and where these tokens are."""

    @property
    def projectors(self) -> tuple[nn.Module, ...]:
        """Modules in it that are the projector's, where that is no module of its own."""
        return ()

    def attend(self, layer: int, hidden: Tensor, *args: Any, bias: Tensor | None = None, **kwargs: Any) -> Tensor:
        """As `Tower.attend`; `bias` (B, 1, 1, T) is added to the logits. Raises `InputError` where a kernel cannot."""
        raise NotImplementedError

    def run(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Run it on tiles; returns what it pools of its last layer (I, D) and that layer's output (I, T, D)."""
        raise NotImplementedError

    def cut_positions(self, kwargs: dict[str, Any], index: Tensor) -> dict[str, Any]:
        """Those of a `flat` layer's keyword arguments that say where its tokens are, of the columns `index` (1, T')."""
        raise NotImplementedError

    def order(self, pixel_values: Tensor) -> Tensor | None:
        """Where in the sequence of its layers the tokens of an image are, in the order of its patches: (T,).

        None: as they come.
        """
        return None

    def normalise(self, hidden: Tensor) -> Tensor:
        """The post layer norm of (..., D)."""
        raise NotImplementedError


class TextTower(Tower):
    """A decoder: its layers also take masks and positions, which are cut as the tokens are."""

    window: int | None = None
    """Tokens, the last one included, of which some layers see no earlier one; None: all see all that stand before."""

    @property
    def softcap(self) -> float | None:
        """`AttentionTap.softcap` of its layers, as their kernel computes them."""
        return None

    def final_norm(self, hidden: Tensor) -> Tensor:
        """The norm of (..., D) behind the last layer."""
        raise NotImplementedError

    def cut_positions(self, kwargs: dict[str, Any], index: Tensor) -> dict[str, Any]:
        """Those of a layer's keyword arguments that say where its tokens are, of the columns `index` (B, T') alone."""
        raise NotImplementedError

    def rotary(self, layer: int) -> int:
        """The same number for layers that turn their tokens by the same rotary embeddings."""
        return 0

    def positions(self, layer: int, hidden: Tensor, position: Tensor) -> dict[str, Any]:
        """The arguments of `cut_positions` for tokens (B, T, D) at `position` (B, T), where `rotary` tells several."""
        return {}

    def turn_back(self, key: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """Keys (B, H, T, d) of a layer, all turned back by the rotary embedding of one position of each row.

        `turn` are its cosines and sines, both (B, 1, d).
        """
        raise NotImplementedError

    def causal_mask(
        self,
        hidden: Tensor,
        valid: Tensor | None,
        visible: Callable[..., Tensor] | None = None,
        cache: Cache | None = None,
        blocks: Tensor | None = None,
    ) -> Any:
        """The decoder's own mask for `hidden` (B, T, D) behind `cache`, with padding `valid` (B, cached + T).

        `visible(batch, head, query, key)` may hide more, and the columns of one of `blocks` (B, cached + T), -1: of
        none, see each other whatever their order. Raises `InputError` where a kernel without a mask is asked to.
        """
        raise NotImplementedError
