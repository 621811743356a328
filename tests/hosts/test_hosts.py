"""Every registered model family, found by enumerating the folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import ivtp
from ivtp.errors import LoadError, UnsupportedModelError
from ivtp.plan import NEEDS
from ivtp.plug import find_host
from ivtp.registry import host_class, list_hosts

HOSTS = list_hosts()


@pytest.mark.parametrize("name", HOSTS)
def test_the_parts_are_where_the_geometry_says(name: str) -> None:
    model, _ = host_class(name).tiny()
    host = find_host(model)
    assert host.name == name
    assert host.size.vision_layers <= len(host.vision.layers)
    assert host.size.text_layers == len(host.text.layers)
    assert host.geometry(model.config) == host.size
    assert [other for other in HOSTS if host_class(other).matches(model.config)] == [name]


@pytest.mark.parametrize("name", HOSTS)
def test_a_family_gives_a_cls_token_where_its_tower_has_one(name: str) -> None:
    host = host_class(name)
    assert host.gives <= set(NEEDS)
    assert ("cls" in host.gives) == (host.geometry(host.tiny()[0].config).vision_cls == 1)
    assert set(ivtp.list_methods(name)) <= set(ivtp.list_methods())


@pytest.mark.parametrize("name", HOSTS)
def test_tiny_is_the_same_every_time(name: str) -> None:
    first, second = (host_class(name).tiny()[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", HOSTS)
def test_inputs_of_a_prompt_are_the_same_alone_and_in_a_batch(name: str) -> None:
    """A row of the batch, left-padded, is the prompt by itself, and so are its pictures."""
    host = host_class(name)
    model, processor = host.tiny()
    prompts = [("How many?", [(30, 60), (84, 84)]), ("Is it a \u732b?", []), ("What is left of the dog?", [(50, 40)])]
    batch = host.tiny_inputs(model, processor, prompts)
    pixels = []
    for prompt, ids, mask in zip(prompts, batch["input_ids"], batch["attention_mask"], strict=True):
        alone = host.tiny_inputs(model, processor, [prompt])
        assert ids[mask.bool()].tolist() == alone["input_ids"][0].tolist()
        assert mask.tolist() == sorted(mask.tolist()), "padding is on the left"
        pixels += list(alone.get("pixel_values", ()))
    given = [picture for picture in batch["pixel_values"] if picture.any()]  # a prompt without any may have a row, too
    assert len(pixels) == len(given)
    for mine, theirs in zip(pixels, given, strict=True):
        assert mine.dtype == torch.float32
        own = tuple(slice(length) for length in mine.shape)
        assert torch.equal(mine, theirs[own]), "smaller pictures, and those in fewer tiles, are padded in a batch"
    assert not torch.equal(host.tiny_inputs(model, processor, prompts, seed=1)["pixel_values"], batch["pixel_values"])


@pytest.mark.parametrize("name", HOSTS)
def test_tiny_looks_at_some_patches_more_than_at_others(name: str) -> None:
    """With nearly uniform attention ties would decide what is kept, and no test of a method would show anything."""
    host = host_class(name)
    model, processor = host.tiny()
    model.set_attn_implementation("eager")
    inputs = host.tiny_inputs(model, processor)
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions
    for attention in maps:
        row = attention[0, :, -1]  # (heads, T): what the last token sees
        assert (row.std(dim=-1) > 0.5 * row.mean(dim=-1)).all()


@pytest.mark.parametrize(("host", "size"), [(name, size) for name in HOSTS for size in host_class(name).stock])
def test_a_well_known_size_has_a_cost(host: str, size: str) -> None:
    """By its name, and by the hub id of its checkpoint."""
    whole, pruned = (ivtp.flops(size, method=method, keep=32).total for method in ("none", "topk"))
    assert 0 < pruned < whole
    assert ivtp.flops(host_class(host).hub.format(size), method="none").total == whole


def test_settings_outside_the_family_are_refused() -> None:
    config = host_class("llava").tiny()[0].config
    config.vision_feature_layer = [-2, -3]
    with pytest.raises(UnsupportedModelError, match="one feature layer"):
        host_class("llava").geometry(config)


def test_a_checkpoint_recommends_its_options(tmp_path: Path) -> None:
    model, _ = host_class("llava").tiny()
    model.save_pretrained(tmp_path)
    (tmp_path / "ivtp.json").write_text(json.dumps({"llm_layers": 5, "group_layers": 2, "threshold": 0.3}))
    loaded = type(model).from_pretrained(tmp_path)
    asked = {"guide": "text", "group_layers": 1}
    with ivtp.attach(loaded, None, keep=4, **asked) as pruner:
        options = pruner.method.options
        assert (options.llm_layers, options.group_layers, options.threshold) == (5, 1, 0.3)
    with ivtp.attach(loaded, None, ivtp.PruneConfig(keep=4, options=asked)) as pruner:
        assert pruner.method.options == options


@pytest.mark.parametrize("content", ["{", "[1]", "3"])
def test_a_broken_sidecar_says_so(tmp_path: Path, content: str) -> None:
    model, _ = host_class("llava").tiny()
    model.save_pretrained(tmp_path)
    (tmp_path / "ivtp.json").write_text(content)
    loaded = type(model).from_pretrained(tmp_path)
    with pytest.raises(LoadError, match=r"ivtp.json"):
        ivtp.attach(loaded, None, keep=4, guide="text")
    with pytest.raises(LoadError, match=r"ivtp.json"):
        ivtp.flops(tmp_path, keep=4)


@pytest.mark.parametrize("name", HOSTS)
def test_cost_and_pruner_follow_the_same_recommendation(name: str, tmp_path: Path) -> None:
    model, _ = host_class(name).tiny()
    asked = {"keep": 4, "guide": "text", "stages": "both" if "inside" in host_class(name).cuts else "llm"}
    with ivtp.attach(model, None, **asked) as pruner:
        assert pruner.method.options.llm_layers == pruner.host.size.text_layers < 12  # as many as there are
    model.save_pretrained(tmp_path)
    (tmp_path / "ivtp.json").write_text(json.dumps({"llm_layers": 5, "clip": "clip", "unknown": 1}))
    loaded = type(model).from_pretrained(tmp_path)
    with torch.no_grad(), ivtp.attach(loaded, None, **asked) as pruner:
        assert pruner.method.options.llm_layers == 5
    told, five, six = (
        ivtp.flops(tmp_path, **asked, **layers).total for layers in ({}, {"llm_layers": 5}, {"llm_layers": 6})
    )
    assert told == five != six
