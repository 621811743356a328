"""The clock of both sides of `benchmarks/peers.md`. Needs torch alone, so that it runs in a peer's environment too."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def measure(prefill: Callable[[], Any], device: str, rounds: int = 20) -> dict[str, Any]:
    """Milliseconds of each of `rounds` prefills behind a first one that is not timed, and the most bytes of one.

    Bytes are what was allocated beyond what was held before, model and inputs; None elsewhere than on CUDA.
    """
    cuda = torch.device(device).type == "cuda"
    times: list[float] = []
    peak = None
    for number in range(1 + rounds):
        if cuda:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        began = time.perf_counter()
        prefill()
        if cuda:
            torch.cuda.synchronize(device)
            peak = torch.cuda.max_memory_allocated(device) - before
        if number:
            times.append(1000 * (time.perf_counter() - began))
    return {"prefill_ms": times, "peak_bytes": peak}


def write(
    file: str | Path,
    *,
    program: str,
    setting: dict[str, Any],
    full: dict[str, Any],
    pruned: dict[str, Any],
    kept: Iterable[int],
) -> None:
    """One side's file: `full` and `pruned` as `measure` gives them, `kept` the patches that stay, 0 first, by rows.

    `setting` is what should be the same on both sides: model, method, keep, image, question, prompt_tokens, dtype.
    """
    versions = {name: version(name) for name in ("torch", "transformers")}
    on_cuda = pruned["peak_bytes"] is not None
    device = torch.cuda.get_device_name() if on_cuda else platform.processor() or platform.machine()
    document = {"program": program, "setting": {**setting, **versions, "device": device}}
    document |= {"full": full, "pruned": pruned, "kept": sorted({int(patch) for patch in kept})}
    Path(file).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
