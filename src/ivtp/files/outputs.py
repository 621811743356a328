"""Files that commands write: refused before any work where that could not be done, then written whole or not at all."""

from __future__ import annotations

import importlib.util
import os
import re
import stat
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ivtp.errors import ConfigError, OutputError, short_reason

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".pdf")
"""Suffixes of the pictures that Pillow writes wherever it is installed."""

_CHECKPOINT = re.compile(r"(.*config|.*index|tokenizer|vocab|special_tokens_map|added_tokens|chat_template|ivtp)\.json")
_PROBE = 1 << 16
"""Bytes that have to fit on the disk."""


def check_output(
    file: Path | None, option: str, *, suffixes: Collection[str] = (), inputs: Iterable[object] = ()
) -> None:
    """Refuse a file that could not be written once the work is done, or that the command needs itself.

    `option` is what the user wrote it behind. `inputs`: what the command reads or also writes; of a checkpoint's
    folder the files that make it one count, and what names no file (None, a hub id) does not. Links are followed.
    Nothing is changed. Raises `ConfigError`.
    """
    if file is None:
        return
    name = f"{option} {file}"
    if str(file).startswith("--"):
        raise ConfigError(f"{option} is followed by {file} instead of a file; a file of this name is ./{file}")
    if suffixes and file.suffix.lower() not in suffixes:
        raise ConfigError(f"{name} has none of the suffixes {', '.join(suffixes)}; name such a file")
    try:
        target = file.resolve()
        for given in inputs:
            if given is not None and _is_needed(target, Path(str(given))):
                raise ConfigError(f"{name} would overwrite {given}, which the command itself needs; name another file")
        mode = _mode(target)
        if mode is not None and not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "no regular file"
            raise ConfigError(f"{name} is {kind}; name a file")
        if not target.parent.is_dir():
            raise ConfigError(f"{name}: the folder {target.parent} does not exist; create it first")
        if mode is not None:
            target.open("r+b").close()
        _write_something(target.parent)
    except (OSError, RuntimeError) as error:  # the latter from a link that leads to itself
        raise ConfigError(f"{name} cannot be written ({_reason(error)}); name another file") from None


def check_folder(folder: Path, option: str) -> None:
    """Refuse a folder in which nothing could be written; one that does not exist will be created.

    Nothing is changed. Raises `ConfigError`.
    """
    name = f"{option} {folder}"
    if str(folder).startswith("--"):
        raise ConfigError(f"{option} is followed by {folder} instead of a folder; a folder of this name is ./{folder}")
    try:
        target = folder.resolve()
        nearest = next(path for path in (target, *target.parents) if _mode(path) is not None)
        if not nearest.is_dir() or (folder.is_symlink() and not folder.exists()):
            raise ConfigError(f"{name}: {nearest if nearest != target else folder} is no folder; name another one")
        _write_something(nearest)
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"{name} cannot be written to ({_reason(error)}); name another folder") from None


@contextmanager
def whole(file: Path, option: str) -> Iterator[Path]:
    """A path to write to; what was written takes the place of `file` when the block ends without an error.

    A link keeps leading to the file that it names. Raises `OutputError` where that fails, and `file` is as it was.
    """
    target = file.resolve()
    partial = target.with_name(f".{target.stem[:80]}.{os.getpid()}.partial{target.suffix}")
    try:
        yield partial
        partial.replace(target)
    except OSError as error:
        raise OutputError(f"{option} {file} could not be written ({_reason(error)})") from None
    finally:
        partial.unlink(missing_ok=True)


def write_text(file: Path, text: str, option: str) -> None:
    """Write `text` as `whole` does."""
    with whole(file, option) as partial:
        partial.write_text(text, encoding="utf-8")


def need_matplotlib(asker: str) -> None:
    """Refuse what `asker` wants to draw where matplotlib, which an extra brings, is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(f"{asker} needs matplotlib; install it with: pip install 'ivtp[train]'")


def _mode(path: Path) -> int | None:
    """Of what is there; None where nothing is."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


def _is_needed(target: Path, given: Path) -> bool:
    try:
        if given.is_dir():
            return given.resolve() == target.parent and bool(_CHECKPOINT.fullmatch(target.name)) and target.exists()
        if given.exists() and target.exists():
            return given.samefile(target)  # another name of the same file, too
        return given.resolve() == target
    except (OSError, RuntimeError):  # no name of a file: a hub id may be anything
        return False


def _write_something(folder: Path) -> None:
    """What permissions say is not the whole truth: the disk may be full or read-only, or the user be root."""
    with tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(bytes(_PROBE))


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or short_reason(error)
