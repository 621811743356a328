"""With every token kept the attached model is the stock model: logits, loss and generated tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from tiny import NUM_PATCHES, QUESTIONS, Tiny, generated, image, samples
from transformers import pipeline

import ivtp
from ivtp.registry import method_class

BATCHES = ["one", "batch", "two images", "no image", "mixed"]
DECODING: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
    "beam search": {"do_sample": False, "num_beams": 3},
    "several samples": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.fixture(params=["sdpa", "eager"])
def attention(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("method", ["fastv", "ivtp", "sparsevlm", "spatial", "tome", "topk"])
def test_logits(tiny: Tiny, name: str, method: str, attention: str) -> None:
    model, inputs = tiny.model(attention), tiny.inputs(*samples(tiny, name))
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        stock = model(**inputs).logits
        with tiny.attach(model, method=method, keep=NUM_PATCHES):
            ours = model(**inputs).logits
    assert ours.shape == stock.shape
    torch.testing.assert_close(ours[real], stock[real], atol=1e-4, rtol=0)


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("cache", ["evict", "layered"])
@pytest.mark.parametrize("keep", [NUM_PATCHES, "100%"])
def test_logits_with_every_option(tiny: Tiny, positions: str, cache: str, keep: int | str) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "mixed"))
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        stock = model(**inputs).logits
        with tiny.attach(model, keep=keep, positions=positions, cache=cache):
            ours = model(**inputs).logits
    torch.testing.assert_close(ours[real], stock[real], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("decoding", DECODING)
def test_generation(tiny: Tiny, name: str, decoding: str, attention: str) -> None:
    repeats = {"num_beams", "num_return_sequences"} & DECODING[decoding].keys()
    if repeats and name in ("two images", "mixed") and Version(transformers.__version__) < Version("5.19"):
        pytest.skip("before transformers 5.19 the stock model repeats the images of such a batch wrongly")
    model, inputs = tiny.model(attention), tiny.inputs(*samples(tiny, name))
    options = {**DECODING[decoding], "max_new_tokens": 6}
    torch.manual_seed(5)
    stock = model.generate(**inputs, **options)
    torch.manual_seed(5)
    with tiny.attach(model, keep=NUM_PATCHES):
        ours = model.generate(**inputs, **options)
    assert ours.tolist() == stock.tolist()


@pytest.mark.parametrize("method", [m for m in ivtp.list_methods() if method_class(m).keeps_all])
def test_generation_of_every_method(tiny: Tiny, method: str) -> None:
    """Sampling too: no method may draw from the global random state."""
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "batch"))
    torch.manual_seed(5)
    stock = model.generate(**inputs, do_sample=True, max_new_tokens=6)
    torch.manual_seed(5)
    with tiny.attach(model, method=method, keep=NUM_PATCHES):
        ours = model.generate(**inputs, do_sample=True, max_new_tokens=6)
    assert ours.tolist() == stock.tolist()


@pytest.mark.parametrize("name", ["no image"])
@pytest.mark.parametrize("keep", [1, 8])
def test_prompt_without_an_image_passes_through(tiny: Tiny, name: str, keep: int) -> None:
    """Whatever is kept: bit for bit, there is nothing to prune."""
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, name))
    with torch.no_grad():
        stock, tokens = model(**inputs).logits, model.generate(**inputs, max_new_tokens=6)
        with tiny.attach(model, keep=keep):
            assert torch.equal(model(**inputs).logits, stock)
            assert model.generate(**inputs, max_new_tokens=6).tolist() == tokens.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss(tiny: Tiny, dtype: torch.dtype) -> None:
    model = tiny.model(dtype=dtype)
    inputs = tiny.inputs(*samples(tiny, "mixed"), dtype=dtype)
    labels = inputs["input_ids"].clone()
    labels[(labels == tiny.processor.image_token_id) | (inputs["attention_mask"] == 0)] = -100
    with torch.no_grad():
        stock = model(**inputs, labels=labels).loss
        with tiny.attach(model, keep=NUM_PATCHES):
            ours = model(**inputs, labels=labels).loss
    torch.testing.assert_close(ours, stock, atol=1e-4 if dtype == torch.float32 else 0.05, rtol=0)


def test_half_precision_logits(tiny: Tiny) -> None:
    """bfloat16 may round differently, but not by more than it already differs from float32."""
    batch = samples(tiny, "mixed")
    model, inputs = tiny.model(dtype=torch.bfloat16), tiny.inputs(*batch, dtype=torch.bfloat16)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        exact = tiny.model()(**tiny.inputs(*batch)).logits[real]
        stock = model(**inputs).logits[real].float()
        with tiny.attach(model, keep=NUM_PATCHES):
            ours = model(**inputs).logits[real].float()
    assert (ours - stock).abs().mean() <= (stock - exact).abs().mean()


@pytest.mark.parametrize("logits_to_keep", [1, 4])
def test_logits_to_keep(tiny: Tiny, logits_to_keep: int) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "batch"))
    with torch.no_grad():
        stock = model(**inputs, logits_to_keep=logits_to_keep).logits
        with tiny.attach(model, keep=NUM_PATCHES):
            ours = model(**inputs, logits_to_keep=logits_to_keep).logits
    assert ours.shape == stock.shape
    torch.testing.assert_close(ours, stock, atol=1e-4, rtol=0)


def test_tuple_outputs_and_hidden_states(tiny: Tiny) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "one"))
    with torch.no_grad():
        stock = model(**inputs, output_hidden_states=True, return_dict=False)
        states = model(**inputs, output_hidden_states=True).hidden_states
        with tiny.attach(model, keep=NUM_PATCHES):
            ours = model(**inputs, output_hidden_states=True, return_dict=False)
            mine = model(**inputs, output_hidden_states=True).hidden_states
    assert isinstance(ours, tuple)
    torch.testing.assert_close(ours[0], stock[0], atol=1e-4, rtol=0)
    assert len(mine) == len(states)


@pytest.mark.parametrize("keep", [8, NUM_PATCHES])
def test_pipeline(tiny: Tiny, keep: int) -> None:
    """`pipeline` runs on the attached model with no other call; with all tokens kept it says the same."""
    model = tiny.model()
    content = [{"type": "image", "image": image(3)}, {"type": "text", "text": QUESTIONS[0]}]
    options: dict[str, Any] = {"max_new_tokens": 6, "return_full_text": False}
    pipe = pipeline("image-text-to-text", model=model, processor=tiny.processor)
    stock = pipe(text=[{"role": "user", "content": content}], **options)[0]["generated_text"]
    with tiny.attach(model, keep=keep) as pruner:
        ours = pipe(text=[{"role": "user", "content": content}], **options)[0]["generated_text"]
        inputs = tiny.inputs(type(samples(tiny, "one")[0])(samples(tiny, "one")[0].prompt, QUESTIONS[0], (image(3),)))
        direct = generated(model.generate(**inputs, max_new_tokens=6), inputs)
    assert pruner.trace.kept().shape == (1, keep)
    assert ours == tiny.processor.batch_decode(direct, skip_special_tokens=True)[0]
    if keep == NUM_PATCHES:
        assert ours == stock
