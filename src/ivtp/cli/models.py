"""What the commands that ask have in common: images, and a model that is refused before its weights are read."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape

from ivtp.cli.arguments import parse_keep
from ivtp.cli.console import err
from ivtp.cli.door import quiet
from ivtp.errors import ConfigError, LoadError, UnsupportedModelError
from ivtp.images import load_image


@dataclass(frozen=True)
class Asked:
    """What the commands that ask have in common: which model, and how it is pruned."""

    model: str
    method: str
    keep: str
    options: dict[str, Any]
    max_new_tokens: int = 64
    device: str = "cpu"
    dtype: str = "auto"
    clip: str | None = None
    silent: bool = False

    def load(self) -> tuple[Any, Any]:
        """The model and its processor."""
        return load_model(self.model, device=self.device, dtype=self.dtype)

    def asking(self, model: Any, processor: Any, method: str | None = None) -> Any:
        """`ivtp.asking` with these options."""
        from ivtp.generate import asking

        return asking(
            model,
            processor,
            method=method or self.method,
            keep=parse_keep(self.keep),
            max_new_tokens=self.max_new_tokens,
            clip=self.clip,
            **self.options,
        )


def load_model(name: str, *, device: str = "cpu", dtype: str = "auto") -> tuple[Any, Any]:
    """`ivtp.load`, with a spinner, or with the hub's bars where it may have gigabytes to send. Raises as it does."""
    from ivtp.files.sidecar import MICRO, local_folder

    folder = local_folder(MICRO if name == "micro" else name)
    if folder is None:
        from huggingface_hub.utils.tqdm import enable_progress_bars

        from ivtp.generate import load

        quiet()
        if err.is_terminal and not err.quiet:
            enable_progress_bars()
        return load(name, device=device, dtype=dtype)
    with err.status(escape(f"loading {name}")):
        from ivtp.generate import load

        quiet()
        _check_family(folder)
        return load(name, device=device, dtype=dtype)


def threshold_of(model: Any, given: float | None) -> float:
    """The relevance above which a word guides: as asked, or the checkpoint's, or the paper's."""
    from ivtp.methods.base import GuideOptions
    from ivtp.plug import find_host

    return float(find_host(model).recommended().get("threshold", GuideOptions.threshold) if given is None else given)


def square_of(model: Any) -> int:
    """Side in pixels of what the vision tower sees."""
    from ivtp.cost.sizes import sizes

    return sizes(model).geometry.square


def _check_family(folder: Path) -> None:
    """Refuse a family without a host, and a decoder that is not described: transformers would invent a 7B one.

    What else is wrong with a checkpoint shows when it is read.
    """
    from ivtp.cost.sizes import sizes
    from ivtp.files.sidecar import read_json

    config = read_json(folder / "config.json")
    if "vision_config" in config and not config.get("text_config"):
        raise LoadError(
            f"model {str(folder)!r} could not be loaded (its config.json has no text_config, so that its decoder is "
            "unknown); use the checkpoint's own config.json"
        )
    try:
        sizes(str(folder))
    except UnsupportedModelError:
        raise
    except (LoadError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return


def read_images(files: Sequence[str]) -> list[Any]:
    """The images that a command line names; `-` is what the standard input brings, once."""
    if list(files).count("-") > 1:
        raise ConfigError("the image - is the standard input, which brings one image; name the others")
    return [load_image(sys.stdin.buffer if file == "-" else file) for file in files]


@contextmanager
def silenced(silent: bool) -> Iterator[None]:
    """Whether the standard error is left to errors."""
    before = err.quiet
    err.quiet = silent
    try:
        yield
    finally:
        err.quiet = before
