"""With every token kept an attached model of any family is the stock model: logits, loss, gradients, generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from family import BATCHES, METHODS, NONE, ONE, Family
from packaging.version import Version

import ivtp
from ivtp.registry import method_class

DECODING: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
    "beam search": {"do_sample": False, "num_beams": 3},
    "several samples": {"do_sample": True, "num_return_sequences": 2},
}
KEEPS_ALL = [m for m in ivtp.list_methods() if method_class(m).keeps_all]


def check_logits(family: Family, batch: str, method: str, attention: str = "sdpa", **changes: Any) -> None:
    model, inputs = family.model(attention), family.inputs(*BATCHES[batch])
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        stock = model(**inputs).logits
        with family.attach(model, method, keep="100%", **changes):
            ours = model(**inputs).logits
    assert ours.shape == stock.shape
    torch.testing.assert_close(ours[real], stock[real], atol=1e-4, rtol=0)


@pytest.mark.parametrize("batch", ["one", "mixed"])
@pytest.mark.parametrize("method", KEEPS_ALL)
def test_logits(family: Family, method: str, batch: str) -> None:
    check_logits(family, batch, method)


@pytest.mark.parametrize("method", METHODS)
def test_logits_with_eager_attention(family: Family, method: str) -> None:
    check_logits(family, "mixed", method, "eager")


@pytest.mark.parametrize("method", METHODS)
def test_logits_of_renumbered_tokens_and_a_layered_cache(family: Family, method: str) -> None:
    check_logits(family, "mixed", method, positions="compact", cache="layered")


def test_a_number_of_tokens_means_all_of_an_image_too(family: Family) -> None:
    """Where the images of a prompt have as many."""
    count = family.counts(ONE[1])[0]
    model, inputs = family.model(), family.inputs(ONE)
    with torch.no_grad():
        stock = model(**inputs).logits
        with family.attach(model, keep=count) as pruner:
            torch.testing.assert_close(model(**inputs).logits, stock, atol=1e-4, rtol=0)
    assert pruner.trace.kept().tolist() == [list(range(count))]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("decoding", DECODING)
def test_generation(family: Family, decoding: str, batch: str) -> None:
    repeats = {"num_beams", "num_return_sequences"} & DECODING[decoding].keys()
    if repeats and batch != "one" and Version(transformers.__version__) < Version("5.19"):
        pytest.skip("before transformers 5.19 the stock model repeats the images of such a batch wrongly")
    model, inputs = family.model(), family.inputs(*BATCHES[batch])
    options = {**DECODING[decoding], "max_new_tokens": 5}
    torch.manual_seed(5)
    stock = model.generate(**inputs, **options)
    torch.manual_seed(5)
    with family.attach(model, keep="100%"):
        ours = model.generate(**inputs, **options)
    assert ours.tolist() == stock.tolist()


@pytest.mark.parametrize("method", KEEPS_ALL)
def test_generation_of_every_method(family: Family, method: str) -> None:
    """By sampling: no method may draw from the global random state."""
    model, inputs = family.model(), family.inputs(*BATCHES["mixed"])
    torch.manual_seed(5)
    stock = model.generate(**inputs, do_sample=True, max_new_tokens=4)
    torch.manual_seed(5)
    with family.attach(model, method, keep="100%"):
        ours = model.generate(**inputs, do_sample=True, max_new_tokens=4)
    assert ours.tolist() == stock.tolist()


@pytest.mark.parametrize("method", METHODS)
def test_a_prompt_without_an_image_passes_through(family: Family, method: str) -> None:
    """Whatever is kept: bit for bit, there is nothing to prune."""
    model, inputs = family.model(), family.inputs(NONE)
    with torch.no_grad():
        stock, tokens = model(**inputs).logits, model.generate(**inputs, max_new_tokens=4)
        with family.attach(model, method) as pruner:
            assert torch.equal(model(**inputs).logits, stock)
            assert model.generate(**inputs, max_new_tokens=4).tolist() == tokens.tolist()
            assert pruner.trace is None


def test_half_precision_logits(family: Family) -> None:
    """bfloat16 may round differently, but not by more than it already differs from float32."""
    batch = BATCHES["mixed"]
    model, inputs = family.model(dtype=torch.bfloat16), family.inputs(*batch, dtype=torch.bfloat16)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        exact = family.model()(**family.inputs(*batch)).logits[real]
        stock = model(**inputs).logits[real].float()
        with family.attach(model, keep="100%"):
            ours = model(**inputs).logits[real].float()
    assert (ours - stock).abs().mean() <= (stock - exact).abs().mean()


@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradients(family: Family, method: str) -> None:
    inputs = family.inputs(*BATCHES["mixed"])
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[labels == family.image_token] = -100
    losses, gradients = [], []
    for attached in (False, True):
        model = family.model().train()
        pruner = family.attach(model, method, keep="100%") if attached else None
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        if pruner:
            pruner.detach()
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][name], gradient, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )
