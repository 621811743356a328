"""Random weights of given sizes, slices of them, and prompts of a wanted length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import NUM_PATCHES, Tiny

from ivtp.benchmark.asked import Point
from ivtp.benchmark.models import Subject, load_subject, scale_layers, slice_layers
from ivtp.benchmark.prompts import make_prompt
from ivtp.benchmark.runs import config_for
from ivtp.cost.sizes import model_config, sizes
from ivtp.errors import ConfigError, LoadError
from ivtp.hosts.llava import HOST
from ivtp.plug import find_host


def test_a_geometry_becomes_a_stock_model_with_seeded_weights(ask: Any) -> None:
    one, same, other = (load_subject(ask(seed=seed)) for seed in (1, 1, 2))
    assert type(one.model).__name__ == "LlavaForConditionalGeneration"
    assert not one.model.training
    assert one.processor is None
    assert "guide=text" in one.notes[0]
    weights = [dict(subject.model.named_parameters()) for subject in (one, same, other)]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    assert not torch.equal(weights[0]["lm_head.weight"], weights[2]["lm_head.weight"])
    assert {weight.device.type for weight in weights[0].values()} == {"cpu"}
    norm = weights[0]["model.language_model.norm.weight"]
    assert torch.equal(norm, torch.ones_like(norm))
    stock = HOST.tiny()[0]
    for name, buffer in one.model.named_buffers():
        assert torch.equal(buffer, stock.get_buffer(name)), name


def test_weights_come_in_the_wanted_dtype_and_rotary_frequencies_stay_exact(ask: Any) -> None:
    model = load_subject(ask(dtype="bfloat16")).model
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_slice_of_7b_has_its_layers_and_sizes() -> None:
    whole = model_config("llava-1.5-7b")
    config = slice_layers(whole, 4, 8)
    size = sizes(config).geometry
    assert (size.vision_layers, config.vision_config.num_hidden_layers, size.text_layers) == (4, 5, 8)
    assert (size.vision_hidden, size.text_hidden, size.num_patches) == (1024, 4096, 576)
    assert config.vision_feature_layer == -2
    assert whole.text_config.num_hidden_layers == 32
    config.vision_feature_layer = 4
    assert slice_layers(config, 2, 8).vision_feature_layer == 2


@pytest.mark.parametrize("layers", [(0, 8), (24, 8), (4, 0), (4, 33)])
def test_more_layers_than_there_are_is_refused(layers: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=r"1\.\.23,1\.\.32"):
        slice_layers(model_config("llava-1.5-7b"), *layers)


def test_llm_layers_are_scaled_in_whole_groups() -> None:
    assert [scale_layers(12, text, 32) for text in (32, 24, 16, 8, 4, 2)] == [12, 9, 6, 3, 3, 2]


def test_a_slice_is_pruned_with_scaled_llm_layers(ask: Any) -> None:
    asked = ask(layers=(3, 4), options={})
    subject = load_subject(asked)
    assert len(subject.host.vision.layers) == 4
    assert len(subject.host.text.layers) == 4
    config = config_for(subject, asked, "ivtp", 6)
    assert (config.options["llm_layers"], config.options["guide"], config.keep) == (3, "text", 6)


def test_unknown_sizes_name_what_there_is(ask: Any) -> None:
    with pytest.raises(LoadError, match=r"llava-1\.5-7b"):
        load_subject(ask(geometry="llava-1.5-8b"))


def test_random_prompts_have_the_asked_tokens(subject: Subject) -> None:
    point = Point(keep=6, text=14, images=2, batch=3)
    prompt = make_prompt(subject, point, seed=0)
    ids = prompt.inputs["input_ids"]
    assert ids.shape == prompt.inputs["attention_mask"].shape == (3, 12 + 2 * 36)
    assert (ids == subject.host.image_token).sum(dim=1).tolist() == [72] * 3
    assert prompt.inputs["pixel_values"].shape == (6, 3, 84, 84)
    assert (prompt.text_tokens, prompt.columns) == (14, 84)
    assert torch.equal(ids, make_prompt(subject, point, seed=0).inputs["input_ids"])
    assert not torch.equal(ids, make_prompt(subject, point, seed=1).inputs["input_ids"])
    subject.model(**prompt.inputs)


def test_worded_prompts_are_as_long_as_words_allow(tiny: Tiny) -> None:
    model = tiny.model()
    subject = Subject(model, find_host(model), tiny.processor)
    lengths = [make_prompt(subject, Point(8, text, 1, 2), seed=0) for text in (60, 61, 90)]
    assert all(text - 3 <= p.text_tokens <= text for text, p in zip((60, 61, 90), lengths, strict=True))
    assert lengths[0].columns == lengths[0].text_tokens + NUM_PATCHES - 1
    assert lengths[0].inputs["attention_mask"].all()
    with pytest.raises(ConfigError, match="shorter than the chat template"):
        make_prompt(subject, Point(8, 5, 1, 1), seed=0)
