"""Cached decoding behind a pruned prompt equals recomputing the pruned sequence without a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import Reference, prompt_of
from tiny import FOLLOW_UP, NUM_PATCHES, TEXT_LAYERS, Sample, Tiny, generated, samples, with_cache
from torch import Tensor
from transformers import DynamicCache

import ivtp

MODES = [{"cache": c, "positions": p} for c in ("evict", "layered") for p in ("original", "compact")]
STEPS = 5


def mode_name(mode: dict[str, str]) -> str:
    return " ".join(mode.values())


def recompute(tiny: Tiny, sample: Sample, later: list[int], **changes: Any) -> Tensor:
    """(1 + later, vocabulary): the slow reference behind the prompt and behind each later token."""
    prompt = prompt_of(tiny.processor, sample.prompt, sample.question, sample.images, NUM_PATCHES)
    with torch.no_grad():
        return Reference(tiny.model(), tiny.clip, tiny.config(**changes)).run(prompt, later).later


def generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    options = {"max_new_tokens": STEPS, "do_sample": False, **options}
    return model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **options)


@pytest.mark.parametrize("mode", MODES, ids=mode_name)
@pytest.mark.parametrize("name", ["one", "two images", "mixed"])
def test_decoding_equals_recomputation(tiny: Tiny, mode: dict[str, str], name: str) -> None:
    batch = samples(tiny, name)
    model, inputs = tiny.model(), tiny.inputs(*batch)
    with tiny.attach(model, **mode):
        out = generate(model, inputs)
    tokens = generated(out.sequences, inputs)
    for b, sample in enumerate(batch):
        expected = recompute(tiny, sample, tokens[b, :-1].tolist(), **mode)
        steps = torch.stack([step[b] for step in out.logits]).double()
        torch.testing.assert_close(steps, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("cache", ["evict", "layered"])
def test_decoding_with_eager_attention(tiny: Tiny, cache: str) -> None:
    """Its kernel takes a mask for a single new token too, which has to fit what each layer holds."""
    sample = samples(tiny, "one")[0]
    model, inputs = tiny.model("eager"), tiny.inputs(sample)
    with tiny.attach(model, cache=cache):
        out = generate(model, inputs)
    expected = recompute(tiny, sample, generated(out.sequences, inputs)[0, :-1].tolist(), cache=cache)
    torch.testing.assert_close(torch.cat(out.logits).double(), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("mode", [{"stages": "vision"}, {"stages": "llm"}, {"group_layers": 2}], ids=str)
@pytest.mark.parametrize("cache", ["evict", "layered"])
def test_decoding_of_other_plans(tiny: Tiny, mode: dict[str, Any], cache: str) -> None:
    sample = samples(tiny, "one")[0]
    model, inputs = tiny.model(), tiny.inputs(sample)
    with tiny.attach(model, cache=cache, **mode):
        out = generate(model, inputs)
    expected = recompute(tiny, sample, generated(out.sequences, inputs)[0, :-1].tolist(), cache=cache, **mode)
    torch.testing.assert_close(torch.cat(out.logits).double(), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_decoding_step_by_step_through_forward(tiny: Tiny, attention: str) -> None:
    """Without `generate`: the mask of the unpruned sequence, or none at all, and one or several tokens a step."""
    sample = samples(tiny, "one")[0]
    model, inputs = tiny.model(attention), tiny.inputs(sample)
    length, later = inputs["input_ids"].shape[1], [17, 200, 300, 41]
    expected = recompute(tiny, sample, later)
    with torch.no_grad(), tiny.attach(model):
        for chunks in ([1, 1, 1, 1], [2, 2], [4], [1, 3]):
            for masked in (True, False):
                out = model(**inputs, use_cache=True)
                rows, done = [out.logits[0, -1:]], 0
                for size in chunks:
                    done += size
                    step = {"input_ids": torch.tensor([later[done - size : done]])}
                    if masked:
                        step["attention_mask"] = torch.ones(1, length + done, dtype=torch.long)
                    out = model(**step, **with_cache(model, out.past_key_values), use_cache=True)
                    rows.append(out.logits[0])
                torch.testing.assert_close(torch.cat(rows).double(), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("cache", ["evict", "layered"])
@pytest.mark.parametrize("name", ["one", "two images", "no image"])
def test_cache_sizes(tiny: Tiny, cache: str, name: str) -> None:
    """Every layer holds the text and the final K ("evict") or what it saw; the logical length stays the prompt's."""
    sample = samples(tiny, name)[0]
    model, inputs = tiny.model(), tiny.inputs(sample)
    prompt = prompt_of(tiny.processor, sample.prompt, sample.question, sample.images, NUM_PATCHES)
    expected = Reference(model, tiny.clip, tiny.config(cache=cache)).run(prompt)
    length = inputs["input_ids"].shape[1]
    with torch.no_grad(), tiny.attach(model, cache=cache):
        held = model(**inputs, use_cache=True).past_key_values
        assert [layer.keys.shape[-2] for layer in held.layers] == expected.cache
        assert [layer.values.shape[-2] for layer in held.layers] == expected.cache
        assert held.get_seq_length() == length
        out = generate(model, inputs)
        assert [x.keys.shape[-2] for x in out.past_key_values.layers] == [n + STEPS - 1 for n in expected.cache]
        assert out.past_key_values.get_seq_length() == length + STEPS - 1


