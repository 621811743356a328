"""The Qwen2-VL families' own: positions on three axes, grids of any size, windows, and the slow reference of both."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from qwen_reference import reference_of
from reference import Prompt, Result, check_stages, prompt_of, select
from tiny import with_cache
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import ivtp
from ivtp.core.sequence import Placeholders, TokenSequence, enter_decoder
from ivtp.errors import ConfigError, InputError
from ivtp.hosts.qwen_like import MOST
from ivtp.hosts.tiny import tiny_images
from ivtp.plug import find_host
from ivtp.registry import host_class, list_hosts
from ivtp.visualize import draw_patches

FAMILIES = [name for name in list_hosts() if name.startswith("qwen")]
SHAPES = [(50, 40), (200, 20), (33, 97), (64, 64)]
TWO = ("How many bananas are there?", ((30, 90), (84, 84)))


@pytest.fixture(scope="module", params=FAMILIES)
def small(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return host_class(request.param).tiny()


def inputs_of(small: tuple[Any, Any], *prompts: Any) -> dict[str, Any]:
    return find_host(small[0]).tiny_inputs(*small, prompts)


@pytest.mark.parametrize(("name", "side"), [("qwen2_vl", 28), ("qwen3_vl", 32)])
@settings(max_examples=100, deadline=None)
@given(width=st.integers(1, 5000), height=st.integers(1, 5000))
def test_an_image_of_a_size_has_the_tokens_of_the_stock_processor(
    name: str, side: int, width: int, height: int
) -> None:
    """With the limits of the released checkpoints, at `side` pixels along a token; a strip is refused in a line."""
    family = host_class(name)
    limits = {"shortest_edge": family.fewest * side**2, "longest_edge": MOST * side**2}
    config = family.stock_config(family.stock[0])
    processor = Qwen2VLImageProcessorPil(size=limits, patch_size=side // 2)
    if max(width, height) > 200 * min(width, height):
        with pytest.raises(InputError, match=f"{width} x {height}.* 200 : 1"):
            family.visual(config, (width, height))
        return
    visual = family.visual(config, (width, height))
    assert 4 * visual.patches == processor.get_number_of_image_patches(height, width)
    ((rows, columns),) = visual.grids
    assert (rows <= columns) == (height <= width) or abs(rows - columns) <= 1
    assert visual.token.tolist() == list(range(rows * columns))


@pytest.mark.parametrize("shape", SHAPES)
def test_an_image_of_a_size_costs_what_a_prefill_counts(
    small: tuple[Any, Any], shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its tokens as the processor makes them, here at least 16 and at most 48."""
    model, _ = small
    monkeypatch.setattr(type(find_host(model)), "fewest", 16)
    inputs = inputs_of(small, ("Is it a dog?", [shape]))
    _, rows, columns = inputs["image_grid_thw"][0].tolist()
    as_scaled = (columns * 4, rows * 4)
    text = inputs["input_ids"].shape[1] - rows * columns // 4 + 1
    for method in ("topk", "fastv"):
        with torch.no_grad(), ivtp.attach(model, None, method=method, keep=5) as pruner:
            model(**inputs)
        expected = ivtp.flops(model, method=method, keep=5, text_tokens=text, image_size=as_scaled).total
        assert pruner.trace.flops == pytest.approx(expected, rel=1e-12)


def placed(model: Any, **inputs: Any) -> list[Tensor]:
    """The positions (3, B, T) that the decoder turns its tokens by: of the prompt, and of each step behind it."""
    found: list[Tensor] = []
    hook = model.model.language_model.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: found.append((kwargs.get("position_ids", args[-1])).expand(3, -1, -1)),
        with_kwargs=True,
    )
    model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    hook.remove()
    return found


@pytest.mark.parametrize("repeats", [{}, {"num_beams": 2}], ids=str)
def test_kept_tokens_and_the_answer_are_where_the_stock_model_has_them(small: Any, repeats: dict[str, int]) -> None:
    model, _ = small
    inputs = inputs_of(small, TWO, ("Say something.", []), ("Is it a cat", [(50, 40)]))
    stock, *steps = placed(model, **inputs, **repeats)
    with ivtp.attach(model, None, method="divprune", keep=3) as pruner:
        ours, *later = placed(model, **inputs, **repeats)
    sequence = pruner.thread.record.sequence
    there = sequence.valid & (sequence.source >= 0)
    for axis in range(3):
        assert ours[axis][there].tolist() == stock[axis].gather(1, sequence.source.clamp_min(0))[there].tolist()
    assert len(steps) == len(later) == 3
    assert all(mine.equal(theirs) for mine, theirs in zip(later, steps, strict=True))


