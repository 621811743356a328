"""Everything that a pruner could leave behind in a model or in the libraries, and what of it differs."""

from __future__ import annotations

import importlib
from collections import OrderedDict
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import ivtp.plug  # noqa: F401  # adds its own attention kernel to the shared table once, when it is imported

SHARED = (
    "transformers.cache_utils",
    "transformers.masking_utils",
    "transformers.generation.utils",
    "transformers.modeling_utils",
    "torch.nn.functional",
)
"""Library modules whose classes and functions no pruner may replace for good, beside those of the model's classes."""


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Attributes, hooks, classes, configs, shared library state."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[f"{name}.__class__"] = type(module)
        # a plain tensor is no weight, but what the stock model remembers of its last call, and makes anew each time
        found[f"{name}.__dict__"] = {
            key: value.tolist() if type(value) is Tensor else _freeze(value) for key, value in vars(module).items()
        }
        for base in type(module).__mro__:
            found[f"{base.__module__}.{base.__qualname__}"] = {
                k: id(v) for k, v in vars(base).items() if k != "__doc__"
            }
        for attribute in ("config", "generation_config"):
            if hasattr(module, attribute):
                found[f"{name}.{attribute}"] = repr(vars(getattr(module, attribute)))
    for name in sorted({*SHARED, *(type(m).__module__ for m in model.modules())}):
        library = importlib.import_module(name)
        found[name] = {k: id(v) for k, v in vars(library).items() if callable(v)}
        for klass in (v for v in vars(library).values() if isinstance(v, type)):
            found[f"{name}.{klass.__name__}"] = {k: id(v) for k, v in vars(klass).items() if callable(v)}
    found["attention"] = {key: id(ALL_ATTENTION_FUNCTIONS[key]) for key in ALL_ATTENTION_FUNCTIONS.valid_keys()}
    return found


def difference(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of what is not as it was."""
    return [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]


def _freeze(value: Any) -> Any:
    if isinstance(value, dict | OrderedDict):
        return {key: _freeze(inner) for key, inner in value.items()}
    if isinstance(value, bool | int | float | str | None):
        return value
    return id(value)
