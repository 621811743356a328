"""Every registered method, found by enumerating the folder."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from tiny import NUM_PATCHES, Tiny, samples

import ivtp
from ivtp.config import PruneConfig
from ivtp.errors import ConfigError
from ivtp.hosts.llava import HOST
from ivtp.methods.base import MethodInfo
from ivtp.registry import list_methods, method_class
from ivtp.trace import StageTrace

METHODS = list_methods()
PATCHES = NUM_PATCHES
INSIDE = [1, 4, 9, 35, 36]


def prompt(tiny: Tiny, seed: int = 0) -> dict[str, torch.Tensor]:
    return tiny.inputs(tiny.sample(seed=seed))


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> torch.nn.Module:
    return tiny.model()


@pytest.mark.parametrize("method", METHODS)
def test_info_is_complete(method: str) -> None:
    info = method_class(method).info
    assert isinstance(info, MethodInfo)
    assert info.title
    assert info.paper
    assert method_class(method).__doc__


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_trained_says_so(tiny: Tiny, model: torch.nn.Module, method: str) -> None:
    """In the method, its line, its cost and the record of what it did."""
    kind = method_class(method)
    with tiny.attach(model, method=method) as pruner, torch.no_grad():
        model(**prompt(tiny))
    cost = ivtp.flops(model.config, method=method, keep=8, **({"llm_layers": 6} if method.startswith("ivtp") else {}))
    assert pruner.method.notes == pruner.trace.notes == cost.notes
    assert any("untrained" in note for note in pruner.method.notes) == kind.info.trainable
    assert ("untrained" in kind.info.note) == kind.info.trainable


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keep", INSIDE)
def test_the_plan_and_the_tensors_agree(tiny: Tiny, model: torch.nn.Module, method: str, keep: int) -> None:
    inputs = prompt(tiny)
    with tiny.attach(model, method=method, keep=keep, logits="kept") as pruner, torch.no_grad():
        output = model(**inputs)
    trace = pruner.trace
    assert trace is not None
    assert trace.tokens_per_layer is not None
    final = trace.tokens_per_layer.final
    assert trace.kept().shape == (1, final)
    assert output.logits.shape[1] == inputs["input_ids"].shape[1] - PATCHES + final
    assert abs(final - keep) <= (2 if method == "spatial" else 0)
    assert all(0 <= p < PATCHES for p in trace.kept().flatten().tolist())
    assert len(set(trace.kept().flatten().tolist())) == final


@pytest.mark.parametrize("method", [m for m in METHODS if method_class(m).info.merges])
@pytest.mark.parametrize("keep", INSIDE)
def test_sources_say_which_token_stands_for_every_patch(
    tiny: Tiny, model: torch.nn.Module, method: str, keep: int
) -> None:
    with tiny.attach(model, method=method, keep=keep) as pruner, torch.no_grad():
        model(**tiny.inputs(*samples(tiny, "mixed")))
    for stage in pruner.trace.stages:
        assert stage.sources is not None
        for row, kept in enumerate(stage.kept.tolist()):
            kept = [patch for patch in kept if patch >= 0]
            sources = stage.sources[row].tolist()
            assert set(sources) <= {*kept, -1}
            assert all(sources[patch] == patch for patch in kept)


def stand_ins(stage: StageTrace) -> list[list[int]]:
    """The kept patches of every row that are marked."""
    if stage.stand_ins is None:
        return [[] for _ in stage.kept]
    rows = zip(stage.kept.tolist(), stage.stand_ins.tolist(), strict=True)
    return [[patch for patch, marked in zip(*row, strict=True) if marked] for row in rows]


@pytest.mark.parametrize("method", METHODS)
def test_tokens_that_are_no_patches_are_marked_one_an_image(tiny: Tiny, model: torch.nn.Module, method: str) -> None:
    """Where keep = N is not the stock model because of them, and nowhere else."""
    with tiny.attach(model, method=method, keep=9) as pruner, torch.no_grad():
        model(**tiny.inputs(*samples(tiny, "mixed")))
    expected = 0 if method_class(method).keeps_all else 1
    for stage in pruner.trace.stages:
        assert (stage.stand_ins is None) == (expected == 0)
        for images, marked in zip(pruner.trace.images, stand_ins(stage), strict=True):
            assert [patch // PATCHES for patch in marked] == list(range(images)) * expected


@pytest.mark.parametrize("second", [m for m in METHODS if method_class(m).info.stage == "llm"])
def test_marks_follow_their_tokens_through_the_decoder(tiny: Tiny, model: torch.nn.Module, second: str) -> None:
    with tiny.attach(model, method=f"visionzip+{second}", keep="9+9") as pruner, torch.no_grad():
        model(**tiny.inputs(*samples(tiny, "mixed")))
    first, *later = [stand_ins(stage) for stage in pruner.trace.stages]
    assert all(marked == first for marked in later)
    with tiny.attach(model, method=f"visionzip+{second}", keep="20+3") as pruner, torch.no_grad():
        model(**tiny.inputs(*samples(tiny, "mixed")))
    before, *later = pruner.trace.stages
    for stage in later:
        expected = [sorted(set(a) & set(b)) for a, b in zip(stand_ins(before), stage.kept.tolist(), strict=True)]
        assert stand_ins(stage) == expected


@pytest.mark.parametrize("method", METHODS)
def test_the_same_call_gives_the_same_result(tiny: Tiny, model: torch.nn.Module, method: str) -> None:
    with torch.no_grad(), tiny.attach(model, method=method, keep=9) as pruner:
        first = model(**prompt(tiny)).logits, pruner.trace.kept()
        again = model(**prompt(tiny)).logits, pruner.trace.kept()
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


@pytest.mark.parametrize("method", METHODS)
def test_the_counted_cost_is_that_of_the_plan(tiny: Tiny, model: torch.nn.Module, method: str) -> None:
    """The trace's FLOPs are between those of the pruned model and those of the full one plus a little."""
    inputs = prompt(tiny)
    with tiny.attach(model, method=method, keep=4) as pruner, torch.no_grad():
        model(**inputs)
    text = inputs["input_ids"].shape[1] - PATCHES + 1
    full = ivtp.flops(model, method="none", text_tokens=text).total
    least = ivtp.flops(model, method="random", keep=4, text_tokens=text, where="layers").llm
    assert least < pruner.trace.flops < 1.6 * full
    before, after = pruner.trace.tokens_per_layer.equivalent
    assert 4 <= after <= before <= PATCHES


