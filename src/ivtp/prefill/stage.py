"""What the two stages of a prefill share: the tensors that a cut reads, and the record of what it decided."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ivtp.core.merge import follow
from ivtp.core.tap import AttentionTap
from ivtp.hosts.base import Host
from ivtp.methods.base import Cut, Merged, Method, Window
from ivtp.prefill.layers import Forward, cut_layer
from ivtp.prefill.probe import AttentionProbe
from ivtp.towers.base import Tower
from ivtp.trace import Where


@dataclass(frozen=True)
class CutResult:
    """What one cut decided: the patches that entered it, their scores, and those that stayed; -1 pads."""

    cut: Cut
    candidates: Tensor  # (B, T) patch of every token, -1 for others
    scores: Tensor | None  # (B, T); None where it merged without a ranking
    kept: Tensor  # (B, T') patch of every token that stayed, -1 for others
    sources: Tensor | None = None  # (B, N) the patch that stands for each, -1: none; None where the method never merges
    stand_ins: Tensor | None = None  # (B, m) patches at whose places tokens stand that are none; None without any


class Seats(Protocol):
    """Where a stage puts what it needs in the model; whoever gives it takes everything out again."""

    def add(self, undo: Callable[[], None]) -> None:
        """Remember how to take one change back."""

    def stand_in(self, module: nn.Module, make: Callable[[Forward], Forward]) -> None:
        """Put `make(stock)` in the place of a module's own forward."""

    def apart(self) -> AbstractContextManager[Seats]:
        """Seats that are empty again at the end of the context."""


@dataclass(frozen=True)
class Plug:
    """What a prefill is given of the model that it runs in."""

    host: Host
    probe: Callable[[nn.Module], AttentionProbe]
    """The probe of one attention module; it lives as long as the plug."""
    is_mine: Callable[[], bool]
    """Whether the calling thread is the prefill's: others may run the layers meanwhile."""


class Stage:
    """What both stages share: hooks in their layers, taps that wait for their cut, and the record of the cuts."""

    where: Where
    tower: Tower

    def __init__(self, plug: Plug, method: Method) -> None:
        self.host = plug.host
        self.is_mine = plug.is_mine
        self.method = method
        self._probe = plug.probe
        self.results: list[CutResult] = []
        self._taps: dict[int, AttentionTap] = {}
        self._sources: Tensor | None = None
        self._awaited = {tap for cut in method.plan.cuts if cut.where == self.where for tap in cut.taps}

    def install(self, seats: Seats) -> None:
        """Put cuts and probes into the layers, until `seats` takes them out."""
        for cut in self.method.plan.cuts:
            if cut.where == self.where and not cut.is_after_encoder(self.host.size):
                layer = self.tower.layers[cut.layer]
                seats.stand_in(layer, functools.partial(cut_layer, self, layer, cut))
        for tap in sorted(self._awaited):
            probe = self._probe(self.tower.attention(tap))
            probe.insert(functools.partial(self._see_mine, tap))
            seats.add(probe.remove)

    def _see_mine(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        if self.is_mine():
            self.see(layer, query, key, value, scale)

    def see(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        """Remember what a tapped layer computed, until the cut that reads it."""
        if layer in self._awaited:
            self._taps[layer] = self._tap(layer, query.detach(), key.detach(), value.detach(), scale)

    def cut(self, cut: Cut, hidden: Tensor) -> Tensor:
        """Cut (B, T, D) within or behind a layer."""
        raise NotImplementedError

    def attend(self, cut: Cut, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The first half of the layer of a cut."""
        return self.tower.attend(cut.layer, hidden, *args, **kwargs)

    def behind(self, layer: int, hidden: Tensor) -> Tensor:
        """What the model hands on of a layer's output (B, T, D): here as it is."""
        return hidden

    def peek(self, cut: Cut, hidden: Tensor, arguments: dict[str, Any]) -> None:
        """See what the layer behind a cut computes of (B, T, D)."""
        raise NotImplementedError

    def _tap(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> AttentionTap:
        raise NotImplementedError

    def _take_taps(self, cut: Cut) -> tuple[AttentionTap, ...]:
        self._awaited -= set(cut.taps)
        return tuple(self._taps.pop(layer) for layer in cut.taps)

    def release(self) -> None:
        """Let go of the layers' tensors; the results stay."""
        self._taps.clear()
        self._sources = None

    @torch.no_grad()
    def _score(self, window: Window) -> Tensor:
        """The choice of tokens is not differentiated; gradients flow through the tokens that stay."""
        with torch.autocast(window.hidden.device.type, enabled=False):  # scores are float32 whatever the model is
            return self.method.score(window)

    def _merge(self, window: Window) -> Merged | None:
        with torch.autocast(window.hidden.device.type, enabled=False):
            merged = self.method.merge(window)
        if merged is not None:
            self._follow(window, merged.into)
        return merged

    def _follow(self, window: Window, into: Tensor) -> None:
        """Keep the sources of a method that merges up to date: `into` as in `Merged`."""
        assert window.sources is not None
        self._sources = follow(window.sources, window.patch, into)

    def _result(self, window: Window, scores: Tensor | None, kept: Tensor, merged: Merged | None) -> CutResult:
        """The record of a cut by `scores` (B, T) or of one that merged; `kept` (B, T') are the patches that stayed."""
        sources = self._sources if self.method.info.merges else None
        if merged is None:
            return CutResult(window.cut, window.patch, scores, kept, sources)
        stand_ins = None if merged.stand_ins is None else window.patch.gather(1, merged.stand_ins)
        return CutResult(window.cut, window.patch, merged.scores, kept, sources, stand_ins)
