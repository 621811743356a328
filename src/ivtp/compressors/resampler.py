"""Qwen-VL's adapter: one cross-attention of learned queries with places (Bai et al., 2023, arXiv 2308.12966)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ivtp.compressors.base import (
    CompressorInfo,
    GridCompressor,
    llava_projector,
    llava_projector_flops,
    side_of,
)
from ivtp.core.resample import plane_positions
from ivtp.plan import Geometry


class Resampler(GridCompressor):
    """A single cross-attention: learned queries, laid out in a grid over the picture, look at the patches.

    Two-dimensional absolute positions are added to queries and keys. The paper leaves the width open; its 0.08 billion
    parameters are those of an attention as wide as the decoder. Here it is as wide as the encoder, in front of LLaVA's
    two linear layers, as the published cost asks for: at the decoder's width 64 tokens of LLaVA-1.5-7B would cost 8.2
    TFLOPs instead of 8.1.
    """

    name = "resampler"
    info = CompressorInfo(
        title="Qwen-VL's resampler",
        year=2023,
        paper="https://arxiv.org/abs/2308.12966",
        counts="a grid whose sides differ by a factor of two at most",
    )

    def __init__(self, geometry: Geometry, tokens: int) -> None:
        super().__init__(geometry, tokens)
        width, side = geometry.vision_hidden, side_of(geometry)
        self.queries = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.places = nn.Buffer(plane_positions(self.grid_for(geometry, tokens), side, width), persistent=False)
        self.patch_places = nn.Buffer(plane_positions(side, side, width), persistent=False)
        self.norm_query, self.norm_patch, self.norm_token = (nn.LayerNorm(width) for _ in range(3))
        self.attention = nn.MultiheadAttention(width, geometry.vision_heads, batch_first=True)
        self.projector = llava_projector(geometry)

    @classmethod
    def flops(cls, geometry: Geometry, tokens: int, question: int) -> float:
        """The attention, and two linear layers."""
        width, patches = geometry.vision_hidden, geometry.num_patches
        attention = 2.0 * 2 * (tokens + patches) * width**2 + 2.0 * 2 * tokens * patches * width
        return attention + llava_projector_flops(geometry, tokens)

    def forward(self, features: Tensor, question: Tensor | None = None, asked: Tensor | None = None) -> Tensor:
        """Tokens in raster order of the queries' grid."""
        patches = self.norm_patch(features)
        queries = (self.norm_query(self.queries) + self.places).expand(features.shape[0], -1, -1)
        found, _ = self.attention(queries, patches + self.patch_places, patches, need_weights=False)
        projected: Tensor = self.projector(self.norm_token(found))
        return projected


COMPRESSOR = Resampler
