"""The one door of all commands: what goes wrong inside leaves as one line and an exit code."""

from __future__ import annotations

import io
import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ivtp.errors import ConfigError, ImageError, InputError, IvtpError, short_reason

FLAG = "--traceback"
"""Anywhere on the command line: show where an error came from, too."""


def run(command: Callable[[], Any]) -> None:
    """Run a command line. Exit codes: 0 done, 1 failed, 2 what was asked (arguments, question, image file) is wrong."""
    shown = FLAG in _words()
    if isinstance(sys.stdout, io.TextIOWrapper):  # an answer in another script must not be lost on an ASCII terminal
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        command()
    except Exception as error:  # whatever it is, a user is owed a line; Ctrl-C and the like are not held up
        if shown:
            traceback.print_exc()
        print(f"error: {printable(_line(error))}", file=sys.stderr)
        asked = isinstance(error, ConfigError | ImageError | InputError)
        raise SystemExit(2 if asked else 1) from None


@contextmanager
def interruptible(left: Callable[[], str]) -> Iterator[None]:
    """On Ctrl-C one line, with what `left` says was written and how to go on; exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"interrupted: {printable(left())}", file=sys.stderr)
        raise SystemExit(130) from None


def quiet() -> None:
    """Other libraries' progress bars and notes would tear a command's own; what goes wrong is said in its one line."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    for library in (transformers_logging, hub_logging):
        library.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)


def printable(text: str) -> str:
    """`text` on one line, with escapes in place of what would move a terminal's cursor or cannot be encoded."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _words() -> list[str]:
    """The command line's words; the flag is taken out of `sys.argv`, since every command has it."""
    words = sys.argv[1:]
    options = words.index("--") if "--" in words else len(words)
    sys.argv[1:] = [word for word in words[:options] if word != FLAG] + words[options:]
    return words[:options]


def _line(error: Exception) -> str:
    if isinstance(error, IvtpError):
        return str(error)
    if _is_memory(error):
        return f"out of memory ({short_reason(error)}); use a smaller image, batch, prompt or model"
    if isinstance(error, OSError):
        return str(error)
    kind = type(error).__name__
    return f"internal error: {kind}: {short_reason(error)}; run again with {FLAG} to see where, and please report it"


def _is_memory(error: Exception) -> bool:
    """torch says it in three ways, and is not imported for that."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
