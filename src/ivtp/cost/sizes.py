"""The sizes of a model by which its cost is counted: from a name, a folder, a config or the model itself."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ivtp.compressors.base import Compressor
from ivtp.errors import LoadError, UnsupportedModelError
from ivtp.files.sidecar import COMPRESSOR, MICRO, local_folder, read_json, recommended, sidecar
from ivtp.hosts.base import Visual, openai_clip
from ivtp.plan import Compressed, Geometry
from ivtp.registry import host_classes


@dataclass(frozen=True)
class Relevance:
    """What Eq. 5 adds: CLIP's text encoder, and the vision layers behind the one that feeds the projector."""

    text_layers: int
    text_hidden: int
    text_mlp: int
    projection: int
    """Width of CLIP's shared space."""
    context: int = 77
    """Positions of the text encoder, BOS and EOS included; longer instructions are encoded in windows."""
    vision_layers: int = 1
    """Encoder layers between the one that feeds the projector and CLIP's output (LLaVA-1.5 skips one)."""
    compared: int = 1
    """Vision tokens of an image in the shared space: the pooled CLS, or every patch."""

    def windows(self, tokens: int) -> tuple[int, int]:
        """Number and length of the encoded windows for `tokens` CLIP tokens without BOS and EOS."""
        inside = self.context - 2
        return max(1, -(-tokens // inside)), min(tokens, inside) + 2


_CLIP_L14 = Relevance(text_layers=12, text_hidden=768, text_mlp=3072, projection=768)


@dataclass(frozen=True)
class Sizes:
    """What the cost of a model depends on."""

    geometry: Geometry
    clip: Relevance | None
    """The CLIP that the vision tower is from; None where it is not known: its text encoder is then not counted."""
    recommended: Mapping[str, Any]
    """Options for this checkpoint, of which a method takes those that it knows."""
    tiled: bool = False
    """Whether the family reads an image in tiles or tokens, as many as its size asks for."""
    visual: Callable[[tuple[int, int], int], Visual | None] = lambda size, images: None
    """What an image of a size (width, height), one of so many, is to the family; None where all are alike."""
    compressible: bool = True
    """Whether a compressor may stand in for the family's projector."""


def sizes(model: Any) -> Sizes:
    """The sizes of a model in any of the forms that `flops` takes."""
    if isinstance(model, Geometry):
        return Sizes(model, _openai_text_side(model, 1), {})
    folder: Path | None = None
    if isinstance(model, str | Path):
        known = _well_known(str(model))
        folder = None if known else _folder_of(model)
        config = known[1] if known else _local_config(model, folder)
    else:
        config = getattr(model, "config", model)
        folder = local_folder(getattr(model, "name_or_path", None))
    host = next((h for h in host_classes().values() if h.matches(config)), None)
    if host is None:
        kind = getattr(config, "model_type", None) or type(model).__name__
        families = ", ".join(host_classes())
        raise UnsupportedModelError(f"{kind!r} is no model family that can be pruned; use one of {families}")
    geometry: Geometry = host.geometry(config)
    if isinstance(model, str | Path):
        geometry = dataclasses.replace(geometry, name=known[0] if known else str(model))
    behind = geometry.vision_depth - geometry.vision_layers
    beside = sidecar(folder)
    geometry = dataclasses.replace(geometry, compressed=_compressed(model, beside))
    clip = _clip_beside(folder / str(beside["clip"]), behind) if folder and beside.get("clip") else None
    return Sizes(
        geometry,
        clip or _openai_text_side(geometry, behind),
        recommended(beside),
        tiled=host.visual(config, (1, 1)) is not None,
        visual=functools.partial(host.visual, config),
        compressible=host.compressible,
    )


def _compressed(model: Any, beside: Mapping[str, Any]) -> Compressed | None:
    """The compressor that is in a model, or lies beside a checkpoint."""
    if not isinstance(model, nn.Module):
        return Compressed.of(beside.get(COMPRESSOR)) if isinstance(model, str | Path) else None
    found = (Compressed(part.name, part.tokens) for part in model.modules() if isinstance(part, Compressor))
    return next(found, None)


def model_config(model: str | Path) -> Any:
    """The transformers configuration that a name, a folder, a JSON file or a downloaded hub id stands for.

    Raises `LoadError` where there is none on this machine.
    """
    known = _well_known(str(model))
    return known[1] if known else _local_config(model, _folder_of(model))


def _well_known(named: str) -> tuple[str, Any] | None:
    """Name and configuration of a size that a family knows by this name or hub id, if there is one."""
    for host in host_classes().values():
        for name in host.stock:
            hub = host.hub.format(name)
            if named in (name, hub, hub.partition("/")[2]):
                return name, host.stock_config(name)
    return None


def _folder_of(model: str | Path) -> Path | None:
    return local_folder(MICRO if model == "micro" else model)


def _local_config(model: str | Path, folder: Path | None) -> Any:
    from transformers import AutoConfig

    if folder is not None:
        read_json(folder / "config.json")  # says what is wrong with a broken one
    try:
        return AutoConfig.from_pretrained(folder or str(model), local_files_only=True)
    except (OSError, ValueError):
        names = [*(name for host in host_classes().values() for name in host.stock), "micro"]
        near = difflib.get_close_matches(str(model), names, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise LoadError(
            f"there is no configuration of {str(model)!r} on this machine; {hint}use {', '.join(names)}, "
            "a folder with a config.json, or a hub id that was downloaded before"
        ) from None


def _openai_text_side(geometry: Geometry, behind: int) -> Relevance | None:
    """The text side of OpenAI's CLIP ViT-L/14, which is the same at both of its image sizes."""
    known = openai_clip(geometry, geometry.vision_layers + behind)
    return dataclasses.replace(_CLIP_L14, vision_layers=behind) if known else None


def _clip_beside(folder: Path, behind: int) -> Relevance | None:
    """The CLIP in a folder of the checkpoint."""
    clip = read_json(folder / "config.json")
    text = clip.get("text_config")
    if text is None:
        return None
    return Relevance(
        text_layers=text["num_hidden_layers"],
        text_hidden=text["hidden_size"],
        text_mlp=text["intermediate_size"],
        projection=clip["projection_dim"],
        context=text.get("max_position_embeddings", Relevance.context),
        vision_layers=behind,
    )