def test_cache_sizes_in_a_padded_batch(tiny: Tiny) -> None:
    """As long as its longest row, never as long as the unpruned prompt."""
    batch = samples(tiny, "mixed")
    model, inputs = tiny.model(), tiny.inputs(*batch)
    text = [
        int(row.sum()) - len(s.images) * NUM_PATCHES for row, s in zip(inputs["attention_mask"], batch, strict=True)
    ]
    longest = max(t + 8 * len(s.images) for t, s in zip(text, batch, strict=True))
    with torch.no_grad(), tiny.attach(model):
        cache = model(**inputs, use_cache=True).past_key_values
    assert [layer.keys.shape[-2] for layer in cache.layers] == [longest] * TEXT_LAYERS
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]


@pytest.mark.parametrize("mode", MODES, ids=mode_name)
@pytest.mark.parametrize("name", ["one", "two images"])
def test_second_turn_on_a_returned_cache(tiny: Tiny, mode: dict[str, str], name: str) -> None:
    sample = samples(tiny, name)[0]
    model, inputs = tiny.model(), tiny.inputs(sample)
    with tiny.attach(model, **mode):
        first = generate(model, inputs)
        turn = tiny.processor.tokenizer(f" USER: {FOLLOW_UP} ASSISTANT:", add_special_tokens=False, return_tensors="pt")
        ids = torch.cat([first.sequences, turn["input_ids"]], 1)
        again = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        second = generate(model, again, **with_cache(model, first.past_key_values))
    length = inputs["input_ids"].shape[1]
    expected = recompute(tiny, sample, second.sequences[0, length:-1].tolist(), **mode)
    torch.testing.assert_close(torch.cat(second.logits).double(), expected[-STEPS:], atol=2e-4, rtol=0)


def test_second_turn_in_a_padded_batch(tiny: Tiny) -> None:
    batch = samples(tiny, "mixed")
    model, inputs = tiny.model(), tiny.inputs(*batch)
    length = inputs["input_ids"].shape[1]
    with tiny.attach(model):
        first = generate(model, inputs)
        turn = tiny.processor.tokenizer(f" USER: {FOLLOW_UP} ASSISTANT:", add_special_tokens=False, return_tensors="pt")
        ids = torch.cat([first.sequences, turn["input_ids"].repeat(len(batch), 1)], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids[:, length:])], 1)
        second = generate(model, {"input_ids": ids, "attention_mask": mask}, **with_cache(model, first.past_key_values))
    for b, sample in enumerate(batch):
        expected = recompute(tiny, sample, second.sequences[b, length:-1].tolist())
        steps = torch.stack([step[b] for step in second.logits]).double()
        torch.testing.assert_close(steps, expected[-STEPS:], atol=2e-4, rtol=0)


