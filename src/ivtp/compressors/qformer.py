"""Q-Former: learned queries in a BERT that look at the patches (BLIP-2, Li et al., ICML 2023, arXiv 2301.12597)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from ivtp.compressors.base import Compressor, CompressorInfo, q_former_flops, q_former_sizes
from ivtp.plan import Geometry


class QFormer(Compressor):
    """Queries pass through BERT-base, whose every other layer also attends to the patches; a linear layer follows.

    transformers' own Q-Former, with a query for each token. It is no wider than the encoder, where that is a small one.
    """

    name = "qformer"
    info = CompressorInfo(
        title="BLIP-2's Q-Former",
        year=2023,
        paper="https://arxiv.org/abs/2301.12597",
        counts="any number, up to one a patch",
    )

    def __init__(self, geometry: Geometry, tokens: int) -> None:
        super().__init__(geometry, tokens)
        sizes = q_former_sizes(geometry)
        self.queries = nn.Parameter(0.02 * torch.randn(tokens, sizes["hidden_size"]))
        self.former = Blip2QFormerModel(Blip2QFormerConfig(**sizes))
        self.projector = nn.Linear(sizes["hidden_size"], geometry.text_hidden)

    @classmethod
    def flops(cls, geometry: Geometry, tokens: int, question: int) -> float:
        """All layers of the BERT, and a linear one."""
        width = q_former_sizes(geometry)["hidden_size"]
        return q_former_flops(geometry, tokens, 0) + 2.0 * tokens * width * geometry.text_hidden

    def forward(self, features: Tensor, question: Tensor | None = None, asked: Tensor | None = None) -> Tensor:
        """Tokens in the order of the queries."""
        queries = self.queries.expand(features.shape[0], -1, -1)
        found = self.former(query_embeds=queries, encoder_hidden_states=features).last_hidden_state
        projected: Tensor = self.projector(found)
        return projected


COMPRESSOR = QFormer
