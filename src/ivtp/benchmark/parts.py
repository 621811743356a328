"""Where the time of a prefill goes, by hooks on the model's own modules, outside the code of this library."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from ivtp.hosts.base import Host

PARTS = ("vision_ms", "between_ms", "decoder_ms", "rest_ms")
"""They follow one another and add up to the whole call: until the encoder's last layer is done (reading the prompt
included); projector, guide and embeddings; the decoder; shortening the cache and the head."""


def time_parts(host: Host, prefill: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of each part of one prefill, and of the attention of the first decoder layer (`attention_ms`).

    On CUDA by events on the device's own time line, so that the host need not wait at every part.
    """
    device: torch.device = next(host.model.parameters()).device
    marks: dict[str, Any] = {}

    def mark(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            marks[name] = _moment(device)

        return hook

    attention = host.text.attention(0)
    hooks = [
        host.vision.layers[-1].register_forward_hook(mark("encoded")),
        host.text.module.register_forward_pre_hook(mark("decoding")),
        host.text.module.register_forward_hook(mark("decoded")),
        attention.register_forward_pre_hook(mark("attending")),
        attention.register_forward_hook(mark("attended")),
    ]
    try:
        mark("began")()
        prefill()
        mark("ended")()
    finally:
        for handle in hooks:
            handle.remove()
    edges = ("began", "encoded", "decoding", "decoded", "ended")
    spans = {part: (edges[i], edges[i + 1]) for i, part in enumerate(PARTS)}
    spans["attention_ms"] = ("attending", "attended")
    return {name: _between(marks[start], marks[end]) for name, (start, end) in spans.items()}


def _moment(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return float(end - start) * 1000
    end.synchronize()
    return float(start.elapsed_time(end))
