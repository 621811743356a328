"""LLaVA-OneVision's own: grids that are scaled down, one of several images, and videos."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlavaOnevisionConfig

import ivtp
from ivtp.errors import InputError, LoadError
from ivtp.hosts.base import Visual
from ivtp.hosts.llava_onevision import HOST
from ivtp.hosts.tiles import in_tiles

SHAPES = [(50, 40), (64, 64), (200, 20), (20, 200), (33, 97), (1000, 2)]
REAL = LlavaOnevisionConfig()
"""The released checkpoints' sizes: tiles of 384 pixels with 27 x 27 patches, of which nine are shown at most."""


@pytest.fixture(scope="module")
def small() -> tuple[Any, Any]:
    return HOST.tiny()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 2])
def test_slots_are_those_of_the_stock_processor(small: tuple[Any, Any], shape: tuple[int, int], count: int) -> None:
    model, processor = small
    inputs = HOST.tiny_inputs(model, processor, [("Is it a dog?", [shape] * count)])
    with torch.no_grad(), ivtp.attach(model, None, method="random", keep="100%") as pruner:
        model(**inputs)
    slots = int((inputs["input_ids"] == model.config.image_token_id).sum())
    separators = count if count > 1 else sum(grid[0] for grid in pruner.trace.grids[0][0][1:])
    assert sum(pruner.trace.patches[0]) == slots - separators


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4000), st.integers(1, 4000))
def test_every_slot_holds_a_patch_of_its_own(height: int, width: int) -> None:
    """In the released checkpoints' tiles: none twice, in raster order, and no more than are admitted."""
    tiles = tuple(map(tuple, REAL.image_grid_pinpoints))
    visual = in_tiles((height, width), tiles, 384, 27, HOST.limit(REAL))
    assert visual.token[visual.token >= 0].tolist() == list(range(visual.patches))
    assert sorted(visual.tiles[visual.tiles >= 0].tolist()) == list(range(visual.patches))
    assert visual.patches <= 27 * 27 * (1 + 9 * 1.21)
    if visual.scaled is not None:
        check_nearest(visual)


def check_nearest(visual: Visual) -> None:
    """Each slot of a grid that is scaled down holds the patch of the larger grid that lies nearest to it."""
    assert visual.scaled is not None
    large, small = visual.scaled.shape, visual.grids[-1]
    assert large[0] * large[1] > 1.2 * small[0] * small[1]
    first = visual.patches - small[0] * small[1]
    token = visual.tiles.flatten().argsort()[-small[0] * small[1] :]  # the token of each patch, in raster order
    assert visual.tiles.flatten()[token].tolist() == list(range(first, visual.patches))
    place = torch.full((visual.tiles.numel(),), -1)
    place[visual.scaled.flatten()] = torch.arange(large[0] * large[1])
    found = torch.stack([place[token] // large[1], place[token] % large[1]], dim=1).view(*small, 2)
    for axis in (0, 1):
        ideal = (torch.arange(small[axis]) + 0.5) * large[axis] / small[axis] - 0.5
        along = found[..., axis] if axis else found[..., axis].T
        assert ((along - ideal).abs() <= 0.5 + 1e-4).all()


@pytest.mark.parametrize("method", ["topk", "divprune", "fastv", "ivtp", "ivtp+"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_budget_is_that_of_the_whole_image(small: tuple[Any, Any], method: str, shape: tuple[int, int]) -> None:
    model, processor = small
    inputs = HOST.tiny_inputs(model, processor, [("Is it a dog?", [shape])])
    options = {"guide": "text", "llm_layers": 6} if method.startswith("ivtp") else {}
    with torch.no_grad(), ivtp.attach(model, processor, method=method, keep=7, **options) as pruner:
        model(**inputs)
    (kept,) = pruner.trace.kept().tolist()
    assert len(set(kept)) == 7
    assert 0 <= min(kept) <= max(kept) < pruner.trace.patches[0][0]


@pytest.mark.parametrize("method", ["topk", "fastv"])
@pytest.mark.parametrize("count", [1, 2])
def test_images_cost_what_a_prefill_counts(small: tuple[Any, Any], method: str, count: int) -> None:
    """From their sizes alone: one in tiles, several as wholes."""
    model, processor = small
    inputs = HOST.tiny_inputs(model, processor, [("Is it a dog?", [(200, 60)] * count)])
    slots = int((inputs["input_ids"] == model.config.image_token_id).sum())
    text = inputs["input_ids"].shape[1] - slots + count
    expected = ivtp.flops(model, method=method, keep=5, text_tokens=text, images=count, image_size=(200, 60)).total
    with torch.no_grad(), ivtp.attach(model, processor, method=method, keep=5) as pruner:
        model(**inputs)
    assert pruner.trace.flops == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("images", [True, False])
def test_a_video_is_refused_in_a_line(small: tuple[Any, Any], images: bool) -> None:
    """It would pass unpruned."""
    model, processor = small
    inputs = HOST.tiny_inputs(model, processor, [("Is it a dog?", [(50, 40)] * images)])
    video = torch.zeros(1, 2, 3, 32, 32)
    with ivtp.attach(model, processor, method="topk", keep=4):
        for call in (model, functools.partial(model.generate, max_new_tokens=2)):
            with pytest.raises(InputError, match="images alone") as caught:
                call(**inputs, pixel_values_videos=video)
            assert "\n" not in str(caught.value)


def test_counts_that_do_not_fit_are_refused(small: tuple[Any, Any]) -> None:
    model, processor = small
    inputs = HOST.tiny_inputs(model, processor, [("Is it a dog?", [(50, 40)])])
    inputs["batch_num_images"] = torch.tensor([2])
    with ivtp.attach(model, processor, method="topk", keep=4), pytest.raises(InputError, match="batch_num_images"):
        model(**inputs)


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="its processor can be made")
def test_a_checkpoint_whose_processor_needs_torchvision_is_one_line(small: tuple[Any, Any], tmp_path: Path) -> None:
    ivtp.save(*small, tmp_path)
    with pytest.raises(LoadError, match=r"^.*its processor reads no images here; some need torchvision.*$"):
        ivtp.load(tmp_path)
