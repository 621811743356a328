"""What a prefill costs, from sizes alone: no weights, no forward pass.

Convention: a multiply-accumulate is two FLOPs. Counted are the matrix products of one prefill: the patch
embedding, every linear layer and both attention products (in full, not halved for the causal mask) of the
vision layers that feed the projector, CLS token included; the projector; the decoder; `lm_head` over all
positions; and what choosing the tokens costs. Not counted are element-wise operations, norms, softmax,
embedding look-ups and decode steps. `docs/flops.md` gives the reasons and the published figures.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ivtp.config import Geometry, PruneConfig
from ivtp.errors import ConfigError, LoadError, UnsupportedModelError
from ivtp.registry import host_class, list_hosts, method_class

if TYPE_CHECKING:
    from ivtp.trace import TokensPerLayer, Where

READS_CLIP = ("instruction", "clip", "weighted")
"""Guides that need CLIP's text encoder and its output CLS."""


@dataclass(frozen=True)
class FlopsReport:
    """FLOPs of one prefill of the whole batch, part by part."""

    model: str
    method: str
    keep: int
    """Visual tokens of each image that leave the last layer."""
    text_tokens: int
    vision: float
    projector: float
    llm: float
    head: float
    pruning: float
    """What choosing the tokens costs: attention rows, the pseudo CLS token, CLIP relevance."""

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return self.vision + self.projector + self.llm + self.head + self.pruning


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


class CutLike(Protocol):
    """What the cost needs to know of an `ivtp.methods.base.Cut`."""

    @property
    def where(self) -> Where: ...
    @property
    def taps(self) -> tuple[int, ...]: ...
    @property
    def full_rows(self) -> bool: ...


class PlanLike(Protocol):
    """What the cost needs to know of an `ivtp.methods.base.Plan`."""

    @property
    def cuts(self) -> tuple[CutLike, ...]: ...
    @property
    def guide_layers(self) -> int: ...
    def tokens_per_layer(self, geometry: Geometry) -> TokensPerLayer:
        """Visual tokens of one image that the attention and the MLP of each layer see."""


@dataclass(frozen=True)
class _KeepAll:
    """The plan of the untouched model."""

    cuts: tuple[CutLike, ...] = ()
    guide_layers: int = 0

    def tokens_per_layer(self, geometry: Geometry) -> TokensPerLayer:
        from ivtp.trace import TokensPerLayer  # not at the top: it imports torch, and this module is light

        vision, llm = ((geometry.num_patches,) * n for n in (geometry.vision_layers, geometry.text_layers))
        return TokensPerLayer(vision, vision, llm, llm)


