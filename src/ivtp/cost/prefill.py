"""What one prefill costs, from sizes, a method and the images of a prompt.

Convention: a multiply-accumulate is two FLOPs. Counted are the matrix products of one prefill: the patch
embedding, every linear layer and both attention products (in full, not halved for the causal mask) of the
vision layers that feed the projector, CLS token included; the projector; the decoder; `lm_head` over all
positions; and what choosing the tokens costs. Not counted are element-wise operations, norms, softmax,
embedding look-ups and decode steps. `docs/flops.md` gives the reasons and the published figures.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ivtp.cost.layers import (
    attention_products,
    attention_rows,
    encoder_layer,
    past_keys,
    patch_embedding,
    projector,
    query_key,
    text_layer,
    vision_layer,
    whole_layer,
)
from ivtp.cost.sizes import Relevance
from ivtp.methods.base import Method
from ivtp.plan import Cut, Geometry, Plan, Rows
from ivtp.registry import compressor_class
from ivtp.trace import TokensPerLayer

Image = tuple[int, tuple[int, ...], int | None]
"""Patches of an image, how many of each of its tiles reach the prompt, and `Visual.windowed`: see `Visual.counted`."""


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


def count_prompt(
    geometry: Geometry,
    method: Method | None,
    images: Sequence[Image],
    *,
    text_tokens: int,
    marks: int = 0,
    batch: int = 1,
    relevance: Relevance | None = None,
    instruction_tokens: int | None = None,
    encoded: bool = False,
    past: Sequence[int] = (),
    name: str = "none",
) -> FlopsReport:
    """The cost of `batch` prompts, each of `text_tokens` tokens that are no patches, and of `images`.

    Of the text tokens `marks` are written between tiles, which no method reads as a question. `method` None is the
    untouched model; `relevance` is None where the guide reads no CLIP text; `encoded` counts the decoder alone, for
    prompts whose images are encoded already. Of `instruction_tokens`, which CLIP or a compressor reads, None is the
    whole text, but at most one CLIP context. `past` are tokens that each decoder layer has cached of earlier turns; ()
    is none.
    """
    if instruction_tokens is None:
        instruction_tokens = min(text_tokens, Relevance.context - 2)
    kinds = [_Kind.of(geometry, method, image, count) for image, count in Counter(images).items()]
    plan = method.plan if method else Plan()
    layers = range(geometry.text_layers)
    decoder = [
        (
            sum(k.count * k.seen.llm_attention[i] for k in kinds) + text_tokens,
            sum(k.count * k.seen.llm_mlp[i] for k in kinds) + text_tokens,
        )
        for i in layers
    ]
    pruning = 0.0
    for place, cut in enumerate(plan.cuts):
        assert method is not None
        if cut.where == "llm":
            pruning += _decoder_choice(geometry, method, kinds, place, text_tokens, text_tokens - marks)
            pruning += sum(past_keys(geometry, decoder[tap][0], past[tap]) for tap in cut.taps if past)
        elif not encoded:
            pruning += sum(k.count * k.tiles * _encoder_choice(geometry, k, place, text_tokens - marks) for k in kinds)
    if plan.guide_layers:
        pruning += len(images) * projector(geometry) + _guide(geometry, decoder[: plan.guide_layers])
    if relevance is not None and images:
        pruning += _relevance(geometry, relevance, instruction_tokens, kinds)
    largest = max(kinds, key=lambda k: k.seen.final).seen if kinds else plan.tokens_per_layer(geometry)
    return FlopsReport(
        model=geometry.name,
        method=name,
        keep=largest.final,
        text_tokens=text_tokens,
        vision=0.0 if encoded else batch * sum(k.count * k.tiles * _vision(geometry, k) for k in kinds),
        projector=0.0 if encoded else batch * _projected(geometry, kinds, instruction_tokens),
        llm=batch
        * (
            sum(text_layer(geometry, a, m) for a, m in decoder)
            + sum(2 * past_keys(geometry, decoder[i][0], keys) for i, keys in enumerate(past))
        ),
        head=batch * 2.0 * decoder[-1][1] * geometry.text_hidden * geometry.vocab_size,
        pruning=batch * pruning,
        equivalent=largest.equivalent,
    )


@dataclass(frozen=True)
class _Kind:
    """Images that are cut alike."""

    count: int
    tiles: int
    whole: Method | None
    """The method, for such an image."""
    by_tile: Method | None
    """The method, for a tile of it."""
    seen: TokensPerLayer
    """Tokens of the image in each layer; of the encoder as if it were one tile."""
    tile: TokensPerLayer
    """Tokens of a tile in each layer of the encoder."""
    windowed: int | None
    """`Visual.windowed`."""

    @classmethod
    def of(cls, geometry: Geometry, method: Method | None, image: Image, count: int) -> _Kind:
        patches, visible, windowed = image
        of_tile = patches if geometry.any_size else geometry.num_patches
        own, tile = (dataclasses.replace(geometry, num_patches=n) for n in (patches, of_tile))
        if method is None:
            seen, of_each = (Plan().tokens_per_layer(sizes) for sizes in (own, tile))
            return cls(count, len(visible), None, None, seen, of_each, windowed)
        whole = method.sized(patches)
        by_tile = whole.tiled(of_tile, visible)
        seen, of_each = (part.plan.tokens_per_layer(sizes) for part, sizes in ((whole, own), (by_tile, tile)))
        return cls(count, len(visible), whole, by_tile, seen, of_each, windowed)


def _vision(g: Geometry, kind: _Kind) -> float:
    """The encoder over one tile."""
    counts = [
        tuple(map(g.encoder_tokens, pair))
        for pair in zip(kind.tile.vision_attention, kind.tile.vision_mlp, strict=True)
    ]
    layers = sum(vision_layer(g, attention, mlp) for attention, mlp in counts)
    if kind.windowed is not None:
        unseen = (counts[layer][0] ** 2 - kind.windowed * g.unit**2 for layer in g.vision_windowed)
        layers -= sum(map(functools.partial(attention_products, g.vision_hidden), unseen))
    return patch_embedding(g, kind.tile.vision_attention[0]) + layers


def _projected(g: Geometry, kinds: list[_Kind], question: int) -> float:
    """The projector over what leaves the encoder, or the compressor in its place.

    Those of deepstack layers read what reaches the decoder alone.
    """
    if g.compressed is None:
        read = (k.tile.projector + len(g.deepstack) * k.tile.llm_attention[0] for k in kinds)
        return sum(k.count * k.tiles * n for k, n in zip(kinds, read, strict=True)) * projector(g)
    kind = compressor_class(g.compressed.name)
    each: float = kind.flops(g, g.compressed.tokens, question)
    return sum(k.count for k in kinds) * each


def _guide(g: Geometry, layers: list[tuple[int, int]]) -> float:
    """One more token in the given decoder layers; it leaves with the cut of the last one, before its MLP."""
    *before, (attention, mlp) = layers
    whole = sum(text_layer(g, a + 1, m + 1) - text_layer(g, a, m) for a, m in before)
    return whole + text_layer(g, attention + 1, mlp) - text_layer(g, attention, mlp)


def _encoder_choice(g: Geometry, kind: _Kind, place: int, text: int) -> float:
    """What a cut of the encoder costs beside its gather, for one tile: attention that a fused kernel hides."""
    assert kind.by_tile is not None
    cut = kind.by_tile.plan.cuts[place]
    choice = kind.by_tile.cost(cut, _entering(cut, kind.tile), text)
    cost = choice.flops
    for layer, rows in zip(cut.taps, choice.rows or _one_each(cut), strict=True):
        length = g.encoder_tokens(kind.tile.vision_attention[min(layer, g.vision_layers - 1)])
        if rows == "one" and not g.vision_cls:  # the mean of all rows stands for that of CLS
            rows = "all"
        cost += attention_rows(rows, length, text, g.vision_heads, g.vision_hidden)
        if layer >= g.vision_layers:  # read for this alone
            cost += query_key(g, length)
    return cost


def _decoder_choice(g: Geometry, method: Method, kinds: list[_Kind], place: int, text: int, read: int) -> float:
    """What a cut of the decoder costs beside its gather, for one prompt; a batch computes its rows without images too.

    A layer that is looked at in advance computes its queries, keys and values twice. Of the `text` a method may `read`
    so many tokens.
    """
    cut = method.plan.cuts[place]
    choice = method.cost(cut, _entering(cut, method.plan.tokens_per_layer(method.geometry)), read)
    rows = choice.rows or _one_each(cut)
    cost, entering = 0.0, text
    for kind in kinds:
        assert kind.whole is not None
        own = kind.whole.plan.cuts[place]
        came = _entering(own, kind.seen)
        cost += kind.count * kind.whole.cost(own, came, read).flops
        entering += kind.count * came
    if cut.peek:
        kv = 2 * g.text_kv_heads * g.text_head_dim
        cost += 2.0 * entering * g.text_hidden * (g.text_heads * g.text_head_dim + kv)
    for layer, needed in zip(cut.taps, rows, strict=True):
        length = entering if cut.peek else sum(k.count * k.seen.llm_attention[layer] for k in kinds) + text
        length += layer < method.plan.guide_layers
        cost += attention_rows(needed, length, read, g.text_heads, g.text_heads * g.text_head_dim)
    return cost


def _one_each(cut: Cut) -> tuple[Rows, ...]:
    """One attention row of every tap."""
    return tuple("one" for _ in cut.taps)


def _entering(cut: Cut, seen: TokensPerLayer) -> int:
    """Visual tokens of one image that come to a cut."""
    if cut.place == "projected":
        return seen.projector
    inside, behind = (
        (seen.vision_attention, seen.vision_mlp) if cut.where == "vision" else (seen.llm_attention, seen.llm_mlp)
    )
    return (inside if cut.place == "inside" else behind)[cut.layer]


def _relevance(g: Geometry, relevance: Relevance, tokens: int, kinds: list[_Kind]) -> float:
    """CLIP's text encoder over the instruction, the rest of its vision encoder over the patches that are kept."""
    count, length = relevance.windows(tokens)
    layer = encoder_layer(relevance.text_hidden, relevance.text_mlp, length, length)
    text = count * (relevance.text_layers * layer + 2.0 * length * relevance.text_hidden * relevance.projection)
    words = tokens if relevance.compared == 1 else 1  # all patches are compared with the text as a whole
    cosines = 2.0 * words * relevance.compared * relevance.projection
    shared = 2.0 * relevance.compared * g.vision_hidden * relevance.projection
    for kind in kinds:
        rated = kind.tiles if relevance.compared > 1 else 1  # the first tile's CLS stands for the image
        rest = kind.tiles * relevance.vision_layers * whole_layer(g, kind.tile.vision_mlp[-1])
        text += kind.count * (rest + rated * (shared + cosines))
    return text


def unread_encoder(g: Geometry, plan: Plan, patches: int) -> float:
    """FLOPs of the vision layers that transformers runs though nothing reads their output, for one image.

    Queries and keys that a cut of `plan` reads there are counted with the cut.
    """
    read = {layer for cut in plan.cuts if cut.where == "vision" for layer in cut.taps if layer >= g.vision_layers}
    whole = (g.vision_depth - g.vision_layers) * whole_layer(g, patches)
    return whole - len(read) * query_key(g, g.encoder_tokens(patches))
