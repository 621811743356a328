"""C-Abstractor: convolutions around an adaptive average pooling (Honeybee, Cha et al., CVPR 2024, arXiv 2312.06742)."""

from __future__ import annotations

from torch import Tensor, nn

from ivtp.compressors.base import (
    CompressorInfo,
    GridCompressor,
    llava_projector,
    llava_projector_flops,
    side_of,
)
from ivtp.plan import Geometry

BLOCKS = 3
"""L of the paper: blocks before the pooling, and as many behind it."""
NARROW = 4
"""By how much a bottleneck is narrower than what it reads, in ResNet and in squeeze-and-excitation."""


class CAbstractor(GridCompressor):
    """L ResNet blocks over the patch grid, adaptive average pooling to a coarser grid, and L blocks over that.

    The paper leaves the block open: here it is ResNet's bottleneck with squeeze-and-excitation at the encoder's width.
    It normalises each image by itself, where ResNet normalises a batch. LLaVA's two linear layers follow.
    """

    name = "cabstractor"
    info = CompressorInfo(
        title="Honeybee's C-Abstractor",
        year=2023,
        paper="https://arxiv.org/abs/2312.06742",
        counts="a grid whose sides differ by a factor of two at most",
    )

    def __init__(self, geometry: Geometry, tokens: int) -> None:
        super().__init__(geometry, tokens)
        width = geometry.vision_hidden
        self.side = side_of(geometry)
        self.near = nn.Sequential(*(Bottleneck(width) for _ in range(BLOCKS)))
        self.pool = nn.AdaptiveAvgPool2d(self.grid_for(geometry, tokens))
        self.far = nn.Sequential(*(Bottleneck(width) for _ in range(BLOCKS)))
        self.projector = llava_projector(geometry)

    @classmethod
    def flops(cls, geometry: Geometry, tokens: int, question: int) -> float:
        """All blocks, and two linear layers."""
        blocks = sum(Bottleneck.flops(geometry.vision_hidden, places) for places in (geometry.num_patches, tokens))
        return BLOCKS * blocks + llava_projector_flops(geometry, tokens)

    def forward(self, features: Tensor, question: Tensor | None = None, asked: Tensor | None = None) -> Tensor:
        """Tokens in raster order."""
        image = features.transpose(1, 2).reshape(features.shape[0], -1, *self.side)  # (I, D, rows, columns)
        pooled = self.far(self.pool(self.near(image)))
        projected: Tensor = self.projector(pooled.flatten(2).transpose(1, 2))
        return projected


class Bottleneck(nn.Module):
    """ResNet's bottleneck (arXiv 1512.03385) with squeeze-and-excitation (arXiv 1709.01507), over (I, D, r, c)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = max(1, width // NARROW)
        squeezed = max(1, inner // NARROW)
        self.convolve = nn.Sequential(
            *(nn.Conv2d(width, inner, 1, bias=False), nn.GroupNorm(1, inner), nn.SiLU()),
            *(nn.Conv2d(inner, inner, 3, padding=1, bias=False), nn.GroupNorm(1, inner), nn.SiLU()),
        )
        self.excite = nn.Sequential(
            *(nn.AdaptiveAvgPool2d(1), nn.Conv2d(inner, squeezed, 1), nn.SiLU()),
            *(nn.Conv2d(squeezed, inner, 1), nn.Sigmoid()),
        )
        self.widen = nn.Sequential(nn.Conv2d(inner, width, 1, bias=False), nn.GroupNorm(1, width))

    def forward(self, image: Tensor) -> Tensor:
        """The image and what the block adds to it."""
        inner = self.convolve(image)
        return nn.functional.silu(image + self.widen(inner * self.excite(inner)))

    @staticmethod
    def flops(width: int, places: int) -> float:
        """Of a grid of so many places."""
        inner = max(1, width // NARROW)
        squeezed = max(1, inner // NARROW)
        return 2.0 * places * (2 * width * inner + 9 * inner**2) + 2.0 * 2 * inner * squeezed


COMPRESSOR = CAbstractor
