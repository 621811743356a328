"""Attach, trace, detach: the model comes back exactly as it was, whatever happened in between."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fingerprint import difference, fingerprint
from tiny import (
    NUM_PATCHES,
    QUESTIONS,
    TEXT_LAYERS,
    Tiny,
    generated,
    image,
    samples,
)

import ivtp
from ivtp.core.schedule import uniform_ratio
from ivtp.errors import AttachError, ConfigError


@pytest.fixture
def model(tiny: Tiny) -> Any:
    """A model that has run once, so that lazily built attributes of the stock code exist already."""
    model = tiny.model()
    model.generate(**tiny.inputs(*samples(tiny, "one")), max_new_tokens=2)
    return model


def test_hooks_of_others_survive(tiny: Tiny, model: Any) -> None:
    """In their order, still called, and an instance attribute of the user's stays."""
    calls: list[str] = []
    layer = model.model.language_model.layers[2]
    layer.register_forward_hook(lambda *_: calls.append("first"))
    layer.note = "mine"
    pruner = tiny.attach(model)
    late = layer.register_forward_hook(lambda *_: calls.append("second"))
    model(**tiny.inputs(*samples(tiny, "one")))
    assert calls == ["first", "second"]
    pruner.detach()
    calls.clear()
    model(**tiny.inputs(*samples(tiny, "one")))
    assert calls == ["first", "second"]
    late.remove()
    assert layer.note == "mine"


def test_attach_twice(tiny: Tiny, model: Any) -> None:
    with tiny.attach(model) as pruner:
        with pytest.raises(AttachError, match="detach"):
            tiny.attach(model, method="topk")
        model(**tiny.inputs(*samples(tiny, "one")))
        assert pruner.trace.stages
    before = fingerprint(model)
    tiny.attach(model, method="topk").detach()
    assert difference(before, fingerprint(model)) == []


def test_detach_twice(tiny: Tiny, model: Any) -> None:
    """The second time is no error and touches nothing, not even a later pruner."""
    before = fingerprint(model)
    first = tiny.attach(model)
    first.detach()
    first.detach()
    assert difference(before, fingerprint(model)) == []
    with tiny.attach(model) as second:
        first.detach()
        model(**tiny.inputs(*samples(tiny, "one")))
        assert second.trace.kept().shape == (1, 8)
    assert difference(before, fingerprint(model)) == []


def test_two_models_at_once(tiny: Tiny) -> None:
    """One pruner each, independent of one another."""
    one, two, inputs = tiny.model(), tiny.model(), tiny.inputs(*samples(tiny, "one"))
    with torch.no_grad(), tiny.attach(one, keep=4) as a, tiny.attach(two, keep=12) as b:
        one(**inputs)
        two(**inputs)
        one(**inputs)
        assert (a.trace.kept().shape, b.trace.kept().shape) == ((1, 4), (1, 12))


def test_exception_inside_the_context(tiny: Tiny, model: Any) -> None:
    before = fingerprint(model)

    def fail() -> None:
        with tiny.attach(model):
            model(**tiny.inputs(*samples(tiny, "one")))
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        fail()
    assert difference(before, fingerprint(model)) == []


@pytest.mark.parametrize("stages", ["both", "vision", "llm"])
def test_trace_tokens_per_layer(tiny: Tiny, stages: str) -> None:
    """Every layer's attention sees what entered it; the MLP of a cut layer sees what the cut left."""
    groups = {"both": (2, 2), "vision": (2, 0), "llm": (0, 2)}[stages]
    counts = [NUM_PATCHES, *uniform_ratio(NUM_PATCHES, 8, sum(groups))]
    vision = [x for k in counts[: groups[0]] for x in [k] * 3] or [NUM_PATCHES] * 6
    entering = counts[groups[0] :]
    llm = [x for k in entering[: groups[1]] for x in [k] * 3]
    llm += [counts[-1]] * (TEXT_LAYERS - len(llm))
    with torch.no_grad(), tiny.attach(model := tiny.model(), stages=stages) as pruner:
        model(**tiny.inputs(*samples(tiny, "one")))
    tokens = pruner.trace.tokens_per_layer
    assert tokens is not None
    assert tokens.vision_attention == tuple(vision)
    assert tokens.llm_attention == tuple(llm)
    assert tokens.vision_mlp == (*vision[1:], entering[0])
    assert tokens.llm_mlp == (*llm[1:], 8)
    assert tokens.final == 8


