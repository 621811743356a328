"""What the command line's arguments mean, and which of them are refused before a model is loaded."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

import typer

from ivtp.errors import ConfigError


def parse_keep(text: str) -> int | str:
    """A number of tokens, or a share such as "11%" as it is."""
    try:
        return int(text)
    except ValueError:
        return text


def parse_options(given: list[str] | None, context: typer.Context, function: Callable[..., Any]) -> dict[str, Any]:
    """`name=value` pairs: a value that is JSON is what it says, `1,2` is a tuple, anything else stays text.

    Refuses the command's own flags and what `function`, which takes the options, would take for itself.
    """
    flags = {p.name: p.opts[0] for p in context.command.params if p.param_type_name == "option"}
    own = {"options", *inspect.signature(function).parameters}
    options: dict[str, Any] = {}
    for pair in given or []:
        name, separator, text = pair.partition("=")
        if not separator or not name:
            raise ConfigError(f"--option {pair!r} is not NAME=VALUE; write for example --option guide=visual")
        if name in flags:
            raise ConfigError(f"--option {pair!r} sets what the command has a flag for; use {flags[name]} {text}")
        if name in own:
            raise ConfigError(f"--option {pair!r}: {name} is no option of PruneConfig or of a method; leave it out")
        try:
            value = json.loads(f"[{text}]" if "," in text else text)
        except ValueError:
            value = text
        options[name] = tuple(value) if isinstance(value, list) else value
    return options


def check_asked(method: str, keep: str, options: dict[str, Any]) -> None:
    """Refuse what is wrong in itself before a model is loaded."""
    from ivtp.config import PruneConfig
    from ivtp.registry import method_class

    config = PruneConfig.of(method=method, keep=parse_keep(keep), **options)
    if method != "none":
        method_class(method).options_of(config)
