"""Give a vision tower a clean code of where each patch is: ``python -m recipes.micro.position RUN/vision``.

A tower that was trained without any loss on position lets it drown: what the layers write outgrows the position
embeddings twenty-fold. Here the directions of the residual stream that the tower uses least are kept for a code of a
few cosines of row and column: the position table writes it, no layer overwrites it, and the last layer before
LLaVA's features amplifies it with its least used hidden units. A further round of training then heals the small
damage, with losses on position that keep the code alive.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPModel

from ivtp.micro.world import GRID
from ivtp.micro.world.photo import take_photo
from recipes.micro.vision import Recipe, Trainer
from recipes.micro.vision_data import make_batch
from recipes.micro.vision_model import encode_windows

WAVES = 5
"""Cosines for the row and as many for the column."""
INPUT_SHARE = 0.25
"""Norm of the code against that of the state that enters the first layer."""
OUTPUT_SHARE = 0.15
"""Norm of the code against that of the features, after the amplification."""


def position_code() -> Tensor:
    """(576, 2 * WAVES) cosines of row and column, each of unit mean square over the grid, higher ones smaller."""
    place = (torch.arange(GRID) + 0.5) / GRID
    waves = torch.stack([(torch.pi * n * place).cos() * 2**0.5 / n**0.5 for n in range(1, WAVES + 1)], dim=1)
    rows = waves[:, None].expand(GRID, GRID, WAVES)
    columns = waves[None].expand(GRID, GRID, WAVES)
    code = torch.cat([rows, columns], dim=-1).reshape(GRID * GRID, -1)
    return code / code.square().sum(1).mean().sqrt()


@torch.no_grad()
def reserve_position(clip: CLIPModel, inputs: Tensor, states: list[Tensor]) -> None:
    """Writes the code into the tower; ``states`` are its residual streams on some images, (n, C) before each layer."""
    tower: Any = clip.vision_model
    norm = tower.pre_layrnorm
    free = _least_used(states, 2 * WAVES, avoid=norm.weight)  # (C, m), orthonormal
    away = torch.eye(len(free)) - free @ free.T
    layers = tower.encoder.layers[:-1]
    for layer in layers:
        for linear in (layer.self_attn.out_proj, layer.mlp.fc2):
            linear.weight.copy_(away @ linear.weight)
            linear.bias.copy_(away @ linear.bias)
    read, _ = torch.linalg.qr(norm.weight[:, None] * free)  # the input's directions that arrive in the free ones
    embed = tower.embeddings
    for table in (embed.position_embedding.weight, embed.class_embedding[None]):
        table -= table @ read @ read.T
    kernel = embed.patch_embedding.weight
    kernel -= (read @ (read.T @ kernel.flatten(1))).view_as(kernel)
    size = INPUT_SHARE * inputs.std(1).mean() * inputs.shape[1] ** 0.5
    embed.position_embedding.weight[1:] += size * position_code() @ read.T
    _amplify(layers[-1], free, states)


def _least_used(states: list[Tensor], count: int, avoid: Tensor) -> Tensor:
    """Orthonormal directions in which the states, each layer normalised, vary least; orthogonal to ``avoid``."""
    moment = torch.zeros(states[0].shape[1], states[0].shape[1])
    for state in states:
        unit = state / state.square().mean().sqrt()
        moment += unit.T @ unit / len(unit)
    moment += 1e6 * torch.outer(avoid, avoid) / avoid.square().sum()
    directions: Tensor = torch.linalg.eigh(moment).eigenvectors[:, :count].contiguous()
    return directions


def _amplify(layer: Any, free: Tensor, states: list[Tensor]) -> None:
    """Lets the layer's least used hidden units add a multiple of the code: gelu(x) - gelu(-x) = x."""
    norm, mlp = layer.layer_norm2, layer.mlp
    count = free.shape[1]
    units = mlp.fc2.weight.norm(dim=0).argsort()[: 2 * count]
    rows = (free / norm.weight[:, None]).T  # (m, C): reads the code off the normalised state
    sizes = [state.norm(dim=1).mean() for state in states]
    gain = sizes[-2] / (INPUT_SHARE * sizes[0] * len(free) ** 0.5)  # makes the normalised state's code of unit norm
    for sign, chosen in ((1.0, units[:count]), (-1.0, units[count:])):
        mlp.fc1.weight[chosen] = sign * gain * rows
        mlp.fc1.bias[chosen] = -sign * gain * rows @ norm.bias
        mlp.fc2.weight[:, chosen] = sign * OUTPUT_SHARE * sizes[-1] * free


@torch.no_grad()
def residual_states(trainer: Trainer, images: int = 8) -> list[Tensor]:
    """The tower's states before each layer but the last, and LLaVA's features, on validation images: (n, C) each."""
    tower: Any = trainer.clip.vision_model
    seen: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0][:, 1:].flatten(0, 1)))
        for module in (tower.pre_layrnorm, *tower.encoder.layers)
    ]
    photos = [take_photo("validation", i) for i in range(images)]
    batch = make_batch(photos, GRID, trainer.tokenizer, trainer.table)
    encode_windows(trainer.clip, batch.patches, batch.positions)
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def place_accuracy(states: Tensor, images: int) -> float:
    """Share of rows and columns that a linear reading gets right within one; it is fitted on three quarters."""
    x = torch.nn.functional.layer_norm(states, states.shape[1:]).double()
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    cut = GRID * GRID * (images - images // 4)
    moment = x[:cut].T @ x[:cut] + torch.eye(x.shape[1], dtype=x.dtype)
    places, right = torch.arange(GRID * GRID), []
    for number in (places // GRID, places % GRID):
        number = number.repeat(images)
        target = torch.nn.functional.one_hot(number[:cut], GRID).double()
        guess = (x[cut:] @ torch.linalg.solve(moment, x[:cut].T @ target)).argmax(1)
        right.append(((guess - number[cut:]).abs() <= 1).double().mean())
    return float(torch.stack(right).mean())


def main() -> None:
    """Command line: changes the checkpoint of a vision run, prints how well places can be read before and after."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a vision run")
    options = parser.parse_args()
    trainer = Trainer(options.run, Recipe(steps=1), torch.device("cpu"), resume=True)
    states = residual_states(trainer)
    before = place_accuracy(states[-1], 8)
    reserve_position(trainer.clip, states[0], states[1:])
    after = place_accuracy(residual_states(trainer)[-1], 8)
    print(f"rows and columns read right within one at LLaVA's features: {before:.3f} before, {after:.3f} after")
    trainer.save()


if __name__ == "__main__":
    main()
