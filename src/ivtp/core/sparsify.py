"""DynamicViT's way to learn which tokens to drop: none leaves while it trains (arXiv 2106.02034)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_MOST = 30.0
"""How far the logit of a dropped token is followed above those that are kept: beyond, its exponential would be
infinite, and 0 times that is no number."""


def masked_softmax(logits: Tensor, policy: Tensor) -> Tensor:
    """Attention (B, H, T, T) in which dropped tokens are seen by themselves alone (section 3.3, "attention masking").

    `policy` (B, T) is 1 where a token is kept. The weights are `exp(logits) * G` normalised, with `G_ij` = policy of j,
    and 1 for i = j: gradients reach the policy of dropped tokens, too, which adding its logarithm would not let.
    """
    mask = policy[:, None, None, :] * torch.ones_like(logits)
    own = torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
    mask = mask.masked_fill(own, 1)
    most = logits.detach().masked_fill(mask == 0, float("-inf")).amax(dim=-1, keepdim=True)
    weights = (logits - most).clamp_max(_MOST).exp() * mask
    return weights / weights.sum(dim=-1, keepdim=True)


def gumbel_keep(log_probabilities: Tensor, policy: Tensor) -> Tensor:
    """Which of the tokens that are kept so far, `policy` (B, N), are kept: drawn, 0 or 1, and still differentiable.

    `log_probabilities` (B, N, 2) of keeping, then dropping (section 3.2). What was dropped once stays so.
    """
    drawn = nn.functional.gumbel_softmax(log_probabilities, hard=True, dim=-1)[..., 0]
    return policy * drawn


def ratio_loss(policies: Sequence[Tensor], ratios: Sequence[float]) -> Tensor:
    """Squared difference of the share that each image keeps, of `policies` (B, N), to that of its place: the mean."""
    differences = [policy.mean(dim=1) - ratio for policy, ratio in zip(policies, ratios, strict=True)]
    return torch.stack(differences).square().mean()


def distillation_loss(features: Tensor, teacher: Tensor, policy: Tensor) -> Tensor:
    """Mean squared distance of kept tokens' `features` (B, N, D) to those of a `teacher` that dropped none.

    `policy` (B, N) weighs them, without gradient: dropping a token must not be the way to be rid of its distance. Both
    are normalised first, as tokens are behind the last norm of the paper's encoder, so that their scale does not
    decide how much the other losses count.
    """
    kept = policy.detach()
    one, other = (nn.functional.layer_norm(part.float(), part.shape[-1:]) for part in (features, teacher))
    squared = (one - other).square().mean(dim=-1)
    return (squared * kept).sum() / kept.sum().clamp_min(1)
