"""DynamicViT's predictors, trained on the records' photos before the model learns behind them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ivtp.config import PruneConfig
from ivtp.cost.flops import flops
from ivtp.cost.sizes import sizes
from ivtp.files.outputs import whole
from ivtp.generate import load
from ivtp.images import load_image
from ivtp.methods.dynamicvit import DynamicVit
from ivtp.registry import method_class
from ivtp.training.predictors import predictor_losses

LEARNING_RATE = 1e-3


def train_predictors(
    images: Sequence[Path],
    keep: int,
    out: Path,
    *,
    steps: int,
    batch: int,
    seed: int,
    model: str,
    on_step: Callable[[dict[str, float]], Any],
) -> None:
    """Write the predictors of `dynamicvit` at `keep` tokens of `model` to `out`, trained for `steps` steps.

    `on_step` is told the losses of each step.
    """
    torch.manual_seed(seed)
    network, processor = load(model, dtype=torch.float32)
    network.requires_grad_(False)
    method = predictors_of(model, keep)
    optimizer = torch.optim.AdamW(method.predictors.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _, chosen in zip(range(steps), batches(images, batch, seed), strict=False):
        pictures = [load_image(image) for image in chosen]
        pixels = processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
        losses = predictor_losses(network, method, pixels)
        optimizer.zero_grad()
        losses.total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        parts = {"loss": losses.total, "distillation": losses.distillation, "ratio": losses.ratio}
        on_step({name: round(float(part), 6) for name, part in parts.items()})
    with whole(out, "--out") as partial:
        save_file(method.predictors.state_dict(), partial)


def predictors_of(model: str, keep: int) -> DynamicVit:
    """The method with random predictors."""
    found: DynamicVit = method_class("dynamicvit")(PruneConfig(method="dynamicvit", keep=keep), sizes(model).geometry)
    return found


def batches(images: Sequence[Path], batch: int, seed: int) -> Iterator[list[Path]]:
    """So many photos, over and over, each round in another order."""
    rng = random.Random(seed)
    left: list[Path] = []
    while True:
        while len(left) < batch:
            left += rng.sample(images, len(images))
        yield left[:batch]
        del left[:batch]


def predictor_flops(model: str, keep: int) -> float:
    """FLOPs of one photo in one step: the tower twice, back through its layers behind the first cut, and predictors.

    Nothing is dropped meanwhile. The tower's weights do not learn, so that its way back costs what its way there does.
    """
    method = predictors_of(model, keep)
    size = method.geometry
    tower = flops(model, method="none", text_tokens=1).vision
    first = method.plan.cuts[0].layer + 1
    choosing = sum(method.cost(cut, size.num_patches, 1).flops for cut in method.plan.cuts)
    return tower * (3 - first / size.vision_layers) + 3 * choosing
