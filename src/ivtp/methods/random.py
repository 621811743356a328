"""Random patches: the floor that every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ivtp.methods.base import Method, MethodInfo, Plan, Window, check_choice, vision_only_plan


@dataclass(frozen=True)
class Options:
    """`where` cuts once behind the encoder or a little in every layer."""

    where: Literal["after", "layers"] = "after"

    def __post_init__(self) -> None:
        check_choice("where", self.where, ("after", "layers"))


class Random(Method):
    """Keeps a random subset, drawn from `seed`, in raster order; every image of every batch gets the same draw."""

    info = MethodInfo(
        title="Random",
        year=2024,
        stage="vision",
        paper="(baseline)",
    )
    Options = Options
    reads = frozenset({"seed"})

    def make_plan(self) -> Plan:
        """One cut behind the encoder or one in each of its layers."""
        return vision_only_plan(self.geometry, self.keep, every_layer=self.options.where == "layers", tapped=False)

    def score(self, window: Window) -> Tensor:
        """One number for each patch of an image, the same in all layers."""
        generator = torch.Generator().manual_seed(self.config.seed)
        draw = torch.rand(self.geometry.num_patches, generator=generator, dtype=torch.float32).to(window.patch.device)
        return draw[window.patch.clamp_min(0)]


METHOD = Random