BOTH_STAGES = [f"topk+{m}" for m in METHODS if method_class(m).info.stage == "llm"]
IN_DECODER = [m for m in METHODS if method_class(m).info.stage != "vision"] + BOTH_STAGES


def kept_of_each_image(pruner: ivtp.Pruner) -> list[list[int]]:
    """How many patches of every image of every row stay."""
    rows = zip(pruner.trace.images, pruner.trace.kept().tolist(), strict=True)
    return [[sum(m * PATCHES <= p < (m + 1) * PATCHES for p in kept) for m in range(count)] for count, kept in rows]


@pytest.mark.parametrize("method", [*METHODS, *BOTH_STAGES])
@pytest.mark.parametrize("keep", [1, 5, 16, 35])
def test_every_image_keeps_its_own_budget(tiny: Tiny, model: torch.nn.Module, method: str, keep: int) -> None:
    """Rows of no, one, two and three images."""
    batch = [*samples(tiny, "mixed"), tiny.sample(images=3, seed=70)]
    with tiny.attach(model, method=method, keep=keep) as pruner, torch.no_grad():
        model(**tiny.inputs(*batch))
    left = pruner.trace.tokens_per_layer.final
    assert abs(left - keep) <= (2 if method == "spatial" else 0)
    assert kept_of_each_image(pruner) == [[left] * len(sample.images) for sample in batch]


@pytest.mark.parametrize("method", IN_DECODER)
@pytest.mark.parametrize("keep", [1, 5, 16, 35])
def test_images_of_a_prompt_may_share_their_budgets(tiny: Tiny, model: torch.nn.Module, method: str, keep: int) -> None:
    batch = [*samples(tiny, "mixed"), tiny.sample(images=3, seed=70)]
    with tiny.attach(model, method=method, keep=keep, budget="prompt") as pruner, torch.no_grad():
        model(**tiny.inputs(*batch))
    found = kept_of_each_image(pruner)
    assert [sum(row) for row in found] == [keep * len(sample.images) for sample in batch]
    if keep == 5:
        assert any(len(set(row)) > 1 for row in found), "one image never got more than another"


