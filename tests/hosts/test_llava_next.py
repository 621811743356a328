"""LLaVA-NeXT's tiles: budgets that are exact whatever the shape of a picture, and tiles of the real size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

import ivtp
from ivtp.errors import ConfigError
from ivtp.hosts.llava_next import HOST
from ivtp.hosts.tiny import CHAT_TEMPLATE, IMAGE, settle, tiny_tokenizer

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
SHAPES = [(50, 40), (200, 20), (20, 200), (64, 64), (33, 97), (1000, 2)]


@pytest.fixture(scope="module")
def small() -> tuple[Any, Any]:
    return HOST.tiny()


@pytest.fixture(scope="module")
def real_sized() -> tuple[Any, Any]:
    """Tiles of 336 pixels and 576 patches, as the released checkpoints have them, of a narrow random model."""
    tokenizer = tiny_tokenizer()
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 2}
    text = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 8, "num_attention_heads": 4}
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**vision, image_size=336, patch_size=14, projection_dim=16),
        text_config=LlamaConfig(**text, num_key_value_heads=2, vocab_size=len(tokenizer), max_position_embeddings=8192),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
    )
    processor = LlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}, image_grid_pinpoints=PINPOINTS
        ),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    return settle(LlavaNextForConditionalGeneration(config), tokenizer, 0), processor


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("keep", [1, 7, 16])
@pytest.mark.parametrize("method", ["topk", "ivtp", "ivtp+", "fastv", "divprune", "random"])
def test_a_budget_is_that_of_the_whole_image(
    small: tuple[Any, Any], method: str, keep: int, shape: tuple[int, int]
) -> None:
    model, processor = small
    inputs = HOST.tiny_inputs(model, processor, [("Is it a dog?", [shape])])
    options = {"guide": "text", "llm_layers": 6} if method.startswith("ivtp") else {}
    with torch.no_grad(), ivtp.attach(model, processor, method=method, keep=keep, **options) as pruner:
        model(**inputs)
        ((patches,),) = pruner.trace.patches
        (kept,) = pruner.trace.kept().tolist()
    assert len(set(kept)) == keep
    assert 0 <= min(kept) <= max(kept) < patches


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("keep", [7, 16])
def test_sources_of_tiles_are_patches_of_the_image(small: tuple[Any, Any], keep: int, shape: tuple[int, int]) -> None:
    """What merges stands for patches all over the image; lost are those alone whose token was one too many."""
    model, processor = small
    inputs = HOST.tiny_inputs(model, processor, [("Is it a dog?", [shape])])
    with (
        torch.no_grad(),
        ivtp.attach(model, processor, method="ivtp+", keep=keep, guide="text", llm_layers=6) as pruner,
    ):
        model(**inputs)
        ((patches,),) = pruner.trace.patches
        *_, last = [stage for stage in pruner.trace.stages if stage.where == "vision"]
    (kept,), (sources,) = last.kept.tolist(), last.sources.tolist()
    assert len(sources) == patches
    assert set(sources) - {-1} == set(kept)
    assert all(sources[patch] == patch for patch in kept)
    assert sources.count(-1) < patches / 2


@pytest.mark.parametrize("shape", SHAPES)
def test_slots_are_those_of_the_stock_processor(small: tuple[Any, Any], shape: tuple[int, int]) -> None:
    model, processor = small
    inputs = HOST.tiny_inputs(model, processor, [("Is it a dog?", [shape])])
    visual = HOST.visual(model.config, shape)
    assert len(visual.token) == int((inputs["input_ids"] == model.config.image_token_id).sum())
    assert len(visual.tiles) == inputs["pixel_values"].shape[1]
    assert sorted(visual.token[visual.token >= 0].tolist()) == list(range(visual.patches))
    assert sorted(visual.tiles[visual.tiles >= 0].tolist()) == list(range(visual.patches))


@pytest.mark.parametrize("shapes", [SHAPES[:1], SHAPES[1:3] * 2, SHAPES[-1:]])
@pytest.mark.parametrize("method", ["topk", "ivtp", "fastv"])
def test_an_image_of_a_size_costs_what_a_prefill_counts(
    small: tuple[Any, Any], method: str, shapes: list[tuple[int, int]]
) -> None:
    model, processor = small
    inputs = HOST.tiny_inputs(model, processor, [("Is it a dog?", [shape]) for shape in shapes])
    options = {"guide": "text", "llm_layers": 6} if method == "ivtp" else {}
    columns, slots = inputs["input_ids"].shape[1], (inputs["input_ids"] == model.config.image_token_id).sum(dim=1)
    expected = sum(
        ivtp.flops(
            model, method=method, keep=5, text_tokens=columns - int(count) + 1, image_size=shape, **options
        ).total
        for shape, count in zip(shapes, slots, strict=True)
    )
    with torch.no_grad(), ivtp.attach(model, processor, method=method, keep=5, **options) as pruner:
        model(**inputs)
    assert pruner.trace.flops == pytest.approx(expected, rel=1e-12)


def test_the_size_of_an_image_matters_where_it_is_read_in_tiles(small: tuple[Any, Any]) -> None:
    model, _ = small
    one, wide, square = (ivtp.flops(model, method="none", image_size=size) for size in (None, (64, 32), (64, 64)))
    assert one.keep < wide.keep < square.keep
    assert one.total < wide.total < square.total
    assert "one tile" in one.notes[0]
    assert not wide.notes
    with pytest.raises(ConfigError, match=rf"1\.\.{wide.keep}"):
        ivtp.flops(model, method="topk", keep=wide.keep + 1, image_size=(64, 32))


@pytest.mark.parametrize("method", ["tome", "evit", "visionzip", "prumerge", "tome+fastv"])
def test_merging_in_padded_tiles_is_refused(small: tuple[Any, Any], method: str) -> None:
    with pytest.raises(ConfigError, match="padding in the tiles of llava_next"):
        ivtp.attach(*small, method=method, keep=8)


def test_tiles_of_the_real_size(real_sized: tuple[Any, Any]) -> None:
    """A wide photograph and an upright one in a batch: as stock with all tokens, and answers with 64 of each."""
    model, processor = real_sized
    draw = np.random.default_rng(0)
    shapes = ((480, 640), (700, 300))
    images = [[Image.fromarray(draw.integers(0, 256, (*shape, 3), dtype=np.uint8))] for shape in shapes]
    text = ["USER: <image>\nWhat is left of the dog? ASSISTANT:", "USER: <image>\nIs it a cat? ASSISTANT:"]
    inputs = processor(images=images, text=text, padding=True, return_tensors="pt")
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        stock = model(**inputs).logits
        with ivtp.attach(model, processor, guide="text", llm_layers=6, keep="100%"):
            torch.testing.assert_close(model(**inputs).logits[real], stock[real], atol=1e-4, rtol=0)
        with ivtp.attach(model, processor, guide="text", llm_layers=6, keep=64) as pruner:
            answers = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    patches = [row[0] for row in pruner.trace.patches]
    assert all(count > 2 * 576 for count in patches)
    assert [len(set(row) - {-1}) for row in pruner.trace.kept().tolist()] == [64, 64]
    assert answers.shape[1] == inputs["input_ids"].shape[1] + 3
