"""What is put into a model, in one list that takes all of it out again; and one user of a model at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from ivtp.stock import forward_slot

_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


@contextmanager
def exclusive(model: nn.Module) -> Iterator[None]:
    """Wait until no other thread attaches to, detaches from or runs the pruned `model`; then keep the others out."""
    with _LOCKS_LOCK:
        lock = _LOCKS.setdefault(model, threading.RLock())
    with lock:
        yield


class Changes:
    """Everything that was put into a model; `undo` takes it out, the last change first."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def add(self, undo: Callable[[], None]) -> None:
        """Remember how to take one change back."""
        self._undo.append(undo)

    def set(self, module: nn.Module, name: str, value: Any) -> None:
        """Set an attribute on the instance, past the registration of sub-modules."""
        had, before = name in module.__dict__, module.__dict__.get(name)
        module.__dict__[name] = value

        def undo() -> None:
            if had:
                module.__dict__[name] = before
            else:
                module.__dict__.pop(name, None)

        self.add(undo)

    def stand_in(self, module: nn.Module, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Put `make(stock)` in the place of a module's own forward."""
        slot = forward_slot(module)
        self.set(module, slot, make(getattr(module, slot)))

    @contextmanager
    def apart(self) -> Iterator[Changes]:
        """A list of its own, which is taken out again at the end of the context."""
        own = Changes()
        try:
            yield own
        finally:
            own.undo()

    def undo(self) -> None:
        """Take all changes back; does nothing when there are none."""
        while self._undo:
            self._undo.pop()()
