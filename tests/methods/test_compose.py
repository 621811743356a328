"""A vision-stage and an LLM-stage method on one model."""

from __future__ import annotations

import pytest
import torch
from tiny import NUM_PATCHES, Tiny, samples

import ivtp
from ivtp.config import PruneConfig
from ivtp.errors import ConfigError
from ivtp.registry import list_methods, method_class

VISION = [m for m in list_methods() if method_class(m).info.stage == "vision"]
LLM = [m for m in list_methods() if method_class(m).info.stage == "llm"]


@pytest.mark.parametrize("second", LLM)
@pytest.mark.parametrize("first", VISION)
def test_every_pair_keeps_its_two_budgets(tiny: Tiny, first: str, second: str) -> None:
    model = tiny.model()
    with torch.no_grad(), tiny.attach(model, method=f"{first}+{second}", keep="16+5") as pruner:
        model(**tiny.inputs(*samples(tiny, "mixed")))
    images = torch.tensor(pruner.trace.images)
    assert ((pruner.trace.kept("vision") >= 0).sum(1) == 16 * images).all()
    assert ((pruner.trace.kept() >= 0).sum(1) == 5 * images).all()
    within = zip(pruner.trace.kept().tolist(), pruner.trace.kept("vision").tolist(), strict=True)
    assert all(set(row) - {-1} <= set(before) for row, before in within)


@pytest.mark.parametrize("second", LLM)
@pytest.mark.parametrize(("between", "final"), [(7, 6), (13, 6), (11, 9)])
def test_the_decoder_is_told_what_pooling_leaves(tiny: Tiny, second: str, between: int, final: int) -> None:
    model = tiny.model()  # 6 x 6 patches: 11 and 13 are no grid, 12 is the nearest
    with torch.no_grad(), tiny.attach(model, method=f"spatial+{second}", keep=f"{between}+{final}") as pruner:
        model(**tiny.inputs(*samples(tiny, "one")))
    assert pruner.trace.kept().shape == (1, final)
    assert pruner.trace.tokens_per_layer.llm_attention[0] == pruner.trace.kept("vision").shape[1]


def test_pooling_to_fewer_than_the_decoder_is_to_keep_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match="less than the decoder"):
        tiny.attach(tiny.model(), method="spatial+fastv", keep="7+7")


@pytest.mark.parametrize("method", ["topk+fastv", "evit+sparsevlm", "divprune+pyramiddrop"])
def test_keeping_all_is_the_stock_model(tiny: Tiny, method: str) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "one"))
    with torch.no_grad():
        stock = model(**inputs).logits
        with tiny.attach(model, method=method, keep=NUM_PATCHES):
            torch.testing.assert_close(model(**inputs).logits, stock, atol=1e-4, rtol=0)


def test_one_budget_is_the_final_one(tiny: Tiny) -> None:
    model = tiny.model()
    with torch.no_grad(), tiny.attach(model, method="visionzip+fastv", keep=4) as pruner:
        model(**tiny.inputs(*samples(tiny, "one")))
    assert pruner.trace.tokens_per_layer.llm_attention[0] == 12  # the geometric mean of 36 and 4
    assert pruner.trace.kept().shape == (1, 4)


def test_merged_tokens_are_followed_through_both_stages(tiny: Tiny) -> None:
    model = tiny.model()
    with torch.no_grad(), tiny.attach(model, method="tome+sparsevlm", keep="20+6") as pruner:
        model(**tiny.inputs(*samples(tiny, "mixed")))
    last = pruner.trace.stages[-1]
    for sources, kept in zip(last.sources.tolist(), last.kept.tolist(), strict=True):
        assert set(sources) - {-1} <= set(kept)
        assert all(sources[patch] == patch for patch in kept if patch >= 0)


def test_options_go_to_the_part_that_has_them(tiny: Tiny) -> None:
    model = tiny.model()
    with tiny.attach(model, method="vispruner+fastv", important=0.75, layer=3) as pruner:
        vision, llm = pruner.method.options
    assert (vision.important, llm.layer) == (0.75, 3)


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("fastv+visionzip", {}, "can be joined"),
        ("ivtp+fastv", {}, "can be joined"),
        ("topk+visionzip", {}, "can be joined"),
        ("topk+fastv", {"keep": "4+8"}, "encoder less than the decoder"),
        ("topk+fastv", {"keep": "99+8"}, "exceeds the 36"),
        ("topk+fastv", {"nonsense": 1}, "no part has an option 'nonsense'"),
        ("hiprune+fastv", {"layer": 2}, "both parts have an option 'layer'"),
        ("topk", {"keep": "16+8"}, "two budgets"),
        ("topk+pyramiddrop", {"schedule": (9, 8, 7)}, "does not read schedule"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(tiny: Tiny, method: str, options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        ivtp.attach(tiny.model(), tiny.processor, PruneConfig.of(**{"method": method, "keep": 8, **options}))
    assert "\n" not in str(caught.value)


def test_a_plus_in_a_name_is_no_join() -> None:
    assert method_class("prumerge+").info.title == "PruMerge+"
    assert method_class("prumerge++fastv").info.title == "PruMerge+ + FastV"
    assert method_class("prumerge+fastv").info.title == "PruMerge + FastV"


def test_the_cost_of_both_is_counted() -> None:
    both = ivtp.flops("llava-1.5-7b", method="visionzip+fastv", keep="192+64")
    first = ivtp.flops("llava-1.5-7b", method="visionzip", keep=192)
    assert both.keep == 64
    assert both.llm < first.llm
    assert both.vision == first.vision
    assert both.projector == first.projector