def flops(
    model: Any,
    *,
    method: str = "ivtp",
    keep: int | str = 64,
    text_tokens: int = 512,
    batch: int = 1,
    images: int = 1,
    instruction_tokens: int | None = None,
    **config: Any,
) -> FlopsReport:
    """What a prefill with `method` costs on `model`; `method="none"` is the untouched model.

    `model`: a name (`llava-1.5-7b`, `llava-1.5-13b`, `micro`), a folder or hub id whose `config.json` is on
    this machine, a transformers config, a model, or a `Geometry`. `text_tokens`: text of the prompt, image
    slots not included. `instruction_tokens`: CLIP tokens of the user's turn; None takes the whole text, but
    at most one CLIP context. `config`: fields of `PruneConfig` and options of the method. Raises
    `ConfigError` for a value out of range, `UnsupportedModelError` for a family without a host, `LoadError`
    for a model that is not there.
    """
    for name, value, low in (("text_tokens", text_tokens, 0), ("batch", batch, 1), ("images", images, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ConfigError(f"{name}={value!r} is not a count; use a whole number from {low} up")
    known = sizes(model)
    geometry, clip = known.geometry, known.clip
    asked = PruneConfig.of(**{**known.recommended, **config, "method": method, "keep": keep})
    plan: PlanLike = _KeepAll() if method == "none" else method_class(method)(asked, geometry).plan
    reads_clip = clip is not None and plan.guide_layers > 0 and asked.guide in READS_CLIP
    if clip is not None and instruction_tokens is None:
        instruction_tokens = min(text_tokens, clip.context - 2)
    return count_flops(
        geometry,
        plan,
        text_tokens=text_tokens,
        batch=batch,
        images=images,
        relevance=clip if reads_clip else None,
        instruction_tokens=instruction_tokens or 0,
        method=method,
    )


def count_flops(
    geometry: Geometry,
    plan: PlanLike,
    *,
    text_tokens: int,
    batch: int = 1,
    images: int = 1,
    relevance: Relevance | None = None,
    instruction_tokens: int = 0,
    tokens: TokensPerLayer | None = None,
    method: str = "none",
) -> FlopsReport:
    """The cost of `batch` prompts, each of `text_tokens` text tokens (no image slots) and `images` images.

    `tokens` replaces the counts that the plan announces, for methods that decide them while they run.
    `relevance` is None where the guide reads no CLIP text.
    """
    seen = tokens or plan.tokens_per_layer(geometry)
    cls, entering = geometry.vision_cls, seen.llm_attention[0]
    encoder = zip(seen.vision_attention, seen.vision_mlp, strict=True)
    vision = _patch_embedding(geometry) + sum(_vision_layer(geometry, a + cls, m + cls) for a, m in encoder)
    decoder = [
        (a * images + text_tokens, m * images + text_tokens)
        for a, m in zip(seen.llm_attention, seen.llm_mlp, strict=True)
    ]
    pruning = sum((_taps(geometry, plan, cut, seen, text_tokens, images) for cut in plan.cuts), 0.0)
    if plan.guide_layers:
        pruning += images * _projector(geometry) + _guide(geometry, decoder[: plan.guide_layers])
    if relevance is not None and images:
        pruning += _relevance(geometry, relevance, instruction_tokens, entering, images)
    return FlopsReport(
        model=geometry.name,
        method=method,
        keep=seen.final,
        text_tokens=text_tokens,
        vision=batch * images * vision,
        projector=batch * images * entering * _projector(geometry),
        llm=batch * sum(_text_layer(geometry, a, m) for a, m in decoder),
        head=batch * 2.0 * decoder[-1][1] * geometry.text_hidden * geometry.vocab_size,
        pruning=batch * pruning,
    )


def _patch_embedding(g: Geometry) -> float:
    return 2.0 * g.num_patches * 3 * g.patch_size**2 * g.vision_hidden


def _vision_layer(g: Geometry, attention: int, mlp: int) -> float:
    return _encoder_layer(g.vision_hidden, g.vision_mlp, attention, mlp)


def _encoder_layer(hidden: int, width: int, attention: int, mlp: int) -> float:
    """A CLIP layer whose attention sees `attention` tokens and whose MLP of `width` sees `mlp`."""
    linear = 2.0 * attention * 4 * hidden**2
    products = 2.0 * 2 * attention**2 * hidden  # Q K^T, and the weights times V
    return linear + products + 2.0 * mlp * 2 * hidden * width


def _projector(g: Geometry) -> float:
    """Two linear layers, for one token."""
    return 2.0 * (g.vision_hidden * g.text_hidden + g.text_hidden**2)


def _text_layer(g: Geometry, attention: int, mlp: int) -> float:
    """A decoder layer whose attention sees `attention` tokens and whose MLP sees `mlp`."""
    query, key_value = g.text_heads * g.text_head_dim, g.text_kv_heads * g.text_head_dim
    linear = 2.0 * attention * g.text_hidden * (2 * query + 2 * key_value)
    products = 2.0 * 2 * attention**2 * query
    return linear + products + 2.0 * mlp * g.text_mlp_matrices * g.text_hidden * g.text_mlp


def _guide(g: Geometry, layers: list[tuple[int, int]]) -> float:
    """One more token in the given decoder layers; it leaves with the cut of the last one, before its MLP."""
    *before, (attention, mlp) = layers
    whole = sum(_text_layer(g, a + 1, m + 1) - _text_layer(g, a, m) for a, m in before)
    return whole + _text_layer(g, attention + 1, mlp) - _text_layer(g, attention, mlp)


def _taps(g: Geometry, plan: PlanLike, cut: CutLike, seen: TokensPerLayer, text: int, images: int) -> float:
    """Attention that the model's fused kernel does not hand out and the cut recomputes, for one prompt.

    A tap whose every row is needed costs Q K^T once more and a weighted sum of its rows; any other one row.
    """
    cost = 0.0
    for layer in cut.taps:
        if cut.where == "vision":
            heads, width, sequences = g.vision_heads, g.vision_hidden, images
            length = seen.vision_attention[layer] + g.vision_cls
        else:
            heads, width, sequences = g.text_heads, g.text_heads * g.text_head_dim, 1
            length = seen.llm_attention[layer] * images + text + (layer < plan.guide_layers)
        all_rows = cut.full_rows and layer != cut.taps[-1]
        cost += sequences * (2.0 * length**2 * (width + heads) if all_rows else 2.0 * length * width)
    return cost


def _relevance(g: Geometry, relevance: Relevance, tokens: int, kept: int, images: int) -> float:
    """CLIP's text encoder over the instruction, the rest of its vision encoder over the `kept` patches."""
    count, length = relevance.windows(tokens)
    layer = _encoder_layer(relevance.text_hidden, relevance.text_mlp, length, length)
    text = count * (relevance.text_layers * layer + 2.0 * length * relevance.text_hidden * relevance.projection)
    cosines = 2.0 * tokens * relevance.projection
    vision = relevance.vision_layers * _vision_layer(g, kept + g.vision_cls, kept + g.vision_cls)
    return text + images * (vision + 2.0 * g.vision_hidden * relevance.projection + cosines)


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
