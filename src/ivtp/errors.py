"""Every error that a user of `ivtp` can meet. Each message says what was wrong, what is accepted, what to do."""

from __future__ import annotations


class IvtpError(Exception):
    """Root of all errors that this library raises on purpose."""


def short_reason(error: BaseException) -> str:
    """What another library says went wrong, in at most one short line."""
    first, *rest = str(error).strip().splitlines() or [type(error).__name__]
    if first.endswith(":") and rest:  # a heading alone says nothing
        first = f"{first} {rest[0].strip()}"
    return first if len(first) <= 160 else first[:157] + "..."


class ConfigError(IvtpError, ValueError):
    """An option is unknown or out of range."""


class UnsupportedModelError(IvtpError, TypeError):
    """The model is of a family (or in a state) that no host knows how to prune."""


class AttachError(IvtpError, RuntimeError):
    """The model cannot be attached to as it is, for example because it already is."""


class InputError(IvtpError, ValueError):
    """The prompt, the cache or the images of one call cannot be pruned."""


class ImageError(IvtpError, ValueError):
    """An image file is missing, broken, unsafe or not an image."""


class LoadError(IvtpError, OSError):
    """A model, processor or CLIP text side could not be loaded."""


class OutputError(IvtpError, OSError):
    """A result is there, but its file could not be written."""
