"""What a trained projector is: an encoder's patches in, a few embeddings for the decoder out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ivtp.errors import ConfigError
from ivtp.plan import Geometry

Grid = tuple[int, int]
"""Rows and columns."""


@dataclass(frozen=True)
class CompressorInfo:
    """The line of a compressor in the documentation."""

    title: str
    year: int
    paper: str
    counts: str
    """Numbers of tokens that it can give."""
    reads_question: bool = False


class Compressor(nn.Module):
    """Stands in for a LLaVA's projector. Its parameters are trained, and random before; images do not mix."""

    name: ClassVar[str]
    """Also the file's name."""
    info: ClassVar[CompressorInfo]

    def __init__(self, geometry: Geometry, tokens: int) -> None:
        """For a model of `geometry`. Raises `ConfigError` for a number of tokens that it cannot give."""
        super().__init__()
        self.check(geometry, tokens)
        self.tokens = tokens

    @classmethod
    def seeded(cls, geometry: Geometry, tokens: int, seed: int) -> Compressor:
        """One whose random weights follow from `seed`; the global generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(geometry, tokens)

    @classmethod
    def check(cls, geometry: Geometry, tokens: int) -> None:
        """Raise `ConfigError` for a number of tokens that it cannot give of an image of a model of `geometry`."""
        if not isinstance(tokens, int) or isinstance(tokens, bool) or not 1 <= tokens <= geometry.num_patches:
            raise ConfigError(
                f"tokens={tokens!r} is no number of tokens that {cls.name} can give of {geometry.num_patches} patches; "
                f"use {cls.info.counts}"
            )

    @classmethod
    def flops(cls, geometry: Geometry, tokens: int, question: int) -> float:
        """Of one image whose question has `question` tokens: linear layers, convolutions and attention products."""
        raise NotImplementedError

    def forward(self, features: Tensor, question: Tensor | None = None, asked: Tensor | None = None) -> Tensor:
        """Patches (I, N, D_vision) of the encoder to embeddings (I, tokens, D_text).

        `question` (I, L) are the token ids of what is asked about each image, and `asked` (I, L) bool marks those that
        are no padding; both reach only compressors that read it, and None there is a question without words.
        """
        raise NotImplementedError


def grid_of(tokens: int) -> Grid | None:
    """The grid with exactly so many cells that is nearest to a square; None where a side is over twice the other."""
    rows = next(rows for rows in range(math.isqrt(tokens), 0, -1) if tokens % rows == 0)
    columns = tokens // rows
    return (rows, columns) if columns <= 2 * rows else None


class GridCompressor(Compressor):
    """One whose tokens fill a grid, and `extra` ones beside it."""

    extra: ClassVar[int] = 0

    @classmethod
    def check(cls, geometry: Geometry, tokens: int) -> None:
        """A grid of tokens."""
        super().check(geometry, tokens)
        cls.grid_for(geometry, tokens)

    @classmethod
    def grid_for(cls, geometry: Geometry, tokens: int) -> Grid:
        """The grid of all tokens but the extra ones. Raises `ConfigError` with the nearest numbers that have one."""
        found = grid_of(tokens - cls.extra) if tokens > cls.extra else None
        if found is None:
            counts = [n for n in range(1 + cls.extra, geometry.num_patches + 1) if grid_of(n - cls.extra)]
            near = sorted(sorted(counts, key=lambda n: abs(n - tokens))[:3])
            raise ConfigError(
                f"tokens={tokens} has no grid for {cls.name}, which gives {cls.info.counts}; "
                f"use for example {', '.join(map(str, near))}"
            )
        return found


def side_of(geometry: Geometry) -> Grid:
    """The grid of an image's patches."""
    side = math.isqrt(geometry.num_patches)
    return side, geometry.num_patches // side


# ---- LLaVA's own projector, which others end with -----------------------------------------------------------------


def llava_projector(geometry: Geometry) -> nn.Module:
    """transformers' two linear layers with GELU, token by token."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=geometry.vision_hidden, num_attention_heads=1),
        text_config=LlamaConfig(hidden_size=geometry.text_hidden, num_attention_heads=1, num_key_value_heads=1),
        projector_hidden_act="gelu",
    )
    made: nn.Module = LlavaMultiModalProjector(config)
    return made


def llava_projector_flops(geometry: Geometry, tokens: int) -> float:
    """Of so many tokens."""
    return 2.0 * tokens * (geometry.vision_hidden + geometry.text_hidden) * geometry.text_hidden


# ---- the Q-Former, which BLIP-2 and LLaMA-VID share ---------------------------------------------------------------

LAYERS, WIDTH, HEAD = 12, 768, 64
"""BERT-base, of which BLIP-2's Q-Former is made."""


def q_former_sizes(geometry: Geometry) -> dict[str, int]:
    """For a Q-Former's transformers config: those of BERT-base, but no wider than the encoder that it reads."""
    width = min(WIDTH, geometry.vision_hidden)
    heads = max(1, width // HEAD)
    while width % heads:
        heads -= 1
    return {
        "hidden_size": width,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "encoder_hidden_size": geometry.vision_hidden,
        "cross_attention_frequency": 2,
    }


def q_former_flops(geometry: Geometry, queries: int, text: int) -> float:
    """Of a Q-Former with so many queries and text tokens; what the last layer makes of the text is not computed."""
    width, patches, tokens = min(WIDTH, geometry.vision_hidden), geometry.num_patches, queries + text
    own = 2.0 * tokens * 4 * width**2 + 2.0 * 2 * tokens**2 * width
    crossed = 2.0 * queries * 2 * width**2 + 2.0 * patches * 2 * geometry.vision_hidden * width
    crossed += 2.0 * 2 * queries * patches * width
    feed_forward = 2.0 * 2 * width * 4 * width
    return LAYERS * (own + tokens * feed_forward) - text * feed_forward + LAYERS // 2 * crossed