@pytest.mark.parametrize("cache", ["evict", "layered"])
@pytest.mark.parametrize("name", ["one", "batch", "mixed"])
def test_beam_search(tiny: Tiny, cache: str, name: str) -> None:
    """Beams share the pruned prompt: each winner's score is its log-probability under recomputation."""
    batch = samples(tiny, name)
    model, inputs = tiny.model(), tiny.inputs(*batch)
    with tiny.attach(model, cache=cache):
        out = generate(model, inputs, num_beams=3, length_penalty=0.0, output_scores=True)
    tokens = generated(out.sequences, inputs)
    for b, sample in enumerate(batch):
        expected = recompute(tiny, sample, tokens[b, :-1].tolist(), cache=cache).log_softmax(-1)
        score = expected.gather(1, tokens[b].unsqueeze(1)).sum()
        assert out.sequences_scores[b].item() == pytest.approx(score.item(), abs=1e-3)


def test_two_conversations_at_once(tiny: Tiny) -> None:
    """What a cut left behind belongs to the cache, not to the pruner: a prefill in between changes nothing."""
    one, other = samples(tiny, "one")[0], samples(tiny, "two images")[0]
    model, later = tiny.model(), [17, 200]
    with torch.no_grad(), tiny.attach(model):
        first = model(**tiny.inputs(one), use_cache=True).past_key_values
        second = model(**tiny.inputs(other), use_cache=True).past_key_values
        for sample, cache in ((one, first), (other, second)):
            logits = model(input_ids=torch.tensor([later]), **with_cache(model, cache)).logits[0]
            torch.testing.assert_close(logits.double(), recompute(tiny, sample, later)[1:], atol=2e-4, rtol=0)


def test_every_generate_starts_afresh(tiny: Tiny) -> None:
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "mixed"))
    with tiny.attach(model):
        first = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
        model.generate(**tiny.inputs(*samples(tiny, "no image")), max_new_tokens=2)
        assert model.generate(**inputs, max_new_tokens=STEPS, do_sample=False).tolist() == first.tolist()


def test_a_cache_of_the_user(tiny: Tiny) -> None:
    """An empty `DynamicCache` handed in is filled, pruned, and the same object comes back."""
    model, inputs, cache = tiny.model(), tiny.inputs(*samples(tiny, "one")), DynamicCache()
    with torch.no_grad(), tiny.attach(model):
        expected = model(**inputs, use_cache=True)
        out = model(**inputs, **with_cache(model, cache), use_cache=True)
        assert out.past_key_values is cache
        assert cache.get_seq_length() == expected.past_key_values.get_seq_length()
        steps = [
            model(input_ids=torch.tensor([[9]]), **with_cache(model, c)).logits
            for c in (cache, expected.past_key_values)
        ]
    torch.testing.assert_close(*steps)


def test_decode_steps_are_untouched(tiny: Tiny) -> None:
    """A cache that a stock prefill filled is continued by an attached model exactly as by the stock one."""
    model, inputs = tiny.model(), tiny.inputs(*samples(tiny, "batch"))
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
    step = {"input_ids": torch.tensor([[5], [6], [7]]), "attention_mask": mask}
    with torch.no_grad():
        stock = model(**step, **with_cache(model, model(**inputs, use_cache=True).past_key_values)).logits
        cache = model(**inputs, use_cache=True).past_key_values
        with tiny.attach(model) as pruner:
            assert torch.equal(model(**step, **with_cache(model, cache)).logits, stock)
            model(**inputs)
            trace = pruner.trace
            model(**step, **with_cache(model, model(**inputs, use_cache=True).past_key_values))
            assert len(pruner.trace.stages) == len(trace.stages), "a decode step must not replace the prefill's trace"


@pytest.mark.parametrize("choice", [{}, {"positions": "compact"}], ids=str)
def test_a_padded_cache_does_not_go_on_without_the_pruner(tiny: Tiny, choice: dict[str, Any]) -> None:
    """Only the pruner knows which of the kept tokens are padding; the stock model would silently attend to it."""
    inputs = tiny.inputs(*samples(tiny, "batch"))
    model = tiny.model()
    with torch.no_grad(), tiny.attach(model, **choice):
        cache = model(**inputs).past_key_values
    step = {"input_ids": inputs["input_ids"][:, -1:], **with_cache(model, cache)}
    with torch.no_grad(), pytest.raises(ivtp.IvtpError, match="pruner is attached"):
        model(**step)