@pytest.mark.parametrize("method", IN_DECODER)
def test_one_image_has_the_same_budget_either_way(tiny: Tiny, model: torch.nn.Module, method: str) -> None:
    inputs, kept = tiny.inputs(*samples(tiny, "batch")), []
    for budget in ("image", "prompt"):
        with tiny.attach(model, method=method, keep=5, budget=budget) as pruner, torch.no_grad():
            model(**inputs)
        kept.append(pruner.trace.kept())
    assert torch.equal(*kept)


def test_methods_of_the_decoder_read_the_budget() -> None:
    reading = [m for m in METHODS if "budget" in method_class(m).reads]
    assert reading == [m for m in METHODS if method_class(m).info.stage != "vision"]


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_the_weights(tiny: Tiny, method: str) -> None:
    model, inputs = tiny.model(), prompt(tiny)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == tiny.processor.image_token_id, -100)
    with tiny.attach(model, method=method, keep=9):
        model(**inputs, labels=labels).loss.backward()
    for part in (model.model.multi_modal_projector, model.model.vision_tower, model.lm_head):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in part.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_an_unknown_option_is_named(method: str) -> None:
    config = PruneConfig(method=method, keep=4, options={"no_such_option": 1})
    with pytest.raises(ConfigError, match="no_such_option"):
        method_class(method)(config, HOST.geometry(HOST.tiny()[0].config))


OTHER_VALUES = {"schedule": (20, 14, 8), "budget": "prompt"}
FOR_ALL = {"method", "keep", "positions", "cache", "logits", "repruning", "seed", "options"}


def test_every_common_option_is_for_all_or_for_those_that_read_it() -> None:
    assert {f.name for f in dataclasses.fields(PruneConfig)} == set(OTHER_VALUES) | FOR_ALL
    assert all(method_class(m).reads <= {*OTHER_VALUES, "seed"} for m in METHODS)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("group_layers", 0, "use a whole number from 1 up"),
        ("llm_layers", 2.0, "use a whole number from 1 up"),
        ("llm_layers", True, "use a whole number from 1 up"),
        ("threshold", 2, "use a number from -1 to 1"),
        ("threshold", float("nan"), "use a number from -1 to 1"),
        ("threshold", "high", "use a number from -1 to 1"),
        ("aggregation", "sum", "use one of residual, mean"),
        ("guide", "image", "use one of instruction, text"),
        ("stages", "none", "use one of both, vision"),
    ],
)
def test_bad_values_of_ivtp_say_what_would_do(field: str, value: object, says: str) -> None:
    """Before there is a model, as the command line needs it."""
    with pytest.raises(ConfigError, match=says) as caught:
        method_class("ivtp").options_of(PruneConfig.of(**{field: value}))
    assert f"{field}={value!r}" in str(caught.value)
    assert "\n" not in str(caught.value)


IVTPS_OWN = ("aggregation", "stages")
GROUP_WISE = ("group_layers", "llm_layers", "threshold", "guide")


