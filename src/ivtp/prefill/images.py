"""From tiles, which the encoder reads, to images: what each one keeps, and what was decided about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from ivtp.core.select import keep_highest, on_device
from ivtp.hosts.base import Visual
from ivtp.methods.base import Method
from ivtp.prefill.encoder import Encoded, EncoderStage
from ivtp.prefill.stage import CutResult, Plug, Seats

Relevance = Callable[[Tensor, Sequence[int]], Tensor]
"""Rates the patches (R, N) of tiles by the encoder's output (R, 1 + N, D) and the image that each tile is of."""
Words = Callable[[Sequence[int]], Tensor]
"""The tokens (R, W, D_text) of what is asked of the image that each of R tiles is of."""


@dataclass(frozen=True)
class Read:
    """One image as stage 1 left it: all that later turns need of it."""

    visual: Visual
    encoded: Encoded
    cuts: tuple[CutResult, ...]
    """What was decided about it, without a row dimension."""

    def detached(self) -> Read:
        """The same without a graph."""
        own = {field.name: getattr(self.encoded, field.name).detach() for field in fields(self.encoded)}
        return replace(self, encoded=Encoded(**own))


@dataclass(frozen=True)
class Batch:
    """What the encoder made of all images of a call, in their order."""

    images: tuple[Read, ...]
    results: tuple[CutResult, ...]
    """The cuts; a row for each image, filled up with -1."""


def encode(
    plug: Plug,
    method: Method,
    seats: Seats,
    visuals: Sequence[Visual],
    tiles: Sequence[Tensor | Read],
    relevance: Relevance | None,
    words: Words | None,
) -> Batch:
    """Run the encoder on the `tiles` (t, ...) of each image; images that are cut alike run together where they can.

    Those that an earlier turn read are in the place of their tiles.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    reads: dict[int, Read] = {}
    unread: dict[int, Tensor] = {}
    for number, (visual, image) in enumerate(zip(visuals, tiles, strict=True)):
        if isinstance(image, Read):
            reads[number] = image
        else:
            unread[number] = image
            alone = number if plug.host.vision.flat else None
            groups.setdefault((visual.patches, visual.visible, alone), []).append(number)
    for members in groups.values():
        own = [visuals[m] for m in members]
        sized = method.sized(own[0].patches)
        pixels = torch.cat([unread[m] for m in members])
        stage = _stage(plug, sized, own, pixels.device)
        rows = [m for m in members for _ in range(len(visuals[m].tiles))]
        rate = None if relevance is None else (lambda last, rows=rows: relevance(last, rows))
        with seats.apart() as own_seats:
            stage.install(own_seats)
            made = stage.run(pixels, rate, None if words is None else words(rows))
        stage.release()
        if all(len(visual.tiles) == 1 and visual.patches == visual.tiles.shape[1] for visual in own):
            for place, m in enumerate(members):
                decided = [_of_row(result, place) for result in stage.results]
                reads[m] = Read(visuals[m], Encoded(*(part[place] for part in made)), tuple(decided))
            continue
        first = 0
        for m, visual in zip(members, own, strict=True):
            part = slice(first, first + len(visual.tiles))
            first = part.stop
            decided = [_of_image(result, part, visual) for result in stage.results]
            kept = sized.plan.cuts[len(decided) - 1].keep if decided else visual.patches
            encoded, decided = _join(tuple(t[part] for t in made), visual, decided, kept)
            reads[m] = Read(visual, encoded, tuple(decided))
    images = tuple(reads[m] for m in range(len(visuals)))
    return Batch(images, tuple(_stack(cuts) for cuts in zip(*(image.cuts for image in images), strict=True)))


def _stage(plug: Plug, method: Method, visuals: Sequence[Visual], device: torch.device) -> EncoderStage:
    """The encoder's stage for tiles of images that are cut alike."""
    one = visuals[0]
    padding = torch.cat([visual.tiles < 0 for visual in visuals])
    hidden = on_device(padding, device) if padding.any() else None
    return EncoderStage(plug, method.tiled(one.tiles.shape[1], one.visible), hidden)


def _of_row(result: CutResult, row: int) -> CutResult:
    return _change(result, lambda tensor: tensor[row])


