"""What a prefill costs, from sizes alone: no weights, no forward pass. `docs/flops.md` says how it is counted."""

from __future__ import annotations

import dataclasses
from typing import Any

from ivtp.config import PruneConfig, check_none
from ivtp.cost.prefill import FlopsReport, Image, count_prompt
from ivtp.cost.sizes import Relevance, Sizes, sizes
from ivtp.errors import ConfigError
from ivtp.methods.base import Method
from ivtp.plan import Compressed, Geometry
from ivtp.registry import compressor_class, method_class, method_name


def flops(
    model: Any,
    *,
    method: str | type[Any] | None = None,
    keep: int | str = 64,
    compressor: str | None = None,
    text_tokens: int = 512,
    batch: int = 1,
    images: int = 1,
    image_size: tuple[int, int] | None = None,
    instruction_tokens: int | None = None,
    **config: Any,
) -> FlopsReport:
    """What a prefill with `method` costs on `model`; None is "ivtp", and "none" the untouched model.

    `compressor`, one of `ivtp.list_compressors()`, stands in for the projector and gives `keep` tokens of each image;
    so does one that is in the model, or named beside the checkpoint. Nothing prunes behind it, and None is "none" then.
    `model`: a name (`llava-1.5-7b`, `llava-v1.6-mistral-7b`, `micro`), a folder or hub id whose `config.json`
    is on this machine, a transformers config, a model, or a `Geometry`. `text_tokens`: the prompt as its tokenizer
    counts it, with one placeholder for each image, whose place the visual tokens take. `image_size`: (width, height)
    in pixels, of a family that reads images in tiles; None counts one tile. `instruction_tokens`: of the user's turn,
    as CLIP or a compressor counts them; None takes the whole text, but at most one CLIP context. `config`: fields of
    `PruneConfig` and options of the method. Raises `ConfigError` for a value out of range,
    `UnsupportedModelError` for a family without a host, `LoadError` for a model that is not there.
    """
    for name, value, low in (("batch", batch, 1), ("images", images, 1), ("text_tokens", text_tokens, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ConfigError(f"{name}={value!r} is not a count; use a whole number from {low} up")
    if text_tokens < images:
        raise ConfigError(f"text_tokens={text_tokens} has no place for {images} images; use {images} or more")
    known = _with_compressor(sizes(model), compressor, keep)
    method = _method_or_none(known, method)
    image, marks, note = _image(known, image_size, images)
    largest = dataclasses.replace(known.geometry, num_patches=image[0])
    chosen, clip = _method(known, largest, {**config, "method": method, "keep": keep})
    if clip is not None and instruction_tokens is None:
        instruction_tokens = min(text_tokens, clip.context - 2)
    report = count_prompt(
        known.geometry,
        chosen,
        [image] * images,
        text_tokens=text_tokens + images * (marks - 1),
        batch=batch,
        relevance=clip,
        instruction_tokens=instruction_tokens,
        name=known.geometry.compressed.name if known.geometry.compressed else _name(method),
    )
    return dataclasses.replace(report, text_tokens=text_tokens, notes=(*(chosen.notes if chosen else ()), *note))


def prompt_tokens(columns: int, geometry: Geometry, images: int = 1) -> int:
    """The `text_tokens` of a prompt whose ids have `columns` columns, one for each patch of its images."""
    return columns - images * (geometry.visual_tokens + geometry.marks - 1)


def _with_compressor(known: Sizes, compressor: str | None, keep: int | str) -> Sizes:
    """The sizes with what stands in for the projector. Raises `ConfigError` for what cannot."""
    compressed = known.geometry.compressed
    if compressor is not None:
        tokens = PruneConfig(keep=keep).tokens(known.geometry.num_patches)
        compressed = Compressed(compressor_class(compressor).name, tokens)
    if compressed is None:
        return known
    if not known.compressible:
        raise ConfigError(f"no compressor can stand in for the projector of {known.geometry.name}; use a LLaVA-1.5")
    compressor_class(compressed.name).check(known.geometry, compressed.tokens)
    return dataclasses.replace(known, geometry=dataclasses.replace(known.geometry, compressed=compressed))


def _method_or_none(known: Sizes, method: str | type[Any] | None) -> str | type[Any]:
    """What prunes; nothing behind a compressor."""
    compressed = known.geometry.compressed
    if method is None:
        return "none" if compressed else "ivtp"
    if compressed and not (isinstance(method, str) and method_name(method) == "none"):
        raise ConfigError(
            f'method {_name(method)!r} prunes nothing behind a compressor ({compressed.name}); use method="none"'
        )
    return method


def _name(method: str | type[Any]) -> str:
    return method if isinstance(method, str) else method.__name__


def _image(known: Sizes, size: Any, images: int) -> tuple[Image, int, tuple[str, ...]]:
    """An image of `size`, one of so many, its tokens that are no patches, and what to know of that count."""
    one, marks = known.geometry.visual_tokens, known.geometry.marks
    if size is None:
        what = f"image of {one} tokens" if known.geometry.any_size else "image of one tile"
        note = (f"counted is an {what}; this family reads one in as many as its size asks for: name it too",)
        return (one, (one,), None), marks, note if known.tiled else ()
    if not (isinstance(size, tuple | list) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)):
        raise ConfigError(f"image_size={size!r} is no size; use width and height in pixels, for example (640, 480)")
    visual = known.visual((size[0], size[1]), images)
    if visual is None:
        return (
            (one, (one,), None),
            marks,
            (f"this model reads images of every size as {known.geometry.num_patches} patches",),
        )
    marks = marks if visual.marks is None else visual.marks
    return visual.counted, len(visual.token) - visual.patches + marks, ()


def _method(known: Sizes, geometry: Geometry, config: dict[str, Any]) -> tuple[Method | None, Relevance | None]:
    """A method for images of `geometry`, which takes of the recommendation what it reads, and its CLIP side."""
    if isinstance(config["method"], str) and method_name(config["method"]) == "none":
        check_none(PruneConfig.of(**config))
        return None, None
    kind = method_class(config["method"])
    asked = PruneConfig.of(**config)
    method: Method = kind(kind.filled(asked, geometry, known.recommended), geometry)
    if known.clip is None or not method.reads_text_side:
        return method, None
    compared = known.geometry.num_patches if kind.reads_clip else 1
    return method, dataclasses.replace(known.clip, compared=compared)