@pytest.mark.parametrize(
    ("method", "field"),
    [(m, f) for m in METHODS if m != "ivtp" for f in (*IVTPS_OWN, *(() if m == "ivtp+" else GROUP_WISE))],
)
def test_options_of_ivtp_are_no_other_methods(method: str, field: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{method!r} has no option {field!r}")):
        method_class(method).options_of(PruneConfig.of(method=method, **{field: 1}))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("field", OTHER_VALUES)
def test_an_option_that_a_method_does_not_read_is_refused(method: str, field: str) -> None:
    options = {"method": method, "keep": 4, field: OTHER_VALUES[field]}
    if method.startswith("ivtp"):
        options["schedule"] = None if field != "schedule" else (20, 8)
    config = PruneConfig.of(**options)
    size = dataclasses.replace(HOST.geometry(HOST.tiny()[0].config), text_layers=32)
    if field in method_class(method).reads:
        assert method_class(method)(config, size).plan.cuts
        return
    with pytest.raises(ConfigError, match=re.escape(f"{method!r} does not read {field}=")) as caught:
        method_class(method)(config, size)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", METHODS)
def test_options_for_all_are_accepted_by_all(method: str) -> None:
    config = PruneConfig(method=method, keep=4, positions="compact", cache="layered", seed=3)
    size = dataclasses.replace(HOST.geometry(HOST.tiny()[0].config), text_layers=32)
    assert method_class(method)(config, size).plan.cuts


def test_a_schedule_takes_the_place_of_keep() -> None:
    size = HOST.geometry(HOST.tiny()[0].config)
    method = method_class("ivtp")(PruneConfig.of(schedule=(20, 8), llm_layers=6), size)
    assert method.keep == method.plan.cuts[-1].keep == 8


@pytest.mark.parametrize("method", METHODS)
def test_options_of_a_method_have_defaults(method: str) -> None:
    options = method_class(method).Options
    assert all(f.default is not dataclasses.MISSING for f in dataclasses.fields(options))


@pytest.mark.parametrize(("method", "options"), [("topk", {"where": "layers"}), ("random", {"where": "layers"})])
def test_cutting_in_every_layer(tiny: Tiny, model: torch.nn.Module, method: str, options: dict[str, str]) -> None:
    with torch.no_grad(), ivtp.attach(model, None, method=method, keep=6, **options) as pruner:
        model(**prompt(tiny))
    assert [len(stage.kept[0]) for stage in pruner.trace.stages] == [31, 26, 21, 16, 11, 6]


def test_random_depends_on_its_seed_alone(tiny: Tiny, model: torch.nn.Module) -> None:
    kept = []
    for seed, question in ((0, 0), (0, 1), (1, 0)):
        with torch.no_grad(), ivtp.attach(model, None, method="random", keep=9, seed=seed) as pruner:
            model(**prompt(tiny, question))
        kept.append(pruner.trace.kept().tolist())
    assert kept[0] == kept[1] != kept[2]


def test_topk_by_cosine_ranks_by_similarity_with_cls(tiny: Tiny, model: torch.nn.Module) -> None:
    inputs = prompt(tiny)
    with torch.no_grad(), ivtp.attach(model, None, method="topk", keep=5, score="cosine") as pruner:
        model(**inputs)
        hidden = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
    similar = torch.cosine_similarity(hidden[:, 1:], hidden[:, :1], dim=-1)
    assert pruner.trace.kept().tolist() == similar.topk(5).indices.sort().values.tolist()


@pytest.mark.parametrize(("method", "option"), [("topk", "score"), ("topk", "where"), ("random", "where")])
def test_bad_option_values_are_refused(model: torch.nn.Module, method: str, option: str) -> None:
    with pytest.raises(ConfigError, match=option):
        ivtp.attach(model, None, method=method, keep=4, **{option: "sideways"})


@pytest.mark.parametrize(
    ("method", "option", "value"),
    [
        ("tops", "diversity", -1),
        ("tops", "coverage", float("nan")),
        ("mmtok", "alpha", -0.5),
        ("mmtok", "text_temperature", 0),
        ("mmtok", "vision_temperature", -0.2),
        ("fsr", "rho", 1.5),
        ("fsr", "beta", -1),
        ("fsr", "kappa", float("nan")),
        ("holov", "crops", 0),
        ("holov", "crops", 2.0),
        ("holov", "tau", -1),
    ],
)
def test_option_values_out_of_range_are_refused(method: str, option: str, value: float) -> None:
    """Before there is a model."""
    with pytest.raises(ConfigError, match=rf"{option}=.*use a") as caught:
        method_class(method).options_of(PruneConfig.of(method=method, **{option: value}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [7, 20])
def test_spatial_can_drop_what_is_like_its_neighbours(tiny: Tiny, model: torch.nn.Module, keep: int) -> None:
    with torch.no_grad(), tiny.attach(model, method="spatial", keep=keep, how="drop") as pruner:
        model(**prompt(tiny))
    scores = pruner.trace.stages[0].scores[0]
    assert pruner.trace.kept()[0].tolist() == sorted(scores.argsort(descending=True)[:keep].tolist())
