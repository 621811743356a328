"""Idefics3's and SmolVLM's own: squares of patches against a slow reference, and prompts that tag their tiles."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from family import check_kept
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from reference import Cut, Prompt, Reference, Result, _Image, _vision_attention, importance, rollout, select
from torch import Tensor, nn
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

import ivtp
from ivtp import PruneConfig
from ivtp.errors import InputError, UnsupportedModelError
from ivtp.hosts.tagged import read_tagged
from ivtp.hosts.tiny import IMAGE, tiny_images
from ivtp.plug import find_host
from ivtp.prompt.batch import read_prompts
from ivtp.prompt.instruction import InstructionReader
from ivtp.registry import host_class

FAMILIES = ("idefics3", "smolvlm")
ONE_TILE = (("What is left of the dog?", ((50, 40),)), ("How many bananas are there?", ((40, 50), (32, 32))))
SHAPES = [(50, 40), (64, 64), (200, 20), (20, 200), (33, 97), (1000, 2)]
SLOT, MARK, WHOLE, NEWLINE = 1, 2, 3, 4
"""Tokens of made-up prompts; the tag of a tile in row r and column c is 10 * r + c."""


@pytest.fixture(scope="module", params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def small(name: str) -> tuple[Any, Any]:
    return host_class(name).tiny()


def squares(side: int, across: int) -> list[list[int]]:
    """The patches, counted in raster order, of each square in raster order."""
    return [
        [(row + y) * side + column + x for y in range(across) for x in range(across)]
        for row in range(0, side, across)
        for column in range(0, side, across)
    ]


class Joined(nn.Module):
    """The post layer norm and the projector of patches (n, unit, D) of squares, or of one (D,) that stands for all."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.norm, self.matrix = model.model.vision_model.post_layernorm, model.model.connector.modality_projection
        self.unit = model.config.scale_factor**2

    def forward(self, patches: Tensor) -> Tensor:
        patches = patches.expand(1, self.unit, -1) if patches.dim() == 1 else patches
        return self.matrix(self.norm(patches).flatten(1)).squeeze(0)