def test_a_forward_computes_the_positions_that_generate_does(small: tuple[Any, Any]) -> None:
    """Also behind the prompt, where the stock model could not."""
    model, _ = small
    inputs = inputs_of(small, TWO, ("Is it a cat", [(50, 40)]))
    with ivtp.attach(model, None, method="fastv", keep=3):
        said = model.generate(
            **inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        with torch.no_grad():
            first = model(**{k: v for k, v in inputs.items() if k != "mm_token_type_ids"}, use_cache=True)
            mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
            ids = said.sequences[:, -3:-2]
            second = model(input_ids=ids, attention_mask=mask, **with_cache(model, first.past_key_values))
    torch.testing.assert_close(first.logits[:, -1], said.logits[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(second.logits[:, -1], said.logits[1], atol=1e-5, rtol=0)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.data())
def test_compact_positions_have_no_gap_and_keep_their_order(rows: int, columns: int, data: st.DataObject) -> None:
    """Two words, an image, two words: rows and columns that nothing is left in close up; words stay on the diagonal."""
    family = host_class("qwen2_vl")
    visual = family.in_units(family.stock_config("Qwen2-VL-7B-Instruct"), (rows, columns))
    count, length = visual.patches, visual.patches + 4
    kept = torch.tensor(sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1))))
    grid = torch.cartesian_prod(torch.tensor([2]), 2 + torch.arange(rows), 2 + torch.arange(columns)).view(-1, 3)
    behind = 2 + max(rows, columns) + torch.arange(2)
    position = torch.cat([torch.arange(2)[:, None].expand(-1, 3), grid, behind[:, None].expand(-1, 3)])[None]
    patch = torch.cat([torch.full((2,), -1), torch.arange(count), torch.full((2,), -1)])[None]
    there = torch.ones(1, length, dtype=torch.bool)
    prompt = TokenSequence(torch.full_like(patch, -1), there, position, torch.arange(length)[None], (0,), False)
    slots = Placeholders(patch >= 0, patch, torch.zeros_like(patch), ((count,),), tail=2)
    sequence, index, shift = enter_decoder(slots, prompt, [kept], compact=True)
    before, after = position[0][index[0]], sequence.position[0]
    assert sorted(set(after.flatten().tolist())) == list(range(int(after.max()) + 1)), "no gap"
    assert (before[:, None] <= before).equal(after[:, None] <= after), "tokens lie as they lay on each axis"
    assert (after[:2] == torch.arange(2)[:, None]).all()
    assert (after[-2:] == after[-2:, :1]).all()
    assert int(before[-1, 0] - after[-1, 0]) == int(shift)


@pytest.mark.parametrize("images", [True, False])
def test_a_video_is_refused_in_a_line(small: tuple[Any, Any], images: bool) -> None:
    """It would pass unpruned."""
    model, _ = small
    inputs = inputs_of(small, ("Is it a dog?", [(50, 40)] * images))
    with ivtp.attach(model, None, method="divprune", keep=4):
        for call in (model, functools.partial(model.generate, max_new_tokens=2)):
            with pytest.raises(InputError, match="images alone") as caught:
                call(**inputs, pixel_values_videos=torch.zeros(16, 96), video_grid_thw=torch.tensor([[1, 4, 4]]))
            assert "\n" not in str(caught.value)


def test_grids_that_do_not_fit_are_refused(small: tuple[Any, Any]) -> None:
    model, _ = small
    inputs = inputs_of(small, ("Is it a dog?", [(50, 40)]))
    grid = inputs.pop("image_grid_thw")
    film = grid * torch.tensor([2, 1, 1])
    with ivtp.attach(model, None, method="divprune", keep=4):
        for wrong, says in (
            ({}, "image_grid_thw"),
            ({"image_grid_thw": film}, "video"),
            ({"image_grid_thw": grid + torch.tensor([0, 2, 2])}, "fit"),
        ):
            with pytest.raises(InputError, match=says):
                model(**inputs, **wrong)


@pytest.mark.parametrize(
    ("method", "options"), [("ivtp", {"guide": "text"}), ("topk", {"where": "layers"}), ("random", {"where": "layers"})]
)
def test_windows_are_not_cut(method: str, options: dict[str, Any]) -> None:
    family = host_class("qwen2_5_vl")
    with pytest.raises(ConfigError, match=r"encoder layer.* qwen2_5_vl") as caught:
        ivtp.attach(family.tiny()[0], None, method=method, keep=4, **options)
    assert "\n" not in str(caught.value)


def test_attention_within_windows_ranks_nothing() -> None:
    """Where the encoder ends in a layer that does not see the whole image."""
    family = host_class("qwen2_5_vl")
    model = family.tiny()[0]
    model.config.vision_config.fullatt_block_indexes = [2]
    with pytest.raises(ConfigError, match="windows"):
        ivtp.attach(model, None, method="topk", keep=4)
    ivtp.attach(model, None, method="divprune", keep=4).detach()


def read_once(small: tuple[Any, Any], question: str, shape: tuple[int, int], images: int) -> tuple[Prompt, Any]:
    """A prompt about images of one shape, and their grid in units."""
    _, processor = small
    pictures = tiny_images(question, [shape] * images)
    made = processor.image_processor(pictures, return_tensors="pt")
    grid = tuple(length // 2 for length in made["image_grid_thw"][0].tolist()[1:])
    content = [*[{"type": "image"}] * images, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    prompt = prompt_of(processor, text, question, pictures, grid[0] * grid[1])
    return dataclasses.replace(prompt, pixels=made["pixel_values"].view(images, grid[0] * grid[1] * 4, -1)), grid


@pytest.mark.parametrize("changes", [{}, {"aggregation": "mean"}, {"stages": "llm", "guide": "visual"}], ids=str)
def test_what_stays_is_what_the_reference_keeps(small: tuple[Any, Any], changes: dict[str, Any]) -> None:
    """In a left-padded batch; where windows cannot be cut, in the decoder alone."""
    model, processor = small
    host, asked = find_host(model), (("What is left of the dog?", (50, 40), 1), ("How many?", (30, 90), 2))
    options = {"keep": 8, "guide": "text", "llm_layers": 6, **changes}
    options = options if "inside" in host.cuts else {**options, "stages": "llm"}
    expected: list[Result] = []
    for question, shape, images in asked:
        prompt, grid = read_once(small, question, shape, images)
        expected.append(reference_of(model, ivtp.PruneConfig.of(**options), grid).run(prompt))
    inputs = inputs_of(small, *((question, [shape] * images) for question, shape, images in asked))
    with torch.no_grad(), ivtp.attach(model, processor, **options) as pruner:
        logits = model(**inputs).logits
    check_stages(pruner.trace, expected)
    for row, result in zip(logits, expected, strict=True):
        torch.testing.assert_close(row[-1].double(), result.logits[-1], atol=1e-4, rtol=0)


def test_attention_of_a_token_is_that_of_its_four_patches(small: tuple[Any, Any]) -> None:
    """Behind the encoder, also of one that takes the patches window by window."""
    model, _ = small
    prompt, grid = read_once(small, "Is it a dog?", (33, 97), 1)
    reference = reference_of(model, ivtp.PruneConfig.of(keep=5, llm_layers=6, stages="llm", guide="visual"), grid)
    reference.run(prompt)
    with torch.no_grad(), ivtp.attach(model, None, method="topk", keep=5) as pruner:
        model(**inputs_of(small, ("Is it a dog?", [(33, 97)])))
    (stage,) = pruner.trace.stages
    scores = torch.zeros(len(reference.last_row)).scatter(0, stage.candidates[0], stage.scores[0])
    torch.testing.assert_close(scores.double(), reference.last_row, atol=1e-6, rtol=1e-4)
    assert stage.kept[0].tolist() == select(reference.last_row, 5)


def test_a_picture_that_is_no_square_is_drawn_whole(small: tuple[Any, Any]) -> None:
    """Its left half is white: so is that of the drawing."""
    model, processor = small
    picture = Image.new("RGB", (300, 100))
    picture.paste((255, 255, 255), (0, 0, 150, 100))
    answer = ivtp.ask(model, processor, picture, "Is it a dog?", method="random", keep="100%", max_new_tokens=1)
    panel = draw_patches(picture, answer.trace)
    assert panel.width > 2 * panel.height
    light = np.asarray(panel.convert("L")).mean(axis=0) > 128
    assert light[: panel.width * 2 // 5].all()
    assert not light[panel.width * 3 // 5 :].any()
