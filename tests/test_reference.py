"""Kept patches, scores, word relevances, the pseudo CLS token and the logits equal the slow reference."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from reference import Prompt, Reference, Result, check_stages, prompt_of, prompt_of_ids, select, split_words
from tiny import NUM_PATCHES, QUESTIONS, TEXT_LAYERS, Sample, Tiny, samples
from torch import Tensor, nn

import ivtp
from ivtp.core.schedule import uniform_ratio

# Every choice that the method leaves open, one at a time.
VARIANTS: list[dict[str, Any]] = [
    {},
    *[{"aggregation": a} for a in ("mean", "max", "multiply", "layer")],
    *[{"guide": g} for g in ("text", "clip", "weighted", "visual")],
    *[{"stages": s} for s in ("vision", "llm")],
    {"positions": "compact"},
    {"positions": "compact", "stages": "llm"},
    {"cache": "layered"},
    {"budget": "prompt"},
    {"budget": "prompt", "stages": "llm", "positions": "compact", "cache": "layered"},
    *[{"group_layers": g} for g in (1, 2, 4, 6)],
    *[{"llm_layers": w} for w in (3, 4, 7, TEXT_LAYERS)],
    *[{"threshold": t} for t in (-1.0, 0.2, 1.0)],
    *[{"keep": k} for k in (1, 20, NUM_PATCHES, "11%")],
    {"keep": 5, "schedule": (30, 22, 9, 5)},
    {"keep": 6, "schedule": (18, 6), "group_layers": 2},
    {"keep": 7, "stages": "vision", "schedule": (30, 7)},
    {"keep": 7, "stages": "llm", "schedule": (36, 7)},
]


def _random_variants(count: int) -> list[dict[str, Any]]:
    draw = random.Random(0)
    choices: dict[str, tuple[Any, ...]] = {
        "keep": (3, 8, 17, "40%"),
        "group_layers": (1, 2, 3, 4),
        "llm_layers": (2, 5, 6, 8),
        "threshold": (-0.1, 0.06, 0.15),
        "aggregation": ("residual", "mean", "max", "multiply", "layer"),
        "guide": ("instruction", "text", "clip", "weighted", "visual"),
        "stages": ("both", "both", "vision", "llm"),
        "positions": ("original", "compact"),
        "cache": ("evict", "layered"),
    }
    return [{name: draw.choice(values) for name, values in choices.items()} for _ in range(count)]


def _name(variant: dict[str, Any]) -> str:
    return " ".join(f"{k}={v}" for k, v in variant.items()) or "default"


def prompt(tiny: Tiny, sample: Sample) -> Prompt:
    return prompt_of(tiny.processor, sample.prompt, sample.question, sample.images, NUM_PATCHES)


def run(tiny: Tiny, batch: list[Sample], **changes: Any) -> tuple[ivtp.PruneTrace, Tensor, list[Result]]:
    """Trace and logits of the attached model on the padded batch; the reference on each sample alone."""
    model, inputs = tiny.model(), tiny.inputs(*batch)
    reference = Reference(model, tiny.clip, tiny.config(**changes))
    with torch.no_grad():
        expected = [reference.run(prompt(tiny, s)) for s in batch]
        with tiny.attach(model, **changes) as pruner:
            logits = model(**inputs).logits
    return pruner.trace, logits, expected


def check_words(trace: ivtp.PruneTrace, expected: list[Result]) -> None:
    for b, result in enumerate(expected):
        assert [w.text for w in trace.words[b]] == [text for text, _, _ in result.words]
        for word, (text, score, used) in zip(trace.words[b], result.words, strict=True):
            assert word.score == pytest.approx(score, abs=1e-5), text
            assert word.used == used, text
        assert bool(trace.fallback[b]) == result.fallback


def check_logits(logits: Tensor, batch: list[Sample], tiny: Tiny, expected: list[Result]) -> None:
    """At every token behind the last image: the rows that no cut can touch."""
    for row, sample, result in zip(logits, batch, expected, strict=True):
        ids = prompt(tiny, sample).ids
        images = (ids == tiny.processor.image_token_id).nonzero().flatten()
        tail = len(ids) - 1 - int(images[-1]) if len(images) else len(ids)
        torch.testing.assert_close(row[-tail:].double(), result.logits[-tail:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS, ids=_name)
def test_one_choice_at_a_time(tiny: Tiny, variant: dict[str, Any]) -> None:
    batch = samples(tiny, "mixed")
    trace, logits, expected = run(tiny, batch, **variant)
    check_stages(trace, expected)
    if variant.get("stages") != "vision":
        check_words(trace, expected)
    check_logits(logits, batch, tiny, expected)


@pytest.mark.parametrize("variant", _random_variants(24), ids=_name)
def test_choices_together(tiny: Tiny, variant: dict[str, Any]) -> None:
    batch = samples(tiny, "batch")
    trace, logits, expected = run(tiny, batch, **variant)
    check_stages(trace, expected)
    check_logits(logits, batch, tiny, expected)


@pytest.mark.parametrize("guide", ["instruction", "text", "clip", "weighted", "visual"])
@pytest.mark.parametrize("name", ["one", "two images"])
def test_pseudo_cls(tiny: Tiny, guide: str, name: str) -> None:
    """It enters the first decoder layer as the last token, and is gone behind layer W."""
    batch = samples(tiny, name)
    model, seen = tiny.model(), {}
    layers = model.model.language_model.layers
    for index in (0, 5, 6):
        norm = layers[index].input_layernorm
        norm.register_forward_pre_hook(lambda _, args, index=index: seen.update({index: args[0]}))
    expected = Reference(tiny.model(), tiny.clip, tiny.config(guide=guide)).run(prompt(tiny, batch[0]))
    with torch.no_grad(), tiny.attach(model, guide=guide):
        model(**tiny.inputs(*batch))
    assert expected.guide is not None
    torch.testing.assert_close(seen[0][0, -1].double(), expected.guide, atol=1e-4, rtol=1e-4)
    text = len(expected.survivors) - len(expected.kept("llm"))
    assert seen[0].shape[1] == text + len(expected.kept("vision")) + 1
    assert seen[6].shape[1] == len(expected.survivors)


@pytest.mark.parametrize("layer", [-1, -3])
def test_feature_layer(tiny: Tiny, layer: int) -> None:
    """The encoder layers behind the feature layer, if any, serve the relevance alone."""
    batch = samples(tiny, "one")
    model = tiny.model()
    model.config.vision_feature_layer = layer
    expected = Reference(model, tiny.clip, tiny.config()).run(prompt(tiny, batch[0]))
    with torch.no_grad(), tiny.attach(model) as pruner:
        logits = model(**tiny.inputs(*batch)).logits
    check_stages(pruner.trace, [expected])
    check_words(pruner.trace, [expected])
    check_logits(logits, batch, tiny, [expected])


def test_both_attention_kernels(tiny: Tiny) -> None:
    batch = samples(tiny, "mixed")
    model = tiny.model("eager")
    reference = Reference(model, tiny.clip, tiny.config())
    with torch.no_grad(), tiny.attach(model) as pruner:
        logits = model(**tiny.inputs(*batch)).logits
    expected = [reference.run(prompt(tiny, s)) for s in batch]
    check_stages(pruner.trace, expected)
    check_logits(logits, batch, tiny, expected)


def test_instruction_longer_than_the_clip_context(tiny: Tiny) -> None:
    """Consecutive windows; the words of the last one are scored like those of the first."""
    question = " ".join(QUESTIONS[i % 3] for i in range(12))
    sample = tiny.sample(question, seed=7)
    assert len(tiny.clip[1](question)["input_ids"]) > 2 * 75
    trace, logits, expected = run(tiny, [sample])
    check_stages(trace, expected)
    check_words(trace, expected)
    check_logits(logits, [sample], tiny, expected)


def test_instruction_is_the_last_user_turn(tiny: Tiny) -> None:
    """The system prompt, earlier turns and role words have no relevance."""
    picture = samples(tiny, "one")[0].images
    text = [{"type": "text", "text": t} for t in ("You see well.", QUESTIONS[2], "Yes, it is.", QUESTIONS[0])]
    chat = tiny.chat(
        [
            {"role": "system", "content": [text[0]]},
            {"role": "user", "content": [{"type": "image"}, text[1]]},
            {"role": "assistant", "content": [text[2]]},
            {"role": "user", "content": [text[3]]},
        ]
    )
    sample = Sample(chat, QUESTIONS[0], picture)
    trace, logits, expected = run(tiny, [sample])
    check_words(trace, expected)
    check_stages(trace, expected)
    check_logits(logits, [sample], tiny, expected)


@pytest.mark.parametrize(
    "question",
    [
        "x_2 of the U.S.A.: 3.14?",
        "naïve e\u0301te\u0301 नमस्ते",
        "日本語の dog カタカナ 한국어\u3000cat",
        "left\u00a0of\t🐶\n“q” ’s 👩‍👧 a:b",
    ],
)
def test_words_of_any_script(tiny: Tiny, question: str) -> None:
    sample = tiny.sample(question, seed=10)
    trace, _, expected = run(tiny, [sample])
    check_words(trace, expected)
    check_stages(trace, expected)


def test_prompt_without_a_chat_template(tiny: Tiny) -> None:
    """No role words: all text is the user's, special tokens are not."""
    sample = Sample("<image>\n" + QUESTIONS[0], QUESTIONS[0], samples(tiny, "one")[0].images)
    trace, logits, expected = run(tiny, [sample])
    check_words(trace, expected)
    check_stages(trace, expected)
    check_logits(logits, [sample], tiny, expected)


