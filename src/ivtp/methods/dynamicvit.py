"""DynamicViT: learned keep decisions at three places of the encoder (Rao et al., NeurIPS 2021, arXiv 2106.02034)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ivtp.config import PruneConfig
from ivtp.core.schedule import uniform_ratio
from ivtp.errors import ConfigError
from ivtp.methods.base import ChoiceCost, Cut, Method, MethodInfo, Plan, Window, quarters_of
from ivtp.plan import Geometry


@dataclass(frozen=True)
class Options:
    """`predictors`: a safetensors file of trained `Predictors`; without one they are random, drawn from `seed`."""

    predictors: str | None = None


class DynamicVit(Method):
    """Keeps the patches with the highest keep score of a small predictor, before each later quarter of the encoder.

    One keep ratio for the three places. The predictors (`Predictors`, a trainable module at `method.predictors`) read
    the patches that are left; at inference their highest scores stay, the same number for every image.
    """

    info = MethodInfo(
        title="DynamicViT",
        year=2021,
        stage="vision",
        trainable=True,
        paper="https://arxiv.org/abs/2106.02034",
        note="untrained: its predictors are random unless the option predictors=FILE names trained ones",
    )
    Options = Options
    reads = frozenset({"seed"})

    def __init__(self, config: PruneConfig, geometry: Geometry) -> None:
        """Raises `ConfigError` also for a file that holds no predictors of this encoder."""
        super().__init__(config, geometry)
        self.predictors = Predictors(geometry.vision_hidden, len(self.plan.cuts), config.seed)
        if self.options.predictors is not None:
            self.predictors.load(Path(str(self.options.predictors)))

    @property
    def notes(self) -> tuple[str, ...]:
        """That random predictors choose, where they do."""
        return super().notes if self.options.predictors is None else ()

    def make_plan(self) -> Plan:
        """Three cuts behind encoder layers."""
        size = self.geometry
        layers = [layer - 1 for layer in quarters_of(size.vision_layers, "dynamicvit")]
        counts = uniform_ratio(size.num_patches, self.keep, len(layers))
        return Plan(tuple(Cut("vision", i, k, place="behind") for i, k in zip(layers, counts, strict=True)))

    def cost(self, cut: Cut, entering: int, text_tokens: int) -> ChoiceCost:
        """A predictor over the tokens that are left."""
        return ChoiceCost(entering * Predictor.flops_per_token(self.geometry.vision_hidden))

    def score(self, window: Window) -> Tensor:
        """Log-probability of being kept."""
        first = self.geometry.vision_cls
        place = next(i for i, cut in enumerate(self.plan.cuts) if cut is window.cut)
        predictor = self.predictors[place].to(window.hidden.device)
        tokens = window.hidden[:, first:].float()
        kept = predictor(tokens, torch.ones_like(tokens[..., :1]))[..., 0]
        return nn.functional.pad(kept, (first, 0))


class Predictor(nn.Module):
    """Keep and drop log-probabilities of tokens, from each one and from the mean of those that are kept so far."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter = nn.Sequential(
            nn.LayerNorm(width, dtype=torch.float32), nn.Linear(width, width, dtype=torch.float32), nn.GELU()
        )
        self.leave = nn.Sequential(
            nn.Linear(width, width // 2, dtype=torch.float32),
            nn.GELU(),
            nn.Linear(width // 2, width // 4, dtype=torch.float32),
            nn.GELU(),
            nn.Linear(width // 4, 2, dtype=torch.float32),
            nn.LogSoftmax(dim=-1),
        )

    def forward(self, tokens: Tensor, policy: Tensor) -> Tensor:
        """`tokens` (B, N, D) and `policy` (B, N, 1), 1 where a token is kept so far: (B, N, 2), keep first."""
        local, pooled = self.enter(tokens).chunk(2, dim=-1)
        mean = (pooled * policy).sum(dim=1, keepdim=True) / policy.sum(dim=1, keepdim=True).clamp_min(1)
        scores: Tensor = self.leave(torch.cat([local, mean.expand_as(local)], dim=-1))
        return scores

    @staticmethod
    def flops_per_token(width: int) -> float:
        """FLOPs of its linear layers for one token."""
        return 2.0 * (width**2 + width * width // 2 + width // 2 * (width // 4) + width // 4 * 2)


class Predictors(nn.ModuleList):
    """One predictor for each place."""

    def __init__(self, width: int, places: int, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            super().__init__(Predictor(width) for _ in range(places))

    def load(self, file: Path) -> None:
        """Read trained weights. Raises `ConfigError` for a file that is not there or holds other tensors."""
        try:
            self.load_state_dict(load_file(file))
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"{file} holds no predictors of this encoder ({reason}); leave predictors out") from None


METHOD = DynamicVit