class IdeficsReference(Reference):
    """One tile an image; tokens stay in raster order, and rows and columns of full maps are picked square by square."""

    def __init__(self, model: Any, config: PruneConfig) -> None:
        model = copy.deepcopy(model)
        model.config.vision_feature_layer = -1
        inner = model.model
        inner.vision_tower, inner.language_model, inner.multi_modal_projector = (
            inner.vision_model,
            inner.text_model,
            Joined(model),
        )
        super().__init__(model, None, config)

    def run(self, prompt: Prompt, *args: Any) -> Result:
        return super().run(dataclasses.replace(prompt, pixels=prompt.pixels[0]), *args)  # those of the only prompt

    def _squares(self) -> list[list[int]]:
        config = self.model.config
        return squares(config.vision_config.image_size // config.vision_config.patch_size, config.scale_factor)

    def _count(self) -> int:
        return len(self._squares())

    def _encode(self, pixels: Tensor) -> _Image:
        own = self._squares()
        side = math.isqrt(len(own) * len(own[0]))
        mask = torch.ones(1, side, side, dtype=torch.bool)
        x = self.tower.embeddings(pixels[None].to(self.dtype), mask)[0]  # (patches, D)
        patches, columns = list(range(self.num_patches)), own
        cuts: list[Cut] = []
        maps: list[Tensor] = []
        ends = {group[-1]: k for group, k in self.vision_groups}
        for index, layer in enumerate(self.tower.encoder.layers):
            x, attention, values = _vision_attention(layer, x)
            maps.append(attention)
            if index in ends:
                row = rollout(maps, self.options.aggregation).mean(0)
                received = torch.stack([row[tokens].sum() for tokens in columns])
                scores = importance(received, torch.stack([values[tokens].mean(0) for tokens in columns]))
                chosen = select(scores, ends[index])
                kept = [patches[i] for i in chosen]
                cuts.append(Cut("vision", index, patches, scores.tolist(), kept))
                stay = sorted(token for i in chosen for token in columns[i])
                x = x[stay]
                patches, columns = kept, [[stay.index(token) for token in columns[i]] for i in chosen]
                maps = []
            x = x + layer.mlp(layer.layer_norm2(x))
        project, cls = self.model.model.multi_modal_projector, x.mean(0)
        return _Image(patches, project(torch.stack([x[tokens] for tokens in columns])), cls, project(cls), None, cuts)


@pytest.mark.parametrize(
    "options",
    [
        {},
        *({"aggregation": how} for how in ("mean", "multiply", "layer")),
        {"guide": "visual"},
        {"stages": "vision", "group_layers": 2},
        {"stages": "llm", "guide": "visual"},
        {"keep": 1, "group_layers": 4},
        {"positions": "compact", "cache": "layered"},
    ],
    ids=str,
)
def test_what_stays_is_what_the_reference_keeps(name: str, options: dict[str, Any]) -> None:
    host = host_class(name)
    model, processor = host.tiny()
    processor.image_processor.do_image_splitting = False
    options = {"keep": 5, "guide": "text", "llm_layers": 6, **options}
    reference = IdeficsReference(model, PruneConfig.of(**options))
    slot = f"<fake_token_around_image><global-img>{IMAGE}<fake_token_around_image>"
    check_kept(host, model, processor, reference, ONE_TILE, options, slot=slot)


def test_a_square_is_chosen_by_the_attention_that_all_of_it_receives(name: str, small: tuple[Any, Any]) -> None:
    """Of every tile of an image, behind the encoder: the whole is the last of them."""
    model, processor = small
    inputs = host_class(name).tiny_inputs(model, processor, [("Is it a dog?", [(200, 60)])])
    vision, across = model.config.vision_config, model.config.scale_factor
    side = vision.image_size // vision.patch_size
    tower = model.model.vision_model
    with torch.no_grad(), ivtp.attach(model, processor, method="topk", keep="100%") as pruner:
        model(**inputs)
        (kept,), (scores,) = pruner.trace.kept().tolist(), pruner.trace.stages[0].scores
    assert kept == list(range(len(inputs["pixel_values"][0]) * (side // across) ** 2))
    rows = []
    with torch.no_grad():
        for tile in inputs["pixel_values"][0]:
            x = tower.embeddings(tile[None], torch.ones(1, side, side, dtype=torch.bool))[0]
            for layer in tower.encoder.layers:
                x, attention, _ = _vision_attention(layer, x)
                x = x + layer.mlp(layer.layer_norm2(x))
            rows += [attention.mean(0)[own].sum() for own in squares(side, across)]
    torch.testing.assert_close(scores, torch.stack(rows).float(), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("method", ["random", "divprune", "fastv", "ivtp", "sparsevlm"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_budget_is_that_of_the_whole_image(
    name: str, small: tuple[Any, Any], method: str, shape: tuple[int, int]
) -> None:
    model, processor = small
    inputs = host_class(name).tiny_inputs(model, processor, [("Is it a dog?", [shape])])
    options = {"guide": "text", "llm_layers": 6} if method == "ivtp" else {}
    with torch.no_grad(), ivtp.attach(model, processor, method=method, keep=7, **options) as pruner:
        model(**inputs)
    (kept,) = pruner.trace.kept().tolist()
    assert len(set(kept)) == 7
    assert 0 <= min(kept) <= max(kept) < pruner.trace.patches[0][0]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400))
def test_an_image_has_as_many_tiles_as_the_stock_processor_makes(width: int, height: int) -> None:
    host = host_class("smolvlm")
    config = host.stock_config("SmolVLM2-256M-Video-Instruct")
    config.vision_config.image_size, config.vision_config.patch_size = 8, 2
    processor = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 8})
    picture = Image.fromarray(np.full((height, width, 3), 90, dtype=np.uint8))
    pixels = processor(picture, return_tensors="np")["pixel_values"]
    assert len(host.visual(config, (width, height)).tiles) == pixels.shape[1]


@pytest.mark.parametrize("method", ["topk", "fastv"])
@pytest.mark.parametrize("shapes", [[(200, 90)], [(40, 120)] * 2], ids=str)
def test_images_cost_what_a_prefill_counts(method: str, shapes: list[tuple[int, int]]) -> None:
    """From their sizes alone, with the released checkpoints' number of tiles, where every tag is a token."""
    host = host_class("idefics3")
    model, processor = host.tiny()
    processor.image_processor.size = {"longest_edge": 4 * model.config.vision_config.image_size}
    inputs = host.tiny_inputs(model, processor, [("Is it a dog?", shapes)])
    ids = inputs["input_ids"][0].tolist()
    written = read_tagged(ids, model.config.image_token_id, 16)
    text = len(ids) - sum(len(image.columns) - 1 for image in written)  # a placeholder for each
    text += len(shapes)  # two newlines are two tokens here
    options = {"method": method, "keep": 5, "images": len(shapes), "image_size": shapes[0]}
    expected = ivtp.flops(model, **options, text_tokens=text).total
    with torch.no_grad(), ivtp.attach(model, processor, method=method, keep=5) as pruner:
        model(**inputs)
    assert pruner.trace.flops == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("size", "tokens"),
    [
        ("Idefics3-8B-Llama3", 169),
        ("SmolVLM2-256M-Video-Instruct", 64),
        ("SmolVLM2-500M-Video-Instruct", 64),
        ("SmolVLM2-2.2B-Instruct", 81),
    ],
)
def test_a_tile_of_a_well_known_size_has_the_tokens_that_its_processor_writes(size: str, tokens: int) -> None:
    host = next(host for host in map(host_class, FAMILIES) if size in host.stock)
    config = host.stock_config(size)
    assert host.geometry(config).num_patches == tokens
    visual = host.visual(config, (640, 480))
    assert (len(visual.tiles), visual.patches) == (13, 13 * tokens)  # 3 rows of 4, and the whole


def test_pixels_may_be_of_another_dtype_than_the_model(name: str, small: tuple[Any, Any]) -> None:
    """As the processor gives them: the stock model casts them."""
    host, processor = host_class(name), small[1]
    model = copy.deepcopy(small[0]).to(torch.bfloat16)
    inputs = host.tiny_inputs(model, processor, ONE_TILE)
    assert inputs["pixel_values"].dtype == torch.float32
    with torch.no_grad():
        stock = model(**inputs).logits[:, -1]
        with ivtp.attach(model, processor, method="fastv", keep="100%"):
            ours = model(**inputs).logits[:, -1]
    assert (ours - stock).abs().mean() < 0.05 * stock.abs().mean()


@pytest.mark.parametrize("shapes", [[(50, 40)], [(30, 90), (120, 40)]], ids=str)
def test_tags_and_newlines_are_no_part_of_the_question(
    name: str, small: tuple[Any, Any], shapes: list[tuple[int, int]]
) -> None:
    """Behind the images, and where they stand in the middle of it; those that the user types are."""
    model, processor = small
    host = find_host(model)
    for question in ("What is <row_1_col_1> left of it?", f"What is {IMAGE * len(shapes)}left of it?"):
        shown = "" if IMAGE in question else IMAGE * len(shapes)
        inputs = host_class(name).tiny_inputs(model, processor, [("?", shapes)])
        text = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "text", "text": shown + question}]}], add_generation_prompt=True
        )
        made = host_class(name).process(processor, [text], [_pictures(shapes)])
        inputs = {**inputs, "input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}
        batch = read_prompts(inputs, host, labels=None, prompt_length=None, repeats=1)
        reader = InstructionReader(processor)
        (asked,) = batch.with_instructions(lambda text, reader=reader: reader.read(text.ids, text.columns)).instructions
        assert asked.text == question.replace(IMAGE, "")


def _pictures(shapes: list[tuple[int, int]]) -> list[Any]:
    return tiny_images("?", shapes)


def _written(rows: int, columns: int, each: int) -> list[int]:
    """An image, as the stock processors write it."""
    tiles: list[int] = []
    for row in range(rows):
        for column in range(columns):
            tiles += [MARK, 10 * (row + 1) + column + 1, *[SLOT] * each]
        tiles.append(NEWLINE)
    return [*tiles, *[NEWLINE] * bool(rows), MARK, WHOLE, *[SLOT] * each, MARK]


@given(
    st.integers(1, 4),
    st.lists(st.tuples(st.sampled_from([(0, 0), (1, 2), (2, 1), (3, 4)]), st.lists(st.integers(2, 60), max_size=5))),
    st.lists(st.integers(3, 60), max_size=5),
)
def test_images_are_read_as_they_are_written(
    each: int, shown: list[tuple[tuple[int, int], list[int]]], before: list[int]
) -> None:
    """Whatever is typed around them, be it a mark or a tag."""
    ids, expected = list(before), []
    for (rows, columns), behind in shown:
        image = _written(rows, columns, each)
        expected.append((rows * columns + 1, range(len(ids), len(ids) + len(image))))
        ids += [*image, *behind]
    assert [(image.tiles, image.columns) for image in read_tagged(ids, SLOT, each)] == expected


def test_wrong_slots_are_a_line() -> None:
    good = _written(1, 2, 3)
    wrong = {
        "no mark behind": good[:-1],
        "no mark in front": good[1:],
        "a slot too few": [*good[:2], *good[3:]],
        "text between tiles": [*good[:5], 50, 51, 52, *good[5:]],
    }
    for ids in wrong.values():
        with pytest.raises(InputError, match="of 3 slots each") as caught:
            read_tagged(ids, SLOT, 3)
        assert "\n" not in str(caught.value)


def test_wrong_tiles_are_a_line(name: str, small: tuple[Any, Any]) -> None:
    """With padding, of another size, without their mask; the model prunes on afterwards."""
    model, processor = small
    inputs = host_class(name).tiny_inputs(model, processor, [("Is it a dog?", [(50, 40)])])
    pixels, mask = inputs["pixel_values"], inputs["pixel_attention_mask"]
    padded = mask.clone()
    padded[0, -1, -8:] = 0
    wrong: dict[str, dict[str, Tensor]] = {
        "hides patches": {"pixel_attention_mask": padded},
        "does not fit pixel_values": {"pixel_attention_mask": mask[:, 1:]},
        "are no tiles": {"pixel_values": pixels[..., 8:], "pixel_attention_mask": mask[..., 8:]},
        "no tiles": {"pixel_values": pixels[0]},
        "slots of 5 tiles": {"pixel_values": pixels[:, 1:], "pixel_attention_mask": mask[:, 1:]},
        "images alone": {"image_hidden_states": torch.zeros(1, 1, 1)},
    }
    with torch.no_grad(), ivtp.attach(model, processor, method="divprune", keep=5) as pruner:
        expected = model(**inputs).logits
        for says, change in wrong.items():
            with pytest.raises(InputError, match=says) as caught:
                model(**{**inputs, **change})
            assert "\n" not in str(caught.value)
        filled = {k: torch.cat([v, torch.zeros_like(v[:, :2])], 1) for k, v in inputs.items() if k.startswith("pixel")}
        torch.testing.assert_close(model(**{**inputs, **filled}).logits, expected)
        assert torch.equal(model(**{**inputs, "pixel_attention_mask": None}).logits, expected)
        assert pruner.trace.kept().shape == (1, 5)


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("model", {"scale_factor": 5}, "squares of 5 x 5"),
        ("vision", {"patch_size": [4, 8]}, "square tiles"),
        ("text", {"model_type": "mixtral"}, "decoders with Llama's layers"),
    ],
    ids=str,
)
def test_what_cannot_be_pruned_is_a_line(name: str, part: str, change: dict[str, Any], says: str) -> None:
    config = host_class(name).tiny()[0].config
    owner = {"model": config, "vision": config.vision_config, "text": config.text_config}[part]
    for field, value in change.items():
        object.__setattr__(owner, field, value)
    with pytest.raises(UnsupportedModelError, match=says) as caught:
        host_class(name).geometry(config)
    assert "\n" not in str(caught.value)
