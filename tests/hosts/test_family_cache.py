"""In any family, decoding on the cache of a pruned prompt says what decoding without a cache says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family import BATCHES, KEEP, METHODS, ONE, TWO, Family, generated
from tiny import with_cache

import ivtp
from ivtp.plug import find_host

LATER = [17, 100, 200, 41]


def step_by_step(family: Family, model: Any, inputs: dict[str, Any], chunks: list[int]) -> torch.Tensor:
    """Logits (B, 4, V) behind each of four later tokens, so many of them a forward."""
    mask, rows, done = inputs["attention_mask"], [], 0
    cache = model(**inputs, use_cache=True).past_key_values
    for size in chunks:
        mask = torch.cat([mask, mask.new_ones(len(mask), size)], 1)
        ids = torch.tensor([LATER[done : done + size]] * len(mask))
        rows.append(model(input_ids=ids, attention_mask=mask, **with_cache(model, cache)).logits)
        done += size
    return torch.cat(rows, 1)


@pytest.mark.parametrize(
    ("method", "positions"), [*((m, "original") for m in METHODS), ("ivtp", "compact"), ("topk", "compact")]
)
def test_generating_with_a_cache_says_what_it_says_without(family: Family, method: str, positions: str) -> None:
    """A layered cache holds what a forward of the whole would see."""
    model, inputs = family.model(), family.inputs(*BATCHES["mixed"])
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with family.attach(model, method, cache="layered", positions=positions) as pruner:
        cached = model.generate(**inputs, **options)
        kept = pruner.trace.kept().tolist()
        plain = model.generate(**inputs, use_cache=False, **options)
        assert pruner.trace.kept().tolist() == kept
    assert cached.sequences.tolist() == plain.sequences.tolist()
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), atol=2e-4, rtol=0)


@pytest.mark.parametrize("batch", ["one", "mixed"])
def test_beams_with_a_cache_say_what_they_say_without(family: Family, batch: str) -> None:
    model, inputs = family.model(), family.inputs(*BATCHES[batch])
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    with family.attach(model, cache="layered"):
        cached = model.generate(**inputs, **options)
        assert model.generate(**inputs, use_cache=False, **options).tolist() == cached.tolist()


@pytest.mark.parametrize("method", ivtp.list_methods())
def test_one_token_at_a_time_or_all_at_once(family: Family, method: str) -> None:
    model, inputs = family.model(), family.inputs(*BATCHES["mixed"])
    with torch.no_grad(), family.attach(model, method):
        one, all_at_once, mixed = (step_by_step(family, model, inputs, c) for c in ([1, 1, 1, 1], [4], [1, 3]))
    torch.testing.assert_close(one, all_at_once, atol=2e-4, rtol=0)
    torch.testing.assert_close(one, mixed, atol=2e-4, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_forward_without_a_cache_prunes_the_same(family: Family, method: str) -> None:
    model, inputs = family.model(), family.inputs(*BATCHES["mixed"])
    with torch.no_grad(), family.attach(model, method) as pruner:
        cached = model(**inputs, use_cache=True).logits[:, -1]
        kept = pruner.trace.kept().tolist()
        out = model(**inputs, use_cache=False)
    assert out.past_key_values is None
    assert pruner.trace.kept().tolist() == kept
    torch.testing.assert_close(out.logits[:, -1], cached, atol=1e-5, rtol=0)


@pytest.mark.parametrize("prompt", [ONE, TWO], ids=["one", "two images"])
@pytest.mark.parametrize("method", METHODS)
def test_the_cache_holds_the_text_and_what_was_kept(family: Family, method: str, prompt: Any) -> None:
    """In every layer; and it says the length of the whole prompt, which positions go on from."""
    model, inputs = family.model(), family.inputs(prompt)
    length, gone = inputs["input_ids"].shape[1], sum(family.counts(prompt[1])) - KEEP * len(prompt[1])
    with torch.no_grad(), family.attach(model, method):
        held = model(**inputs, use_cache=True).past_key_values
    assert {layer.keys.shape[-2] for layer in held.layers} == {length - gone}
    assert {layer.values.shape[-2] for layer in held.layers} == {length - gone}
    assert held.get_seq_length() == length


@pytest.mark.parametrize("method", METHODS)
def test_sdpa_and_eager_agree(family: Family, method: str) -> None:
    inputs, found = family.inputs(*BATCHES["mixed"]), []
    if len({find_host(family.model(attention)).text.softcap for attention in ("sdpa", "eager")}) > 1:
        pytest.skip("this release of transformers caps the decoder's logits in one of both kernels alone")
    for attention in ("sdpa", "eager"):
        model = family.model(attention)
        with torch.no_grad(), family.attach(model, method) as pruner:
            logits = model(**inputs).logits[:, -1]
            kept = pruner.trace.kept().tolist()
            tokens = generated(model.generate(**inputs, max_new_tokens=4, do_sample=False), inputs).tolist()
        found.append((logits, kept, tokens))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-4, rtol=0)
    assert found[0][1:] == found[1][1:]


def test_a_second_turn_on_a_returned_cache(family: Family) -> None:
    """What the first turn kept serves the next question, as if its tokens had been generated behind the first."""
    model, inputs = family.model(), family.inputs(ONE)
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad(), family.attach(model, cache="layered"):
        first = model.generate(**inputs, max_new_tokens=3, **options)
        ids = torch.cat([first.sequences, torch.tensor([LATER])], 1)
        again = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        second = model.generate(**again, **with_cache(model, first.past_key_values), max_new_tokens=1, **options)
        fresh = model(**inputs, use_cache=True).past_key_values
        behind = ids[:, inputs["input_ids"].shape[1] :]
        expected = model(input_ids=behind, **with_cache(model, fresh)).logits[:, -1]
    torch.testing.assert_close(second.logits[0], expected, atol=2e-4, rtol=0)
