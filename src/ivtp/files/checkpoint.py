"""Read checkpoints: whole and finite, or one clear line at once; and one at a time."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn

from ivtp.errors import LoadError, short_reason

LOADING = threading.RLock()
"""Held while transformers builds a model: it changes torch's default dtype for the whole process meanwhile, and two
threads that do so at once may leave it changed for good."""

FAILURES = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError, ImportError),
    *(AssertionError, MemoryError, SafetensorError, StrictDataclassError),
)
"""What transformers raises over files that are missing, damaged, or say something that it did not expect."""

_HTTP_ERROR: Any = HfHubHTTPError.__bases__[0]  # of httpx or its successor, whichever this huggingface_hub is built on
_PATIENCE = 5.0
"""Seconds that a hub may take to answer at all."""

T = TypeVar("T")


def read_checkpoint(name: object, load: Callable[[str], T], *, what: str, advice: str) -> T:
    """`load` of the folder or hub id `name`, while no other checkpoint is being read.

    Whether a hub answers is asked once, instead of waiting for each file's own retries; without an answer `load` gets
    the folder of what was downloaded before. Raises `LoadError`: `what` could not be loaded, the reason, and `advice`.
    """
    try:
        path = _locate(name)
        # what is read here outlives the caller's inference mode, and may meet gradients later
        with LOADING, torch.inference_mode(False):
            return load(path)
    except FAILURES as error:
        raise LoadError(f"{what} {str(name)!r} could not be loaded ({_reason(error)}); {advice}") from None


def check_weights(model: nn.Module, report: Mapping[str, Any]) -> None:
    """Refuse a model whose weights are not those of its checkpoint: some missing, or more layers than it has.

    `report` is what `from_pretrained(..., output_loading_info=True)` returns. Raises `ValueError`.
    """
    missing = sorted(map(str, report["missing_keys"]))
    if missing:
        raise ValueError(f"{len(missing)} of its weights are missing, such as {missing[0]}")
    kinds = {_NUMBER.sub("*", key) for key in model.state_dict()}
    beyond = sorted(key for key in map(str, report["unexpected_keys"]) if _NUMBER.sub("*", key) in kinds)
    if beyond:
        raise ValueError(f"its config.json has no place for {len(beyond)} of its weights, such as {beyond[0]}")


def check_finite(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse weights that are NaN or infinite. Raises `ValueError`.

    One sum of each tensor shows them, in less time than reading the file took; only where a sum overflows are the
    single values looked at.
    """
    for name, tensor in tensors:
        if tensor.is_floating_point() and not tensor.is_meta:
            total = tensor.detach().sum(dtype=torch.float32)
            if not bool(total.isfinite()) and not bool(tensor.isfinite().all()):
                raise ValueError(f"its weight {name} holds numbers that are not finite")


_NUMBER = re.compile(r"\d+")


def _locate(name: object) -> str:
    """The folder, or a hub id whose hub answers. Raises `OSError` or `ValueError`."""
    if not isinstance(name, str | Path) or not str(name).strip():
        raise ValueError(f"{type(name).__name__} is no name" if name is None or str(name).strip() else "no name given")
    path = Path(name)
    if path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise OSError("the folder holds no config.json")
        return str(name)
    if path.exists():
        raise OSError("it is a file, not a folder")
    try:
        url = huggingface_hub.hf_hub_url(str(name), "config.json")
    except ValueError:  # no name that a hub could know
        raise OSError("it does not exist") from None
    unreachable = _unreachable(url)
    if not unreachable:
        return str(name)
    config = huggingface_hub.try_to_load_from_cache(str(name), "config.json")
    if not isinstance(config, str):
        raise OSError(f"there is no folder of this name, it was not downloaded before, and {unreachable}")
    return str(Path(config).parent)


def _unreachable(url: str) -> str:
    """Why the hub cannot be asked; empty where it answered, whatever it said."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE forbids to download it"
    try:
        huggingface_hub.get_session().head(url, timeout=_PATIENCE, follow_redirects=False)
    except (OSError, _HTTP_ERROR) as error:
        return f"{constants.ENDPOINT} cannot be reached: {short_reason(error)}"
    return ""


def _reason(error: BaseException) -> str:
    if isinstance(error, RuntimeError) and "ignore_mismatched_sizes" in str(error):
        return "its weights have other shapes than its config.json says"
    if isinstance(error, KeyError):  # whose text is the bare key
        return f"its files lack {short_reason(error)}"
    return short_reason(error)
