"""The sizes of a model by which its cost is counted: from a name, a folder, a config or the model itself."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ivtp.config import Geometry
from ivtp.errors import LoadError, UnsupportedModelError
from ivtp.registry import host_class, list_hosts


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

    def windows(self, tokens: int) -> tuple[int, int]:
        """Number and length of the encoded windows for `tokens` CLIP tokens without BOS and EOS."""
        inside = self.context - 2
        return max(1, -(-tokens // inside)), min(tokens, inside) + 2


_STOCK = {
    "llava-1.5-7b": {"hidden_size": 4096, "intermediate_size": 11008, "layers": 32},
    "llava-1.5-13b": {"hidden_size": 5120, "intermediate_size": 13824, "layers": 40},
}
_CLIP_L14 = Relevance(text_layers=12, text_hidden=768, text_mlp=3072, projection=768)


@dataclass(frozen=True)
class Sizes:
    """What the cost of a model depends on."""

    geometry: Geometry
    clip: Relevance | None
    """The CLIP that the vision tower is from; None where it is not known: its text encoder is then not counted."""
    recommended: Mapping[str, Any]
    """Options that the checkpoint's `ivtp.json` recommends."""


def sizes(model: Any) -> Sizes:
    """The sizes of a model in any of the forms that `flops` takes."""
    if isinstance(model, Geometry):
        return Sizes(model, _openai_clip(model, 1), {})
    name = model.removeprefix("llava-hf/").removesuffix("-hf") if isinstance(model, str) else None
    folder = Path()
    if name in _STOCK:
        config = _stock_config(name)
    elif isinstance(model, str | Path):
        folder = Path(__file__).parent / "micro" / "assets" if model == "micro" else Path(model)
        config = _local_config(model, folder)
    else:
        config = getattr(model, "config", model)
        folder = Path(str(getattr(model, "name_or_path", "")))
    host = next((h for h in map(host_class, list_hosts()) if h.matches(config)), None)
    if host is None:
        kind = getattr(config, "model_type", None) or type(model).__name__
        families = ", ".join(list_hosts())
        raise UnsupportedModelError(f"{kind!r} is no model family that can be pruned; use one of {families}")
    geometry: Geometry = host.geometry(config)
    if isinstance(model, str | Path):
        geometry = dataclasses.replace(geometry, name=name or str(model))
    behind = config.vision_config.num_hidden_layers - geometry.vision_layers
    sidecar = _read_json(folder / "ivtp.json") if folder != Path() else {}
    clip = _clip_beside(folder / str(sidecar["clip"]), behind) if "clip" in sidecar else None
    return Sizes(
        geometry,
        clip or _openai_clip(geometry, behind),
        {k: v for k, v in sidecar.items() if k in ("llm_layers", "group_layers", "threshold")},
    )


def _stock_config(name: str) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    decoder = dict(_STOCK[name])
    layers = decoder.pop("layers")
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
            projection_dim=768,
        ),
        text_config=LlamaConfig(**decoder, num_hidden_layers=layers, num_attention_heads=layers, vocab_size=32064),
    )


def _local_config(model: str | Path, folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder if folder.is_dir() else str(model), local_files_only=True)
    except (OSError, ValueError):
        names = [*_STOCK, "micro"]
        near = difflib.get_close_matches(str(model), names, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise LoadError(
            f"there is no configuration of {str(model)!r} on this machine; {hint}use {', '.join(names)}, "
            "a folder with a config.json, or a hub id that was downloaded before"
        ) from None


def _openai_clip(g: Geometry, behind: int) -> Relevance | None:
    """OpenAI's CLIP ViT-L/14 for a vision tower of its sizes."""
    of_its_size = (g.vision_hidden, g.vision_layers + behind, g.patch_size) == (1024, 24, 14)
    return dataclasses.replace(_CLIP_L14, vision_layers=behind) if of_its_size else None


def _clip_beside(folder: Path, behind: int) -> Relevance | None:
    """The CLIP in a folder of the checkpoint."""
    clip = _read_json(folder / "config.json")
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


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise LoadError(f"{file} is not valid JSON ({error}); repair or remove it") from None