@pytest.mark.parametrize("guide", ["text", "visual"])
def test_without_a_processor(tiny: Tiny, guide: str) -> None:
    """Ids in, ids out: the instruction is every token behind the last image."""
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "two images"))
    config = tiny.config(guide=guide)
    ids = prompt_of_ids(inputs["input_ids"][0], inputs["pixel_values"], tiny.processor.image_token_id)
    expected = Reference(model, tiny.clip, config).run(ids)
    with torch.no_grad(), ivtp.attach(model, None, config) as pruner:
        logits = model(**inputs).logits
    check_stages(pruner.trace, [expected])
    torch.testing.assert_close(logits[0, -1].double(), expected.logits[-1], atol=1e-4, rtol=0)


def test_half_precision_is_close(tiny: Tiny) -> None:
    """bfloat16 moves scores a little; counts are exact and the first cut's scores agree to rounding."""
    batch = samples(tiny, "batch")
    model = tiny.model(dtype=torch.bfloat16)
    with torch.no_grad(), tiny.attach(model) as pruner:
        logits = model(**tiny.inputs(*batch, dtype=torch.bfloat16)).logits
    reference = Reference(tiny.model(), tiny.clip, tiny.config())
    for b, sample in enumerate(batch):
        expected = reference.run(prompt(tiny, sample))
        first, cut = pruner.trace.stages[0], expected.cuts[0]
        scores = dict(zip(first.candidates[b].tolist(), first.scores[b].tolist(), strict=True))
        assert [scores[i] for i in cut.candidates] == pytest.approx(cut.scores, abs=3e-3)
        assert len(set(first.kept[b].tolist()) & set(cut.kept)) >= len(cut.kept) - 2
        assert [s.kept.shape[1] for s in pruner.trace.stages] == [len(c.kept) for c in expected.cuts]
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()


