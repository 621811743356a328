"""Pixtral's and Mistral 3's own: grids of any size, tokens of the text between rows, and the slow reference of both."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from reference import Cut, Prompt, Reference, Result, _Image, check_stages, importance, prompt_of, rollout, select
from torch import Tensor
from transformers import LlamaConfig, MistralConfig

import ivtp
from ivtp.errors import ConfigError, InputError, UnsupportedModelError
from ivtp.hosts.pixtral import BREAK, END, SLOT
from ivtp.hosts.tiny import tiny_images
from ivtp.plug import find_host
from ivtp.registry import host_class

FAMILIES = ("mistral3", "pixtral")
TWO = ("How many bananas are there?", ((30, 90), (84, 84)))


@pytest.fixture(scope="module", params=FAMILIES)
def small(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return host_class(request.param).tiny()


def inputs_of(small: tuple[Any, Any], *prompts: Any) -> dict[str, Any]:
    return find_host(small[0]).tiny_inputs(*small, prompts)


def marks_of(small: tuple[Any, Any], ids: Tensor) -> Tensor:
    """Where the tokens stand that end rows and images."""
    ends = small[1].tokenizer.convert_tokens_to_ids([BREAK, END])
    return torch.isin(ids, torch.tensor(ends))


@settings(max_examples=30, deadline=None)
@given(st.integers(12, 200), st.integers(12, 200))
def test_an_image_of_a_size_has_the_tokens_of_the_stock_processor(width: int, height: int) -> None:
    for name in FAMILIES:
        small = host_class(name).tiny()
        visual = host_class(name).visual(small[0].config, (width, height))
        inputs = inputs_of(small, ("Is it a dog?", [(width, height)]))
        ((rows, columns),) = visual.grids
        assert inputs["image_sizes"].tolist() == [[rows * 8, columns * 8]]
        assert int((inputs["input_ids"] == small[1].image_token_id).sum()) == visual.patches == rows * columns
        assert int(marks_of(small, inputs["input_ids"]).sum()) == visual.marks == rows
        assert visual.patches <= find_host(small[0]).most_patches


@pytest.mark.parametrize(
    ("name", "size", "grid"),
    [
        ("pixtral-12b", (1024, 1024), (64, 64)),
        ("pixtral-12b", (500, 300), (19, 32)),
        ("pixtral-12b", (3000, 1000), (22, 64)),
        ("Mistral-Small-3.1-24B-Instruct-2503", (1540, 1540), (55, 55)),
        ("Mistral-Small-3.2-24B-Instruct-2506", (500, 300), (11, 18)),
    ],
)
def test_the_released_sizes_read_tokens_of_16_and_of_28_pixels(
    name: str, size: tuple[int, int], grid: tuple[int, int]
) -> None:
    family = next(host_class(f) for f in FAMILIES if name in host_class(f).stock)
    config = family.stock_config(name)
    assert family.visual(config, size).grids == (grid,)
    with pytest.raises(InputError, match="5000 x 1 pixels is a strip"):
        family.visual(config, (5000, 1))


@pytest.mark.parametrize("shape", [(50, 40), (200, 20), (33, 97), (64, 64)])
def test_an_image_of_a_size_costs_what_a_prefill_counts(small: tuple[Any, Any], shape: tuple[int, int]) -> None:
    """The tokens that end its rows among them."""
    model, processor = small
    inputs = inputs_of(small, ("Is it a dog?", [shape]))
    ids = inputs["input_ids"]
    text = int(((ids != processor.image_token_id) & ~marks_of(small, ids)).sum()) + 1
    for method in ("topk", "fastv"):
        with torch.no_grad(), ivtp.attach(model, None, method=method, keep=5) as pruner:
            model(**inputs)
        expected = ivtp.flops(model, method=method, keep=5, text_tokens=text, image_size=shape).total
        assert pruner.trace.flops == pytest.approx(expected, rel=1e-12)


def test_the_ends_of_rows_stay(small: tuple[Any, Any]) -> None:
    """Of all images, also where nothing is left of a row; none of them is read as the question."""
    model, processor = small
    inputs = inputs_of(small, TWO)
    with torch.no_grad(), ivtp.attach(model, processor, method="ivtp", guide="text", keep=1) as pruner:
        model(**inputs)
    columns = marks_of(small, inputs["input_ids"])[0].nonzero().flatten().tolist()
    record = pruner.thread.record
    assert len(columns) == int(inputs["image_sizes"][:, 0].sum()) // 8
    assert set(columns) <= set(record.sequence.source[0].tolist())
    assert not set(columns) & set(record.prompts.question[0].nonzero().flatten().tolist())


def test_an_image_that_was_not_scaled_is_read_as_the_stock_model_does(small: tuple[Any, Any]) -> None:
    """Without what is beyond its last whole patch."""
    model, processor = small
    text = f"USER: {SLOT}Is it a dog? ASSISTANT:"
    picture = tiny_images("Is it a dog?", [(59, 43)])[0]
    inputs = dict(processor(images=[picture], text=text, do_resize=False, return_tensors="pt"))
    assert inputs["image_sizes"].tolist() == [[43, 59]]
    with torch.no_grad():
        stock = model(**inputs).logits
        with ivtp.attach(model, None, method="random", keep="100%") as pruner:
            torch.testing.assert_close(model(**inputs).logits, stock, atol=1e-4, rtol=0)
    assert pruner.trace.grids == ((((5, 7),),),)


def test_another_feature_layer_is_read_as_the_stock_model_does(small: tuple[Any, Any]) -> None:
    model = copy.deepcopy(small[0])
    model.config.vision_feature_layer = -2
    inputs = inputs_of(small, TWO)
    with torch.no_grad():
        stock = model(**inputs).logits
        assert not torch.allclose(stock, small[0](**inputs).logits, atol=1e-2)
        with ivtp.attach(model, None, method="ivtp", guide="text", keep="100%"):
            torch.testing.assert_close(model(**inputs).logits, stock, atol=1e-4, rtol=0)
        with ivtp.attach(model, None, keep=4, guide="text"), pytest.raises(InputError, match="vision_feature_layer=-1"):
            model(**inputs, vision_feature_layer=-1)


def test_wrong_sizes_are_a_clear_line(small: tuple[Any, Any]) -> None:
    model, _ = small
    inputs = inputs_of(small, ("Is it a dog?", [(50, 40)]))
    sizes = inputs.pop("image_sizes")
    with ivtp.attach(model, None, method="divprune", keep=4):
        for wrong, says in (
            ({}, "image_sizes"),
            ({"image_sizes": sizes.repeat(2, 1)}, "do not fit 2 images"),
            ({"image_sizes": sizes + torch.tensor([0, 8])}, "do not fit 1 images"),
            ({"image_sizes": torch.tensor([[7, 56]])}, "56 x 7 pixels is not of whole tokens of 8 pixels"),
            ({"image_sizes": sizes - 8}, "image slots"),
        ):
            with pytest.raises(InputError, match=says) as caught:
                model(**inputs, **wrong)
            assert "\n" not in str(caught.value)


def test_half_a_token_is_refused() -> None:
    """The stock merger leaves such patches out behind the encoder, where others have seen them."""
    small = host_class("mistral3").tiny()
    inputs = inputs_of(small, ("Is it a dog?", [(50, 40)]))
    inputs["image_sizes"] = inputs["image_sizes"] - torch.tensor([4, 0])
    with (
        ivtp.attach(small[0], None, method="divprune", keep=4),
        pytest.raises(InputError, match="not of whole tokens of 8 pixels; let the model's processor scale it"),
    ):
        small[0](**inputs)


def test_what_is_outside_the_family_is_refused(small: tuple[Any, Any]) -> None:
    model, _ = small
    host = find_host(model)
    changed = copy.deepcopy(model.config)
    changed.vision_feature_layer = [-2, -3]
    with pytest.raises(UnsupportedModelError, match="one feature layer"):
        host.geometry(changed)
    changed = copy.deepcopy(model.config)
    changed.text_config = MistralConfig(sliding_window=4096)
    with pytest.raises(UnsupportedModelError, match="sliding-window layers"):
        host.geometry(changed)
    changed.text_config = LlamaConfig()
    changed.vision_config = host_class("llava").tiny()[0].config.vision_config
    with pytest.raises(UnsupportedModelError, match="a pixtral can be pruned"):
        host.geometry(changed)
    with pytest.raises(ConfigError, match='guide="text"') as caught:
        ivtp.attach(*small, keep=8)
    assert "\n" not in str(caught.value)


def test_a_decoder_of_another_kind_is_refused() -> None:
    transformers = pytest.importorskip("transformers.models.ministral3")
    config = copy.deepcopy(host_class("mistral3").tiny()[0].config)
    config.text_config = transformers.Ministral3Config()
    with pytest.raises(UnsupportedModelError, match="'ministral3'; decoders with Llama's layers"):
        host_class("mistral3").geometry(config)


class PixtralReference(Reference):
    """Images of one grid of tokens: patches turned by row and column, `across` x `across` of which are a token."""

    def __init__(self, model: Any, config: ivtp.PruneConfig, grid: tuple[int, int]) -> None:
        self.grid, self.across = grid, getattr(model.config, "spatial_merge_size", 1)
        super().__init__(model, None, config)

    def _count(self) -> int:
        return self.grid[0] * self.grid[1]

    def _encode(self, pixels: Tensor) -> _Image:
        tower, unit = self.tower, self.across**2
        embedded = tower.patch_conv(pixels.double())  # (D, rows, columns)
        patches = list(range(self.num_patches))
        x = torch.stack([embedded[:, row, column] for row, column in self._places(patches)])
        x, cuts, maps = self._norm(tower.ln_pre, x), [], []
        ends = {group[-1]: k for group, k in self.vision_groups}
        for index, layer in enumerate(tower.transformer.layers):
            x, attention, values = self._attend(layer, x, self._places(patches))
            maps.append(attention)
            if index in ends:
                row = rollout(maps, self.options.aggregation).mean(0).view(-1, unit).sum(1)
                scores = importance(row, values.view(len(patches), unit, -1).mean(1))
                chosen = select(scores, ends[index])
                kept = [patches[i] for i in chosen]
                cuts.append(Cut("vision", index, patches, scores.tolist(), kept))
                x = x.view(len(patches), unit, -1)[chosen].flatten(0, 1)
                patches, maps = kept, []
            x = x + layer.feed_forward(self._norm(layer.ffn_norm, x))
        cls = x.mean(0)
        return _Image(patches, self._project(x), cls, self._project(cls.expand(unit, -1))[0], None, cuts)

    def _places(self, patches: list[int]) -> list[tuple[int, int]]:
        """Row and column of the patches of the encoder that these tokens are made of, token by token."""
        across, columns = self.across, self.grid[1]
        corners = [(across * (p // columns), across * (p % columns)) for p in patches]
        return [
            (row + down, column + right) for row, column in corners for down in range(across) for right in range(across)
        ]

    def _attend(self, layer: Any, x: Tensor, places: list[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Attention and residual of a layer: new states (T, D), the map (T, T) of all heads, values (T, D)."""
        config, part = self.tower.config, layer.attention
        normed = self._norm(layer.attention_norm, x)
        q, k, v = (projection(normed) for projection in (part.q_proj, part.k_proj, part.v_proj))
        size = q.shape[1] // config.num_attention_heads
        speed = config.rope_parameters["rope_theta"] ** (-torch.arange(size // 2, dtype=torch.float64) / (size // 2))
        row, column = torch.tensor(places, dtype=torch.float64).T[..., None]
        angle = torch.cat([row * speed[0::2], column * speed[1::2]], dim=1)  # (T, d / 2)
        outputs, maps = [], []
        for head in range(config.num_attention_heads):
            own = slice(head * size, (head + 1) * size)
            maps.append((_turn(q[:, own], angle) @ _turn(k[:, own], angle).T / size**0.5).softmax(-1))
            outputs.append(maps[-1] @ v[:, own])
        return x + part.o_proj(torch.cat(outputs, -1)), torch.stack(maps).mean(0), v

    def _project(self, x: Tensor) -> Tensor:
        """The projector; where it has a merger, over the channels of a token's patches, patch by patch in each one."""
        project = self.model.model.multi_modal_projector
        if self.across > 1:
            x = self._norm(project.norm, x).view(-1, self.across**2, x.shape[1]).mT.flatten(1)
            x = project.patch_merger.merging_layer(x)
        return project.linear_2(project.act(project.linear_1(x)))


def _turn(x: Tensor, angle: Tensor) -> Tensor:
    """Halves (a, b) of (T, d), turned by (T, d / 2)."""
    a, b = x.chunk(2, dim=1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], 1)


def read_once(small: tuple[Any, Any], question: str, shape: tuple[int, int], images: int) -> tuple[Prompt, Any]:
    """A prompt about images of one shape, and their grid of tokens."""
    _, processor = small
    inputs = inputs_of(small, (question, [shape] * images))
    rows, columns = (length // 8 for length in inputs["image_sizes"][0].tolist())
    content = [*[{"type": "image"}] * images, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    text = text.replace(SLOT, BREAK.join([SLOT * columns] * rows) + END)
    prompt = prompt_of(processor, text, question, [Image.new("RGB", (8, 8))], 1)
    assert prompt.ids.tolist() == inputs["input_ids"][0].tolist()
    return dataclasses.replace(prompt, pixels=inputs["pixel_values"]), (rows, columns)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"aggregation": "mean", "positions": "compact"},
        {"stages": "llm", "guide": "visual", "cache": "layered"},
        {"keep": 1, "stages": "vision", "group_layers": 2},
    ],
    ids=str,
)
def test_what_stays_is_what_the_reference_keeps(small: tuple[Any, Any], changes: dict[str, Any]) -> None:
    """In a left-padded batch of images of different sizes."""
    model, processor = small
    asked = (("What is left of the dog?", (50, 40), 1), ("How many?", (30, 90), 2))
    options = {"keep": 8, "guide": "text", "llm_layers": 6, **changes}
    expected: list[Result] = []
    for question, shape, images in asked:
        prompt, grid = read_once(small, question, shape, images)
        expected.append(PixtralReference(model, ivtp.PruneConfig.of(**options), grid).run(prompt))
    inputs = inputs_of(small, *((question, [shape] * images) for question, shape, images in asked))
    with torch.no_grad(), ivtp.attach(model, processor, **options) as pruner:
        logits = model(**inputs).logits
    check_stages(pruner.trace, expected)
    for row, result in zip(logits, expected, strict=True):
        torch.testing.assert_close(row[-1].double(), result.logits[-1], atol=1e-4, rtol=0)
