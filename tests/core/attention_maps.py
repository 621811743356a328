"""What the rollout computes, spelt out with full attention maps in float64, and layers to compute it for."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from ivtp.core.tap import AttentionTap


def full_map(tap: AttentionTap) -> Tensor:
    """(B, T, T), float64, every head spelt out."""
    query, key = tap.query.double(), tap.token_key.double()
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = query @ key.transpose(2, 3) * tap.scale
    if tap.softcap is not None:
        logits = tap.softcap * torch.tanh(logits / tap.softcap)
    if tap.causal:
        later = torch.ones_like(logits[0, 0]).triu(1).bool().expand(len(logits), -1, -1)
        if tap.blocks is not None:
            together = tap.blocks[:, None] == tap.blocks[:, :, None]
            later = later & ~(together & (tap.blocks >= 0)[:, None])
        logits = logits.masked_fill(later[:, None], float("-inf"))
    if tap.valid is not None:
        logits = logits.masked_fill(~tap.valid[:, None, None], float("-inf"))
    if tap.hidden_from_last is not None:
        logits[:, :, -1].masked_fill_(tap.hidden_from_last[:, None], float("-inf"))
    return logits.softmax(-1).nan_to_num().mean(1)


def full_rollout(maps: list[Tensor], aggregation: str) -> Tensor:
    """(B, T, T): the maps aggregated as `rollout_row` says, all rows."""
    if aggregation == "layer":
        return maps[-1]
    if aggregation in ("mean", "max"):
        return torch.stack(maps).mean(0) if aggregation == "mean" else torch.stack(maps).amax(0)
    eye = torch.eye(maps[0].shape[-1], dtype=torch.float64) if aggregation == "residual" else 0.0
    share = 2 if aggregation == "residual" else 1
    product = (maps[0] + eye) / share
    for attention in maps[1:]:
        product = (attention + eye) / share @ product
    return product


@st.composite
def taps(draw: st.DrawFn, longest: int, blockwise: bool = False) -> tuple[AttentionTap, Tensor]:
    """A layer of any kind that a model has, and weights (B, T), which are 0 for padding as a rollout's are.

    With `blockwise` tokens of a causal one may see those of their block whatever their order, and logits may be capped.
    """
    batch, key_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    length, width = draw(st.integers(1, longest)), draw(st.sampled_from([8, 64, 80, 96, 128]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    heads_first = draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))

    def vectors(heads: int) -> Tensor:  # (B, heads, T, d)
        if heads_first:
            return torch.randn(batch, heads, length, width, generator=generator).to(dtype)
        return torch.randn(batch, length, heads, width, generator=generator).to(dtype).transpose(1, 2)

    query, key = vectors(key_heads * group), vectors(key_heads)
    weights = torch.rand(batch, length, generator=generator)
    valid = hidden = None
    if draw(st.booleans()):  # on the left of the last sample, sometimes all of it
        valid = torch.ones(batch, length, dtype=torch.bool)
        valid[-1, : draw(st.integers(0, length))] = False
        weights = weights * valid
    if draw(st.booleans()):
        hidden = torch.rand(batch, length, generator=generator) < 0.3
        hidden[:, -1] = False
    blocks = None
    softcap = draw(st.sampled_from([None, 1.5])) if blockwise else None
    if blockwise and draw(st.booleans()):  # of one block or several, which may be interleaved
        blocks = torch.randint(-1, draw(st.integers(1, 3)), (batch, length), generator=generator)
        blocks[:, -1] = draw(st.sampled_from([-1, 0]))
    scale, causal = 1.5 * width**-0.5, draw(st.booleans())
    return AttentionTap(query, key, key, scale, causal, valid, hidden, blocks, softcap), weights
