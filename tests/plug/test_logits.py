"""What comes back: logits for every column of the prompt, hidden states of the prompt's tokens, losses of trainers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import LLM_LAYERS, NUM_PATCHES, TEXT_LAYERS, Tiny, samples
from torch import Tensor, nn

from ivtp.errors import ConfigError


def labelled(tiny: Tiny, inputs: dict[str, Tensor]) -> Tensor:
    """Labels on the last tokens of every row, as an answer would have them."""
    labels = inputs["input_ids"].clone()
    labels[:, :-6] = -100
    return labels.masked_fill(inputs["attention_mask"] == 0, -100)


def shifted_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """What trainers compute from an output and their labels."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


@pytest.mark.parametrize("name", ["one", "batch", "two images", "mixed"])
@pytest.mark.parametrize("method", ["ivtp", "ivtp+", "tome", "topk", "sparsevlm"])
def test_logits_stand_where_the_prompts_tokens_stand(tiny: Tiny, name: str, method: str) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, name))
    with torch.no_grad():
        with tiny.attach(model, method=method, logits="kept"):
            short = model(**inputs).logits
        with tiny.attach(model, method=method):
            full = model(**inputs).logits
    assert full.shape[:2] == inputs["input_ids"].shape
    assert short.shape[1] < full.shape[1] or name == "mixed"
    for row in range(len(full)):  # text behind the image, one by one
        slots = (inputs["input_ids"][row] == tiny.processor.image_token_id).nonzero().flatten().tolist()
        tail = full.shape[1] - 1 - slots[-1] if slots else int(inputs["attention_mask"][row].sum())
        torch.testing.assert_close(full[row, -tail:], short[row, -tail:], atol=0, rtol=0)
        if slots:  # the first token behind the image is predicted by the last visual token that is left
            torch.testing.assert_close(full[row, -tail - 1], short[row, -tail - 1], atol=0, rtol=0)


@pytest.mark.parametrize("name", ["batch", "two images"])
def test_a_loss_from_logits_and_labels_is_the_models_own(tiny: Tiny, name: str) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, name))
    labels = labelled(tiny, inputs)
    with tiny.attach(model):
        output = model(**inputs, labels=labels)
    torch.testing.assert_close(shifted_loss(output.logits, labels), output.loss)


def test_full_logits_carry_the_same_gradients(tiny: Tiny) -> None:
    inputs = tiny.inputs(*samples(tiny, "batch"))
    labels, found = labelled(tiny, inputs), []
    for own in (True, False):
        model = tiny.model()
        with tiny.attach(model):
            output = model(**inputs, labels=labels)
            (output.loss if own else shifted_loss(output.logits, labels)).backward()
        found.append(model.model.language_model.layers[0].mlp.up_proj.weight.grad)
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("wanted", [1, 3, 200, [2, 5, 7], [-1], "mask"])
def test_logits_to_keep_means_columns_of_the_prompt(tiny: Tiny, wanted: Any) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "batch"))
    length = inputs["input_ids"].shape[1]
    if wanted == "mask":
        wanted = [c for c in range(length) if c % 3 == 0]
    keep = wanted if isinstance(wanted, int) else torch.tensor(wanted)
    with torch.no_grad():
        stock = model(**inputs, logits_to_keep=keep).logits
        with tiny.attach(model):
            full, chosen = model(**inputs).logits, model(**inputs, logits_to_keep=keep).logits
    assert chosen.shape == stock.shape
    torch.testing.assert_close(
        chosen, full[:, -keep:] if isinstance(keep, int) else full[:, keep], atol=1e-5, rtol=1e-5
    )


def test_tuples_have_full_logits_too(tiny: Tiny) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "batch"))
    labels = labelled(tiny, inputs)
    with torch.no_grad(), tiny.attach(model):
        loss, logits, *_ = model(**inputs, labels=labels, return_dict=False)
        output = model(**inputs, labels=labels)
    assert torch.equal(loss, output.loss)
    assert torch.equal(logits, output.logits)


def test_an_unknown_kind_of_logits(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match="full, kept"):
        tiny.config(logits="all")


def test_hidden_states_are_of_the_prompts_tokens_alone(tiny: Tiny) -> None:
    """Without the pseudo CLS token; each layer has the tokens that it saw."""
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "one"))
    text = inputs["input_ids"].shape[1] - NUM_PATCHES
    with torch.no_grad(), tiny.attach(model) as pruner:
        output = model(**inputs, output_hidden_states=True)
    counted = pruner.trace.tokens_per_layer
    assert [h.shape[1] - text for h in output.hidden_states[:-1]] == list(counted.llm_attention)
    assert len(output.hidden_states) == TEXT_LAYERS + 1
    assert output.hidden_states[LLM_LAYERS].shape[1] == text + counted.final


def test_attention_maps_are_of_the_prompts_tokens_alone(tiny: Tiny) -> None:
    model, inputs = tiny.model("eager"), tiny.inputs(*samples(tiny, "one"))
    with torch.no_grad(), tiny.attach(model):
        output = model(**inputs, output_hidden_states=True, output_attentions=True)
        whole = model(**inputs, output_hidden_states=True, output_attentions=True, return_dict=False)
    for layer, attention in enumerate(output.attentions):
        assert attention.shape[-2:] == (output.hidden_states[layer].shape[1],) * 2
    expected = [t.shape for t in output.hidden_states + output.attentions]
    assert [t.shape for part in whole if isinstance(part, tuple) for t in part][: len(expected)] == expected


def test_the_base_model_gives_every_column_too(tiny: Tiny) -> None:
    """Trainers with a head of their own call it past the language-model head."""
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "batch"))
    with torch.no_grad(), tiny.attach(model):
        hidden = model.model(**inputs).last_hidden_state
        (first, *_) = model.model(**inputs, return_dict=False)
        torch.testing.assert_close(model.lm_head(hidden), model(**inputs).logits)
        assert torch.equal(first, hidden)