def _of_image(result: CutResult, rows: slice, visual: Visual) -> CutResult:
    """A result of tiles in patches of the image, one tile behind the other."""
    places = on_device(visual.tiles, result.candidates.device)

    def place(tile_patch: Tensor) -> Tensor:
        own = tile_patch[rows]
        return torch.where(own >= 0, places.gather(1, own.clamp_min(0)), -1).flatten()

    kept = place(result.kept)
    kept = kept[torch.where(kept >= 0, kept, visual.patches).argsort(stable=True)]  # ascending, the others behind
    scores = None if result.scores is None else result.scores[rows].flatten()
    sources = None if result.sources is None else _sources(result.sources[rows], places, visual.patches)
    return replace(result, candidates=place(result.candidates), scores=scores, kept=kept, sources=sources)


def _sources(of_tiles: Tensor, places: Tensor, patches: int) -> Tensor:
    """(n,) the patch of the image that stands for each one, from those (t, N) of its tiles, which lie at `places`."""
    stands = torch.where(of_tiles >= 0, places.gather(1, of_tiles.clamp_min(0)), -1)
    found = torch.full((patches + 1,), -1, device=places.device)
    found[places] = stands  # the last place takes padding
    return found[:-1]


def _join(
    tiles: tuple[Tensor, ...], visual: Visual, decided: list[CutResult], count: int
) -> tuple[Encoded, list[CutResult]]:
    """The tiles of one image together: without padding, in the order of its patches, and `count` of them exactly."""
    patches, features, cls, pooled, of_tiles, deep = tiles
    places = on_device(visual.tiles, patches.device)
    own = places.gather(1, patches).flatten()  # (t * k,), -1: padding
    shown = sum(min(patches.shape[1], visible) for visible in visual.visible)
    stays = own >= 0
    if shown > count:
        last = decided[-1]
        assert last.scores is not None
        rank = torch.full((visual.patches + 1,), float("-inf"), device=own.device)
        rank[last.candidates] = last.scores.float()  # the last place takes what is no patch
        stays = keep_highest(rank[own][None], stays[None], count)[0]
    order = torch.where(stays, own, visual.patches).argsort(stable=True)[:count]
    kept = own[order]
    sources = _sources(of_tiles, places, visual.patches)
    stands = torch.zeros(visual.patches + 1, dtype=torch.bool, device=own.device).index_fill(0, kept, True)
    sources = torch.where(stands[sources], sources, -1)  # the last place says that nothing does
    if decided:
        last = replace(decided[-1], kept=kept)
        decided = [*decided[:-1], last if last.sources is None else replace(last, sources=sources)]
    stay = features.flatten(0, 1)[order]
    if visual.scaled is not None and patches.shape == visual.tiles.shape:  # nothing was cut
        stay = _scaled(features.flatten(0, 1), visual)
    added = deep.flatten(0, 1)[order]
    return Encoded(kept, stay, cls[visual.whole], pooled[visual.whole], sources, added), decided


def _scaled(features: Tensor, visual: Visual) -> Tensor:
    """Features (n, D) of all patches, of which the last grid is scaled down from `features` (t * N, D) of the tiles."""
    assert visual.scaled is not None
    rows, columns = visual.grids[-1]
    grid = features[on_device(visual.scaled, features.device)]  # (rows, columns, D) of the larger grid
    small = nn.functional.interpolate(grid.permute(2, 0, 1)[None], (rows, columns), mode="bilinear")
    return torch.cat([features[: visual.patches - rows * columns], small[0].flatten(1).T])


def _stack(results: Sequence[CutResult]) -> CutResult:
    """One result with a row for each image."""

    def rows(name: str, fill: float) -> Tensor | None:
        parts = [getattr(result, name) for result in results]
        if parts[0] is None:
            return None
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=fill)

    candidates, kept = rows("candidates", -1), rows("kept", -1)
    assert candidates is not None
    assert kept is not None
    return CutResult(
        results[0].cut, candidates, rows("scores", float("-inf")), kept, rows("sources", -1), rows("stand_ins", -1)
    )


def _change(result: CutResult, change: Callable[[Tensor], Tensor]) -> CutResult:
    names = ("candidates", "scores", "kept", "sources", "stand_ins")
    changed: dict[str, Any] = {n: change(t) for n in names if (t := getattr(result, n)) is not None}
    return replace(result, **changed)
