"""See the queries, keys and values of a layer without changing its attention kernel."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Sink = Callable[[Tensor, Tensor, Tensor, float], None]

_NAME = "ivtp_probe"


class AttentionProbe:
    """Hands what one attention module computes to `sink(query, key, value, scale)`, then runs the real kernel.

    Transformers' attention modules choose their kernel by `self.config`; the probe puts a copy of that config there
    which names a passing-through kernel. Rotary positions, adapters and quantised projections are thereby included.
    SDPA, FlashAttention and eager all stay what they were. `insert` puts the probe in, `remove` the original back.
    """

    def __init__(self, module: nn.Module, sink: Sink) -> None:
        self.module = cast(Any, module)
        self.sink: Sink = sink
        self.original: Any = None
        self.tapped: Any = None

    def insert(self) -> None:
        """Put the copy in; it is made once, as long as the module keeps its config."""
        if self.original is not self.module.config:
            self.original = self.module.config
            self.tapped = copy.copy(self.original)
            self.tapped._attn_implementation = _NAME
            self.tapped.ivtp_probe = self
        self.module.config = self.tapped

    def remove(self) -> None:
        """Put the module's own config back."""
        self.module.config = self.original

    def run_kernel(self, *args: Any, **kwargs: Any) -> Any:
        """The kernel that the model's config names at this moment."""
        eager = sys.modules[type(self.module).__module__].__dict__.get("eager_attention_forward")
        kernel = ALL_ATTENTION_FUNCTIONS.get_interface(self.original._attn_implementation, eager)
        attributes = self.module.__dict__  # past nn.Module's own __setattr__, which is slow
        attributes["config"] = self.original  # some kernels read their own name from it
        try:
            return kernel(self.module, *args, **kwargs)
        finally:
            attributes["config"] = self.tapped


def _pass_through(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    probe: AttentionProbe = module.config.ivtp_probe
    probe.sink(query, key, value, kwargs.get("scaling") or query.shape[-1] ** -0.5)
    return probe.run_kernel(query, key, value, attention_mask, **kwargs)


AttentionInterface.register(_NAME, _pass_through)
