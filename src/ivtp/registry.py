"""Names to classes: a file in `methods/`, `hosts/` or `compressors/` registers itself by existing.

A package adds a pruning method or a model family under `[project.entry-points."ivtp.methods"]` or `"ivtp.hosts"`.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from ivtp.config import PruneConfig
from ivtp.errors import ConfigError, short_reason

_BASES = {"methods": "Method", "hosts": "Host"}
"""Rooms that installed packages add to, and what class their `base` expects."""
_FAILURES = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError, RuntimeError),
    *(SyntaxError, TypeError, ValueError),
)
"""What importing somebody's module may raise."""


@cache
def names_in(room: str) -> tuple[str, ...]:
    """The names of what is registered in a room, in alphabetical order."""
    return tuple(sorted({*_own_names(room), *_installed(room)}))


_NO_NAMES = (
    *("base", "compose", "groups", "idefics_like", "llava_like", "outliers", "qwen_like", "tagged", "tiles", "tiny"),
    "window",
)
"""Files of the rooms that register nothing: what the others share."""


# Published methods are called PruMerge+ or the like, and a file's name cannot hold the sign: it says `_plus` instead.
@cache
def _own_names(room: str) -> frozenset[str]:
    package = importlib.import_module(f"ivtp.{room}")
    files = (m.name for m in pkgutil.iter_modules(package.__path__) if m.name not in _NO_NAMES)
    return frozenset(name.removesuffix("_plus") + "+" if name.endswith("_plus") else name for name in files)


@cache
def _installed(room: str) -> dict[str, EntryPoint]:
    """What installed packages add to a room; what has a name that is taken is left out, with a warning."""
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=f"ivtp.{room}") if room in _BASES else ():
        own = point.name == "none" or point.name in _own_names(room)
        if own or point.name in found:
            owner = "ivtp" if own else _package_of(found[point.name])
            warnings.warn(
                f"{_noun(room)} {point.name!r} of the package {_package_of(point)} is left out, because {owner} has "
                "one of that name; rename it",
                stacklevel=2,
            )
        else:
            found[point.name] = point
    return found


def _package_of(point: EntryPoint) -> str:
    return point.dist.name if point.dist else point.module


def _noun(room: str) -> str:
    return room.rpartition(".")[2][:-1]


@dataclass(frozen=True)
class Taken:
    """Whether a model family takes a method."""

    options: Mapping[str, Any] | None
    """Options of the method that it is taken with; empty where its defaults are, None where it is refused."""
    refusal: str
    """The line that refuses it with its defaults; empty where they are taken."""


def list_methods(host: str | None = None) -> list[str]:
    """Names of the pruning methods, in alphabetical order; of a family in `list_hosts()` those that it takes.

    A family lacks what some methods need, such as a CLS token. Where it has no text side it takes IVTP with
    `guide="text"` or `guide="visual"` alone. Raises `ConfigError` for an unknown family.
    """
    if host is None:
        return list(names_in("methods"))
    return [name for name, found in methods_on(host).items() if found.options is not None]


def methods_on(host: str, methods: Collection[str] = ()) -> dict[str, Taken]:
    """Whether a random small model of a family takes each of the `methods`, of all without any.

    Raises `ConfigError` for an unknown family or method.
    """
    family = host_class(host)
    subject = family(family.tiny()[0])
    return {name: _taken(subject, name) for name in methods or method_classes()}


_HALF = "50%"
"""Tokens that no method is too coarse to leave."""


_WAYS: tuple[dict[str, str], ...] = ({}, {"guide": "text"}, {"guide": "text", "stages": "llm"})
"""Options that a method may be taken with, where it has them."""


def _taken(host: Any, name: str) -> Taken:
    fields = {field.name for field in dataclasses.fields(method_class(name).Options)}
    refusals = []
    for options in (ways for ways in _WAYS if fields >= ways.keys()):
        try:
            method_on(host, PruneConfig(method=name, keep=_HALF, options=options))
        except ConfigError as error:
            refusals.append(str(error))
        else:
            return Taken(options, "".join(refusals[:1]))
    return Taken(None, refusals[0])


def method_on(host: Any, config: PruneConfig) -> Any:
    """The method that `config` asks for, planned for the largest image that the model of `host` reads.

    Raises `ConfigError` for what the method refuses, and where the family does not take it.
    """
    kind = method_class(config.method)
    largest = dataclasses.replace(host.size, num_patches=host.most_patches)
    method = kind(kind.filled(config, largest, host.recommended()), largest)
    if refusal := host.refusal(method):
        raise ConfigError(refusal)
    return method


def list_hosts() -> list[str]:
    """Names of the model families that can be pruned, in alphabetical order."""
    return list(names_in("hosts"))


def list_compressors() -> list[str]:
    """Names of the trained projectors that can stand in for a LLaVA's own, in alphabetical order."""
    return list(names_in("compressors"))


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
    return _composed(*halves) if halves else load_named("methods", name, "METHOD")


def host_class(name: str) -> Any:
    """The `Host` subclass called `name`. Raises `ConfigError` with the nearest names."""
    return load_named("hosts", name, "HOST")


def compressor_class(name: str) -> Any:
    """The `Compressor` subclass called `name`, whatever its case. Raises `ConfigError` with the nearest names."""
    return load_named("compressors", str(name).strip().lower(), "COMPRESSOR")


def method_classes() -> dict[str, Any]:
    """All `Method` subclasses by their names; of a package that does not load there is a warning instead."""
    return _all_that_load("methods", "METHOD")


def host_classes() -> dict[str, Any]:
    """All `Host` subclasses by their names; of a package that does not load there is a warning instead."""
    return _all_that_load("hosts", "HOST")


@cache
def _all_that_load(room: str, attribute: str) -> dict[str, Any]:
    found = {}
    for name in names_in(room):
        try:
            found[name] = load_named(room, name, attribute)
        except ConfigError as error:
            warnings.warn(str(error), stacklevel=3)
    return found


@cache
def _composed(first: str, second: str) -> Any:
    compose = importlib.import_module("ivtp.methods.compose").compose
    return compose(method_class(first), method_class(second), f"{first}+{second}")


def load_named(room: str, name: str, attribute: str) -> Any:
    """What the file of that name gives as `attribute`, or an entry point.

    Raises `ConfigError` with the nearest names, and for an entry point that does not give what it should.
    """
    if name in _own_names(room):
        return getattr(importlib.import_module(f"ivtp.{room}.{name.replace('+', '_plus')}"), attribute)
    if name in _installed(room):
        return _load(room, _installed(room)[name])
    near = difflib.get_close_matches(str(name).lower(), names_in(room), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ConfigError(f"unknown {_noun(room)} {name!r}; {hint}available: {', '.join(names_in(room))}")


def _load(room: str, point: EntryPoint) -> Any:
    base = getattr(importlib.import_module(f"ivtp.{room}.base"), _BASES[room])
    what = f"{_noun(room)} {point.name!r} of the package {_package_of(point)}"
    try:
        loaded = point.load()
    except _FAILURES as error:
        raise ConfigError(f"{what} cannot be loaded ({short_reason(error)}); repair or uninstall it") from None
    if not isinstance(loaded, type) or not issubclass(loaded, base):
        raise ConfigError(f"{what} is {point.value}, which is no subclass of {base.__module__}.{base.__name__}")
    return loaded
