"""Stage 1 of a prefill: cuts inside the vision encoder, behind it and behind the projector."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ivtp.core.merge import sizes
from ivtp.core.select import keep_highest, right_aligned, take
from ivtp.core.tap import AttentionTap
from ivtp.core.units import SINGLE, Units
from ivtp.methods.base import Cut, Method, Window
from ivtp.prefill.stage import Plug, Seats, Stage
from ivtp.towers.base import VisionTower


@dataclass(frozen=True)
class Encoded:
    """What the encoder gives for one image, of which k of n patches stay."""

    patches: Tensor  # (k,): which patches the features stand for
    features: Tensor  # (k, D): projected
    cls: Tensor  # (D_vision,): CLS of the layer that the projector reads, or the mean row, of the whole's tile
    pooled: Tensor  # (D_vision,): post-normalised CLS of the last layer, or the pooled patches, of the whole's tile
    sources: Tensor  # (n,): the patch that stands for each one, -1 where it was dropped
    deep: Tensor  # (k, L, D): what is added to them behind the first L decoder layers


class EncoderStage(Stage):
    """Stage 1: each tile by itself; every row is a tile, and all have the same number of tokens."""

    where = "vision"
    tower: VisionTower

    def __init__(self, plug: Plug, method: Method, hidden: Tensor | None = None) -> None:
        """`hidden` (R, N) bool marks padding, which leaves first."""
        super().__init__(plug, method)
        self.tower = plug.host.vision
        self._units = Units(plug.host.size.unit, plug.host.size.vision_cls)
        self._hidden = hidden
        self._patch = torch.empty(0)
        self._feature: Tensor | None = None
        self._relevance: Tensor | None = None
        self._words: Tensor | None = None
        self._read: Tensor | None = None
        self._deep: list[tuple[int, Tensor, Tensor]] = []
        """Of each layer of `Geometry.deepstack`: its number, what it computed (R, T, D) and of which patches (R, T)."""
        self._reordered = False
        self._index: Tensor | None = None
        self._order: Tensor | None = None

    def install(self, seats: Seats) -> None:
        """Cuts and probes, and a look at what the projector will read."""
        super().install(seats)
        layer = self.tower.layers[self.host.size.vision_layers - 1]
        seats.add(layer.register_forward_hook(self._feature_layer_done).remove)
        for number in self.host.size.deepstack:
            hook = partial(self._deepstack_layer_done, number)
            seats.add(self.tower.layers[number].register_forward_hook(hook).remove)
        for layer in self.tower.layers if self.tower.flat else ():
            seats.add(layer.register_forward_pre_hook(self._before_layer, with_kwargs=True).remove)

    def _feature_layer_done(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.is_mine():
            self._feature = self._ordered(output[0] if isinstance(output, tuple) else output, 1)

    def _deepstack_layer_done(self, number: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.is_mine():
            hidden = self._ordered(output[0] if isinstance(output, tuple) else output, 1)
            self._deep.append((number, hidden, self._patch))

    def _ordered(self, tokens: Tensor, dim: int) -> Tensor:
        """Tokens along `dim` of what a layer computed for tiles, or for the only one, in the order of their patches."""
        if tokens.dim() == 2:
            tokens = tokens.unsqueeze(0)
        return tokens if self._order is None else tokens.index_select(dim, self._order)

    def _before_layer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Behind a cut the layers are told where the tokens are that are left."""
        if self._index is None or not self.is_mine():
            return None
        return args, {**kwargs, **self.tower.cut_positions(kwargs, self._index)}

    def run(
        self, pixels: Tensor, relevance: Callable[[Tensor], Tensor] | None = None, words: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Run the encoder on R tiles; hooks on its layers call the other methods meanwhile.

        For methods that ask for it, `relevance` rates the patches (R, N) by the last layer's output (R, 1 + N, D), of
        units their mean, and `words` (R, W, D_text) are the tokens of the questions.
        Returns the fields of `Encoded` with a row for each tile: (R, k), (R, k, D), (R, D), (R, D), (R, N),
        (R, k, L, D).
        """
        size = self.host.size
        self._words = words
        count = self.method.geometry.num_patches
        indices = torch.arange(-size.vision_cls, count, device=pixels.device).clamp_min(-1)
        self._patch = indices.expand(pixels.shape[0], -1)  # (I, 1 + N)
        self._sources = self._patch[:, size.vision_cls :]
        self._order = self.tower.order(pixels)
        pooled, last = self.tower.run(pixels)
        if relevance is not None:
            self._relevance = relevance(self._units.mean(last))
        assert self._feature is not None
        hidden = self._feature
        cls = hidden[:, 0] if self.host.summary == "cls" else hidden.mean(dim=1)
        behind, projected = (
            [c for c in self.method.plan.cuts if c.is_after_encoder(size) and c.place == place]
            for place in ("behind", "projected")
        )
        for cut in behind:
            hidden = self.cut(cut, hidden)
        features = self.host.project(hidden[:, size.vision_cls :])
        self._read = self._units.mean(hidden)[:, size.vision_cls :]
        self._patch = self._patch[:, size.vision_cls :]
        for cut in projected:
            features = self.cut(cut, features)
        patches = self._patch
        if self._reordered and self.method.config.positions == "original":  # position ids only grow
            patches, order = patches.sort(dim=1)
            features = take(features, order)
        return patches, features, cls, pooled, self._sources, self._deepstack(patches, features)

    def _deepstack(self, patches: Tensor, features: Tensor) -> Tensor:
        """What the deepstack layers' own projectors make of the `patches` (R, k) that are left, with `features`.

        Those that leave behind such a layer are not projected either. Returns (R, k, L, D), L 0 without such layers.
        """
        first, parts = self.host.size.vision_cls, []
        for number, hidden, patch in self._deep:
            columns = torch.searchsorted(patch[:, first:].contiguous(), patches.contiguous())  # nothing reorders them
            tokens = Units(self.host.size.unit).tokens(columns)
            parts.append(self.host.project_deep(number, take(hidden[:, first:], tokens)))
        return torch.stack(parts, dim=2) if parts else features.unsqueeze(2)[:, :, :0]

    def release(self) -> None:
        """Let go of the images' features."""
        super().release()
        self._feature = self._relevance = self._words = self._read = None
        self._deep = []

    def cut(self, cut: Cut, hidden: Tensor) -> Tensor:
        """Cut (I, T, D), or (T, D) of one, of the encoder in units or of projected features."""
        if hidden.dim() == 2:
            return self.cut(cut, hidden.unsqueeze(0)).squeeze(0)
        units = SINGLE if cut.place == "projected" else self._units
        padding = None
        if self._hidden is not None:
            padding = self._hidden.gather(1, self._patch.clamp_min(0)) & (self._patch >= 0)
        window = Window(
            cut,
            self._take_taps(cut),
            units.mean(hidden),
            self._patch,
            0 if self.host.summary == "cls" else None,
            sources=self._sources,
            relevance=self._relevance,
            features=self._read,
            words=self._words,
            padding=padding,
        )
        columns = torch.arange(self._patch.shape[1], device=hidden.device)
        others = len(columns) - self.method.plan.entering(cut, self.method.geometry)
        merged = self._merge(window)
        scores: Tensor | None = None
        if merged is None:
            scores = self._score(window)
            if padding is not None:
                scores = scores.masked_fill(padding, torch.finfo(scores.dtype).min)
            keep = keep_highest(scores, window.visual, cut.keep) | ~window.visual  # CLS stays
            index = right_aligned(keep, cut.keep + others)
            if self.method.info.merges:
                self._follow(window, columns.masked_fill(~keep, -1))
        else:
            hidden = merged.hidden
            index = right_aligned((merged.into == columns) | ~window.visual, cut.keep + others)
            if merged.order is not None:
                self._reordered = True
                index = torch.cat([index[:, :others], merged.order], dim=1)
        self._patch = window.patch.gather(1, index)
        kept = self._patch if merged is None else self._patch.sort(dim=1).values
        self.results.append(self._result(window, scores, kept, merged))
        tokens = units.tokens(index)
        if self.tower.flat and cut.place != "projected":
            self._index = tokens if self._index is None else self._index.gather(1, tokens)
        return take(hidden, tokens)

    def attend(self, cut: Cut, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The first half of the layer of a cut, whose attention may count merged tokens by their size."""
        if not cut.sized:
            return super().attend(cut, hidden, *args, **kwargs)
        assert self._sources is not None
        bias = sizes(self._sources, self._patch).log()[:, None, None]  # (I, 1, 1, T)
        return self.tower.attend(cut.layer, hidden, *args, bias=bias, **kwargs)

    def _tap(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> AttentionTap:
        query, key, value = (self._ordered(part, 2) for part in (query, key, value))
        return AttentionTap(query, key, value, scale, causal=False, units=self._units)
