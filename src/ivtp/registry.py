"""Names to modules: every file in `methods/` and `hosts/` registers itself by existing."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Collection
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


def list_methods() -> list[str]:
    """Names of the pruning methods, in alphabetical order."""
    return list(names_in("methods"))


def list_hosts() -> list[str]:
    """Names of the model families that can be pruned, in alphabetical order."""
    return list(names_in("hosts"))


def method_name(name: str) -> str:
    """How the registry spells `name`, whatever its case: tables and papers write IVTP or FastV."""
    text = str(name).strip()
    spelled = {known.lower(): known for known in (*names_in("methods"), "none")}
    if text.lower() in spelled:
        return spelled[text.lower()]
    halves = _halves(text.lower(), spelled)
    return "+".join(spelled[half] for half in halves) if halves else text


def _halves(name: str, known: Collection[str]) -> tuple[str, str] | None:
    """The two methods that "first+second" names; a name of one method may hold the sign, too."""
    places = [place for place, sign in enumerate(name) if sign == "+"]
    pairs = ((name[:place], name[place + 1 :]) for place in places)
    return next((pair for pair in pairs if pair[0] in known and pair[1] in known), None)


def method_class(name: str | type[Any]) -> Any:
    """The `Method` subclass called `name`, or "first+second" for two; a class of the user's own is itself.

    Raises `ConfigError` with the nearest names.
    """
    if isinstance(name, type):
        if not issubclass(name, importlib.import_module("ivtp.methods.base").Method):
            raise ConfigError(f"{name.__name__} is no pruning method; subclass ivtp.methods.base.Method")
        return name
    name = method_name(name)
    if name == "none":
        raise ConfigError("method 'none' is the untouched model: there is nothing to attach; ask and flops take it")
    halves = _halves(name, names_in("methods"))
    if halves:
        return _composed(*halves)
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
        near = difflib.get_close_matches(str(name).lower(), names_in(room), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        noun = room.rpartition(".")[2][:-1]
        raise ConfigError(f"unknown {noun} {name!r}; {hint}available: {', '.join(names_in(room))}")
    return getattr(importlib.import_module(f"ivtp.{room}.{name.replace('+', '_plus')}"), attribute)
