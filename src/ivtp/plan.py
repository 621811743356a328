"""Where a method cuts, from a model's sizes alone, and how many visual tokens every layer then sees."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from ivtp.errors import LoadError
from ivtp.trace import TokensPerLayer, Where

Place = Literal["inside", "behind", "projected"]
Rows = Literal["none", "one", "text", "all"]
"""Query rows of a layer: those of the prompt's text, for one. None are needed where a method reads keys alone."""

NEEDS = {
    "cls": "a CLS token in its vision tower",
    "grid": "patches in a grid",
    "text_side": "a text side that shares a space with its vision tower",
}
"""What a method may need of a model family, and a family gives or not."""

PLACES: dict[Place, str] = {
    "inside": "inside an encoder layer",
    "behind": "behind an encoder layer",
    "projected": "behind the projector",
}


@dataclass(frozen=True)
class Compressed:
    """A compressor that stands in for a model's projector: its name, and how many tokens it gives of an image."""

    name: str
    tokens: int

    @classmethod
    def of(cls, named: Any) -> Compressed | None:
        """What a checkpoint's `ivtp.json` says of it; None: nothing. Raises `LoadError` for something else."""
        if named is None:
            return None
        match named:
            case {"name": str(name), "tokens": int(tokens)}:
                return cls(name, tokens)
        raise LoadError(f'the compressor of ivtp.json is {named!r}, not like {{"name": "qformer", "tokens": 64}}')


@dataclass(frozen=True)
class Geometry:
    """The sizes of one vision-language model that pruning and its cost depend on."""

    name: str
    num_patches: int
    """N: what may be cut of one image: its patches, or units of several that the projector makes one token of."""
    patch_size: int
    vision_layers: int
    """Encoder layers whose output reaches the projector (23 of LLaVA-1.5's 24)."""
    vision_depth: int
    """All encoder layers."""
    vision_hidden: int
    vision_mlp: int
    vision_heads: int
    vision_cls: int
    """CLS tokens in front of the patches: 1 or none."""
    text_layers: int
    text_hidden: int
    text_mlp: int
    text_heads: int
    text_kv_heads: int
    text_head_dim: int
    text_mlp_matrices: int
    """Weight matrices of one feed-forward block: 3 when gated, else 2."""
    vocab_size: int
    projector_matrices: int = 2
    """Linear layers of the projector: the first widens a token to the decoder's hidden size."""
    projector_averages: bool = False
    """Whether it reads the mean of a unit's tokens; else all of them side by side."""
    compressed: Compressed | None = None
    """None: the family's own projector, which gives a token for each patch."""
    unit: int = 1
    """Encoder tokens behind one visual token, which are cut together: 4 where the projector reads 2 x 2 of them."""
    marks: int = 0
    """Tokens that the family's processor writes around the slots of each image."""
    projector_width: int | None = None
    """Channels between the projector's two layers; None: as many as it gives."""
    merger_width: int | None = None
    """Channels that a linear layer makes of a unit in front of the projector; None: there is no such layer."""
    patch_frames: int = 1
    """Pictures that a patch spans: 2 in an encoder for videos, which reads an image twice."""
    vision_mlp_matrices: int = 2
    """Weight matrices of a feed-forward block of the encoder: 3 when gated."""
    vision_windowed: tuple[int, ...] = ()
    """Encoder layers that see windows of an image, whose patches see each other alone."""
    deepstack: tuple[int, ...] = ()
    """Encoder layers whose output is projected by itself too, and added to the visual tokens behind the first decoder
    layers, one behind each."""
    any_size: bool = False
    """Whether the encoder reads an image of any size at once, and `num_patches` are those of one of them."""

    @property
    def visual_tokens(self) -> int:
        """Tokens of one image that enter an unpruned decoder."""
        return self.compressed.tokens if self.compressed else self.num_patches

    @property
    def square(self) -> int:
        """Side in pixels of what the encoder sees at once."""
        return math.isqrt(self.num_patches * self.unit) * self.patch_size

    def encoder_tokens(self, patches: int) -> int:
        """Tokens of the encoder, CLS included, that hold so many `patches`."""
        return patches * self.unit + self.vision_cls


@dataclass(frozen=True)
class Cut:
    """One place where visual tokens leave; `keep` tokens of each image remain.

    `layer` (0-based) is cut `inside`, between attention and feed-forward, or `behind` its output; the last encoder
    layer that reaches the projector may also be cut behind the projector (`projected`). The encoder layers behind
    that one, which only make the pooled CLS, go on with all tokens then.
    """

    where: Where
    layer: int
    keep: int
    place: Place = "inside"
    taps: tuple[int, ...] = ()
    """Layers whose queries, keys and values the method reads, the one nearest to the cut last."""
    peek: bool = False
    """The tap is the layer behind the cut, whose queries and keys are computed in advance for it."""
    sized: bool = False
    """The layer's attention counts a merged token as often as the patches that it stands for."""

    def is_after_encoder(self, geometry: Geometry) -> bool:
        """Whether it cuts what the encoder hands on, and nothing in the encoder."""
        return self.where == "vision" and self.place != "inside" and self.layer == geometry.vision_layers - 1


@dataclass(frozen=True)
class ChoiceCost:
    """What one cut costs beside taking the tokens out: arithmetic, and attention that the model's kernel hides."""

    flops: float = 0.0
    """Of each image."""
    rows: tuple[Rows, ...] = ()
    """Of each of the cut's taps the query rows whose attention is computed once more; empty: one of each."""


@dataclass(frozen=True)
class Plan:
    """All cuts of one method on one model, in the order of the forward pass; without cuts the untouched model."""

    cuts: tuple[Cut, ...] = ()
    guide_layers: int = 0
    """Decoder layers, from the first, that carry a pseudo CLS token behind the prompt."""

    def entering(self, cut: Cut, geometry: Geometry) -> int:
        """Visual tokens of one image that come to a cut of this plan."""
        place = next(i for i, other in enumerate(self.cuts) if other is cut)
        return self.cuts[place - 1].keep if place else geometry.num_patches

    def tokens_per_layer(self, geometry: Geometry) -> TokensPerLayer:
        """Visual tokens of one image that the attention and the MLP of each layer see."""
        current = geometry.num_patches
        counts: dict[str, list[int]] = {
            "vision_attention": [],
            "vision_mlp": [],
            "llm_attention": [],
            "llm_mlp": [],
        }
        keeps: dict[tuple[str, int, str], int] = {(c.where, c.layer, c.place): c.keep for c in self.cuts}
        for where, layers in (("vision", geometry.vision_layers), ("llm", geometry.text_layers)):
            for layer in range(layers):
                counts[f"{where}_attention"].append(current)
                current = keeps.get((where, layer, "inside"), current)
                counts[f"{where}_mlp"].append(current)
                current = keeps.get((where, layer, "behind"), current)
            if where == "vision":
                projected = current
                current = keeps.get((where, layers - 1, "projected"), current)
        return TokensPerLayer(**{name: tuple(values) for name, values in counts.items()}, projector=projected)
