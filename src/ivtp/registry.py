"""Names to modules: every file in `methods/`, `hosts/` and `micro/formats/` registers itself by existing."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from functools import cache
from typing import Any, Literal

from ivtp.errors import ConfigError

Room = Literal["methods", "hosts", "micro.formats"]


# Published methods are called PruMerge+ or the like, and a file's name cannot hold the sign: it says `_plus` instead.
@cache
def _names(room: Room) -> tuple[str, ...]:
    package = importlib.import_module(f"ivtp.{room}")
    files = (m.name for m in pkgutil.iter_modules(package.__path__) if m.name not in ("base", "compose"))
    return tuple(sorted(name.removesuffix("_plus") + "+" if name.endswith("_plus") else name for name in files))


def list_methods() -> list[str]:
    """Names of the pruning methods, in alphabetical order."""
    return list(_names("methods"))


def list_hosts() -> list[str]:
    """Names of the model families that can be pruned, in alphabetical order."""
    return list(_names("hosts"))


def list_formats() -> list[str]:
    """Names of the micro world's benchmark formats, in alphabetical order."""
    return list(_names("micro.formats"))


def method_class(name: str | type[Any]) -> Any:
    """The `Method` subclass called `name`, or "first+second" for two; a class of the user's own is itself.

    Raises `ConfigError` with the nearest names.
    """
    if isinstance(name, type):
        if not issubclass(name, importlib.import_module("ivtp.methods.base").Method):
            raise ConfigError(f"{name.__name__} is no pruning method; subclass ivtp.methods.base.Method")
        return name
    known = _names("methods")
    for place, sign in enumerate(str(name)):
        first, second = str(name)[:place], str(name)[place + 1 :]
        if sign == "+" and first in known and second in known:
            return _composed(first, second)
    return _load("methods", name, "METHOD")


def host_class(name: str) -> Any:
    """The `Host` subclass called `name`. Raises `ConfigError` with the nearest names."""
    return _load("hosts", name, "HOST")


def format_class(name: str) -> Any:
    """The `Format` subclass called `name`. Raises `ConfigError` with the nearest names."""
    return _load("micro.formats", name, "FORMAT")


@cache
def _composed(first: str, second: str) -> Any:
    compose = importlib.import_module("ivtp.methods.compose").compose
    return compose(method_class(first), method_class(second), f"{first}+{second}")


def _load(room: Room, name: str, attribute: str) -> Any:
    if name not in _names(room):
        near = difflib.get_close_matches(str(name), _names(room), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        noun = room.rpartition(".")[2][:-1]
        raise ConfigError(f"unknown {noun} {name!r}; {hint}available: {', '.join(_names(room))}")
    return getattr(importlib.import_module(f"ivtp.{room}.{name.replace('+', '_plus')}"), attribute)
