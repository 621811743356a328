"""What a command line leaves behind, for the tests of this room."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Result(NamedTuple):
    """What one command left behind."""

    code: int
    out: str
    err: str


Run = Callable[..., Result]
"""Runs `ivtp ARGUMENTS`."""


def one_line(text: str) -> str:
    """The only line of the error output."""
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    assert lines[0].startswith("error: ")
    return lines[0]
