"""Bytes: the peak of a call, and what a cache holds."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ivtp.stock import contents

Result = TypeVar("Result")


def peak_of(call: Callable[[], Result], device: torch.device) -> tuple[Result, int]:
    """What `call` returns, and the most bytes that were allocated at once beyond what was before it.

    CUDA: by the caching allocator's own count. CPU: by the storages of all tensors that the call makes; scratch space
    inside a kernel is in the first and not in the second.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    with _Storages() as storages:
        result = call()
    return result, storages.peak


def cache_bytes(cache: Any) -> int:
    """Keys and values of all layers."""
    return sum(int(part.nbytes) for layer in cache.layers for part in contents(layer))


def cache_tokens(cache: Any) -> int:
    """Tokens a layer holds, the mean of all layers."""
    return round(sum(int(contents(layer)[0].shape[-2]) for layer in cache.layers) / len(cache.layers))


class _Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves the class untyped
    """Counts the bytes of every storage that an operation makes, until it is freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._now = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage._cdata for storage in _storages_in((args, kwargs))}
        output = func(*args, **(kwargs or {}))
        for storage in _storages_in(output):
            key, size = storage._cdata, storage.nbytes()
            if key not in given and key not in self._alive:  # a view shares the storage of its source
                self._alive.add(key)
                self._now += size
                self.peak = max(self.peak, self._now)
                weakref.finalize(storage, self._free, key, size)
        return output

    def _free(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self._now -= size


def _storages_in(tree: Any) -> list[Any]:
    return [leaf.untyped_storage() for leaf in tree_iter(tree) if isinstance(leaf, Tensor)]
