"""With every token kept the attached model is the stock model: losses, chosen columns, hidden states, pipelines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import NUM_PATCHES, QUESTIONS, Tiny, generated, image, samples
from transformers import pipeline


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
