"""DynamicViT's masks and losses, against slow references and against leaving tokens out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ivtp.core.sparsify import distillation_loss, gumbel_keep, masked_softmax, ratio_loss

seeds = st.integers(0, 10_000)


@settings(max_examples=30)
@given(seed=seeds, tokens=st.integers(1, 6), scale=st.sampled_from([1.0, 30.0]))
def test_dropped_tokens_are_seen_by_themselves_alone(seed: int, tokens: int, scale: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(2, 2, tokens, tokens, generator=draw)
    policy = (torch.rand(2, tokens, generator=draw) > 0.5).float()
    found = masked_softmax(logits, policy)
    for b in range(2):
        for h in range(2):
            for i in range(tokens):
                seen = [j for j in range(tokens) if j == i or policy[b, j] == 1]
                most = max(logits[b, h, i, j].item() for j in seen)
                shares = {j: math.exp(logits[b, h, i, j].item() - most) for j in seen}
                expected = [shares.get(j, 0.0) / sum(shares.values()) for j in range(tokens)]
                assert found[b, h, i].tolist() == pytest.approx(expected, abs=1e-5)


def test_gradients_reach_the_policy_of_dropped_tokens_too() -> None:
    logits, policy = torch.randn(1, 1, 4, 4), torch.tensor([[1.0, 0.0, 1.0, 0.0]], requires_grad=True)
    (masked_softmax(logits, policy) * torch.randn(4, 4)).sum().backward()
    assert policy.grad.isfinite().all()
    assert (policy.grad != 0).all()
    for far in (1e3, -1e3):  # a logit that no exponential holds
        logits[..., 1] = far
        assert masked_softmax(logits, policy.detach()).isfinite().all()


def test_what_was_dropped_stays_so_and_the_rest_follows_its_probability() -> None:
    torch.manual_seed(0)
    policy = torch.tensor([[1.0, 1.0, 0.0]]).expand(4000, -1)
    scores = torch.tensor([0.9, 0.2, 0.99]).log()[:, None]
    scores = torch.cat([scores, (1 - scores.exp()).log()], dim=1).expand(4000, -1, -1).requires_grad_()
    drawn = gumbel_keep(scores, policy)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert drawn.mean(dim=0).tolist() == pytest.approx([0.9, 0.2, 0.0], abs=0.03)
    drawn.sum().backward()


def normalised(values: list[float]) -> list[float]:
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / len(values)
    return [(value - mean) / math.sqrt(variance + 1e-5) for value in values]


@settings(max_examples=20)
@given(seed=seeds, tokens=st.integers(1, 5))
def test_losses(seed: int, tokens: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    features, teacher = torch.randn(2, 2, tokens, 3, generator=draw)
    policies = [(torch.rand(2, tokens, generator=draw) > 0.4).float() for _ in range(2)]
    kept = [(b, n) for b in range(2) for n in range(tokens) if policies[1][b, n]]
    squares = []
    for place in kept:
        one, other = (normalised(part[place].tolist()) for part in (features, teacher))
        squares.append(sum((x - y) ** 2 for x, y in zip(one, other, strict=True)) / 3)
    expected = sum(squares) / max(1, len(kept))
    assert distillation_loss(features, teacher, policies[1]).item() == pytest.approx(expected, abs=1e-4)
    shares = [
        (sum(row) / tokens - ratio) ** 2 for p, ratio in zip(policies, (0.7, 0.5), strict=True) for row in p.tolist()
    ]
    assert ratio_loss(policies, (0.7, 0.5)).item() == pytest.approx(sum(shares) / 4, abs=1e-5)
