"""Every registered method, found by enumerating the folder."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import ivtp
from ivtp.config import PruneConfig
from ivtp.errors import ConfigError
from ivtp.hosts.llava import HOST
from ivtp.methods.base import MethodInfo
from ivtp.registry import list_methods, method_class

METHODS = list_methods()
PATCHES = 36


def attach(model: torch.nn.Module, method: str, keep: int) -> ivtp.Pruner:
    extra = {"guide": "text"} if method_class(method).info.guided else {}
    return ivtp.attach(model, None, method=method, keep=keep, **extra)


def prompt(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 100, (1, 50), generator=generator)
    ids[:, 4 : 4 + PATCHES] = 127
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 84, 84, generator=generator)}


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return HOST.tiny()[0]


@pytest.mark.parametrize("method", METHODS)
def test_info_is_complete(method: str) -> None:
    info = method_class(method).info
    assert isinstance(info, MethodInfo)
    assert info.title
    assert info.paper
    assert method_class(method).__doc__


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keep", [1, 4, 9, 35, 36])
def test_the_plan_and_the_tensors_agree(model: torch.nn.Module, method: str, keep: int) -> None:
    with attach(model, method, keep) as pruner, torch.no_grad():
        output = model(**prompt())
    trace = pruner.trace
    assert trace is not None
    assert trace.tokens_per_layer is not None
    final = trace.tokens_per_layer.final
    assert trace.kept().shape == (1, final)
    assert output.logits.shape[1] == 50 - PATCHES + final
    assert abs(final - keep) <= (0 if not method_class(method).info.merges else 2)
    assert all(0 <= p < PATCHES for p in trace.kept().flatten().tolist())
    assert len(set(trace.kept().flatten().tolist())) == final


@pytest.mark.parametrize("method", METHODS)
def test_keeping_all_is_the_stock_model(model: torch.nn.Module, method: str) -> None:
    with torch.no_grad():
        stock = model(**prompt()).logits
        with attach(model, method, PATCHES):
            torch.testing.assert_close(model(**prompt()).logits, stock, atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_call_gives_the_same_result(model: torch.nn.Module, method: str) -> None:
    with torch.no_grad(), attach(model, method, 9) as pruner:
        first = model(**prompt()).logits, pruner.trace.kept()
        again = model(**prompt()).logits, pruner.trace.kept()
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


@pytest.mark.parametrize("method", METHODS)
def test_an_unknown_option_is_named(method: str) -> None:
    config = PruneConfig(method=method, keep=4, options={"no_such_option": 1})
    with pytest.raises(ConfigError, match="no_such_option"):
        method_class(method)(config, HOST.geometry(HOST.tiny()[0].config))


OTHER_VALUES = {
    "group_layers": 2,
    "llm_layers": 6,
    "threshold": 0.3,
    "aggregation": "mean",
    "guide": "text",
    "stages": "vision",
    "schedule": (20, 8),
}
FOR_ALL = {"method", "keep", "positions", "cache", "seed", "options"}


def test_every_common_option_is_for_all_or_for_those_that_read_it() -> None:
    assert {f.name for f in dataclasses.fields(PruneConfig)} == set(OTHER_VALUES) | FOR_ALL
    assert all(method_class(m).reads <= {*OTHER_VALUES, "seed"} for m in METHODS)
    assert method_class("ivtp").reads == set(OTHER_VALUES)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("field", OTHER_VALUES)
def test_an_option_that_a_method_does_not_read_is_refused(method: str, field: str) -> None:
    config = PruneConfig.of(**{"method": method, "keep": 4, "llm_layers": 12, field: OTHER_VALUES[field]})
    size = dataclasses.replace(HOST.geometry(HOST.tiny()[0].config), text_layers=32)
    if field in method_class(method).reads:
        assert method_class(method)(config, size).plan.cuts
        return
    with pytest.raises(ConfigError, match=rf"{method!r} does not read {field}=") as caught:
        method_class(method)(config, size)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", METHODS)
def test_options_for_all_are_accepted_by_all(method: str) -> None:
    config = PruneConfig(method=method, keep=4, positions="compact", cache="layered", seed=3)
    size = dataclasses.replace(HOST.geometry(HOST.tiny()[0].config), text_layers=32)
    assert method_class(method)(config, size).plan.cuts


def test_a_schedule_takes_the_place_of_keep() -> None:
    size = HOST.geometry(HOST.tiny()[0].config)
    method = method_class("ivtp")(PruneConfig(schedule=(20, 8), llm_layers=6), size)
    assert method.keep == method.plan.cuts[-1].keep == 8


@pytest.mark.parametrize("method", METHODS)
def test_options_of_a_method_have_defaults(method: str) -> None:
    options = method_class(method).Options
    assert all(f.default is not dataclasses.MISSING for f in dataclasses.fields(options))


@pytest.mark.parametrize(("method", "options"), [("topk", {"where": "layers"}), ("random", {"where": "layers"})])
def test_cutting_in_every_layer(model: torch.nn.Module, method: str, options: dict[str, str]) -> None:
    with torch.no_grad(), ivtp.attach(model, None, method=method, keep=6, **options) as pruner:
        model(**prompt())
    assert [len(stage.kept[0]) for stage in pruner.trace.stages] == [31, 26, 21, 16, 11, 6]


def test_random_depends_on_its_seed_alone(model: torch.nn.Module) -> None:
    kept = []
    for seed, question in ((0, 0), (0, 1), (1, 0)):
        with torch.no_grad(), ivtp.attach(model, None, method="random", keep=9, seed=seed) as pruner:
            model(**prompt(question))
        kept.append(pruner.trace.kept().tolist())
    assert kept[0] == kept[1] != kept[2]


def test_topk_by_cosine_ranks_by_similarity_with_cls(model: torch.nn.Module) -> None:
    inputs = prompt()
    with torch.no_grad(), ivtp.attach(model, None, method="topk", keep=5, score="cosine") as pruner:
        model(**inputs)
        hidden = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
    similar = torch.cosine_similarity(hidden[:, 1:], hidden[:, :1], dim=-1)
    assert pruner.trace.kept().tolist() == similar.topk(5).indices.sort().values.tolist()


@pytest.mark.parametrize(("method", "option"), [("topk", "score"), ("topk", "where"), ("random", "where")])
def test_bad_option_values_are_refused(model: torch.nn.Module, method: str, option: str) -> None:
    with pytest.raises(ConfigError, match=option):
        ivtp.attach(model, None, method=method, keep=4, **{option: "sideways"})
