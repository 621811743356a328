"""What a prefill costs, from sizes alone: no weights, no forward pass.

Convention: a multiply-accumulate is two FLOPs. Counted are the matrix products of one prefill: the patch
embedding, every linear layer and both attention products (in full, not halved for the causal mask) of the
vision layers that feed the projector, CLS token included; the projector; the decoder; `lm_head` over all
positions; and what choosing the tokens costs. Not counted are element-wise operations, norms, softmax,
embedding look-ups and decode steps. `docs/flops.md` gives the reasons and the published figures.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ivtp.config import READS_CLIP, PruneConfig, check_none
from ivtp.cost.sizes import Relevance, Sizes, sizes
from ivtp.errors import ConfigError
from ivtp.plan import Cut, Geometry, Plan
from ivtp.registry import method_class, method_name
from ivtp.trace import TokensPerLayer


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
    equivalent: tuple[float, float]
    """Mean visual tokens of one image that enter the decoder's layers, and that leave them."""
    notes: tuple[str, ...] = ()
    """What must be known of the method, such as that a part of it is untrained."""

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return self.vision + self.projector + self.llm + self.head + self.pruning


def flops(
    model: Any,
    *,
    method: str | type[Any] = "ivtp",
    keep: int | str = 64,
    text_tokens: int = 512,
    batch: int = 1,
    images: int = 1,
    instruction_tokens: int | None = None,
    **config: Any,
) -> FlopsReport:
    """What a prefill with `method` costs on `model`; `method="none"` is the untouched model.

    `model`: a name (`llava-1.5-7b`, `llava-1.5-13b`, `micro`), a folder or hub id whose `config.json` is on
    this machine, a transformers config, a model, or a `Geometry`. `text_tokens`: the prompt as its tokenizer
    counts it, with one placeholder for each image, whose place the visual tokens take. `instruction_tokens`:
    CLIP tokens of the user's turn; None takes the whole text, but at most one CLIP context. `config`: fields of
    `PruneConfig` and options of the method. Raises `ConfigError` for a value out of range,
    `UnsupportedModelError` for a family without a host, `LoadError` for a model that is not there.
    """
    for name, value, low in (("batch", batch, 1), ("images", images, 1), ("text_tokens", text_tokens, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ConfigError(f"{name}={value!r} is not a count; use a whole number from {low} up")
    if text_tokens < images:
        raise ConfigError(f"text_tokens={text_tokens} has no place for {images} images; use {images} or more")
    known = sizes(model)
    geometry = known.geometry
    plan, clip, notes = _plan(known, {**config, "method": method, "keep": keep})
    if clip is not None and instruction_tokens is None:
        instruction_tokens = min(text_tokens, clip.context - 2)
    report = count_flops(
        geometry,
        plan,
        text_tokens=text_tokens - images,
        batch=batch,
        images=images,
        relevance=clip,
        instruction_tokens=instruction_tokens or 0,
        method=method if isinstance(method, str) else method.__name__,
    )
    return dataclasses.replace(report, text_tokens=text_tokens, notes=notes)


def prompt_tokens(columns: int, geometry: Geometry, images: int = 1) -> int:
    """The `text_tokens` of a prompt whose ids have `columns` columns, one for each patch of its images."""
    return columns - images * (geometry.num_patches - 1)


def _plan(known: Sizes, config: dict[str, Any]) -> tuple[Plan, Relevance | None, tuple[str, ...]]:
    """The plan of a method, which takes of the checkpoint's recommendation what it reads; its CLIP side; its notes."""
    if isinstance(config["method"], str) and method_name(config["method"]) == "none":
        check_none(PruneConfig.of(**config))
        return Plan(), None, ()
    kind = method_class(config["method"])
    asked = PruneConfig.of(**config)
    method = kind(asked.filled(kind.reads, known.recommended), known.geometry)
    reads_clip = kind.reads_clip or (method.plan.guide_layers > 0 and asked.guide in READS_CLIP)
    if known.clip is None or not reads_clip:
        return method.plan, None, method.notes
    compared = known.geometry.num_patches if kind.reads_clip else 1
    return method.plan, dataclasses.replace(known.clip, compared=compared), method.notes


def count_flops(
    geometry: Geometry,
    plan: Plan,
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
    cls = geometry.vision_cls
    encoder = zip(seen.vision_attention, seen.vision_mlp, strict=True)
    vision = _patch_embedding(geometry) + sum(_vision_layer(geometry, a + cls, m + cls) for a, m in encoder)
    decoder = [
        (a * images + text_tokens, m * images + text_tokens)
        for a, m in zip(seen.llm_attention, seen.llm_mlp, strict=True)
    ]
    pruning = sum((_choice(geometry, plan, cut, seen, text_tokens, images) for cut in plan.cuts), 0.0)
    if plan.guide_layers:
        pruning += images * _projector(geometry) + _guide(geometry, decoder[: plan.guide_layers])
    if relevance is not None and images:
        pruning += _relevance(geometry, relevance, instruction_tokens, seen.vision_mlp[-1], images)
    return FlopsReport(
        model=geometry.name,
        method=method,
        keep=seen.final,
        text_tokens=text_tokens,
        vision=batch * images * vision,
        projector=batch * images * seen.projector * _projector(geometry),
        llm=batch * sum(_text_layer(geometry, a, m) for a, m in decoder),
        head=batch * 2.0 * decoder[-1][1] * geometry.text_hidden * geometry.vocab_size,
        pruning=batch * pruning,
        equivalent=seen.equivalent,
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


def _choice(g: Geometry, plan: Plan, cut: Cut, seen: TokensPerLayer, text: int, images: int) -> float:
    """What a cut costs beside its gather, for one prompt: mostly attention that a fused kernel does not hand out.

    A tap whose every row is needed costs Q K^T once more and a weighted sum of its rows; any other one row. A layer
    that is looked at in advance computes its queries, keys and values twice.
    """
    cost = images * (cut.flops + cut.flops_per_text * text)
    if cut.peek:
        kv = 2 * g.text_kv_heads * g.text_head_dim
        entering = seen.llm_mlp[cut.layer] * images + text
        cost += 2.0 * entering * g.text_hidden * (g.text_heads * g.text_head_dim + kv)
    for layer in cut.taps:
        if cut.where == "vision":
            heads, width, sequences = g.vision_heads, g.vision_hidden, images
            length = seen.vision_attention[min(layer, g.vision_layers - 1)] + g.vision_cls
        else:
            heads, width, sequences = g.text_heads, g.text_heads * g.text_head_dim, 1
            tokens = seen.llm_mlp[cut.layer] if cut.peek else seen.llm_attention[layer]
            length = tokens * images + text + (layer < plan.guide_layers)
        if cut.where == "vision" and layer >= g.vision_layers:  # read for this alone
            cost += images * _query_key(g, length)
        rows = length if layer in cut.full_rows else text if cut.text_rows else 1
        one = 2.0 * length * width if not cut.keys_only else 0.0
        cost += sequences * (one if rows == 1 else 2.0 * rows * length * (width + heads))
    return cost


def _relevance(g: Geometry, relevance: Relevance, tokens: int, kept: int, images: int) -> float:
    """CLIP's text encoder over the instruction, the rest of its vision encoder over the `kept` patches."""
    count, length = relevance.windows(tokens)
    layer = _encoder_layer(relevance.text_hidden, relevance.text_mlp, length, length)
    text = count * (relevance.text_layers * layer + 2.0 * length * relevance.text_hidden * relevance.projection)
    words = tokens if relevance.compared == 1 else 1  # all patches are compared with the text as a whole
    cosines = 2.0 * words * relevance.compared * relevance.projection
    shared = 2.0 * relevance.compared * g.vision_hidden * relevance.projection
    return text + images * (relevance.vision_layers * _whole_layer(g, kept) + shared + cosines)


def unread_encoder(g: Geometry, plan: Plan, patches: int) -> float:
    """FLOPs of the vision layers that transformers runs though nothing reads their output, for one image.

    Queries and keys that a cut of `plan` reads there are counted with the cut.
    """
    read = {layer for cut in plan.cuts if cut.where == "vision" for layer in cut.taps if layer >= g.vision_layers}
    whole = (g.vision_depth - g.vision_layers) * _whole_layer(g, patches)
    return whole - len(read) * _query_key(g, patches + g.vision_cls)


def _query_key(g: Geometry, tokens: int) -> float:
    return 2.0 * 2 * tokens * g.vision_hidden**2


def _whole_layer(g: Geometry, patches: int) -> float:
    """FLOPs of one vision layer over the patches of one image and CLS."""
    return _vision_layer(g, patches + g.vision_cls, patches + g.vision_cls)
