"""Names to modules: every file in `methods/` and `hosts/` registers itself by existing."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from functools import cache
from typing import Any

from ivtp.errors import ConfigError


# Published methods are called PruMerge+ or the like, and a file's name cannot hold the sign: it says `_plus` instead.
@cache
def names_in(room: str) -> tuple[str, ...]:
    """The names of what the files of a room register, in alphabetical order."""
    package = importlib.import_module(f"ivtp.{room}")
    files = (m.name for m in pkgutil.iter_modules(package.__path__) if m.name not in ("base", "compose"))
    return tuple(sorted(name.removesuffix("_plus") + "+" if name.endswith("_plus") else name for name in files))


def list_methods(host: str | None = None) -> list[str]:
    """Names of the pruning methods, in alphabetical order; of a family in `list_hosts()` those that it can be given.

    A family lacks what some methods need, such as a CLS token. Raises `ConfigError` for an unknown family.
    """
    names = names_in("methods")
    if host is None:
        return list(names)
    gives = host_class(host).gives
    return [name for name in names if method_class(name).needs <= gives]


def list_hosts() -> list[str]:
    """Names of the model families that can be pruned, in alphabetical order."""
    return list(names_in("hosts"))


def method_class(name: str | type[Any]) -> Any:
    """The `Method` subclass called `name`, or "first+second" for two; a class of the user's own is itself.

    Raises `ConfigError` with the nearest names.
    """
    if isinstance(name, type):
        if not issubclass(name, importlib.import_module("ivtp.methods.base").Method):
            raise ConfigError(f"{name.__name__} is no pruning method; subclass ivtp.methods.base.Method")
        return name
    known = names_in("methods")
    for place, sign in enumerate(str(name)):
        first, second = str(name)[:place], str(name)[place + 1 :]
        if sign == "+" and first in known and second in known:
            return _composed(first, second)
    return load_named("methods", name, "METHOD")


def host_class(name: str) -> Any:
    """The `Host` subclass called `name`. Raises `ConfigError` with the nearest names."""
    return load_named("hosts", name, "HOST")


@cache
def _composed(first: str, second: str) -> Any:
    compose = importlib.import_module("ivtp.methods.compose").compose
    return compose(method_class(first), method_class(second), f"{first}+{second}")


def load_named(room: str, name: str, attribute: str) -> Any:
    """What the file of that name gives as `attribute`. Raises `ConfigError` with the nearest names."""
    if name not in names_in(room):
        near = difflib.get_close_matches(str(name), names_in(room), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        noun = room.rpartition(".")[2][:-1]
        raise ConfigError(f"unknown {noun} {name!r}; {hint}available: {', '.join(names_in(room))}")
    return getattr(importlib.import_module(f"ivtp.{room}.{name.replace('+', '_plus')}"), attribute)
