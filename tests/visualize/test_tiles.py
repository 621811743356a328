"""Pictures of images that are read in tiles: every patch is drawn where the encoder reads it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

import ivtp
from ivtp.errors import ConfigError
from ivtp.hosts.internvl import HOST as INTERNVL
from ivtp.hosts.llava_next import HOST
from ivtp.trace import PruneTrace, StageTrace
from ivtp.visualize import Fate, Panel, draw, draw_comparison, fates
from ivtp.visualize.patches import laid_out

SHAPES = [(300, 240), (300, 60), (60, 300), (200, 200), (99, 291)]
"""(width, height)."""


@pytest.fixture(scope="module")
def small() -> tuple[Any, Any]:
    return HOST.tiny()


def traced(small: tuple[Any, Any], picture: Image.Image, **options: Any) -> tuple[PruneTrace, dict[str, Any]]:
    """The trace of one prefill about one picture, and the arguments of the call."""
    model, processor = small
    prompt = ivtp.prompt_for(processor, "Is it a dog?")
    inputs = dict(processor(images=picture, text=prompt, return_tensors="pt"))
    with torch.no_grad(), ivtp.attach(model, processor, **options) as pruner:
        model(**inputs)
    assert pruner.trace is not None
    return pruner.trace, inputs


@pytest.mark.parametrize("size", SHAPES, ids=str)
@pytest.mark.parametrize("spot", [(0.1, 0.2), (0.55, 0.5)], ids=str)
def test_a_patch_lies_where_the_encoder_reads_it(
    small: tuple[Any, Any], size: tuple[int, int], spot: tuple[float, float]
) -> None:
    """A white spot on black: the patches whose pixels show it, drawn as the kept ones, cover it and little else."""
    width, height = size
    x, y, wide, high = (int(share * whole) for share, whole in zip((*spot, 0.4, 0.4), size * 2, strict=True))
    picture = Image.new("RGB", size)
    picture.paste((255, 255, 255), (x, y, x + wide, y + high))
    trace, inputs = traced(small, picture, method="topk", keep="100%")
    (visual,) = HOST(small[0]).visuals(inputs)
    pixels = inputs["pixel_values"][0, : len(visual.tiles)].mean(dim=1)  # (tiles, H, W)
    cell = pixels.shape[-1] // math.isqrt(visual.tiles.shape[1])
    light = pixels.unfold(1, cell, cell).unfold(2, cell, cell).mean(dim=(-1, -2)).flatten(1)  # (tiles, N)
    bright = light > (light.min() + light.max()) / 2
    kept = visual.tiles[bright & (visual.tiles >= 0)].sort().values[None]
    shown = fates(dataclasses.replace(trace, stages=[StageTrace("llm", 1, kept, None, kept)]))
    assert len(shown) == 2
    for fate in shown:
        rows, columns = np.nonzero(fate == Fate.KEPT)
        assert len(rows)
        for places, patches, start, length, whole in (
            (rows, fate.shape[0], y, high, height),
            (columns, fate.shape[1], x, wide, width),
        ):
            patch = whole / patches
            assert abs(places.min() * patch - start) <= patch
            assert abs((places.max() + 1) * patch - start - length) <= patch


def test_every_image_of_a_prompt_has_its_own_tiles(small: tuple[Any, Any]) -> None:
    model, processor = small
    inputs = HOST.tiny_inputs(model, processor, [("Is it a dog?", SHAPES[:3]), ("Is it?", SHAPES[4:])])
    with torch.no_grad(), ivtp.attach(model, processor, method="topk", keep=7) as pruner:
        model(**inputs)
    trace = pruner.trace
    for row, count in enumerate(trace.images):
        first, kept = 0, set(trace.kept()[row].tolist()) - {-1}
        for m in range(count):
            shown = np.concatenate([fate.ravel() for fate in fates(trace, row, m)])
            assert len(shown) == trace.patches[row][m]
            assert set(first + np.flatnonzero(shown == Fate.KEPT)) == kept & set(range(first, first + len(shown)))
            first += len(shown)


def test_pages_show_the_ends_of_a_wide_picture(small: tuple[Any, Any]) -> None:
    """The middle square is all that is shown of one that is cropped; of tiles the rest is seen, also untouched."""
    wide = Image.fromarray(np.random.default_rng(0).integers(100, 256, (60, 120, 3), dtype=np.uint8))
    other = wide.copy()
    other.paste((255, 0, 0), (0, 0, 20, 60))
    trace, _ = traced(small, wide, method="fastv", keep=8)
    assert [fate.shape for fate in fates(trace)] == [(4, 4), (4, 8)]
    cropped = PruneTrace(16, (1,))

    def pages(picture: Image.Image, own: PruneTrace) -> list[Image.Image]:
        untouched = [("Is it?", [Panel("all tokens"), Panel("fastv", own)])]
        return [draw(picture, own), draw_comparison(picture, untouched)]

    for with_ends, tiles in ((cropped, False), (trace, True)):
        for one, two in zip(pages(wide, with_ends), pages(other, with_ends), strict=True):
            assert bool(ImageChops.difference(one, two).getbbox()) == tiles
    one, two = (page.crop((0, 0, page.width // 2, page.height)) for page in (pages(p, trace)[1] for p in (wide, other)))
    assert ImageChops.difference(one, two).getbbox()  # the panel of all tokens


def test_patches_without_a_place_are_not_drawn() -> None:
    for trace in (
        PruneTrace(5, (1,)),
        PruneTrace(4, (1,), grids=(((),),)),
        PruneTrace(8, (1,), grids=((((2, 2, 2),),),)),
    ):
        with pytest.raises(ConfigError, match="form no grid"):
            fates(trace)


@pytest.mark.parametrize("size", [(300, 60), (60, 300), (200, 200), (99, 291)], ids=str)
def test_tiles_that_no_call_places_are_laid_out_as_the_picture_is(size: tuple[int, int]) -> None:
    """Of a spot on black every map, of the whole and of all tiles, shows what the picture shows at its size."""
    picture = Image.new("L", size)
    picture.paste(255, (0, 0, size[0] // 2, size[1] // 2))
    picture.paste(255, (size[0] * 3 // 4, size[1] // 2, size[0], size[1]))
    model, processor = INTERNVL.tiny()
    prompt = ivtp.prompt_for(processor, "Is it a dog?")
    inputs = dict(processor(images=picture.convert("RGB"), text=prompt, return_tensors="pt"))
    light = inputs["pixel_values"].mean(dim=1).unfold(1, 8, 8).unfold(2, 8, 8).mean(dim=(-1, -2))  # (tiles, 4, 4)
    own = [(tile > (light.min() + light.max()) / 2).numpy().astype(np.uint8) for tile in light]
    maps = laid_out(own, size)
    assert [len(own), len(maps)] == [maps[1].size // 16 + 1, 2]
    for found in maps:
        rows, columns = found.shape
        expected = np.asarray(picture.resize((columns, rows), Image.Resampling.BOX)) > 127
        assert (found != expected).mean() < 0.15
    with torch.no_grad(), ivtp.attach(model, processor, method="topk", keep=9) as pruner:
        model(**inputs)
    assert draw(picture.convert("RGB"), pruner.trace, question="Is it a dog?").width > 432
