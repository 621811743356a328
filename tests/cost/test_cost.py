"""The analytic cost: the published figures, a counter that watches a real forward, and how cost must behave."""

from __future__ import annotations

import copy
import dataclasses
import doctest
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import QUESTIONS, Tiny
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaForConditionalGeneration, LlavaNextConfig

import ivtp
from ivtp.cost.flops import flops, prompt_tokens
from ivtp.cost.prefill import FlopsReport, count_prompt
from ivtp.cost.sizes import Relevance, sizes
from ivtp.errors import ConfigError, LoadError, UnsupportedModelError
from ivtp.methods.base import ChoiceCost, Cut, Method, MethodInfo, Plan
from ivtp.plan import Geometry

SEVEN_B = "llava-1.5-7b"
PARTS = ("vision", "projector", "llm", "head", "pruning")
TABLE = {  # the paper's table at 64 of 576 visual tokens and 512 text tokens, in TFLOPs
    "full": 15.4,
    "random": 8.0,
    "topk": 8.0,
    "spatial": 8.1,
    "ivtp": 8.2,
}


def at_7b(name: str, **config: Any) -> FlopsReport:
    """A row of the table."""
    inside = {"where": "layers"} if name in ("random", "topk") else {}
    return flops(SEVEN_B, method="none" if name == "full" else name, **inside, **config)


@pytest.fixture(scope="module")
def small() -> Geometry:
    """A geometry without any weights behind it: everything below follows from sizes."""
    return Geometry(
        name="small",
        num_patches=36,
        patch_size=14,
        vision_layers=6,
        vision_depth=7,
        vision_hidden=32,
        vision_mlp=64,
        vision_heads=2,
        vision_cls=1,
        text_layers=8,
        text_hidden=48,
        text_mlp=80,
        text_heads=4,
        text_kv_heads=2,
        text_head_dim=12,
        text_mlp_matrices=3,
        vocab_size=300,
    )


# ---- the published figures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLE)
def test_published_figure(name: str) -> None:
    assert round(at_7b(name).total / 1e12, 1) == TABLE[name]


def test_published_saving_is_of_the_printed_totals() -> None:
    full, pruned = (round(at_7b(name).total / 1e12, 1) for name in ("full", "ivtp"))
    assert round(100 * (1 - pruned / full), 1) == 46.8


def test_spatial_pooling_is_a_hair_above_the_paper_where_512_leave_the_placeholder_out() -> None:
    assert at_7b("spatial", text_tokens=513).total / 1e12 == pytest.approx(8.154, abs=5e-4)  # the paper prints 8.1


@pytest.mark.parametrize("name", TABLE)
def test_profilers_that_miss_torch_bmm_print_the_whole_table(name: str) -> None:
    """CLIP's attention once was `torch.bmm`, which such profilers do not see, the decoder's was `torch.matmul`."""
    geometry, report = sizes(SEVEN_B).geometry, at_7b(name, text_tokens=513)
    lengths = _vision_lengths(name, geometry)
    unseen = sum(4 * (n + geometry.vision_cls) ** 2 * geometry.vision_hidden for n in lengths)
    assert round((report.total - unseen) / 1e12, 1) == TABLE[name]


def _vision_lengths(name: str, geometry: Geometry) -> tuple[int, ...]:
    if name == "full":
        return (geometry.num_patches,) * geometry.vision_layers
    inside = {"where": "layers"} if name in ("random", "topk") else {}
    method = ivtp.registry.method_class(name)(ivtp.PruneConfig.of(method=name, **inside), geometry)
    counts: tuple[int, ...] = method.plan.tokens_per_layer(geometry).vision_attention
    return counts


def test_the_page_about_flops_prints_what_it_says() -> None:
    page = Path(__file__).parents[2] / "docs" / "flops.md"
    failed, tried = doctest.testfile(str(page), module_relative=False)
    assert tried
    assert not failed


# ---- a counter that watches -----------------------------------------------------------------------------------


