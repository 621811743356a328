"""Bad input gets one clear line that names the fix, and the model stays exactly stock."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from fingerprint import difference, fingerprint
from tiny import NUM_PATCHES, QUESTIONS, Tiny, samples, with_cache
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    StaticCache,
)

import ivtp
from ivtp.errors import (
    AttachError,
    ConfigError,
    ImageError,
    InputError,
    IvtpError,
    LoadError,
    OutputError,
    UnsupportedModelError,
)


@pytest.fixture
def model(tiny: Tiny) -> Any:
    model = tiny.model()
    model.generate(**tiny.inputs(*samples(tiny, "one")), max_new_tokens=2)
    return model


def one_line(error: BaseException) -> str:
    """The message: a single line, not a wall of text."""
    message = str(error)
    assert message
    assert "\n" not in message
    assert len(message) < 400
    return message


@pytest.mark.parametrize(
    ("keep", "says"),
    [
        (0, "1"),
        (-3, "1"),
        (NUM_PATCHES + 1, rf"1\.\.{NUM_PATCHES}"),
        (577, rf"{NUM_PATCHES}"),
        ("300%", "100%"),
        ("0%", "0%"),
        ("-5%", "%"),
        ("abc", "abc"),
        ("", "%"),
        (float("nan"), "NaN"),
        (float("inf"), "inf"),
        (1.5, r"1\.5"),
        (True, "True"),
        (None, "None"),
        ([8], "8"),
    ],
    ids=str,
)
def test_keep(tiny: Tiny, model: Any, keep: Any, says: str) -> None:
    before = fingerprint(model)
    with pytest.raises(ConfigError, match=says) as caught:
        ivtp.attach(model, tiny.processor, method="ivtp", keep=keep, llm_layers=6, clip=tiny.clip)
    assert "keep" in one_line(caught.value)
    assert difference(before, fingerprint(model)) == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "ivpt"}, "did you mean.*ivtp"),
        ({"method": "top-k"}, "topk"),
        ({"method": "no such thing at all"}, "available.*ivtp"),
        ({"method": ""}, "available"),
        ({"colour": "red"}, "colour.*options"),
        ({"treshold": 0.3}, "treshold.*threshold"),
        ({"threshold": 2.0}, "-1 to 1"),
        ({"threshold": float("nan")}, "-1 to 1"),
        ({"threshold": "high"}, "-1 to 1"),
        ({"aggregation": "sum"}, "residual"),
        ({"guide": "words"}, "instruction"),
        ({"stages": "all"}, "both"),
        ({"positions": "none"}, "original"),
        ({"cache": "none"}, "evict"),
        ({"group_layers": 0}, "group_layers"),
        ({"group_layers": 1.5}, "group_layers"),
        ({"llm_layers": 0}, "llm_layers"),
        ({"llm_layers": 9}, "llm_layers.*8"),
        ({"seed": -1}, "seed"),
        ({"schedule": (30, 20, 10)}, "schedule"),
        ({"schedule": (40, 20, 10, 5)}, "schedule"),
        ({"schedule": (10, 20, 5, 2)}, "schedule"),
        ({"schedule": (30, 20, 10, 0)}, "schedule"),
        ({"schedule": ()}, "schedule"),
    ],
    ids=str,
)
def test_options(tiny: Tiny, model: Any, options: dict[str, Any], says: str) -> None:
    before = fingerprint(model)
    with pytest.raises(ConfigError) as caught:
        ivtp.attach(model, tiny.processor, clip=tiny.clip, **{"keep": 8, "llm_layers": 6, **options})
    assert re.search(says, one_line(caught.value)), str(caught.value)
    assert difference(before, fingerprint(model)) == []


def test_unsupported_families(tiny: Tiny) -> None:
    gpt = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20, n_positions=16))
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    blip = BlipForConditionalGeneration(
        BlipConfig(
            text_config={**small, "vocab_size": 30, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2},
            vision_config={**small, "image_size": 16, "patch_size": 8},
        )
    )
    for model in (gpt, blip, torch.nn.Linear(2, 2)):
        before = fingerprint(model)
        with pytest.raises(UnsupportedModelError, match=type(model).__name__) as caught:
            ivtp.attach(model, tiny.processor, keep=8, clip=tiny.clip)
        message = one_line(caught.value)
        assert all(host in message for host in ivtp.list_hosts())
        assert difference(before, fingerprint(model)) == []


def test_sliding_window_decoder(tiny: Tiny, model: Any) -> None:
    """Its layers do not see the whole prompt, so a cut has no one answer: refused before anything is touched."""
    config = model.config.to_dict()
    config["text_config"] = MistralConfig(**{k: config["text_config"][k] for k in _SIZES}, sliding_window=16)
    mistral = LlavaForConditionalGeneration(LlavaConfig(**config)).eval()
    before = fingerprint(mistral)
    with pytest.raises(UnsupportedModelError, match="sliding") as caught:
        tiny.attach(mistral)
    one_line(caught.value)
    assert difference(before, fingerprint(mistral)) == []


_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")


@pytest.mark.parametrize("method", ["ivtp", "topk"])
@pytest.mark.parametrize("question", ["", "   ", "?", "\n\n"])
def test_empty_question(tiny: Tiny, model: Any, question: str, method: str) -> None:
    """No words, no relevance: the visual CLS token is the guide."""
    sample = tiny.sample(question, seed=10)
    threshold = {"threshold": 1.0} if method == "ivtp" else {}
    with torch.no_grad(), tiny.attach(model, method=method, **threshold) as pruner:
        logits = model(**tiny.inputs(sample)).logits
    assert logits.isfinite().all()
    assert pruner.trace.kept().shape == (1, 8)
    if method == "ivtp":
        with torch.no_grad(), tiny.attach(model, guide="visual") as visual:
            model(**tiny.inputs(sample))
        assert pruner.trace.fallback == [True]
        assert pruner.trace.kept().tolist() == visual.trace.kept().tolist()


@pytest.mark.parametrize("guide", ["instruction", "text", "clip", "weighted", "visual"])
@pytest.mark.parametrize("question", ["", QUESTIONS[0]])
def test_empty_and_ordinary_questions_in_one_batch(tiny: Tiny, model: Any, guide: str, question: str) -> None:
    batch = [tiny.sample(question, seed=1), tiny.sample("", seed=2)]
    with torch.no_grad(), tiny.attach(model, guide=guide) as pruner:
        assert model(**tiny.inputs(*batch)).logits.isfinite().all()
    assert pruner.trace.kept().shape == (2, 8)


def test_very_long_question(tiny: Tiny, model: Any) -> None:
    """2,000 words: many windows of the CLIP context; the last word is scored too."""
    question = " ".join(f"{['red', 'dog', 'left', 'house'][i % 4]}" for i in range(1999)) + " cat?"
    with torch.no_grad(), tiny.attach(model) as pruner:
        logits = model(**tiny.inputs(tiny.sample(question))).logits
    assert logits.isfinite().all()
    words = pruner.trace.words[0]
    assert len(words) == 2001
    assert [w.text for w in words[-2:]] == ["cat", "?"]
    assert all(-1 <= w.score <= 1 for w in words)
    assert pruner.trace.kept().shape == (1, 8)


@pytest.mark.parametrize(
    "question",
    ["日本語の質問ですか？", "naïve café déjà vu?", "🐶 left of 🏠?", "a\u0301e\u0301 İx ﬁne", "a\tb\r\nc"],
)
def test_any_script(tiny: Tiny, model: Any, question: str) -> None:
    with torch.no_grad(), tiny.attach(model) as pruner:
        assert model(**tiny.inputs(tiny.sample(question))).logits.isfinite().all()
    assert pruner.trace.words[0]
    assert all(w.text in question for w in pruner.trace.words[0])


@pytest.mark.parametrize("guide", ["instruction", "weighted", "clip"])
def test_no_clip_text_side(tiny: Tiny, model: Any, guide: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing beside the checkpoint, nothing in the cache, no network: say what else works."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    before = fingerprint(model)
    with pytest.raises(IvtpError) as caught:
        ivtp.attach(model, tiny.processor, keep=8, llm_layers=6, guide=guide)
    message = one_line(caught.value)
    assert "clip=" in message
    assert "visual" in message
    assert "text" in message
    assert difference(before, fingerprint(model)) == []


@pytest.mark.parametrize("guide", ["text", "visual"])
def test_guides_that_need_no_clip(tiny: Tiny, model: Any, guide: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with torch.no_grad(), ivtp.attach(model, tiny.processor, keep=8, llm_layers=6, guide=guide) as pruner:
        model(**tiny.inputs(*samples(tiny, "one")))
        assert pruner.trace.kept().shape == (1, 8)


def test_clip_that_cannot_be_used(tiny: Tiny, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    other = CLIPModel(
        CLIPConfig(text_config={**small, "vocab_size": 30}, vision_config={**small, "image_size": 8, "patch_size": 4})
    )
    (tmp_path / "empty").mkdir()
    before = fingerprint(model)
    for clip in (tmp_path / "missing", str(tmp_path / "empty"), (other, tiny.clip[1]), 42):
        with pytest.raises(IvtpError) as caught:
            ivtp.attach(model, tiny.processor, keep=8, llm_layers=6, clip=clip)
        one_line(caught.value)
        assert difference(before, fingerprint(model)) == []


def test_clip_from_a_folder(tiny: Tiny, model: Any, tmp_path: Path) -> None:
    tiny.clip[0].save_pretrained(tmp_path)
    tiny.clip[1].save_pretrained(tmp_path)
    inputs = tiny.inputs(*samples(tiny, "mixed"))
    with torch.no_grad():
        with tiny.attach(model) as pruner:
            model(**inputs)
        with ivtp.attach(model, tiny.processor, tiny.config(), clip=tmp_path) as other:
            model(**inputs)
    assert other.trace.kept().tolist() == pruner.trace.kept().tolist()
    for mine, theirs in zip(pruner.trace.words, other.trace.words, strict=True):
        assert [(w.text, w.used) for w in mine] == [(w.text, w.used) for w in theirs]
        assert [w.score for w in mine] == pytest.approx([w.score for w in theirs], abs=1e-5)


@pytest.mark.parametrize("guide", ["instruction", "weighted", "clip"])
def test_guides_that_need_a_processor(tiny: Tiny, model: Any, guide: str) -> None:
    before = fingerprint(model)
    with pytest.raises(ConfigError, match="processor") as caught:
        ivtp.attach(model, None, tiny.config(guide=guide), clip=tiny.clip)
    message = one_line(caught.value)
    assert "visual" in message
    assert "text" in message
    assert difference(before, fingerprint(model)) == []


def test_static_cache(tiny: Tiny, model: Any) -> None:
    inputs = tiny.inputs(*samples(tiny, "one"))
    stock = model.generate(**inputs, max_new_tokens=3)
    before = fingerprint(model)
    with tiny.attach(model):
        with pytest.raises(InputError, match=r"[Dd]ynamic") as caught:
            model.generate(**inputs, max_new_tokens=3, cache_implementation="static")
        one_line(caught.value)
        with pytest.raises(InputError, match=r"[Dd]ynamic"):
            model(**inputs, **with_cache(model, StaticCache(model.config.get_text_config(), max_cache_len=80)))
        model.generate(**inputs, max_new_tokens=3)
    for leftover in ("_cache", "_previous_max_cache_length"):  # stock `generate` sets these for static caches
        model.__dict__.pop(leftover, None)
    assert difference(before, fingerprint(model)) == []
    assert model.generate(**inputs, max_new_tokens=3).tolist() == stock.tolist()


def test_images_and_placeholders_disagree(tiny: Tiny, model: Any) -> None:
    """Too few or too many images, or an image cut in two: a clear error, and the next call works."""
    inputs = tiny.inputs(*samples(tiny, "two images"))
    broken = [
        {**inputs, "pixel_values": inputs["pixel_values"][:1]},
        {**inputs, "pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)},
        {k: v if k == "pixel_values" else v[:, 30:] for k, v in inputs.items()},
    ]
    before = fingerprint(model)
    with torch.no_grad(), tiny.attach(model) as pruner:
        for bad in broken:
            with pytest.raises((InputError, ValueError)) as caught:
                model(**bad)
            one_line(caught.value)
        model(**inputs)
        assert pruner.trace.kept().shape == (1, 16)
    assert difference(before, fingerprint(model)) == []


def test_image_of_another_size(tiny: Tiny, model: Any) -> None:
    inputs = tiny.inputs(*samples(tiny, "one"))
    with torch.no_grad(), tiny.attach(model) as pruner:
        with pytest.raises(ValueError, match="size"):
            model(**{**inputs, "pixel_values": torch.zeros(1, 3, 28, 28)})
        model(**inputs)
        assert pruner.trace.kept().shape == (1, 8)


def test_every_message_is_an_ivtp_error() -> None:
    for error in (
        ConfigError,
        UnsupportedModelError,
        AttachError,
        InputError,
        ImageError,
        LoadError,
        OutputError,
    ):
        assert issubclass(error, IvtpError)
