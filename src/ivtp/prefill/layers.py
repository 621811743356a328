"""A layer's forward with a cut in it, where a hook cannot reach: the residual is local."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ivtp.hosts.base import CACHE_NAMES, Host
from ivtp.methods.base import Cut
from ivtp.prefill.run import Prefill


def cut_layer(
    host: Host, layer: nn.Module, cut: Cut, slot: str, running: Callable[[], Prefill | None]
) -> Callable[..., Any]:
    """The forward of `layer`, kept at its attribute `slot`, with a cut behind it or between attention and MLP.

    `running` gives the prefill that the calling thread is in; without one the stock forward runs.
    """
    stock = getattr(layer, slot)

    @functools.wraps(stock)
    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        prefill = running()
        if prefill is None or not prefill.runs(cut.where):
            return stock(hidden, *args, **kwargs)
        if layer.training and getattr(layer, "gradient_checkpointing", False):
            # the checkpointed layers around this one drop the cache as well
            without = {name: None for name in CACHE_NAMES if name in kwargs}
            kwargs = {**kwargs, "use_cache": False, **without}
        if cut.place == "behind":
            output = stock(hidden, *args, **kwargs)
            first = output[0] if isinstance(output, tuple) else output
            if cut.peek:
                prefill.peek(cut, first, kwargs)
            left = prefill.cut(cut, first)
            return (left, *output[1:]) if isinstance(output, tuple) else left
        hidden = host.attend(cut.where, layer, hidden, *args, bias=prefill.bias(cut), **kwargs)
        return host.feed_forward(cut.where, layer, prefill.cut(cut, hidden))

    return forward
