"""LLaMA-VID: a token of what the question asks for, and a pooled grid (Li et al., ECCV 2024, arXiv 2311.17043)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import InstructBlipQFormerConfig, InstructBlipQFormerModel

from ivtp.compressors.base import (
    CompressorInfo,
    GridCompressor,
    llava_projector,
    llava_projector_flops,
    q_former_flops,
    q_former_sizes,
    side_of,
)
from ivtp.core.merge import pool_grid
from ivtp.core.resample import context_attention
from ivtp.plan import Geometry

QUERIES = 32
"""M of the paper, as many as a Q-Former has."""
LONGEST = 512
"""Tokens of a question that BERT reads; what comes behind is left out."""


class LlamaVid(GridCompressor):
    """One context token, which the question guides, in front of content tokens, the patch grid pooled to a coarser one.

    The text decoder is a Q-Former: its queries look at the question and at the patches, and each then attends to the
    patches once more (Eq. 1); the mean of what they find is the context token. It is transformers' Q-Former of
    InstructBLIP, but reads the decoder's own token ids, so that no second tokenizer is needed. A linear layer projects
    the context, LLaVA's two layers the content. The context token is one of `tokens`: 64 are 1 and a grid of 7 x 9.
    """

    name = "llamavid"
    extra = 1  # the context
    info = CompressorInfo(
        title="LLaMA-VID",
        year=2023,
        paper="https://arxiv.org/abs/2311.17043",
        counts="one more than a grid whose sides differ by a factor of two at most",
        reads_question=True,
    )

    def __init__(self, geometry: Geometry, tokens: int) -> None:
        super().__init__(geometry, tokens)
        sizes, width = q_former_sizes(geometry), geometry.vision_hidden
        self.side, self.grid = side_of(geometry), self.grid_for(geometry, tokens)
        self.queries = nn.Parameter(0.02 * torch.randn(QUERIES, sizes["hidden_size"]))
        self.text_decoder = InstructBlipQFormerModel(
            InstructBlipQFormerConfig(
                **sizes, vocab_size=geometry.vocab_size, max_position_embeddings=LONGEST, pad_token_id=None
            )
        )
        last = self.text_decoder.encoder.layer[-1]  # its text is read by nobody, and would never get a gradient
        last.intermediate, last.output = nn.Identity(), _Residual()
        self.query = nn.Linear(sizes["hidden_size"], width)
        with torch.no_grad():
            self.query.weight.mul_(width**-0.5)  # attention that starts as even as a scaled one
        self.context = nn.Linear(width, geometry.text_hidden)
        self.content = llava_projector(geometry)

    @classmethod
    def flops(cls, geometry: Geometry, tokens: int, question: int) -> float:
        """The text decoder, the context's attention, and the linear layers."""
        width = geometry.vision_hidden
        context = QUERIES * q_former_sizes(geometry)["hidden_size"] * width + width * geometry.text_hidden
        context += (QUERIES + 1) * geometry.num_patches * width
        decoder = q_former_flops(geometry, QUERIES, min(question, LONGEST))
        return decoder + 2.0 * context + llava_projector_flops(geometry, tokens - 1)

    def forward(self, features: Tensor, question: Tensor | None = None, asked: Tensor | None = None) -> Tensor:
        """The context token, then the content in raster order."""
        images = features.shape[0]
        ids = None if question is None else question[:, :LONGEST]
        mask = None
        if ids is not None:
            words = torch.ones_like(ids) if asked is None else asked[:, :LONGEST].to(ids.dtype)
            mask = torch.cat([words.new_ones(images, QUERIES), words], dim=1)
        decoded = self.text_decoder(
            input_ids=ids,
            attention_mask=mask,
            query_embeds=self.queries.expand(images, -1, -1),
            encoder_hidden_states=features,
        ).last_hidden_state[:, :QUERIES]
        context = self.context(context_attention(self.query(decoded), features))
        content = self.content(pool_grid(features, self.side, self.grid)[0])
        return torch.cat([context.unsqueeze(1), content], dim=1)


class _Residual(nn.Module):
    """A feed-forward block that adds nothing."""

    def forward(self, inner: Tensor, residual: Tensor) -> Tensor:
        return residual


COMPRESSOR = LlamaVid
