"""The slow reference of Qwen2-VL and its successors."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace
from typing import Any

import torch
from reference import (
    PAPER,
    Cut,
    Prompt,
    Reference,
    Result,
    _groups,
    _Image,
    _Sequence,
    _uniform,
    importance,
    rollout,
    select,
)
from torch import Tensor
from torch.nn.functional import interpolate

import ivtp


class QwenReference(Reference):
    """Images of one grid of units, patch by patch: turned by row and column, in windows where the encoder has them."""

    def __init__(self, model: Any, config: ivtp.PruneConfig, grid: tuple[int, int]) -> None:
        self.dtype, self.config, self.grid = torch.float64, config, grid
        self.model = copy.deepcopy(model).double().requires_grad_(False)
        self.options = options = SimpleNamespace(**{**PAPER, **config.options})
        self.tower, self.decoder = self.model.model.visual, self.model.model.language_model
        self.num_patches, self.depth = grid[0] * grid[1], len(self.tower.blocks)
        vision = _groups(self.depth, options.group_layers) if options.stages != "llm" else []
        llm = _groups(options.llm_layers, options.group_layers)
        counts = _uniform(self.num_patches, config.keep, len(vision) + len(llm))
        self.vision_groups = list(zip(vision, counts[: len(vision)], strict=True))
        self.llm_groups = list(zip(llm, counts[len(vision) :], strict=True))

    def _encode(self, pixels: Tensor) -> _Image:
        tower = self.tower
        x = self._embedded(pixels.double())
        patches, cuts, maps = list(range(self.num_patches)), [], []
        ends = {group[-1]: k for group, k in self.vision_groups}
        for index, layer in enumerate(tower.blocks):
            x, attention, values = self._attend(index, x, patches)
            maps.append(attention)
            if index in ends:
                row = rollout(maps, self.options.aggregation).mean(0).view(-1, 4).sum(1)
                scores = importance(row, values.view(len(patches), 4, -1).mean(1))
                chosen = select(scores, ends[index])
                kept = [patches[i] for i in chosen]
                cuts.append(Cut("vision", index, patches, scores.tolist(), kept))
                x = x.view(len(patches), 4, -1)[chosen].flatten(0, 1)
                patches, maps = kept, []
            x = x + layer.mlp(layer.norm2(x))
            self._layer_done(index, x, patches)
        cls = x.mean(0)
        self.last_row = maps[-1].mean(0).view(-1, 4).sum(1) if maps else None
        return _Image(patches, tower.merger(x), cls, tower.merger(cls.expand(4, -1))[0], None, cuts)

    def _embedded(self, pixels: Tensor) -> Tensor:
        """The patches (T, D) as they enter the first layer."""
        return self.tower.patch_embed(pixels)

    def _layer_done(self, index: int, x: Tensor, patches: list[int]) -> None:
        """Sees what a layer of the encoder made of its units."""

    def _places(self, patches: list[int]) -> list[tuple[int, int]]:
        """Row and column of the four patches of each unit."""
        return [
            (2 * (p // self.grid[1]) + down, 2 * (p % self.grid[1]) + right)
            for p in patches
            for down in (0, 1)
            for right in (0, 1)
        ]

    def _attend(self, index: int, x: Tensor, patches: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Attention and residual of a layer: new states (T, D), the map (T, T) of all heads, values (T, D)."""
        layer, config = self.tower.blocks[index], self.tower.config
        places = self._places(patches)
        q, k, v = layer.attn.qkv(layer.norm1(x)).chunk(3, dim=-1)
        size = q.shape[1] // config.num_heads
        speed = 10000.0 ** (-torch.arange(size // 4, dtype=torch.float64) / (size // 4))
        angle = torch.cat([torch.tensor(places, dtype=torch.float64)[:, [axis]] * speed for axis in (0, 1)], 1)
        seen = torch.ones(len(x), len(x), dtype=torch.bool)
        if index not in getattr(config, "fullatt_block_indexes", range(self.depth)):
            along = config.window_size // config.patch_size
            window = [(row // along, column // along) for row, column in places]
            seen = torch.tensor([[a == b for b in window] for a in window])
        outputs, maps = [], []
        for head in range(config.num_heads):
            own = slice(head * size, (head + 1) * size)
            logits = _turn(q[:, own], angle) @ _turn(k[:, own], angle).T / size**0.5
            maps.append(logits.masked_fill(~seen, float("-inf")).softmax(-1))
            outputs.append(maps[-1] @ v[:, own])
        return x + layer.attn.proj(torch.cat(outputs, -1)), torch.stack(maps).mean(0), v

    def _sequence(self, prompt: Prompt, images: list[_Image]) -> _Sequence:
        sequence = super()._sequence(prompt, images)
        places: list[tuple[int, int, int]] = []
        following = slot = 0
        for token in prompt.ids.tolist():
            if token != self.model.config.image_token_id:
                places.append((following, following, following))
                following += 1
                continue
            row, column = divmod(slot % self.num_patches, self.grid[1])
            places.append((following, following + row, following + column))
            slot += 1
            if slot % self.num_patches == 0:
                following += max(self.grid)
        positions: Any = [places[i] for i in sequence.index]
        return dataclasses.replace(sequence, positions=positions, following=following)

    def _rotate(self, x: Tensor, positions: list[Any]) -> Tensor:
        parameters = self.decoder.config.rope_parameters
        axis = self._axes(parameters["mrope_section"])
        speed = parameters["rope_theta"] ** (-torch.arange(len(axis), dtype=torch.float64) / len(axis))
        places = [p if isinstance(p, tuple) else (p, p, p) for p in positions]
        return _turn(x, torch.tensor(places, dtype=torch.float64)[:, axis] * speed)

    def _axes(self, section: list[int]) -> list[int]:
        """The axis that each pair of channels turns by: time, rows and columns, in sections."""
        return [a for a, count in enumerate(section) for _ in range(count)]


class Qwen3Reference(QwenReference):
    """Also with places that are learned for one grid, and with features that are added in the decoder."""

    def run(self, prompt: Prompt) -> Result:
        self.deep: list[list[dict[int, Tensor]]] = []
        return super().run(prompt)

    def _embedded(self, pixels: Tensor) -> Tensor:
        side, table = self.tower.num_grid_per_side, self.tower.pos_embed.weight
        square = table.view(side, side, -1).permute(2, 0, 1)[None]
        rows, columns = (2 * length for length in self.grid)
        scaled = interpolate(square, (rows, columns), mode="bilinear", align_corners=True)[0]
        self.deep.append([])
        own = [scaled[:, row, column] for row, column in self._places(list(range(self.num_patches)))]
        return super()._embedded(pixels) + torch.stack(own)

    def _layer_done(self, index: int, x: Tensor, patches: list[int]) -> None:
        for layer, merger in zip(self.tower.deepstack_visual_indexes, self.tower.deepstack_merger_list, strict=True):
            if layer == index:
                self.deep[-1].append(dict(zip(patches, merger(x), strict=True)))

    def _behind(self, index: int, x: Tensor, patches: list[int]) -> Tensor:
        rows = list(x)
        for place, patch in enumerate(patches):
            image, unit = divmod(patch, self.num_patches)
            if patch >= 0 and index < len(self.deep[image]):
                rows[place] = rows[place] + self.deep[image][index][unit]
        return torch.stack(rows)

    def _axes(self, section: list[int]) -> list[int]:
        """In turn, as long as an axis has some left; the rest is time's."""
        channels = range(sum(section))
        return [i % 3 if i < 3 * section[i % 3] else 0 for i in channels]


def reference_of(model: Any, config: ivtp.PruneConfig, grid: tuple[int, int]) -> QwenReference:
    """The one of the model's family."""
    kind = Qwen3Reference if model.config.model_type == "qwen3_vl" else QwenReference
    return kind(model, config, grid)


def _turn(x: Tensor, angle: Tensor) -> Tensor:
    """Halves (a, b) of (T, d), turned by (T, d / 2)."""
    a, b = x.chunk(2, dim=1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], 1)
