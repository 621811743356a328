"""Qwen3-VL's own: which tokens get deepstack features, where what was cut left, and what these cost."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from qwen_reference import Qwen3Reference
from reference import check_stages
from test_qwen import read_once
from torch import Tensor
from transformers import Qwen3VLMoeConfig

import ivtp
from ivtp.cost.layers import projector
from ivtp.errors import UnsupportedModelError
from ivtp.registry import host_class

HOST = host_class("qwen3_vl")
MIXED = (
    ("How many bananas are there?", [(30, 90), (84, 84)]),
    ("Say something.", []),
    ("Is it a cat", [(50, 40)]),
)


@pytest.fixture
def small() -> tuple[Any, Any]:
    return HOST.tiny()


@pytest.mark.parametrize("group", [1, 2])
def test_cuts_among_the_deepstack_layers_keep_what_the_reference_keeps(small: tuple[Any, Any], group: int) -> None:
    """In and between the encoder's deepstack layers, and the decoder's layers behind which features are added."""
    model, processor = small
    options = {"keep": 6, "guide": "text", "llm_layers": 4, "group_layers": group}
    prompt, grid = read_once(small, "What is left of the dog?", (50, 40), 2)
    expected = Qwen3Reference(model, ivtp.PruneConfig.of(**options), grid).run(prompt)
    assert len({cut.layer for cut in expected.cuts if cut.where == "llm"} & set(range(3))) == (3 if group == 1 else 1)
    inputs = HOST.tiny_inputs(model, processor, [("What is left of the dog?", [(50, 40)] * 2), ("How many?", [])])
    with torch.no_grad(), ivtp.attach(model, processor, **options) as pruner:
        logits = model(**inputs).logits
    trace = pruner.trace
    for stage in trace.stages:
        assert (stage.kept[1] < 0).all()
    check_stages(trace, [expected])
    torch.testing.assert_close(logits[0, -1].double(), expected.logits[-1], atol=1e-4, rtol=0)


def left_behind(stages: list[Any], patches: Tensor, row: int, layers: int) -> list[Tensor]:
    """(T,) bool for each decoder layer: the columns of a row whose token, a patch or -1, has left before it."""
    gone = torch.zeros_like(patches, dtype=torch.bool)
    hidden = []
    for layer in range(layers):
        for stage in stages:
            if (stage.where, stage.layer) == ("llm", layer - 1) or (stage.where == "vision" and layer == 0):
                gone = gone | ((patches >= 0) & ~torch.isin(patches, stage.kept[row]))
        hidden.append(gone)
    return hidden


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("divprune", {}),
        ("random", {}),
        ("fastv", {"layer": 1}),
        ("fastv", {"layer": 2}),
        ("fastv", {"layer": 3}),
        ("pyramiddrop", {}),
        ("dart", {}),
        ("divprune+fastv", {"layer": 1}),
    ],
    ids=str,
)
def test_a_token_that_left_is_one_that_the_stock_model_does_not_see(
    small: tuple[Any, Any], method: str, options: dict[str, Any]
) -> None:
    """The stock model on the whole prompt, each decoder layer with a mask that hides what has left before it."""
    model, processor = small
    inputs = HOST.tiny_inputs(model, processor, MIXED)
    with torch.no_grad(), ivtp.attach(model, processor, method=method, keep=5, **options) as pruner:
        ours = model(**inputs).logits[:, -1]
    ids, valid = inputs["input_ids"], inputs["attention_mask"].bool()
    slots = ids == model.config.image_token_id
    patches = torch.where(slots, slots.cumsum(dim=1) - 1, -1)
    layers = model.model.language_model.layers
    gone = [left_behind(pruner.trace.stages, patches[row], row, len(layers)) for row in range(len(ids))]
    assert any(part[-1].any() for part in gone)
    before = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()

    def hide(layer: int) -> Any:
        keys = valid & ~torch.stack([row[layer] for row in gone])
        seen = (before & keys[:, None]) | torch.eye(ids.shape[1], dtype=torch.bool)  # a hidden row sees itself
        return lambda module, args, kwargs: (args, {**kwargs, "attention_mask": seen[:, None]})

    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(hide(number), with_kwargs=True)
    with torch.no_grad():
        stock = model(**inputs).logits[:, -1]
    torch.testing.assert_close(ours, stock, atol=1e-4, rtol=0)


def test_a_layer_that_is_looked_at_in_advance_has_the_features_too(small: tuple[Any, Any]) -> None:
    """PyramidDrop rates by the attention of the layer behind its first cut, behind which features are added."""
    model, processor = small
    model.set_attn_implementation("eager")
    inputs = HOST.tiny_inputs(model, processor, MIXED[2:])
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions
        with ivtp.attach(model, processor, method="pyramiddrop", keep=5) as pruner:
            model(**inputs)
    first = pruner.trace.stages[0]
    assert first.layer < len(model.config.vision_config.deepstack_visual_indexes)
    slots = inputs["input_ids"][0] == model.config.image_token_id
    row = maps[first.layer + 1][0, :, -1, slots].mean(dim=0)
    assert first.kept[0].tolist() == row.topk(first.kept.shape[1]).indices.sort().values.tolist()
    torch.testing.assert_close(first.scores[0], row[first.candidates[0]], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("divprune", {}),
        ("fastv", {}),
        ("ivtp", {"guide": "text", "llm_layers": 6}),
        ("topk", {"where": "layers"}),
    ],
)
def test_deepstack_mergers_read_what_reaches_the_decoder_alone(
    small: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, method: str, options: dict[str, Any]
) -> None:
    """And that is what they are counted to cost."""
    monkeypatch.setattr(HOST, "fewest", 16)
    model, processor = small
    inputs, read = HOST.tiny_inputs(model, processor, MIXED[2:]), []
    _, rows, columns = inputs["image_grid_thw"][0].tolist()
    mergers = model.model.visual.deepstack_merger_list
    for merger in mergers:
        merger.linear_fc1.register_forward_hook(lambda module, args, output: read.append(len(args[0])))
    with torch.no_grad(), ivtp.attach(model, processor, method=method, keep=5, **options) as pruner:
        model(**inputs)
    gone_before = [stage for stage in pruner.trace.stages if stage.where == "vision"]
    entered = gone_before[-1].kept.shape[1] if gone_before else rows * columns // 4
    assert read == [entered] * len(mergers)
    plain = copy.deepcopy(model.config)
    plain.vision_config.deepstack_visual_indexes = []
    with_them, without = (
        ivtp.flops(config, method=method, keep=5, image_size=(columns * 4, rows * 4), **options)
        for config in (model.config, plain)
    )
    own = len(mergers) * entered * projector(HOST.geometry(model.config))
    assert with_them.projector - without.projector == pytest.approx(own, rel=1e-12)
    assert with_them.total - without.total == pytest.approx(own, rel=1e-9)


@pytest.mark.parametrize("method", ["divprune", "ivtp"])
def test_gradients_reach_every_deepstack_merger(small: tuple[Any, Any], method: str) -> None:
    model, processor = small
    inputs = HOST.tiny_inputs(model, processor, MIXED)
    guide = {"guide": "text"} if method == "ivtp" else {}
    with ivtp.attach(model, processor, method=method, keep=5, **guide):
        model(**inputs).logits[:, -1].sum().backward()
    for merger in model.model.visual.deepstack_merger_list:
        assert merger.linear_fc2.weight.grad.abs().sum() > 0


def test_features_that_are_added_behind_the_last_layer_are_refused() -> None:
    model, _ = HOST.tiny()
    config = copy.deepcopy(model.config)
    config.text_config.num_hidden_layers = 3
    with pytest.raises(UnsupportedModelError, match="3 deepstack layers") as caught:
        HOST.geometry(config)
    assert "\n" not in str(caught.value)


def test_a_mixture_of_experts_is_refused_in_a_line() -> None:
    """It is another stock class, whose feed-forward blocks are counted otherwise."""
    with pytest.raises(UnsupportedModelError, match="qwen3_vl_moe") as caught:
        ivtp.flops(Qwen3VLMoeConfig(), keep=64)
    assert "\n" not in str(caught.value)
