"""Instruction-guided visual token pruning for stock Hugging Face vision-language models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ivtp.config import PruneConfig
    from ivtp.cost.flops import flops
    from ivtp.cost.prefill import FlopsReport
    from ivtp.errors import IvtpError
    from ivtp.generate import Answer, ask, asking, load, prompt_for, save
    from ivtp.plug import Compression, Pruner, attach, compress, compression_of, detach, pruner_of
    from ivtp.registry import list_compressors, list_hosts, list_methods
    from ivtp.trace import PruneTrace, StageTrace, Word
    from ivtp.visualize import draw

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "Compression",
    "FlopsReport",
    "IvtpError",
    "PruneConfig",
    "PruneTrace",
    "Pruner",
    "StageTrace",
    "Word",
    "ask",
    "asking",
    "attach",
    "compress",
    "compression_of",
    "detach",
    "draw",
    "flops",
    "list_compressors",
    "list_hosts",
    "list_methods",
    "load",
    "prompt_for",
    "pruner_of",
    "save",
]

# torch and transformers take seconds to import; `ivtp --help` must not wait for them
_HOMES = {
    "config": ("PruneConfig",),
    "errors": ("IvtpError",),
    "cost.flops": ("flops",),
    "cost.prefill": ("FlopsReport",),
    "generate": ("Answer", "ask", "asking", "load", "prompt_for", "save"),
    "plug": ("Compression", "Pruner", "attach", "compress", "compression_of", "detach", "pruner_of"),
    "registry": ("list_compressors", "list_hosts", "list_methods"),
    "trace": ("PruneTrace", "StageTrace", "Word"),
    "visualize": ("draw",),
}


def __getattr__(name: str) -> Any:
    home = next((home for home, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module 'ivtp' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"ivtp.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
