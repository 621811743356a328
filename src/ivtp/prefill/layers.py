"""A layer's forward with a cut in it, where a hook cannot reach: the residual is local."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from ivtp.methods.base import Cut
from ivtp.stock import CACHE_NAMES, is_checkpointed
from ivtp.towers.base import Tower

Forward = Callable[..., Any]


class Cutter(Protocol):
    """What a cut layer asks of its stage."""

    tower: Tower

    def is_mine(self) -> bool:
        """Whether the calling thread is the one whose prefill this is."""

    def attend(self, cut: Cut, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The first half of the cut layer of (B, T, D), with the arguments of the layer."""

    def behind(self, layer: int, hidden: Tensor) -> Tensor:
        """What the model hands on of a layer's output (B, T, D)."""

    def cut(self, cut: Cut, hidden: Tensor) -> Tensor:
        """Cut (B, T, D) to (B, T', D), between attention and MLP or behind the layer."""

    def peek(self, cut: Cut, hidden: Tensor, arguments: dict[str, Any]) -> None:
        """See what the layer behind a cut computes of (B, T, D), with the arguments of the cut layer."""


def cut_layer(stage: Cutter, layer: nn.Module, cut: Cut, stock: Forward) -> Forward:
    """The `stock` forward of `layer` with a cut behind it or between attention and MLP; for other threads as it is."""

    @functools.wraps(stock)
    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not stage.is_mine():
            return stock(hidden, *args, **kwargs)
        if is_checkpointed(layer):
            # the checkpointed layers around this one drop the cache as well
            without = {"use_cache": False, **dict.fromkeys(CACHE_NAMES)}
            kwargs = {**kwargs, **{name: value for name, value in without.items() if name in kwargs}}
        if cut.place == "behind":
            output = stock(hidden, *args, **kwargs)
            first = stage.behind(cut.layer, output[0] if isinstance(output, tuple) else output)
            if cut.peek:
                stage.peek(cut, first, kwargs)
            left = stage.cut(cut, first)
            return (left, *output[1:]) if isinstance(output, tuple) else left
        hidden = stage.attend(cut, hidden, *args, **kwargs)
        return stage.tower.feed_forward(cut.layer, stage.cut(cut, hidden))

    return forward