def counted(model: LlavaForConditionalGeneration, inputs: dict[str, torch.Tensor]) -> Counter[str]:
    """Matrix-product FLOPs of one forward, by module; `""` is everything. Eager attention, so that all is seen."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    root = type(model).__name__
    found: Counter[str] = Counter({"": sum(counter.get_flop_counts()["Global"].values())})
    for module, operations in counter.get_flop_counts().items():
        if module.startswith(f"{root}."):
            found[module.removeprefix(f"{root}.")] = sum(operations.values())
    return found


def layers(found: Counter[str], prefix: str, numbers: range) -> int:
    """Attention and MLP of some layers."""
    return sum(found[f"{prefix}.layers.{i}.{half}"] for i in numbers for half in ("self_attn", "mlp"))


@pytest.mark.parametrize("images", [1, 2])
def test_full_model_costs_what_a_counter_sees(tiny: Tiny, images: int) -> None:
    model = tiny.model(attention="eager")
    inputs = tiny.inputs(tiny.sample(images=images))
    found, geometry = counted(model, inputs), sizes(model).geometry
    text = inputs["input_ids"].shape[1] - images * (geometry.num_patches - 1)
    report = flops(model, method="none", text_tokens=text, images=images)
    tower = next(n.removesuffix(".layers.0.mlp") for n in found if "vision" in n and n.endswith(".layers.0.mlp"))
    unread = range(geometry.vision_layers, model.config.vision_config.num_hidden_layers)
    patches = found[f"{tower.removesuffix('.encoder')}.embeddings"]
    used = patches + layers(found, tower, range(geometry.vision_layers))
    assert report.vision == pytest.approx(used, rel=0.01)
    assert report.projector == pytest.approx(found["model.multi_modal_projector"], rel=0.01)
    text_layers = layers(found, "model.language_model", range(geometry.text_layers))
    assert report.llm == pytest.approx(text_layers, rel=0.01)
    assert report.head == pytest.approx(found["lm_head"], rel=0.01)
    assert report.pruning == 0
    assert report.total == pytest.approx(found[""] - layers(found, tower, unread), rel=0.01)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"aggregation": "mean"},
        {"aggregation": "multiply", "group_layers": 2},
        {"guide": "weighted", "stages": "llm"},
    ],
    ids=str,
)
def test_pruned_model_costs_what_a_counter_sees(tiny: Tiny, images: int, changes: dict[str, Any]) -> None:
    model, clip_model = tiny.model(attention="eager"), copy.deepcopy(tiny.clip[0])
    clip_model.set_attn_implementation("eager")
    inputs = tiny.inputs(tiny.sample(QUESTIONS[0], images=images))
    with ivtp.attach(model, tiny.processor, tiny.config(**changes), clip=(clip_model, tiny.clip[1])) as pruner:
        found, trace = counted(model, inputs), pruner.trace
    geometry, config = sizes(model).geometry, tiny.config(**changes)
    text = inputs["input_ids"].shape[1] - images * geometry.num_patches
    method = ivtp.registry.method_class("ivtp")(config, geometry)
    clip = clip_model.config
    words = len(tiny.clip[1](QUESTIONS[0], add_special_tokens=False)["input_ids"])
    report = count_prompt(
        geometry,
        method,
        [(geometry.num_patches, (geometry.num_patches,), None)] * images,
        text_tokens=text,
        relevance=Relevance(
            text_layers=clip.text_config.num_hidden_layers,
            text_hidden=clip.text_config.hidden_size,
            text_mlp=clip.text_config.intermediate_size,
            projection=clip.projection_dim,
        ),
        instruction_tokens=words,
    )
    tower = next(n.removesuffix(".layers.0.mlp") for n in found if "vision" in n and n.endswith(".layers.0.mlp"))
    patches = found[f"{tower.removesuffix('.encoder')}.embeddings"]
    vision = patches + layers(found, tower, range(geometry.vision_layers))
    assert report.vision == pytest.approx(vision, rel=0.01)
    assert report.head == pytest.approx(found["lm_head"], rel=0.01)
    assert report.total == pytest.approx(found[""], rel=0.01)
    assert report.pruning == pytest.approx(found[""] - (report.total - report.pruning), rel=0.01)
    assert trace is not None
    assert trace.flops == pytest.approx(report.total, rel=1e-9)


@pytest.mark.parametrize("method", ivtp.list_methods())
def test_every_method_costs_what_a_counter_sees(tiny: Tiny, method: str) -> None:
    model, clip_model = tiny.model(attention="eager"), copy.deepcopy(tiny.clip[0])
    clip_model.set_attn_implementation("eager")
    geometry = sizes(model).geometry
    inputs, side = tiny.inputs(tiny.sample()), (clip_model, tiny.clip[1])
    with ivtp.attach(model, tiny.processor, tiny.config(method=method), clip=side) as pruner:
        found, trace = counted(model, inputs), pruner.trace
        reads_clip, read = (
            pruner._own.guide_maker.clip is not None,
            {tap for cut in pruner.method.plan.cuts for tap in cut.taps},
        )
    assert trace is not None
    tower = next(n.removesuffix(".layers.0.mlp") for n in found if "vision" in n and n.endswith(".layers.0.mlp"))
    unread = 0.0
    for layer in range(geometry.vision_layers, geometry.vision_depth):
        used = ("q_proj", "k_proj") if layer in read else ()
        unread += layers(found, tower, range(layer, layer + 1))
        unread -= sum(found[f"{tower}.layers.{layer}.self_attn.{name}"] for name in used)
    assert trace.flops == pytest.approx(found[""] - (0 if reads_clip else unread), rel=0.01)


class Weighed(Method):
    """Cuts behind the encoder and behind a decoder layer; what choosing costs is its own to say."""

    info = MethodInfo("Weighed", 2026, "both", paper="(test)")
    choice = ChoiceCost()

    def make_plan(self) -> Plan:
        last = self.geometry.vision_layers - 1
        return Plan((Cut("vision", last, 20, taps=(0, last), place="behind"), Cut("llm", 2, self.keep, taps=(2,))))

    def cost(self, cut: Cut, entering: int, text_tokens: int) -> ChoiceCost:
        assert (entering, text_tokens) == ({"vision": 36, "llm": 20}[cut.where], 10)
        return dataclasses.replace(self.choice, rows=self.choice.rows[: len(cut.taps)])


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (ChoiceCost(rows=("none", "none")), 0),
        (ChoiceCost(flops=7.0, rows=("none", "none")), 2 * 7 + 2 * 7),
        (ChoiceCost(), 2 * 2 * (2 * 37 * 32) + 2 * 50 * 48),
        (ChoiceCost(rows=("all", "one")), 2 * (2 * 37 * 37 * (32 + 2) + 2 * 37 * 32) + 2 * 50 * 50 * (48 + 4)),
        (ChoiceCost(rows=("text", "none")), 2 * (2 * 10 * 37 * (32 + 2)) + 2 * 10 * 50 * (48 + 4)),
    ],
)
def test_a_method_says_what_its_choice_costs(
    small: Geometry, monkeypatch: pytest.MonkeyPatch, choice: ChoiceCost, expected: int
) -> None:
    """Two images of 36 patches and CLS reach the first cut, 2 x 20 patches and 10 text tokens the second."""
    monkeypatch.setattr(Weighed, "choice", choice)
    assert flops(small, method=Weighed, keep=5, text_tokens=10 + 2, images=2).pruning == expected


# ---- how cost behaves ---------------------------------------------------------------------------------------------

keeps = st.integers(1, 36)
methods = st.sampled_from(sorted(set(ivtp.list_methods()) - {"spatial"}))  # it keeps the nearest product of two sides


@settings(max_examples=40)
@given(method=methods, low=keeps, high=keeps, text=st.integers(3, 400))
def test_cost_grows_with_keep(small: Geometry, method: str, low: int, high: int, text: int) -> None:
    low, high = sorted((low, high))
    few, many = (flops(small, method=method, keep=k, text_tokens=text) for k in (low, high))
    for part in PARTS:
        assert getattr(few, part) <= getattr(many, part)
    assert few.keep == low


@settings(max_examples=40)
@given(method=methods, keep=keeps, text=st.integers(3, 400), batch=st.integers(1, 9))
def test_batch_multiplies_every_part(small: Geometry, method: str, keep: int, text: int, batch: int) -> None:
    one, many = (flops(small, method=method, keep=keep, text_tokens=text, batch=b) for b in (1, batch))
    for part in (*PARTS, "total"):
        assert getattr(many, part) == pytest.approx(batch * getattr(one, part), rel=1e-12)


@settings(max_examples=20)
@given(method=methods, text=st.integers(3, 400), images=st.integers(1, 3))
def test_keeping_all_costs_the_full_model_and_the_choice(small: Geometry, method: str, text: int, images: int) -> None:
    full = flops(small, method="none", text_tokens=text, images=images)
    kept = flops(small, method=method, keep=36, text_tokens=text, images=images)
    assert kept.total - kept.pruning == pytest.approx(full.total, rel=1e-12)
    assert full.pruning == 0
    assert full.keep == 36


def test_images_multiply_the_encoder_but_share_the_text() -> None:
    one, three = (flops(SEVEN_B, method="none", images=m) for m in (1, 3))
    assert three.vision == 3 * one.vision
    assert three.projector == 3 * one.projector
    assert one.head < three.head < 3 * one.head


@pytest.mark.parametrize("model", [SEVEN_B, "micro"])
@pytest.mark.parametrize("keep", [16, 64, 128])
def test_ivtp_plus_costs_hardly_more_than_ivtp(model: str, keep: int) -> None:
    variant, paper = (flops(model, method=name, keep=keep) for name in ("ivtp+", "ivtp"))
    assert variant.total <= 1.05 * paper.total
    assert variant.keep == paper.keep == keep


@pytest.mark.parametrize("size", [(640, 480), (672, 672), (2000, 1000)])
@pytest.mark.parametrize("keep", [16, 64, 128])
def test_ivtp_plus_costs_hardly_more_than_ivtp_for_images_in_tiles(size: tuple[int, int], keep: int) -> None:
    """Few tokens of many patches, beside a short prompt: what leaves the encoder is most of the cost."""
    asked: dict[str, Any] = {"keep": keep, "text_tokens": 64, "image_size": size}
    variant, paper = (flops(LlavaNextConfig(), method=name, **asked) for name in ("ivtp+", "ivtp"))
    assert variant.total <= 1.05 * paper.total
    assert variant.keep == paper.keep == keep


def test_short_prompts_save_the_most() -> None:
    savings = [
        1 - flops(SEVEN_B, text_tokens=t).total / flops(SEVEN_B, method="none", text_tokens=t).total
        for t in (32, 128, 512, 2048)
    ]
    assert savings == sorted(savings, reverse=True)
    assert savings[0] > 0.65


def test_longer_instructions_cost_more_clip_windows() -> None:
    one, two, seven = (flops(SEVEN_B, instruction_tokens=n).pruning for n in (75, 76, 512))
    assert one < two < seven
    assert flops(SEVEN_B).pruning == one
    assert flops(SEVEN_B, guide="text").pruning < one  # reads no CLIP


# ---- what can be counted --------------------------------------------------------------------------------------


def test_every_form_of_a_model_gives_the_same(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny.model()
    model.config.save_pretrained(tmp_path)
    with torch.device("meta"):
        weightless = LlavaForConditionalGeneration(model.config)
    asked = {"keep": 8, "llm_layers": 6, "text_tokens": 20}
    totals = {flops(m, **asked).total for m in (model, model.config, weightless, tmp_path, str(tmp_path))}
    assert len(totals) == 1


def test_a_checkpoint_names_its_clip_and_its_layers(tiny: Tiny, tmp_path: Path) -> None:
    tiny.model().config.save_pretrained(tmp_path)
    asked = {"keep": 8, "llm_layers": 6, "text_tokens": 20}
    without = flops(tmp_path, **asked).pruning
    (tmp_path / "ivtp.json").write_text('{"clip": "side", "llm_layers": 6}')
    tiny.clip[0].config.save_pretrained(tmp_path / "side")
    assert sizes(tmp_path).clip == Relevance(text_layers=2, text_hidden=20, text_mlp=40, projection=24)
    with_clip = flops(tmp_path, **asked)
    assert with_clip.pruning > without
    assert flops(tmp_path, keep=8, text_tokens=20) == with_clip  # its recommendation is the default


def test_fewer_decoder_layers_than_the_paper_prunes_in(tiny: Tiny) -> None:
    model = tiny.model()
    depth = sizes(model).geometry.text_layers
    assert flops(model, guide="text", keep=8) == flops(model, guide="text", keep=8, llm_layers=depth)


def test_a_recommendation_reaches_only_methods_that_read_it(tiny: Tiny, tmp_path: Path) -> None:
    tiny.model().config.save_pretrained(tmp_path)
    (tmp_path / "ivtp.json").write_text('{"llm_layers": 6, "threshold": 0.3, "group_layers": 2}')
    for method in (*ivtp.list_methods(), "none"):
        assert flops(tmp_path, method=method, keep=4).total > 0
    with pytest.raises(ConfigError, match="threshold"):
        flops(tmp_path, method="topk", keep=4, threshold=0.3)


def test_a_prompt_as_its_tokenizer_counts_it(small: Geometry) -> None:
    assert prompt_tokens(20 + 36, small) == 21
    assert prompt_tokens(20 + 2 * 36, small, images=2) == 22


def test_hub_names_are_known_without_a_download() -> None:
    assert flops("llava-hf/llava-1.5-7b-hf").total == flops(SEVEN_B).total
    assert flops("llava-1.5-13b", method="none").total > 1.8 * flops(SEVEN_B, method="none").total


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"keep": 577}, "1..576"),
        ({"keep": 0}, "no visual token"),
        ({"keep": "300%"}, "300%"),
        ({"method": "ivpt"}, "did you mean ivtp"),
        ({"method": "topk", "wehre": "layers"}, "no option 'wehre'"),
        ({"text_tokens": 0}, "from 1 up"),
        ({"batch": 0}, "from 1 up"),
        ({"images": True}, "from 1 up"),
        ({"schedule": (600, 64)}, "576"),
        ({"image_size": (640,)}, "width and height"),
        ({"image_size": (640, 0)}, "width and height"),
        ({"image_size": "640x480"}, "width and height"),
    ],
)
def test_bad_values_get_one_clear_line(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        flops(SEVEN_B, **change)
    assert "\n" not in str(caught.value)


def test_unknown_models(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"did you mean llava-1.5-7b\?"):
        flops("llava-1.5-7")
    with pytest.raises(LoadError, match=r"config\.json"):
        flops(tmp_path)
    with pytest.raises(UnsupportedModelError, match="llava"):
        flops(torch.nn.Linear(1, 1))
