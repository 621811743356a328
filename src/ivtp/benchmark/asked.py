"""What a benchmark is asked to measure: a model, methods, and the configurations that they are timed in."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ivtp.config import PruneConfig
from ivtp.errors import ConfigError
from ivtp.methods.base import Method
from ivtp.registry import method_class

DTYPES = ("auto", "float32", "bfloat16", "float16")
FOR_ALL = frozenset({"positions", "cache", "seed"})
"""Common options that every method takes, beside those that it says it reads."""

_TEMPLATE = 3
"""Tokens that a chat template spends on an image, about: a placeholder and line breaks."""
_GRID = {"texts": (64,), "images": (1,), "batches": (1,), "tokens": 16}
_GROWTH = {
    "texts": (32, 128, 512, 1024, 2048, 4096),
    "images": (1, 5, 20),
    "batches": (1, 2, 4, 8, 16, 32),
    "tokens": 0,
}


@dataclass(frozen=True)
class Point:
    """One configuration: every run of it reads the same prompts."""

    keep: int | str
    text: int
    """Tokens of the prompt as `ivtp.flops` counts them: the text, and one for each image."""
    images: int
    batch: int

    def __str__(self) -> str:
        return f"keep {self.keep}, text {self.text}, images {self.images}, batch {self.batch}"


@dataclass(frozen=True)
class Asked:
    """A whole benchmark. Valid once it exists; `ConfigError` otherwise. Empty lists and `tokens=None` take defaults."""

    model: str = "micro"
    """A model with its weights: micro, a folder or a hub id; not read where there is a geometry."""
    geometry: str | None = None
    """Sizes for random weights: a known name, or a folder or JSON file with a transformers config."""
    layers: tuple[int, int] | None = None
    """Encoder layers that reach the projector, and decoder layers, of the geometry's first; None: all."""
    methods: tuple[str, ...] = ("ivtp",)
    keeps: tuple[int | str, ...] = (64,)
    texts: tuple[int, ...] = ()
    images: tuple[int, ...] = ()
    batches: tuple[int, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of `PruneConfig` or of a method; each goes to the methods that take it."""
    tokens: int | None = None
    """Greedy steps after the prefill; 0 times the prefill alone."""
    repeats: int = 7
    dtype: str = "auto"
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0
    compile: bool = False
    growth: bool = False
    """Each axis by itself, in place of every combination: at one image, one prompt and, beside these, `base_text`."""

    def __post_init__(self) -> None:
        for name, default in (_GROWTH if self.growth else _GRID).items():
            if getattr(self, name) in ((), None):
                object.__setattr__(self, name, default)
        if self.layers is not None and self.geometry is None:
            raise ConfigError("--layers takes a slice of random weights; name their sizes with --geometry")
        if self.dtype not in DTYPES:
            raise ConfigError(f"--dtype {self.dtype} is unknown; use one of {', '.join(DTYPES)}")
        PruneConfig(seed=self.seed)  # refuses what is no seed
        if len(set(self.methods)) != len(self.methods):
            raise ConfigError(f"--method {' '.join(self.methods)} names a method twice; name each once")
        if self.growth and len(self.keeps) > 1:
            raise ConfigError("--growth varies text, images and batch; give one --keep")
        for point in self.points():
            if point.text < point.images + 2:
                raise ConfigError(
                    f"--text {point.text} leaves no text beside {point.images} image placeholder(s); "
                    f"use {point.images + 2} or more"
                )
        self._check_options()

    @property
    def name(self) -> str:
        """The model or the geometry."""
        return self.geometry or self.model

    def points(self) -> list[Point]:
        """The configurations, in the order in which they are measured."""
        texts, images, batches = self.texts, self.images, self.batches
        if not self.growth:
            grid = (Point(k, t, m, b) for k in self.keeps for t in texts for m in images for b in batches)
            return list(dict.fromkeys(grid))
        base = Point(self.keeps[0], self.base_text, min(images), min(batches))
        axes = {"text": texts, "images": images, "batch": batches}
        varied = (
            dataclasses.replace(base, **{name: size}) for name, sizes in axes.items() for size in sorted(set(sizes))
        )
        return list(dict.fromkeys(varied))

    @property
    def base_text(self) -> int:
        """The text beside which images and batch grow: the smallest with room for a chat template of all images."""
        room = _TEMPLATE * max(self.images)
        return min((text for text in self.texts if text >= room), default=max(self.texts))

    def header(self) -> dict[str, Any]:
        """What all configurations of one result file have in common, as JSON holds it."""
        lists = ("keeps", "texts", "images", "batches", "growth")
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in lists}
        fields["model"] = None if self.geometry else self.model
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    def values_for(self, method: str) -> dict[str, Any]:
        """The options that `method` takes."""
        names = taken(method)
        return {name: value for name, value in {**self.options, "seed": self.seed}.items() if name in names}

    def _check_options(self) -> None:
        names = frozenset().union(*map(taken, self.methods))
        for name in self.options:
            if name not in names:
                raise ConfigError(f"option {name!r} is read by none of {', '.join(self.methods)}; leave it out")
        for method in self.methods:
            for keep in self.keeps:
                config = PruneConfig.of(method=method, keep=keep, **self.values_for(method))
                method_class(method).options_of(config)


def taken(method: str) -> frozenset[str]:
    """Names of the options that a method takes."""
    kind: type[Method] = method_class(method)
    return FOR_ALL | kind.reads | {f.name for f in dataclasses.fields(kind.Options)}
