"""LLaVA-1.5's own projector, to be trained anew: a token for each patch (Liu et al., arXiv 2310.03744)."""

from __future__ import annotations

from torch import Tensor

from ivtp.compressors.base import Compressor, CompressorInfo, llava_projector, llava_projector_flops
from ivtp.errors import ConfigError
from ivtp.plan import Geometry


class Mlp(Compressor):
    """Two linear layers with GELU over each patch. It makes nothing shorter: what the others are compared to."""

    name = "mlp"
    info = CompressorInfo(
        title="LLaVA-1.5's MLP", year=2023, paper="https://arxiv.org/abs/2310.03744", counts="one a patch"
    )

    def __init__(self, geometry: Geometry, tokens: int) -> None:
        super().__init__(geometry, tokens)
        self.projector = llava_projector(geometry)

    @classmethod
    def check(cls, geometry: Geometry, tokens: int) -> None:
        """All patches, and no other number."""
        if tokens != geometry.num_patches:
            raise ConfigError(
                f"tokens={tokens!r} is not what mlp gives, a token for each patch; use tokens={geometry.num_patches}"
            )

    @classmethod
    def flops(cls, geometry: Geometry, tokens: int, question: int) -> float:
        """Two linear layers."""
        return llava_projector_flops(geometry, tokens)

    def forward(self, features: Tensor, question: Tensor | None = None, asked: Tensor | None = None) -> Tensor:
        """Token by token."""
        projected: Tensor = self.projector(features)
        return projected


COMPRESSOR = Mlp