def test_trace_of_an_image_free_prompt(tiny: Tiny) -> None:
    with torch.no_grad(), tiny.attach(model := tiny.model()) as pruner:
        model(**tiny.inputs(*samples(tiny, "one")))
        model(**tiny.inputs(*samples(tiny, "no image")))
        assert pruner.trace is None or (pruner.trace.stages == [] and list(pruner.trace.images) == [0])


def test_the_trace_costs_less_with_fewer_tokens(tiny: Tiny) -> None:
    flops = []
    for keep in (4, 12, NUM_PATCHES):
        with torch.no_grad(), tiny.attach(model := tiny.model(), method="topk", keep=keep) as pruner:
            model(**tiny.inputs(*samples(tiny, "one")))
        flops.append(pruner.trace.flops)
    assert flops[0] < flops[1] < flops[2]


def test_options_as_keywords_or_as_a_config(tiny: Tiny) -> None:
    """`attach(model, processor, method=..., keep=...)` is short for a `PruneConfig`."""
    model = tiny.model()
    with ivtp.attach(model, tiny.processor, clip=tiny.clip, method="ivtp", keep=8, llm_layers=6) as pruner:
        by_keyword = pruner.config
    for config in (ivtp.PruneConfig.of(keep=8, llm_layers=6), ivtp.PruneConfig(keep=8, options={"llm_layers": 6})):
        with ivtp.attach(model, tiny.processor, config, clip=tiny.clip) as pruner:
            assert pruner.config == by_keyword == config
    with pytest.raises(ConfigError):
        ivtp.attach(model, tiny.processor, ivtp.PruneConfig(keep=8), clip=tiny.clip, keep=9)


def test_random_is_seeded(tiny: Tiny) -> None:
    def kept(seed: int) -> list[list[int]]:
        with torch.no_grad(), tiny.attach(model := tiny.model(), method="random", seed=seed) as pruner:
            model(**tiny.inputs(*samples(tiny, "mixed")))
            return list(pruner.trace.kept().tolist())

    assert kept(0) == kept(0)
    assert kept(0) != kept(1)


@pytest.mark.parametrize("keep", [8, NUM_PATCHES])
def test_ask(tiny: Tiny, model: Any, keep: int) -> None:
    """Image and question in, answer out; the model is stock again afterwards."""
    before = fingerprint(model)
    options: dict[str, Any] = {"guide": "visual", "llm_layers": 6, "keep": keep}
    answer = ivtp.ask(model, tiny.processor, image(3), QUESTIONS[0], max_new_tokens=5, **options)
    assert difference(before, fingerprint(model)) == []
    sample = tiny.sample(QUESTIONS[0], seed=3)
    inputs = tiny.inputs(sample)
    with ivtp.attach(model, tiny.processor, **options) as pruner:
        tokens = generated(model.generate(**inputs, max_new_tokens=5, do_sample=False), inputs)
    assert answer.text == tiny.processor.batch_decode(tokens, skip_special_tokens=True)[0].strip()
    assert answer.trace.kept().tolist() == pruner.trace.kept().tolist()
    assert answer.seconds > 0


def test_scenarios_leave_the_configuration_alone(tiny: Tiny, model: Any) -> None:
    """Inside the context too: attention kernels and configs are the user's."""
    config = copy.deepcopy(model.config.to_dict())
    check: Callable[[], bool] = lambda: model.config.to_dict() == config  # noqa: E731
    with tiny.attach(model):
        assert check()
        model.generate(**tiny.inputs(*samples(tiny, "one")), max_new_tokens=2)
        assert check()
        assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert check()
