"""The projector from the tower's features to the decoder's embeddings, as it is trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Projector(nn.Module):
    """LLaVA's two-layer GELU projector behind a fixed standardisation of the features; `stock` folds the two.

    The tower's features are dozens of times larger than the embeddings. On them, weights that keep the
    embeddings' scale are so small that the optimiser's steps multiply the output instead of adjusting it.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(features, width)
        self.linear_2 = nn.Linear(width, width)
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        """(..., features) -> (..., width); weights are cast to the features' type."""
        x = (x - self.mean.to(x.dtype)) / self.scale.to(x.dtype)
        for index, linear in enumerate((self.linear_1, self.linear_2)):
            x = nn.functional.linear(x, linear.weight.to(x.dtype), linear.bias.to(x.dtype))
            if index == 0:
                x = nn.functional.gelu(x)
        return x

    @torch.no_grad()
    def standardise(self, mean: Tensor, scale: Tensor) -> None:
        """Standardises by these (features,) statistics from now on; what is computed stays the same."""
        first = self.linear_1
        first.bias.add_(first.weight @ ((mean - self.mean) / self.scale))
        first.weight.mul_(scale / self.scale)
        self.mean.copy_(mean)
        self.scale.copy_(scale)

    @torch.no_grad()
    def stock(self) -> dict[str, Tensor]:
        """Weights of transformers' LLaVA projector, which reads the features as they are."""
        weight = self.linear_1.weight / self.scale
        bias = self.linear_1.bias - weight @ self.mean
        second = {f"linear_2.{name}": value for name, value in self.linear_2.state_dict().items()}
        return {"linear_1.weight": weight, "linear_1.bias": bias, **second}

    @classmethod
    def from_weights(cls, weights: dict[str, Tensor]) -> Projector:
        """A projector of these weights: its own, or a stock one's, which stand for no standardisation."""
        width, features = weights["linear_1.weight"].shape
        projector = cls(features, width)
        projector.load_state_dict({"mean": projector.mean, "scale": projector.scale, **weights})
        return projector
