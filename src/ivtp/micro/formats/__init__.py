"""The twelve benchmarks' formats in the micro world, one file each; they are found by their files."""

from __future__ import annotations

from typing import Any

from ivtp.registry import load_named, names_in


def list_formats() -> list[str]:
    """Names of the formats, in alphabetical order."""
    return list(names_in("micro.formats"))


def format_class(name: str) -> Any:
    """The `Format` subclass called `name`. Raises `ConfigError` with the nearest names."""
    return load_named("micro.formats", name, "FORMAT")
