"""See the queries, keys and values of a layer without changing its attention kernel."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn
from transformers import AttentionInterface

from ivtp.stock import kernel, set_kernel

Sink = Callable[[Tensor, Tensor, Tensor, float], None]

_NAME = "ivtp_probe"


class AttentionProbe:
    """Hands what one attention module computes to a `sink(query, key, value, scale)`, then runs the real kernel.

    Transformers' attention modules choose their kernel by `self.config`; the probe puts a copy of that config there
    which names a passing-through kernel. Rotary positions, adapters and quantised projections are thereby included.
    SDPA, FlashAttention and eager all stay what they were. `insert` puts the probe in, `remove` the original back.
    Kernels run on a view of the module that has its own config, so that threads which share the module do not meet.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = cast(Any, module)
        self.sink: Sink = _nothing
        self.original: Any = None
        self.tapped: Any = None
        self.view: Any = None

    def insert(self, sink: Sink) -> None:
        """Put the copy in; it is made once, as long as the module keeps its config. In twice it is in once."""
        self.sink = sink
        if self.module.config is self.tapped:
            return
        if self.original is not self.module.config:
            self.original = self.module.config
            self.tapped = copy.copy(self.original)
            set_kernel(self.tapped, _NAME)
            self.tapped.ivtp_probe = self
        self.view = copy.copy(self.module)  # some kernels read their own name from the module's config
        self.module.config = self.tapped

    def remove(self) -> None:
        """Put the module's own config back; does nothing where it is."""
        if self.module.config is self.tapped:
            self.module.config = self.original
            self.view, self.sink = None, _nothing


def _nothing(query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
    """Sees what an attention module computes while nobody asks."""


def _pass_through(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    config = module.config
    probe: AttentionProbe | None = getattr(config, "ivtp_probe", None)  # None: removed while another thread was here
    if probe is not None:
        probe.sink(query, key, value, kwargs.get("scaling") or query.shape[-1] ** -0.5)
        config, module = probe.original, probe.view or module
    return kernel(module, config)(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(_NAME, _pass_through)