def test_equal_scores_keep_the_lower_index(tiny: Tiny) -> None:
    """With queries and values of zero every patch scores the same: exactly the first k stay."""
    model = tiny.model()
    for layer in model.model.vision_tower.encoder.layers:
        _constant(layer.self_attn)
    with torch.no_grad(), tiny.attach(model, stages="vision") as pruner:
        model(**tiny.inputs(*samples(tiny, "one")))
    assert pruner.trace.kept("vision")[0].tolist() == list(range(8))


@torch.no_grad()
def _constant(attention: nn.Module) -> None:
    attention.q_proj.weight.zero_()
    attention.q_proj.bias.zero_()
    attention.v_proj.weight.zero_()


def test_published_schedule() -> None:
    assert uniform_ratio(576, 64, 12) == [480, 399, 333, 277, 231, 192, 160, 133, 111, 92, 77, 64]


def test_reference_itself(tiny: Tiny) -> None:
    """With every token kept it is a plain LLaVA, and continuing it is plain decoding."""
    sample = samples(tiny, "two images")[0]
    model, inputs = tiny.model(), tiny.inputs(sample)
    later = [7, 300, 41]
    result = Reference(model, tiny.clip, tiny.config(keep=NUM_PATCHES)).run(prompt(tiny, sample), later)
    ids = torch.cat([inputs["input_ids"], torch.tensor([later])], 1)
    stock = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0]
    torch.testing.assert_close(result.logits, stock.double(), atol=1e-4, rtol=0)
    assert select(torch.tensor([1.0, 3.0, 3.0, 2.0, 3.0]), 2) == [1, 2]
    text = "it's 左边 x_2 e\u0301t नमस्ते\u3000ok"
    words = [text[slice(*span)] for span in split_words(text)]
    assert words == ["it", "'", "s", "左", "边", "x", "_", "2", "e\u0301t", "नमस्ते", "ok"]
